"""Calls that are compared are timed in turn, so that a busy moment of the machine hits all of them."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement


def in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: Iterable[Any], seconds: float, threads: int
) -> "dict[str, list[Measurement]]":
    """Time every call once in every round, without gradients.

    Args:
        runs: what is called, by name; each has been called before, if its first call takes longer.
        rounds: one item per round.
        seconds: for which a call is repeated in one round; it is made twice at least, and the first is not timed.
        threads: of torch.

    Returns:
        One measurement per round, by name.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says that it finds no GPU
    from torch.utils.benchmark import Timer

    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    found: dict[str, list[Measurement]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in rounds:
            for name, timer in timers.items():
                found[name].append(timer.blocked_autorange(min_run_time=seconds))
    return found
