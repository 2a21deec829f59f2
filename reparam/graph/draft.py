"""A plan in the making: which values may disappear, and the formulas of those that read them afterwards."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import final

from torch import nn

from reparam.algebra import Affine, Refusal, interned, substitute
from reparam.graph.calls import name_of
from reparam.graph.channels import SPLITS
from reparam.graph.constants import constants_of, reads_type
from reparam.graph.effects import pure, unused
from reparam.graph.leaves import EXCLUDED, OUTSIDE, is_leaf
from reparam.graph.lift import Known, Lifting, lift
from reparam.graph.net import Net, Value
from reparam.graph.net_plan import NetPlan, numbers
from reparam.graph.operation import Either, Operation
from reparam.graph.placing import Mode, Place, Site
from reparam.graph.sizes import SIZE_CALLS, batch_only, whole_shape
from reparam.graph.worth import relative_sizes


@final
class Draft:
    """The plan of one net while it is searched for.

    Args:
        net: the net.
        known: spaces and effects of its values.
        liftings: what is known to be linear.
        movable: why a value must stay, or an empty string.
        site: what may be changed where.
    """

    def __init__(
        self, net: Net, known: Known, liftings: tuple[Lifting, ...], movable: Callable[[Value], str], site: Site
    ) -> None:
        self.movable = movable
        self.site = site
        operations: dict[Value, Operation] = {}
        boundaries: dict[Value, Refusal] = {}
        for value in net.values:
            lifted = lift(value, known, liftings)
            if isinstance(lifted, Operation):
                shapes = {root: interned(conv) for root, conv in lifted.terms.items()}
                operations[value] = replace(lifted, terms=shapes)
            elif isinstance(lifted, Refusal):
                boundaries[value] = lifted.at(value.path, value.name)
        formulas = {value: operation.structure for value, operation in operations.items()}
        self.original: Mapping[Value, Affine] = dict(formulas)
        self.plan = NetPlan(net, known, operations, boundaries, formulas, relative_sizes(net, operations))
        covered = {c for operation in operations.values() for c in operation.covers}
        self.plan.dead = unused(net)
        self.readers: dict[Value, dict[Value, None]] = {}
        self.held: dict[Value, Value | None] = {}
        for value in net.values:
            if value in covered or value in self.plan.dead or self._only_splits(value):
                continue
            if value in operations:
                for source in operations[value].terms:
                    self.readers.setdefault(source, {})[value] = None
            terms = operations[value].terms if value in operations else {}
            for source in value.inputs:
                if source not in terms and source not in covered and not self._looks(value, source):
                    self.held.setdefault(source, value)
        for value in net.values:
            if value.returned:
                self.held.setdefault(value, None)

    def _only_splits(self, value: Value) -> bool:
        """Whether a value is a tuple of parts, each of which is known as a part of the whole."""
        operations = self.plan.operations
        if name_of(value) not in SPLITS or value in operations or value.returned:
            return False
        return all(user in operations and value.args[0] in operations[user].terms for user in value.users)

    def _looks(self, reader: Value, value: Value) -> bool:
        """Whether ``reader`` reads of a value only what the one in its place has, too: sizes, its type; noted if so."""
        operation = self.plan.operations.get(value)
        if operation is not None and len(operation.terms) == 1 and reads_type(reader, self.plan.operations):
            if not all(self._leads_to(user, value) for user in constants_of(reader)):
                self.plan.operations[value] = replace(operation, looked_at=True)
            return True
        if operation is None or len(operation.terms) != 1 or not (whole_shape(reader) or name_of(reader) in SIZE_CALLS):
            return False
        (conv,) = operation.terms.values()
        if not (conv.in_channels and conv.pointwise and conv.in_channels == conv.out_channels):
            rank = self.plan.known.rank(value)
            if not batch_only(reader) or not conv.axes or rank.most < conv.axes + 2:
                return False
            if rank.least < conv.axes + 2:
                operation = replace(operation, read_rank=conv.axes + 2)
        self.plan.operations[value] = replace(operation, looked_at=True)
        return True

    def _leads_to(self, reader: Value, value: Value) -> bool:
        """Whether an operation is the last of a chain that starts with ``value``, so that both vanish into one."""
        while reader is not value:
            operation = self.plan.operations.get(reader)
            if operation is None or len(operation.terms) != 1:
                return False
            (reader,) = operation.terms
        return True

    def ok(self, value: Value) -> bool:
        """Whether a value is affine and still there."""
        return value in self.plan.operations and not self.plan.gone(value)

    def may_vanish(self, value: Value) -> Refusal | None:
        """Why a value must be computed, whoever reads it; None if it need not."""
        if value not in self.plan.operations:
            return Refusal("boundary", f"{value.name} is not linear")
        if value in self.held:
            reader = self.held[value]
            user = "the caller" if reader is None else placed(reader)
            return Refusal("used_elsewhere", f"its value is also read by {user}", "read it once")
        return self.stays(value)

    def stays(self, value: Value) -> Refusal | None:
        """Why an operation may not be touched; None if it may."""
        reason = self.movable(value)
        if not reason:
            return None
        remedies = {EXCLUDED: "take it out of exclude", OUTSIDE: "name it in only"}
        remedy = remedies.get(reason, "do not read them in a forward that cannot be read")
        return Refusal("excluded" if reason in remedies else "parameters_read", reason, remedy)

    def inline(
        self,
        formula: Affine,
        value: Value,
        reader: Value,
        inlined: Mapping[Value, None],
        inner: Affine | None = None,
    ) -> Affine | Refusal:
        """The formula of ``reader`` with ``value`` replaced, by ``inner`` if that is given."""
        inner = self.plan.formulas[value] if inner is None else inner
        moved = [value, *(root for root in inner.terms if isinstance(root, Value))]
        gone = Either(self.plan.inlined, inlined)
        writer = self.plan.known.effects.writer(moved, value.index, reader.index, gone)
        if writer is not None:
            return _written_by(writer)
        if value.mode != reader.mode:
            why = "it runs under another autocast or gradient mode than its reader"
            return Refusal("mode", why, "run both under one mode")
        conv = formula.terms[value]
        if conv.fill is not None and not conv.never_outside and not inner.numeric:
            inner = numbers(self.plan.operations, gone, value)
            if any(c.weight is not None and c.weight.is_meta for c in inner.terms.values()):
                return Refusal("border_rule", "the constant of the padding has no value on the meta device")
            result = substitute(formula, {value: inner})
            return result if isinstance(result, Refusal) else _structure(result)
        return substitute(formula, {value: inner})

    def step(
        self,
        formula: Affine,
        value: Value,
        reader: Value,
        chosen: dict[Value, None],
        inner: Affine | None = None,
    ) -> tuple[Affine, Refusal | None]:
        """One more value put into ``formula`` and noted in ``chosen``, or ``formula`` as it is and the reason."""
        refused = self.may_vanish(value)
        if refused is None:
            others = [r for r in self.readers.get(value, ()) if r is not reader and r not in chosen]
            if others:
                refused = Refusal("used_elsewhere", f"its value is also read by {placed(others[0])}")
        if refused is not None:
            return formula, refused
        result = self.inline(formula, value, reader, chosen, inner)
        if isinstance(result, Refusal):
            return formula, result
        chosen[value] = None
        return result, None

    def commit(self, reader: Value, formula: Affine, chosen: Mapping[Value, None], where: Place) -> None:
        """Make a step: ``chosen`` disappears into ``reader``."""
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

    def drop_unread(self) -> None:
        """Norms that were there for their statistics: nothing reads what they compute."""
        for value, operation in self.plan.operations.items():
            if not operation.norm or value.module is None or value.users or value.returned or not pure(value):
                continue
            where = Place(value, Mode.SWAP, {}, ())
            kept = self.site.replaceable(value) or self.site.mistaken(value.path, lambda: nn.Identity, None)
            if not kept and not self.site.exposed([value], [], where):
                self.plan.dropped.append(value)

    def take_back(self, reader: Value) -> None:
        """Undo all steps into ``reader``: what disappeared into it is computed again."""
        inside = self.plan.absorbed(reader)
        if any(value in self.plan.spread for value in inside):
            return
        for root in self.plan.formulas[reader].terms:
            if isinstance(root, Value):
                self.readers[root].pop(reader, None)
        for value in inside:
            del self.plan.inlined[value]
        for value in (*inside, reader):
            self.plan.formulas[value] = self.original[value]
            for root in self.plan.formulas[value].terms:
                if isinstance(root, Value):
                    self.readers.setdefault(root, {})[value] = None
        del self.plan.places[reader]

    def refuse(self, value: Value, reader: Value, refusal: Refusal) -> None:
        """Note why ``value`` does not disappear into ``reader``."""
        self.plan.refusals[value, reader] = refusal.at(value.path, value.name, reader.name)


def placed(value: Value) -> str:
    """An operation and where it stands, for a reader."""
    return f"{value.name} at {value.path or 'the root'}"


def _written_by(writer: Value) -> Refusal:
    """Why a value stays in front of an operation that writes, or may write, what it reads."""
    if writer.module is None or is_leaf(writer.module):
        return Refusal("in_place", "memory that it reads is written in between", "use the operation that copies")
    why = f"{writer.name} at {writer.path} is called in between; it was not opened, and may write what it reads"
    return Refusal("in_place", why, "see why it was not opened")


def _structure(formula: Affine) -> Affine:
    return Affine({root: conv.structure for root, conv in formula.terms.items()}, formula.biased, size=formula.size)
