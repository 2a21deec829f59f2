"""The operations of a model and what they read, before and after: what a picture is drawn from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Args:
        label: what it is.
        path: dotted path of the module that is called, or in whose forward it stands.
        inputs: keys of the nodes that it reads.
        region: position of its region among the regions of the plan; None: it is left alone.
        linear: whether it is a linear operation.
        name: name of the child that is called; empty for a function.
    """

    label: str
    path: str
    inputs: tuple[int, ...]
    region: int | None = None
    linear: bool = False
    name: str = ""


@final
@dataclass(frozen=True, slots=True)
class Wiring:
    """All operations before and after, by key, in order of execution; a key means the same value in both."""

    before: Mapping[int, Node] = field(default_factory=dict)
    after: Mapping[int, Node] = field(default_factory=dict)
