"""What must stay right, whatever a net does around its regions, and what must be readable.

Every net here stands beside a plain block (`nets.Beside`): the block must be fused, the rest must stay right.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import gc
import inspect
import math
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import (
    SIZES,
    Beside,
    Block,
    C,
    call,
    conv,
    conv_norm,
    count,
    difference,
    fuse_purely,
    images,
    is_fused,
    owned,
    randomise,
    ready,
    same,
    stays_right,
)
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import reparam

X, Z = images(), images(seed=1)


class Two(nn.Module):
    """A 3x3 and a 1x1 branch, each with a norm, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = conv_norm(3), conv_norm(1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + self.b(x)


# --- in-place operations, aliases, views ----------------------------------------------------------


class ReluOnTheInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x.relu_()
        return y + self.b(x)


class ModuleOnTheInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.act(x)
        return y + self.b(x)


class AddToTheInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        x += self.a(x)
        return self.b(x) + x


class UnusedResult(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.act(y)
        return y + self.b(x)


class ResultUsedTwice(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.act(y)
        return y + z + self.b(x)


class FunctionalInPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        F.relu(y, inplace=True)
        torch.relu_(z)
        return y + z


class LateInPlace(Two):
    """A value is used in a sum, then changed, and the sum is used after that."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y + self.b(x)
        y.mul_(2)
        return z + y


class RootWrittenLater(Two):
    """A norm is read after the value that it normalised was changed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(C), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + torch.relu(self.b(x))
        z = self.norm(y)
        y *= 0.5
        return self.last(-z)


class RootWrittenByChild(RootWrittenLater):
    """The same, by a child whose result is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = nn.Sequential(nn.Dropout(0.1), nn.Hardtanh(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + torch.relu(self.b(x))
        z = self.norm(y)
        self.writer(y)
        return self.last(-z)


class AliasThenAdd(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y
        z += self.b(x)
        return y * 2 + z


class AliasThroughIdentity(Two):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.drop = nn.Identity(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.drop(self.same(y))
        z += self.b(x)
        return y + z


class SliceAssignment(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 1:] = self.b(x)[:, 1:]
        y[..., 0] = 0
        return y + self.b(x)


class SliceOfTheInput(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x[:, :2] = 1.0
        return y + self.b(x)


class WriteThroughView(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0].mul_(3)
        return y + self.b(x)


class WriteThroughNamedView(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first = y[:, :2]
        first += 1
        y.view(y.shape[0], -1).add_(0.5)
        return y + self.b(x)


class WriteThroughChunk(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        left, right = y.chunk(2, dim=1)
        left.mul_(2)
        right.copy_(left)
        return y + self.b(x)


class WriteToOut(Two):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        with torch.no_grad():
            torch.mul(z, 2, out=y)
        return y + z


class WriteByHelper(Two):
    @staticmethod
    def clip(value: Tensor) -> None:
        value.clamp_(min=0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.clip(y)
        return y + self.b(x)


class BranchWritesItsInput(nn.Module):
    """A child that activates its own input in place, before a second child reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.ReLU(inplace=True), conv_norm(3)), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class InPlaceAfterInPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x).add_(self.b(x)))
        y *= 0.5
        return y.sub_(x)


@pytest.mark.parametrize(
    "net",
    [
        ReluOnTheInput, ModuleOnTheInput, AddToTheInput, UnusedResult, ResultUsedTwice, FunctionalInPlace, LateInPlace,
        RootWrittenLater, RootWrittenByChild,
        AliasThenAdd, AliasThroughIdentity, SliceAssignment, SliceOfTheInput, WriteThroughView, WriteThroughNamedView,
        WriteThroughChunk, WriteToOut, WriteByHelper, BranchWritesItsInput, InPlaceAfterInPlace,
    ],
)  # fmt: skip
def test_in_place_operations_aliases_and_views(net: type[nn.Module]) -> None:
    stays_right(net())
    alone = ready(net())
    fused = fuse_purely(alone)
    for size in SIZES:
        same(alone, fused, images(size))  # also compares what became of the caller's input


# --- values used elsewhere ------------------------------------------------------------------------


class AlsoReturned(Two):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        y = self.a[0](x)
        z = self.a[1](y)
        return z + self.b(x), y, {"norm": z}


class AlsoKept(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.kept = y.detach()
        return y + self.b(x)


class AlsoGates(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return (y + self.b(x)) * torch.sigmoid(y)


class ReturnedBefore(Two):
    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.a(x)
        outputs = [y, y + self.b(x)]
        y += 1
        return outputs


class SharedConv(nn.Module):
    """One convolution, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = conv(3), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(self.conv(x))) + torch.sigmoid(self.right(self.conv(-x)))


class SharedNorm(nn.Module):
    """Two convolutions, one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = conv(3), conv(1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.left(x))) * self.norm(self.right(x))


class SharedBlock(nn.Module):
    """One block that two owners call, one of them with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        shared = conv_norm(3)
        self.left, self.right = nn.Sequential(shared, nn.BatchNorm2d(C)), nn.Sequential(nn.Tanh(), shared)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x)) * self.right(x)


class SharedAcrossLevels(nn.Module):
    """Tower shared by several levels, with its own norms per level, as detectors' heads have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList([conv(3), conv(3)])
        self.norms = nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(C) for _ in range(2)]) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for norms, scale in zip(self.norms, (1, 2, 3), strict=True):
            y = F.avg_pool2d(x, scale) if scale > 1 else x
            for layer, norm in zip(self.tower, norms, strict=True):
                y = torch.relu(norm(layer(y)))
            outputs.append(y)
        return outputs


class Tied(nn.Module):
    """Two convolutions that hold one weight: a norm behind one of them must not reach the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_norm(3), conv(3)
        self.right.weight = self.left[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x)) + torch.tanh(self.right(x))


class TiedWithUse(nn.Module):
    """A weight that forward also reads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = conv_norm(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer[0].weight.square().sum()


@pytest.mark.parametrize(
    "net",
    [
        AlsoReturned,
        AlsoKept,
        AlsoGates,
        ReturnedBefore,
        SharedConv,
        SharedNorm,
        SharedBlock,
        SharedAcrossLevels,
        Tied,
        TiedWithUse,
    ],
)
def test_values_modules_and_weights_used_elsewhere(net: type[nn.Module]) -> None:
    stays_right(net())


def test_tied_weights_stay_tied() -> None:
    fused = stays_right(Tied())
    kept = ready(Beside(Tied()))
    assert torch.equal(fused.odd.right.weight, kept.odd.right.weight), (
        "the norm behind one convolution reached the other"
    )


def test_a_value_kept_on_the_module_is_kept() -> None:
    model = ready(Beside(AlsoKept()))
    fused = fuse_purely(model)
    same(model, fused, X)
    assert difference(model.odd.kept, fused.odd.kept) < 1e-10


class TwoNames(nn.Module):
    """One convolution under two names, with a norm behind one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3)
        self.second, self.norm = self.first, nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.first(x))) + torch.tanh(self.second(x))


class KeptInAList(Two):
    """Children that a plain list and a plain dictionary hold as well, and forward calls through them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(C)
        self.order, self.named = [self.conv, self.norm], {"point": self.b, "bound": self.b.forward}

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.order:
            y = layer(y)
        return torch.relu(y) + self.named["point"](x) + self.named["bound"](x) + torch.tanh(self.norm(self.conv(x)))


class Delegates(nn.Module):
    """A wrapper that looks attributes up in what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x)) + self.inner(x)


@pytest.mark.parametrize("net", [TwoNames, KeptInAList, Delegates])
def test_children_reached_by_other_names(net: type[nn.Module]) -> None:
    stays_right(net())


def test_one_tensor_given_twice() -> None:
    class Net(Two):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y = self.a(x)
            z.mul_(2)
            return y + self.b(x)

    model = ready(Net())
    fused = fuse_purely(model)
    same(model, fused, X, Z)
    for net in (model, fused):
        x = X.clone()
        with torch.no_grad():
            assert difference(net(x, x), model.a(X) + model.b(2 * X)) < 1e-10


# --- broadcast sums -------------------------------------------------------------------------------


class PooledBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x.mean((2, 3), keepdim=True))


class GloballyPooledSquare(Two):
    """Both branches look alike, one of them at size 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        return self.a(x) + self.b(y) + y


class OneChannelBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = conv_norm(3), conv_norm(1, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x)


class OneChannelIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.widen, self.norm = conv(3, C, 1), conv_norm(3, 1, C), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.squeeze(x))
        return self.widen(y) + y + self.norm(y)


class WholeImageKernel(nn.Module):
    """A 5x5 kernel without padding: one pixel at size 5, which then is added everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.whole = conv_norm(1), conv_norm(5, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.whole(x)


class AgreeAtOddSizes(nn.Module):
    """Stride 2 with different slack: the sizes of the two branches agree for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = conv_norm(3, stride=2, padding=0), conv_norm(2, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x)


class BroadcastParameter(Two):
    """A position map: a constant that is no per-channel vector."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.pixel = nn.Parameter(torch.randn(1, 1, 1, 1)), nn.Parameter(torch.randn(1, C, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.rows + self.b(x) + self.pixel


@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        (PooledBranch, SIZES),
        (GloballyPooledSquare, SIZES),
        (OneChannelBranch, SIZES),
        (OneChannelIdentity, SIZES),
        (WholeImageKernel, [(5, 5)]),
        (AgreeAtOddSizes, [(9, 11), (3, 7)]),
        (BroadcastParameter, [(9, 11), (9, 4)]),
    ],
)
def test_broadcast_sums(net: type[nn.Module], sizes: Any) -> None:
    stays_right(net(), *map(images, sizes))


@pytest.mark.parametrize(("net", "size"), [(WholeImageKernel, (7, 7)), (AgreeAtOddSizes, (8, 8))])
def test_a_size_that_fails_before_fails_after(net: type[nn.Module], size: tuple[int, int]) -> None:
    model = ready(net())
    with pytest.raises(RuntimeError):
        model(images(size))
    with pytest.raises(RuntimeError):
        reparam.fuse(model)(images(size))


# --- norms that depend on the batch ---------------------------------------------------------------


def test_a_norm_in_training_mode_is_left_with_its_reason() -> None:
    model = ready(Beside(nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU())))
    model.odd[1].train()
    plan = reparam.plan(model)
    assert any("odd" in refusal.path and "train" in str(refusal) for refusal in plan.left), str(plan)
    fused = fuse_purely(model)
    for _ in range(2):
        same(model, fused, X)
    assert fused.odd[1].training
    assert difference(model.odd[1].state_dict(), fused.odd[1].state_dict()) < 1e-10, (
        "running statistics are updated differently"
    )
    assert is_fused(fused.block)


def test_a_norm_without_running_statistics_is_left_with_its_reason() -> None:
    net = nn.Sequential(conv(3), nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU())
    fused = stays_right(net)
    assert owned(fused.odd)["norms"] == 1
    assert any("odd" in refusal.path for refusal in reparam.plan(ready(Beside(net))).left)


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
        nn.InstanceNorm2d(C),
        nn.GroupNorm(2, C),
        nn.LocalResponseNorm(3),
    ],
)
def test_other_norms(norm: nn.Module) -> None:
    stays_right(nn.Sequential(conv(3), norm, nn.ReLU()))


class InputStatistics(nn.BatchNorm2d):
    """A norm whose forward asks for batch statistics, whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def test_a_norm_that_asks_for_batch_statistics() -> None:
    stays_right(nn.Sequential(conv(3), InputStatistics(C), nn.ReLU()))


# --- hooks ----------------------------------------------------------------------------------------


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.short, self.inner = conv(3), nn.BatchNorm2d(C), conv_norm(1), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(self.conv(x)) + self.short(x))


PLACES = [
    "odd",
    "odd.conv",
    "odd.norm",
    "odd.short",
    "odd.short.1",
    "odd.inner",
    "odd.inner.dense.0",
    "odd.inner.skip",
    "",
]


def hooked(place: str, register: Callable[[nn.Module], Any]) -> Beside:
    model = ready(Beside(Hooked()))
    register(model.get_submodule(place))
    return model


@pytest.mark.parametrize("place", PLACES)
def test_forward_hooks_see_what_they_saw(place: str) -> None:
    seen: list[Tensor] = []
    model = hooked(place, lambda module: module.register_forward_hook(lambda m, args, output: seen.append(output)))
    fused = fuse_purely(model)
    for size in SIZES:
        seen.clear()
        same(model, fused, images(size))
        assert len(seen) == 2, f"called {len(seen)} times instead of once by each net"
        assert difference(seen[0], seen[1]) < 1e-10
    assert is_fused(fused.block) or place.startswith("block")


@pytest.mark.parametrize("place", PLACES)
def test_forward_hooks_change_what_they_changed(place: str) -> None:
    model = hooked(place, lambda module: module.register_forward_hook(lambda m, args, output: torch.tanh(output) * 2))
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size))


@pytest.mark.parametrize("place", PLACES)
def test_forward_pre_hooks(place: str) -> None:
    def register(module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda m, args: (torch.tanh(args[0]), *args[1:]))
        module.register_forward_pre_hook(
            lambda m, args, keywords: ((args[0] + 0.5, *args[1:]), keywords), with_kwargs=True
        )

    model = hooked(place, register)
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size))


@pytest.mark.parametrize("place", [place for place in PLACES if place])
def test_backward_hooks(place: str) -> None:
    seen: list[Tensor] = []
    model = hooked(
        place, lambda module: module.register_full_backward_hook(lambda m, into, out: seen.append(out[0].clone()))
    )
    fused = fuse_purely(model)
    for net in (model, fused):
        x = X.clone().requires_grad_()
        net(x).square().sum().backward()
    assert len(seen) == 2, f"called {len(seen)} times instead of once by each net"
    assert difference(seen[0], seen[1]) < 1e-8


# --- autocast, no_grad ----------------------------------------------------------------------------


class Autocast(Two):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.b(x) + self.a[0](x)
        return y + z.float(), z


class AutocastOff(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            z = self.b(x.float())
        return torch.relu(y.float() + z)


@pytest.mark.parametrize("net", [Autocast, AutocastOff])
@pytest.mark.parametrize("outside", [False, True], ids=["plain", "under autocast"])
def test_autocast_blocks(net: type[nn.Module], outside: bool) -> None:
    model = ready(Beside(net())).float()
    fused = fuse_purely(model)
    with torch.autocast("cpu", dtype=torch.bfloat16) if outside else contextlib.nullcontext():
        for size in SIZES:
            same(model, fused, images(size).float(), tolerance=3e-2)
    assert is_fused(fused.block)


class NoGradBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
        return y + self.b(x)


class DetachedBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).detach() + self.b(x)


class NoGradAll(Two):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("net", [NoGradBranch, DetachedBranch, NoGradAll, Two])
def test_no_grad_blocks_keep_their_gradients(net: type[nn.Module]) -> None:
    model = ready(Beside(net()))
    fused = fuse_purely(model)
    same(model, fused, X)
    gradients = []
    for one in (model, fused):
        x = X.clone().requires_grad_()
        output = one(x)
        if output.requires_grad:
            output.square().sum().backward()
        gradients.append((output.requires_grad, x.grad))
    assert difference(gradients[0], gradients[1]) < 1e-8


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        return forward(self, *arguments, **keywords) * 2

    return wrapper


class Decorated(Two):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class InferenceMode(Two):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class CompilerDisabled(Two):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class AutocastForward(Two):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x))


@pytest.mark.parametrize("net", [Decorated, InferenceMode, CompilerDisabled])
def test_decorated_forwards(net: type[nn.Module]) -> None:
    stays_right(net())


def test_forward_under_an_autocast_decorator() -> None:
    model = ready(Beside(AutocastForward())).float()
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size).float(), tolerance=3e-2)


# --- eval() and train() overridden ----------------------------------------------------------------


class ReturnsNothing(Two):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def eval(self) -> None:  # type: ignore[override]
        super().train(False)


class MergingConv(nn.Conv2d):
    """A low-rank adapter that eval() merges into the weight and train() takes out again."""

    def __init__(self) -> None:
        super().__init__(C, C, 3, padding=1, bias=False)
        self.down, self.up, self.merged = (
            nn.Parameter(torch.randn(2, C, 3, 3) / 5),
            nn.Parameter(torch.randn(C, 2)),
            False,
        )

    def train(self, mode: bool = True) -> MergingConv:
        super().train(mode)
        if mode == self.merged:
            delta = torch.einsum("or,rihw->oihw", self.up.data, self.down.data)
            self.weight.data += -delta if mode else delta
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.merged:
            return y
        return y + F.conv2d(F.conv2d(x, self.down, padding=1), self.up[..., None, None])


class MergingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.short = MergingConv(), nn.BatchNorm2d(C), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) + self.short(x)


@pytest.mark.parametrize("net", [ReturnsNothing, MergingNet])
def test_eval_and_train_overridden(net: type[nn.Module]) -> None:
    fused = stays_right(net())
    model = ready(Beside(net()))
    for switch in (lambda m: m.eval(), lambda m: (m.train(), m.eval())):
        switch(fused)
        same(model, fused, X, tolerance=1e-9)


class EvalCache(nn.Module):
    """Computes a bias from a table at eval() and forgets it at train(), as attention with relative positions does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.cached = nn.Parameter(torch.randn(1, C, 1, 1)), conv_norm(1), None
        self.per_device: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> EvalCache:
        super().train(mode)
        self.cached = None if mode else self.table.detach() * 2
        self.per_device = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table * 2 if self.training else self.cached
        key = str(x.device)
        if key not in self.per_device:
            self.per_device[key] = self.table.square()
        return self.layer(x) + bias + self.per_device[key]


# --- random and stateful forwards -----------------------------------------------------------------


class RandomBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) + torch.randn_like(x)


class RandomChoice(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if torch.rand(()) < 2 and bool(torch.randint(2, ())) else self.b(x)


class DropoutAlways(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5) + F.dropout(self.b(x), 0.5, training=True)


class Counter(Two):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) * self.calls + self.b(x)


class CounterBuffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.a(x) * self.steps + self.b(x)


class RunningStatistic(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.level = 0.9 * self.level + 0.1 * x.mean((0, 2, 3), keepdim=True)
        return self.a(x) - self.level + self.b(x)


class FirstOutputCached(Two):
    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.seen.append(tuple(y.shape))
        if self.cache is None or self.cache.shape != y.shape:
            self.cache = y.detach()
        return self.b(x) + self.cache


class AlternatesByCall(Two):
    """Runs one branch or the other, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = True

    def forward(self, x: Tensor) -> Tensor:
        self.first = not self.first
        return self.a(x) + (x if self.first else self.b(x))


@pytest.mark.parametrize(
    "net",
    [
        EvalCache,
        RandomBranch,
        RandomChoice,
        DropoutAlways,
        Counter,
        CounterBuffer,
        RunningStatistic,
        FirstOutputCached,
        AlternatesByCall,
    ],
)
def test_random_and_stateful_forwards(net: type[nn.Module]) -> None:
    stays_right(net())


class SecondCallDiffers(Two):
    """Planning must not run the forward in a way that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) + self.b(x) if self.calls == 1 else self.a(x)


@pytest.mark.parametrize("options", [{}, {"example_inputs": (X,)}], ids=["plain", "with example inputs"])
def test_fusing_is_no_call(options: dict[str, Any]) -> None:
    model = ready(Beside(SecondCallDiffers()))
    fused = fuse_purely(model, **options)
    assert model.odd.calls == 0
    assert fused.odd.calls == 0
    for _ in range(3):
        same(model, fused, X)


def test_fusing_fills_no_cache() -> None:
    model = ready(Beside(EvalCache()))
    fused = fuse_purely(model)
    assert not model.odd.per_device
    assert not fused.odd.per_device
    same(model, fused, X)
    copy.deepcopy(fused)


# --- arguments and outputs ------------------------------------------------------------------------


class Optional(Two):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.BatchNorm2d(C)

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        *,
        scale: float = 1.0,
        features: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        y = self.a(x) + self.b(x)
        if skip is not None:
            y = y + self.c(skip)
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        y = y * scale
        return (torch.relu(y), y) if features else torch.relu(y)


MASK = X > 0.5
OPTIONAL_CALLS = [
    call(X),
    call(X, Z),
    call(X, skip=Z, scale=0.5),
    call(X, scale=-2.0, features=True),
    call(X, None, mask=MASK),
    call(X, mask=MASK, skip=Z, features=True, scale=3),
]


def test_optional_arguments_given_and_absent() -> None:
    stays_right(Optional(), *OPTIONAL_CALLS)


def test_optional_arguments_after_example_inputs() -> None:
    stays_right(Optional(), *OPTIONAL_CALLS, example_inputs=(X,))


class Flags(Two):
    def forward(
        self, x: Tensor, use_a: bool = True, use_b: bool = True, mode: str = "sum", norm_type: int = 2
    ) -> Tensor:
        y = x
        if use_a:
            y = self.a(x)
        if use_b:
            y = y + self.b(x) if mode == "sum" else y * self.b(x)
        return y if norm_type == 2 else y.abs()


def test_flags() -> None:
    stays_right(
        Flags(),
        call(X),
        call(X, False),
        call(X, True, False),
        call(X, mode="product"),
        call(X, use_a=False, use_b=False),
        call(X, norm_type=1),
    )


class VariableArguments(Two):
    def forward(self, *xs: Tensor, weight: float = 1.0, **others: Tensor) -> Tensor:
        y = self.a(xs[0]) + self.b(xs[0])
        for x in xs[1:]:
            y = y + self.b(x) * weight
        for key in sorted(others):
            y = y + self.a(others[key])
        return y


def test_variable_arguments() -> None:
    stays_right(VariableArguments(), call(X), call(X, Z), call(X, Z, X, weight=0.5), call(X, first=Z, second=X))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Output:
    last: Tensor
    hidden: list[Tensor]
    loss: Tensor | None = None


class TupleOfInputs(Two):
    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        left, right = pair
        return self.a(left) + self.b(left) + x, self.b(right)


class DictOfInputs(Two):
    def forward(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Any]:
        y = self.a(inputs["image"]) + self.b(inputs["image"])
        if "extra" in inputs:
            y = y + self.b(inputs["extra"])
        return {"out": y + x, "nested": {"list": [y, inputs["image"]]}}


class Dataclasses(Two):
    def forward(self, x: Tensor, sample: Output | None = None) -> Output:
        y = self.a(x) + self.b(x)
        if sample is not None:
            y = y + self.b(sample.last)
        return Output(last=y, hidden=[self.b(y), x])


class NamedTuples(Two):
    def forward(self, x: Tensor, pair: Pair | None = None) -> Pair:
        left = self.a(x) + self.b(x)
        return Pair(left=left, right=self.b(left if pair is None else pair.right))


class ListInOut(Two):
    def forward(self, x: Tensor, levels: list[Tensor]) -> list[Tensor]:
        return [self.a(level) + self.b(level) for level in levels[::-1]] + [x]


class MixedOutputs(Two):
    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.a(x) + self.b(x)
        return y, x.shape[2], tuple(y.shape), "name", None, 1.5, (y.ndim, [])


@pytest.mark.parametrize(
    ("net", "calls"),
    [
        (MixedOutputs, [call(X), call(images(SIZES[1]))]),
        (TupleOfInputs, [call(X, (Z, X)), call(X, pair=(X, Z))]),
        (DictOfInputs, [call(X, {"image": Z}), call(X, {"image": Z, "extra": X}), call(X, inputs={"image": X})]),
        (Dataclasses, [call(X), call(X, Output(Z, [])), call(X, sample=Output(Z, [X], X))]),
        (NamedTuples, [call(X), call(X, Pair(Z, X)), call(X, pair=Pair(X, Z))]),
        (ListInOut, [call(X, [Z]), call(X, [X, images(SIZES[1]), Z]), call(X, levels=[])]),
    ],
)
def test_tuple_dict_and_dataclass_inputs_and_outputs(net: type[nn.Module], calls: list[Any]) -> None:
    stays_right(net(), *calls)


class Ordered(collections.OrderedDict[str, Tensor]):
    """As the outputs of transformers are: a dict that is indexed by position, too."""

    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Levels(list[Tensor]):
    """A list of another class."""


class SubclassesOut(Two):
    """A parent that reads a dict by position, and hands a list on."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Any:
        return self.kind((self.a(x) + self.b(x)).relu())


class ReadsByPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.block = SubclassesOut(lambda y: Ordered(last=y)), Block()

    def forward(self, x: Tensor) -> Any:
        return Levels([self.block(self.inner(x)[0])])


def test_classes_of_outputs_are_kept() -> None:
    """A generated forward would return plain dicts and lists."""
    for kind in (lambda y: Ordered(last=y), lambda y: collections.OrderedDict(last=y), lambda y: Levels([y])):
        stays_right(SubclassesOut(kind))
    fused = stays_right(ReadsByPosition())
    assert is_fused(fused.odd.block)


def test_a_mapping_that_is_indexed_by_position() -> None:
    """Its reader is read, although no key of the structure is the number."""
    stays_right(ReadsByPosition(), images(SIZES[1]))


def gives_more(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that gives an optional argument itself."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        return forward(self, *arguments, **{**keywords, "deep": True})

    return wrapper


class Decorated(Two):
    @gives_more
    def forward(self, x: Tensor, deep: bool | None = None, other: Tensor | None = None) -> Tensor:
        return self.a(x) if deep else self.b(x)


def test_a_decorator_that_gives_an_argument() -> None:
    """It is not given twice while the forward is read."""
    model = ready(nn.Sequential(Decorated(), nn.BatchNorm2d(C)))
    assert [refusal for refusal in reparam.plan(model).left if refusal.rule == "unread"] == []
    fused = fuse_purely(model)
    assert owned(fused)["norms"] == 0
    same(model, fused, X)


class FusedByName(nn.Module):
    """As convolutions of detectors are written: the forward for after fusing stands beside the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(3), nn.BatchNorm2d(C), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class NamedOtherwise(FusedByName):
    """The same method, which could be anything: users may want the value in front of the norm."""

    def before_norm(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_forward_for_after_fusing_becomes_right() -> None:
    model = ready(nn.Sequential(FusedByName(), FusedByName()))
    fused = fuse_purely(model)
    assert owned(fused)["norms"] == 0
    same(model, fused, X)
    same(model[0], fused[0].forward_fuse, X)
    model = ready(nn.Sequential(NamedOtherwise()))
    fused = fuse_purely(model)
    assert owned(fused)["norms"] == 1
    same(model[0].before_norm, fused[0].before_norm, X)


class Tower(nn.Module):
    """Blocks in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(Block(), Block()), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SharedTower(nn.Module):
    """A head that every level goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.levels = Tower(), nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.tower(level(x)) for level in self.levels]


def test_blocks_inside_of_a_shared_or_hooked_module_are_fused() -> None:
    """They are called once by it, however often it is called itself."""
    fused = stays_right(SharedTower())
    assert owned(fused)["norms"] == 0
    assert owned(fused)["convs"] == 6
    hooked = Tower()
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    fused = stays_right(hooked)
    assert owned(fused)["norms"] == 0
    assert owned(fused)["convs"] == 4


class SumsLevels(nn.Module):
    """Reads its list when it gets one, and then changes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.shape = Block(), ()

    def forward(self, levels: list[Tensor]) -> Tensor:
        y = self.block(sum(levels[i] for i in range(len(levels))))
        self.shape = (len(levels),)
        return y


class GivesLevels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = SumsLevels()

    def forward(self, x: Tensor) -> Tensor:
        return self.head([x, x.relu()])


def test_the_reason_is_that_of_the_call() -> None:
    """Not that of a second reading, without the list that it is called with."""
    (refusal,) = (r for r in reparam.plan(ready(GivesLevels())).left if r.rule == "unread")
    assert refusal.path == "head"
    assert "sets attributes of the module (shape)" in refusal.condition
    stays_right(GivesLevels())


def test_keyword_calls() -> None:
    class Inner(Two):
        def forward(self, *, image: Tensor, scale: float = 1.0) -> Tensor:
            return (self.a(image) + self.b(image)) * scale

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.block = Inner(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(scale=0.5, image=self.block(x=x)) + self.inner(image=x)

    fused = stays_right(Outer())
    assert is_fused(fused.odd.block)
    model = ready(Outer())
    same(model, reparam.fuse(model), x=X)
    bare = ready(conv_norm(3))
    same(bare, reparam.fuse(bare), input=X)


# --- children and parents -------------------------------------------------------------------------


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = Block(), conv_norm(1)

    def features(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) + x


class CallsMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.norm = Child(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child.features(x)
        return self.norm(self.child.head(y)) + self.child.stem.dense(x) + self.child.forward(x)


class CallsForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(self.conv.forward(x)) + self.conv._conv_forward(x, self.conv.weight, None)


@pytest.mark.parametrize("net", [CallsMethods, CallsForward])
def test_methods_of_a_child_called_instead_of_the_child(net: type[nn.Module]) -> None:
    stays_right(net())


class Entries(nn.Module):
    """A backbone with the usual entry points beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3), nn.BatchNorm2d(C), nn.ReLU(inplace=True), Block(), conv_norm(1), nn.ReLU()
        )
        self.norm, self.fc = nn.BatchNorm1d(C), nn.Linear(C, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def get_intermediate_layers(self, x: Tensor, n: int = 2) -> list[Tensor]:
        outputs = []
        for layer in self.features:
            x = layer(x)
            outputs.append(x)
        return outputs[-n:]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_other_entry_points_of_a_rewritten_module() -> None:
    model = ready(Entries())
    fused = fuse_purely(model)
    assert owned(fused)["norms"] == 2  # what is in front of the first one, and of the last one, may be asked for
    for size in SIZES:
        x = images(size)
        same(model, fused, x)
        same(model.forward_features, fused.forward_features, x)
        same(model.get_intermediate_layers, fused.get_intermediate_layers, x, n=2)
        same(model.get_intermediate_layers, fused.get_intermediate_layers, x, n=4)
        same(model.get_intermediate_layers, fused.get_intermediate_layers, x, n=6)
        features = model.forward_features(x).detach()
        same(model.forward_head, fused.forward_head, features)
        same(model.forward_head, fused.forward_head, features, pre_logits=True)
        same(model.features[3], fused.features[3], x)
        same(model.features[4], fused.features[4], x)
        same(model.features[:3], fused.features[:3], x)
    assert len(fused.features) == len(model.features)


class TwoMethods(nn.Module):
    """Two entry points that share children: rewriting one must leave the other right."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(3), conv_norm(1), nn.BatchNorm2d(C)

    def encode(self, x: Tensor) -> Tensor:
        return self.a(x)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.a(x) + self.b(x)) + x)


def test_methods_beside_forward_that_use_the_same_children() -> None:
    model = ready(TwoMethods())
    fused = fuse_purely(model)
    same(model, fused, X)
    for name in ("encode", "both"):
        with contextlib.suppress(AttributeError):  # a child that is gone may be missed, loudly; no other numbers
            assert difference(getattr(model, name)(X), getattr(fused, name)(X)) < 1e-10


class Detector(nn.Module):
    """A net made from a list, whose parent reads `f` and `i` of its children."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Block(), conv_norm(3), Block(), Concat(), conv_norm(1, 2 * C, C), Block()]
        for index, (layer, source) in enumerate(zip(layers, [-1, -1, -1, [-1, 0], -1, -1], strict=True)):
            layer.i, layer.f, layer.type = index, source, type(layer).__name__
            layer.np = sum(p.numel() for p in layer.parameters())
        self.model, self.save = nn.Sequential(*layers), [0]

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor | None] = []
        for m in self.model:
            if m.f != -1:
                x = kept[m.f] if isinstance(m.f, int) else [x if j == -1 else kept[j] for j in m.f]
            x = m(x)
            kept.append(x if m.i in self.save else None)
        return x


class Concat(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, 1)


def test_parents_that_route_by_attributes_of_their_children() -> None:
    fused = stays_right(Detector())
    assert owned(fused.odd) == {"convs": 5, "linears": 0, "norms": 0}
    assert [layer.i for layer in fused.odd.model] == list(range(6))
    assert [layer.f for layer in fused.odd.model] == [-1, -1, -1, [-1, 0], -1, -1]


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.layer, self.bn = Block(), conv(3), nn.BatchNorm2d(C)
        self.wide = nn.Sequential(conv(1), nn.BatchNorm2d(C))
        self.wide.stride, self.wide.out_channels = 1, C

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layer.weight.dtype)
        if self.block.stride == 1 and self.layer.out_channels == self.bn.num_features and self.wide.out_channels == C:
            y = self.block(x) + self.wide(x)
        else:
            y = x
        y = self.bn(self.layer(y.to(next(self.parameters()).dtype)))
        return y.view(x.shape[0], self.layer.out_channels, -1) * (self.bn.eps + self.wide.stride)


def test_parents_that_read_attributes_of_their_children() -> None:
    stays_right(Reads())


class ReadsTheNorm(nn.Module):
    """A parent that computes with a child's parameters: absorbing the child would change its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.conv(x)), self.norm.weight * 2, self.conv.weight.abs().mean()


class GrandparentReads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ReadsTheNorm()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x)[0], self.inner.norm.running_mean + self.inner.conv.weight.sum()


class ReadsByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = conv_norm(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        penalty = sum(p.abs().sum() for name, p in self.named_parameters() if name.endswith("weight"))
        return self.layer(x), penalty


@pytest.mark.parametrize("net", [ReadsTheNorm, GrandparentReads, ReadsByName])
def test_parents_that_compute_with_parameters_of_their_children(net: type[nn.Module]) -> None:
    stays_right(net())


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.point, self.aux, self.head = conv_norm(3), conv_norm(1), conv_norm(3), conv(1)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.body(x) + self.point(x))
        if self.training:
            return self.head(y), self.aux(y)
        return self.head(y)


def test_statistics_that_a_norm_in_training_mode_changes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n, self.m = conv(3), conv(1), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.n(self.a(x))) + self.m(self.b(x))

    def tied() -> nn.Module:
        model = ready(Tied())
        model.m.running_mean, model.m.running_var = model.n.running_mean, model.n.running_var
        model.n.train()
        return model

    model, fused = tied(), reparam.fuse(tied())
    for seed in range(3):
        same(model, fused, images(seed=seed))
    reasons = {refusal.condition for refusal in reparam.plan(tied()).left}
    assert "a norm in training mode changes its statistics" in reasons


def test_auxiliary_heads_that_only_training_uses_stay() -> None:
    fused = stays_right(Auxiliary())
    assert any(key.startswith("odd.aux.") for key in fused.state_dict())
    fused.train()
    fused(X)
    fused.eval()


# --- children that are something else -------------------------------------------------------------


class Around(nn.Module):
    """A plain convolution before, and a norm after, a child of another kind."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.before, self.child, self.after = conv(3), child, nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.child(self.before(x))) + x


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "build",
    [lambda: conv(3).double(), lambda: conv_norm(3).double().eval(), lambda: ready(Block())],
    ids=["conv", "conv_norm", "block"],
)
@pytest.mark.parametrize("wrap", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"])
def test_scripted_children(build: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]) -> None:
    stays_right(Around(wrap(build())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantized_children() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fc = conv_norm(3), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer(x).mean((2, 3)))

    model = ready(Beside(Net())).float()
    try:
        model.odd.fc = quantization.quantize_dynamic(nn.Sequential(model.odd.fc), {nn.Linear}, torch.qint8)[0]
    except RuntimeError as error:
        pytest.skip(f"no quantized engine: {error}")
    fused = fuse_purely_without_state(model)
    same(model, fused, X.float(), tolerance=2e-2)
    assert is_fused(fused.block)


def fuse_purely_without_state(model: nn.Module) -> nn.Module:
    """For nets whose state holds packed weights, which cannot be compared as tensors."""
    fused = reparam.fuse(model)
    assert isinstance(fused, type(model))
    return fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantization_aware_children() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    qat = pytest.importorskip("torch.ao.nn.qat")
    intrinsic = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    config = quantization.get_default_qat_qconfig("fbgemm")
    plain = qat.Conv2d(C, C, 3, padding=1, qconfig=config)
    with_norm = intrinsic.ConvBn2d(C, C, 3, padding=1, qconfig=config)
    model = ready(Beside(nn.Sequential(plain, nn.BatchNorm2d(C), with_norm))).float().train()
    model(X.float())  # the observers see some values
    model.eval()
    fused = fuse_purely(model)
    same(model, fused, X.float(), tolerance=1e-4)
    assert is_fused(fused.block)


def pruned(module: nn.Conv2d) -> nn.Module:
    return prune.l1_unstructured(module, "weight", amount=0.4)


def spectrally_normed(module: nn.Conv2d) -> nn.Module:
    return torch.nn.utils.spectral_norm(module)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrap", [pruned, spectrally_normed])
def test_weights_that_hooks_compute(wrap: Callable[[nn.Conv2d], nn.Module]) -> None:
    model = Beside(Around(wrap(conv(3))))
    randomise(model)
    with torch.no_grad():
        model(X.float())
    model.to(torch.float64).eval()
    with torch.no_grad():
        model(X)
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size))
    assert is_fused(fused.block)


def test_lazy_children_before_initialisation() -> None:
    model = ready(Beside(nn.Sequential(nn.LazyConv2d(C, 3), nn.LazyBatchNorm2d(), nn.ReLU())))
    fused = reparam.fuse(model, inplace=True)  # deepcopy refuses such a module
    assert is_fused(fused.block)
    assert fused(X).shape == (2, C, 7, 9)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class CustomFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(self.a(x)) + self.b(x)


class CustomFunctionOnWeight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, Sign.apply(self.weight), self.bias, self.stride, self.padding)


def test_custom_autograd_functions() -> None:
    stays_right(CustomFunction())
    stays_right(Around(CustomFunctionOnWeight(C, C, 3, padding=1)))


class SameConv(nn.Conv2d):
    """Pads by the size of its input, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = max((-(height // -self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        columns = max((-(width // -self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class HiddenPadding(nn.Conv2d):
    """Its attribute says 0; its forward pads."""

    def __init__(self) -> None:
        super().__init__(C, C, 5, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, None, 1, 2, 1, self.groups)


class HiddenActivation(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class ActivatesFirst(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(x))


class Blurred(nn.Conv2d):
    """Overrides a helper of forward instead of forward."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias).abs()


class CallOverridden(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def patched() -> nn.Conv2d:
    """An instance whose own forward was replaced from outside."""
    layer = conv(3)
    plain = layer.forward
    layer.forward = lambda x: torch.tanh(plain(x))  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    "build",
    [
        lambda: SameConv(C, C, 3),
        HiddenPadding,
        lambda: HiddenActivation(C, C, 3, padding=1),
        lambda: ActivatesFirst(C),
        lambda: Blurred(C, C, 3, padding=1),
        lambda: CallOverridden(C, C, 3, padding=1),
    ],
    ids=["same", "hidden padding", "hidden activation", "activates first", "helper", "call"],
)
def test_subclasses_that_do_more(build: Callable[[], nn.Module]) -> None:
    stays_right(Around(build()))


def test_same_padding_with_stride_depends_on_the_size() -> None:
    stays_right(
        nn.Sequential(SameConv(C, C, 3, stride=2, bias=False), nn.BatchNorm2d(C)),
        *map(images, [(9, 11), (12, 8), (7, 6)]),
    )


def test_a_forward_replaced_on_the_instance() -> None:
    model = ready(Beside(Around(patched())))
    fused = fuse_purely_without_state(model)
    for size in SIZES:
        same(model, fused, images(size))
    assert is_fused(fused.block)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.block, self.a, self.b = reentrant, Block(), conv_norm(3), conv_norm(1)

    def both(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint(self.both, y, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    fused = stays_right(Checkpointed(reentrant))
    assert is_fused(fused.odd.block)
    model, gradients = ready(Beside(Checkpointed(reentrant))), []
    for net in (model, fused):
        x = X.clone().requires_grad_()
        net(x).square().sum().backward()
        gradients.append(x.grad)
    assert difference(*gradients) < 1e-8


# --- weights that change --------------------------------------------------------------------------


class ScalesItsWeight(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.a[0].weight.data.mul_(0.9)
        return self.a(x) + self.b(x)


class ReplacesItsWeight(nn.Module):
    """Keeps the weight of an inference convolution up to date in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.deployed, self.norm = conv(3), conv(3), conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        self.deployed.weight.data = self.left.weight.data + self.right.weight.data
        return self.norm(self.deployed(x))


class CopiesItsWeight(ReplacesItsWeight):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.deployed.weight.copy_(self.left.weight * 2)
        return self.norm(self.deployed(x))


class ClampsInPlace(ReplacesItsWeight):
    def update(self) -> None:
        self.deployed.weight.data.clamp_(-0.05, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        self.update()
        return self.norm(self.deployed(x)) + self.left(x)


@pytest.mark.parametrize("net", [ScalesItsWeight, ReplacesItsWeight, CopiesItsWeight, ClampsInPlace])
def test_modules_that_change_their_weights_in_forward(net: type[nn.Module]) -> None:
    stays_right(net())


def spoil(module: nn.Module, what: str) -> None:
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                if what == "zero gamma":
                    m.weight[::2] = 0
                elif what == "all gammas zero":
                    m.weight.zero_()
                elif what == "tiny variance":
                    m.running_var.fill_(1e-14)
                elif what == "zero variance":
                    m.running_var[:3] = 0
                elif what == "huge variance":
                    m.running_var.fill_(1e20)
                elif what == "nan mean":
                    m.running_mean[1] = float("nan")
            elif isinstance(m, nn.Conv2d):
                if what == "inf weight":
                    m.weight[0, 0, 0, 0] = float("inf")
                elif what == "nan weight":
                    m.weight[1, 2, 0, 0] = float("nan")
                elif what == "zero weight":
                    m.weight.zero_()


SPOILED = [
    "zero gamma",
    "all gammas zero",
    "tiny variance",
    "zero variance",
    "huge variance",
    "zero weight",
    "nan mean",
    "inf weight",
    "nan weight",
]


@pytest.mark.parametrize("what", SPOILED)
def test_extreme_numbers(what: str) -> None:
    model = ready(Beside(Two()))
    spoil(model.odd, what)
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size), tolerance=1e-9)
    assert is_fused(fused.block)
    assert (
        fused.state_dict().keys() == reparam.fuse(ready(Beside(Two()))).state_dict().keys()
        or "nan" in what
        or "inf" in what
    )


# --- odd nets -------------------------------------------------------------------------------------


class Parameterless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() + x


class NoForward(nn.Module):
    """A module that is never called: a namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = conv_norm(3)


class UsesNamespace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space = NoForward()
        self.layers = nn.ModuleDict({"a": nn.ModuleList([conv_norm(1)])})
        self.empty = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.empty:
            x = layer(x)
        return self.space.layer(x) + self.layers["a"][0](x)


@pytest.mark.parametrize(
    "build",
    [
        nn.Sequential,
        nn.Identity,
        nn.ReLU,
        Parameterless,
        UsesNamespace,
        lambda: conv(3, bias=True),
        lambda: conv(3),
        lambda: nn.BatchNorm2d(C),
        lambda: nn.BatchNorm2d(C, affine=False),
        lambda: nn.Sequential(nn.Sequential(), nn.Sequential(nn.Sequential())),
        lambda: nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)),
        lambda: nn.Linear(11, 3),
        lambda: nn.ConvTranspose2d(C, 3, 2, 2),
    ],
    ids=[
        "empty", "identity", "relu", "no parameters", "namespace", "conv", "conv without bias", "norm",
        "norm without affine", "nested empties", "two norms", "linear", "transposed",
    ],
)  # fmt: skip
def test_bare_and_empty_modules(build: Callable[[], nn.Module]) -> None:
    model = ready(build())
    fused = fuse_purely(model)
    same(model, fused, X)
    stays_right(build(), X)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bare_modules_without_a_batch_axis(dims: int) -> None:
    layers = {1: (nn.Conv1d, nn.ReLU), 2: (nn.Conv2d, nn.Tanh), 3: (nn.Conv3d, nn.ReLU)}[dims]
    model = ready(nn.Sequential(layers[0](C, C, 3, padding=1), layers[0](C, C, 1), layers[1]()))
    same(model, reparam.fuse(model), images((5, 4, 3)[:dims])[0])


def test_a_graph_module() -> None:
    model = torch.fx.symbolic_trace(ready(nn.Sequential(Block(), Two())))
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size))
    assert count(fused, X)["norm"] == 0
    assert count(fused, X)["conv"] == 2


def test_the_module_of_an_exported_program() -> None:
    model = torch.export.export(ready(Beside(Two())), (X,)).module()
    fused = fuse_purely(model)
    same(model, fused, X)
    before, after = count(model, X), count(fused, X)
    assert all(after[key] <= before[key] for key in ("conv", "norm", "add", "calls"))


# --- wrappers -------------------------------------------------------------------------------------


def inner(fused: nn.Module, *names: str) -> Any:
    for name in names:
        fused = getattr(fused, name)
    return fused


def test_data_parallel() -> None:
    model = nn.DataParallel(ready(Beside(Two())))
    model.eval()
    fused = fuse_purely(model)
    same(model, fused, X)
    assert is_fused(inner(fused, "module", "block"))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_data_parallel() -> None:
    model = nn.parallel.DistributedDataParallel(ready(Beside(Two())))
    model.eval()
    fused = fuse_purely(model)
    same(model, fused, X)
    assert is_fused(inner(fused, "module", "block"))


def test_compiled_wrapper() -> None:
    model = torch.compile(ready(Beside(Two())), backend="eager")
    model(X)
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size))
    assert is_fused(inner(fused, "_orig_mod", "block"))
    torch._dynamo.reset()


def test_compiled_in_place() -> None:
    model = ready(Beside(Two()))
    model.odd.compile(backend="eager")
    fused = reparam.fuse(model)
    for size in SIZES:
        same(model, fused, images(size))
    assert is_fused(fused.block)
    torch._dynamo.reset()


def test_averaged_model() -> None:
    model = torch.optim.swa_utils.AveragedModel(ready(Beside(Two())))
    model.update_parameters(ready(Beside(Two()), seed=3))
    model.eval()
    fused = fuse_purely(model)
    same(model, fused, X)
    assert is_fused(inner(fused, "module", "block"))


# --- devices, dtypes, sizes -----------------------------------------------------------------------


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Beside(Two()).eval()
    fused = reparam.fuse(model)
    real = reparam.fuse(Beside(Two()).eval())
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(v.is_meta for v in fused.state_dict().values())
    assert fused(torch.empty(2, C, 5, 5, device="meta")).shape == (2, C, 5, 5)


class MixedDtypes(nn.Module):
    """A half-precision trunk, a double head, and a norm in float32 behind a convolution in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.conv, self.norm, self.head = Block(), conv(3), nn.BatchNorm2d(C), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x.to(torch.bfloat16)).float())
        return y, self.head(self.trunk(x.float()).double() + y.double())


def test_mixed_dtypes() -> None:
    model = ready(Beside(MixedDtypes()))
    model.odd.trunk.float()
    model.odd.conv.to(torch.bfloat16)
    model.odd.norm.float()
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size), tolerance=2e-2)
    assert is_fused(fused.block)
    assert is_fused(fused.odd.trunk)
    assert is_fused(fused.odd.head)
    assert {p.dtype for p in fused.odd.trunk.parameters()} == {torch.float32}


def test_a_half_precision_convolution_with_a_float32_norm() -> None:
    model = ready(Beside(nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU()))).to(torch.bfloat16)
    model.odd[1].float()
    fused = fuse_purely(model)
    for size in SIZES:
        same(model, fused, images(size).to(torch.bfloat16), tolerance=3e-2)
    assert is_fused(fused.block)


def test_channels_last_and_empty_batches() -> None:
    model = ready(Beside(Two())).to(memory_format=torch.channels_last)
    fused = fuse_purely(model)
    for x in (X, X.contiguous(memory_format=torch.channels_last), images(batch=0), images((1, 1), batch=1)):
        same(model, fused, x)


def test_mixed_devices() -> None:
    model = ready(nn.ModuleDict({"here": Beside(Two()), "there": Beside(Two())}))
    model["there"].to("meta")
    model["here"].odd.b.to("meta")
    fused = reparam.fuse(model)
    assert is_fused(fused["here"].block)
    assert is_fused(fused["there"].block)
    same(model["here"].block, fused["here"].block, X)
    if hasattr(fused["here"].odd, "a"):
        same(model["here"].odd.a, fused["here"].odd.a, X)


class LoopOfBlocks(nn.Module):
    """One forward with all the blocks in it."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList(conv_norm(3, 2, 2) for _ in range(blocks))
        self.point = nn.ModuleList(conv_norm(1, 2, 2) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for dense, point in zip(self.dense, self.point, strict=True):
            x = F.hardtanh(dense(x) + point(x))
        return x


class OneLongSum(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_norm(1 + 2 * (index % 2), 2, 2) for index in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y


def chain(blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(2) for _ in range(blocks)))


@pytest.mark.slow
@pytest.mark.parametrize("build", [chain, LoopOfBlocks, OneLongSum])
def test_two_thousand_blocks_in_linear_time(build: Callable[[int], nn.Module]) -> None:
    seconds = []
    for blocks in (250, 2000):
        model = ready(build(blocks))
        start = time.process_time()
        fused = reparam.fuse(model)
        seconds.append(time.process_time() - start)
    assert owned(fused) == {"convs": 1 if build is OneLongSum else 2000, "linears": 0, "norms": 0}
    assert seconds[1] < 14 * seconds[0] + 1, f"250 blocks took {seconds[0]:.1f} s, 2,000 took {seconds[1]:.1f} s"
    x = images((3, 4), channels=2)
    if build is chain:
        same(model[:20], fused[:20], x)
        same(model[1990], fused[1990], x)
    elif build is OneLongSum:
        same(model, fused, x, tolerance=1e-9)
    else:
        short = ready(build(30))
        same(short, reparam.fuse(short), x, tolerance=1e-9)


@pytest.mark.slow
def test_deeply_nested_modules() -> None:
    model: nn.Module = Block()
    for _ in range(100):
        model = nn.Sequential(model)
    model = ready(Beside(model))
    fused = fuse_purely(model)
    same(model, fused, X)
    assert owned(fused) == {"convs": 2, "linears": 0, "norms": 0}


# --- what must be readable ------------------------------------------------------------------------


def is_read(odd: nn.Module, *calls: Any, convs: int, norms: int = 0, **options: Any) -> Beside:
    """Stays right, was read, and its own regions were fused."""
    unread = [
        refusal
        for refusal in reparam.plan(ready(Beside(copy.deepcopy(odd))), **options).left
        if refusal.rule == "unread"
    ]
    assert not [refusal for refusal in unread if refusal.path.startswith("odd")], "\n".join(map(str, unread))
    fused = stays_right(odd, *calls, **options)
    found = owned(fused.odd)
    assert (found["convs"], found["norms"]) == (convs, norms), f"after fusing: {found}"
    return fused


class ListOfChunks(Two):
    def __init__(self) -> None:
        super().__init__()
        self.stage, self.last = nn.ModuleList([conv_norm(3, C // 2, C // 2) for _ in range(2)]), conv_norm(1, 2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = list((self.a(x) + self.b(x)).chunk(2, 1))
        y.extend(torch.relu(layer(y[-1])) for layer in self.stage)
        return self.last(torch.cat(y, 1))


class SplitSizes(Two):
    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.a(x) + self.b(x), [2, 4], dim=1)
        left, middle, right = second.split((1, 2, 1), 1)
        return torch.cat([torch.relu(left), middle, right.sigmoid(), *first.split(1, dim=1)], 1)


class SplitOneSize(Two):
    def forward(self, x: Tensor) -> Tensor:
        parts = (self.a(x) + self.b(x)).split(2, 1)
        return torch.cat([torch.relu(part) for part in parts], 1) * len(parts)


class Unbind(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        q, k, v = y.flatten(2).unflatten(1, (3, C // 3)).unbind(1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Shapes(Two):
    def forward(self, x: Tensor) -> Tensor:
        B, channels, H, W = x.shape
        y = (self.a(x) + self.b(x)).reshape(B, channels, H * W).softmax(-1)
        return y.transpose(1, 2).contiguous().view(B, H, W, channels).permute(0, 3, 1, 2)


class SizeMethods(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        n, c = y.size()[:2]
        return F.interpolate(y.view(n, c, y.size(2), -1), size=x.shape[2:], mode="nearest") / (y.size(-1) * 2)


class Lengths(Two):
    def forward(self, x: Tensor, others: list[Tensor]) -> Tensor:
        y = self.a(x) + self.b(x)
        for index in range(len(others)):
            y = y + others[index]
        return y / (len(others) + 1) + len(x)


class LengthOfATensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).reshape(len(x), -1)


class AttributeTests(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [conv(3), nn.BatchNorm2d(C), nn.ReLU(), conv(3, stride=2), nn.BatchNorm2d(C), Block()]
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Conv2d) and layer.stride[0] == 2:
                x = F.pad(x, (0, 1, 0, 1))
            if hasattr(layer, "skip") and layer.skip is not None and index > 0:
                x = layer(x) + x
            elif getattr(layer, "missing", None) is None:
                x = layer(x)
        return x


class Properties(Two):
    @property
    def width(self) -> int:
        return self.a[0].out_channels

    @property
    def branches(self) -> Iterator[nn.Module]:
        yield from (self.a, self.b)

    @staticmethod
    def total(values: list[Tensor]) -> Tensor:
        return sum(values[1:], start=values[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.total([branch(x) for branch in self.branches]) / self.width


def add_all(*values: Tensor, scale: float = 1.0) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total * scale


class HelperFunctions(Two):
    def _combine(self, x: Tensor, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        y = add_all(self.a(x), self.b(x), scale=0.5)
        return y if act is None else act(y)

    def forward(self, x: Tensor) -> Tensor:
        def twice(value: Tensor) -> Tensor:
            return value * 2

        return self._combine(x, act=lambda value: torch.relu(twice(value)))


class ParametersInConditions(Two):
    """A truth test on a parameter, on flags, on attributes of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.use_skip, self.norm = nn.Parameter(torch.ones(1)), True, None
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.alpha:
            y = y + self.alpha * self.b(x)
        if self.use_skip and self.norm is None and self.flag and self.alpha.ndim == 1:
            y = y + x
        if x.ndim != 4 or x.dim() != 4:
            raise ValueError("expected images")
        assert isinstance(x, Tensor)
        assert x.shape[1] == self.a[0].in_channels, f"expected {self.a[0].in_channels} channels, found {x.shape[1]}"
        return y


class ManyArguments(Two):
    def forward(
        self,
        x: Tensor,
        a: Tensor | None = None,
        b: Any = None,
        c: int = 1,
        d: str = "sum",
        e: tuple[int, int] = (1, 1),
        *,
        f: bool = False,
        g: dict[str, Tensor] | None = None,
        h: float | None = None,
    ) -> Tensor:
        y = self.a(x) + self.b(x)
        if a is not None:
            y = y * a
        if g:
            y = y + sum(g.values())
        if h is not None and not f:
            y = y / h
        return y * c * e[0]


class CallsSuper(Properties):
    """A forward that goes on from its parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.c(x)


class TryExcept(Two):
    def forward(self, x: Tensor) -> Tensor:
        try:
            second = self.c
        except AttributeError:
            second = self.b
        y = self.a(x) + second(x)
        with torch.profiler.record_function("tail"):
            return torch.relu(y)


@pytest.mark.parametrize(
    ("net", "convs", "calls"),
    [
        (ListOfChunks, 4, []),
        (SplitSizes, 1, []),
        (SplitOneSize, 1, []),
        (Unbind, 1, []),
        (Shapes, 1, []),
        (SizeMethods, 1, []),
        (LengthOfATensor, 1, []),
        (AttributeTests, 3, []),
        (Properties, 1, []),
        (HelperFunctions, 1, []),
        (ParametersInConditions, 1, []),
        (
            ManyArguments,
            2,  # it is read, but what it returns depends on its options, so its forward is not generated anew
            [call(X), call(X, Z), call(X, None, None, 2), call(X, g={"u": Z, "v": X}, h=0.5), call(X, h=2.0, f=True)],
        ),
        (CallsSuper, 1, []),
        (TryExcept, 1, []),
    ],
)
def test_readable(net: type[nn.Module], convs: int, calls: list[Any]) -> None:
    is_read(net(), *calls, convs=convs)


def test_lists_of_any_length() -> None:
    stays_right(Lengths(), call(X, []), call(X, [Z]), call(X, [Z, X, Z]))


class InputDtype(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return y.float() if x.dtype == torch.float64 else y


def test_conditions_on_the_dtype_of_the_input() -> None:
    stays_right(InputDtype())


class RanksAndSizesInConditions(Two):
    """Assertions on one line, lengths of shapes, more of them than outcomes could be tried, rounded sizes."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x.shape) != 4: raise ValueError  # noqa: E701
        for size in x.shape[-2:]:
            assert size > 0
            assert size < 10**6
        if len(x.size()) == 3:
            raise ValueError("expected a batch")
        y = self.a(x) + self.b(x)
        rows = math.ceil(y.shape[2] / 2) * 2
        return F.interpolate(y, size=(rows, math.floor(y.shape[3] / 2) + 1))


class SameOnEitherSide(Two):
    """Conditions that change nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        if y.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(y.dtype)
        factor = 2 if y.dtype in (torch.float16, torch.bfloat16) or y.shape[0] > 1 else 4 // 2
        return y * factor


class SizesOfTensors(Two):
    """Tensors that are no inputs, of sizes that come from the input; the larger of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        side = max((math.ceil(h / 2) - 1) * 2 + 3 - h, 0)
        x = F.pad(x, [0, 0, side // 2, side - side // 2])
        y = self.a(x) + self.b(x)
        columns = self.token.expand(n, -1, y.shape[2], -1)
        y = torch.cat([columns, y, self.token.new_zeros(n, C, y.shape[2], min(w, 3))], 3)
        return y + self.token.repeat(n, 1, 1, 1)


class SizesAsNumbers(Two):
    """Sizes as numbers, and tensors that functions make of them."""

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        side = max((math.ceil(float(h) / 2) - 1) * 2 + 3 - h, 0)
        x = F.pad(x, [0, 0, side // 2, side - side // 2])
        y = self.a(x) + self.b(x)
        rows = torch.zeros(n, C, y.shape[2], int(w * 0.5), dtype=x.dtype, device=x.device)
        steps = torch.arange(y.shape[2], dtype=x.dtype, device=x.device)[:, None]
        torch._check(h > 1, lambda: f"too flat: {h}")
        steps = steps + F.interpolate(torch.ones(1, 1, 2, 1).double(), size=(y.shape[2], 1))[0, 0]
        steps = steps / torch.tensor([[h, w], [w, h]]).amax()
        return torch.cat([torch.as_tensor(y) + steps, rows + isinstance(C, int)], 3)


@pytest.mark.parametrize("net", [RanksAndSizesInConditions, SameOnEitherSide, SizesOfTensors, SizesAsNumbers])
def test_conditions_that_are_assertions_or_change_nothing(net: type[nn.Module]) -> None:
    is_read(net(), convs=1)


class AsksForAnInput(Two):
    """All arguments are optional, and one of two must be given."""

    def forward(self, image: Tensor | None = None, flag: bool = False, features: Tensor | None = None) -> Tensor:
        if (image is None) == (features is None):
            raise ValueError("expected an image or features")
        y = features if image is None else self.a(image) + self.b(image)
        return self.act(y)


def test_a_forward_that_asks_for_an_optional_argument_is_read() -> None:
    model = ready(AsksForAnInput())
    fused = reparam.fuse(model)
    assert (owned(fused)["convs"], owned(fused)["norms"]) == (2, 0)  # features take another way
    assert not [refusal for refusal in reparam.plan(model).left if refusal.rule == "unread"]
    assert difference(model(image=X), fused(image=X)) < 1e-12
    assert torch.equal(model(features=X.clone()), fused(features=X.clone()))
    with pytest.raises(ValueError, match="expected an image or features"):
        fused()


class DiscardsWhatIsEmpty(Two):
    """The sum of two strided branches goes through a container without anything in it, and nothing reads the result."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(C, C, 3, 2, 1, groups=C), nn.BatchNorm2d(C))
        self.b = nn.Sequential(nn.Conv2d(C, C, 1, groups=C), nn.GroupNorm(1, C), nn.AvgPool2d(3, 2, 1))
        self.norm, self.empty = nn.BatchNorm2d(C), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        z = self.norm(y)
        self.empty(z)
        return y + z


def test_a_discarded_result_of_nothing_goes_with_what_it_reads() -> None:
    stays_right(DiscardsWhatIsEmpty())


class WritesAndReturns(Two):
    """Writes in place, so that its call stays, and returns what its caller computes anew; both read one concat."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(C, C, 3), nn.ReLU(inplace=True))
        self.b, self.c = nn.Sequential(nn.Conv2d(2 * C, C, 1)), nn.Conv2d(2 * C, C, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        y = torch.cat([x, x], 1)
        self.b(y)
        return self.c(-y)


class AddsWhatIsReturned(Two):
    """A residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = WritesAndReturns()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def test_a_call_that_stays_does_not_compute_what_its_caller_computes_anew() -> None:
    fused = stays_right(AddsWhatIsReturned())
    assert "c" not in dict(fused.odd.body.named_children())


# --- conditions on the input with several outcomes --------------------------------------------------


class Chain(nn.Module):
    """A convolution and a norm, with something that depends on the input around them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(C, C, 3, 2, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True)


class PadsBySize(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        down = max(3 - 2, 0) if h % 2 == 0 else max(3 - h % 2, 0)
        right = max(3 - 2, 0) if w % 2 == 0 else max(3 - w % 2, 0)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return self.act(self.norm(self.conv(x)))


class BranchesOnData(Chain):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.norm(self.conv(x))
        return -self.act(self.norm(self.conv(x * 2)))


@pytest.mark.parametrize("net", [PadsBySize, BranchesOnData])
def test_a_chain_that_all_outcomes_have_is_fused(net: type[nn.Module]) -> None:
    is_read(net(), *(call(sign * images(size)) for sign in (1, -1) for size in SIZES), convs=1)


class NormAlone(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.mean() > 0 else self.norm(x)


class ConvAlone(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.mean() > 0 else self.conv(x)


class ConvReadTwice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if x.mean() > 0 else self.norm(y) + y


class WritesBetween(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        y = self.norm(x)
        if x.mean() < 0:
            self.act(x)
        return self.conv(y) + x.mean()


class ReadsAWeightElsewhere(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.mean() > 0 else F.conv2d(x, self.conv.weight)


class AsksElsewhere(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if x.mean() < 0 and isinstance(self.norm, nn.BatchNorm2d):
            return y * 3
        return y


class Inside(Chain):
    """A block, of which the parent norms the result, and which its other outcome does not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BranchesOnData()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(x)) if x.std() > 0 else self.norm(x)


class Outside(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.block = ConvAlone()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(x))


@pytest.mark.parametrize(
    "net",
    [
        NormAlone,
        ConvAlone,
        ConvReadTwice,
        WritesBetween,
        ReadsAWeightElsewhere,
        AsksElsewhere,
        Inside,
        Outside,
    ],
    ids=lambda net: net.__name__,
)
def test_other_outcomes_stay_right(net: type[nn.Module]) -> None:
    stays_right(net(), *(call(sign * (images(size).abs() + 0.1)) for sign in (1, -1) for size in SIZES))


# --- names and constants that a generated forward must spell ---------------------------------------------


class Named(nn.Module):
    """Branches by their names in a dict."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.br = names, nn.ModuleDict({name: conv_norm(3 - 2 * i) for i, name in enumerate(names)})

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.br[name] for name in self.names)
        return torch.relu(left(x) + right(x))


@pytest.mark.parametrize(
    "names", [("global", "local"), ("None", "class"), ("3x3", "1x1"), ("a b", "c-d"), ("it's", 'a"b'), ("\\x67", "é\n")]
)
def test_children_by_any_name(names: tuple[str, str]) -> None:
    fused = is_read(Named(*names), convs=1)
    assert list(fused.odd.br) == [names[0]]


class KeywordChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("class", conv_norm(3))
        self.add_module("self", conv_norm(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(getattr(self, "class")(x) + self.self(x))


class KeywordBystanders(Two):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.PReLU(C), "box": nn.PReLU(C)})
        self.more = nn.ParameterDict({"lambda": nn.Parameter(torch.rand(C, 1, 1)), "a b": torch.rand(C, 1, 1)})
        self.register_buffer("in", torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.a(x) + self.b(x))
        y = (
            torch.sin(y * self.more["lambda"]).exp()
            + torch.sin(y * self.more["a b"])
            + torch.cos(y * getattr(self, "in"))
        )
        return {name: head(y) for name, head in self.heads.items()}


class NestedResult(Two):
    class Inner(NamedTuple):
        y: Tensor
        note: str = "inner"

    @dataclasses.dataclass
    class Outer:
        y: Any
        k: int = 3

    class Pair(NamedTuple):
        left: Any
        right: Any

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = torch.relu(self.a(x) + self.b(x))
        return self.Outer(y), self.Inner(y), self.Pair(self.Inner(y, "it's"), {"in": self.Inner(y + 1)})


Renamed = collections.namedtuple("Differently", "y")  # a class whose name differs from its variable's


class RenamedResult(Two):
    def forward(self, x: Tensor) -> Any:
        return Renamed(self.a(x) + self.b(x))


class Colour(enum.IntEnum):
    RED = 1


class Constants(Two):
    class Shade(enum.Enum):
        DARK = 2

    def forward(self, x: Tensor) -> dict[Any, Any]:
        y = torch.relu(self.a(x) + self.b(x))
        sizes = {"size": torch.Size([1, 2]), "nested": [torch.Size([]), (torch.Size([3]),)], "tuple": (1, 2)}
        numbers = {"inf": math.inf, "nan": math.nan, "slice": slice(1, None), "dtype": x.dtype, 1: torch.float16}
        shades = {"colour": Colour.RED, self.Shade.DARK: [self.Shade.DARK, Pair(y, Colour.RED)]}
        return {"y": y, **sizes, **numbers, **shades, "list": [Colour.RED, self.Shade.DARK, 1 + 2j]}


class NumpyNumber(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x)).pow(np.float64(1.5))


@pytest.mark.parametrize(
    "net",
    [KeywordChild, KeywordBystanders, NestedResult, RenamedResult, Constants, NumpyNumber],
    ids=lambda net: net.__name__,
)
def test_whatever_can_be_spelled_is_fused(net: type[nn.Module]) -> None:
    is_read(net(), convs=1)


class HandsASizeOn(nn.Module):
    """The size that a child returns is a constant of its caller."""

    class Sized(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
            return torch.relu(self.a(x) + self.b(x)), torch.Size([C // 2, 2])

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a, self.b = self.Sized(), conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Any:
        y, size = self.inner(x)
        assert size.numel() == C
        return torch.relu(self.a(y) + self.b(y)).unflatten(1, size), size


def test_a_size_that_a_child_returns() -> None:
    is_read(HandsASizeOn(), convs=2)


class ArgumentsLikeGlobals(Two):
    def forward(self, torch: Tensor, inf: Tensor, slice: Tensor, device: int = 3) -> Any:
        y = F.relu(self.a(torch) + self.b(torch)) + inf
        return y[:, 1:] * slice, math.inf, y.clamp(max=math.inf).to(X.device), torch


class UnreadArgumentsLikeGlobals(Two):
    def forward(self, x: Tensor, torch: Any = None, nan: float = 1.0) -> Any:
        return F.relu(self.a(x) + self.b(x)), math.nan, math.inf


@pytest.mark.parametrize(
    ("net", "calls"),
    [
        (ArgumentsLikeGlobals, [call(X, Z, X[:, 1:]), call(X, slice=Z[:, 1:], inf=Z, device=1)]),
        (UnreadArgumentsLikeGlobals, [call(X), call(X, torch=Z, nan=2.0)]),
    ],
)
def test_arguments_that_are_called_like_globals(net: type[nn.Module], calls: list[Any]) -> None:
    is_read(net(), *calls, convs=1)


class PositionalOnly(Two):
    def forward(self, x: Tensor, y: Tensor | None = None, /, *, gain: float) -> Tensor:
        return torch.relu(self.a(x) + self.b(x)) * gain


def test_positional_only_arguments_stay_so() -> None:
    fused = is_read(PositionalOnly(), call(X, gain=2.0), call(X, Z, gain=0.5), convs=1).odd
    assert inspect.signature(fused.forward).parameters["x"].kind is inspect.Parameter.POSITIONAL_ONLY
    with pytest.raises(TypeError, match="positional-only"):
        fused(x=X, gain=1.0)


def made_within() -> tuple[Any, Any]:
    class Within(NamedTuple):
        y: Tensor

    class Shade(enum.Enum):
        DARK = 1

    return Within, Shade


WITHIN, SHADE = (lambda kinds: ((kinds[0],), (kinds[1],)))(made_within())


class ResultOfALocalClass(Two):
    def forward(self, x: Tensor) -> Any:
        return WITHIN[0](torch.relu(self.a(x) + self.b(x)))


class LocalConstant(Two):
    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.a(x) + self.b(x)), SHADE[0].DARK


class KeywordArgument(nn.Module):
    class Takes(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            if inputs["class"].mean() > 0:
                return inputs["class"]
            return inputs["class"] * 2

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.takes = conv_norm(3), conv_norm(1), self.Takes()

    def forward(self, x: Tensor) -> Tensor:
        return self.takes(**{"class": torch.relu(self.a(x) + self.b(x))})


class NumpyResult(Two):
    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.a(x) + self.b(x)), np.float64(0.5)


class NumpyDefault(Two):
    def forward(self, x: Tensor, gain: float = np.float64(0.5)) -> Any:
        return torch.relu(self.a(x) + self.b(x))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (ResultOfALocalClass, "Within, which no module holds by name"),
        (LocalConstant, "Shade, which no module holds by name"),
        (KeywordArgument, "passes an argument named 'class'"),
        (NumpyResult, "holds a float64, which cannot be written as text"),
        (NumpyDefault, "the default of gain is no plain constant"),
    ],
)
def test_what_cannot_be_spelled_is_left_with_the_reason(net: type[nn.Module], reason: str) -> None:
    fused = is_read(net(), convs=2)
    left = [refusal for refusal in reparam.receipt(fused).left if refusal.rule == "place"]
    assert any(reason in str(refusal) for refusal in left), "\n".join(map(str, left))


# --- what a forward asks its children -------------------------------------------------------------


def thin() -> nn.Sequential:
    """One number per channel, as a convolution and a norm: fused, it takes the place of the container."""
    return nn.Sequential(nn.Conv2d(C, C, 1, groups=C, bias=False), nn.BatchNorm2d(C))


class AsksForTheClassOfABlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = thin()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * 3 if isinstance(self.block, nn.Sequential) else x


class AsksForAWeight(AsksForTheClassOfABlock):
    def forward(self, x: Tensor) -> Tensor:
        return x if hasattr(self.block, "weight") else self.block(x) * 3


class AsksForTheClassOfANorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


class AsksForABias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return torch.relu(y) if self.conv.bias is None else y


@pytest.mark.parametrize(
    "net", [AsksForTheClassOfABlock, AsksForAWeight, AsksForTheClassOfANorm, AsksForABias], ids=lambda net: net.__name__
)
def test_answers_of_children_stay_what_they_were(net: type[nn.Module]) -> None:
    stays_right(net(), call(X))


def test_a_forward_that_asks_is_generated_anew_where_that_helps() -> None:
    is_read(AsksForTheClassOfANorm(), call(X), convs=1)


@torch.fx.wrap
def with_a_row_axis(x: Tensor, rank: int) -> tuple[Tensor, int]:
    """What cannot be read: it depends on the rank."""
    given = x.dim()
    return (x if given == rank else x.unsqueeze(0)), given


class WrappedFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        y, rank = with_a_row_axis(x, 4)
        y = self.a(y) + self.b(y)
        return y.squeeze(0) if self.training else y * rank


def test_a_function_marked_by_fx_wrap_is_one_operation() -> None:
    is_read(WrappedFunction(), call(X), convs=1)


def test_einops_is_readable() -> None:
    einops = pytest.importorskip("einops")

    class Net(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = einops.rearrange(self.a(x) + self.b(x), "b (g c) h w -> b g c (h w)", g=2)
            return einops.rearrange(einops.reduce(y, "b g c n -> b g c", "mean"), "b g c -> b (g c)")

    is_read(Net(), convs=1)


def test_a_model_that_was_read_can_be_freed() -> None:
    """`einops` remembers the shapes that it was asked about, which are traced ones while a forward is read."""
    einops = pytest.importorskip("einops")

    class Net(Two):
        def forward(self, x: Tensor) -> Tensor:
            return einops.rearrange(self.a(x) + self.b(x), "b (g c) h w -> b g c (h w)", g=2)

    model = ready(Net())
    parts = [weakref.ref(part) for part in (model, model.a, model.a[0].weight)]
    assert len(reparam.plan(model).regions) == 1
    del model
    gc.collect()
    assert [part() for part in parts] == [None, None, None]


# --- where only concrete shapes help --------------------------------------------------------------


class OddSizesArePadded(Two):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        if x.size(2) > 10:
            x = x[:, :, :10]
        return self.a(x) + self.b(x)


class LoopOverTheBatch(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(self.a(x[i : i + 1]) + self.b(x[i : i + 1]))[0] for i in range(x.shape[0])])


class SizesAsIntegers(Two):
    def forward(self, x: Tensor) -> Tensor:
        half = int(x.shape[2] * 0.5)
        windows = [x[:, :, :half], x[:, :, half:]]
        return torch.cat([self.a(w) + self.b(w) for w in windows], 2)


@pytest.mark.parametrize("net", [OddSizesArePadded, LoopOverTheBatch, SizesAsIntegers])
def test_nets_that_need_concrete_shapes(net: type[nn.Module]) -> None:
    stays_right(net())  # without shapes: every size is right
    model = ready(Beside(net()))
    plan = reparam.plan(model, example_inputs=(X,))
    assert not [refusal for refusal in plan.left if refusal.rule == "unread"], str(plan)
    fused = plan.apply()
    same(model, fused, X)
    assert is_fused(fused.block)
    other = images(SIZES[1])
    with contextlib.suppress(
        RuntimeError, ValueError
    ):  # another size may be refused, loudly; it may not give other numbers
        found = fused(other)
        assert difference(model(other), found) < 1e-10


def test_the_plan_says_for_which_sizes_it_holds() -> None:
    model = ready(Beside(AgreeAtOddSizes()))
    plan = reparam.plan(model, example_inputs=(X,))
    fused = plan.apply()
    same(model, fused, X)
    if owned(fused.odd)["convs"] == 1:
        assert any(str(side) in str(plan) for side in SIZES[0]), f"the plan names no size: {plan}"


# --- data-dependent control flow ------------------------------------------------------------------


class DataDecides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.a, self.b = Block(), Block(), conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0.4:
            return self.left(x) + self.a(x)
        while x.abs().max() > 3:
            x = x / 2
        return self.right(x) + self.b(x)


def test_control_flow_that_depends_on_data() -> None:
    fused = stays_right(DataDecides(), X, X * 5, X - 3, X + 3)
    assert is_fused(fused.odd.left)
    assert is_fused(fused.odd.right)
    unread = [refusal for refusal in reparam.plan(ready(Beside(DataDecides()))).left if refusal.rule == "unread"]
    assert len(unread) == 1, unread
    assert "odd" in unread[0].path
    assert "x.mean() > 0.4" in str(unread[0]) or "test_stays_right.py" in str(unread[0]), (
        f"no line of code: {unread[0]}"
    )


def test_a_wide_seed_of_the_whole_file() -> None:
    """Numbers are drawn wide: a norm that is dropped shows."""
    model = randomise(Block())
    broken = copy.deepcopy(model.double().eval())
    broken.skip = nn.Identity()
    with pytest.raises(AssertionError):
        same(model, broken, X)


# --- a norm on the last axis or on the second ------------------------------------------------------


class TokenNorm(nn.Module):
    """`BatchNorm1d` on (N, C), or, given (N, L, C) with L = C, on the tokens."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.functional = nn.Linear(4, C), nn.BatchNorm1d(C), functional

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if not self.functional:
            return self.norm(y)
        n = self.norm
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


@pytest.mark.parametrize("functional", [False, True], ids=["module", "function"])
def test_a_norm_is_never_read_on_the_wrong_axis(functional: bool) -> None:
    model = ready(TokenNorm(functional))
    fused = fuse_purely(model)
    generator = torch.Generator().manual_seed(3)
    rows, tokens = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5, C, 4)))
    same(model, fused, rows)
    with pytest.raises(AssertionError, match="got another: pass example_inputs of this rank"):
        fused(tokens)
    same(model, fuse_purely(model, example_inputs=tokens), tokens)
