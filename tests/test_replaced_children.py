"""Children that are replaced are reached in other ways, too, and classes are asked for more than a forward."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from nets import C, conv, conv_norm, fuse_purely, images, owned, ready, same, stays_right


class Chain(nn.Module):
    """A convolution and its norm, the first reached by `reach`."""

    def __init__(self, hold: Callable[[Any], Any], reach: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.c, self.n = conv(3), nn.BatchNorm2d(C)
        self.reach = reach
        self.__dict__["held"] = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.reach(self, x))


HOLDERS = {
    "list": (lambda m: [m.c], lambda m, x: m.held[0](x)),
    "dict": (lambda m: {"c": m.c}, lambda m, x: m.held["c"](x)),
    "tuple": (lambda m: (m.c,), lambda m, x: m.held[0](x)),
    "nested": (lambda m: {"all": [(m.c,)]}, lambda m, x: m.held["all"][0][0](x)),
    "namespace": (lambda m: SimpleNamespace(c=m.c), lambda m, x: m.held.c(x)),
    "partial": (lambda m: functools.partial(m.c), lambda m, x: m.held(x)),
    "bound method": (lambda m: m.c.forward, lambda m, x: m.held(x)),
    "attribute": (lambda m: m.c, lambda m, x: m.held(x)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_convolution_that_is_held_elsewhere(holder: str) -> None:
    hold, reach = HOLDERS[holder]
    stays_right(Chain(hold, reach))


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_norm_that_is_held_elsewhere(holder: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.c = conv(3), nn.BatchNorm2d(C)
            self.__dict__["held"] = HOLDERS[holder][0](self)

        def forward(self, x: Tensor) -> Tensor:
            return HOLDERS[holder][1](self, self.first(x))

    stays_right(Normed())


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_block_that_is_held_elsewhere(holder: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_norm(3), conv_norm(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = Sum()
            self.__dict__["held"] = HOLDERS[holder][0](self)

        def forward(self, x: Tensor) -> Tensor:
            return HOLDERS[holder][1](self, x).relu()

    fused = stays_right(Around())
    if holder != "bound method":
        assert owned(fused.odd) == {"convs": 1, "linears": 0, "norms": 0}


def test_a_tap_in_a_list() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = conv_norm(3)
            self.taps = [self.stage[0]]

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x).relu()

        def tapped(self, x: Tensor) -> Tensor:
            return self.taps[0](x)

    model = ready(Taps())
    fused = fuse_purely(model)
    same(model, fused, images())
    same(model.tapped, fused.tapped, images())
