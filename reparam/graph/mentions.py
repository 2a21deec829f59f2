"""Which descendants of its module a method mentions, from its code alone."""

import dis
import itertools
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Final, NamedTuple

from reparam.graph.bytecode import LOADS, MOST, nested, steps

LISTING: Final = frozenset(  # what gives all children of a module
    ("_modules", "children", "items", "modules", "named_children", "named_modules", "values")
)
SUBSCRIPTS: Final = ("BINARY_SUBSCR", "[]")  # the second one is the operand of BINARY_OP from Python 3.14 on


class Mention(NamedTuple):
    """A dotted path from the first argument of a method on, ``a.0`` for ``self.a[0]``; whether it may be called."""

    path: str
    called: bool


@lru_cache(maxsize=MOST)
def mentions(code: CodeType, *, of_all: bool = False) -> frozenset[Mention]:
    """The longest paths that a method reads, also in the functions that it defines.

    Args:
        code: of the method.
        of_all: whether to follow all arguments, not only the first one.

    Example:
        >>> class Net:
        ...     def embed(self, x):
        ...         me = self
        ...         return [norm(me.stem[0](x)) for norm in (self.norm,)]
        >>> sorted(mentions(Net.embed.__code__))
        [Mention(path='norm', called=False), Mention(path='stem.0', called=True)]
    """
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return mentions_of(code, arguments if of_all else arguments[:1])


def mentions_of(code: CodeType, variables: Iterable[str]) -> frozenset[Mention]:
    """The longest paths that a code reads from some of its variables on, and from others that are the same."""
    roots = set(variables)
    for part in nested(code) if roots else ():
        found = steps(part)
        for (load, value, _), (store, name, _) in itertools.pairwise(found):
            if value in roots and load.startswith(LOADS) and store.startswith(("STORE_FAST", "STORE_DEREF")):
                roots.add(name)
    return frozenset(_mentions(code, frozenset(roots))) if roots else frozenset()


def _mentions(code: CodeType, roots: frozenset[str]) -> Iterator[Mention]:
    path: list[str] | None = None
    key: str | None = None
    called = False
    for step in dis.get_instructions(code):
        if path is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(str(step.argval))
            called = step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((step.arg or 0) & 1))
        elif path and step.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and isinstance(step.argval, int | str):
            key = str(step.argval)
            continue
        elif path and key is not None and (step.opname in SUBSCRIPTS or step.argrepr in SUBSCRIPTS):
            path.append(key)
            called = True
        else:
            if path:
                yield Mention(".".join(path), called)
            last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
            loads = step.opname.startswith(LOADS) or step.opname.endswith("_LOAD_FAST")  # also two at once
            reads = loads and last in roots
            path, called = ([] if reads else None), False
        key = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and not roots.isdisjoint(constant.co_freevars):
            yield from _mentions(constant, roots.intersection(constant.co_freevars))
