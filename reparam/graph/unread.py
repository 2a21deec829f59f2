"""Why a forward could not be read, and the line of code that stopped it."""

import dis
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch.fx.proxy import TraceError


@final
@dataclass(frozen=True, slots=True)
class Unread:
    """Why a forward could not be read, the line of code that stopped it, and the tensors that it read so far.

    ``raised`` says that the forward itself raises an error, whatever its input is; ``written`` are the paths of modules
    below whose attributes it sets: what these do depends on that.
    """

    reason: str
    where: str = ""
    read: frozenset[str] = frozenset()
    raised: bool = False
    written: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


INSIDE: Final = tuple(f"{folder}{os.sep}" for folder in (torch.__path__[0], Path(__file__).parent))


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def raised_by_user(error: Exception) -> bool:
    """Whether the forward itself raised, or asserted: not torch, and not the tracing."""
    if isinstance(error, TraceError):
        return False
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return not code.co_filename.startswith(INSIDE) and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def calling_line() -> str:
    """The innermost line of code outside torch and this library that is being run."""
    return _innermost(traceback.extract_stack())


def place_of(error: Exception) -> str:
    """The innermost line of code outside torch and this library that led to the error."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def _innermost(stack: traceback.StackSummary) -> str:
    for entry in reversed(stack):
        if not entry.filename.startswith(INSIDE):
            return f"{entry.filename}:{entry.lineno}: {entry.line}"
    return ""
