"""Steps that pay only together with what lies behind them.

A step is looked at alone first. Where it saves nothing by itself, what lies behind it is put in, too, one value at a
time, the last one first, and the best that is found on the way counts. A search ends ``PATIENCE`` values behind the
last gain, so that a net is planned in a time that grows with its length alone.
"""

from collections.abc import Mapping
from typing import Final, final

from reparam.algebra import Affine
from reparam.graph.draft import Draft
from reparam.graph.net import Value
from reparam.graph.worth import Worth

PATIENCE: Final = 12  # values


@final
class Behind:
    """Looks behind steps that do not pay by themselves."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth

    def steps(self, reader: Value, seed: Value) -> tuple[dict[Value, None], Affine] | None:
        """The values that should disappear into ``reader``, ``seed`` among them, and its formula then."""
        formula, chosen = self.plan.formulas[reader], dict[Value, None]()
        best: tuple[dict[Value, None], Affine] | None = None
        most, idle = 0.0, 0
        behind = {seed}
        refused: set[Value] = set()
        while idle < PATIENCE:
            candidates = [r for r in behind if r in formula.terms and r not in refused and self.draft.ok(r)]
            if not candidates:
                break
            root = max(candidates, key=lambda value: value.index)
            idle += 1
            found = self._step(formula, root, reader, chosen)
            if found is None:
                refused.add(root)
                continue
            before = len(chosen)
            formula, more = found
            chosen |= more
            behind |= {r for v in more for r in self.plan.formulas[v].terms if isinstance(r, Value)}
            if len(chosen) > before:
                refused.clear()
            if any(conv.order is not None for conv in formula.terms.values()):
                continue
            saved = self.worth.saved({v: self.plan.formulas[v] for v in (*chosen, reader)}, {reader: formula})
            if saved > most:
                best, most, idle = (dict(chosen), formula), saved, 0
        return best

    def _step(
        self, formula: Affine, root: Value, reader: Value, chosen: Mapping[Value, None]
    ) -> tuple[Affine, dict[Value, None]] | None:
        """One more value put in; one whose border stands in the way together with the paddings that belong to it."""
        more = dict(chosen)
        result, refusal = self.draft.step(formula, root, reader, more)
        if refusal is None:
            return result, more
        if refusal.rule != "border_rule":
            return None
        padded, pads = self._with_pads(root)
        if not pads:
            return None
        more = {**chosen, **pads}
        result, refusal = self.draft.step(formula, root, reader, more, padded)
        return None if refusal is not None else (result, more)

    def _with_pads(self, value: Value) -> tuple[Affine, dict[Value, None]]:
        """The formula of a value with the paddings and crops in front of it put in."""
        formula, pads = self.plan.formulas[value], dict[Value, None]()
        while len(formula.terms) == 1 and len(pads) < PATIENCE:
            (root,) = formula.terms
            if not isinstance(root, Value) or not self.draft.ok(root):
                break
            inner = self.plan.formulas[root]
            windows = len(inner.terms) == 1 and all(c.taps == 1 and not c.pointwise for c in inner.terms.values())
            if not windows or inner.biased:
                break
            formula, refusal = self.draft.step(formula, root, value, pads)
            if refusal is not None:
                break
        return formula, pads
