"""Branches that go through a pixel shuffle, each for itself, before they are summed.

    P(a) + P(b) = P(a + b),      P an order of the elements

A pixel shuffle is no convolution, so a sum behind two of them has no formula over the input; yet the two branches can
be summed in front of one of them. The one whose kernel is larger takes the other over; the sum hands on its result.
"""

from dataclasses import replace
from typing import Any, final

from torch import nn

from reparam.algebra import Affine, Refusal, identity
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.draft import Draft
from reparam.graph.leaves import hooks
from reparam.graph.net import Value
from reparam.graph.placing import place
from reparam.graph.worth import Worth
from reparam.graph.wraps import Wrap, wrapped


def shuffle_factor(value: Value) -> int | None:
    """Factor of a pixel shuffle; None for other operations."""
    if stock(value.module) is nn.PixelShuffle and value.module is not None and not hooks(value.module):
        factor: Any = value.module.upscale_factor
    else:
        factor = argument(value, 1, "upscale_factor") if name_of(value) == "pixel_shuffle" else None
    return factor if isinstance(factor, int) else None


@final
class Joining:
    """Lets one branch take over another through equal pixel shuffles."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth
        self.stands_for: dict[Value, Value] = {}

    def join(self, total: Value) -> None:
        """Put the sum of two shuffled branches in front of one shuffle, if that is exact and pays."""
        formula = self.plan.formulas[total]
        if total in self.plan.inlined or total in self.plan.places or total in self.draft.plan.wraps:
            return
        if len(formula.terms) != 2 or formula.biased or not all(conv.identity for conv in formula.terms.values()):
            return
        summands = [v for v in formula.terms if isinstance(v, Value)]
        ends = [self.stands_for.get(v, v) for v in summands]
        factors = [shuffle_factor(end) for end in ends]
        if len(ends) != 2 or None in factors or factors[0] != factors[1]:
            return
        branches = [tensor_input(end) for end in ends]
        first, second = branches
        if first is None or second is None or first is second:
            return
        if not all(map(self._alone, (total, total), summands, ends, (first, second))):
            return
        pairs = sorted(((ends[0], first), (ends[1], second)), key=lambda pair: self._size(pair[1]), reverse=True)
        refusal = self._take_over(total, *pairs)
        if refusal is not None:
            self.draft.refuse(pairs[1][1], total, refusal)

    def _alone(self, total: Value, summand: Value, end: Value, branch: Value) -> bool:
        """Whether a branch is a linear operation of its own, read by its shuffle alone, and that by the sum."""
        chain = [(branch, end), (summand, total)]
        if end is not summand:  # it took over another branch before
            chain.append((end, next(user for user in end.users if user in self.stands_for)))
        apart = all(
            not value.returned and [user for user in value.users if user not in self.plan.dead] == [reader]
            for value, reader in chain
        )
        return apart and self.draft.ok(branch) and self.draft.stays(branch) is None

    def _size(self, branch: Value) -> tuple[int, int]:
        convs = self.plan.formulas[branch].terms.values()
        return max(conv.taps for conv in convs), -branch.index

    def _take_over(self, total: Value, kept: tuple[Value, Value], gone: tuple[Value, Value]) -> Refusal | None:
        (end, value), (other_end, other) = kept, gone
        wrap = Wrap(total, 0, 0, None, (end, other_end), joined=other)
        formulas = self.plan.formulas
        read = [r for v in (value, other) for r in formulas[v].terms if isinstance(r, Value)]
        roots = [self.plan.aliases.get(root, root) for root in read]
        moved = (value, other, end, other_end, total, *roots)
        if any(v.mode != total.mode for v in moved if v.node.op != "placeholder"):
            return Refusal("mode", "it runs under another autocast or gradient mode than its reader")
        if not self.plan.known.effects.stable(moved, min(v.index for v in moved), total.index):
            return Refusal("in_place", "memory between the two is written")
        result = wrapped(formulas[value], value, wrap, formulas[other])
        if isinstance(result, Refusal):
            return result
        before = {v: formulas[v] for v in (value, other, total)}
        refusal = self.worth.gain(before, {value: result})
        site = self.draft.site
        inside = [v for branch in (value, other) for v in (*self.plan.absorbed(branch), branch)]
        reason = site.passable(total, total.frame) or site.crossing([*inside, end, other_end, total])
        if refusal is not None or reason:
            return refusal or Refusal("place", reason)
        gone_values = {**self.plan.inlined, other: None}
        where = place(value, result, self.plan.operations, gone_values, site, self.plan.dead, self.plan.spread)
        if isinstance(where, Refusal):
            return where
        shape = next(iter(formulas[total].terms.values()))
        handed = identity(shape.in_channels, shape.axes)
        operation = replace(self.plan.operations[total], terms={end: handed}, weights={})
        self.plan.operations[total], formulas[total] = operation, Affine({end: handed})
        formulas[value] = result
        self.plan.wraps.setdefault(value, []).append(wrap)
        self.plan.places[value] = replace(where, passed=(*where.passed, total))
        self.plan.places.pop(other, None)
        self.plan.inlined[other] = None
        self.plan.handed[total] = None
        within = {norm for norm in self.stands_for if self.stands_for[norm] in (end, other_end)}
        self.plan.groups[:] = [group for group in self.plan.groups if group[0] not in within]
        self.plan.groups.append((total, [value]))
        self.stands_for[total] = end
        return None
