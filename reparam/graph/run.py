"""Run operations of a net, and formulas, in float64 on the CPU."""

import copy
from collections.abc import Iterable, Mapping, Set
from typing import Any, final

import torch
from torch import Tensor, nn

from reparam.algebra import Affine
from reparam.graph.build import build
from reparam.graph.calls import name_of
from reparam.graph.channels import SPLITS
from reparam.graph.net import Frame, Value
from reparam.graph.sizes import is_plain


@final
class Evaluation:
    """Operations of a net, run when their values are asked for."""

    def __init__(self, known: Mapping[Value, Tensor], modules: dict[int, nn.Module]) -> None:
        self.env: dict[Value, Any] = dict(known)
        self.modules = modules

    def value(self, wanted: Value) -> Any:
        """The value, with everything that it depends on."""
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


def units(region: list[Value], dead: Set[Value]) -> list[Value | Frame]:
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


def run(
    region: Iterable[Value | Frame], value: Value, inputs: Mapping[Value, Tensor], modules: dict[int, nn.Module]
) -> Tensor:
    """The value that a region gives for ``inputs``."""
    env: dict[Value, Any] = {
        root: tensor.clone() for root, tensor in inputs.items()
    }  # some operations write their input
    for member in region:
        if isinstance(member, Frame):
            assert member.parent is not None
            assert member.call is not None
            env[member.parent.env[member.call]] = _call(member, env, modules)
            continue
        for number in member.inputs:
            if number not in env and (is_plain(number) or name_of(number) in SPLITS):
                env[number] = Evaluation(env, modules).value(number)
        env[member] = _result(member, env, modules)
    result: Tensor = env[value]
    return result


def evaluate(formula: Affine, inputs: Mapping[Value, Tensor]) -> tuple[Tensor, Tensor]:
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
    assert total is not None
    assert magnitude is not None
    if bias is not None:
        shape = bias.shape if bias.dim() > 1 else (-1, *(1,) * max(conv.axes for conv in formula.terms.values()))
        total = total + bias.double().cpu().reshape(shape)
        magnitude = magnitude + bias.double().cpu().abs().reshape(shape)
    return total, magnitude + magnitude.mean() + torch.finfo(torch.float64).tiny


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
    if isinstance(argument, slice):
        return slice(_fill(argument.start, env), _fill(argument.stop, env), _fill(argument.step, env))
    if isinstance(argument, Mapping):
        return {k: _fill(v, env) for k, v in argument.items()}
    return argument
