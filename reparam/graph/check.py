"""Compare a fused region with the operations that it replaces, in float64, on random input of two sizes."""

import copy
from collections.abc import Iterable, Mapping, Set
from typing import Any, Final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine, Conv
from reparam.graph.build import build
from reparam.graph.net import Frame, Value
from reparam.graph.plan_net import NetPlan

TOLERANCE: Final = 1e-9
OUTPUTS: Final = (5, 6)


def region_error(plan: NetPlan, value: Value, formula: Affine) -> float:
    """Largest difference, relative to the magnitudes that are summed, between the formula and the original operations.

    Args:
        plan: of the net.
        value: the fused value.
        formula: its formula, with weights.

    Returns:
        The error; infinity if the shapes differ.
    """
    result = _last_identity(plan, value)
    region = _units([*_region(plan, value), *_between(plan, value, result)], plan.dead)
    modules: dict[int, nn.Module] = {}
    worst = 0.0
    for trial, outputs in enumerate(OUTPUTS):
        generator = torch.Generator().manual_seed(trial)
        inputs: dict[Value, Tensor] = {}
        for root, conv in formula.terms.items():
            assert isinstance(root, Value)
            shape = [2, conv.in_channels or formula.channels or 3]
            axes = conv.axes if conv.in_channels else max(c.axes for c in formula.terms.values())
            shape += [length(conv, axis, outputs, formula, trial) for axis in range(axes)]
            inputs[root] = torch.randn(shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            wanted = _run(region, result, inputs, modules)
            found, magnitude = _evaluate(formula, inputs)
        if wanted.shape != found.shape:
            return float("inf")
        worst = max(worst, float(((wanted - found).abs() / magnitude).max()))
    return worst


def group_error(plan: NetPlan, norm: Value, members: list[Value]) -> float:
    """The same for values that take over a norm through passages: both sides are run through the passages."""
    modules: dict[int, nn.Module] = {}
    formulas = {member: plan.numbers(member) for member in members}
    passages = {v for member in members for wrap in plan.wraps[member] if wrap.norm is norm for v in wrap.passages}
    before = next(wrap.root for wrap in plan.wraps[members[0]] if wrap.norm is norm) is not None
    worst = 0.0
    for trial, outputs in enumerate(OUTPUTS):
        generator = torch.Generator().manual_seed(trial)
        inputs: dict[Value, Tensor] = {}

        def draw(root: Value, conv: Conv, formula: Affine) -> None:
            shape = [2, *([3] if conv.axes == 0 else []), conv.in_channels]
            shape = [2, 3, conv.in_channels] if conv.axes == 0 else [2, conv.in_channels]
            shape += [length(conv, axis, outputs, formula, trial) for axis in range(conv.axes)]
            inputs.setdefault(root, torch.randn(shape, generator=generator, dtype=torch.float64))

        with torch.no_grad():
            if before:
                (member,) = members
                source = next(iter(plan.operations[norm].terms))
                space = plan.known.spaces[norm]
                shape = [2, space.channels, *[outputs + 2] * space.axes] if space.axes else [2, 3, space.channels]
                shape = [2, space.channels] if space.axes == 0 and member.users and _flat(passages) else shape
                start = {source: torch.randn(shape, generator=generator, dtype=torch.float64)}
                wanted = _Evaluation(start, modules).value(member)
                skipped = _Evaluation({**start, norm: start[source]}, modules)
                wrap = next(w for w in plan.wraps[member] if w.norm is norm)
                assert wrap.root is not None
                found, _ = _evaluate(formulas[member], {wrap.root: skipped.value(wrap.root)})
            else:
                for formula in formulas.values():
                    for root, conv in formula.terms.items():
                        assert isinstance(root, Value)
                        draw(root, conv, formula)
                wanted = _Evaluation(inputs, modules).value(norm)
                new: dict[Value, Tensor] = {}
                for member, formula in formulas.items():
                    new[member], _ = _evaluate(formula, {r: inputs[r] for r in formula.terms if isinstance(r, Value)})
                (last,) = plan.operations[norm].terms
                found = _Evaluation({**inputs, **new}, modules).value(last)
        if wanted.shape != found.shape:
            return float("inf")
        worst = max(worst, float((wanted - found).abs().max() / (wanted.abs().max() + 1e-300)))
    return worst


def _flat(passages: Set[Value]) -> bool:
    return not passages


class _Evaluation:
    """Operations of a net, run when their values are asked for."""

    def __init__(self, known: Mapping[Value, Tensor], modules: dict[int, nn.Module]) -> None:
        self.env: dict[Value, Any] = dict(known)
        self.modules = modules

    def value(self, wanted: Value) -> Any:
        pending = [wanted]
        while pending:
            value = pending[-1]
            missing = [v for v in value.inputs if v not in self.env]
            if value in self.env:
                pending.pop()
            elif missing:
                pending += missing
            elif value.node.op == "placeholder":
                raise ValueError(f"{value.name} is not known")
            else:
                self.env[value] = _result(value, self.env, self.modules)
                pending.pop()
        return self.env[wanted]


def length(conv: Conv, axis: int, outputs: int, formula: Affine, trial: int) -> int:
    """Input length that gives enough outputs, every remainder of the stride in turn."""
    wide = max((abs(p) for c in formula.terms.values() for p in (*c.lo, *c.hi)), default=0)
    outputs = outputs + wide
    if conv.transposed or conv.identity:
        return outputs
    s = conv.stride[axis]
    return max(s * (outputs - 1) + 1 - conv.slack[axis] + (trial * (s - 1)), 1)


def _region(plan: NetPlan, value: Value) -> list[Value]:
    inside = {*plan.absorbed(value), value}
    for member in tuple(inside):
        if member in plan.operations:
            inside.update(plan.operations[member].covers)
    return sorted(inside, key=lambda v: v.index)


def _last_identity(plan: NetPlan, value: Value) -> Value:
    """The value behind the operations that hand on ``value`` as it is: with them, whole modules can be run."""
    while len(value.users) == 1:
        (user,) = value.users
        operation = plan.operations.get(user)
        if operation is None or user in plan.inlined or list(operation.terms) != [value]:
            break
        if operation.bias is not None or not operation.terms[value].identity:
            break
        value = user
    return value


def _between(plan: NetPlan, first: Value, last: Value) -> list[Value]:
    found = []
    while last is not first:
        found.append(last)
        (last,) = plan.operations[last].terms
    return found[::-1]


def _units(region: list[Value], dead: Set[Value]) -> list[Value | Frame]:
    """The region as calls: whole modules where all that they do lies within, single operations elsewhere."""
    inside = {*region, *dead}
    whole: dict[Frame, bool] = {}
    units: dict[Value | Frame, None] = {}
    for member in region:
        unit: Value | Frame = member
        frame: Frame | None = member.frame
        while frame is not None and frame.parent is not None:
            if frame not in whole:
                whole[frame] = all(v in inside for v in frame.below())
            result = frame.parent.env.get(frame.call) if frame.call is not None else None
            if not whole[frame] or not isinstance(result, Value) or result not in inside:
                break
            unit, frame = frame, frame.parent
        units[unit] = None
    return list(units)


def _call(frame: Frame, env: Mapping[Value, Any], modules: dict[int, nn.Module]) -> Any:
    """Run a module itself, not what was read of it."""
    arguments = {
        name: _fill(frame.env[frame.trace.inputs[name]], env) if name in frame.trace.inputs else constant
        for name, constant in frame.trace.arguments.items()
    }
    return _copy(frame.module, modules)(**arguments)


def _copy(module: nn.Module, modules: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in modules:
        modules[id(module)] = copy.deepcopy(module).to(device="cpu", dtype=torch.float64)
    return modules[id(module)]


def _run(
    region: Iterable[Value | Frame], value: Value, inputs: Mapping[Value, Tensor], modules: dict[int, nn.Module]
) -> Tensor:
    env: dict[Value, Any] = dict(inputs)
    for member in region:
        if isinstance(member, Frame):
            assert member.parent is not None
            assert member.call is not None
            env[member.parent.env[member.call]] = _call(member, env, modules)
            continue
        env[member] = _result(member, env, modules)
    result: Tensor = env[value]
    return result


def _result(value: Value, env: Mapping[Value, Any], modules: dict[int, nn.Module]) -> Any:
    args, kwargs = _fill(value.args, env), _fill(value.kwargs, env)
    if value.module is not None:
        return _copy(value.module, modules)(*args, **kwargs)
    if value.node.op == "call_method":
        return getattr(args[0], str(value.node.target))(*args[1:], **kwargs)
    function: Any = value.node.target
    return function(*args, **kwargs)


def _fill(argument: Any, env: Mapping[Value, Any]) -> Any:
    if isinstance(argument, Value):
        return env[argument]
    if isinstance(argument, Tensor):
        return argument.detach().to("cpu", torch.float64) if argument.is_floating_point() else argument.cpu()
    if isinstance(argument, tuple):
        return tuple(_fill(a, env) for a in argument)
    if isinstance(argument, list):
        return [_fill(a, env) for a in argument]
    if isinstance(argument, Mapping):
        return {k: _fill(v, env) for k, v in argument.items()}
    return argument


def _evaluate(formula: Affine, inputs: Mapping[Value, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula as torch computes it, and the sum of the magnitudes of its terms."""
    total: Tensor | None = None
    magnitude: Tensor | None = None
    bias = formula.bias
    for root, conv in formula.terms.items():
        assert isinstance(root, Value)
        if conv.identity and len(formula.terms) > 1:
            term = inputs[root]
            sizes = term.abs()
        else:
            module = build(conv, None, dtype=torch.float64, device="cpu")
            term = module(inputs[root])
            with torch.no_grad():
                for weight in module.parameters():
                    weight.abs_()
            sizes = module(inputs[root].abs())
        total = term if total is None else total + term
        magnitude = sizes if magnitude is None else magnitude + sizes
    assert total is not None and magnitude is not None
    if bias is not None:
        shape = (-1, *(1,) * max(conv.axes for conv in formula.terms.values()))
        total = total + bias.double().cpu().reshape(shape)
        magnitude = magnitude + bias.double().cpu().abs().reshape(shape)
    return total, magnitude + magnitude.mean() + torch.finfo(torch.float64).tiny
