"""From a model to its plan, and from the plan to the fused model."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Refusal
from reparam.algebra.groups import rows
from reparam.graph.check import TOLERANCE, group_error, region_error
from reparam.graph.emit import Emitter
from reparam.graph.examples import record
from reparam.graph.filling import empty, fill
from reparam.graph.lift import Known
from reparam.graph.lift.declared import declared_in
from reparam.graph.modules import Fused, built, kind_of_weights, mixed
from reparam.graph.net import Net, Reading, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.options import Options
from reparam.graph.placing import Mode
from reparam.graph.planner import plan_net
from reparam.graph.reader import read
from reparam.graph.reading import reading
from reparam.graph.reports import Reports
from reparam.graph.site import Limits
from reparam.graph.unread import first_line
from reparam.graph.used import makers_only
from reparam.report import Plan, Receipt


@final
class Session:
    """One model, read and planned."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        self.fused: list[Fused] = []
        calls = None if options.example_inputs is None else record(model, options.example_inputs)
        with reading():
            self.reading: Reading = read(model, calls, declared_in(options.liftings))
            limits = Limits(model, self.reading, options)
            self.plans = _with_use(
                [self._plan(net, Known.of(net, calls, one_size=options.bias_maps), limits) for net in self.reading.nets]
            )
        self._reports = Reports(model, options, self.reading, self.plans, calls)

    def _plan(self, net: Net, known: Known, limits: Limits) -> NetPlan:
        return plan_net(net, known, self.options.cost, self.options.liftings, limits.movable, limits.site(net))

    def regions(self) -> list[tuple[NetPlan, Value]]:
        """All fused values of all nets."""
        return [(plan, value) for plan in self.plans for value in plan.changed()]

    def plan(self) -> Plan:
        """The plan for a reader."""
        return self._reports.plan()

    def _check_groups(self, ready: list[Fused], errors: dict[Value, float]) -> list[Refusal]:
        """Check the values that took over a norm through passages; those that fail are taken out of ``ready``."""
        failed = []
        values = {fused.value for fused in ready}
        for plan in self.plans:
            for norm, members in plan.groups:
                if not values.issuperset(members) or any(_is_meta(plan.numbers(m)) for m in members):
                    continue
                try:
                    error = group_error(plan, norm, members)
                    why = _differs(error)
                except Exception as problem:  # user code on input that it was not written for
                    error, why = float("inf"), f"it cannot be run on random input: {first_line(problem)}"
                for member in members:
                    errors[member] = error
                if not error <= TOLERANCE:
                    failed.append(Refusal("check", why).at(norm.path, norm.name))
                    ready[:] = [fused for fused in ready if fused.value not in members]
        return failed

    def apply(self, check: bool, *, one_by_one: bool = False) -> Receipt:
        """Fuse the model that was read, in place; nothing is changed before everything was computed and checked.

        Args:
            check: whether regions are checked.
            one_by_one: weights are computed twice, and the second time each region frees what it replaces; the session
                cannot be used any more.
        """
        ready: list[Fused] = []
        failed: list[Refusal] = []
        errors: dict[Value, float] = {}
        with torch.no_grad():
            for plan, value in self.regions():
                refusal = mixed(plan, value)
                if refusal is not None:
                    failed.append(refusal.at(value.path, value.name))
                    continue
                formula = plan.numbers(value)
                kind = kind_of_weights(plan, value)
                if isinstance(kind, Refusal):
                    failed.append(kind.at(value.path, value.name))
                    continue
                checked = check and not _is_meta(formula) and value not in plan.wraps
                if checked:
                    formula = formula.computed()
                modules = built(formula, kind)
                refusal = _unfit(formula, modules)
                if refusal is None and checked:
                    try:
                        errors[value] = region_error(plan, value, formula)
                    except Exception as error:  # user code on input that it was not written for
                        refusal = Refusal("check", f"it cannot be run on random input: {first_line(error)}")
                        failed.append(refusal.at(value.path, value.name))
                        continue
                    if not errors[value] <= TOLERANCE:
                        why = _differs(errors[value])
                        refusal = Refusal("check", why)
                if refusal is None:
                    ready.append(Fused(plan, value, plan.places[value], modules, kind))
                    if one_by_one:
                        empty(ready[-1])
                else:
                    failed.append(refusal.at(value.path, value.name))
        if check:
            failed += self._check_groups(ready, errors)
        self.fused = _without_entangled(ready, self.plans)
        together = "it shares operations with a region that is left alone"
        kept = {fused.value for fused in self.fused}
        for fused in ready:
            if fused.value not in kept:
                refusal = Refusal("together", together)
                failed.append(refusal.at(fused.value.path, fused.value.name))
        receipt = self._reports.receipt(self.fused, errors, failed)
        unread = [value for plan in self.plans for value in plan.dropped]
        Emitter(self.model, self.reading.nets).apply(self.fused, unread)
        if one_by_one:
            with torch.no_grad():
                fill(self.fused, self.reading.nets)
        return receipt


def _with_use(plans: list[NetPlan]) -> list[NetPlan]:
    """Without the nets that only made weights which become constants: they go with their modules."""
    places = [place for plan in plans for place in plan.places.values()]
    edited = {place.container or place.frame for place in places if place.mode is not Mode.SWAP}
    idle = makers_only([plan.net for plan in plans], edited)
    return [plan for plan in plans if plan.net.root.path not in idle]


def _differs(error: float) -> str:
    return f"the fused form differs by {error:.1e}: a bug of this library or of a lifting, please report it"


def _without_entangled(ready: list[Fused], plans: Iterable[NetPlan]) -> list[Fused]:
    """Regions that share a vanished value, or a norm that they took over, stand or fall together."""
    needs = _needs(plans)
    while True:
        present = {fused.value for fused in ready}
        keep = [fused for fused in ready if needs[fused.value] <= present]
        if len(keep) == len(ready):
            return keep
        ready = keep


def _needs(plans: Iterable[NetPlan]) -> Mapping[Value, set[Value]]:
    """All regions that must be fused if one is, by its value."""
    needs: defaultdict[Value, set[Value]] = defaultdict(set)
    for plan in plans:
        sharers: defaultdict[Value, list[Value]] = defaultdict(list)
        for value in plan.changed():
            for vanished in plan.absorbed(value):
                sharers[vanished].append(value)
        for together in (*sharers.values(), *(members for _, members in plan.groups)):
            for value in together:
                needs[value].update(together)
    return needs


def _unfit(formula: Affine, modules: Mapping[Value, nn.Module | None]) -> Refusal | None:
    """Why the numbers of a region do not allow what its structure does."""
    if all(_finite(p) for module in modules.values() if module is not None for p in module.parameters()):
        return None
    tensors = [rows(conv) for conv in formula.terms.values() if not conv.identity]
    if formula.bias is not None:
        tensors.append(formula.bias)
    if not all(_finite(tensor) for tensor in tensors):
        return Refusal("finite", "its weights are not finite", "repair the weights")
    return Refusal("finite", "its weights leave the range of their data type", "use a wider data type")


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or bool(torch.isfinite(tensor.sum())):  # a sum with a number that is not finite is not finite
        return True
    return bool(torch.isfinite(tensor).all())


def _is_meta(formula: Affine) -> bool:
    return any(conv.weight is not None and conv.weight.is_meta for conv in formula.terms.values())
