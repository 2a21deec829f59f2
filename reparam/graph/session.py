"""From a model to its plan, and from the plan to the fused model."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from reparam.algebra import Affine, Refusal
from reparam.errors import CheckError, ReparamError, TrainingModeError
from reparam.graph.between import boundaries
from reparam.graph.check import TOLERANCE, group_error, region_error
from reparam.graph.emit import Emitter
from reparam.graph.examples import record
from reparam.graph.lift import Known
from reparam.graph.modules import Fused, mixed, modules_of
from reparam.graph.net import Net, Reading, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.options import Options
from reparam.graph.placing import Mode
from reparam.graph.planner import plan_net
from reparam.graph.reader import read
from reparam.graph.reading import reading
from reparam.graph.site import Limits
from reparam.graph.summary import describe, dropped, left
from reparam.graph.swap import State
from reparam.graph.used import makers_only
from reparam.report import Plan
from reparam.verification.verify import verify


@final
class Session:
    """One model, read and planned."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        self.fused: list[Fused] = []
        calls = None if options.example_inputs is None else record(model, options.example_inputs)
        with reading():
            self.reading: Reading = read(model, calls)
            limits = Limits(model, self.reading, options)
            known = [Known.of(net, calls, one_size=options.bias_maps) for net in self.reading.nets]
            nets = zip(self.reading.nets, known, strict=True)
            self.plans = _with_use([self._plan(net, known, limits) for net, known in nets])

    def _plan(self, net: Net, known: Known, limits: Limits) -> NetPlan:
        return plan_net(net, known, self.options.cost, self.options.liftings, limits.movable, limits.site(net))

    def regions(self) -> list[tuple[NetPlan, Value]]:
        """All fused values of all nets."""
        return [(plan, value) for plan in self.plans for value in plan.changed()]

    def summary(self, errors: Mapping[Value, float] | None = None, failed: Iterable[Refusal] = ()) -> Plan:
        """The plan for a reader."""
        regions = [describe(plan, value, (errors or {}).get(value)) for plan, value in self.regions()]
        regions += [dropped(plan, value) for plan in self.plans for value in plan.dropped]
        alone = [*failed, *left(self.reading, self.plans)]
        return Plan(tuple(regions), tuple(alone), self.model, self.options, apply, boundaries(self.plans))

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
                    error, why = float("inf"), f"it cannot be run on random input: {type(problem).__name__}: {problem}"
                for member in members:
                    errors[member] = error
                if not error <= TOLERANCE:
                    failed.append(Refusal("check", why).at(norm.path, norm.name))
                    ready[:] = [fused for fused in ready if fused.value not in members]
        return failed

    def apply(self, check: bool) -> Plan:
        """Fuse the model that was read, in place; nothing is changed before everything was computed and checked."""
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
                refusal = _unfit(plan, value, formula)
                if refusal is None and check and not _is_meta(formula) and value not in plan.wraps:
                    try:
                        errors[value] = region_error(plan, value, formula)
                    except Exception as error:  # user code on input that it was not written for
                        refusal = Refusal("check", f"it cannot be run on random input: {type(error).__name__}: {error}")
                        failed.append(refusal.at(value.path, value.name))
                        continue
                    if not errors[value] <= TOLERANCE:
                        why = _differs(errors[value])
                        refusal = Refusal("check", why)
                if refusal is None:
                    modules = modules_of(plan, value, formula)
                    if isinstance(modules, Refusal):
                        refusal = modules
                    elif not all(_finite(p) for m in modules.values() if m is not None for p in m.parameters()):
                        refusal = Refusal(
                            "finite", "its weights leave the range of their data type", "use a wider data type"
                        )
                    else:
                        ready.append(Fused(plan, value, plan.places[value], modules))
                if refusal is not None:
                    failed.append(refusal.at(value.path, value.name))
        if check:
            failed += self._check_groups(ready, errors)
        summary = self.summary(errors, failed)
        self.fused = _without_entangled(ready)
        unread = [value for plan in self.plans for value in plan.dropped]
        Emitter(self.model, self.reading.nets).apply(self.fused, unread)
        return summary


def _with_use(plans: list[NetPlan]) -> list[NetPlan]:
    """Without the nets that only made weights which become constants: they go with their modules."""
    places = [place for plan in plans for place in plan.places.values()]
    edited = {place.container or place.at.frame for place in places if place.mode is not Mode.SWAP}
    idle = makers_only([plan.net for plan in plans], edited)
    return [plan for plan in plans if plan.net.root.path not in idle]


def _differs(error: float) -> str:
    return f"the fused form differs by {error:.1e}: a bug of this library or of a lifting, please report it"


def _without_entangled(ready: list[Fused]) -> list[Fused]:
    """Regions that share a vanished value stand or fall together."""
    while True:
        present = {fused.value for fused in ready}
        keep = []
        for fused in ready:
            shared = [v for v in fused.plan.absorbed(fused.value) if v in fused.plan.spread]
            needed = {_final(fused.plan, reader) for v in shared for reader in fused.plan.spread[v]}
            needed.update(m for norm, members in fused.plan.groups if fused.value in members for m in members)
            if needed <= present:
                keep.append(fused)
        if len(keep) == len(ready):
            return keep
        ready = keep


def _final(plan: NetPlan, value: Value) -> Value:
    """The materialised value in which ``value`` ends up."""
    while value in plan.inlined:
        value = next(
            reader for reader in value.users if reader in plan.operations and value in plan.operations[reader].terms
        )
    return value


def _unfit(plan: NetPlan, value: Value, formula: Affine) -> Refusal | None:
    """Why the numbers of a region do not allow what its structure does."""
    tensors = [conv.weight for conv in formula.terms.values() if conv.weight is not None]
    if formula.bias is not None:
        tensors.append(formula.bias)
    if not all(_finite(tensor) for tensor in tensors):
        return Refusal("finite", "its weights are not finite", "repair the weights")
    return None


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(torch.isfinite(tensor).all())


def _is_meta(formula: Affine) -> bool:
    return any(conv.weight is not None and conv.weight.is_meta for conv in formula.terms.values())


def refuse_bad_model(model: object) -> None:
    """Raise if a model cannot be fused at all."""
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected an nn.Module, found {type(model).__name__}: pass the model itself")
    exported = isinstance(model, fx.GraphModule) and "eval" in vars(model)  # has no eval(): its mode is in its graph
    if model.training and not exported:
        raise TrainingModeError(
            f"expected a model in eval mode, found {type(model).__name__} in training mode, where batch norms use the"
            " statistics of the batch: call model.eval() first"
        )


def apply(model: nn.Module, options: Options, *, inplace: bool, check: bool) -> nn.Module:
    """Fuse a model, and compare the result with it on the example inputs, if there are any."""
    refuse_bad_model(model)
    target = model if inplace else copy.deepcopy(model)
    compared = check and options.example_inputs is not None and not any(t.is_meta for t in model.parameters())
    original = copy.deepcopy(model) if compared and inplace else model
    before = [State(module) for module in target.modules()]
    Session(target, options).apply(check)
    if compared:
        try:
            _refuse_difference(original, target, options.example_inputs)
        except BaseException:
            for state in before:
                state.restore()
            raise
    for module in target.modules():
        if isinstance(module, DistributedDataParallel):
            reducer: Any = module
            reducer.__setstate__(reducer.__getstate__())  # its reducer refers to the parameters it was made with
    return target


def _refuse_difference(model: nn.Module, fused: nn.Module, example_inputs: Any) -> None:
    result = verify(model, fused, example_inputs)
    if not result.ok:
        raise CheckError(
            f"expected the fused model to compute what {type(model).__name__} computes, found another result on the"
            f" example inputs (a: the model, b: fused), so nothing was fused: {result}\n"
            "pass check=False to fuse all the same, or exclude= the module where they part",
            result,
        )
