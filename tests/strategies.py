"""Hypothesis strategies that draw geometry, and the numbers that a seed gives to it.

Failures shrink to small shapes because no number is ever drawn: weights, biases, inputs come from `seeds`.
Operands of a composition are listed from the outside in, as they are written: `(c, b, a)` is `c` after `b` after `a`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import gcd

import hypothesis.strategies as st
import torch
from hypothesis.strategies import DrawFn, SearchStrategy
from oracle import Array
from torch import Tensor

from reparam.algebra import Border, Conv, Ints, diagonal, identity, pointwise

seeds = st.integers(0, 999)
CHANNELS = st.sampled_from([1, 2, 3, 4, 6, 12])
LONGEST = (0, 7, 4, 3)  # taps per axis, by number of axes
BORDERS = st.sampled_from(list(Border))
MORE = int(os.environ.get("MORE_EXAMPLES", "1"))


def times(examples: int) -> int:
    """How many examples to draw: as many, or `MORE_EXAMPLES` times as many for a long hunt."""
    return examples * MORE


class Reach(Enum):
    """Where a convolution reads, relative to the ends of its input."""

    ANYWHERE = "padded, cropped or neither, each end for itself"
    INSIDE = "never beyond an end"
    FULL = "every output that one of its taps can reach"


# --- numbers --------------------------------------------------------------------------------------


def normal(shape: Sequence[int], seed: int, stream: int = 0) -> Tensor:
    """Numbers from N(0, 1) in float64; equal seeds with different streams are independent."""
    generator = torch.Generator().manual_seed(seed * 1000 + stream)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def numbered(conv: Conv, seed: int, stream: int = 0) -> Conv:
    """A structure with a weight; where it has a fill, one that depends on the seed and its channels alone."""
    fill = None if conv.fill is None else normal((conv.in_channels,), seed, 900)
    weight = None if conv.identity else normal(conv.weight_shape, seed, stream)
    return replace(conv, weight=weight, fill=fill)


def all_numbered(convs: Sequence[Conv], seed: int) -> tuple[Conv, ...]:
    """All with weights of their own."""
    return tuple(numbered(conv, seed, 1 + stream) for stream, conv in enumerate(convs))


def image(channels: int, size: Sequence[int], seed: int) -> Array:
    """An input, `(channels, *size)`."""
    return normal((channels, *size), seed, 800).numpy()


def sizes(chain: Sequence[Conv]) -> tuple[Ints, Ints]:
    """An odd and an even size at which a chain, listed from the outside in, has a few outputs on every axis."""
    least = []
    for axis in range(chain[0].axes):
        length = 2 if chain[0].axes == 3 else 3
        for conv in chain:
            s = conv.stride[axis]
            if conv.transposed:
                extra = conv.output_padding[axis] if conv.output_padding else 0
                length = max(-(-(length - 1 + conv.slack[axis] - extra) // s) + 1, 1)
                continue
            wide = 0 if conv.border is Border.CONSTANT else max(conv.lo[axis], conv.hi[axis]) + 1
            length = max(s * (length - 1) + 1 - conv.slack[axis], wide, 1)
        least.append(length)
    return tuple(n | 1 for n in least), tuple(n + n % 2 for n in least)


def images(chain: Sequence[Conv], seed: int) -> list[Array]:
    """An input of an odd and one of an even size for a chain, listed from the outside in."""
    return [image(chain[-1].in_channels, size, seed) for size in sizes(chain)]


def common_images(parts: Sequence[Conv], seed: int) -> list[Array]:
    """The same for convolutions of one input."""
    pairs = [sizes([part]) for part in parts if not part.identity] or [sizes(parts)]
    largest = [tuple(max(ns) for ns in zip(*same, strict=True)) for same in zip(*pairs, strict=True)]
    return [image(parts[0].in_channels, size, seed) for size in largest]


# --- one convolution ------------------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    """All of them, from 1."""
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def convs(
    draw: DrawFn,
    axes: int | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    stride: Ints | None = None,
    slack: Ints | None = None,
    border: Border = Border.CONSTANT,
    filled: bool = False,
    reach: Reach | None = None,
) -> Conv:
    """The structure of a convolution that is not transposed; `slack` fixes what it does to the size."""
    n = draw(st.integers(1, 3)) if axes is None else axes
    inward = draw(CHANNELS) if in_channels is None else in_channels
    outward = draw(CHANNELS) if out_channels is None else out_channels
    groups = draw(st.sampled_from(divisors(gcd(inward, outward))))
    reach = draw(st.sampled_from(list(Reach))) if reach is None else reach
    kernel, steps, dilation, lo, hi = [], [], [], [], []
    for axis in range(n):
        k, d = draw(st.integers(1, LONGEST[n])), draw(st.integers(1, 3))
        s = draw(st.integers(1, 3)) if stride is None else stride[axis]
        extent = d * (k - 1)
        if slack is not None:
            before = draw(st.integers(-1, extent + 1) | st.just((slack[axis] + extent) // 2))
            behind = slack[axis] - before + extent
        elif reach is Reach.INSIDE:
            before, behind = draw(st.integers(-2, 0)), draw(st.integers(-2, 0))
        elif reach is Reach.FULL:
            before, behind = extent + draw(st.integers(0, 1)), extent + draw(st.integers(0, 1))
        else:
            before, behind = draw(st.integers(-1, extent + 1)), draw(st.integers(-1, extent + 1))
        kernel.append(k), steps.append(s), dilation.append(d), lo.append(before), hi.append(behind)
    return Conv(
        outward,
        inward,
        tuple(kernel),
        tuple(steps),
        tuple(dilation),
        tuple(lo),
        tuple(hi),
        groups,
        border=border,
        fill=torch.zeros(inward) if filled and border is Border.CONSTANT else None,
    )


@st.composite
def transposed_convs(
    draw: DrawFn, like: Conv | None = None, axes: int | None = None, in_channels: int | None = None
) -> Conv:
    """The structure of a transposed convolution, if asked for with the size and channels of another one."""
    conv = draw(
        convs(axes=axes, in_channels=in_channels, reach=Reach.ANYWHERE)
        if like is None
        else convs(like.axes, like.in_channels, like.out_channels, like.stride, like.slack)
    )
    extra = tuple(draw(st.integers(0, s - 1)) for s in conv.stride) if like is None else like.output_padding
    return replace(conv, transposed=True, output_padding=extra, border=Border.CONSTANT, fill=None)


@st.composite
def pointwise_convs(draw: DrawFn, axes: int, in_channels: int | None = None, out_channels: int | None = None) -> Conv:
    """The structure of a matrix on the channels: dense, grouped, one number per channel, or the identity."""
    inward = draw(CHANNELS) if in_channels is None else in_channels
    if (out_channels is None or out_channels == inward) and draw(st.booleans()):
        return identity(inward, axes) if draw(st.booleans()) else diagonal(inward, axes)
    outward = draw(CHANNELS) if out_channels is None else out_channels
    return pointwise(outward, inward, axes, groups=draw(st.sampled_from(divisors(gcd(inward, outward)))))


# --- operands of rules ----------------------------------------------------------------------------


@st.composite
def beside(draw: DrawFn, conv: Conv) -> Conv:
    """A structure that can mostly be added to another."""
    if conv.transposed:
        return draw(transposed_convs(conv))
    same_size = set(conv.stride) <= {1} and not any(conv.slack) and conv.in_channels == conv.out_channels
    choice = draw(st.integers(0, 7))
    if choice < 2 and same_size:
        return identity(conv.in_channels, conv.axes) if choice else diagonal(conv.in_channels, conv.axes)
    border = draw(BORDERS) if choice == 2 else conv.border
    slack = None if choice == 3 else conv.slack
    filled = draw(st.booleans()) if choice == 4 else conv.fill is not None
    return draw(convs(conv.axes, conv.in_channels, conv.out_channels, conv.stride, slack, border, filled))


@st.composite
def parallel(draw: DrawFn, count: int = 2, conv: SearchStrategy[Conv] | None = None) -> tuple[Conv, ...]:
    """Structures that read one input and can mostly be added."""
    if conv is None:
        conv = st.one_of(
            convs(),
            convs(),
            st.tuples(BORDERS, st.booleans()).flatmap(lambda t: convs(border=t[0], filled=t[1])),
            transposed_convs(),
        )
    first = draw(conv)
    return (first, *(draw(beside(first)) for _ in range(count - 1)))


@st.composite
def after(draw: DrawFn, inner: Conv) -> Conv:
    """A structure that can mostly be applied to the result of another."""
    axes, channels = inner.axes, inner.out_channels
    if inner.transposed:
        return draw(pointwise_convs(axes, channels))
    choice = draw(st.integers(0, 5))
    if choice == 0 and inner.pointwise:
        return draw(transposed_convs(axes=axes, in_channels=channels))
    if choice == 1 and inner.pointwise:
        return draw(convs(axes, channels, border=draw(BORDERS)))
    if choice == 2:
        return draw(pointwise_convs(axes, channels))
    reach = Reach.ANYWHERE if choice == 3 else None if _full(inner) else Reach.INSIDE
    return draw(convs(axes, channels, reach=reach))


def _full(conv: Conv) -> bool:
    return all(min(lo, hi) >= e for lo, hi, e in zip(conv.lo, conv.hi, conv.extent, strict=True))


@st.composite
def chain(draw: DrawFn, count: int = 2) -> tuple[Conv, ...]:
    """Structures that can mostly be composed, listed from the outside in."""
    choice, axes = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    if choice == 0:
        convolutions = [draw(transposed_convs(axes=axes))]
    elif choice == 1:
        convolutions = [draw(convs(axes, border=draw(BORDERS), filled=draw(st.booleans()), reach=Reach.ANYWHERE))]
    elif choice == 2:
        convolutions = [draw(pointwise_convs(axes))]
    else:
        convolutions = [draw(convs(axes))]
    while len(convolutions) < count:
        convolutions.insert(0, draw(after(convolutions[0])))
    return tuple(convolutions)


any_conv = parallel(1).map(lambda parts: parts[0])


@st.composite
def scaled_after(draw: DrawFn, count: int = 2) -> tuple[Conv, ...]:
    """Scales, one number per channel, applied to the result of a convolution."""
    conv = draw(any_conv)
    return (*(diagonal(conv.out_channels, conv.axes) for _ in range(count - 1)), conv)


@st.composite
def scaled_before(draw: DrawFn, count: int = 2) -> tuple[Conv, ...]:
    """A convolution applied to scaled channels."""
    conv = draw(any_conv)
    return (conv, *(diagonal(conv.in_channels, conv.axes) for _ in range(count - 1)))


# --- chains for the border rule -------------------------------------------------------------------


class Fill(Enum):
    """The constant by which a stage extends its input."""

    ZERO = "zero"
    OTHER = "some other one"
    MATCHING = "what the stages before give beyond the ends, if anything"


@dataclass(frozen=True)
class Stage:
    """One step of a chain."""

    conv: Conv
    biased: bool
    fill: Fill = Fill.ZERO


@st.composite
def stages(draw: DrawFn) -> tuple[Stage, ...]:
    """Two or three steps in order of execution: convolutions, pads, crops, affine maps, transposed convolutions."""
    axes = draw(st.integers(1, 2))
    channels = draw(st.integers(1, 3))
    steps: list[Stage] = []
    for _ in range(draw(st.integers(2, 3))):
        kind = draw(st.integers(0, 8))
        biased = draw(st.booleans())
        fill = Fill.ZERO
        if kind == 0:
            conv = diagonal(channels, axes)
        elif kind == 1:
            conv = identity(channels, axes)
            biased = False
        elif kind == 2:  # a pad or a strided slice
            conv = replace(draw(convs(axes, channels, channels, reach=Reach.ANYWHERE)), groups=channels)
            ones = (1,) * axes
            conv = replace(conv, kernel=ones, dilation=ones, border=draw(BORDERS))
            fill, biased = draw(st.sampled_from(list(Fill))), False
        elif kind == 3:
            conv = draw(convs(axes, channels, draw(st.integers(1, 3)), border=draw(BORDERS)))
        elif kind == 4:
            conv = draw(transposed_convs(axes=axes, in_channels=channels))
            conv = replace(conv, out_channels=channels, groups=1)
        else:
            conv = draw(convs(axes, channels, draw(st.integers(1, 3)), reach=draw(st.sampled_from(list(Reach)))))
            fill = draw(st.sampled_from([Fill.ZERO, Fill.ZERO, Fill.MATCHING]))
        if conv.border is not Border.CONSTANT or conv.transposed:
            fill = Fill.ZERO
        steps.append(Stage(conv, biased, fill))
        channels = conv.out_channels
    return tuple(steps)


# --- modules --------------------------------------------------------------------------------------


class Norm(Enum):
    """The batch norm of a layer."""

    NONE = "none"
    PLAIN = "without gamma and beta"
    AFFINE = "with gamma and beta"


@dataclass(frozen=True)
class Layer:
    """A convolution with its padding and its norms.

    `explicit`: a padding module stands before the convolution, and the convolution pads nothing itself.
    """

    in_channels: int
    out_channels: int
    kernel: Ints
    stride: Ints
    dilation: Ints
    lo: Ints
    hi: Ints
    groups: int = 1
    bias: bool = False
    norm: Norm = Norm.NONE
    before: Norm = Norm.NONE
    border: Border = Border.CONSTANT
    explicit: bool = False

    @property
    def conv(self) -> Conv:
        """Its structure."""
        return Conv(
            self.out_channels,
            self.in_channels,
            self.kernel,
            self.stride,
            self.dilation,
            self.lo,
            self.hi,
            self.groups,
            border=self.border,
        )


@dataclass(frozen=True)
class Skip:
    """The input itself, with or without a norm."""

    channels: int
    axes: int
    norm: Norm = Norm.NONE

    @property
    def conv(self) -> Conv:
        """Its structure."""
        structure = identity if self.norm is Norm.NONE else diagonal
        return structure(self.channels, self.axes)


@st.composite
def layers(
    draw: DrawFn,
    like: Layer | None = None,
    axes: int | None = None,
    in_channels: int | None = None,
    unbiased: bool = False,
    borders: SearchStrategy[Border] = BORDERS,
    padded: bool = True,
) -> Layer:
    """A layer, if asked for one that can mostly be added to another."""
    n = like.conv.axes if like else draw(st.integers(1, 3)) if axes is None else axes
    longest = (0, 7, 7, 3)[n]
    inward = like.in_channels if like else draw(CHANNELS) if in_channels is None else in_channels
    outward = like.out_channels if like else draw(CHANNELS)
    kernel = tuple(draw(st.integers(1, longest)) for _ in range(n))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(n))
    stride = like.stride if like else tuple(draw(st.integers(1, 3)) for _ in range(n))
    border = draw(borders) if like is None or draw(st.integers(0, 5)) == 0 else like.border
    lo, hi = [], []
    symmetric = draw(st.booleans())
    for axis, (k, d) in enumerate(zip(kernel, dilation, strict=True)):
        extent = d * (k - 1)
        if like is None:
            before = draw(st.sampled_from([0, extent // 2, extent]) | st.integers(0, 3))
            behind = before if symmetric else draw(st.integers(0, 3))
            before, behind = (before, behind) if padded else (0, 0)
        else:
            total = like.conv.slack[axis] + extent
            before = max(0, total // 2) if symmetric else draw(st.integers(0, max(total, 0)))
            behind = total - before
        lo.append(before), hi.append(behind)
    own = lo == hi and min(lo) >= 0
    return Layer(
        inward,
        outward,
        kernel,
        stride,
        dilation,
        tuple(lo),
        tuple(hi),
        draw(st.sampled_from(divisors(gcd(inward, outward)))),
        not unbiased and draw(st.booleans()),
        draw(st.sampled_from([Norm.NONE] if unbiased else list(Norm))),
        draw(st.sampled_from([Norm.NONE, Norm.NONE, Norm.NONE, *([] if unbiased else [Norm.AFFINE])])),
        border if min(*lo, *hi) >= 0 and any((*lo, *hi)) else Border.CONSTANT,
        not own or draw(st.booleans()),
    )


@st.composite
def branches(draw: DrawFn) -> tuple[Layer | Skip, ...]:
    """Two or three layers that read one input and are added."""
    first = draw(layers())
    parts: list[Layer | Skip] = [first]
    for _ in range(draw(st.integers(1, 2))):
        conv = first.conv
        same = set(conv.stride) <= {1} and not any(conv.slack) and conv.in_channels == conv.out_channels
        if same and draw(st.booleans()):
            parts.append(Skip(conv.in_channels, conv.axes, draw(st.sampled_from(list(Norm)))))
        else:
            parts.append(draw(layers(first)))
    return tuple(parts)


@st.composite
def zero_padded_pairs(draw: DrawFn) -> tuple[Layer, Layer]:
    """Two layers of zero padding that read one input and can mostly be added."""
    zeros = st.just(Border.CONSTANT)
    first = draw(layers(borders=zeros))
    return first, draw(layers(first, borders=zeros))


@st.composite
def series(draw: DrawFn) -> tuple[Layer, ...]:
    """Two layers in order of execution."""
    first = draw(layers(unbiased=draw(st.booleans())))
    return first, draw(layers(axes=first.conv.axes, in_channels=first.out_channels, padded=draw(st.booleans())))
