"""Sums of which not all branches should become one convolution: the best groups, and equal outputs."""

import copy
import io
from collections.abc import Iterator
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probing import tally
from torch import Tensor, nn

import reparam
from reparam.nn import ChannelScale

CHANNELS = 4
Kernel = tuple[int, int]


class Branches(nn.Module):
    """Depthwise branches, each with its norm, summed one by one."""

    def __init__(self, kernels: list[Kernel], norm: bool = False, skip: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, k, padding=(k[0] // 2, k[1] // 2), groups=CHANNELS, bias=False)
            for k in kernels
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in kernels)
        self.norm, self.skip = nn.BatchNorm2d(CHANNELS) if norm else nn.Identity(), skip

    def forward(self, x: Tensor) -> Tensor:
        total = self.norms[0](self.convs[0](x))
        for conv, norm in zip(list(self.convs)[1:], list(self.norms)[1:], strict=True):
            total = total + norm(conv(x))
        return torch.relu(self.norm(total + x if self.skip else total))


def wide(model: nn.Module) -> nn.Module:
    """Statistics far from the defaults, in float64."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def partitions(items: list[Kernel]) -> Iterator[list[list[Kernel]]]:
    if not items:
        yield []
        return
    for found in partitions(items[1:]):
        for i in range(len(found)):
            yield [*found[:i], [items[0], *found[i]], *found[i + 1 :]]
        yield [[items[0]], *found]


def cost(groups: list[list[Kernel]]) -> int:
    """Multiply-adds and traffic per channel and position of a sum of convolutions, one for each group."""
    boxes = [(max(k[0] for k in g), max(k[1] for k in g)) for g in groups]
    return sum(prod(box) + 2 for box in boxes) + 3 * (len(boxes) - 1)


def kernels_of(model: nn.Module) -> list[Kernel]:
    """Sizes of all kernels; a scale has one tap."""
    convolutions = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sorted(convolutions + [(1, 1) for m in model.modules() if isinstance(m, ChannelScale)])


def assert_equal(fused: nn.Module, model: nn.Module, size: Kernel = (9, 8)) -> None:
    x = torch.randn(2, CHANNELS, *size, dtype=torch.float64)
    found, expected = fused(x).detach(), model(x).detach()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


THIN = [(21, 1), (1, 21), (19, 1), (1, 19), (17, 1), (1, 17)]


@pytest.mark.parametrize(
    ("kernels", "groups"),
    [
        ([(51, 5), (5, 51), (5, 5)], [(5, 51), (51, 5)]),
        ([(31, 3), (3, 31), (31, 5), (5, 31)], [(5, 31), (31, 5)]),
        (THIN, [(1, 21), (21, 1)]),
        ([*THIN, (15, 1), (1, 15), (3, 1)], [(1, 21), (21, 1)]),
        ([(9, 1), (1, 9), (9, 9)], [(9, 9)]),
        ([(13, 13), (51, 5), (5, 51)], [(5, 51), (13, 13), (51, 5)]),
    ],
    ids=["square into a band", "pairs of bands", "six thin bands", "nine branches", "all", "none"],
)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm behind"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_groups(kernels: list[Kernel], groups: list[Kernel], norm: bool, skip: bool) -> None:
    model = wide(Branches(kernels, norm, skip))
    fused = reparam.fuse(model)
    assert kernels_of(fused) == groups
    assert_equal(fused, model)
    assert_equal(fused, model, (3, 30))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    kernels=st.lists(st.tuples(*[st.sampled_from([1, 3, 5, 7, 9, 13])] * 2), min_size=2, max_size=5),
    norm=st.booleans(),
    skip=st.booleans(),
)
def test_never_dearer_than_apart_or_together(kernels: list[Kernel], norm: bool, skip: bool) -> None:
    model = wide(Branches(kernels, norm, skip))
    fused = reparam.fuse(model)
    assert_equal(fused, model)
    found = tally(fused, (torch.randn(1, CHANNELS, 6, 7, dtype=torch.float64),)).counts
    left = kernels_of(fused)
    price = sum(prod(k) + 2 for k in left) + 3 * found.adds
    assert price <= cost([[k] for k in kernels]) + 3 * skip
    assert price <= cost([kernels])
    assert price == min(cost(groups) for groups in partitions(kernels))


def test_names_and_state() -> None:
    build = lambda: wide(Branches(THIN))  # noqa: E731
    model = build()
    fused = reparam.fuse(model)
    assert {name for name, _ in fused.named_parameters()} == {
        f"convs.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")
    } - {"convs.1.bias"}
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    assert_equal(torch.load(stored, weights_only=False), model)
    again = reparam.fuse(Branches(THIN).double().eval())
    again.load_state_dict(fused.state_dict())
    assert_equal(again, model)
    (region,) = reparam.plan(model).regions
    assert region.after == ("conv 21x1, groups 4", "conv 1x21, groups 4")


def test_in_place_and_the_picture() -> None:
    model = wide(Branches(THIN))
    plan = reparam.plan(model)
    (node,) = (node for node in plan.wiring.after.values() if node.region is not None)
    assert node.label == "conv 21x1, groups 4 + conv 1x21, groups 4"
    assert node.inputs == (0,)
    changed = copy.deepcopy(model)
    reparam.fuse(changed, inplace=True)
    assert kernels_of(changed) == [(1, 21), (21, 1)]
    assert_equal(changed, model)


def test_many_branches_are_planned_soon() -> None:
    """Beyond a number, sums stay as the search has left them."""
    model = wide(Branches([(21, 1), (1, 21)] * 20))
    fused = reparam.fuse(model)
    assert kernels_of(fused) == [(21, 21)]
    assert_equal(fused, model)
    half = wide(Branches([(21, 1), (1, 21)] * 10))
    assert kernels_of(reparam.fuse(half)) == [(1, 21), (21, 1)]
