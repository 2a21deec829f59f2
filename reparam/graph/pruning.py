"""Take back, of a step that pays, what did not contribute."""

from collections.abc import Mapping
from typing import final

from reparam.algebra import Affine, Refusal
from reparam.graph.draft import Draft
from reparam.graph.net import Value
from reparam.graph.operation import absorbed
from reparam.graph.worth import EPSILON, Worth


@final
class Pruning:
    """Makes steps smaller where that costs nothing."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth

    def prune(self, reader: Value, chosen: dict[Value, None], formula: Affine) -> tuple[dict[Value, None], Affine]:
        """Take back summands that share no input with another one, where that costs nothing."""
        for value in self._alone(reader, chosen):
            inside = {value, *absorbed(self.plan.operations, chosen, value)}
            fewer = {v: None for v in chosen if v not in inside}
            rebuilt = self.rebuild(reader, fewer)
            if rebuilt is None:
                continue
            with_it = self.worth.total({reader: formula})
            without = self.worth.total({reader: rebuilt, **{v: self.plan.formulas[v] for v in chosen if v in inside}})
            if without <= with_it * (1 + EPSILON):
                chosen, formula = fewer, rebuilt
        return chosen, formula

    def in_order(self, reader: Value, chosen: dict[Value, None], formula: Affine) -> tuple[dict[Value, None], Affine]:
        """A step that would need another order of the axes, without the first values, which bring that about."""
        if not any(conv.order is not None for conv in formula.terms.values()):
            return chosen, formula
        turned = {v for v in chosen if any(conv.order is not None for conv in self.plan.operations[v].terms.values())}
        fewer = {v: None for v in chosen if v not in turned}
        rebuilt = self.rebuild(reader, fewer) if fewer else None
        return (chosen, formula) if rebuilt is None else (fewer, rebuilt)

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
            hands_on = (
                len(formula.terms) == 1 and not formula.biased and all(c.identity for c in formula.terms.values())
            )
            if (
                hands_on
                and value not in inside
                and all(r not in chosen and paths[r] == paths[value] for r in formula.terms)
            ):
                found.append(value)  # the last of a chain: without it the chain reads its result instead
        return found

    def rebuild(self, reader: Value, chosen: Mapping[Value, None]) -> Affine | None:
        """The formula of ``reader`` with all of ``chosen`` put in; None if that is not possible."""
        formula = self.plan.formulas[reader]
        done: dict[Value, None] = {}
        while True:
            ready = [r for r in formula.terms if isinstance(r, Value) and r in chosen]
            if not ready:
                return formula if len(done) == len(chosen) else None
            root = max(ready, key=lambda r: r.index)  # all its readers were replaced before
            result = self.draft.inline(formula, root, reader, done)
            if isinstance(result, Refusal):
                return None
            formula = result
            done[root] = None
