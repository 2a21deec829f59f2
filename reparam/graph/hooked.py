"""What hooks use of modules beside what these are given: weights and settings, and attributes that forwards read.

A hook of one module may set the weights of another one. From its code alone, as hooks do not run while a model is read.
"""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Final, final

from torch import Tensor, nn

from reparam.graph.bytecode import names
from reparam.graph.code import code_of
from reparam.graph.contents import OWN
from reparam.graph.held import modules_in
from reparam.graph.leaves import is_leaf
from reparam.graph.reach import GOES_THROUGH, Reached, is_standard, reached

_CHANGES_ALL: Final = GOES_THROUGH | {"double", "eval", "float", "half", "register_buffer", "to", "train", "type"}
_CHANGES: Final = (dict, list, set, deque, Tensor)


@final
@dataclass(frozen=True, slots=True)
class Hooked:
    """Modules that hooks of other modules, or their own, use; by identity, each with the path of one with the hook.

    Args:
        weights: those whose weights or settings are used.
        forwards: those whose forward reads an attribute that a hook sets or fills.
    """

    weights: Mapping[int, str]
    forwards: Mapping[int, str]


def used_by_hooks(model: nn.Module) -> Hooked:
    """What the hooks of all modules of a model use."""
    weights: dict[int, str] = {}
    forwards: dict[int, str] = {}
    hooked = [(path, m) for path, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    modules = list(model.modules()) if hooked else []
    owners = {id(t): m for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    for path, module in hooked:
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            for found in _reached_by(hook, module):
                for used in _weights(found, owners):
                    weights.setdefault(id(used), path)
                if _reads(found):
                    forwards.setdefault(id(found.holder), path)
    return Hooked(weights, forwards)


def _reached_by(hook: Callable[..., Any], module: nn.Module) -> Iterator[Reached]:
    """What a hook reaches from its module, from the object whose method it is, and from what it knows.

    That it hands on one of the first two, as to a function that prints it, says nothing.
    """
    given: list[Any] = [module]
    own: list[Any] = [module]
    named: dict[str, Any] = {}
    current: Any = hook
    while isinstance(current, functools.partial):
        given, named, current = [*current.args, *given], {**current.keywords, **named}, current.func
    if isinstance(current, MethodType):
        own.append(current.__self__)
        given, current = [current.__self__, *given], current.__func__
    elif not isinstance(current, FunctionType):
        own.append(current)
        given, current = [current, *given], inspect.getattr_static(type(current), "__call__", None)
    if isinstance(current, FunctionType) and not is_standard(current):
        arguments = dict(zip(current.__code__.co_varnames[: current.__code__.co_argcount], given, strict=False))
        for found in reached(current, {**arguments, **named}):
            if found.attribute or not any(found.holder is holder for holder in own):
                yield found


def _weights(found: Reached, owners: Mapping[int, nn.Module]) -> Iterator[nn.Module]:
    """Modules of which weights or settings are used; ``owners`` of tensors by identity."""
    holder, attribute, is_set = found
    tensor = holder if isinstance(holder, Tensor) or not attribute else getattr(holder, "__dict__", {}).get(attribute)
    if isinstance(tensor, Tensor):
        yield from filter(None, [owners.get(id(tensor))])
    elif not isinstance(holder, nn.Module):
        inside = () if attribute else modules_in(holder)
        yield from (below for module in inside for below in module.modules())
    elif attribute in _CHANGES_ALL or not attribute:
        yield from holder.modules()
    elif (
        attribute in holder._parameters
        or attribute in holder._buffers
        or is_leaf(holder)
        or (is_set and attribute == "training")
    ):
        yield holder


def _reads(found: Reached) -> bool:
    """Whether the forward of a module reads an attribute that is set, or that holds what can be changed."""
    holder, attribute, is_set = found
    if not isinstance(holder, nn.Module) or not attribute or attribute in OWN or is_leaf(holder):
        return False
    if not is_set and not isinstance(vars(holder).get(attribute), _CHANGES):
        return False
    return any(attribute in names(function.__code__) for function in code_of(type(holder)).functions)
