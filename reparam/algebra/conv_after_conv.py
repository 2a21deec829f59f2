"""Two convolutions in sequence.

With ``v[m] = sum_a V[a] . x[s1 m - lo1 + d1 a]`` and ``u[j] = sum_b U[b] . v[s2 j - lo2 + d2 b]``:

    u[j] = sum_{a,b} U[b] V[a] . x[s1 s2 j - (lo1 + s1 lo2) + d1 a + s1 d2 b]

so ``s = s1 s2``, ``lo = lo1 + s1 lo2``, ``slack = slack1 + s1 slack2`` (the lengths agree for every size, since floors
of quotients nest), taps on the lattice ``gcd(d1, s1 d2)``, ``groups = gcd(g1, g2)``.

Domain: wherever ``u`` reads beyond the ends of ``v``, the formula for ``v`` must give what ``u`` assumes there. That is
the border rule, which ``Affine`` decides, because it needs the bias of ``v``. A non-constant border (reflect, ...) of
``u`` commutes with a pointwise ``v`` and with nothing else. Transposed convolutions compose with pointwise ones, and so
does another order of the axes.

Source: DBB (arXiv 2103.13425, transform III) for 1x1 then kxk; here for every geometry.
"""

from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from reparam.algebra.conv import Border, Conv, identity, interned, pointwise
from reparam.algebra.groups import densify, rows, with_rows
from reparam.algebra.pending import Pending
from reparam.algebra.refusal import Refusal

RULE = "conv_after_conv"


def conv_after_conv(outer: Conv, inner: Conv) -> Conv | Refusal:
    """One convolution equal to ``outer`` after ``inner``, provided that the border rule holds.

    Returns:
        The composition, without a weight if an operand has none; or why there is no such convolution.

    Example:
        >>> from reparam.algebra import Conv
        >>> first = Conv(4, 4, kernel=(3,), stride=(2,), dilation=(1,), lo=(0,), hi=(0,))
        >>> second = Conv(4, 4, kernel=(3,), stride=(1,), dilation=(1,), lo=(0,), hi=(0,))
        >>> chain = conv_after_conv(second, first)
        >>> chain.kernel, chain.stride
        ((7,), (2,))
    """
    if outer.structural and inner.structural and outer.fill is None and inner.fill is None:
        return _structure_after(outer, inner)
    return _after(outer, inner)


@lru_cache(maxsize=8192)
def _structure_after(outer: Conv, inner: Conv) -> Conv | Refusal:
    """The same without weights, remembered for structures that are the same object."""
    result = _after(outer, inner)
    return interned(result) if isinstance(result, Conv) else result


def _after(outer: Conv, inner: Conv) -> Conv | Refusal:
    if outer.order is not None or inner.order is not None:
        return _in_order(outer, inner)
    if outer.axes != inner.axes and outer.in_channels and inner.in_channels:
        if not (inner.pointwise or outer.pointwise):
            return Refusal(RULE, f"spatial axes differ: {inner.axes} and {outer.axes}")
        outer, inner = _same_axes(outer, inner)
    box = _composed_box(outer, inner)
    if isinstance(box, Refusal):
        return box
    return _weighted(box, outer, inner)


def _weighted(box: Conv, outer: Conv, inner: Conv) -> Conv:
    """The composed structure with its weight, if both operands have one."""
    if inner.identity:
        return replace(box, weight=outer.weight, pending=outer.pending, identity=outer.identity)
    if outer.identity:
        return replace(box, weight=inner.weight, pending=inner.pending)
    if not outer.numeric or not inner.numeric:
        return box
    if outer.diagonal and inner.pending is not None:
        return replace(box, pending=inner.pending.scaled(rows(outer)))
    if inner.diagonal and outer.pending is not None:
        return replace(box, pending=outer.pending.after_scale(rows(inner)))
    if outer.diagonal:
        return with_rows(box, _scale_rows(rows(outer), rows(inner)))
    if inner.diagonal:
        return with_rows(box, _scale_columns(rows(outer), rows(inner), outer.groups))
    if (outer.pending or inner.pending) is not None and not box.transposed:
        return replace(box, pending=Pending.of(box, _product(box, outer, inner)))
    return with_rows(box, _product(box, outer, inner))


def _in_order(outer: Conv, inner: Conv) -> Conv | Refusal:
    """The composition where an operand changes the order of the axes, with which pointwise maps commute.

    (permute by q) after (permute by p)  =  permute by p[q]
    """
    if not (outer.pointwise and inner.pointwise):
        return Refusal(RULE, "the order of the axes changes before a convolution or behind it")
    if 0 in (outer.in_channels, inner.in_channels):
        return Refusal(RULE, "the channels of a value are not known, a broadcast is possible", "give an example input")
    if outer.in_channels != inner.out_channels:
        return Refusal(RULE, f"channels differ: {inner.out_channels} into {outer.in_channels}")
    first, second = inner.order, outer.order
    order = first if second is None else second if first is None else tuple(first[axis] for axis in second)
    moves = _moves(outer) and _moves(inner)
    box = pointwise(outer.out_channels, inner.in_channels, inner.axes, gcd(outer.groups, inner.groups))
    if order == tuple(range(len(order or ()))):
        order = None
    box = replace(box, moves=moves, order=order)
    if moves and box.diagonal and order is None:
        return identity(box.in_channels, box.axes)
    return _weighted(box, _over(outer, inner.axes), inner)


def _moves(conv: Conv) -> bool:
    return conv.moves or conv.identity


def _composed_box(outer: Conv, inner: Conv) -> Conv | Refusal:
    if outer.identity and outer.in_channels == 0:
        return replace(inner, weight=None, pending=None)
    if inner.identity and inner.in_channels == 0:
        if outer.identity:
            return outer
        return Refusal(RULE, "the channels of a value are not known, a broadcast is possible", "give an example input")
    if outer.in_channels != inner.out_channels:
        return Refusal(RULE, f"channels differ: {inner.out_channels} into {outer.in_channels}")
    groups = gcd(outer.groups, inner.groups)
    if outer.identity or inner.identity:
        groups = inner.groups if outer.identity else outer.groups
    if outer.transposed or inner.transposed:
        if (outer.transposed and inner.transposed) or not (outer.pointwise or inner.pointwise):
            return Refusal(RULE, "a transposed convolution composes with pointwise ones only")
        shape = inner if inner.transposed else outer
        return replace(
            shape,
            out_channels=outer.out_channels,
            in_channels=inner.in_channels,
            groups=groups,
            weight=None,
            pending=None,
            identity=False,
        )
    border = _composed_border(outer, inner)
    if isinstance(border, Refusal):
        return border
    if outer.remainders is not None and not inner.pointwise:
        return Refusal(RULE, "the second operation holds for some sizes of the value between the two only")
    lo, hi, kernel, dilation = [], [], [], []
    for axis in range(outer.axes):
        s1, d1, d2 = inner.stride[axis], inner.dilation[axis], s_d(inner, outer, axis)
        extent = inner.extent[axis] + s1 * outer.extent[axis]
        step = gcd(d1 if inner.kernel[axis] > 1 else 0, d2 if outer.kernel[axis] > 1 else 0) or 1
        before = inner.lo[axis] + s1 * outer.lo[axis]
        lo.append(before)
        hi.append(inner.slack[axis] + s1 * outer.slack[axis] - before + extent)
        kernel.append(extent // step + 1)
        dilation.append(step)
    return Conv(
        out_channels=outer.out_channels,
        in_channels=inner.in_channels,
        kernel=tuple(kernel),
        stride=tuple(a * b for a, b in zip(inner.stride, outer.stride, strict=True)),
        dilation=tuple(dilation),
        lo=tuple(lo),
        hi=tuple(hi),
        groups=groups,
        identity=outer.identity and inner.identity,
        moves=_moves(outer) and _moves(inner) and outer.pointwise and inner.pointwise,
        border=border[0],
        fill=border[1],
        lengths=(outer.lengths or inner.lengths) if inner.pointwise else inner.lengths,
        remainders=inner.remainders if outer.remainders is None else outer.remainders,
        one_size=outer.one_size or inner.one_size,
    )


def s_d(inner: Conv, outer: Conv, axis: int) -> int:
    """Distance, on the input of ``inner``, between neighbouring taps of ``outer``."""
    return inner.stride[axis] * outer.dilation[axis]


def _same_axes(outer: Conv, inner: Conv) -> tuple[Conv, Conv]:
    """Give a pointwise operand the axes of the other."""
    axes = max(outer.axes, inner.axes)
    return _over(outer, axes), _over(inner, axes)


def _over(conv: Conv, axes: int) -> Conv:
    """A pointwise map over another number of axes."""
    if conv.axes == axes:
        return conv
    ones, zeros = (1,) * axes, (0,) * axes
    weight = conv.weight if conv.pending is None else rows(conv)
    weight = None if weight is None else weight.reshape(*weight.shape[:2], *ones)
    flat = replace(conv, pending=None, order=None, lengths=None)
    return replace(flat, kernel=ones, stride=ones, dilation=ones, lo=zeros, hi=zeros, weight=weight)


def _composed_border(outer: Conv, inner: Conv) -> tuple[Border, Tensor | None] | Refusal:
    if inner.identity:
        return outer.border, outer.fill
    if outer.never_outside or outer.border is Border.CONSTANT:
        # where ``outer`` reads outside, the border rule makes its constant the response to the inner extension
        return inner.border, inner.fill
    if not inner.pointwise:
        return Refusal(
            RULE,
            f"the border of the second operation is extended by {outer.border.value}, the first is not pointwise",
        )
    return outer.border, None


def _scale_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """Diagonal after: ``scale`` ``(out, 1, ...)`` on the rows."""
    return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1)).double()


def _scale_columns(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Diagonal before: ``scale`` ``(in, 1, ...)`` on the columns of a weight with ``groups`` groups."""
    out, inner, *kernel = weight.shape
    blocks = weight.reshape(groups, out // groups, inner, *kernel)
    factors = scale.reshape(groups, 1, inner, *(1,) * len(kernel)).double()
    return (blocks * factors).reshape(weight.shape)


def _product(box: Conv, outer: Conv, inner: Conv) -> Tensor:
    """Matrix product of all pairs of taps, one group at a time, in float64."""
    g = box.groups
    second = densify(rows(outer).double(), outer.groups, g)
    first = densify(rows(inner).double(), inner.groups, g).to(second.device)
    middle = outer.in_channels // g
    second = second.reshape(g, -1, middle, outer.taps)
    first = first.reshape(g, middle, -1, inner.taps)
    out, columns = second.shape[1], first.shape[2]
    if box.transposed:  # the other operand is pointwise
        product = torch.einsum("gomb,gmia->goiba", second, first).reshape(g * out, columns, *box.kernel)
        return product
    total = second.new_zeros(g, out, columns, *box.kernel)
    by_outer = outer.taps <= inner.taps
    many = inner if by_outer else outer
    for tap, where in enumerate(_shifts(box, outer, inner, by_outer)):
        if by_outer:
            term = second[..., tap] @ first.reshape(g, middle, columns * inner.taps)
        else:
            term = (second.movedim(-1, 1).reshape(g, outer.taps * out, middle) @ first[..., tap]).reshape(
                g, outer.taps, out, columns
            )
            term = term.movedim(1, -1)
        total[(..., *where)] += term.reshape(g, out, columns, *many.kernel)
    return total.reshape(g * out, columns, *box.kernel)


def _shifts(box: Conv, outer: Conv, inner: Conv, by_outer: bool) -> list[tuple[Any, ...]]:
    """For every tap of one operand: where the taps of the other one fall in the box."""
    of_outer = [s_d(inner, outer, axis) // e for axis, e in enumerate(box.dilation)]
    of_inner = [d // e for d, e in zip(inner.dilation, box.dilation, strict=True)]
    one, other = (outer.kernel, inner.kernel) if by_outer else (inner.kernel, outer.kernel)
    steps, strides = (of_outer, of_inner) if by_outer else (of_inner, of_outer)
    shifts: list[tuple[Any, ...]] = [()]
    for k, step, n, stride in zip(one, steps, other, strides, strict=True):
        stride = stride if n > 1 else 1
        step = step if k > 1 else 1
        shifts = [
            (*head, slice(tap * step, tap * step + stride * (n - 1) + 1, stride)) for head in shifts for tap in range(k)
        ]
    return shifts
