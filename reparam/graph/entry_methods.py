"""Methods of a class beside its forward, from its code alone: those that the forward calls, and those it does not."""

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Final

from torch import nn

from reparam.graph.mentions import Mention, mentions

ENTRY_NAMES: Final = ("forward_", "get_", "extract", "encode", "decode", "features")
OWN: Final = frozenset(name for name in dir(nn.Module)) | {"forward"}
AFTER_FUSING: Final = re.compile("forward.*(fus|deploy|reparam)|(fus|deploy|reparam).*forward")
SETTING_UP: Final = re.compile(
    "(add|build|convert|export|freeze|fuse|init|load|log|make|print|prune|register|replace|reset|save|set|switch|unfreeze"
    "|update)(_|$)"
)
TENSORS: Final = frozenset(("weight", "bias", "running_mean", "running_var"))
TORCH: Final = "torch.nn.modules"
MOST: Final = 4096  # methods that are remembered
_CALLED: Final[dict[type, Mapping[CodeType, str]]] = {}
_UNCALLED: Final[dict[type, Mapping[str, frozenset[str]]]] = {}
_PUBLIC: Final[dict[type, Mapping[str, bool]]] = {}


def forget_classes() -> None:
    """Forget what is remembered of classes: their methods may have been replaced since."""
    _CALLED.clear()
    _UNCALLED.clear()
    _PUBLIC.clear()


def called_methods(kind: type) -> Mapping[CodeType, str]:
    """Methods of a class that its forward calls, directly or through other methods: their names, by code."""
    if kind not in _CALLED:
        functions = {name: _function(kind, name) for name in _reached(kind, "forward")}
        _CALLED[kind] = {f.__code__: name for name, f in functions.items() if f is not None and name != "forward"}
    return _CALLED[kind]


def uncalled(kind: type) -> Mapping[str, frozenset[str]]:
    """Methods of a class that its forward does not call and that take data: what they use of it, as dotted paths."""
    if kind not in _UNCALLED:
        _UNCALLED[kind] = dict(_uncalled(kind))
    return _UNCALLED[kind]


def method_with_data(kind: type) -> str:
    """A public method of a class beside its forward that is called with data; empty if there is none."""
    return next((name for name, required in _public(kind).items() if required), "")


def codes_of(kind: type) -> Iterator[CodeType]:
    """The code of the forward of a class, of the methods that it calls, and of those that ``uncalled`` names."""
    for name in (*_reached(kind, "forward"), *uncalled(kind)):
        function = _function(kind, name)
        if function is not None:
            yield function.__code__


def is_method(kind: type, code: CodeType) -> bool:
    """Whether a class has a method, and not its forward, of this code."""
    function = None if code.co_name == "forward" else _function(kind, code.co_name)
    return function is not None and function.__code__ is code


def methods_of(kind: type, method: str) -> Iterator[object]:
    """A method of a class, and the methods that it calls."""
    return (_function(kind, name) for name in _reached(kind, method))


def is_entry_point(name: str, calls: int, outer: bool) -> bool:
    """Whether a method that a forward calls may be called by a user, too.

    Args:
        name: of the method, with a path if it is that of a child.
        calls: how often the forward calls it.
        outer: whether it is only given what the forward, or another entry point, is given or returns.
    """
    name = name.rpartition(".")[2]
    return name.startswith(ENTRY_NAMES) or (calls == 1 and outer and not name.startswith("_"))


def _function(kind: type, name: str) -> FunctionType | None:
    """The function that a class defines by a name, inside of its decorators; None if it is torch's, or none."""
    for base in kind.__mro__:
        if name in vars(base):
            found = vars(base)[name]
            found = found.fget if isinstance(found, property) else found
            if base.__module__.startswith(TORCH) or not callable(found) or isinstance(found, staticmethod):
                return None
            inner = inspect.unwrap(found)
            return inner if isinstance(inner, FunctionType) else None
    return None


def _reached(kind: type, start: str) -> dict[str, None]:
    """A method, and those that it calls, directly or through others."""
    pending, seen = [start], {start: None}
    while pending:
        function = _function(kind, pending.pop())
        for name in () if function is None else _names(function.__code__):
            if name not in seen and name not in OWN and _function(kind, name) is not None:
                seen[name] = None
                pending.append(name)
    return seen


@lru_cache(maxsize=MOST)
def _names(code: CodeType) -> tuple[str, ...]:
    """Names of attributes and globals in a function and in those that it defines."""
    inner = (name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part))
    return (*code.co_names, *inner)


def _public(kind: type) -> Mapping[str, bool]:
    """Public methods that may take data, and whether they require it.

    One that is named as the forward of a fused module (``forward_fuse``) is left out: it is right once the norms that
    it skips are folded; so is one that sets up the module (``set_in_channels``, ``reset_classifier``).
    """
    if kind not in _PUBLIC:
        bases = (base for base in kind.__mro__ if not base.__module__.startswith(TORCH))
        functions = {name: _function(kind, name) for base in bases for name in vars(base) if _is_for_data(name)}
        found = {name: _requires_data(function) for name, function in functions.items() if function is not None}
        _PUBLIC[kind] = {name: required for name, required in found.items() if required is not None}
    return _PUBLIC[kind]


def _is_for_data(name: str) -> bool:
    setting_up = AFTER_FUSING.search(name) or SETTING_UP.match(name)
    return name not in OWN and not name.startswith("_") and not setting_up


def _uncalled(kind: type) -> Iterator[tuple[str, frozenset[str]]]:
    """Public methods that the forward does not call, with what they use.

    Of one that can be called without data, only what it calls itself counts.
    """
    reached = _reached(kind, "forward")
    for name, required in _public(kind).items():
        if name in reached:
            continue
        codes = [f.__code__ for f in (_function(kind, n) for n in _reached(kind, name)) if f is not None]
        used = {_used(mention, required) for code in codes for mention in mentions(code)} - {""}
        used |= {text for code in codes if "getattr" in code.co_names for text in code.co_consts if type(text) is str}
        if used:
            yield name, frozenset(used)


def _used(mention: Mention, required: bool) -> str:
    """The path up to the module that is called, or of which the weights are read; empty if it is neither."""
    if not (required or mention.called):
        return ""
    path, _, last = mention.path.rpartition(".")
    return path if last == "forward" or (required and last in TENSORS) else mention.path


def _requires_data(function: FunctionType) -> bool | None:
    """Whether a method requires an argument; None if it takes none that could be data."""
    parameters = [*inspect.signature(function, follow_wrapped=False).parameters.values()][1:]
    if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters):
        return True
    return False if any(parameter.default is None for parameter in parameters) else None
