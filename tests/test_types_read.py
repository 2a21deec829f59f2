"""Forwards that ask a parameter for its data type or device, as wrappers do before they cast their input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import Block, conv_norm, images, owned, ready, same
from torch import Tensor, nn

import reparam

ASKED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "type of the first": lambda net, x: x.to(next(net.parameters()).dtype),
    "device of the first": lambda net, x: x.to(next(net.parameters()).device),
    "first floating": lambda net, x: x.to(next(p.dtype for p in net.parameters() if p.is_floating_point())),
    "types of all": lambda net, x: x.to({p.dtype for p in net.parameters()}.pop()),
    "of a child": lambda net, x: x.to(next(net.first.parameters()).dtype),
}


class Asks(nn.Module):
    """Casts its input."""

    def __init__(self, how: str, first: nn.Module) -> None:
        super().__init__()
        self.how, self.first, self.second = how, first, Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(ASKED[self.how](self, x)))


@pytest.mark.parametrize("first", [Block, lambda: conv_norm(3)], ids=["block", "chain"])
@pytest.mark.parametrize("how", ASKED)
def test_all_blocks_are_fused(how: str, first: Callable[[], nn.Module]) -> None:
    model = ready(Asks(how, first()))
    fused = reparam.fuse(model)
    same(model, fused, images())
    assert (owned(fused)["convs"], owned(fused)["norms"]) == (2, 0)
    assert fused.float()(images().float()).dtype == torch.float32


def test_a_number_of_a_parameter_is_not_its_type() -> None:
    class Sums(Asks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(self.parameters()).sum().sign()

    model = ready(Sums("type of the first", Block()))
    same(model, reparam.fuse(model), images())


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_a_type_that_was_asked_for_is_not_fixed(wanted: torch.dtype) -> None:
    """The forward sums branches itself: generated anew, it would cast to the type that the model had."""

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_norm(3), conv_norm(1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(next(self.parameters()).dtype)
            return torch.relu(self.a(x) + self.b(x))

    model = ready(Casts())
    fused = reparam.fuse(model).to(wanted)
    assert fused(images()).dtype == wanted
    same(model.to(wanted), fused, images(), tolerance=1e-5)


def test_blocks_of_two_types() -> None:
    model = ready(Asks("type of the first", Block()))
    model.second.float()
    model.second.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    same(model, reparam.fuse(model), images(), tolerance=1e-5)
