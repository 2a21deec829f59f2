"""The normal form of one linear, shift-equivariant map.

    y[j] = sum_a  W[a] . x[s j - lo + d a],      x extended beyond its ends

Letters used throughout: ``k`` kernel, ``s`` stride, ``d`` dilation, ``lo``/``hi`` padding before and behind (negative =
crop), ``g`` groups, ``n`` number of spatial axes. ``slack = lo + hi - d (k - 1)`` alone fixes the output length,
``floor((L + slack - 1) / s) + 1``.
"""

from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cached_property
from math import prod
from typing import Any, Final, final

import torch
from torch import Tensor

from reparam.algebra.pending import Pending

Ints = tuple[int, ...]


class Border(Enum):
    """How an input is extended beyond its ends."""

    CONSTANT = "zeros"
    REFLECT = "reflect"
    REPLICATE = "replicate"
    CIRCULAR = "circular"


@final
@dataclass(frozen=True, eq=False)
class Conv:
    """One convolution, without bias, as integers and a weight.

    Args:
        out_channels: channels of the result.
        in_channels: channels of the input; 0 if unknown, which only an identity may have.
        kernel: taps per axis; ``()`` for a linear layer.
        stride: step per axis.
        dilation: distance between taps per axis.
        lo: padding before the first element per axis; negative crops.
        hi: padding behind the last element per axis; negative crops.
        groups: number of channel groups.
        weight: ``(out, in/groups, *kernel)``, transposed ``(in, out/groups, *kernel)``; None: structure only, or
            ``pending``.
        identity: the map returns its input (one tap of weight 1 at offset 0).
        border: how the input is extended.
        fill: ``(in,)``, the constant that extends the input; None: zeros.
        transposed: the map scatters, as ``nn.ConvTranspose2d`` does.
        output_padding: of a transposed convolution.
        sized: how many results there are is asked for where it is called, in place of ``output_padding``.
        moves: every output is one of the inputs: nothing is computed.
        order: how the axes of the input, the batch among them, stand in the result, as for ``torch.permute``; None: as
            they are. Then ``axes`` is that of the input.
        lengths: of the input along every axis, where an example fixes them.
        remainders: per axis, the remainders that the input's length may leave, divided by the stride; None: any.
        one_size: the formula need hold for those lengths alone.
        pending: the weight, if it is not computed yet.

    Example:
        >>> Conv(8, 8, kernel=(3,), stride=(2,), dilation=(1,), lo=(1,), hi=(1,)).slack
        (0,)
    """

    out_channels: int
    in_channels: int
    kernel: Ints
    stride: Ints
    dilation: Ints
    lo: Ints
    hi: Ints
    groups: int = 1
    weight: Tensor | None = None
    identity: bool = False
    border: Border = Border.CONSTANT
    fill: Tensor | None = None
    transposed: bool = False
    output_padding: Ints = ()
    sized: bool = False
    moves: bool = False
    order: Ints | None = None
    lengths: Ints | None = None
    remainders: tuple[Ints, ...] | None = None
    one_size: bool = False
    pending: Pending | None = None

    def __post_init__(self) -> None:
        n = len(self.kernel)
        if not len(self.stride) == len(self.dilation) == len(self.lo) == len(self.hi) == n:
            axes = {len(t) for t in (self.kernel, self.stride, self.dilation, self.lo, self.hi)}
            raise ValueError(f"expected one entry per axis in every field, found lengths {sorted(axes)}")
        if self.out_channels % self.groups or self.in_channels % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.in_channels} -> {self.out_channels} channels")
        if self.order is not None and not self.pointwise:
            raise ValueError("expected another order of the axes of a pointwise map only")
        if self.weight is not None and tuple(self.weight.shape) != self.weight_shape:
            raise ValueError(f"expected a weight of shape {self.weight_shape}, found {tuple(self.weight.shape)}")

    @property
    def weight_shape(self) -> Ints:
        """Shape of the weight."""
        first, second = (
            (self.in_channels, self.out_channels) if self.transposed else (self.out_channels, self.in_channels)
        )
        return (first, second // self.groups, *self.kernel)

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def extent(self) -> Ints:
        """Distance from the first to the last tap, ``d (k - 1)``, per axis."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def slack(self) -> Ints:
        """``lo + hi - d (k - 1)`` per axis: fixes the output length."""
        return tuple(lo + hi - e for lo, hi, e in zip(self.lo, self.hi, self.extent, strict=True))

    @cached_property
    def pointwise(self) -> bool:
        """One tap at offset 0, stride 1, no change of size: a matrix on the channels."""
        return (
            not self.transposed
            and all(k == 1 and s == 1 for k, s in zip(self.kernel, self.stride, strict=True))
            and not any(self.lo)
            and not any(self.hi)
        )

    @cached_property
    def diagonal(self) -> bool:
        """A pointwise map that only scales each channel."""
        return self.pointwise and (self.identity or self.groups == self.in_channels == self.out_channels)

    @property
    def scales(self) -> bool:
        """Whether it is no more than one number per channel."""
        return self.diagonal and not self.identity

    @cached_property
    def needs_pad(self) -> bool:
        """Whether no ``padding`` of a torch convolution expresses the border, so that a padding must go before it."""
        if self.transposed or (self.lo == self.hi and min(self.lo, default=0) >= 0):
            return False
        halves = tuple(e // 2 for e in self.extent)
        rest = tuple(e - h for e, h in zip(self.extent, halves, strict=True))
        return not (self.lo == halves and self.hi == rest and set(self.stride) == {1})

    @cached_property
    def taps(self) -> int:
        """Taps of the kernel."""
        return prod(self.kernel)

    @property
    def structure(self) -> "Conv":
        """The same map without its weight."""
        return self if self.structural else replace(self, weight=None, pending=None)

    @property
    def structural(self) -> bool:
        """Whether it holds no weight."""
        return self.weight is None and self.pending is None

    @property
    def numeric(self) -> bool:
        """Whether its weight is there, or can be computed."""
        return self.weight is not None or self.pending is not None or self.identity

    @property
    def device(self) -> torch.device | None:
        """Where its weight is."""
        return self.weight.device if self.weight is not None else self.pending.device if self.pending else None

    def reads_outside(self, axis: int) -> bool:
        """Whether some output may depend on the extension of the input along ``axis``."""
        return self.lo[axis] > 0 or self.hi[axis] > 0

    @cached_property
    def never_outside(self) -> bool:
        """Whether no output depends on the extension of the input."""
        return not any(self.reads_outside(axis) for axis in range(self.axes))

    def constant_outside(self, axis: int) -> bool:
        """Whether all taps of every output beyond the ends of ``axis`` lie beyond the ends of the input, for all sizes.

        Then the formula, evaluated there, gives the response to the input's extension. It holds for one unpadded
        tap and for "full" padding.
        """
        if self.identity or (axis >= self.axes and self.pointwise):
            return True
        if self.transposed or self.border is not Border.CONSTANT:
            return False
        k_extent, s = self.extent[axis], self.stride[axis]
        return self.lo[axis] >= k_extent + 1 - s and self.hi[axis] >= k_extent


_FIELDS: Final = tuple(field.name for field in fields(Conv))
_INTERNED: Final[dict[Any, Conv]] = {}
_MOST: Final = 8192


def interned(conv: Conv) -> Conv:
    """One structure in the place of all that are equal to it, so that what follows from it is computed once.

    Example:
        >>> one, other = (Conv(8, 8, (3,), (1,), (1,), (1,), (1,)) for _ in range(2))
        >>> one is other, interned(one) is interned(other)
        (False, True)
    """
    if not conv.structural or conv.fill is not None:
        return conv
    if len(_INTERNED) > _MOST:
        _INTERNED.clear()
    return _INTERNED.setdefault(tuple([getattr(conv, name) for name in _FIELDS]), conv)


def pointwise(
    out_channels: int,
    in_channels: int,
    axes: int,
    groups: int = 1,
    weight: Tensor | None = None,
    identity: bool = False,
) -> Conv:
    """A matrix on the channels as a convolution of one tap over ``axes`` axes; ``weight`` is ``(out, in/groups)``."""
    ones, zeros = (1,) * axes, (0,) * axes
    if weight is not None:
        weight = weight.reshape(out_channels, in_channels // groups, *ones)
    return Conv(out_channels, in_channels, ones, ones, ones, zeros, zeros, groups, weight, identity)


def selection(out_channels: int, in_channels: int, axes: int) -> Conv:
    """A map whose outputs are some of the input channels, or zero: its weight is a matrix of zeros and ones."""
    return replace(pointwise(out_channels, in_channels, axes), moves=True)


def permuted(channels: int, axes: int, order: Ints) -> Conv:
    """Another order of the axes of a value that has its channels in front of ``axes`` axes."""
    return replace(diagonal(channels, axes), moves=True, order=order)


def diagonal(channels: int, axes: int, scale: Tensor | None = None) -> Conv:
    """Multiplication of each channel by ``scale``, ``(channels,)``, as a depthwise convolution of one tap."""
    return pointwise(channels, channels, axes, groups=channels, weight=scale)


def identity(channels: int, axes: int, weight: Tensor | None = None) -> Conv:
    """The identity as a depthwise convolution; ``weight`` is ones of shape ``(channels,)``; 0 channels: not known."""
    return pointwise(channels, channels, axes, groups=max(channels, 1), weight=weight, identity=True)
