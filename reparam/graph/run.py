"""Run operations of a net in float64 on the CPU.

A transposed convolution gives as many results as its own settings say: a size that it is asked for belongs to the whole
net, and adds or cuts results at the end alone.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, final

import torch
from torch import Tensor, nn

from reparam.graph.calls import name_of
from reparam.graph.channels import SPLITS
from reparam.graph.clones import precise_copy, precise_tensor
from reparam.graph.kinds import asks_size
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
            missing = [v for v in _needed(value) if v not in self.env]
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
                whole[frame] = all(v in inside for v in frame.below()) and not _computes_weights(frame)
            result = frame.parent.env.get(frame.call) if frame.call is not None else None
            if not whole[frame] or not isinstance(result, Value) or result not in inside:
                break
            unit, frame = frame, frame.parent
        units[unit] = None
    return list(units)


def _computes_weights(frame: Frame) -> bool:
    """Whether a call computes constants that were rounded when it was read: run in float64, it has others."""
    made = (tensor for name, tensor in frame.trace.tensors.items() if name.startswith("_constant"))
    rounded = any(tensor.is_floating_point() and tensor.dtype is not torch.float64 for tensor in made)
    return rounded or any(map(_computes_weights, frame.children))


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
        for number in _needed(member):
            if number not in env and (is_plain(number) or name_of(number) in SPLITS):
                env[number] = Evaluation(env, modules).value(number)
        env[member] = _result(member, env, modules)
    result: Tensor = env[value]
    return result


def _call(frame: Frame, env: Mapping[Value, Any], modules: dict[int, nn.Module]) -> Any:
    """Run a module itself, not what was read of it."""
    arguments = {
        name: _fill(frame.env[frame.trace.inputs[name]], env, precise_tensor)
        if name in frame.trace.inputs
        else constant
        for name, constant in frame.trace.arguments.items()
    }
    return _copy(frame.module, modules)(**arguments)


def _copy(module: nn.Module, modules: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in modules:
        modules[id(module)] = precise_copy(module)
    return modules[id(module)]


def result_on_meta(value: Value, env: Mapping[Value, Any]) -> Any:
    """The result of one operation on tensors without content."""
    args, kwargs = _fill(value.args, env, _hollow), _fill(value.kwargs, env, _hollow)
    if value.module is None:
        return _applied(value, args, kwargs)
    tensors = {name: _hollow(t) for name, t in (*value.module.named_parameters(), *value.module.named_buffers())}
    return torch.func.functional_call(value.module, tensors, args, dict(kwargs))


def _needed(value: Value) -> tuple[Value, ...]:
    """The inputs that are looked at."""
    return value.inputs[:1] if asks_size(value) else value.inputs


def _result(value: Value, env: Mapping[Value, Any], modules: dict[int, nn.Module]) -> Any:
    if asks_size(value):
        assert value.module is not None
        return _copy(value.module, modules)(env[value.inputs[0]])
    args, kwargs = _fill(value.args, env, precise_tensor), _fill(value.kwargs, env, precise_tensor)
    if value.module is not None:
        return _copy(value.module, modules)(*args, **kwargs)
    return _applied(value, args, kwargs)


def _applied(value: Value, args: Any, kwargs: Any) -> Any:
    if value.node.op == "call_method":
        return getattr(args[0], str(value.node.target))(*args[1:], **kwargs)
    function: Any = value.node.target
    return function(*args, **kwargs)


def _hollow(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _fill(argument: Any, env: Mapping[Value, Any], move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(argument, Value):
        return env[argument]
    if isinstance(argument, Tensor):
        return move(argument)
    if isinstance(argument, tuple):
        return tuple(_fill(a, env, move) for a in argument)
    if isinstance(argument, list):
        return [_fill(a, env, move) for a in argument]
    if isinstance(argument, slice):
        return slice(*(_fill(end, env, move) for end in (argument.start, argument.stop, argument.step)))
    if isinstance(argument, Mapping):
        return {k: _fill(v, env, move) for k, v in argument.items()}
    return argument
