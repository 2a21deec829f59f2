"""What an affine formula must compute: its defining equation, summed directly.

    y[j] = sum_a  W[a] . x[s j - lo + d a],      x extended beyond its ends

in numpy, with a loop over taps and positions; nothing of the library is used but the fields of `Conv`. `by_torch`
computes the same with torch's own convolutions, and `test_laws` holds the two together.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from reparam.algebra import Affine, Border, Conv

Array = NDArray[np.float64]  # (channels, *size)

CONVS = (None, F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def source(position: int, size: int, border: Border) -> int | None:
    """The element that stands at a position of the extended axis; None: the constant."""
    if 0 <= position < size:
        return position
    if border is Border.REFLECT:
        around = position % max(2 * (size - 1), 1)
        return min(around, 2 * (size - 1) - around)
    if border is Border.REPLICATE:
        return 0 if position < 0 else size - 1
    if border is Border.CIRCULAR:
        return position % size
    return None


def extended(x: Array, conv: Conv, positions: Sequence[Sequence[int]]) -> Array:
    """`x` at all combinations of `positions` (per axis), extended beyond its ends as `conv` does."""
    outside = np.zeros(tuple(len(line) for line in positions), dtype=bool)
    values = x
    for axis, line in enumerate(positions):
        sources = [source(p, x.shape[1 + axis], conv.border) for p in line]
        values = values.take([s or 0 for s in sources], axis=1 + axis)
        shape = [-1 if axis == i else 1 for i in range(conv.axes)]
        outside |= np.array([s is None for s in sources], dtype=bool).reshape(shape)
    fill = np.zeros(len(x)) if conv.fill is None else conv.fill.double().numpy()
    return np.where(outside, fill.reshape(-1, *(1,) * conv.axes), values)


def out_size(conv: Conv, size: Sequence[int]) -> tuple[int, ...]:
    """Length of the result per axis."""
    lengths = []
    for axis, length in enumerate(size):
        k, s, d = conv.kernel[axis], conv.stride[axis], conv.dilation[axis]
        around = conv.lo[axis] + conv.hi[axis]
        if conv.transposed:
            extra = conv.output_padding[axis] if conv.output_padding else 0
            lengths.append((length - 1) * s + d * (k - 1) + 1 - around + extra)
        else:
            lengths.append((length + around - d * (k - 1) - 1) // s + 1)
    return tuple(lengths)


def direct(conv: Conv, x: Array) -> Array:
    """The convolution of `x`, `(in, *size)`, by its defining equation."""
    if conv.identity:
        return x
    assert conv.weight is not None
    assert x.shape[0] == conv.in_channels, f"{x.shape[0]} channels into {conv.in_channels}"
    weight = conv.weight.double().numpy()
    size = x.shape[1:]
    result = np.zeros((conv.out_channels, *out_size(conv, size)))
    assert min(result.shape) > 0, f"no output at size {size}"
    for tap in np.ndindex(*conv.kernel):
        at = [
            [s * j - lo + d * a for j in range(length if conv.transposed else n)]
            for s, lo, d, a, length, n in zip(
                conv.stride, conv.lo, conv.dilation, tap, size, result.shape[1:], strict=True
            )
        ]
        matrix = weight[(slice(None), slice(None), *tap)]
        if not conv.transposed:
            result += _by_group(matrix, extended(x, conv, at), conv.groups)
            continue
        spread = _by_group(_turned(matrix, conv.groups), x, conv.groups)
        for j in np.ndindex(*size):
            target = tuple(line[i] for line, i in zip(at, j, strict=True))
            if all(0 <= t < n for t, n in zip(target, result.shape[1:], strict=True)):
                result[(slice(None), *target)] += spread[(slice(None), *j)]
    return result


def _by_group(matrix: Array, x: Array, groups: int) -> Array:
    """`matrix`, `(out, in/groups)`, on the channels of `x`, one group at a time."""
    blocks = matrix.reshape(groups, -1, matrix.shape[1]) @ x.reshape(groups, matrix.shape[1], -1)
    return blocks.reshape(-1, *x.shape[1:])


def _turned(matrix: Array, groups: int) -> Array:
    """`(in, out/groups)` to `(out, in/groups)`, one group at a time."""
    return np.concatenate([block.T for block in np.split(matrix, groups)])


def literal(conv: Conv, x: Array, channel: int, at: Sequence[int]) -> float:
    """One number of a convolution that is not transposed: one product at a time."""
    assert conv.weight is not None
    columns = conv.in_channels // conv.groups
    group = channel // (conv.out_channels // conv.groups)
    total = 0.0
    for column in range(columns):
        for tap in np.ndindex(*conv.kernel):
            where = [
                source(s * j - lo + d * a, n, conv.border)
                for s, j, lo, d, a, n in zip(conv.stride, at, conv.lo, conv.dilation, tap, x.shape[1:], strict=True)
            ]
            into = group * columns + column
            value = 0.0 if conv.fill is None else float(conv.fill[into])
            if None not in where:
                value = float(x[(into, *where)])
            total += float(conv.weight[(channel, column, *tap)]) * value
    return total


def affine(formula: Affine, roots: Mapping[Hashable, Array]) -> Array:
    """`bias + sum_r Conv_r(r)`, every term by its defining equation."""
    parts = [direct(conv, roots[root]) for root, conv in formula.terms.items()]
    return add(*parts, bias=formula.bias)


def add(*parts: Array, bias: Tensor | None = None) -> Array:
    """A sum that does not broadcast."""
    assert len({part.shape for part in parts}) == 1, f"sizes differ: {[part.shape for part in parts]}"
    total = np.sum(parts, axis=0)
    if bias is not None:
        total = total + bias.double().numpy().reshape(-1, *(1,) * (total.ndim - 1))
    return total


def by_torch(conv: Conv, x: Array) -> Array:
    """The same map by torch's convolutions."""
    value = torch.as_tensor(x, dtype=torch.float64)[None]
    if conv.identity:
        return x
    assert conv.weight is not None
    weight = conv.weight.double()
    if conv.axes == 0:  # one vector
        blocks = weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
        return torch.einsum("goi,gi->go", blocks, value.reshape(conv.groups, -1)).reshape(-1).numpy()
    if conv.transposed:
        function = TRANSPOSED[conv.axes]
        spread = function(value, weight, stride=conv.stride, dilation=conv.dilation, groups=conv.groups)
        extra = conv.output_padding or (0,) * conv.axes
        behind = [e - hi for e, hi in zip(extra, conv.hi, strict=True)]
        return F.pad(spread, _flat([-lo for lo in conv.lo], behind))[0].numpy()
    function = CONVS[conv.axes]
    value = _padded(conv, value)
    return function(value, weight, stride=conv.stride, dilation=conv.dilation, groups=conv.groups)[0].numpy()


def _flat(lo: Sequence[int], hi: Sequence[int]) -> list[int]:
    return [p for pair in zip(reversed(lo), reversed(hi), strict=True) for p in pair]


def _padded(conv: Conv, value: Tensor) -> Tensor:
    if conv.border is Border.CONSTANT:
        if conv.fill is None:
            return F.pad(value, _flat(conv.lo, conv.hi))
        fill = conv.fill.double().reshape(1, -1, *(1,) * conv.axes)
        return F.pad(value - fill, _flat(conv.lo, conv.hi)) + fill
    wide = _flat([max(lo, 0) for lo in conv.lo], [max(hi, 0) for hi in conv.hi])
    value = F.pad(value, wide, mode=conv.border.value)
    return F.pad(value, _flat([min(lo, 0) for lo in conv.lo], [min(hi, 0) for hi in conv.hi]))


def error(expected: Array, found: Array) -> float:
    """Largest difference, relative to the largest expected magnitude (at least 1); the shapes must agree."""
    assert expected.shape == found.shape, f"expected shape {expected.shape}, found {found.shape}"
    return float(np.abs(expected - found).max() / max(1.0, np.abs(expected).max()))
