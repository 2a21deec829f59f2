"""What the code that asks something of a traced value is, and does with the answer."""

import dis
import sys
from functools import lru_cache
from types import CodeType
from typing import Final

import torch

from reparam.graph.bytecode import MOST

_IS_TENSOR: Final = torch.is_tensor.__code__
LOOKS_UP: Final = "its forward looks up a size, data type or device of its input, or makes text of one"
LOOKUPS: Final = frozenset(("get", "setdefault", "pop", "add", "update", "set", "frozenset", "dict"))
_OF_MESSAGES: Final = (
    "LOAD_",
    "FORMAT_",
    "BUILD_STRING",
    "CONVERT_",
    "BINARY_",
    "CACHE",
    "KW_NAMES",
    "PRECALL",
    "CALL",
)


def asked_by_user(depth: int) -> bool:
    """Whether the function that many calls above is neither torch's nor of this library."""
    frame = sys._getframe(depth)
    if frame.f_code is _IS_TENSOR and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "reparam")


def is_looked_up() -> bool:
    """Whether a value is hashed to look something up; a function that caches its results is called alike."""
    frame = sys._getframe(2)
    if not asked_by_user(3):
        return False
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return not name.startswith(("CALL", "PRECALL")) or not LOOKUPS.isdisjoint(frame.f_code.co_names)


def is_asked_for() -> bool:
    """Whether ``hasattr`` or ``getattr`` looks for an attribute, and not the code of a user itself."""
    frame = sys._getframe(2)
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return asked_by_user(3) and not name.startswith(("LOAD_ATTR", "LOAD_METHOD"))


def is_read_as_attribute() -> bool:
    """Whether the code of a user reads an attribute by name, and no function of another language does."""
    frame = sys._getframe(2)
    return asked_by_user(3) and dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("LOAD_ATTR")


def is_spelled() -> bool:
    """Whether text is made of a value in the code of a user, and not only for a message that is raised or printed."""
    frame = sys._getframe(2)
    return asked_by_user(3) and not _goes_to_message(frame.f_code, frame.f_lasti)


@lru_cache(maxsize=MOST)
def _goes_to_message(code: CodeType, at: int) -> bool:
    """Whether what an instruction makes goes to a call whose result is raised or dropped."""
    for instruction in dis.get_instructions(code):
        if instruction.offset > at and not instruction.opname.startswith(_OF_MESSAGES):
            return instruction.opname in ("POP_TOP", "RAISE_VARARGS")
    return False
