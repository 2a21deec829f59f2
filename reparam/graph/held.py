"""Modules that attributes hold beside the registries of torch: in lists, partial functions, bound methods, closures.

A module that is replaced is replaced where it is registered. A forward that reaches it through a plain list would go on
calling the old one, and a function that runs as a hook would go on changing its weights.
"""

import functools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from reparam.graph.contents import OWN, content
from reparam.graph.mentions import mentions_of
from reparam.graph.used import join

DEEPEST: Final = 4  # containers and objects within each other
HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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


class How(Enum):
    """How a module is held."""

    ITSELF = "the module"
    METHOD = "a method of the module"
    FUNCTION = "a function that uses the module"


@final
@dataclass(frozen=True, slots=True)
class Held:
    """Modules that are held outside of ``_modules``, by identity, each with what holds it.

    Args:
        modules: those that are held themselves.
        bound: those of which a method is held.
        used: those that a hook, or another function that is held, uses and may change.
    """

    modules: Mapping[int, str]
    bound: Mapping[int, str]
    used: Mapping[int, str]


def held_modules(model: nn.Module) -> Held:
    """What the attributes of the modules of a model hold; takes time linear in what they hold."""
    modules: dict[int, str] = {}
    bound: dict[int, str] = {}
    used: dict[int, str] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if type(value) in PLAIN or (name in OWN and (not value or name not in HOOKS)):
                continue
            values = [*value.values(), *map(_in_hook, value.values())] if name in HOOKS else [value]
            where = f"a hook of {path or 'the model'}" if name in HOOKS else f"the attribute {join(path, name)}"
            for found, held in _modules_in(values, seen):
                modules.setdefault(id(found), where)
                if held is How.METHOD:
                    bound.setdefault(id(found), where)
                if held is How.FUNCTION or name in HOOKS:
                    used.setdefault(id(found), where)
    return Held(modules, bound, used)


def _modules_in(values: list[Any], seen: set[int]) -> Iterator[tuple[nn.Module, How]]:
    """Modules that values hold, and how."""
    level = values
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, nn.Module):
                yield item, How.ITSELF
            elif isinstance(item, MethodType) and isinstance(item.__self__, nn.Module):
                yield item.__self__, How.METHOD
            elif isinstance(item, FunctionType):
                kept = _kept(item)
                yield from _in_code(item.__code__, kept)
                below += (part for part in kept.values() if not isinstance(part, nn.Module))
            elif id(item) not in seen and not isinstance(item, Tensor | type):
                seen.add(id(item))
                below += (part for part in _parts(item) if type(part) not in PLAIN)
        level = below


def _in_hook(hook: Any) -> list[nn.Module]:
    """Modules that a hook uses which is a method of a module."""
    if not isinstance(hook, MethodType) or not isinstance(hook.__func__, FunctionType):
        return []
    code = hook.__func__.__code__
    return [module for module, _ in _in_code(code, {code.co_varnames[0]: hook.__self__})] if code.co_argcount else []


def _in_code(code: CodeType, kept: Mapping[str, Any]) -> Iterator[tuple[nn.Module, How]]:
    """Modules among the variables of a code that it uses, and those below them."""
    for name, value in kept.items():
        if not isinstance(value, nn.Module):
            continue
        found = mentions_of(code, [name])
        if not found:
            yield value, How.FUNCTION
        for mention in found:
            here: nn.Module = value
            for part in mention.path.split("."):
                below = here._modules.get(part)
                if below is None:
                    is_method = callable(getattr(type(here), part, None))
                    yield here, How.METHOD if is_method else How.FUNCTION
                    break
                here = below
            else:
                yield here, How.FUNCTION


def _kept(function: FunctionType) -> dict[str, Any]:
    """What a function keeps in variables of its closure, and as defaults of its arguments."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    kept = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
    return kept | {name: value for name, cell in cells if (value := content(cell)) is not cell}


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
