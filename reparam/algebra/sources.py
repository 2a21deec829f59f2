"""Operations of a net as convolutions: norms, pools, pads, slices.

Batch norm with running statistics:  y = A x + B,  A = gamma / sqrt(var + eps),  B = beta - mean A
Average pool (k, s, p):               depthwise, every tap 1 / divisor
Pad, crop, strided slice:             one tap of weight 1, at an offset

Domains are stated by each function; a ``Refusal`` names the condition that failed.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from reparam.algebra.conv import Border, Conv, Ints, identity
from reparam.algebra.refusal import Refusal


def precise(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.detach().double()


def norm_coefficients(
    mean: Tensor,  # (channels,)
    variance: Tensor,  # (channels,)
    gamma: Tensor | None,  # (channels,)
    beta: Tensor | None,  # (channels,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm with fixed statistics, ``(channels,)`` each, in float64.

    Source: Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167, algorithm 2.

    Example:
        >>> scale, shift = norm_coefficients(torch.ones(2), torch.ones(2), None, None, eps=0.0)
        >>> scale.tolist(), shift.tolist()
        ([1.0, 1.0], [-1.0, -1.0])
    """
    scale = torch.rsqrt(precise(variance) + eps)
    if gamma is not None:
        scale = scale * precise(gamma)
    shift = -precise(mean) * scale
    if beta is not None:
        shift = shift + precise(beta)
    return scale, shift


def pool_is_conv(
    channels: int,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    numeric: bool = True,
) -> Conv | Refusal:
    """Average pooling as a depthwise convolution.

    Domain: the divisor is the same at every position, so zeros of the padding count (or there is no padding), and no
    window of ``ceil_mode`` is partial, which depends on the size unless the stride is 1.
    """
    if any(padding) and not count_include_pad and divisor is None:
        return Refusal(
            "pool_is_conv",
            "count_include_pad=False divides by another number at the border",
            "use count_include_pad=True or no padding",
        )
    if ceil_mode and any(s > 1 for s in stride):
        return Refusal("pool_is_conv", "ceil_mode may leave a partial window", "use ceil_mode=False")
    if prod(kernel) == 1 and prod(stride) == 1 and not any(padding) and divisor in (None, 1):
        return identity(channels, len(kernel))
    weight = None
    if numeric:
        weight = torch.full((channels, 1, *kernel), 1 / (divisor or prod(kernel)), dtype=torch.float64)
    ones = (1,) * len(kernel)
    return Conv(channels, channels, kernel, stride, ones, padding, padding, channels, weight)


def window(
    channels: int,
    lo: Ints,
    hi: Ints,
    stride: Ints | None = None,
    fill: Tensor | None = None,  # (channels,)
    border: Border = Border.CONSTANT,
) -> Conv:
    """Padding (positive), cropping (negative) and striding as one tap of weight 1."""
    point = identity(channels, len(lo), torch.ones(channels, dtype=torch.float64))
    if not any(lo) and not any(hi) and (stride is None or all(s == 1 for s in stride)):
        return point
    return replace(point, identity=False, lo=lo, hi=hi, stride=stride or point.stride, fill=fill, border=border)
