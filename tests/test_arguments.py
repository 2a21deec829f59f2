"""Branches that a caller computes and a child sums: nothing of what disappears may go on being computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import SIZES, C, becomes, conv, conv_norm, fuse_purely, images, owned, ready, same, stays_right
from torch import Tensor, nn

import reparam

INPUTS = [images(size) for size in SIZES]


class Sum(nn.Module):
    """The sum of two arguments."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class SumOfList(nn.Module):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return sum(parts)


class SumOfDict(nn.Module):
    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(parts.values())).sum(0)


class Branches(nn.Module):
    """Two branches, summed by a child."""

    def __init__(self, total: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.dense, self.point, self.total, self.call = conv_norm(3), conv_norm(1), total, call

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.call(self.total, self.dense(x), self.point(x)))


class Residual(nn.Module):
    """A convolution and its input, summed by a child."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add = conv(3), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.add(x, self.conv(x)))


class Tail(nn.Module):
    """A block that is given what it adds."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = conv_norm(3) if body is None else body

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.relu(self.body(x) + skip)


class Between(nn.Module):
    """Hands both on."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = Tail()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.tail(x, skip=skip)


class Asks(Between):
    """Does without what it is not given."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.tail(x, skip=skip) if skip is not None else self.tail(x, x)


class Head(nn.Module):
    """Gives a block its own input and a branch of it."""

    def __init__(self, tail: nn.Module, both: bool = False) -> None:
        super().__init__()
        self.down, self.tail, self.both = conv_norm(1), tail, both

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        skip = self.down(x)
        y = self.tail(x, skip)
        return (y, skip) if self.both else y


@pytest.mark.parametrize(
    ("total", "call"),
    [
        (Sum(), lambda total, a, b: total(a, b)),
        (Sum(), lambda total, a, b: total(b=a, a=b)),
        (SumOfList(), lambda total, a, b: total([a, b])),
        (SumOfDict(), lambda total, a, b: total({"dense": a, "point": b})),
        (Residual().add, lambda total, a, b: total(a, total(b, b))),
    ],
    ids=["two arguments", "keywords", "list", "dict", "twice"],
)
def test_branches_that_a_child_sums(total: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    model = ready(Branches(total, call))
    fused = fuse_purely(model)
    for x in INPUTS:
        same(model, fused, x)
    before, after = owned(model), owned(fused)
    assert after["convs"] <= before["convs"]
    assert after["norms"] == 0


@pytest.mark.parametrize("cost", [reparam.cost.DEFAULT_COST, reparam.cost.always, reparam.cost.parameters])
def test_a_residual_that_a_child_adds(cost: reparam.cost.Cost) -> None:
    model = ready(nn.Sequential(Residual(), Residual()))
    fused = fuse_purely(model, cost=cost)
    same(model, fused, INPUTS[0])
    assert owned(fused)["convs"] == 2
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in model.parameters())


def test_two_sums_in_children_are_one_convolution() -> None:
    becomes(ready(Branches(Sum(), lambda total, a, b: total(a, b))), *INPUTS, conv=1, norm=0, add=0, convs=1, norms=0)
    becomes(ready(Branches(SumOfList(), lambda total, a, b: total([a, b]))), *INPUTS, conv=1, norm=0, add=0, norms=0)


@pytest.mark.parametrize("tail", [Tail, Between, lambda: Tail(conv(3))])
def test_a_branch_that_a_block_is_given(tail: Callable[[], nn.Module]) -> None:
    """The caller computes it no more; the block ignores what it is given."""
    becomes(ready(nn.Sequential(Head(tail()), Head(tail()))), *INPUTS, conv=2, norm=0, add=0, convs=2, norms=0)


def test_a_branch_given_to_a_module_that_does_without() -> None:
    model = ready(Head(Asks()))
    fused = fuse_purely(model)
    same(model, fused, INPUTS[0])
    same(model.tail, fused.tail, INPUTS[0])
    same(model.tail, fused.tail, INPUTS[0], INPUTS[0])
    assert (owned(fused)["convs"], owned(fused)["norms"]) == (2, 0)


def test_a_branch_that_the_caller_needs_itself() -> None:
    model = ready(Head(Tail(), both=True))
    fused = becomes(model, *INPUTS, norm=0, norms=0)
    assert owned(fused)["convs"] <= 2


def test_a_branch_of_a_caller_that_branches_on_its_input() -> None:
    """What the caller computes cannot be taken out of its forward: two convolutions stay, and the sum."""

    class Open(Head):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if x.sum() > 1e9:
                return self.tail(x, x)
            return self.tail(x, self.down(x))

    stays_right(Open(Tail()))
    model = ready(Open(Tail()))
    fused = fuse_purely(model)
    assert (owned(fused)["convs"], owned(fused)["norms"]) == (2, 0)


@pytest.mark.parametrize("kind", ["scale", "weight"])
def test_a_scale_that_a_child_multiplies_by(kind: str) -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.times, self.add = conv_norm(3), Times(), Sum()
            self.scale = nn.Parameter(torch.ones(C, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.times(self.body(x), self.scale if kind == "scale" else self.body[0].weight.mean())
            return torch.relu(self.add(x, y))

    model = ready(Scaled())
    fused = becomes(model, *INPUTS, norm=0)
    assert owned(fused)["convs"] == 1


def test_a_branch_that_another_child_gives_among_others() -> None:
    """What gives it goes on giving the others."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.gate = conv_norm(1), conv_norm(1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"down": self.down(x), "gate": torch.sigmoid(self.gate(x))}

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.tail = Both(), Tail()

        def forward(self, x: Tensor) -> Tensor:
            both = self.both(x)
            return self.tail(x, both["down"]) * both["gate"]

    model = ready(Gated())
    fused = becomes(model, *INPUTS, norm=0, norms=0)
    assert owned(fused)["convs"] <= 3


def test_one_sum_for_several_pairs_of_branches() -> None:
    """A child that is called twice holds nothing of either."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = Sum()
            self.a, self.b, self.c, self.d = conv_norm(3), conv_norm(1), conv_norm(3), conv_norm(1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.add(self.a(x), self.b(x)))
            return self.add(self.c(x), self.d(x))

    becomes(ready(Twice()), *INPUTS, conv=2, norm=0, add=0, convs=2, norms=0)
