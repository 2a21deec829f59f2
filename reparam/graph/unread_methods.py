"""Whether a method that cannot be read calls children one after the other, as the forward does, from its code alone."""

import itertools
from collections.abc import Iterable
from functools import lru_cache
from types import CodeType
from typing import Final, final

from torch import nn

from reparam.graph.bytecode import LOADS, MOST, names, nested, steps, strings
from reparam.graph.entry_methods import functions_of, methods_of
from reparam.graph.mentions import LISTING, mentions

CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLUMBING: Final = ("CACHE", "COPY_FREE_VARS", "EXTENDED_ARG", "MAKE_CELL", "NOP", "PRECALL", "PUSH_NULL", "RESUME")
_GOING_THROUGH: Final = frozenset(("accumulate", "filter", "map", "next", "pop", "reduce", "starmap"))
Step = tuple[str, object]


@final
class UnreadMethod:
    """A method of a module, of which only the code is known."""

    def __init__(self, module: nn.Module, method: str) -> None:
        functions = functions_of(methods_of(type(module), method), of_other_files=True)
        self._module = module
        self._codes = [function.__code__ for function in functions]
        self._mentions = frozenset(mention for code in self._codes for mention in mentions(code))
        self._loops = sum(_loops(code) for code in self._codes)
        self._asked = frozenset(name for code in self._codes for name in _asked_of_others(code))
        if any("getattr" in names(code) for code in self._codes):
            self._asked |= frozenset(text for code in self._codes for text in strings(code))

    def may_take_apart(self, pairs: Iterable[tuple[str, str]]) -> bool:
        """Whether it may use one module of a pair without the other one.

        Args:
            pairs: dotted paths of two descendants that follow each other in the forward; an empty one is no module.
        """
        return any(self._takes_apart(path, pair) for pair in pairs for path in pair if path)

    def _takes_apart(self, path: str, pair: tuple[str, str]) -> bool:
        for mention in self._mentions:
            start, _, last = mention.path.rpartition(".")
            listed = last in LISTING
            start = start if listed else mention.path
            if path == start:
                if not all(_joins(code, *pair) for code in self._codes):
                    return True
            elif not start or path.startswith(start + "."):
                if (listed or not mention.called) and self._reaches(start, path):
                    return True
            elif start.startswith(path + "."):
                return True
        return False

    def _reaches(self, start: str, path: str) -> bool:
        """Whether code that goes through the module at ``start`` may come to the one at ``path``."""
        here = self._module.get_submodule(start)
        for depth, name in enumerate(path[len(start) + 1 if start else 0 :].split(".")):
            if not (type(here) in CONTAINERS or (depth == 0 and hasattr(here, "__iter__"))):
                listed = depth == 0 and not LISTING.isdisjoint(self._asked)
                return listed or name in self._asked  # a block is called as a whole, or a part of it by name
            if depth >= self._loops:
                return False
            here = here.get_submodule(name)
        return True


@lru_cache(maxsize=MOST)
def _loops(code: CodeType) -> int:
    """How often a code goes through something, or takes an element of it; a slice of a list gives none of these."""
    found = [step for part in nested(code) for step in steps(part)]
    return sum(
        name == "GET_ITER"
        or ((name == "BINARY_SUBSCR" or text == "[]") and found[at - 1][0] != "BUILD_SLICE")
        or (name.startswith("LOAD_") and value in _GOING_THROUGH)
        for at, (name, value, text) in enumerate(found)
    )


@lru_cache(maxsize=MOST)
def _asked_of_others(code: CodeType) -> frozenset[str]:
    """Names of attributes that a code reads of something else than its first argument."""
    root = code.co_varnames[0] if code.co_argcount else None
    found = [step for part in nested(code) for step in steps(part)]
    return frozenset(
        str(name)
        for (load, value, _), (asks, name, _) in itertools.pairwise(found)
        if asks in ("LOAD_ATTR", "LOAD_METHOD") and not (load.startswith(LOADS) and value == root)
    )


def _joins(code: CodeType, first: str, second: str) -> bool:
    """Whether one child is called on the result of another one alone, wherever either is mentioned."""
    if {first, second}.isdisjoint(mention.path for mention in mentions(code)):
        return True
    found: list[Step] = [
        (name, value) for part in nested(code) for name, value, _ in steps(part) if name not in _PLUMBING
    ]
    root = code.co_varnames[0] if code.co_argcount else None
    firsts, seconds = (_calls(found, root, path.split(".")) for path in (first, second))
    follows = [at for at in seconds if any(_followed(found, start, at, len(second.split("."))) for start in firsts)]
    return 0 < len(follows) == len(seconds) == len(firsts)


def _calls(found: list[Step], root: str | None, path: list[str]) -> list[int]:
    """Where a path from the first argument on is loaded."""
    return [at for at in range(len(found)) if _loads(found[at], root) and _is_path(found[at + 1 :], path)]


def _loads(step: Step, name: object) -> bool:
    """Whether an instruction loads a variable."""
    return name is not None and step[0].startswith(LOADS) and step[1] == name


def _is_path(following: list[Step], path: list[str]) -> bool:
    attributes = following[: len(path)]
    return [value for _, value in attributes] == path and all(n in ("LOAD_ATTR", "LOAD_METHOD") for n, _ in attributes)


def _followed(found: list[Step], first: int, second: int, length: int) -> bool:
    """Whether the call of the first path is the argument of that of the second, and nothing else reads it."""
    behind = found[second + 1 + length :]
    if second < first:  # second(first(x))
        inside = [name for name, _ in found[first : first + 8]]
        return second + 1 + length == first and "CALL" in inside and _is_call(found[first + inside.index("CALL") + 1 :])
    between = found[first:second]
    kinds = [name for name, _ in between]
    if kinds.count("CALL") != 1 or kinds[-2:] != ["CALL", "STORE_FAST"] or len(behind) < 3:
        return False
    variable = between[-1][1]
    gone = behind[2] == ("STORE_FAST", variable) or behind[2][0] == "RETURN_VALUE"
    return gone and _loads(behind[0], variable) and _is_call(behind[1:])


def _is_call(following: list[Step]) -> bool:
    """Whether the next instruction is a call with one argument."""
    return bool(following) and following[0] == ("CALL", 1)
