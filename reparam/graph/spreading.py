"""A value with several readers that disappears into all of them."""

from typing import final

from reparam.algebra import Affine, Refusal
from reparam.graph.behind import PATIENCE
from reparam.graph.draft import Draft
from reparam.graph.net import Value
from reparam.graph.operation import Either, absorbed
from reparam.graph.placing import Place, place
from reparam.graph.worth import Worth


@final
class Spreading:
    """Lets values disappear into all of their readers."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth

    def spread(self, value: Value) -> bool:
        """Let a value disappear into all its readers, together with what lies behind it if that is needed."""
        if self.draft.may_vanish(value) is not None:
            return False
        readers = list(self.draft.readers[value])
        if any(self.draft.stays(reader) is not None for reader in readers):
            return False
        formula, chosen = self.plan.formulas[value], dict[Value, None]()
        first: tuple[Value, Refusal] | None = None
        for _ in range(PATIENCE):
            refused = self._into(value, readers, formula, chosen)
            if refused is None:
                return True
            first = first or refused
            behind = [r for r in formula.terms if isinstance(r, Value) and self.draft.ok(r)]
            if not behind:
                break
            formula, refusal = self.draft.step(formula, max(behind, key=lambda r: r.index), value, chosen)
            if refusal is not None:
                break
        if first is not None:
            self.draft.refuse(value, *first)
        return False

    def _into(
        self, value: Value, readers: list[Value], inner: Affine, chosen: dict[Value, None]
    ) -> tuple[Value, Refusal] | None:
        """Put a formula for ``value`` into all readers, if that is exact and pays; else the reader and the reason."""
        gone = {value: None, **chosen}
        before = {v: self.plan.formulas[v] for v in (*gone, *readers)}
        after: dict[Value, Affine] = {}
        for reader in readers:
            result = self.draft.inline(self.plan.formulas[reader], value, reader, chosen, inner)
            if isinstance(result, Refusal):
                return reader, result
            after[reader] = result
        refusal = self.worth.gain(before, after)
        if refusal is not None:
            return readers[0], refusal
        inlined = Either(self.plan.inlined, gone)
        common = {v: None for root in gone for v in (root, *absorbed(self.plan.operations, inlined, root))}
        shared = self.plan.spread.keys() | common.keys()
        places: dict[Value, Place] = {}
        for reader, formula in after.items():
            where = place(reader, formula, self.plan.operations, inlined, self.draft.site, self.plan.dead, shared)
            if isinstance(where, Refusal):
                return reader, where
            places[reader] = where
        for reader, formula in after.items():
            self.draft.commit(reader, formula, gone, places[reader])
        for v in common:
            self.plan.spread[v] = readers
        return None
