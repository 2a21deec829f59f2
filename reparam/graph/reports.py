"""Plans and receipts of a model that was read and planned."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from torch import nn

from reparam.algebra import Refusal
from reparam.graph.between import boundaries
from reparam.graph.example_shapes import all_shapes
from reparam.graph.examples import Call
from reparam.graph.left import left, near_first
from reparam.graph.modules import Fused
from reparam.graph.net import Reading, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.options import Options
from reparam.graph.shapes import Shape
from reparam.graph.summary import Describer
from reparam.graph.wire import wire
from reparam.report import Plan, Receipt, Region


@final
class Reports:
    """Makes the reports of one model.

    Args:
        model: the model, before it is changed.
        options: how it was planned.
        reading: what was read of it.
        plans: the plans of its nets.
        calls: what a run on the example inputs saw; None without them.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        reading: Reading,
        plans: Sequence[NetPlan],
        calls: Mapping[str, list[Call]] | None,
    ) -> None:
        self.model = model
        self.options = options
        self.reading = reading
        self.plans = plans
        self.calls = calls

    def plan(self) -> Plan:
        """What would be done."""
        changed = [(plan, value) for plan in self.plans for value in plan.changed()]
        regions = self._describe(changed, {})
        alone = tuple(left(self.reading, self.plans, self.options.cost))
        wiring = wire(self.plans, [*changed, *self._unread()])
        return Plan(*self._common(regions, alone), wiring, self.model, self.options)

    def receipt(self, done: Sequence[Fused], errors: Mapping[Value, float], failed: Sequence[Refusal]) -> Receipt:
        """What is done; ``failed``: what only weights show."""
        regions = self._describe([(fused.plan, fused.value) for fused in done], errors)
        marked = [replace(refusal, near=bool(refusal.remedy)) for refusal in failed]
        alone = tuple(near_first([*marked, *left(self.reading, self.plans, self.options.cost)]))
        return Receipt(*self._common(regions, alone))

    def _common(
        self, regions: tuple[Region, ...], alone: tuple[Refusal, ...]
    ) -> tuple[tuple[Region, ...], tuple[Refusal, ...], str, Mapping[str, str], tuple[Refusal, ...]]:
        kind = type(self.model).__name__
        return regions, alone, kind, self._modules(regions, alone), boundaries(self.plans)

    def _unread(self) -> list[tuple[NetPlan, Value]]:
        """Norms whose value nothing reads: they go."""
        return [(plan, value) for plan in self.plans for value in plan.dropped]

    def _describe(self, regions: Sequence[tuple[NetPlan, Value]], errors: Mapping[Value, float]) -> tuple[Region, ...]:
        shapes: dict[Value, Shape] = {}
        for plan in self.plans if self.calls is not None else ():
            shapes |= all_shapes(plan.net, self.calls or {})
        describer = Describer(shapes)
        return tuple(describer.region(p, value, errors.get(value)) for p, value in (*regions, *self._unread()))

    def _modules(self, regions: tuple[Region, ...], alone: tuple[Refusal, ...]) -> dict[str, str]:
        """Classes of the modules in which regions and refusals stand, and of those around them."""
        wanted = {""}
        for path in {*(region.path for region in regions), *(refusal.path for refusal in alone)}:
            names = path.split(".")
            wanted.update(".".join(names[:depth]) for depth in range(1, len(names) + 1))
        modules = self.model.named_modules(remove_duplicate=False)
        return {path: type(module).__name__ for path, module in modules if path in wanted}
