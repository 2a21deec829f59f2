"""Weights of a fused net lie in memory as those of its model do: a model that was made channels-last stays so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nets import Block, images, ready, same
from torch import Tensor, nn

import reparam
from reparam.models import RepVGG


class Volumes(nn.Module):
    """Two branches over three axes, then a transposed convolution with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(4, 6, 3, padding=1, bias=False), nn.Conv3d(4, 6, 1)
        self.norm, self.up, self.last = nn.BatchNorm3d(6), nn.ConvTranspose3d(6, 4, 2, 2), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.up(self.norm(self.a(x) + self.b(x)).relu()))
        return y


def small_repvgg() -> nn.Module:
    return RepVGG(depths=(1, 2), widths=(8, 16), strides=(1, 2), num_classes=10, in_channels=6)


def of_one_tap() -> nn.Module:
    """Only kernels of one tap, which lie alike either way, become one of nine."""
    return nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1), nn.Conv2d(8, 4, 1))


def chain() -> nn.Module:
    return nn.Sequential(Block(), nn.Conv2d(6, 6, 3, groups=3), nn.BatchNorm2d(6), nn.Flatten(2), nn.Linear(63, 4))


CASES: list[tuple[Callable[[], nn.Module], Tensor, torch.memory_format]] = [
    (small_repvgg, images(), torch.channels_last),
    (of_one_tap, images(), torch.channels_last),
    (chain, images(), torch.channels_last),
    (Volumes, torch.randn(2, 4, 5, 6, 7, dtype=torch.float64), torch.channels_last_3d),
]


def strides(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: weight.stride() for name, weight in net.named_parameters()}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("build", "x", "memory_format"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_weights_lie_as_those_of_the_model(
    build: Callable[[], nn.Module], x: Tensor, memory_format: torch.memory_format, inplace: bool
) -> None:
    net = ready(build())
    plain = reparam.fuse(net)
    turned = copy.deepcopy(net).to(memory_format=memory_format)
    fused = reparam.fuse(copy.deepcopy(turned), inplace=inplace)
    assert strides(fused) == strides(copy.deepcopy(plain).to(memory_format=memory_format))
    assert strides(reparam.fuse(net)) == strides(plain)
    same(net, fused, x.contiguous(memory_format=memory_format), tolerance=1e-12)


def test_the_result_is_channels_last_too() -> None:
    net = ready(Block()).to(memory_format=torch.channels_last)
    y = reparam.fuse(net)(images())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()


def test_one_layer_of_a_contiguous_model() -> None:
    net = ready(nn.Sequential(Block(), nn.ReLU(), Block()))
    net[0].to(memory_format=torch.channels_last)
    fused = reparam.fuse(net)
    weights = [weight for weight in fused.parameters() if weight.dim() == 4]
    assert [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights] == [True, False]
