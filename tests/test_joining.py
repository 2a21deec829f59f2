"""Branches that each go through the same pixel shuffle before they are summed."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from test_layouts import wide
from torch import Tensor, nn
from torch.nn import functional as F

import reparam


def branch(kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, kernel, padding=kernel // 2), nn.PixelShuffle(2))


class Three(nn.Module):
    """Branches in an order of which the last has the largest kernel, or the first."""

    def __init__(self, kernels: tuple[int, ...] = (1, 3, 5)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch(k) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for other in list(self.branches)[1:]:
            total = total + other(x)
        return torch.relu(total)


class Functions(nn.Module):
    """The shuffle as a function, behind a norm and behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(4, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(self.a(x) + self.c(x), 2), F.pixel_shuffle(self.norm(self.b(x)), 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self._parts(x)
        return torch.relu(first + second)


class ReadTwice(Functions):
    """A shuffled branch is also a result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._parts(x)
        return torch.relu(first + second), first


class OtherFactor(nn.Module):
    """Two shuffles of which one goes the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.PixelShuffle(2), nn.PixelUnshuffle(2)
        self.a, self.b = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(4, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.a(x)) + F.interpolate(self.down(self.b(x)), scale_factor=4)


class OtherInputs(Functions):
    """The branches read different values."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.a(x), 2) + F.pixel_shuffle(self.norm(self.b(torch.relu(x))), 2)


def images() -> Tensor:
    return torch.randn(2, 4, 6, 8, dtype=torch.float64)


def assert_equal(fused: nn.Module, model: nn.Module) -> None:
    x = images()
    for found, expected in zip(fused(x), model(x), strict=True):
        assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-12


def convolutions(model: nn.Module) -> list[tuple[int, ...]]:
    return [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("kernels", [(1, 3), (3, 1), (1, 3, 5), (5, 1, 3), (1, 5, 3), (3, 3, 3, 3)])
def test_one_convolution_and_one_shuffle(kernels: tuple[int, ...]) -> None:
    model = wide(Three(kernels))
    fused = reparam.fuse(model)
    assert convolutions(fused) == [(max(kernels), max(kernels))]
    assert sum(isinstance(m, nn.PixelShuffle) for m in fused.modules()) == 1
    assert_equal(fused, model)
    again = reparam.fuse(Three(kernels).double().eval())
    again.load_state_dict(fused.state_dict())
    assert_equal(again, model)
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    assert_equal(torch.load(stored, weights_only=False), copy.deepcopy(model))


def test_functions_norms_and_sums() -> None:
    model = wide(Functions())
    fused = reparam.fuse(model)
    assert convolutions(fused) == [(3, 3)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_equal(fused, model)


def test_the_plan_counts_both_branches() -> None:
    model = wide(Three())
    (region,) = reparam.plan(model).regions
    assert region.params_before == sum(p.numel() for p in model.parameters())
    assert region.params_after == sum(p.numel() for p in reparam.fuse(model).parameters())
    assert sorted(region.before) == ["add", "conv 1x1", "conv 3x3", "conv 5x5"]


@pytest.mark.parametrize("build", [ReadTwice, OtherFactor, OtherInputs])
def test_left_apart(build: Callable[[], nn.Module]) -> None:
    model = wide(build())
    fused = reparam.fuse(model)
    assert {m for m, _ in fused.named_children()} >= {"a", "b"}
    assert_equal(fused, model)


def test_a_hooked_shuffle_stays() -> None:
    model = wide(Three((1, 3)))
    model.branches[0][1].register_forward_hook(lambda module, args, result: 2 * result)
    fused = reparam.fuse(model)
    assert len(convolutions(fused)) == 2
    assert_equal(fused, model)


def test_in_place_and_the_picture() -> None:
    model = wide(Three())
    plan = reparam.plan(model)
    assert sum(node.label == "PixelShuffle" for node in plan.wiring.before.values()) == 3
    assert sum(node.label == "PixelShuffle" for node in plan.wiring.after.values()) == 1
    changed = copy.deepcopy(model)
    reparam.fuse(changed, inplace=True)
    assert convolutions(changed) == [(5, 5)]
    assert_equal(changed, model)
