"""Parts of branches: a norm with a border of its own, a scale per channel, a widened convolution."""

from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.nn.geometry import Convolution, Geometry, Ints, Norm

CONVOLVE: Final[dict[int, Callable[..., Tensor]]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@final
class NormAndPad(nn.Module):
    """Batch norm, then a padding by what the norm makes of zero.

        y = A x + B inside,  B outside,      A = gamma / sqrt(var + eps),  B = beta - mean A

    A convolution behind it sees the border that it would see if the input of the norm had been padded by zeros, so a
    1x1 convolution, this norm and a kxk convolution are one kxk convolution. In eval mode it is computed in that order;
    in training mode the statistics are those of the inside, and B takes the running ones and no gradient.

    Args:
        norm: a batch norm.
        padding: the module that pads by zeros.

    Source: Ding et al., "Diverse Branch Block", CVPR 2021, arXiv 2103.13425, section 3.3 (``BNAndPad`` of its code).

    Example:
        >>> layer = NormAndPad(nn.BatchNorm1d(1), nn.ZeroPad1d(1)).eval()
        >>> _ = layer.norm.bias.data.fill_(3)
        >>> layer(torch.zeros(1, 1, 2))[0, 0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self, norm: Norm, padding: nn.Module) -> None:
        super().__init__()
        self.norm, self.padding = norm, padding

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to ``(N, C, *padded size)``."""
        if not self.training:
            padded_first: Tensor = self.norm(self.padding(x))
            return padded_first
        y = self.norm(x)
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        scale = self.norm.weight.detach() * torch.rsqrt(variance + self.norm.eps)
        outside = (self.norm.bias.detach() - mean * scale).to(y.dtype)
        outside = outside.reshape(-1, *(1,) * (y.dim() - 2))
        padded: Tensor = self.padding(y - outside) + outside
        return padded


@final
class ChannelScale(nn.Module):
    """``x * weight + bias`` with one weight, and one bias, per channel.

    Args:
        channels: of input and output.
        axes: number of spatial axes; without them the channels are on the last axis.
        initial: the first value of all weights.
        bias: whether there is one; it starts at zero.

    Source: layer scale, Touvron et al., "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239.

    Example:
        >>> ChannelScale(2, axes=1, initial=0.5)(torch.ones(1, 2, 3)).sum().item()
        3.0
    """

    def __init__(self, channels: int, axes: int, initial: float = 0.1, *, bias: bool = False) -> None:
        super().__init__()
        shape = (channels, *(1,) * axes)
        self.weight = nn.Parameter(torch.full(shape, initial))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)``, or ``(..., C)`` without spatial axes, to the same shape."""
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)

    def extra_repr(self) -> str:
        """Channels, for a reader."""
        return f"{self.weight.shape[0]}, axes={self.weight.dim() - 1}, bias={self.bias is not None}"


@final
class Widened(nn.Module):
    """A convolution of more channels between linear 1x1 convolutions, with nothing else in between.

        after(conv(before(x))),      before: in -> ratio in,  conv: -> ratio out,  after: ratio out -> out

    The 1x1 convolutions start with orthonormal columns and rows, group by group, so any kernel can be written into the
    middle one without loss.

    Args:
        conv: its geometry, groups and bias are those of the whole.
        ratio: how many times as many channels, at least 1.
        before: whether there is a 1x1 convolution in front.

    Source: Guo et al., "ExpandNets", NeurIPS 2020, arXiv 1811.10495 (both 1x1 convolutions, ratio 4); Bhardwaj et al.,
    "Collapsible Linear Blocks for Super-Efficient Super Resolution", MLSys 2022, arXiv 2103.09404 (the last one only).

    Example:
        >>> wide = Widened(nn.Conv2d(4, 8, 3, padding=1), ratio=2)
        >>> [tuple(part.weight.shape) for part in wide.children()]
        [(8, 4, 1, 1), (16, 8, 3, 3), (8, 16, 1, 1)]
    """

    def __init__(self, conv: Convolution, ratio: int = 4, before: bool = True) -> None:
        super().__init__()
        kind: type[Any] = type(conv)
        groups = conv.groups
        into = conv.in_channels * ratio if before else conv.in_channels
        out = conv.out_channels * ratio
        self.before: Convolution | None = kind(conv.in_channels, into, 1, groups=groups, bias=False) if before else None
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, groups)
        self.conv: Convolution = kind(into, out, *geometry, bias=False, padding_mode=conv.padding_mode)
        self.after: Convolution = kind(out, conv.out_channels, 1, groups=groups, bias=conv.bias is not None)
        if self.before is not None:
            _orthonormal(self.before.weight, groups)
        _orthonormal(self.after.weight, groups)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, *size)`` to ``(N, out, *size of the convolution's output)``."""
        if self.before is not None:
            x = _convolve(self.before, x)
        y: Tensor = _convolve(self.after, _convolve(self.conv, x))
        return y


def _convolve(conv: Convolution, x: Tensor) -> Tensor:
    """What a convolution computes; as functions, the three are one operation of the whole and never stand alone."""
    padding: Any = conv.padding
    geometry = Geometry.of(conv)
    if conv.padding_mode != "zeros" and any((*geometry.lo, *geometry.hi)):
        around = reversed(list(zip(geometry.lo, geometry.hi, strict=True)))
        x, padding = F.pad(x, [p for pair in around for p in pair], mode=conv.padding_mode), 0
    function = CONVOLVE[len(conv.kernel_size)]
    result: Tensor = function(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    return result


@torch.no_grad()
def _orthonormal(weight: Tensor, groups: int) -> None:
    """Fill a 1x1 kernel, ``(out, in/groups, 1, ...)``, with orthonormal rows or columns, the fewer, group by group."""
    for block in weight.chunk(groups):
        nn.init.orthogonal_(block)


def line(kernel: Ints, axis: int) -> Ints:
    """A kernel with taps along one axis only.

    Example:
        >>> line((3, 5), 1)
        (1, 5)
    """
    return tuple(k if a == axis else 1 for a, k in enumerate(kernel))


@final
class BiasMap(nn.Module):
    """``x + bias`` with a bias for every position, for inputs of one size.

    What a bias in front of a zero padding adds behind it: less where the padding is read. ``reparam.fuse`` makes it
    with ``bias_maps=True``.

    Args:
        bias: ``(C, *size)``.
        trainable: whether the bias requires gradients.

    Example:
        >>> BiasMap(torch.tensor([[1.0, 2.0, 1.0]]))(torch.zeros(2, 1, 3)).tolist()
        [[[1.0, 2.0, 1.0]], [[1.0, 2.0, 1.0]]]
    """

    def __init__(self, bias: Tensor, *, trainable: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to the same.

        Raises:
            AssertionError: the input is of another size.
        """
        torch._assert(
            x.shape[-self.bias.dim() :] == self.bias.shape,
            "this net was fused with bias_maps=True, for inputs of the size of example_inputs only, and got another"
            " size: fuse it for that size, or without bias_maps",
        )
        return x + self.bias

    def extra_repr(self) -> str:
        """Channels and size."""
        channels, *size = self.bias.shape
        return f"{channels}, size=({', '.join(map(str, size))})"
