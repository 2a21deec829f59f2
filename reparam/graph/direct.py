"""Convolutions in float64, one tap after the other, where torch is slow.

It goes through grouped ones group by group, and through images one by one, reading all weights for each.

y[g, n, j, o] = sum_a sum_i  x[g, n, s j + d a, i] . W[g, i, o, a]
"""

import itertools
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: Final = frozenset([F.conv1d, F.conv2d, F.conv3d])
FEWEST: Final = 4  # groups
LARGE: Final = 2**15  # weights, of one tap each, below which a call costs more than to read them once more


@final
class Direct(TorchFunctionMode):
    """While it lasts, convolutions in float64 with groups, or with one tap, are computed by ``tap_by_tap``."""

    def __torch_function__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, or ``tap_by_tap`` in its place."""
        if func in _CONVOLUTIONS and not kwargs and len(args) == 7 and _fits(*args):
            return tap_by_tap(*args)
        return func(*args, **(kwargs or {}))


def _fits(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> bool:
    per_axis = all(isinstance(option, tuple) for option in (stride, padding, dilation))
    batched = isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dim() == weight.dim()
    if not (per_axis and batched and x.dtype == weight.dtype == torch.float64) or x.is_meta:
        return False
    return bool(groups >= FEWEST or (groups == 1 and weight.numel() >= LARGE and weight[0, 0].numel() == 1))


def tap_by_tap(
    x: Tensor,  # (batch, in, *size)
    weight: Tensor,  # (out, in/groups, *kernel)
    bias: Tensor | None,  # (out,)
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:  # (batch, out, *size)
    """A convolution as ``torch.nn.functional.conv2d`` computes it.

    Example:
        >>> x, w = torch.randn(2, 6, 7, 8, dtype=torch.float64), torch.randn(12, 1, 3, 3, dtype=torch.float64)
        >>> options = None, (2, 1), (1, 0), (1, 2), 6
        >>> torch.allclose(tap_by_tap(x, w, *options), F.conv2d(x, w, *options))
        True
    """
    axes, kernel = weight.dim() - 2, weight.shape[2:]
    batch, channels = x.shape[:2]
    x = F.pad(x, [p for amount in reversed(padding) for p in (amount, amount)])
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    size = [(n - span - 1) // s + 1 for n, span, s in zip(x.shape[2:], spans, stride, strict=True)]
    values = x.reshape(batch, groups, channels // groups, *x.shape[2:]).movedim(2, -1).movedim(0, 1)
    taps = weight.reshape(groups, -1, channels // groups, *kernel).movedim(1, 2)  # (groups, in, out, *kernel)
    alone = taps.shape[1] == taps.shape[2] == 1
    if alone:  # depthwise: the channels are the last axis, and a product is all there is to a tap
        values, taps = values.movedim(0, -1)[..., 0, :], taps[:, 0, 0]
    values = values.contiguous()
    total: Tensor | None = None
    for tap in itertools.product(*map(range, kernel)):
        steps = zip(dilation, tap, stride, size, strict=True)
        place: Any = tuple(slice(d * a, d * a + s * (n - 1) + 1, s) for d, a, s, n in steps)
        own: Any = (..., *tap)
        if alone:
            part, factor = values[(slice(None), *place)], taps[own]
            total = part * factor if total is None else total.addcmul_(part, factor)
        else:
            rows = values[(slice(None), slice(None), *place)].reshape(groups, -1, channels // groups)
            total = rows @ taps[own] if total is None else total.add_(rows @ taps[own])
    assert total is not None
    result = total.movedim(-1, 1) if alone else total.reshape(groups, batch, *size, -1).movedim(-1, 1).movedim(2, 0)
    result = result.reshape(batch, weight.shape[0], *size)
    return result if bias is None else result + bias.reshape(-1, *(1,) * axes)
