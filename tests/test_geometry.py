"""Modules of any geometry through `reparam.fuse`: one convolution where the algebra says so, and the same numbers.

The oracle is the original module in float64, at an odd and an even size. What the structure must be is asked of the
algebra alone, from the integers that were drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from nets import count, fuse_purely, ready, same
from strategies import Layer, Norm, Skip, branches, seeds, series, sizes, times, zero_padded_pairs
from torch import Tensor, nn

import reparam
from reparam.algebra import Affine, Border, Conv, Refusal, branch_sum, diagonal, substitute
from reparam.algebra.sources import window
from reparam.nn import ChannelScale

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

TOLERANCE = 1e-10
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PADS = {
    Border.CONSTANT: (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    Border.REFLECT: (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    Border.REPLICATE: (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    Border.CIRCULAR: (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


# --- modules --------------------------------------------------------------------------------------


def norm_of(norm: Norm, channels: int, axes: int) -> list[nn.Module]:
    if norm is Norm.NONE:
        return []
    return [NORMS[axes - 1](channels, affine=norm is Norm.AFFINE, eps=0.01)]


def flat(layer: Layer) -> list[int]:
    """Padding as torch wants it: the last axis first."""
    return [p for pair in zip(reversed(layer.lo), reversed(layer.hi), strict=True) for p in pair]


def conv_of(layer: Layer) -> nn.Module:
    axes = len(layer.kernel)
    own = {} if layer.explicit else {"padding": layer.lo, "padding_mode": layer.border.value}
    return CONVS[axes - 1](
        layer.in_channels,
        layer.out_channels,
        layer.kernel,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias,
        **own,
    )


def branch(layer: Layer | Skip) -> nn.Sequential:
    """Norm, padding module, convolution and norm, as far as the layer has them."""
    axes = layer.conv.axes
    if isinstance(layer, Skip):
        return nn.Sequential(*norm_of(layer.norm, layer.channels, axes))
    pads = [PADS[layer.border][axes - 1](tuple(flat(layer)))] if layer.explicit else []
    return nn.Sequential(
        *norm_of(layer.before, layer.in_channels, axes),
        *pads,
        conv_of(layer),
        *norm_of(layer.norm, layer.out_channels, axes),
    )


class Sum(nn.Module):
    """Branches that read one input."""

    def __init__(self, parts: Sequence[Layer | Skip]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([branch(part) for part in parts])

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for part in self.branches[1:]:
            y = y + part(x)
        return y


class Weighted(nn.Module):
    """Two branches with `F.pad` before their convolutions, summed by `torch.add(..., alpha=)`, and a norm after it."""

    def __init__(self, first: Layer, second: Layer, alpha: float) -> None:
        super().__init__()
        self.layers, self.alpha = (first, second), alpha
        self.a, self.b = conv_of(first), conv_of(second)
        self.norm = norm_of(Norm.AFFINE, first.out_channels, len(first.kernel))[0]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        a = self.a(F.pad(x, flat(first)) if first.explicit else x)
        b = self.b(F.pad(x, flat(second)) if second.explicit else x)
        return self.norm(torch.add(a, b, alpha=self.alpha))


# --- what the algebra says ------------------------------------------------------------------------


def steps(layer: Layer | Skip) -> list[Affine]:
    """The operations of a branch in order, each as a formula of `v`."""
    found = []
    if isinstance(layer, Skip):
        biased = layer.norm is not Norm.NONE
        return [Affine({"v": layer.conv}, biased=biased)]
    if layer.before is not Norm.NONE:
        found.append(Affine({"v": diagonal(layer.in_channels, layer.conv.axes)}, biased=True))
    conv, biased = layer.conv, layer.bias or layer.norm is not Norm.NONE
    if layer.explicit:
        zeros = (0,) * conv.axes
        pad = window(layer.in_channels, layer.lo, layer.hi, border=layer.border)
        found.append(Affine({"v": pad.structure}))
        conv = replace(conv, lo=zeros, hi=zeros, border=Border.CONSTANT)
    found.append(Affine({"v": conv}, biased=biased))
    return found


def whole(stages: Sequence[Affine]) -> Affine | Refusal:
    """All operations as one formula of the input of the first, or why not."""
    total: Affine | Refusal = stages[0]
    for stage in stages[1:]:
        assert isinstance(total, Affine)
        total = substitute(stage, {"v": total})
        if isinstance(total, Refusal):
            return total
    return total


def step_by_step(stages: Sequence[Affine]) -> bool:
    """Whether the last operation takes in one after the other, back to the first."""
    total: Affine | Refusal = stages[-1]
    for stage in reversed(stages[:-1]):
        if isinstance(total, Refusal):
            return False
        total = substitute(total, {"v": stage})
    return isinstance(total, Affine)


def one_sum(parts: Sequence[Layer | Skip]) -> Conv | Refusal:
    """The sum of all branches as one convolution, or why there is none."""
    convs = []
    for part in parts:
        formula = whole(steps(part))
        if isinstance(formula, Refusal):
            return formula
        convs.append(formula.terms["v"])
    return branch_sum(convs)


# --- checks ---------------------------------------------------------------------------------------


def inputs(chain: Sequence[Conv], channels: int, seed: int) -> list[Tensor]:
    """A batch of an odd and one of an even size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator, dtype=torch.float64) for size in sizes(chain)]


def inputs_of_sum(parts: Sequence[Layer | Skip], seed: int) -> list[Tensor]:
    """At which every branch has a few outputs."""
    pairs = [sizes([part.conv]) for part in parts]
    largest = [tuple(max(n) for n in zip(*same_parity, strict=True)) for same_parity in zip(*pairs, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    channels = parts[0].conv.in_channels
    return [torch.randn(2, channels, *size, generator=generator, dtype=torch.float64) for size in largest]


def pads_apart(conv: Conv) -> int:
    """1 where no `padding` of a torch convolution says what is padded, so that another module must pad."""
    around = conv.lo == conv.hi and min(conv.lo) >= 0
    same = set(conv.stride) == {1}
    same = same and all(
        (lo, hi) == (e // 2, e - e // 2) for lo, hi, e in zip(conv.lo, conv.hi, conv.extent, strict=True)
    )
    return int(not (around or same))


def fused_to(model: nn.Module, calls: Sequence[Tensor], *, one: bool | None, check: bool = True) -> dict[str, int]:
    """Fuse for the fewest operations; numbers always, and one convolution exactly where the algebra says so.

    It is a scale where it is one number per channel.

    `one=None`: it may become one, but need not.
    """
    fused = fuse_purely(model, cost=reparam.cost.always, check=check)
    for x in calls:
        same(model, fused, x, tolerance=TOLERANCE, floor=1e-2)
    before, after = count(model, calls[0]), count(fused, calls[0])
    assert all(after[kind] <= before[kind] for kind in ("conv", "norm", "add", "convs", "norms"))
    scales = sum(isinstance(module, ChannelScale) for module in fused.modules())
    single = (after["conv"] + scales, after["norm"], after["add"]) == (1, 0, 0)
    assert one is None or single == one, (
        f"before {before}, after {after}\n{reparam.plan(model, cost=reparam.cost.always)}"
    )
    return after


def check_sum(parts: Sequence[Layer | Skip], seed: int, check: bool = True) -> bool:
    """A sum of branches; returns whether it is one convolution."""
    total = one_sum(parts)
    model = ready(Sum(parts), seed)
    calls = inputs_of_sum(parts, seed)
    with torch.no_grad():
        shapes = {tuple(part(x).shape for x in calls) for part in model.branches}
    if len(shapes) > 1:
        assert isinstance(total, Refusal), f"{shapes} were added"
        return False
    after = fused_to(model, calls, one=not isinstance(total, Refusal), check=check)
    if isinstance(total, Refusal):
        assert after["add"] > 0
    if all(isinstance(part, Layer) and part.before is Norm.NONE for part in parts):
        assert after["norm"] == 0, "a norm after a convolution always folds"
    return not isinstance(total, Refusal)


def check_series(parts: Sequence[Layer], seed: int, check: bool = True) -> bool:
    """Layers in sequence; returns whether they are one convolution."""
    stages = [step for part in parts for step in steps(part)]
    formula = whole(stages)
    model = ready(nn.Sequential(*(branch(part) for part in parts)), seed)
    chain = [part.conv for part in reversed(parts)]
    one: bool | None = isinstance(formula, Affine)
    if isinstance(formula, Affine):
        saved = sum(1 + pads_apart(conv) for conv in chain) - 1 - pads_apart(formula.terms["v"])
        if not saved or not step_by_step(stages):
            one = None  # nothing is saved, or only once others have been merged
    elif parts[0].explicit and parts[0].before is Norm.NONE and isinstance(whole(stages[1:]), Affine):
        one = None  # the first pad may stay where it is
    fused_to(model, inputs(chain, parts[0].in_channels, seed), one=one, check=check)
    return isinstance(formula, Affine)


def check_weighted(pair: tuple[Layer, Layer], alpha: float, seed: int, check: bool = True) -> bool:
    """A weighted sum and its norm; returns whether they are one convolution."""
    if isinstance(branch_sum([pair[0].conv, pair[1].conv]), Refusal):
        return False
    fused_to(ready(Weighted(*pair, alpha), seed), inputs_of_sum(pair, seed), one=True, check=check)
    return True


# --- examples -------------------------------------------------------------------------------------


def square(kernel: int, groups: int = 1, norm: Norm = Norm.AFFINE, **fields: object) -> Layer:
    """A layer of 6 channels on the plane that keeps the size."""
    lo, hi = ((kernel - 1) // 2,) * 2, (kernel - 1 - (kernel - 1) // 2,) * 2
    layer = Layer(6, 6, (kernel,) * 2, (1, 1), (1, 1), lo, hi, groups, norm=norm, explicit=lo != hi)
    return Layer(**{**vars(layer), **fields})


REPVGG = (square(3), square(1), Skip(6, 2, Norm.AFFINE))
GROUPED = (square(3, 6), square(5, 3), square(1, 2), Skip(6, 2))
EVEN = (square(4), square(3, lo=(2, 0), hi=(0, 2), explicit=True), square(2, 2))


# what has failed before
DEPTHWISE = (square(1, 6, Norm.NONE), square(1, 6))
WIDE_REFLECTION = tuple(
    Layer(1, 1, kernel, (1, 1), (3, 1), lo, (6, 0), border=Border.REFLECT, explicit=lo != (6, 0))
    for kernel, lo in (((3, 1), (6, 0)), ((1, 1), (0, 0)))
)


def test_sums() -> None:
    became: Counter[bool] = Counter()

    @settings(max_examples=times(140))
    @given(branches(), seeds)
    @example(REPVGG, 0)
    @example(GROUPED, 0)
    @example(EVEN, 0)
    @example(DEPTHWISE, 0)
    @example(WIDE_REFLECTION, 0)
    def check(parts: tuple[Layer | Skip, ...], seed: int) -> None:
        became[check_sum(parts, seed)] += 1

    check()
    assert min(became[True], became[False]) > 0.05 * became.total()


def test_series() -> None:
    became: Counter[bool] = Counter()

    @settings(max_examples=times(120))
    @given(series(), seeds)
    @example((square(1, norm=Norm.NONE), square(3)), 0)
    @example((square(1), square(3)), 0)
    @example(DEPTHWISE, 0)
    def check(parts: tuple[Layer, ...], seed: int) -> None:
        became[check_series(parts, seed)] += 1

    check()
    assert min(became[True], became[False]) > 0.05 * became.total()


def test_a_pad_that_makes_a_convolution_full() -> None:
    """The second may follow the first only once the pad belongs to it, which by itself saves nothing."""
    first = Layer(3, 3, (2,), (2,), (1,), (0,), (1,), explicit=True)
    second = Layer(3, 3, (2,), (1,), (1,), (1,), (1,))
    assert isinstance(whole([*steps(first), *steps(second)]), Affine)
    model = ready(nn.Sequential(branch(first), branch(second)))
    fused_to(model, inputs([second.conv, first.conv], 3, 0), one=True)


def test_weighted_sums() -> None:
    became: Counter[bool] = Counter()

    @settings(max_examples=times(60))
    @given(zero_padded_pairs(), seeds)
    @example((square(3), square(1)), 0)
    @example((square(4), square(2)), 0)
    def check(pair: tuple[Layer, Layer], seed: int) -> None:
        became[check_weighted(pair, -0.5, seed)] += 1

    check()
    assert became[True] > 0.3 * became.total()


@settings(max_examples=times(40))
@given(branches(), seeds)
def test_the_cost_policy_is_obeyed(parts: tuple[Layer | Skip, ...], seed: int) -> None:
    """Whatever the policy, the same numbers; fewest multiply-adds: never more of them than before."""
    calls = inputs_of_sum(parts, seed)
    model = ready(Sum(parts), seed)
    with torch.no_grad():
        if len({part(calls[0]).shape for part in model.branches}) > 1:
            return
    for cost in (reparam.DEFAULT_COST, reparam.cost.macs):
        fused = fuse_purely(model, cost=cost)
        for x in calls:
            same(model, fused, x, tolerance=TOLERANCE, floor=1e-2)
        before, after = count(model, calls[0]), count(fused, calls[0])
        assert all(after[kind] <= before[kind] for kind in before if kind != "calls"), f"{before} {after}"
    assert macs(fused, calls[0]) <= macs(model, calls[0])


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the convolutions of one run."""
    total = 0

    def add(module: nn.Module, arguments: object, result: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        total += result.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, CONVS)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("border", list(Border))
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_every_rank_border_and_grouping_of_a_block(axes: int, border: Border, groups: int) -> None:
    """3-tap, 1-tap and identity branches with norms, under every way to pad: always one convolution."""

    def layer(kernel: int, groups: int) -> Layer:
        ones, around = (1,) * axes, (kernel // 2,) * axes
        return Layer(6, 6, (kernel,) * axes, ones, ones, around, around, groups, norm=Norm.AFFINE, border=border)

    check_sum((layer(3, groups), layer(1, 1), Skip(6, axes, Norm.AFFINE)), 0)
