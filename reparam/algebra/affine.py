"""The value of one node of a net: a sum of convolutions of other values, plus one bias.

    y = bias + sum_r Conv_r(r)

The bias is kept once per value and never per term, because a batch norm after a sum shifts once.

**The border rule.** An operation that reads beyond the ends of a value assumes a constant there (zero, unless it pads
by another one). Its input may be replaced by the formula of the input iff the formula, with its own inputs extended,
gives that very constant outside. Along one axis the formula is constant outside if every tap of every outside output is
itself outside (``Conv.constant_outside``); its value is then ``bias + sum_r (sum_a W_r[a]) . fill_r``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from reparam.algebra.bias_map import mapped_size, may_map, moved_map, with_bias
from reparam.algebra.branch_sum import branch_sums
from reparam.algebra.conv import Border, Conv, Ints
from reparam.algebra.conv_after_conv import conv_after_conv
from reparam.algebra.groups import response
from reparam.algebra.refusal import Refusal

RULE = "border_rule"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """``bias + sum_r Conv_r(r)`` over distinct roots ``r``.

    Args:
        terms: root (anything hashable) to convolution.
        biased: whether there is a bias.
        bias: ``(out,)``, or ``(out, *size)`` if it is a map; None: no bias, or structure only.
        size: of the bias, if it is a map and the formula so holds for one size only.
    """

    terms: Mapping[Any, Conv]
    biased: bool = False
    bias: Tensor | None = None
    size: Ints | None = None

    @property
    def channels(self) -> int:
        """Channels of the value; 0 if not known."""
        return max((conv.out_channels for conv in self.terms.values()), default=0)

    @property
    def numeric(self) -> bool:
        """Whether all weights and the bias are there."""
        return (self.bias is not None or not self.biased) and all(conv.numeric for conv in self.terms.values())

    @property
    def pointwise(self) -> bool:
        """Whether every term is."""
        return all(conv.pointwise for conv in self.terms.values())

    def computed(self) -> "Affine":
        """The formula with all weights that were not computed yet, in float64."""
        terms = {
            root: conv if conv.pending is None else replace(conv, weight=conv.pending.compute(), pending=None)
            for root, conv in self.terms.items()
        }
        return replace(self, terms=terms)

    def constant_outside(self, axis: int) -> bool:
        """Whether the formula gives one vector beyond the ends of ``axis``."""
        return all(conv.constant_outside(axis) for conv in self.terms.values())

    def zero_outside(self, axis: int) -> bool:
        """Whether the formula gives zero there, whatever the weights are."""
        filled = any(conv.fill is not None for conv in self.terms.values())
        return self.constant_outside(axis) and not self.biased and not filled

    def value_outside(self) -> Tensor:
        """``(out,)``: what a numeric formula gives beyond the ends of an axis on which it is constant.

        ``(1,)`` if it is zero, and the channels are not known.
        """
        total = torch.zeros(self.channels or 1, dtype=torch.float64)
        if self.bias is not None:
            total = total + self.bias.double().cpu()
        for conv in self.terms.values():
            if conv.fill is not None:
                total = total + response(conv, conv.fill.double().to(_device(conv))).cpu()
        return total


def _device(conv: Conv) -> torch.device | str:
    return conv.device or "cpu"


def border_rule(outer: Conv, inner: Affine) -> Refusal | None:
    """Why ``outer`` may not read the formula ``inner`` instead of its value; None if it may.

    A border that ``outer`` extends by a constant other than zero needs a numeric ``inner``.
    """
    if not inner.biased and len(inner.terms) == 1 and all(conv.identity for conv in inner.terms.values()):
        return None  # the value is its root
    if outer.never_outside or outer.transposed:
        if outer.transposed and inner.biased and not may_map(outer):
            return Refusal(RULE, "a transposed convolution spreads a bias unevenly", "drop the bias before it")
        return None
    if outer.border is not Border.CONSTANT:
        if inner.pointwise:
            return None
        return Refusal(RULE, f"the {outer.border.value} extension of a value is not that of its input")
    for axis in range(outer.axes):
        if not outer.reads_outside(axis):
            continue
        if not inner.constant_outside(axis):
            return Refusal(
                RULE,
                f"the second operation pads axis {axis} of a value whose own formula varies there",
                "pad the input of the first operation instead of its output",
            )
        filled = any(conv.fill is not None for conv in inner.terms.values())
        if outer.fill is None and not inner.zero_outside(axis) and (filled or not may_map(outer)):
            return Refusal(
                RULE,
                "a value with a bias is padded by zeros, and the formula gives the bias there",
                "pad the input of the first operation, pad by the bias, or drop the bias",
            )
        if outer.fill is not None and (inner.size is not None or not _same(outer.fill, inner)):
            return Refusal(
                RULE,
                "the constant that pads the border is not what the padded value's formula gives there",
                "pad by the bias of the padded value",
            )
    return None


def _same(fill: Tensor, inner: Affine) -> bool:
    if not inner.numeric:
        raise ValueError("expected a numeric formula for a border padded by a constant other than zero")
    there, wanted = inner.value_outside(), fill.double().cpu()
    return bool(torch.allclose(there, wanted, rtol=1e-4, atol=1e-6 * float(1 + wanted.abs().max())))


def substitute(outer: Affine, formulas: Mapping[Any, Affine], *, trusted: bool = False) -> Affine | Refusal:
    """``outer`` with some of its roots replaced by their formulas.

    Args:
        outer: a value.
        formulas: root to formula.
        trusted: the border rule was shown to hold before and is not asked again.

    Returns:
        The new value, or the first condition that failed.

    Example:
        >>> from reparam.algebra import Affine, diagonal, identity, substitute
        >>> norm = Affine({"x": diagonal(8, axes=2)}, biased=True)
        >>> total = Affine({"x": identity(8, axes=2), "n": identity(8, axes=2)})
        >>> result = substitute(total, {"n": norm})
        >>> list(result.terms), result.biased
        (['x'], True)
    """
    parts: dict[Any, list[Conv]] = {}
    biased, bias, size = outer.biased, outer.bias, outer.size
    for root, conv in outer.terms.items():
        if root not in formulas:
            parts.setdefault(root, []).append(conv)
            continue
        inner = formulas[root]
        if not trusted:
            refused = border_rule(conv, inner)
            if refused is not None:
                return refused
        for inner_root, inner_conv in inner.terms.items():
            composed = conv_after_conv(conv, inner_conv)
            if isinstance(composed, Refusal):
                return composed
            parts.setdefault(inner_root, []).append(composed)
        if inner.biased:
            biased = True
            mapped = mapped_size(conv, inner.size)
            size = size or mapped
            if mapped is not None and conv.order is not None:
                return Refusal(RULE, "a bias that differs over space keeps the order of its axes")
            if inner.bias is not None and conv.numeric:
                moved = moved_map(conv, inner.bias) if mapped else response(conv, inner.bias.double())
                bias = moved if bias is None else with_bias(bias, moved)
    terms = branch_sums(parts)
    if isinstance(terms, Refusal):
        return terms
    if (outer.bias is None and outer.biased) or any(f.biased and f.bias is None for f in formulas.values()):
        bias = None
    return Affine(terms, biased, bias, size)
