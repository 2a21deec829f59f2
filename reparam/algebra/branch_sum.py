"""Sum of parallel convolutions.

    sum_r sum_a W_r[a] . x[s j - lo_r + d_r a]  =  sum_o W[o] . x[s j + o]        over the union of the tap offsets o

Domain: the same input, channels, axes, stride and slack. Slack fixes the output length; with different slacks the
lengths agree for some sizes only (stride > 1) or for none; where an example fixes the size, such a sum holds for all
sizes that leave the same remainder. Kernels are placed at their own offsets, never centred, so
1xk, even, off-centre, cropped and dilated kernels need no case of their own. The taps of the result lie on the coarsest
lattice that holds all offsets (3x3 at dilation 2 plus 1x1 stays 3x3 at dilation 2). Borders must be extended alike, or
one side never reads outside.

Source: the sum of RepVGG (arXiv 2101.03697, section 3.3) and DBB (arXiv 2103.13425, transforms II and VI), freed of
their centred kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import Any, Final

import torch
from torch import Tensor

from reparam.algebra.conv import Conv, Ints, interned
from reparam.algebra.groups import as_finer_blocks, finer_blocks, rows, with_rows
from reparam.algebra.pending import Part, Pending
from reparam.algebra.refusal import Refusal

RULE = "branch_sum"
MOST_PARTS: Final = 16  # of a weight that is computed later: a sum of thousands of branches is formed in steps


def branch_sum(parts: Sequence[Conv]) -> Conv | Refusal:
    """One convolution equal to the sum of ``parts``, which read one input.

    Returns:
        The sum, without a weight if a part has none; or why there is no such convolution.

    Example:
        >>> from reparam.algebra import Conv, identity
        >>> plain = Conv(4, 4, kernel=(3,), stride=(1,), dilation=(2,), lo=(2,), hi=(2,))
        >>> total = branch_sum([plain, identity(4, axes=1)])
        >>> total.kernel, total.dilation
        ((3,), (2,))
    """
    if len(parts) == 1:
        return parts[0]
    box = parts[0]
    for part in parts[1:]:
        common = _common_box(box, part)
        if isinstance(common, Refusal):
            return common
        box = common
    box = _summed(box)
    if not all(part.numeric for part in parts):
        return box
    if any(part.pending is not None for part in parts):
        return replace(box, pending=Pending(box, tuple(p for part in parts for p in _summands(box, part))))
    device = next((part.weight.device for part in parts if part.weight is not None), None)
    total = torch.zeros(_rows_shape(box), dtype=torch.float64, device=device)
    for part in parts:
        add_into(total, box, part)
    return with_rows(box, total)


def _common_box(a: Conv, b: Conv) -> Conv | Refusal:
    if a.fill is None and b.fill is None:
        return _common_structure(interned(a.structure), interned(b.structure))
    return common_box(a, b)


@lru_cache(maxsize=8192)
def _common_structure(a: Conv, b: Conv) -> Conv | Refusal:
    """The common box, remembered for structures that are the same object."""
    box = common_box(a, b)
    return interned(box) if isinstance(box, Conv) else box


def _summed(box: Conv) -> Conv:
    """The structure of a sum: neither an identity nor a choice of channels."""
    if box.structural and not box.identity and not box.moves:
        return box
    return interned(replace(box, weight=None, pending=None, identity=False, moves=False))


def _summands(box: Conv, part: Conv) -> list[Part]:
    """The summands that one convolution brings into a sum whose weight is computed later."""
    inner = (Part(part, part.weight, ()),) if part.pending is None else part.pending.parts
    if part.pending is not None and (len(inner) > MOST_PARTS or part.pending.box.lo != part.lo):
        inner = (Part(part, rows(part), ()),)
    return [replace(p, taps=_taps(box, p.conv)) for p in inner]


def _taps(box: Conv, part: Conv) -> tuple[slice, ...]:
    return tuple(slice(o, o + st * (k - 1) + 1, st) for o, st, k in _placement(box, part))


def _rows_shape(box: Conv) -> Ints:
    return (box.out_channels, box.in_channels // box.groups, *box.kernel)


def add_into(total: Tensor, box: Conv, part: Conv) -> None:
    """Add the taps of ``part`` at their offsets to ``total``, the weight of the larger ``box``."""
    window = total[(slice(None), slice(None), *_taps(box, part))]
    blocks = finer_blocks(window, box.groups, part.groups)
    if part.identity and part.weight is None:
        blocks.add_(1)
        return
    weight = rows(part)
    blocks.add_(as_finer_blocks(weight, box.groups, part.groups).to(total.device))


def _placement(box: Conv, part: Conv) -> list[tuple[int, int, int]]:
    """Per axis: index of the part's first tap in the box, step between its taps, number of taps."""
    first = [(lo - at) // d for lo, at, d in zip(box.lo, part.lo, box.dilation, strict=True)]
    steps = [max(d // e, 1) for d, e in zip(part.dilation, box.dilation, strict=True)]
    return list(zip(first, steps, part.kernel, strict=True))


def common_box(a: Conv, b: Conv) -> Conv | Refusal:
    """The smallest structure that holds the taps of both, or why their sum is no convolution."""
    if a.identity and b.identity and (a.in_channels == 0 or b.in_channels == 0):
        return Refusal(
            RULE, "the channels of the input are not known, a broadcast is possible", "give an example input"
        )
    if (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        found = f"{a.in_channels} -> {a.out_channels} and {b.in_channels} -> {b.out_channels}"
        return Refusal(RULE, f"channels differ ({found}): the sum broadcasts", "give the branches the same channels")
    if a.axes != b.axes:
        return Refusal(RULE, f"spatial axes differ: {a.axes} and {b.axes}")
    if a.order != b.order:
        return Refusal(RULE, "the axes of the branches stand in another order")
    if a.transposed != b.transposed:
        return Refusal(RULE, "one branch is a transposed convolution, the other is not")
    if a.stride != b.stride:
        return Refusal(RULE, f"strides differ: {a.stride} and {b.stride}", "give the branches one stride")
    if a.sized or b.sized:
        return Refusal(RULE, "the size of a transposed convolution is asked for where it is called")
    if a.transposed and a.output_padding != b.output_padding:
        return Refusal(RULE, f"output paddings differ: {a.output_padding} and {b.output_padding}")
    if a.slack != b.slack:
        why = f"output sizes differ or agree for some input sizes only (slack {a.slack} and {b.slack})"
        apart = Refusal(RULE, why, "pad the branches so that their sizes agree, or give example_inputs")
        widened = _of_known_lengths(a, b)
        if widened is None:
            return apart
        a, b = widened
    border = _common_border(a, b)
    if isinstance(border, Refusal):
        return border
    lo, hi, kernel, dilation = [], [], [], []
    for axis in range(a.axes):
        first = min(-a.lo[axis], -b.lo[axis])
        last = max(a.extent[axis] - a.lo[axis], b.extent[axis] - b.lo[axis])
        step = gcd(
            a.dilation[axis] if a.kernel[axis] > 1 else 0,
            b.dilation[axis] if b.kernel[axis] > 1 else 0,
            abs(a.lo[axis] - b.lo[axis]),
        )
        step = step or 1
        taps = (last - first) // step + 1
        kernel.append(taps)
        dilation.append(step)
        lo.append(-first)
        hi.append(a.slack[axis] + first + step * (taps - 1))
    return replace(
        a,
        kernel=tuple(kernel),
        dilation=tuple(dilation),
        lo=tuple(lo),
        hi=tuple(hi),
        groups=gcd(a.groups, b.groups),
        weight=None,
        pending=None,
        identity=False,
        border=border.border,
        fill=border.fill,
        lengths=a.lengths or b.lengths,
        remainders=_both(a.remainders, b.remainders),
    )


def _of_known_lengths(a: Conv, b: Conv) -> tuple[Conv, Conv] | None:
    """Both with the larger slack, if the lengths of an example make their outputs equally long.

        floor((L + slack_a - 1) / s) = floor((L + slack_b - 1) / s)

    depends on ``L mod s`` alone, so it holds for all lengths that leave such a remainder, and is asked for where the
    result is used.
    """
    lengths = a.lengths or b.lengths
    if lengths is None or a.transposed:
        return None
    remainders = []
    for length, one, other, step in zip(lengths, a.slack, b.slack, a.stride, strict=True):
        equal = [r for r in range(step) if (r + one - 1) // step == (r + other - 1) // step]
        if length % step not in equal:
            return None
        remainders.append(tuple(equal))

    def widened(conv: Conv, other: Conv) -> Conv:
        more = [max(y - x, 0) for x, y in zip(conv.slack, other.slack, strict=True)]
        hi = tuple(p + m for p, m in zip(conv.hi, more, strict=True))
        return replace(conv, hi=hi, remainders=_both(conv.remainders, tuple(remainders)))

    return widened(a, b), widened(b, a)


def _both(a: tuple[Ints, ...] | None, b: tuple[Ints, ...] | None) -> tuple[Ints, ...] | None:
    if a is None or b is None:
        return b if a is None else a
    return tuple(tuple(r for r in x if r in y) for x, y in zip(a, b, strict=True))


def _common_border(a: Conv, b: Conv) -> Conv | Refusal:
    """The operand whose way to extend the input serves both."""
    for one, other in ((a, b), (b, a)):
        if one.never_outside:
            return other
    if a.border is not b.border:
        why = f"borders are extended differently: {a.border.value} and {b.border.value}"
        return Refusal(RULE, why, "give the branches one padding mode")
    if a.fill is not b.fill and not (a.fill is not None and b.fill is not None and torch.equal(a.fill, b.fill)):
        return Refusal(RULE, "borders are extended by different constants")
    return a


def branch_sums(parts: Mapping[Any, list[Conv]]) -> dict[Any, Conv] | Refusal:
    """The sum of the convolutions of each root."""
    sums: dict[Any, Conv] = {}
    for root, convs in parts.items():
        total = branch_sum(convs)
        if isinstance(total, Refusal):
            return total
        sums[root] = total
    return sums
