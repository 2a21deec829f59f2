"""Decide which values of a net disappear into their readers.

Every affine value starts materialised. Inlining a value puts its formula in the place of its name into the formulas of
its readers. A step is kept if it is exact and the total cost falls; steps that pay only together are tried together,
and what did not contribute is taken back. Only integers are needed here.
"""

from collections.abc import Callable, Iterable
from typing import Final, final

from reparam.algebra import Affine, Refusal
from reparam.cost import Cost
from reparam.graph.baring import Baring
from reparam.graph.behind import Behind
from reparam.graph.draft import Draft
from reparam.graph.grouping import Grouping
from reparam.graph.joining import Joining
from reparam.graph.lift import Known, Lifting
from reparam.graph.net import Net, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.operation import Either
from reparam.graph.placing import Place, Site, place
from reparam.graph.pruning import Pruning
from reparam.graph.spreading import Spreading
from reparam.graph.through import Through
from reparam.graph.worth import EPSILON, Worth

REACH: Final = 256  # values that one step looks at
RETRIES: Final = 4  # places that are looked for


@final
class _Planner:
    """Searches for the steps that pay."""

    def __init__(self, draft: Draft, cost: Cost) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = Worth(cost, self.plan.sizes, self.draft.original, self.plan.operations)
        self.behind = Behind(self.draft, self.worth)
        self.pruning = Pruning(self.draft, self.worth)

    def run(self) -> NetPlan:
        order = list(self.plan.operations)
        spreading = Spreading(self.draft, self.worth)
        for turn in range(8):
            changed = False
            for value in order:
                if value not in self.plan.inlined and not self._can_wait(value, turn):
                    changed |= self._improve(value)
            for value in order:
                if value not in self.plan.inlined and len(self.draft.readers.get(value, ())) > 1:
                    changed |= spreading.spread(value)
            if not changed and turn:
                break
        for value, operation in self.plan.operations.items():
            if operation.generated and value not in self.plan.inlined and value not in self.plan.places:
                self._make(value)
        through = Through(self.draft, self.worth)
        for value in order:
            if value not in self.plan.inlined:
                through.absorb(value)
        for value in order:
            if not self.plan.gone(value) and value not in self.plan.wraps and self._is_norm_and_pool(value):
                self._improve(value)
        grouping = Grouping(self.draft, self.worth)
        for value in reversed(order):  # a sum before its partial sums
            grouping.regroup(value)
        joining = Joining(self.draft, self.worth)
        for value in order:
            joining.join(value)
        baring = Baring(self.draft, self.worth)
        for value in self.plan.net.values:
            baring.bare(value)
        for value in list(self.plan.places):
            if self._is_wasteful(value):
                self.draft.take_back(value)
        self.draft.drop_unread()
        return self.plan

    def _is_wasteful(self, value: Value) -> bool:
        """Whether a scale and shift of the last axis would need a whole matrix."""
        terms = self.plan.formulas[value].terms.values()
        return value not in self.plan.wraps and all(conv.diagonal and conv.axes == 0 for conv in terms)

    def _make(self, value: Value) -> None:
        """Compute a weight once that the forward computes at every call."""
        if self.draft.movable(value):
            return
        formula = self.plan.formulas[value]
        where = place(
            value, formula, self.plan.operations, self.plan.inlined, self.draft.site, self.plan.dead, self.plan.spread
        )
        if isinstance(where, Refusal):
            self.plan.alone[value] = where.at(value.path, value.name)
        else:
            self.plan.places[value] = where

    def _can_wait(self, value: Value, turn: int) -> bool:
        """Whether others may have a better use for a value: another sum, or convolutions for the norm of a pool."""
        return self._is_norm_and_pool(value) or (turn == 0 and self._is_partial_sum(value))

    def _is_norm_and_pool(self, value: Value) -> bool:
        """Whether a norm reads a pool, or a pool a norm."""
        operation = self.plan.operations[value]
        read = [self.plan.operations[r] for r in operation.terms if r in self.plan.operations]
        return (operation.norm and any(r.pool for r in read)) or (operation.pool and any(r.norm for r in read))

    def _is_partial_sum(self, value: Value) -> bool:
        """Whether a sum goes into one other sum as it is: the other one is looked at first."""
        readers = self.draft.readers.get(value, {})
        if len(self.plan.operations[value].terms) < 2 or len(readers) != 1 or value in self.draft.held:
            return False
        (reader,) = readers
        terms = self.plan.operations[reader].terms
        return len(terms) > 1 and value in terms and terms[value].identity

    def _improve(self, reader: Value) -> bool:
        """Let values disappear into ``reader`` where that pays."""
        excluded = self.draft.stays(reader)
        if excluded is not None:
            for root in self.plan.formulas[reader].terms:
                if isinstance(root, Value) and self.draft.ok(root):
                    self.draft.refuse(root, reader, excluded)
            return False
        changed, tried = False, set[Value]()
        while True:
            seed = next(
                (
                    r
                    for r in self.plan.formulas[reader].terms
                    if isinstance(r, Value) and r not in tried and self.draft.ok(r)
                ),
                None,
            )
            if seed is None:
                return changed
            tried.add(seed)
            if self._attempt(reader, seed):
                changed = True
                tried.clear()

    def _attempt(self, reader: Value, seed: Value) -> bool:
        if not self._may_pay(reader, seed):
            return False
        chosen: dict[Value, None] = {}
        formula, refusal = self._start(reader, seed, chosen)
        if refusal is not None:
            return self._look_behind(reader, seed, refusal)
        pending = [root for root in formula.terms if isinstance(root, Value)]
        apart: Refusal | None = None
        grown = True
        while pending and len(chosen) < REACH:
            later = []
            grown = False
            for root in pending:
                if root in chosen or not self.draft.ok(root) or root not in formula.terms:
                    continue
                with_it = dict(chosen)
                trial, refusal = self.draft.step(formula, root, reader, with_it)
                if refusal is not None:
                    apart = apart or (refusal if refusal.rule == "branch_sum" else None)
                    later.append(root)
                    continue
                trial = self._through_identities(trial, reader, with_it)
                before = {root: self.plan.formulas[root], reader: formula}
                joins = self.plan.operations[root].moves and self.worth.more_operations(before, {reader: trial})
                if not joins and self.worth.total({reader: trial}) <= self.worth.total(before) * (1 + EPSILON):
                    later += [
                        r
                        for v in with_it
                        if v not in chosen
                        for r in self.plan.formulas[v].terms
                        if isinstance(r, Value)
                    ]
                    chosen = with_it
                    formula = trial
                    grown = True
                else:
                    later.append(root)
            pending = later if grown else []
        chosen, formula = self.pruning.prune(reader, chosen, formula)
        if not chosen:
            if apart is not None:
                self.draft.refuse(seed, reader, apart)
            return False
        if self._only_arithmetic((*chosen, reader)):
            return False
        refusal = self.worth.gain({v: self.plan.formulas[v] for v in (*chosen, reader)}, {reader: formula})
        if refusal is None and any(conv.order is not None for conv in formula.terms.values()):
            refusal = Refusal("layout", "its axes stand in another order than those of its input")
        if refusal is not None:
            found = self._look_behind(reader, seed, refusal)
            return found or (refusal.rule == "layout" and self._attempt_in_order(reader, seed, chosen, formula))
        return self._commit(reader, seed, chosen, formula)

    def _attempt_in_order(self, reader: Value, seed: Value, chosen: dict[Value, None], formula: Affine) -> bool:
        """Make a step without the values that bring another order of the axes about."""
        chosen, formula = self.pruning.prune(reader, *self.pruning.in_order(reader, chosen, formula))
        if any(conv.order is not None for conv in formula.terms.values()) or seed not in chosen:
            return False
        before = {v: self.plan.formulas[v] for v in (*chosen, reader)}
        if self._only_arithmetic((*chosen, reader)) or self.worth.gain(before, {reader: formula}) is not None:
            return False
        return self._commit(reader, seed, chosen, formula)

    def _start(self, reader: Value, seed: Value, chosen: dict[Value, None]) -> tuple[Affine, Refusal | None]:
        """A first value put into a reader; with a crop, if it is no more than ``contiguous()`` of that."""
        formula, refusal = self.draft.step(self.plan.formulas[reader], seed, reader, chosen)
        first = self.plan.operations[seed]
        behind = [root for root in first.terms if root in formula.terms and self.draft.ok(root)]
        if refusal is None and behind and first.hands_on and self.plan.operations[behind[0]].copies:
            formula, _ = self.draft.step(formula, behind[0], reader, chosen)
        return formula, refusal

    def _look_behind(self, reader: Value, seed: Value, refusal: Refusal) -> bool:
        """A step that was refused may be exact, or pay, together with what lies behind it."""
        found = self.behind.steps(reader, seed) if refusal.rule in ("cost", "border_rule", "layout") else None
        if found is not None:
            chosen, formula = self.pruning.prune(reader, *found)
            if seed in chosen and self._commit(reader, seed, chosen, formula):
                return True
        self.draft.refuse(seed, reader, refusal)
        return False

    def _commit(self, reader: Value, seed: Value, chosen: dict[Value, None], formula: Affine) -> bool:
        """Make a step, or one without the first of its values where there is no place for the whole."""
        first: Refusal | None = None
        for _ in range(RETRIES):
            where = self._place(reader, formula, chosen)
            if not isinstance(where, Refusal):
                self.draft.commit(reader, formula, chosen, where)
                return True
            first = first or where
            found = self._without_first(reader, chosen)
            if found is None:
                break
            chosen, formula = found
        assert first is not None
        self.draft.refuse(seed, reader, first)
        return False

    def _place(self, reader: Value, formula: Affine, chosen: dict[Value, None]) -> Place | Refusal:
        inlined = Either(self.plan.inlined, chosen)
        site, dead = self.draft.site, self.plan.dead
        return place(reader, formula, self.plan.operations, inlined, site, dead, self.plan.spread)

    def _without_first(self, reader: Value, chosen: dict[Value, None]) -> tuple[dict[Value, None], Affine] | None:
        """A step without the value that is computed first, if that still pays."""
        fewer = {v: None for v in chosen if v is not min(chosen, key=lambda value: value.index)}
        formula = self.pruning.rebuild(reader, fewer) if fewer else None
        if formula is None:
            return None
        before = {v: self.plan.formulas[v] for v in (*fewer, reader)}
        return None if self.worth.gain(before, {reader: formula}) is not None else (fewer, formula)

    def _only_arithmetic(self, members: Iterable[Value]) -> bool:
        """Whether a convolution would replace nothing but sums and products: another member may still come."""
        operations = [self.plan.operations[m] for v in members for m in (v, *self.plan.absorbed(v))]
        return all(operation.arithmetic or operation.hands_on for operation in operations)

    def _through_identities(self, formula: Affine, reader: Value, chosen: dict[Value, None]) -> Affine:
        """The formula with all roots replaced that only hand on their input."""
        pending = list(formula.terms)
        while pending:
            root = pending.pop()
            if not isinstance(root, Value) or root not in formula.terms or not self.draft.ok(root):
                continue
            inner = self.plan.formulas[root]
            if len(inner.terms) != 1 or inner.biased or not next(iter(inner.terms.values())).identity:
                continue
            result, refusal = self.draft.step(formula, root, reader, chosen)
            if refusal is None:
                formula = result
                pending += inner.terms
        return formula

    def _may_pay(self, reader: Value, seed: Value) -> bool:
        """Whether merging could save anything: a summand must share an input with another one."""
        formula = self.plan.formulas[reader]
        if len(formula.terms) == 1 or len(self.plan.formulas[seed].terms) > 1:
            return True
        if formula.terms[seed].moves and (seed in self.draft.held or len(self.draft.readers[seed]) > 1):
            return False  # it stays, and many concatenations read it
        others: set[Value] = set()
        for root in formula.terms:
            if root is not seed and isinstance(root, Value):
                others |= self._reach(root)
        return not others.isdisjoint(self._reach(seed))

    def _reach(self, value: Value) -> set[Value]:
        """Values that the formula of ``value`` can come to read."""
        found = {value}
        pending = [value]
        while pending and len(found) < REACH:
            current = pending.pop()
            if not self.draft.ok(current) or current in self.draft.held:
                continue
            for root in self.plan.formulas[current].terms:
                if isinstance(root, Value) and root not in found:
                    found.add(root)
                    pending.append(root)
        return found


def plan_net(
    net: Net, known: Known, cost: Cost, liftings: tuple[Lifting, ...], movable: Callable[[Value], str], site: Site
) -> NetPlan:
    """Plan one net; ``movable`` gives the reason why a value must stay, or an empty string."""
    return _Planner(Draft(net, known, liftings, movable, site), cost).run()
