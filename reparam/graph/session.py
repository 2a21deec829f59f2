"""From a model to its plan, and from the plan to the fused model."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from reparam.algebra import Affine, Refusal
from reparam.cost import affine_work
from reparam.errors import CheckError, ReparamError, TrainingModeError
from reparam.graph.check import TOLERANCE, group_error, region_error
from reparam.graph.effects import Effects
from reparam.graph.entries import EntryPoints, variants
from reparam.graph.emit import STOCK, Emitter, Fused, carried, mixed, modules_of
from reparam.graph.examples import record
from reparam.graph.lift import Known
from reparam.graph.net import Frame, Net, Reading, Value, hooks, is_leaf, read
from reparam.graph.options import Options
from reparam.graph.placing import Mode, Place, Site
from reparam.graph.plan_net import NetPlan, plan_net
from reparam.graph.source import fixed_signature
from reparam.graph.spaces import infer
from reparam.graph.trace import reading
from reparam.report import Plan, Region

@final
class Session:
    """One model, read and planned."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        calls = None if options.example_inputs is None else record(model, options.example_inputs)
        self._editable: dict[Frame, str] = {}
        self.entries = EntryPoints()
        with reading():
            self.reading: Reading = read(model, calls)
            self._exposed = _exposed(self.reading)
            self._read_by_unread = {
                f"{path}.{name.rpartition('.')[0]}" if path else name.rpartition(".")[0]: path or "the model"
                for path, unread in self.reading.unread.items()
                for name in unread.read
                if "." in name
            }
            self.plans = [self._plan(net) for net in self.reading.nets]

    def _plan(self, net: Net) -> NetPlan:
        calls = net.calls()
        exposed = self._exposed
        known = Known(infer(net), Effects(net))

        def movable(value: Value) -> str:
            module = value.module
            if module is not None and self.options.excludes(value.path, module):
                return "the module is excluded"
            if module is not None and value.path in self._read_by_unread:
                return f"its parameters are read by the forward of {self._read_by_unread[value.path]}"
            if self.options.exclude and self._excluded_frame(value.frame):
                return "the module is excluded"
            return ""

        def replaceable(value: Value) -> str:
            if value.module is None or value.shared or value.frame.repeated or calls[id(value.module)] > 1:
                return "the module is called in several places"
            return movable(value)

        def container(frame: Frame) -> str:
            if hooks(frame.module) or frame.repeated or calls[id(frame.module)] > 1:
                return "the module has hooks or is called in several places"
            if frame.trace.modes:
                return "its forward changes the autocast or gradient mode"
            parameters = list(inspect.signature(frame.module.forward).parameters.values())
            if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
                return "its forward takes more than one argument"
            if _entangled(frame.path, exposed):
                return "its parameters are read elsewhere"
            taken = {"stride", "padding", "dilation", "groups", "kernel_size", "bias", "weight", "in_channels", "out_channels"}
            if not isinstance(frame.module, STOCK) and taken & carried(frame.module).keys():
                return "the module has attributes of the same names as a convolution"
            return ""

        site = Site(self._not_passable, self._crossing, self._is_exposed, replaceable, container)
        return plan_net(net, known, self.options.cost, self.options.liftings, movable, site)

    def _excluded_frame(self, frame: Frame | None) -> bool:
        while frame is not None:
            if self.options.excludes(frame.path, frame.module):
                return True
            frame = frame.parent
        return False

    def _not_passable(self, value: Value) -> str:
        entry = self.entries.of(value.frame, value.node)
        if entry:
            return f"it stands in {entry}, which can be called by itself"
        return self._why_not_editable(value.frame)

    def _crossing(self, values: Iterable[Value]) -> str:
        """An entry point of a module that some of the values are computed in, and others are not."""
        values = list(values)
        found: dict[Frame, str] = {}
        steps: dict[Frame, dict[fx.Node, None]] = {}
        for value in values:
            frame: Frame | None = value.frame
            node: fx.Node | None = value.node
            while frame is not None and node is not None:
                entry = self.entries.of(frame, node)
                if found.setdefault(frame, entry) != entry:
                    return f"{entry or found[frame]} of {frame.path or 'the model'} can be called by itself"
                steps.setdefault(frame, {})[node] = None
                frame, node = frame.parent, frame.call
        for frame, nodes in steps.items():
            if len(nodes) < 2:
                if frame.trace.specialised and len(next(iter(nodes)).users) and frame not in _common(values):
                    return f"the forward of {frame.path or 'the model'} was read for the sizes of the example inputs only"
                continue
            if frame.trace.specialised:
                return f"the forward of {frame.path or 'the model'} was read for the sizes of the example inputs only"
            entry = found[frame]
            apart = self.entries.apart(frame, entry, list(nodes))
            if apart:
                return apart
            names = {str(node.target).partition(".")[0] for node in nodes if node.op == "call_module"}
            for method, read_names in self.entries.beside(frame).items():
                if names & read_names and not names <= read_names:
                    return f"the method {method} of {frame.path or 'the model'} uses some of them"
        return ""

    def _is_exposed(self, values: Iterable[Value], covered: Iterable[Value], where: Place) -> str:
        """A forward that reads parameters of what vanishes, and that goes on doing so."""
        values = list(values)
        members = {*values, *covered}
        edited = where.at.frame if where.mode is Mode.EDIT else None
        for value in values:
            for reader in self._exposed.get(value.path, ()) if value.module is not None else ():
                vanishes = where.mode is not Mode.SWAP and reader is not edited
                vanishes = vanishes and (reader is where.container or _is_below(reader, where.container or edited))
                vanishes = vanishes and all(v in members or not v.users for v in reader.below())
                if not vanishes and (reader is not edited or _still_reads(reader, members)):
                    return f"the parameters of {value.path} are read by the forward of {reader.path or 'the model'}"
        return ""

    def _why_not_editable(self, frame: Frame) -> str:
        if frame not in self._editable:
            self._editable[frame] = self._fixed(frame)
        return self._editable[frame]

    def _fixed(self, frame: Frame) -> str:
        if frame.repeated:
            return "its module is called in several places"
        if frame.trace.modes:
            return "its forward changes the autocast or gradient mode"
        if frame.trace.specialised:
            return "its forward was read for the sizes of the example inputs only"
        if frame.trace.cache:
            return f"its forward fills {frame.trace.cache}"
        if isinstance(frame.module, fx.GraphModule):
            return ""
        reason = fixed_signature(frame.module)
        if reason:
            return reason
        if "__reduce__" in vars(type(frame.module)) or "__reduce_ex__" in vars(type(frame.module)):
            if not hasattr(type(frame.module), "_reparam_source"):
                return "its class has its own way to be pickled"
        return self._depends_on_options(frame)

    def _depends_on_options(self, frame: Frame) -> str:
        """Whether the forward does something else for other values of its optional arguments."""
        for name, _ in variants(frame):
            return f"its forward depends on the optional argument {name}"
        return ""

    # -- the plan ---------------------------------------------------------------------------------------------------

    def regions(self) -> list[tuple[NetPlan, Value]]:
        """All fused values of all nets."""
        return [(plan, value) for plan in self.plans for value in plan.changed()]

    def summary(self, errors: Mapping[Value, float] | None = None, failed: Iterable[Refusal] = ()) -> Plan:
        """The plan for a reader."""
        regions = [_describe(plan, value, (errors or {}).get(value)) for plan, value in self.regions()]
        left = [*failed, *self.left()]
        return Plan(tuple(regions), tuple(left), self.model, self.options, apply)

    def left(self) -> list[Refusal]:
        """Everything left alone that could have been expected to fuse."""
        found: dict[tuple[str, str, str], Refusal] = {}

        def add(refusal: Refusal) -> None:
            found.setdefault((refusal.path, refusal.rule, refusal.condition), refusal)

        for path, unread in self.reading.unread.items():
            add(Refusal("unread", str(unread), "see the line that stopped it", path=path))
        for path, reason in self.reading.opaque.items():
            add(Refusal("opaque", reason, "call it once, without hooks", path=path))
        for plan in self.plans:
            covered = {c for operation in plan.operations.values() for c in operation.covers}
            for value, refusal in plan.boundaries.items():
                if value in covered:
                    continue
                if refusal.rule not in ("scale", "layout", "constant_add", "slice") or value.module is not None:
                    add(refusal)
            for (value, reader), refusal in plan.refusals.items():
                gone = value in plan.inlined or reader in plan.inlined or _hands_on(plan, value) or _hands_on(plan, reader)
                if not gone and refusal.rule != "boundary" and value in plan.formulas[reader].terms:
                    add(refusal)
            for value, operation in plan.operations.items():
                if operation.norm and value not in plan.inlined and value not in plan.places:
                    add(plan.alone.get(value) or _lonely(plan, value))
        return list(found.values())

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
                    why = f"the fused form differs by {error:.1e}: a bug of this library, please report it"
                except Exception as problem:  # user code on input that it was not written for
                    error, why = float("inf"), f"it cannot be run on random input: {type(problem).__name__}: {problem}"
                for member in members:
                    errors[member] = error
                if not error <= TOLERANCE:
                    failed.append(Refusal("check", why).at(norm.path, norm.name))
                    ready[:] = [fused for fused in ready if fused.value not in members]
        return failed

    # -- the model --------------------------------------------------------------------------------------------------

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
                        why = f"the fused form differs by {errors[value]:.1e}: a bug of this library, please report it"
                        refusal = Refusal("check", why)
                if refusal is None:
                    modules = modules_of(plan, value, formula)
                    if isinstance(modules, Refusal):
                        refusal = modules
                    elif not all(_finite(p) for m in modules.values() if m is not None for p in m.parameters()):
                        refusal = Refusal("finite", "its weights leave the range of their data type", "use a wider data type")
                    else:
                        ready.append(Fused(plan, value, plan.places[value], modules, errors.get(value)))
                if refusal is not None:
                    failed.append(refusal.at(value.path, value.name))
        if check:
            failed += self._check_groups(ready, errors)
        summary = self.summary(errors, failed)
        Emitter(self.model, self.reading.nets).apply(_without_entangled(ready))
        return summary


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
        value = next(reader for reader in value.users if reader in plan.operations and value in plan.operations[reader].terms)
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


def _describe(plan: NetPlan, value: Value, error: float | None) -> Region:
    members = [*plan.absorbed(value), value, *(wrap.norm for wrap in plan.wraps.get(value, ()))]
    before = [plan.operations[v] for v in members]
    formula = plan.formulas[value]
    work_before = [affine_work(op.structure, plan.sizes, plan.sizes[v]) for op, v in zip(before, members, strict=True)]
    work_after = affine_work(formula, plan.sizes, plan.sizes[value])
    scale = plan.sizes[value] or 1.0
    place = plan.places[value]
    path = place.container.path if place.container is not None else place.at.path
    after = []
    for conv in formula.terms.values():
        if conv.identity:
            after.append("its input")
        elif conv.axes == 0:
            after.append(f"linear {conv.in_channels} -> {conv.out_channels}")
        else:
            kind = "transposed conv" if conv.transposed else "conv"
            extras = "".join(
                f", {name} {'x'.join(map(str, got))}"
                for name, got in (("stride", conv.stride), ("dilation", conv.dilation))
                if set(got) != {1}
            )
            groups = f", groups {conv.groups}" if conv.groups > 1 else ""
            after.append(f"{kind} {'x'.join(map(str, conv.kernel))}{extras}{groups}")
    return Region(
        path=path,
        before=tuple(op.label for op in before if op.label != "identity"),
        after=tuple(after),
        params_before=sum(_parameters(v) for v in members),
        params_after=work_after.parameters,
        macs_before=sum(work.macs for work in work_before) / scale,
        macs_after=work_after.macs / scale,
        how=place.mode.value,
        error=error,
    )


def _hands_on(plan: NetPlan, value: Value) -> bool:
    """Whether an operation returns its input, so that nothing is lost by leaving it."""
    terms = plan.operations[value].terms.values()
    return len(terms) == 1 and plan.operations[value].bias is None and all(conv.identity for conv in terms)


def _parameters(value: Value) -> int:
    """Parameters of an operation; norm statistics are none."""
    if value.module is not None:
        return sum(p.numel() for p in value.module.parameters())
    tensors = {id(t): t for t in (*value.args, *value.kwargs.values()) if isinstance(t, nn.Parameter)}
    return sum(t.numel() for t in tensors.values())


def _lonely(plan: NetPlan, value: Value) -> Refusal:
    """Why a norm stays."""
    for (source, reader), refusal in plan.refusals.items():
        if refusal.rule != "boundary" and (source is value or reader is value):
            return refusal.at(value.path, source.name, reader.name)
    sources = ", ".join(f"{v.name} at {v.path or 'the root'}" for v in value.inputs)
    users = ", ".join(sorted({f"{v.name}" for v in value.users})) or "the caller"
    return Refusal(
        "norm", f"its input ({sources}) and its readers ({users}) are not linear", path=value.path, operands=(value.name,)
    )


def _exposed(reading: Reading) -> Mapping[str, list[Frame]]:
    """Modules whose parameters are read by a forward that is not their own, with the readers."""
    found: dict[str, list[Frame]] = {}
    for net in reading.nets:
        for frame in net.frames:
            for name in {name.rpartition(".")[0] for name in frame.trace.read.values() if "." in name}:
                found.setdefault(f"{frame.path}.{name}" if frame.path else name, []).append(frame)
    return found


def _common(values: Iterable[Value]) -> set[Frame]:
    """Frames that all values stand in or below."""
    common: set[Frame] | None = None
    for value in values:
        chain: set[Frame] = set()
        frame: Frame | None = value.frame
        while frame is not None:
            chain.add(frame)
            frame = frame.parent
        common = chain if common is None else common & chain
    return common or set()


def _is_below(frame: Frame | None, other: Frame | None) -> bool:
    """Whether ``frame`` is a call within ``other``."""
    while frame is not None and frame is not other:
        frame = frame.parent
    return frame is not None


def _still_reads(reader: Frame, members: set[Value]) -> bool:
    """Whether operations outside of a region use parameters of children, or tensors computed from parameters."""
    nodes = {value.node for value in members if value.frame is reader}
    found: list[fx.Node] = []
    for node in reader.trace.graph.nodes:
        if node.op == "get_attr" and (str(node.target).startswith("_constant") or "." in str(node.target)):
            found += [user for user in node.users if user not in nodes]
    return bool(found)


def _entangled(path: str, exposed: Mapping[str, list[Frame]]) -> bool:
    """Whether something below ``path`` is read from outside of it."""
    inside = path + "."
    return any(
        (name == path or name.startswith(inside)) and any(not (f.path + ".").startswith(inside) for f in frames)
        for name, frames in exposed.items()
    )


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
    """Fuse a model."""
    refuse_bad_model(model)
    target = model if inplace else copy.deepcopy(model)
    Session(target, options).apply(check)
    for module in target.modules():
        if isinstance(module, DistributedDataParallel):
            module.__setstate__(module.__getstate__())  # its reducer refers to the parameters it was made with
    return target
