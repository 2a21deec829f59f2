"""Children that the code of an unread forward takes apart, so that parts of them may be called alone."""

from typing import Final

from torch import nn

from reparam.graph.bytecode import nested, steps
from reparam.graph.code import code_of
from reparam.graph.mentions import LISTING

_GOING_THROUGH: Final = frozenset(("enumerate", "iter", "list", "reversed", "tuple", "zip"))
_PARTS: Final = ("BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP", "BUILD_SLICE")


def taken_apart(module: nn.Module, name: str) -> bool:
    """Whether the forward of a module indexes a child, goes through it, or names one of its children."""
    child = module._modules[name]
    known = LISTING | (set() if child is None else child._modules.keys())
    for function in code_of(type(module)).functions:
        for code in nested(function.__code__):
            if name in code.co_names and _in_code(steps(code), name, known):
                return True
    return False


def _in_code(found: list[tuple[str, object, str]], name: str, known: set[str] | frozenset[str]) -> bool:
    loads = [at for at, (kind, value, _) in enumerate(found) if kind == "LOAD_ATTR" and value == name]
    for at in loads:
        following = [*found[at + 1 : at + 5], *[("", "", "")] * 4]
        kind, value, _ = following[0]
        if kind == "GET_ITER" or (kind in ("LOAD_ATTR", "LOAD_METHOD") and value in known):
            return True
        if any(step[0].startswith("LOAD_GLOBAL") and step[1] in _GOING_THROUGH for step in found[max(at - 3, 0) : at]):
            return True
        loaded = next((i for i, step in enumerate(following) if not step[0].startswith("LOAD_")), 0)
        if 0 < loaded < 3 and following[loaded][0] in _PARTS and following[loaded][2] in ("", "[]"):
            return True
    return False
