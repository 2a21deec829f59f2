"""What stands in the code of functions: instructions, names, and the functions within."""

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any, Final

MOST: Final = 4096  # codes, or methods, of which something is remembered
LOADS: Final = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")  # what the names of instructions start with


def nested(code: CodeType) -> Iterator[CodeType]:
    """A code and those of the functions, comprehensions and generators within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@lru_cache(maxsize=MOST)
def names(code: CodeType) -> tuple[str, ...]:
    """Names of attributes and globals in a function and in those that it defines."""
    return tuple(name for part in nested(code) for name in part.co_names)


def strings(code: CodeType) -> Iterator[str]:
    """Strings in a function and in those that it defines."""
    return (text for part in nested(code) for text in part.co_consts if isinstance(text, str))


def has(code: CodeType, operation: str) -> bool:
    """Whether a code holds an instruction of this name."""
    return dis.opmap[operation] in code.co_code[::2]


def steps(code: CodeType) -> list[tuple[str, Any, str]]:
    """Name, argument and its text of the instructions of a code; one that does two things at once is two."""
    found: list[tuple[str, Any, str]] = []
    for one in dis.get_instructions(code):
        parts = one.opname.replace("_LOAD_", " LOAD_").replace("_STORE_", " STORE_").split()
        if isinstance(one.argval, tuple) and len(parts) == 2:
            found += [(name, value, one.argrepr) for name, value in zip(parts, one.argval, strict=True)]
        else:
            found.append((one.opname, one.argval, one.argrepr))
    return found
