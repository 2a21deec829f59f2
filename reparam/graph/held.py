"""Modules that attributes hold beside the registries of torch: in lists, partial functions, bound methods, closures.

A module that is replaced is replaced where it is registered. A forward that reaches it through a plain list would go on
calling the old one. A function is not copied with the model whose modules it knows: all that it reaches through these
stays as it was.
"""

import functools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from reparam.graph.contents import OWN
from reparam.graph.reach import GOES_THROUGH, is_standard, reached

DEEPEST: Final = 4  # containers and objects within each other
PLAIN: Final = frozenset(
    (
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type,
        BuiltinFunctionType,
        ModuleType,
        torch.dtype,
        torch.device,
        torch.Size,
        Tensor,
        nn.Parameter,
    )
)


@final
@dataclass(frozen=True, slots=True)
class Held:
    """Modules that are held outside of ``_modules``, by identity, each with the attribute that holds it.

    Args:
        modules: those that are held themselves.
        bound: those of which a method is held.
    """

    modules: Mapping[int, str]
    bound: Mapping[int, str]


def held_modules(model: nn.Module) -> Held:
    """What the attributes of the modules of a model hold; takes time linear in what they hold."""
    modules: dict[int, str] = {}
    bound: dict[int, str] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if type(value) in PLAIN or name in OWN:
                continue
            for found, method in _modules_in(value, seen):
                where = f"{path}.{name}" if path else name
                modules.setdefault(id(found), where)
                if method:
                    bound.setdefault(id(found), where)
    return Held(modules, bound)


def modules_in(value: Any) -> Iterator[nn.Module]:
    """Modules that a container or an object holds."""
    return (module for module, _ in _modules_in(value, set()))


def _modules_in(value: Any, seen: set[int]) -> Iterator[tuple[nn.Module, bool]]:
    """Modules that a value holds, and whether it holds a method of them."""
    level = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, nn.Module):
                yield item, False
            elif isinstance(item, MethodType) and isinstance(item.__self__, nn.Module):
                yield item.__self__, True
            elif type(item) is FunctionType:
                if id(item) not in seen and not is_standard(item):
                    seen.add(id(item))
                    yield from ((module, False) for module in _reached_by(item, seen))
            elif id(item) not in seen and not isinstance(item, Tensor | type):
                seen.add(id(item))
                below += (part for part in _parts(item) if type(part) not in PLAIN)
        level = below


def _reached_by(function: FunctionType, seen: set[int]) -> Iterator[nn.Module]:
    """Modules that a function calls, or whose parameters it reads, with all that they consist of."""
    for holder, attribute, _ in reached(function, {}):
        if not isinstance(holder, nn.Module):
            inside = () if attribute or type(holder) in PLAIN else _modules_in(holder, seen)
            yield from (below for module, _ in inside for below in module.modules())
        elif not attribute or attribute in GOES_THROUGH:
            yield from holder.modules()
        elif attribute in holder._parameters or attribute in holder._buffers:
            yield holder


def _parts(value: Any) -> Iterator[Any]:
    """What a container or an object holds."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | Set | deque):
        yield from value
    elif isinstance(value, functools.partial):
        yield value.func
        yield from value.args
        yield from value.keywords.values()
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, weakref.ReferenceType):
        yield value()
    try:
        attributes = vars(value)
    except Exception:  # user code may stand behind it
        return
    if type(attributes) is dict:
        yield from attributes.values()
