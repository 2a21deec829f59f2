"""Arguments and results: structures of nodes, values, tensors and constants."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from reparam.graph.arguments import HOLE
from reparam.graph.net import Value

NOTHING: Final = object()
PLAIN_TYPES: Final = (int, str, bool, float, type(None))


def spec_of(value: Any) -> Any:
    """What a callee is read with: holes in the place of values and tensors."""
    if isinstance(value, Value | Tensor | fx.Node):
        return HOLE
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(spec_of(v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(spec_of(v) for v in value)
    if isinstance(value, Mapping):
        return {k: spec_of(v) for k, v in value.items()}
    return value


def key_of(value: Any) -> Any:
    """A structure of constants and holes as something hashable."""
    if type(value) in PLAIN_TYPES:
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return ("dict", *((k, key_of(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(key_of(v) for v in value))
    if isinstance(value, slice):
        return ("slice", key_of((value.start, value.stop, value.step)))
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return (type(value).__name__, value)


def resolve(argument: Any, env: Mapping[fx.Node, Any]) -> Any:
    """An argument of a node with what its nodes stand for."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, tuple):
        items = [resolve(a, env) for a in argument]
        return type(argument)(*items) if hasattr(argument, "_fields") else tuple(items)
    if isinstance(argument, list):
        return [resolve(a, env) for a in argument]
    if isinstance(argument, Mapping):
        return {k: resolve(v, env) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(resolve(argument.start, env), resolve(argument.stop, env), resolve(argument.step, env))
    return argument


def values_in(structure: Any) -> Iterator[Value]:
    """The values in a structure."""
    if isinstance(structure, Value):
        yield structure
    elif isinstance(structure, Mapping):
        for item in structure.values():
            yield from values_in(item)
    elif isinstance(structure, list | tuple):
        for item in structure:
            yield from values_in(item)
    elif isinstance(structure, slice):
        yield from values_in((structure.start, structure.stop, structure.step))


def pick(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The element that ``structure[index]`` names, if the structure is known, or a size that is returned."""
    if node.op == "call_function" and node.target is torch.Size and not any(True for _ in values_in(args)):
        return torch.Size(*args)
    if node.op == "call_function" and node.target is operator.getitem and isinstance(args[0], list | tuple | Mapping):
        try:
            return args[0][args[1]]
        except (KeyError, IndexError, TypeError):
            return NOTHING
    return NOTHING
