"""Convolutions in float64 on small inputs, where torch is slow.

It reads all weights once for each image, and goes through groups one by one. Here one product of matrices does it,

    y[p, o] = sum_i sum_a  x[s p + d a, i] . W[o, i, a]        for all positions p of all images at once

and a depthwise convolution is a sum of products over its taps.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: Final = frozenset([F.conv1d, F.conv2d, F.conv3d])
LARGE: Final = 2**16  # weights from which on reading them costs more than to prepare the product
MANY: Final = 32  # groups
MOST_TAPS: Final = 64  # of a depthwise convolution


@final
class Direct(TorchFunctionMode):
    """While it lasts, convolutions in float64 are computed by ``by_columns`` or ``tap_by_tap`` where that is faster."""

    def __torch_function__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, or the faster one."""
        if func in _CONVOLUTIONS and not kwargs and len(args) == 7:
            func = _faster(*args) or func
        return func(*args, **(kwargs or {}))


def _faster(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Callable[..., Tensor] | None:
    per_axis = all(isinstance(option, tuple) for option in (stride, padding, dilation))
    batched = isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dim() == weight.dim()
    if not (per_axis and batched and x.dtype == weight.dtype == torch.float64) or x.is_meta:
        return None
    if groups == x.shape[1] == len(weight):
        return tap_by_tap if groups >= MANY and weight[0, 0].numel() <= MOST_TAPS else None
    return by_columns if weight.numel() >= LARGE or groups >= MANY else None


def by_columns(
    x: Tensor,  # (batch, in, *size)
    weight: Tensor,  # (out, in/groups, *kernel)
    bias: Tensor | None,  # (out,)
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:  # (batch, out, *size)
    """A convolution as ``torch.nn.functional.conv2d`` computes it, as a product of matrices.

    Example:
        >>> x, w = torch.randn(2, 6, 7, 8, dtype=torch.float64), torch.randn(12, 3, 3, 3, dtype=torch.float64)
        >>> options = None, (2, 1), (1, 0), (1, 2), 2
        >>> torch.allclose(by_columns(x, w, *options), F.conv2d(x, w, *options))
        True
    """
    read = torch.stack(list(_taps(x, weight, stride, padding, dilation)), dim=-1)  # (batch, *size, in, taps)
    rows = read.reshape(-1, groups, weight[0].numel()).transpose(0, 1)
    result = rows @ weight.reshape(groups, -1, rows.shape[-1]).transpose(1, 2)  # (groups, positions, out/groups)
    return _channels_second(result.transpose(0, 1).reshape(*read.shape[:-2], len(weight)), bias)


def tap_by_tap(
    x: Tensor,  # (batch, channels, *size)
    weight: Tensor,  # (channels, 1, *kernel)
    bias: Tensor | None,  # (channels,)
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,  # as many as channels
) -> Tensor:  # (batch, channels, *size)
    """A depthwise convolution as ``torch.nn.functional.conv2d`` computes it, one tap after the other.

    Example:
        >>> x, w = torch.randn(2, 6, 7, 8, dtype=torch.float64), torch.randn(6, 1, 3, 3, dtype=torch.float64)
        >>> options = None, (2, 1), (1, 0), (1, 2), 6
        >>> torch.allclose(tap_by_tap(x, w, *options), F.conv2d(x, w, *options))
        True
    """
    factors = weight.reshape(groups, -1).t().contiguous()
    total: Tensor | None = None
    for read, factor in zip(_taps(x, weight, stride, padding, dilation), factors, strict=True):
        total = read * factor if total is None else total.addcmul_(read, factor)
    assert total is not None
    return _channels_second(total, bias)


def _taps(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Iterator[Tensor]:
    """For every tap, what it reads for all outputs: ``(batch, *size, in)``."""
    kernel = weight.shape[2:]
    x = F.pad(x, [p for amount in reversed(padding) for p in (amount, amount)])
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    ends = [n - span for n, span in zip(x.shape[2:], spans, strict=True)]
    values = x.movedim(1, -1).contiguous()
    for tap in itertools.product(*map(range, kernel)):
        steps = zip(dilation, tap, ends, stride, strict=True)
        yield values[(slice(None), *(slice(d * a, d * a + end, s) for d, a, end, s in steps))]


def _channels_second(result: Tensor, bias: Tensor | None) -> Tensor:
    """``(batch, *size, out)`` to ``(batch, out, *size)``, with the bias."""
    return (result if bias is None else result + bias).movedim(-1, 1)
