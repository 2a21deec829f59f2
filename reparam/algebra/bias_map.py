"""A bias that differs over space, for one size of the input.

    Conv(pad_0(v + b)) = Conv(pad_0(v)) + M,      M = Conv(pad_0(b everywhere)),      M (out, *size)

A zero padding reads zeros where a biased value would give its bias, so what the bias adds at the border is not what it
adds inside. What it adds depends on the size of the value, and on nothing else: for one size it is a constant map. The
same holds for a transposed convolution, where the number of taps that reach an output differs. The identity is exact
for that size; for no other one is the map even of the right shape.

Domain: the lengths of the value are fixed. Then a map goes through any further convolution: it is an image.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.algebra.conv import Border, Conv, Ints
from reparam.algebra.groups import rows

CONVS: Final[tuple[Any, ...]] = (None, F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: Final[tuple[Any, ...]] = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def needs_map(conv: Conv) -> bool:
    """Whether a bias of the input of ``conv`` adds to its result what differs over space."""
    if conv.transposed:
        return not conv.pointwise
    return conv.border is Border.CONSTANT and conv.fill is None and not conv.never_outside


def may_map(conv: Conv) -> bool:
    """Whether the lengths of the input are fixed, so that such a map can be made."""
    return conv.one_size and bool(conv.lengths) and not conv.sized


def mapped_size(conv: Conv, size: Ints | None) -> Ints | None:
    """Size of what ``conv`` makes of a bias; None if that is one number per channel.

    Args:
        conv: the convolution.
        size: of the bias, if it is a map.
    """
    if size is None:
        size = conv.lengths if needs_map(conv) and may_map(conv) else None
    if size is None or conv.pointwise:
        return size
    if conv.transposed:
        ends = zip(
            size, conv.stride, conv.lo, conv.hi, conv.extent, conv.output_padding or (0,) * conv.axes, strict=True
        )
        return tuple((n - 1) * s - lo - hi + extent + more + 1 for n, s, lo, hi, extent, more in ends)
    return tuple((n + slack - 1) // s + 1 for n, slack, s in zip(size, conv.slack, conv.stride, strict=True))


def moved_map(
    conv: Conv,
    bias: Tensor,  # (in,) or (in, *size)
) -> Tensor:
    """What ``conv`` makes of a bias of its input, where that is a map, ``(out, *size)``."""
    if conv.identity and conv.weight is None and conv.pending is None:
        return bias
    image = bias.double()
    if image.dim() == 1:
        assert conv.lengths is not None
        image = image.reshape(-1, *(1,) * conv.axes).expand(-1, *conv.lengths)
    weight = conv.weight if conv.weight is not None else rows(conv)
    image, weight = image[None].to(weight.device), weight.double()
    if conv.transposed:
        more = conv.output_padding or 0
        run = TRANSPOSED[conv.axes]
        result: Tensor = run(image, weight, None, conv.stride, conv.lo, more, conv.groups, conv.dilation)
        return result[0]
    amounts = [p for lo, hi in zip(reversed(conv.lo), reversed(conv.hi), strict=True) for p in (lo, hi)]
    mode = "constant" if conv.border is Border.CONSTANT else conv.border.value
    padded = F.pad(image, amounts, mode=mode) if any(amounts) else image
    result = CONVS[conv.axes](padded, weight, None, conv.stride, 0, conv.dilation, conv.groups)
    return result[0]


def with_bias(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two biases, ``(out,)`` or ``(out, *size)`` each."""
    a, b = a.double(), b.double().to(a.device)
    if a.dim() == b.dim():
        return a + b
    flat, image = (a, b) if a.dim() < b.dim() else (b, a)
    return image + flat.reshape(-1, *(1,) * (image.dim() - 1))


def flattened(bias: Tensor) -> Tensor:
    """``(out,)``: a map that is one number per channel after all."""
    return bias if bias.dim() == 1 else torch.flatten(bias, 1)[:, 0]
