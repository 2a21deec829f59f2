"""Branches that can stand beside a convolution.

Each function takes a geometry and a way to make norms (None: the branch has no norm), and returns a module whose output
can be added to that of the convolution for every input size, or raises ``UnfitError``. A branch with norms ends with
one.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Final, final

import torch
from torch import nn

from reparam.errors import ReparamError
from reparam.nn.geometry import Geometry, Norm, UnfitError, Window
from reparam.nn.parts import ChannelScale, NormAndPad, line

NormOf = Callable[[int], Norm]
Maker = Callable[[Geometry, NormOf | None], nn.Module]
POOLS: Final[dict[int, Callable[..., nn.Module]]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@final
@dataclass(frozen=True, slots=True)
class Branch:
    """A kind of branch.

    Args:
        name: what it is called among the children of a block.
        make: builds it for a geometry, or raises ``UnfitError`` where it does not fit.
        norm: whether it has norms; None: if the convolution has one.

    Raises:
        ReparamError: a module cannot have such a name.

    Example:
        >>> unnormed = POINT.without_norm()
        >>> unnormed.make(Geometry.of(nn.Conv2d(4, 8, 3, padding=1, stride=2)), None)
        Conv2d(4, 8, kernel_size=(1, 1), stride=(2, 2), bias=False)
    """

    name: str
    make: Maker
    norm: bool | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name or hasattr(nn.ModuleDict, self.name):
            raise ReparamError(
                f"expected a name of a branch that a module can have, found {self.name!r}: take one without a dot that"
                " nn.ModuleDict does not use itself"
            )

    def with_norm(self) -> "Branch":
        """The same with norms, whether the convolution has one or not."""
        return replace(self, norm=True)

    def without_norm(self) -> "Branch":
        """The same without norms."""
        return replace(self, norm=False)


def point(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """A 1x1 convolution on the middle tap."""
    if geometry.pointwise:
        raise UnfitError("the kernel has one tap itself")
    return _conv_norm(geometry, geometry.window((1,) * geometry.axes), norm)


def identity(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """The input, or a norm of it."""
    _require_shape(geometry)
    return nn.Identity() if norm is None else norm(geometry.out_channels)


def scale(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """The input times one parameter per channel."""
    _require_shape(geometry)
    scaled = ChannelScale(geometry.out_channels, geometry.axes)
    return scaled if norm is None else _chain(scale=scaled, norm=norm(geometry.out_channels))


def copy_of_kernel(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """A second kernel of the same geometry."""
    return _conv_norm(geometry, geometry.window(geometry.kernel), norm)


def horizontal(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """The middle taps along the last axis."""
    return _line(geometry, geometry.axes - 1, norm)


def vertical(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """The middle taps along the first axis."""
    return _line(geometry, 0, norm)


def average(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """A 1x1 convolution and an average over the kernel; the average alone beside a depthwise convolution."""
    if geometry.pointwise:
        raise UnfitError("the kernel has one tap, and an average over it is the identity")
    if any(d > 1 and k > 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True)):
        raise UnfitError(f"an average has no dilation, the kernel has {geometry.dilation}")
    whole = geometry.window(geometry.kernel)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if not geometry.depthwise:
        parts["conv"] = _pointwise(geometry, geometry.out_channels)
    padding = whole.pad(geometry.padding_mode)
    if not geometry.depthwise and norm is not None:
        parts["inner_norm"] = _bordered(norm(geometry.out_channels), geometry, padding)
    elif padding is not None:
        parts["padding"] = padding
    parts["pool"] = POOLS[geometry.axes](geometry.kernel, geometry.stride)
    if norm is not None:
        parts["norm"] = norm(geometry.out_channels)
    return nn.Sequential(parts)


def point_then_kernel(geometry: Geometry, norm: NormOf | None) -> nn.Module:
    """A 1x1 convolution, which starts as the identity, and a second kernel of the same geometry."""
    if geometry.pointwise:
        raise UnfitError("the kernel has one tap itself")
    inner = 2 * geometry.in_channels if geometry.depthwise else geometry.in_channels
    first = _pointwise(geometry, inner)
    _start_as_identity(first, geometry.groups)
    whole = geometry.window(geometry.kernel)
    wide = replace(geometry, in_channels=inner)
    if norm is None:
        return _chain(conv=first, kernel=_conv(wide, whole))
    padding = whole.pad(geometry.padding_mode)
    unpadded = replace(whole, lo=(0,) * geometry.axes, hi=(0,) * geometry.axes)
    middle = _bordered(norm(inner), geometry, padding)
    return _chain(conv=first, inner_norm=middle, kernel=_conv(wide, unpadded), norm=norm(geometry.out_channels))


def dilated(rate: int, taps: int | None = None) -> Branch:
    """A kernel with fewer taps, ``rate`` times as far apart.

    Args:
        rate: distance between taps, in taps of the convolution.
        taps: per axis; None: as many as fit, and an odd number.

    Source: Ding et al., "UniRepLKNet", CVPR 2024, arXiv 2311.15599, section 3.1.

    Example:
        >>> dilated(2).make(Geometry.of(nn.Conv1d(4, 4, 7, padding=3, groups=4)), None)
        Conv1d(4, 4, kernel_size=(3,), stride=(1,), padding=(2,), dilation=(2,), groups=4, bias=False)
    """

    def make(geometry: Geometry, norm: NormOf | None) -> nn.Module:
        kernel = tuple(1 if k == 1 else taps or _odd((k - 1) // rate + 1) for k in geometry.kernel)
        if prod(kernel) == 1:
            raise UnfitError(f"no three taps lie {rate} apart in a kernel of {geometry.kernel} taps")
        return _conv_norm(geometry, geometry.window(kernel, rate), norm)

    return Branch(f"dilated_{rate}", make)


POINT: Final = Branch("point", point)
IDENTITY: Final = Branch("identity", identity)
SCALE: Final = Branch("scale", scale, norm=False)
COPY: Final = Branch("copy", copy_of_kernel)
HORIZONTAL: Final = Branch("horizontal", horizontal)
VERTICAL: Final = Branch("vertical", vertical)
AVERAGE: Final = Branch("average", average)
POINT_THEN_KERNEL: Final = Branch("point_then_kernel", point_then_kernel)


def _line(geometry: Geometry, axis: int, norm: NormOf | None) -> nn.Module:
    kernel = line(geometry.kernel, axis)
    if prod(kernel) == 1:
        raise UnfitError(f"a kernel of {geometry.kernel} has one tap along axis {axis}")
    if kernel == geometry.kernel:
        raise UnfitError(f"a kernel of {geometry.kernel} lies along axis {axis} itself")
    return _conv_norm(geometry, geometry.window(kernel), norm)


def _require_shape(geometry: Geometry) -> None:
    if not geometry.keeps_shape:
        raise UnfitError("input and output differ in shape, or no tap lies on the output's own place")


def _odd(number: int) -> int:
    return number - 1 + number % 2


def _conv(geometry: Geometry, window: Window) -> nn.Module:
    return window.conv(
        geometry.in_channels,
        geometry.out_channels,
        stride=geometry.stride,
        groups=geometry.groups,
        mode=geometry.padding_mode,
    )


def _conv_norm(geometry: Geometry, window: Window, norm: NormOf | None) -> nn.Module:
    conv = _conv(geometry, window)
    return conv if norm is None else _chain(conv=conv, norm=norm(geometry.out_channels))


def _pointwise(geometry: Geometry, out_channels: int) -> nn.Module:
    ones, zeros = (1,) * geometry.axes, (0,) * geometry.axes
    window = Window(ones, ones, zeros, zeros)
    return window.conv(geometry.in_channels, out_channels, stride=ones, groups=geometry.groups, mode="zeros")


def _bordered(norm: Norm, geometry: Geometry, padding: nn.Module | None) -> nn.Module:
    """A norm in the middle of a chain, and the border that the next operation needs."""
    if padding is None:
        return norm
    if geometry.padding_mode != "zeros":  # such a border commutes with a norm
        return _chain(norm=norm, padding=padding)
    return NormAndPad(norm, padding)


@torch.no_grad()
def _start_as_identity(conv: nn.Module, groups: int) -> None:
    """Every group hands on its channels, over and over if there are more outputs than inputs."""
    weight: torch.Tensor = conv.weight  # type: ignore[assignment]
    weight.zero_()
    for block in weight.chunk(groups):
        rows = torch.arange(len(block))
        block[rows, rows % block.shape[1]] = 1


def _chain(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))
