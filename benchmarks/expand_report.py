"""The figures of `benchmarks/expand.py` as a table, a picture and what they allow to say."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from benchmarks import ROOT
from benchmarks.marks import put
from benchmarks.page import save, table
from benchmarks.paired import Ratio

PAGE = ROOT / "docs" / "expand_benchmark.md"
BLOCK = "figures: benchmarks/expand.py"
LEVEL = 0.95
FEWEST_SEEDS = 3
HEAD = (
    "beside every kernel", "test accuracy", "lowest … highest", "difference to plain", "95 % interval", "p",
    "step time", "step memory", "parameters", "after fusing: time",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One variant over all seeds; accuracies and differences in percent and percentage points.

    Args:
        name: key of the variant.
        title: in the table.
        accuracies: one per seed.
        differences: to the plain net of the same seed; empty for the plain net itself.
        p: of the paired t-test, after Holm's correction; None for the plain net.
        cost: as measured.
    """

    name: str
    title: str
    accuracies: Sequence[float]
    differences: Sequence[float]
    p: float | None
    cost: Mapping[str, Any]

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean difference, from Student's t."""
        mean, count = statistics.fmean(self.differences), len(self.differences)
        half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * statistics.stdev(self.differences) / count**0.5
        return mean - half, mean + half

    @property
    def verdict(self) -> int:
        """1: better than the plain net, -1: worse, 0: neither was shown."""
        if self.p is None or self.p >= 1 - LEVEL:
            return 0
        return 1 if statistics.fmean(self.differences) > 0 else -1


def finished_seeds(results: Mapping[str, Any], variants: Mapping[str, Any]) -> list[str]:
    """Seeds with which every variant was trained."""
    runs = results["runs"]
    return [seed for seed in runs.get("plain", {}) if all(seed in runs.get(name, {}) for name in variants)]


def rows(results: Mapping[str, Any], variants: Mapping[str, Any]) -> list[Row]:
    seeds = finished_seeds(results, variants)
    accuracy = {name: [100 * results["runs"][name][seed]["accuracy"] for seed in seeds] for name in variants}
    differences = {
        name: [one - base for one, base in zip(accuracy[name], accuracy[variant.plain], strict=True)]
        for name, variant in variants.items()
        if name != variant.plain
    }
    raw = {name: float(stats.ttest_1samp(values, 0).pvalue) for name, values in differences.items()}
    p = holm(raw)
    return [
        Row(name, variant.title, accuracy[name], differences.get(name, ()), p.get(name), results["costs"][name])
        for name, variant in variants.items()
    ]


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p values such that all of them together err with the probability of one.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.

    >>> holm({"a": 0.01, "b": 0.5, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.5}
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for index, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, p[name] * (len(p) - index)))
        corrected[name] = round(largest, 12)
    return corrected


def block(results: Mapping[str, Any], variants: Mapping[str, Any], compared: int) -> str:
    """The text between the marks; ``compared`` images of every run were seen by both forms of the net."""
    seeds = finished_seeds(results, variants)
    if len(seeds) < FEWEST_SEEDS:
        return "Run `python -m benchmarks.expand`.\n"
    found, settings = rows(results, variants), results["settings"]
    runs = [run for name in variants for seed, run in results["runs"][name].items() if seed in seeds]
    changed = sum(run["changed_by_fusing"] for run in runs)
    tested = 5000 - settings["images"]
    about = [
        f"{len(seeds)} seeds; {settings['images']} images to train on, {tested:,} to test on,"
        f" {settings['epochs']} epochs of {settings['images'] // settings['batch']} steps. ± is the standard deviation"
        " over seeds.",
        f"Fusing changed {changed} of {len(runs) * compared:,} predictions that were compared.",
        *(fused(row) for row in found if row.p is None),
        f"Machine: {results['machine']}.",
    ]
    return "\n".join([table(HEAD, map(cells, found)), "", *about, "", *conclusions(found)]) + "\n"


def fused(plain: Row) -> str:
    """What the deployed net of a plain one holds and runs."""
    counts = plain.cost["fused"]
    return (
        f"Fused, {plain.title} has {counts['parameters']:,} parameters and runs {counts['operations']} operations with"
        f" {counts['multiply_adds']:,} multiply-adds per image."
    )


def cells(row: Row) -> list[str]:
    mean, spread = statistics.fmean(row.accuracies), statistics.stdev(row.accuracies)
    shown = [row.title, f"{mean:.2f} ± {spread:.2f} %", f"{min(row.accuracies):.1f} … {max(row.accuracies):.1f}"]
    if row.p is None:
        shown += ["", "", ""]
    else:
        low, high = row.interval
        small = f"{row.p:.3f}" if row.p >= 0.001 else "< 0.001"
        shown += [f"{statistics.fmean(row.differences):+.2f}", f"{low:+.2f} … {high:+.2f}", small]
    cost = row.cost
    same = "same" if cost["fused_structure_equal"] else "other"
    step = "1" if row.p is None else str(Ratio(*cost["step_ratio"]))
    after = "1" if row.p is None else f"{same} net; {Ratio(*cost['fused_ratio'])}"
    return [*shown, step, f"{cost['peak_ratio']:.2f}", f"{cost['parameters']:,}", after]


def conclusions(found: Sequence[Row]) -> list[str]:
    """What the figures show, and what they do not."""
    compared = [row for row in found if row.p is not None]
    lines = []
    for verdict, said in ((1, "Better than the plain net"), (-1, "Worse than the plain net"), (0, "Neither was shown")):
        names = ", ".join(row.title for row in compared if row.verdict == verdict)
        lines.append(f"- {said}: {names or 'none'}.")
    halves = [(row.interval[1] - row.interval[0]) / 2 for row in compared]
    lines.append(
        f"- Differences below {min(halves):.1f} to {max(halves):.1f} points, the half widths of the intervals, are not"
        " told apart from none."
    )
    return lines


def draw(found: Sequence[Row]) -> None:
    """Differences to the plain net: a dot per seed, the mean, and its interval."""
    compared = [row for row in found if row.p is not None]
    figure = Figure(figsize=(7, 0.4 * len(compared) + 1), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=1)
    for place, row in enumerate(reversed(compared)):
        low, high = row.interval
        axes.plot(row.differences, [place] * len(row.differences), ".", color="0.6", markersize=5)
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=2)
        axes.plot(statistics.fmean(row.differences), place, "o", color="tab:blue", markersize=6)
    axes.set_yticks(range(len(compared)), [row.title.replace("`", "") for row in reversed(compared)])
    axes.set_xlabel("test accuracy minus that of the plain net of the same seed, percentage points")
    save(figure, "expand")


def update(results: Mapping[str, Any], variants: Mapping[str, Any], compared: int) -> None:
    """Write the figures into the page, and the picture beside it."""
    put(PAGE, BLOCK, block(results, variants, compared))
    if len(finished_seeds(results, variants)) >= FEWEST_SEEDS:
        draw(rows(results, variants))
