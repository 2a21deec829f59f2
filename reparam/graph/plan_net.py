"""Decide which values of a net disappear into their readers.

Every affine value starts materialised. Inlining a value puts its formula in the place of its name into the formulas of its
readers. A step is kept if it is exact and the total cost falls; steps that pay only together are tried together, and what did
not contribute is taken back. Only integers are needed here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, final

from reparam.algebra import Affine, Refusal, substitute
from reparam.cost import Cost, Work, affine_work, operation_work, resolution
from reparam.graph.effects import unused
from reparam.graph.lift import Known, Lifting, lift
from reparam.graph.net import Net, Value
from reparam.graph.operation import Operation, absorbed
from reparam.graph.proxy import PLAIN
from reparam.graph.placing import Mode, Place, Site, place
from reparam.graph.through import Wrap, consumer, producers, wrapped

EPSILON: Final = 1e-9
REACH: Final = 256  # values that one step looks at


@final
@dataclass(eq=False)
class NetPlan:
    """What happens to the values of one net.

    Args:
        net: the net.
        known: spaces and effects of its values.
        operations: affine values.
        boundaries: values that could be linear and are not, with the reason.
        formulas: current formula of every affine value.
        inlined: values that disappear.
        places: where each changed value is emitted.
        refusals: what was tried and refused, by value and reader.
        sizes: relative spatial elements of each value.
        dead: values that nothing needs.
        spread: values that disappeared into several readers.
        wraps: scales and shifts that a value takes over through passages.
        groups: each norm that was taken over, with those that share it.
        alone: why a norm was not taken over.
    """

    net: Net
    known: Known
    operations: dict[Value, Operation]
    boundaries: dict[Value, Refusal]
    formulas: dict[Value, Affine]
    sizes: dict[Value, float]
    inlined: dict[Value, None] = field(default_factory=dict)
    places: dict[Value, Place] = field(default_factory=dict)
    refusals: dict[tuple[Value, Value], Refusal] = field(default_factory=dict)
    dead: set[Value] = field(default_factory=set)
    spread: dict[Value, list[Value]] = field(default_factory=dict)
    wraps: dict[Value, list[Wrap]] = field(default_factory=dict)
    groups: list[tuple[Value, list[Value]]] = field(default_factory=list)
    alone: dict[Value, Refusal] = field(default_factory=dict)

    def changed(self) -> list[Value]:
        """Materialised values into which others disappeared, in order of execution."""
        return [v for v in self.operations if v not in self.inlined and v in self.places]

    def absorbed(self, value: Value) -> list[Value]:
        """All values that disappeared into ``value``, in order of execution."""
        return absorbed(self.operations, self.inlined, value)

    def numbers(self, value: Value) -> Affine:
        """The formula of a value with weights."""
        formula = numbers(self.operations, self.inlined, value)
        for wrap in self.wraps.get(value, ()):
            result = wrapped(formula, value, wrap, numbers(self.operations, self.inlined, wrap.norm))
            if isinstance(result, Refusal):
                raise AssertionError(f"a planned formula cannot be computed: {result}")
            formula = result
        return formula


def numbers(operations: Mapping[Value, Operation], inlined: Iterable[Value], value: Value) -> Affine:
    """The formula of ``value`` with weights, the formulas of ``inlined`` put in."""
    done: dict[Value, Affine] = {}
    for v in (*absorbed(operations, inlined, value), value):
        formula = operations[v].numbers()
        inner = {source: done[source] for source in formula.terms if source in done}
        result = substitute(formula, inner, trusted=True) if inner else formula
        if isinstance(result, Refusal):
            raise AssertionError(f"a planned formula cannot be computed: {result}")
        done[v] = result
    return done[value]


class _Planner:
    def __init__(self, net: Net, known: Known, cost: Cost, liftings: tuple[Lifting, ...], movable: Callable[[Value], str], site: Site):
        self.cost = cost
        self.site = site
        self.movable = movable
        operations: dict[Value, Operation] = {}
        boundaries: dict[Value, Refusal] = {}
        for value in net.values:
            lifted = lift(value, known, liftings)
            if isinstance(lifted, Operation):
                operations[value] = lifted
            elif isinstance(lifted, Refusal):
                boundaries[value] = lifted.at(value.path, value.name)
        formulas = {value: operation.structure for value, operation in operations.items()}
        self.original = dict(formulas)
        self.plan = NetPlan(net, known, operations, boundaries, formulas, _sizes(net, operations))
        covered = {c for operation in operations.values() for c in operation.covers}
        self.plan.dead = unused(net)
        self.readers: dict[Value, dict[Value, None]] = {}
        self.held: dict[Value, Value | None] = {}
        for value in net.values:
            if value in covered or value in self.plan.dead:
                continue
            if value in operations:
                for source in operations[value].terms:
                    self.readers.setdefault(source, {})[value] = None
            terms = operations[value].terms if value in operations else {}
            for source in value.inputs:
                if source not in terms and source not in covered:
                    self.held.setdefault(source, value)
        for value in net.values:
            if value.returned:
                self.held.setdefault(value, None)

    def run(self) -> NetPlan:
        order = list(self.plan.operations)
        for _ in range(8):
            changed = False
            for value in order:
                if value not in self.plan.inlined and not self._is_partial_sum(value):
                    changed |= self._improve(value)
            for value in order:
                if value not in self.plan.inlined and len(self.readers.get(value, ())) > 1:
                    changed |= self._spread(value)
            if not changed:
                break
        for value in order:
            if value not in self.plan.inlined:
                self._go_through(value)
        return self.plan

    # -- through passages -------------------------------------------------------------------------------------------

    def _go_through(self, norm: Value) -> None:
        """Let a scale and shift disappear into the operations on the other side of passages."""
        formula = self.plan.formulas[norm]
        if len(formula.terms) != 1 or self.movable(norm) or norm in self.plan.wraps:
            return
        ((root, conv),) = formula.terms.items()
        if not conv.diagonal or conv.identity and not formula.biased or not isinstance(root, Value):
            return
        spaces, operations = self.plan.known.spaces, self.plan.operations
        if root in operations or norm not in spaces:
            back: list[tuple[Value, Wrap]] | Refusal = Refusal("norm", "")
        else:
            counts = {value: self._reading(value) for value in self.plan.net.values}
            back = producers(norm, root, spaces, operations, counts)
        for found in (back, consumer(norm, spaces, operations)):
            if isinstance(found, Refusal):
                if found.condition:
                    self._refuse_norm(norm, found)
                continue
            refusal = self._wrap(norm, found)
            if refusal is None:
                return
            self._refuse_norm(norm, refusal)

    def _reading(self, value: Value) -> int:
        readers = [user for user in value.users if user not in self.plan.dead and not _only_shape(user, value)]
        return len(readers) + (2 if value.returned else 0)

    def _refuse_norm(self, norm: Value, refusal: Refusal) -> None:
        self.plan.alone[norm] = refusal.at(norm.path, norm.name)

    def _wrap(self, norm: Value, found: list[tuple[Value, Wrap]]) -> Refusal | None:
        before = {norm: self.plan.formulas[norm]} | {value: self.plan.formulas[value] for value, _ in found}
        after: dict[Value, Affine] = {}
        for value, wrap in found:
            if value in self.plan.inlined or value in after:
                return Refusal("used_elsewhere", f"{value.name} at {value.path} became part of another operation")
            if self.movable(value):
                return Refusal("excluded", self.movable(value))
            span = sorted((value.index, norm.index))
            moved = (value, norm, *wrap.passages)
            if value.mode != norm.mode or not self.plan.known.effects.stable(moved, span[0], span[1]):
                return Refusal("in_place", "memory between the two is written, or the mode changes")
            result = wrapped(self.plan.formulas[value], value, wrap, self.plan.formulas[norm])
            if isinstance(result, Refusal):
                return result
            if any(conv.diagonal for conv in result.terms.values()):
                return Refusal("cost", f"{value.name} at {value.path} is no convolution that could take it along")
            after[value] = result
        refusal = self._gain(before, after)
        if refusal is not None:
            return refusal
        reason = self.site.passable(norm) if norm.module is None or self.site.replaceable(norm) else ""
        reason = reason or self.site.crossing([norm, *after, *(p for _, w in found for p in w.passages)])
        if reason:
            return Refusal("place", reason)
        places: dict[Value, Place] = {}
        for value, formula in after.items():
            where = place(value, formula, self.plan.operations, self.plan.inlined, self.site, self.plan.dead)
            if isinstance(where, Refusal):
                return where
            if where.mode is Mode.CONTAINER:
                return Refusal("place", "its convolution is all that a module does")
            places[value] = where
        for value, wrap in found:
            self.plan.formulas[value] = after[value]
            self.plan.wraps.setdefault(value, []).append(wrap)
            where = places[value]
            self.plan.places[value] = replace(where, passed=(*where.passed, *self._own(norm)))
        self.plan.groups.append((norm, [value for value, _ in found]))
        self.plan.inlined[norm] = None
        self.plan.places.pop(norm, None)
        return None

    def _own(self, norm: Value) -> list[Value]:
        """The norm and what it absorbed before: all of it hands on its input."""
        return [*absorbed(self.plan.operations, self.plan.inlined, norm), norm]

    def _is_partial_sum(self, value: Value) -> bool:
        """Whether a sum goes into one other sum as it is: the other one is looked at instead."""
        readers = self.readers.get(value, {})
        if len(self.plan.operations[value].terms) < 2 or len(readers) != 1 or value in self.held:
            return False
        (reader,) = readers
        terms = self.plan.operations[reader].terms
        return len(terms) > 1 and value in terms and terms[value].identity

    # -- one step ---------------------------------------------------------------------------------------------------

    def _may_vanish(self, value: Value) -> Refusal | None:
        if value not in self.plan.operations:
            return Refusal("boundary", f"{value.name} is not linear")
        if value in self.held:
            reader = self.held[value]
            user = f"{reader.name} at {reader.path or 'the root'}" if reader is not None else "the caller"
            return Refusal("used_elsewhere", f"its value is also read by {user}", "read it once")
        reason = self.movable(value)
        return Refusal("excluded", reason, "take it out of exclude") if reason else None

    def _inline(self, formula: Affine, value: Value, reader: Value, inlined: Mapping[Value, None]) -> Affine | Refusal:
        """The formula of ``reader`` with ``value`` replaced."""
        inner = self.plan.formulas[value]
        moved = [value, *(root for root in inner.terms if isinstance(root, Value))]
        gone = self.plan.inlined | dict(inlined)
        if not self.plan.known.effects.stable(moved, value.index, reader.index, gone):
            return Refusal("in_place", "memory that it reads is written in between", "use the operation that copies")
        if value.mode != reader.mode:
            return Refusal("mode", "it runs under another autocast or gradient mode than its reader")
        conv = formula.terms[value]
        if conv.fill is not None and not conv.never_outside and not inner.numeric:
            inner = numbers(self.plan.operations, gone, value)
            if any(c.weight is not None and c.weight.is_meta for c in inner.terms.values()):
                return Refusal("border_rule", "the constant of the padding has no value on the meta device")
            result = substitute(formula, {value: inner})
            return result if isinstance(result, Refusal) else _structure(result)
        return substitute(formula, {value: inner})

    def _work(self, value: Value, formula: Affine) -> Work:
        if formula is self.original[value]:
            return operation_work(formula, self.plan.sizes, self.plan.sizes[value])
        return affine_work(formula, self.plan.sizes, self.plan.sizes[value])

    def _sum(self, formulas: Mapping[Value, Affine]) -> Work:
        total = Work()
        for value, formula in formulas.items():
            total += self._work(value, formula)
        return total

    def _total(self, formulas: Mapping[Value, Affine]) -> float:
        return self.cost(self._sum(formulas))

    def _gain(self, before: Mapping[Value, Affine], after: Mapping[Value, Affine]) -> Refusal | None:
        """Why a step is not worth it: it must cost less, and need no more operations."""
        old, new = self._sum(before), self._sum(after)
        if new.launches > old.launches:
            return Refusal("cost", f"{new.launches} operations would replace {old.launches}")
        if not self.cost(new) < self.cost(old) * (1 - EPSILON):
            ratio = self.cost(new) / (self.cost(old) or 1.0)
            return Refusal("cost", f"the merged operation costs {ratio:.2f} times as much", "pass another cost")
        return None

    def _improve(self, reader: Value) -> bool:
        """Let values disappear into ``reader`` where that pays."""
        excluded = self.movable(reader)
        if excluded:
            for root in self.plan.formulas[reader].terms:
                if isinstance(root, Value) and self._ok(root):
                    self._refuse(root, reader, Refusal("excluded", excluded, "take it out of exclude"))
            return False
        changed = False
        tried: set[Value] = set()
        while True:
            seed = next(
                (r for r in self.plan.formulas[reader].terms if isinstance(r, Value) and r not in tried and self._ok(r)), None
            )
            if seed is None:
                return changed
            tried.add(seed)
            if self._attempt(reader, seed):
                changed = True
                tried.clear()

    def _ok(self, value: Value) -> bool:
        return value in self.plan.operations and value not in self.plan.inlined

    def _attempt(self, reader: Value, seed: Value) -> bool:
        if not self._may_pay(reader, seed):
            return False
        chosen: dict[Value, None] = {}
        formula, refusal = self._step(self.plan.formulas[reader], seed, reader, chosen)
        if refusal is not None:
            self._refuse(seed, reader, refusal)
            return False
        pending = [root for root in formula.terms if isinstance(root, Value)]
        grown = True
        while pending and len(chosen) < REACH:
            later = []
            grown = False
            for root in pending:
                if root in chosen or not self._ok(root) or root not in formula.terms:
                    continue
                trial, refusal = self._step(formula, root, reader, dict(chosen))
                if refusal is not None:
                    later.append(root)
                    continue
                before = self._total({root: self.plan.formulas[root], reader: formula})
                if self._total({reader: trial}) <= before * (1 + EPSILON):
                    chosen[root] = None
                    later += [r for r in self.plan.formulas[root].terms if isinstance(r, Value)]
                    formula = trial
                    grown = True
                else:
                    later.append(root)
            pending = later if grown else []
        chosen, formula = self._prune(reader, chosen, formula)
        if not chosen:
            return False
        refusal = self._gain({v: self.plan.formulas[v] for v in (*chosen, reader)}, {reader: formula})
        if refusal is not None:
            if seed in chosen:
                self._refuse(seed, reader, refusal)
            return False
        where = place(reader, formula, self.plan.operations, self.plan.inlined | chosen, self.site, self.plan.dead)
        if isinstance(where, Refusal):
            self._refuse(seed, reader, where)
            return False
        self._commit(reader, formula, chosen, where)
        return True

    def _may_pay(self, reader: Value, seed: Value) -> bool:
        """Whether merging could save anything: a summand must share an input with another one."""
        formula = self.plan.formulas[reader]
        if len(formula.terms) == 1 or len(self.plan.formulas[seed].terms) > 1:
            return True
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
            if not self._ok(current) or current in self.held:
                continue
            for root in self.plan.formulas[current].terms:
                if isinstance(root, Value) and root not in found:
                    found.add(root)
                    pending.append(root)
        return found

    def _step(
        self, formula: Affine, value: Value, reader: Value, chosen: dict[Value, None]
    ) -> tuple[Affine, Refusal | None]:
        refused = self._may_vanish(value)
        if refused is None:
            others = [r for r in self.readers.get(value, ()) if r is not reader and r not in chosen]
            if others:
                refused = Refusal("used_elsewhere", f"its value is also read by {others[0].name} at {others[0].path}")
        if refused is not None:
            return formula, refused
        result = self._inline(formula, value, reader, chosen)
        if isinstance(result, Refusal):
            return formula, result
        chosen[value] = None
        return result, None

    def _prune(
        self, reader: Value, chosen: dict[Value, None], formula: Affine
    ) -> tuple[dict[Value, None], Affine]:
        """Take back summands that share no input with another one, where that costs nothing."""
        for value in self._alone(reader, chosen):
            inside = {value, *absorbed(self.plan.operations, chosen, value)}
            fewer = {v: None for v in chosen if v not in inside}
            rebuilt = self._rebuild(reader, fewer)
            if rebuilt is None:
                continue
            with_it = self._total({reader: formula})
            without = self._total({reader: rebuilt, **{v: self.plan.formulas[v] for v in chosen if v in inside}})
            if without <= with_it * (1 + EPSILON):
                chosen, formula = fewer, rebuilt
        return chosen, formula

    def _alone(self, reader: Value, chosen: Mapping[Value, None]) -> list[Value]:
        """Chosen summands all of whose inputs are reached on one path only."""
        paths: dict[Value, int] = {reader: 1}
        below = sorted(chosen, key=lambda v: v.index, reverse=True)
        for value in (reader, *below):
            for root in self.plan.formulas[value].terms:
                if isinstance(root, Value):
                    paths[root] = paths.get(root, 0) + paths.get(value, 0)
        single: dict[Value, bool] = {}
        for value in reversed(below):
            roots = [r for r in self.plan.formulas[value].terms if isinstance(r, Value)]
            single[value] = paths[value] == 1 and all(single.get(r, paths[r] == 1) for r in roots)
        summands = {
            root
            for value in (reader, *below)
            if len(self.plan.formulas[value].terms) > 1
            for root in self.plan.formulas[value].terms
        }
        inside: set[Value] = set()
        found = []
        for value in below:
            if value in summands and single[value] and value not in inside:
                found.append(value)
                inside.update(absorbed(self.plan.operations, chosen, value))
        for value in below:
            formula = self.plan.formulas[value]
            hands_on = len(formula.terms) == 1 and not formula.biased and all(c.identity for c in formula.terms.values())
            if hands_on and value not in inside and all(r not in chosen and paths[r] == paths[value] for r in formula.terms):
                found.append(value)  # the last of a chain: without it the chain reads its result instead
        return found

    def _rebuild(self, reader: Value, chosen: Mapping[Value, None]) -> Affine | None:
        formula = self.plan.formulas[reader]
        done: dict[Value, None] = {}
        while True:
            ready = [r for r in formula.terms if isinstance(r, Value) and r in chosen]
            if not ready:
                return formula if len(done) == len(chosen) else None
            root = max(ready, key=lambda r: r.index)  # all its readers were replaced before
            result = self._inline(formula, root, reader, done)
            if isinstance(result, Refusal):
                return None
            formula = result
            done[root] = None

    def _spread(self, value: Value) -> bool:
        """Let a value with several readers disappear into all of them."""
        if self._may_vanish(value) is not None:
            return False
        readers = list(self.readers[value])
        if any(self.movable(reader) for reader in readers):
            return False
        before = {value: self.plan.formulas[value]} | {r: self.plan.formulas[r] for r in readers}
        after: dict[Value, Affine] = {}
        for reader in readers:
            result = self._inline(self.plan.formulas[reader], value, reader, {})
            if isinstance(result, Refusal):
                self._refuse(value, reader, result)
                return False
            after[reader] = result
        refusal = self._gain(before, after)
        if refusal is not None:
            self._refuse(value, readers[0], refusal)
            return False
        inlined = self.plan.inlined | {value: None}
        places: dict[Value, Place] = {}
        for reader, formula in after.items():
            where = place(reader, formula, self.plan.operations, inlined, self.site, self.plan.dead)
            if isinstance(where, Refusal):
                self._refuse(value, reader, where)
                return False
            places[reader] = where
        for reader, formula in after.items():
            self._commit(reader, formula, {value: None}, places[reader])
        self.plan.spread[value] = readers
        return True

    def _commit(self, reader: Value, formula: Affine, chosen: Mapping[Value, None], where: Place) -> None:
        self.plan.formulas[reader] = formula
        self.plan.places[reader] = where
        for value in chosen:
            self.plan.inlined[value] = None
            self.plan.places.pop(value, None)
            for root in self.plan.formulas[value].terms:
                if isinstance(root, Value) and root in self.readers:
                    self.readers[root].pop(value, None)
        for root in formula.terms:
            if isinstance(root, Value):
                self.readers.setdefault(root, {})[reader] = None

    def _refuse(self, value: Value, reader: Value, refusal: Refusal) -> None:
        self.plan.refusals[value, reader] = refusal.at(value.path, value.name, reader.name)


def _only_shape(user: Value, value: Value) -> bool:
    """Whether an operation looks at the shape of ``value`` only."""
    named = user.node.target in ("reshape_as", "view_as", "expand_as", "type_as")
    return bool(user.node.meta.get(PLAIN)) or named and user.args[0] is not value


def _structure(formula: Affine) -> Affine:
    return Affine({root: conv.structure for root, conv in formula.terms.items()}, formula.biased)


def _sizes(net: Net, operations: Mapping[Value, Operation]) -> dict[Value, float]:
    sizes: dict[Value, float] = {}
    for value in net.values:
        if value in operations:
            terms = operations[value].terms
            sizes[value] = max((resolution(conv, sizes[root]) for root, conv in terms.items()), default=1.0)
        else:
            sizes[value] = max((sizes[source] for source in value.inputs), default=1.0)
    return sizes


def plan_net(
    net: Net, known: Known, cost: Cost, liftings: tuple[Lifting, ...], movable: Callable[[Value], str], site: Site
) -> NetPlan:
    """Plan one net; ``movable`` gives the reason why a value must stay, or an empty string."""
    return _Planner(net, known, cost, liftings, movable, site).run()
