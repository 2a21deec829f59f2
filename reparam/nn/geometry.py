"""Where the taps of a convolution lie, and smaller kernels whose taps are some of them.

A branch can be summed with a convolution, for every input size, if its taps are taps of that convolution and its output
is as long. Tap ``t`` of an axis reads the input at ``s j - lo + d t``, and ``slack = lo + hi - d (k - 1)`` fixes the
length; so a kernel of ``m`` taps, every ``r``-th one from tap ``t`` on, has

    lo' = lo - d t,      hi' = slack + d r (m - 1) - lo',      dilation d r.

Letters: ``k`` kernel, ``s`` stride, ``d`` dilation, ``lo`` and ``hi`` padding before and behind (negative: crop).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self, final

from torch import nn

Ints = tuple[int, ...]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.modules.batchnorm._BatchNorm

CONVS: Final[dict[int, Callable[..., Convolution]]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADS: Final = {"zeros": "ZeroPad", "reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}


class UnfitError(ValueError):
    """A branch has no taps, channels or border in common with a convolution; the message says what is missing."""


@final
@dataclass(frozen=True, slots=True)
class Geometry:
    """Channels, kernel and border of a convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: taps per axis.
        stride: step per axis.
        dilation: distance between taps per axis.
        lo: padding before the first element per axis.
        hi: padding behind the last element per axis.
        groups: channel groups.
        padding_mode: how the input is extended: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Example:
        >>> plain = Geometry.of(nn.Conv2d(8, 8, 3, padding=1))
        >>> plain.window((1, 3))
        Window(kernel=(1, 3), dilation=(1, 1), lo=(0, 1), hi=(0, 1))
    """

    in_channels: int
    out_channels: int
    kernel: Ints
    stride: Ints
    dilation: Ints
    lo: Ints
    hi: Ints
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: Convolution) -> Self:
        """The geometry of a module."""
        kernel, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
        extent = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if conv.padding == "valid":
            lo = hi = (0,) * len(kernel)
        elif conv.padding == "same":  # torch puts the odd one behind
            lo, hi = tuple(e // 2 for e in extent), tuple(e - e // 2 for e in extent)
        else:
            lo = hi = tuple(int(p) for p in conv.padding)
        channels = (conv.in_channels, conv.out_channels)
        return cls(*channels, kernel, stride, dilation, lo, hi, conv.groups, conv.padding_mode)

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a kernel of its own."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has one tap."""
        return set(self.kernel) == {1}

    @property
    def keeps_shape(self) -> bool:
        """Whether the input, as it is, could be added to the output: one of the taps lies at offset 0."""
        axes = zip(self.lo, self.hi, self.kernel, self.dilation, strict=True)
        centred = all(lo + hi == d * (k - 1) and lo % d == 0 and lo // d < k for lo, hi, k, d in axes)
        return centred and self.in_channels == self.out_channels and set(self.stride) == {1}

    def window(self, kernel: Ints, step: int = 1) -> "Window":
        """The ``kernel`` middle taps per axis, every ``step``-th one.

        Raises:
            UnfitError: the kernel has fewer taps.
        """
        dilation, lo, hi = [], [], []
        for axis, (taps, k, d) in enumerate(zip(kernel, self.kernel, self.dilation, strict=True)):
            rest = k - 1 - step * (taps - 1)
            if rest < 0:
                raise UnfitError(f"a kernel of {taps} taps, {step} apart, is longer than {k} taps")
            before = self.lo[axis] - d * (rest // 2)
            slack = self.lo[axis] + self.hi[axis] - d * (k - 1)
            dilation.append(d * step if taps > 1 else 1)
            lo.append(before)
            hi.append(slack + d * step * (taps - 1) - before)
        return Window(kernel, tuple(dilation), tuple(lo), tuple(hi))


@final
@dataclass(frozen=True, slots=True)
class Window:
    """Taps and border of a smaller kernel.

    Args:
        kernel: taps per axis.
        dilation: distance between taps per axis.
        lo: padding before the first element per axis; negative crops.
        hi: padding behind the last element per axis; negative crops.
    """

    kernel: Ints
    dilation: Ints
    lo: Ints
    hi: Ints

    @property
    def even(self) -> bool:
        """Whether the ``padding`` argument of a torch module says it all."""
        return self.lo == self.hi and min(self.lo) >= 0

    def pad(self, mode: str) -> nn.Module | None:
        """The module that pads and crops as this window does; None if nothing is to be done.

        Raises:
            UnfitError: torch has no such module, because one side is cropped and another one reflected.
        """
        flat = [amount for pair in zip(reversed(self.lo), reversed(self.hi), strict=True) for amount in pair]
        if not any(flat):
            return None
        if max(flat) <= 0:
            mode = "zeros"  # it only crops
        if mode != "zeros" and min(flat) < 0:
            raise UnfitError(f"one side would be cropped and another one padded in the mode {mode!r}")
        kind = getattr(nn, f"{PADS[mode]}{len(self.kernel)}d")
        padding: nn.Module = kind(tuple(flat))
        return padding

    def conv(
        self, in_channels: int, out_channels: int, *, stride: Ints, groups: int, mode: str, bias: bool = False
    ) -> nn.Module:
        """A convolution with this window, behind a padding where torch's own is not enough.

        Raises:
            UnfitError: see ``pad``.
        """
        options: dict[str, Any] = {"stride": stride, "dilation": self.dilation, "groups": groups, "bias": bias}
        kind = CONVS[len(self.kernel)]
        if self.even:
            mode = mode if any(self.lo) else "zeros"
            return kind(in_channels, out_channels, self.kernel, padding=self.lo, padding_mode=mode, **options)
        padding = self.pad(mode)
        assert padding is not None
        return nn.Sequential(padding, kind(in_channels, out_channels, self.kernel, **options))
