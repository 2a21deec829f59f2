"""Norms and scales that go through passages into the convolutions on the other side.

Back: a scale and shift behind passages goes into everything in front of them, split where channels are concatenated.
Forward: one in front of passages goes into the convolution or linear layer behind them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import final

from torch import nn

from reparam.algebra import Affine, Refusal
from reparam.graph.draft import Draft, placed
from reparam.graph.net import Value
from reparam.graph.operation import Operation, absorbed
from reparam.graph.passages import Spaces, lets_through, parts
from reparam.graph.placing import Place, place
from reparam.graph.proxy import PLAIN
from reparam.graph.worth import Worth
from reparam.graph.wraps import Wrap, wrapped


@final
class Through:
    """Lets scales and shifts disappear into the operations on the other side of passages."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth

    def absorb(self, norm: Value) -> None:
        """Let a scale and shift disappear into the operations on the other side of passages."""
        formula = self.plan.formulas[norm]
        if len(formula.terms) != 1 or self.draft.movable(norm) or norm in self.plan.wraps:
            return
        ((root, conv),) = formula.terms.items()
        if not conv.diagonal or (conv.identity and not formula.biased) or not isinstance(root, Value):
            return
        spaces, operations = self.plan.known.spaces, self.plan.operations
        if (root in operations and not lets_through(root, spaces, operations)) or norm not in spaces:
            back: list[tuple[Value, Wrap]] | Refusal = Refusal("norm", "")
        else:
            back = producers(norm, root, spaces, operations, self._reading)
        for found in (back, self._consumers(norm)):
            if isinstance(found, Refusal):
                if found.condition:
                    self._refuse_norm(norm, found)
                continue
            refusal = self._wrap(norm, found)
            if refusal is None:
                return
            self._refuse_norm(norm, refusal)

    def _consumers(self, norm: Value) -> list[tuple[Value, Wrap]] | Refusal:
        """The operations behind, or what they disappeared into where that reads nothing else."""
        found = consumers(norm, self.plan.known.spaces, self.plan.operations)
        if isinstance(found, Refusal):
            return found
        hosts = self.hosts if any(value in self.plan.inlined for value, _ in found) else {}
        return [(hosts.get((value, wrap.root), value), wrap) for value, wrap in found]

    @cached_property
    def hosts(self) -> Mapping[tuple[Value, Value | None], Value]:
        """By a value that disappeared and its one root: what it disappeared into, whose one root that is now."""
        found: dict[tuple[Value, Value | None], Value] = {}
        for host in self.plan.changed():
            roots = [root for root in self.plan.formulas[host].terms if isinstance(root, Value)]
            if len(roots) == 1:
                found.update({(value, roots[0]): host for value in self.plan.absorbed(host)})
        return found

    def _reading(self, value: Value) -> int:
        readers = [user for user in value.users if user not in self.plan.dead and not only_shape(user, value)]
        return len(readers) + (2 if value.returned else 0)

    def _refuse_norm(self, norm: Value, refusal: Refusal) -> None:
        """Note why a norm stays; that there is nothing linear on one side says less than any other reason."""
        known = self.plan.alone.get(norm)
        if known is None or known.rule == "norm" or refusal.rule != "norm":
            self.plan.alone[norm] = refusal.at(norm.path, norm.name)

    def _wrap(self, norm: Value, found: list[tuple[Value, Wrap]]) -> Refusal | None:
        before = {norm: self.plan.formulas[norm]} | {value: self.plan.formulas[value] for value, _ in found}
        after = taken_over(self.draft, norm, self.plan.formulas[norm], found)
        if isinstance(after, Refusal):
            return after
        refusal = self.worth.gain(before, after)
        if refusal is not None:
            return refusal
        site = self.draft.site
        reason = site.passable(norm, norm.frame) if norm.module is None or site.replaceable(norm) else ""
        if not reason and norm.module is not None:
            reason = site.mistaken(norm.path, lambda: nn.Identity, None)
        reason = reason or self.draft.site.crossing([norm, *after, *(p for _, w in found for p in w.passages)])
        if reason:
            return Refusal("place", reason)
        places = standing(self.draft, after)
        if isinstance(places, Refusal):
            return places
        for value, wrap in found:
            self.plan.formulas[value] = after[value]
            self.plan.wraps.setdefault(value, []).append(wrap)
            where = places[value]
            self.plan.places[value] = replace(where, passed=(*where.passed, *self._own(norm)))
        self.plan.groups.append((norm, [value for value, _ in found]))
        self.plan.handed[norm] = None
        self.plan.places.pop(norm, None)
        return None

    def _own(self, norm: Value) -> list[Value]:
        """The norm and what it absorbed before: all of it hands on its input."""
        return [*absorbed(self.plan.operations, self.plan.inlined, norm), norm]


def taken_over(
    draft: Draft, norm: Value, scale: Affine, found: list[tuple[Value, Wrap]]
) -> dict[Value, Affine] | Refusal:
    """Formulas of the operations that take over a scale and shift, or why they cannot."""
    plan = draft.plan
    after: dict[Value, Affine] = {}
    for value, wrap in found:
        if plan.gone(value) or value in after:
            return Refusal("used_elsewhere", f"{value.name} at {value.path} became part of another operation")
        stays = draft.stays(value)
        if stays is not None:
            return stays
        gone = next((p for p in wrap.passages if p in plan.inlined or p in plan.places), None)
        if gone is not None:
            return Refusal("used_elsewhere", f"{gone.name} at {gone.path} became part of another operation")
        span = sorted((value.index, norm.index))
        moved = [value, norm, *wrap.passages]
        if wrap.root is not None and norm in plan.formulas:  # what the norm reads is read later
            moved += [root for root in plan.formulas[norm].terms if isinstance(root, Value)]
        if value.mode != norm.mode or not plan.known.effects.stable(moved, span[0], span[1]):
            return Refusal("in_place", "memory between the two is written, or the mode changes")
        result = wrapped(plan.formulas[value], value, wrap, scale)
        if isinstance(result, Refusal):
            return result
        if result.size is not None:
            return Refusal("border_rule", "what it adds would differ over space")
        if any(conv.diagonal for conv in result.terms.values()):
            return Refusal("cost", f"{value.name} at {value.path} is no convolution that could take it along")
        after[value] = result
    return after


def standing(draft: Draft, formulas: Mapping[Value, Affine]) -> dict[Value, Place] | Refusal:
    """Where to compute each of some formulas, or why one has no place."""
    plan = draft.plan
    places: dict[Value, Place] = {}
    for value, formula in formulas.items():
        where = place(value, formula, plan.operations, plan.inlined, draft.site, plan.dead, plan.spread)
        if isinstance(where, Refusal):
            return where
        places[value] = where
    return places


def producers(
    norm: Value, first: Value, spaces: Spaces, operations: Mapping[Value, Operation], readers: Callable[[Value], int]
) -> list[tuple[Value, Wrap]] | Refusal:
    """The operations in front of the passages behind which ``norm`` stands, each with its share of the norm."""
    found: list[tuple[Value, Wrap]] = []
    pending: list[tuple[Value, int, tuple[Value, ...]]] = [(first, 0, ())]
    while pending:
        value, start, behind = pending.pop()
        if readers(value) != 1:
            return Refusal("used_elsewhere", f"the value of {placed(value)} is read more than once")
        if value in operations and not lets_through(value, spaces, operations):
            space = spaces[value]
            found.append((value, Wrap(norm, start, space.channels, None, behind)))
            continue
        inputs = _inputs(value, spaces, operations)
        if inputs is None:
            return Refusal("norm", f"{value.name} at {value.path or 'the root'} lies in front of it and is not linear")
        pending += [(source, start + offset, (value, *behind)) for source, offset in inputs]
    return found


def consumers(norm: Value, spaces: Spaces, operations: Mapping[Value, Operation]) -> list[tuple[Value, Wrap]] | Refusal:
    """The operations behind the passages in front of which ``norm`` stands, each of which takes it over."""
    if norm not in spaces:
        return Refusal("norm", "")
    found: list[tuple[Value, Wrap]] = []
    pending: list[tuple[Value, tuple[Value, ...]]] = [(norm, ())]
    while pending:
        value, passages = pending.pop()
        readers = [user for user in value.users if not only_shape(user, value)]
        if value.returned and readers:
            return Refusal("used_elsewhere", f"the value of {placed(value)} is also a result")
        if not readers:
            return Refusal("norm", "nothing linear lies in front of it, and its value is a result")
        for user in readers:
            if user in operations and not lets_through(user, spaces, operations):
                if value not in operations[user].terms:
                    return Refusal("norm", "nothing linear lies behind it")
                found.append((user, Wrap(norm, 0, spaces[norm].channels, value, passages)))
                continue
            inputs = _inputs(user, spaces, operations)
            if inputs is None or len(inputs) != 1 or inputs[0][0] is not value:
                return Refusal("norm", f"{user.name} at {user.path or 'the root'} lies behind it and is not linear")
            pending.append((user, (*passages, user)))
    if not any(wrap.passages for _, wrap in found):  # then it goes into its readers without more ado, or not at all
        return Refusal("norm", "nothing linear lies behind it")
    return found


def _inputs(value: Value, spaces: Spaces, operations: Mapping[Value, Operation]) -> list[tuple[Value, int]] | None:
    """Inputs whose channels a value hands on, with the position of their first channel; None if it does not."""
    if value in operations and operations[value].relays:
        return [(next(iter(operations[value].terms)), 0)]
    return parts(value, spaces)


def only_shape(user: Value, value: Value) -> bool:
    """Whether an operation looks at the shape of ``value`` only."""
    named = user.node.target in ("reshape_as", "view_as", "expand_as", "type_as")
    return bool(user.node.meta.get(PLAIN)) or (named and user.args[0] is not value)
