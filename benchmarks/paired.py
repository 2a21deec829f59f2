"""Times of several forms of a net, taken in turn, and their ratios: medians with the interval that they are known to.

A ratio is formed within each round, so that what slows the machine for a while slows both sides of it. The interval is
that of the median at 95%, from order statistics alone (`scipy.stats.quantile_test`): no distribution is assumed.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from reparam.timing import in_turn

FEWEST_ROUNDS = 7  # with fewer than six, no interval of the median reaches 95%
MOST_ROUNDS = 25

Times = dict[str, list[float]]  # seconds of one call, one entry per round


@dataclass(frozen=True)
class Ratio:
    """A ratio of times.

    Args:
        median: over the rounds.
        low: lower end of the 95% interval of the median; NaN with fewer than six rounds.
        high: upper end.
    """

    median: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there were enough rounds for an interval."""
        return not math.isnan(self.low)

    @property
    def below_one(self) -> bool:
        """Whether the ratio is below 1 by more than the noise."""
        return self.known and self.high < 1

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})" if self.known else f"{self.median:.2f}"


def time_forms(runs: Mapping[str, Callable[[], Any]], seconds: float, threads: int) -> Times:
    """Seconds per call of every form in every round.

    Args:
        runs: what is called, by name of the form; each has been called before.
        seconds: for all rounds together; exceeded where `FEWEST_ROUNDS` take longer.
        threads: of torch.
    """
    slice_ = seconds / (FEWEST_ROUNDS * 2 * len(runs))
    measured = in_turn(runs, _rounds(seconds), slice_, threads)
    return {name: [float(f"{m.median:.4g}") for m in found] for name, found in measured.items()}


def _rounds(seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    for index in range(MOST_ROUNDS):
        if index >= FEWEST_ROUNDS and time.monotonic() > end:
            return
        yield index


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median and interval of `above / below`, entry by entry.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]).median
    2.0
    """
    quotients = np.asarray(above) / np.asarray(below)
    interval = stats.quantile_test(quotients, q=1.0, p=0.5).confidence_interval(0.95)
    return Ratio(float(np.median(quotients)), float(interval.low), float(interval.high))


def milliseconds(times: Sequence[float]) -> str:
    """The median, to three digits.

    >>> milliseconds([0.0123456, 0.0123456])
    '12.3'
    """
    value = 1e3 * float(np.median(times))
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
