"""Where `reparam.fuse` spends its time: processor time of each of its phases, without that of phases within."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

import reparam
from reparam.graph import fusing, session
from reparam.graph.net_plan import NetPlan
from reparam.graph.reports import Reports

# What is called for each phase, by where it is looked up.
PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "reading": ((session, "read"),),
    "channels, ranks": ((session.Known, "of"),),
    "planning": ((session, "plan_net"),),
    "weights": ((NetPlan, "numbers"), (session, "built"), (session, "_unfit")),
    "check": ((session, "region_error"), (session, "group_error")),
    "new modules": ((session.Emitter, "apply"),),
    "receipt": ((Reports, "receipt"),),
    "copy": ((fusing.copy, "deepcopy"), (fusing.State, "__init__"), (fusing.State, "restore")),
}


@contextmanager
def timed_phases() -> Iterator[Counter[str]]:
    """While it lasts, seconds of processor time are added up by phase."""
    spent: Counter[str] = Counter()
    inside: list[float] = []
    originals = [(home, name, vars(home)[name]) for places in PHASES.values() for home, name in places]

    def timing(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - begun
                spent[phase] += taken - inside.pop()
                if inside:
                    inside[-1] += taken

        return run

    try:
        for phase, places in PHASES.items():
            for home, name in places:
                found = vars(home)[name]
                static = isinstance(found, staticmethod | classmethod)
                new = timing(found.__func__ if static else found, phase)
                setattr(home, name, type(found)(new) if static else new)
        yield spent
    finally:
        for home, name, original in originals:
            setattr(home, name, original)


def phases(model: nn.Module, rounds: int) -> dict[str, float]:
    """Milliseconds of every phase of a checked call that fuses a copy, and of the whole; medians."""
    reparam.fuse(model)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        with timed_phases() as spent:
            begun = time.process_time()
            reparam.fuse(model)
            whole = time.process_time() - begun
        found.append({**spent, "rest": whole - sum(spent.values()), "all": whole})
    return {phase: 1e3 * statistics.median(one.get(phase, 0.0) for one in found) for phase in (*PHASES, "rest", "all")}
