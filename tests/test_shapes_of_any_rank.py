"""Shapes whose length is the rank of a value: put into other shapes, or giving constants theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import SIZES, Beside, C, becomes, conv, conv_norm, fuse_purely, images, ready, same
from torch import Tensor, nn

import reparam

Forward = Callable[[Any, Tensor], Any]


class Small(nn.Module):
    """A convolution and its norm, linear layers, and a scale; what it does is passed in."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(C)
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)
        self.gain = nn.Parameter(torch.ones(C))
        self.does = forward

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)

    def _normed(self, x: Tensor) -> Tensor:  # the region: one convolution when it is fused
        return self.norm(self.conv(x))


# --- shapes within other shapes -------------------------------------------------------------------


def heads(net: Small, x: Tensor) -> Tensor:
    y = net._normed(x).flatten(2).transpose(1, 2)
    shape = y.shape[:-1]
    hidden = (*shape, -1, 2)
    q, k = net.first(y).view(hidden).transpose(1, 2), net.second(y).view(hidden).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(*shape, -1).contiguous()


def levels(net: Small, x: Tensor) -> Tensor:
    maps = [net._normed(x).relu(), F.max_pool2d(x, 2)]
    shapes = [value.shape[2:] for value in maps]
    parts = torch.cat([value.flatten(2) for value in maps], 2).split([h * w for h, w in shapes], 2)
    return sum(p.reshape(*p.shape[:2], *shape).mean((2, 3)) for p, shape in zip(parts, shapes, strict=True))


def first_and_rest(net: Small, x: Tensor) -> Tensor:
    y = net._normed(x)
    batch, channels, *rest = y.shape
    return y.reshape(batch, 2, channels // 2, *rest)


def ends(net: Small, x: Tensor) -> Tensor:
    y = net._normed(x)
    batch, *_, width = y.shape
    return y.view(batch, -1, width)


def from_tuples(net: Small, x: Tensor) -> Tensor:
    before, behind = tuple(x.shape[:1]), tuple(x.shape[2:])
    return net._normed(x).view(before + (2, 3) + behind)  # noqa: RUF005 (what authors write)


SPLICED: dict[str, Forward] = {
    "heads": heads,
    "levels": levels,
    "first and rest": first_and_rest,
    "ends": ends,
    "from tuples": from_tuples,
    "in a call": lambda net, x: net._normed(x).reshape(*x.shape[:-1], 1, -1),
    "twice": lambda net, x: net._normed(x).reshape(*x.shape[:-2], -1).reshape(*x.shape[:2], *x.shape[2:]),
    "in a list": lambda net, x: F.interpolate(net._normed(x), size=[*x.shape[2:]]),
    "made": lambda net, x: net._normed(x).relu() + torch.zeros(*x.shape[:1], C, 1, 1, dtype=x.dtype),
    "returned": lambda net, x: (net._normed(x), (*x.shape[1:], 7), [*x.shape]),
}


@pytest.mark.parametrize("name", SPLICED)
def test_a_shape_may_become_a_part_of_another_one(name: str) -> None:
    becomes(ready(Small(SPLICED[name])), *map(images, SIZES), norm=0)


LOOKED_AT: dict[str, Forward] = {
    "length": lambda net, x: net._normed(x) * len((*x.shape[:-1], 3)),
    "index": lambda net, x: net._normed(x) / (*x.shape, 1)[1],
    "count": lambda net, x: net._normed(x) * sum(1 for _ in (*x.shape, 1)),
    "content": lambda net, x: net._normed(x) * (3 if SIZES[0][0] in [*x.shape] else 2),
    "equal": lambda net, x: net._normed(x) * (3 if (*x.shape,) == (2, C, *SIZES[0]) else 2),
    "order": lambda net, x: F.interpolate(net._normed(x), size=[*x.shape[2:]][::-1]),
    "repeated": lambda net, x: net._normed(x).view(([*x.shape] * 2)[4:]),
    "written": lambda net, x: (lambda s: net._normed(x).view([*s[:1], 2, 3, *s[2:]]))(list(x.shape)),
    "first and other": lambda net, x: (lambda b, *rest: net._normed(x).view(b, *rest) * len(rest))(*x.shape),
    "truth": lambda net, x: net._normed(x) * bool([*x.shape[4:]]) + x,
    "names": lambda net, x: net._normed(x) * dict(zip("abcd", [*x.shape], strict=False))["a"],
    "call": lambda net, x: (lambda *sizes: net._normed(x) * len(sizes))(*x.shape),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_shape_that_is_looked_at_in_another_way_stays_right(name: str) -> None:
    model = ready(Beside(Small(LOOKED_AT[name])))
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size))


def test_a_shape_of_another_rank_is_put_in_as_well() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.gain = nn.Linear(C, 8), nn.Linear(8, C), nn.Parameter(torch.ones(C))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).view(*x.shape[:-1], 2, -1).relu()
            return self.second(y.reshape(*x.shape[:-1], -1)) * self.gain

    model = ready(Tokens())
    fused = becomes(model, *(torch.randn(*[2] * n, C, dtype=torch.float64) for n in (1, 2, 4)), calls=3)
    assert not [refusal for refusal in reparam.receipt(fused).left if refusal.rule == "unread"]


# --- constants whose shape depends on the rank of what they meet ----------------------------------


def unsqueezed(net: Small, y: Tensor) -> Tensor:
    shape: list[Any] = [1] * y.dim()
    shape[1] = -1
    return y * net.gain.view(shape)


SHAPED: dict[str, Forward] = {
    "in a call": lambda net, y: y * net.gain.view(1, -1, *([1] * (y.dim() - 2))),
    "a sum of tuples": lambda net, y: y * net.gain.reshape((1, -1) + (1,) * (y.ndim - 2)),
    "an index": lambda net, y: y * net.gain[(None, slice(None)) + (None,) * (y.ndim - 2)],
    "an item": unsqueezed,
    "by sizes": lambda net, y: y * net.gain.view(y.shape[1], *[1] * len(y.shape[2:])),
    "by channels": lambda net, y: y * net.gain.view(*[1, y.shape[1]] + [1] * (len(y.shape) - 2)),
    "in its type": lambda net, y: y + net.gain.view(1, -1, *(1,) * (y.dim() - 2)).to(y.dtype),
    "two of one shape": lambda net, y: (lambda s: y * net.gain.view(s) + net.first.bias.view(s))(
        (1, -1) + (1,) * (y.ndim - 2)
    ),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("normed", [False, True], ids=["convolution", "norm"])
def test_a_scale_whose_shape_depends_on_the_rank(name: str, normed: bool) -> None:
    shaped = SHAPED[name]
    model = ready(Small(lambda net, x: shaped(net, net._normed(x) if normed else net.conv(x)).relu()))
    fused = becomes(model, *map(images, SIZES), conv=1, norm=0, calls=2)
    square = torch.randn(C, C, 5, dtype=torch.float64)
    if not normed:  # the rank of an image without a batch is an error, not another result
        with pytest.raises(AssertionError, match="of one rank"):
            fused(square)


class Affine(nn.Module):
    """A norm with fixed statistics, for any number of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        x = (x - self.running_mean.reshape(shape)) * torch.rsqrt(self.running_var + 1e-3).reshape(shape)
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


def test_norms_written_out_for_any_rank() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norms = conv(3), conv(1), nn.ModuleList([Affine(), Affine()])

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norms[0](self.a(x)) + self.norms[1](self.b(x)) + x)

    becomes(ready(Branches()), *map(images, SIZES), conv=1, add=0, calls=2)


def test_a_scale_shaped_for_the_rank_of_another_value() -> None:
    class Other(Small):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return (self.conv(x) * self.gain.view(-1, *(1,) * (F.max_pool2d(y, 1).dim() - 2))).relu()

    model = ready(Other(lambda net, x: x))
    becomes(model, (images(), images()), (images()[0], images()), calls=4)


@pytest.mark.parametrize("shape", [lambda y: (C,) + (1,) * (y.ndim - 2), lambda y: (y.shape[1], 1)])
def test_a_scale_of_tokens_that_is_none_of_channels(shape: Callable[[Tensor], Any]) -> None:
    model = ready(Small(lambda net, x: (lambda y: y * net.gain.view(shape(y)))(net.first(x)).relu()))
    same(model, fuse_purely(model), torch.randn(2, C, C, dtype=torch.float64))


@pytest.mark.parametrize(
    "shape",
    [
        lambda y: (1, y.shape[1], y.shape[0] - 1, *[1] * (y.dim() - 3)),
        lambda y: (y.shape[0] // 2, C, *[1] * (y.dim() - 2)),
        lambda y: (y.shape[0] - 1, y.shape[1] + 0, *[1] * (y.dim() - 2)),
    ],
    ids=["less", "half", "both"],
)
def test_a_scale_whose_shape_depends_on_sizes(shape: Callable[[Tensor], Any]) -> None:
    model = ready(Small(lambda net, x: (lambda y: (y * net.gain.view(shape(y))).relu())(net.conv(x))))
    same(model, fuse_purely(model), images())


# --- axes and numbers that depend on the rank -----------------------------------------------------

NUMBERS: dict[str, Forward] = {
    "flatten": lambda net, y: y.flatten(y.dim() - 2),
    "flatten to": lambda net, y: torch.flatten(y, 1, y.dim() - 1),
    "keepdim": lambda net, y: y.sum(dim=1, keepdim=y.dim() > 3),
    "eps": lambda net, y: F.batch_norm(y, net.norm.running_mean, net.norm.running_var, eps=y.dim() / 1e5),
    "slope": lambda net, y: F.leaky_relu(y, y.dim() / 4),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_an_operation_may_depend_on_the_rank(name: str) -> None:
    model = ready(Small(lambda net, x: NUMBERS[name](net, net._normed(x))))
    becomes(model, *map(images, SIZES), convs=1)


def test_the_block_is_fused_beside_what_is_not_read() -> None:
    def loops(net: Small, x: Tensor) -> Tensor:
        for size in x.shape[2:]:
            x = x / size
        return x

    model = ready(nn.Sequential(conv_norm(), Small(loops)))
    (refusal,) = [refusal for refusal in reparam.plan(model).left if refusal.rule == "unread"]
    assert "its length depends on the input" in refusal.condition
    becomes(model, *map(images, SIZES), norms=1)
