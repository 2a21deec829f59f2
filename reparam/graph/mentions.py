"""Which descendants of its module a method mentions, from its code alone."""

import dis
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Final, NamedTuple

MOST: Final = 4096  # methods that are remembered
SUBSCRIPTS: Final = ("BINARY_SUBSCR", "[]")  # the second one is the operand of BINARY_OP from Python 3.14 on


class Mention(NamedTuple):
    """A dotted path from the first argument of a method on, ``a.0`` for ``self.a[0]``; whether it may be called."""

    path: str
    called: bool


@lru_cache(maxsize=MOST)
def mentions(code: CodeType) -> frozenset[Mention]:
    """The longest paths that a method reads, also in the functions that it defines.

    Example:
        >>> class Net:
        ...     def embed(self, x):
        ...         return [norm(self.stem[0](x)) for norm in (self.norm,)]
        >>> sorted(mentions(Net.embed.__code__))
        [Mention(path='norm', called=False), Mention(path='stem.0', called=True)]
    """
    root = code.co_varnames[0] if code.co_argcount else ""
    return frozenset(_mentions(code, root)) if root else frozenset()


def _mentions(code: CodeType, root: str) -> Iterator[Mention]:
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
            reads = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")) and last == root
            path, called = ([] if reads else None), False
        key = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and root in constant.co_freevars:
            yield from _mentions(constant, root)
