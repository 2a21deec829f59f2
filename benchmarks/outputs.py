"""What `fuse` returns, timed in six runtimes beside the net as it was and the form that its author's converter gives.

python -m benchmarks.outputs             fills benchmarks/results/outputs.json and docs/speed.md; about 20 minutes
python -m benchmarks.outputs --quick     two nets, printed
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import page
from benchmarks.cells import SCRATCH, Results, Settings, run, settings, setup
from benchmarks.paired import Ratio, milliseconds, ratio, time_forms
from benchmarks.runtimes import COMPILE_FOR_LONG, RUNTIMES, Place
from benchmarks.subjects import QUICK, SUBJECTS, fingerprint

BATCHES = (1, 8)
COUNTS = ("convs", "norms", "adds", "kernels")


def cells(chosen: Settings) -> list[tuple[str, tuple[str, str, int]]]:
    """Name and arguments of every cell; what takes long to compile comes last."""
    names = QUICK if chosen.quick else tuple(SUBJECTS)
    batches = BATCHES[:1] if chosen.quick else BATCHES
    slow = [(name, runtime, batch) for batch in batches[::-1] for runtime in COMPILE_FOR_LONG for name in names]
    quick = [
        (name, runtime, batch)
        for name in names
        for batch in batches
        for runtime in RUNTIMES
        if runtime not in COMPILE_FOR_LONG
    ]
    return [(key(*cell), cell) for cell in (*quick, *slow)]


def key(name: str, runtime: str, batch: int) -> str:
    return f"{name} | {runtime} | {batch}"


def measure(chosen: Settings, name: str, runtime: str, batch: int) -> dict[str, Any]:
    """One cell: what `fuse` returned; seconds per round, operations and difference from the net as it was, by form."""
    torch.set_num_threads(chosen.threads)
    subject = SUBJECTS[name]
    x = subject.input(batch)
    forms = subject.forms()
    fused = fingerprint(forms["fused"])
    expected = RUNTIMES["eager"](forms["unfused"], x, Place(Path(), chosen.threads)).outputs
    prepared = {}
    for form, net in forms.items():
        place = Place(folder() / "onnx" / f"{fingerprint(net)}-{batch}", chosen.threads)
        prepared[form] = RUNTIMES[runtime](net, x, place)
    return {
        "fused": fused,
        "counts": {form: p.counts for form, p in prepared.items()},
        "errors": {form: error(expected, p.outputs, subject.ranked) for form, p in prepared.items()},
        "seconds": time_forms({form: p.run for form, p in prepared.items()}, chosen.seconds, chosen.threads),
    }


def still_true(cells: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells of nets of which `fuse` returns the same as when they were measured, and whose forms are the same."""
    subjects = {name: SUBJECTS[name.partition(" | ")[0]] for name in cells}
    now = {subject: subject.fused() for subject in set(subjects.values())}
    return {
        name: cell
        for name, cell in cells.items()
        if cell.get("fused") == now[subjects[name]]
        and ("author" in cell["seconds"]) == (subjects[name].convert is not None)
    }


def folder() -> Path:
    return Path(os.environ.get("REPARAM_BENCHMARKS", SCRATCH))


def error(expected: list[torch.Tensor], found: list[torch.Tensor], ranked: bool = False) -> float:
    """Largest difference of the first output, relative to its largest number.

    >>> error([torch.tensor([[1.0, 2.0]])], [torch.tensor([[2.0, 1.0]])], ranked=True)
    0.0
    """
    first, other = expected[0], found[0]
    if ranked:
        first, other = (x.flatten(1).sort().values for x in (first, other))
    return float(f"{((first - other).abs().max() / first.abs().max()).item():.1e}")


# --- the page ---------------------------------------------------------------------------------------------------------


def faster(cell: dict[str, Any] | None, form: str) -> Ratio | None:
    """How many times as long as the fused net another form takes."""
    return ratio(cell["seconds"][form], cell["seconds"]["fused"]) if cell and form in cell["seconds"] else None


def nets(results: Results) -> list[str]:
    """Nets of which there is a cell, in their order."""
    found = {name.partition(" | ")[0] for name in results.good}
    return [name for name in SUBJECTS if name in found]


def ratios(results: Results, form: str, batch: int) -> str:
    """Nets by runtimes."""
    rows = []
    for name in nets(results):
        found = [faster(results.good.get(key(name, runtime, batch)), form) for runtime in RUNTIMES]
        if any(found):
            label = f"{name} ({SUBJECTS[name].converter})" if form == "author" else name
            rows.append([label, *(value or "–" for value in found)])
    return page.table(("net", *RUNTIMES), rows)


def times(results: Results, batch: int) -> str:
    rows = []
    for name in nets(results):
        found = [results.good.get(key(name, runtime, batch)) for runtime in RUNTIMES]
        rows.append([name, *(milliseconds(cell["seconds"]["fused"]) if cell else "–" for cell in found)])
    return page.table(("net", *RUNTIMES), rows)


def graphs(results: Results) -> str:
    """Operations of the net as it was and of the fused one, in the runtime's own graph."""
    rows = []
    for name in nets(results):
        row = [name]
        for runtime in RUNTIMES:
            cell = next((c for b in BATCHES if (c := results.good.get(key(name, runtime, b)))), None)
            row.append(" → ".join(_counts(cell["counts"][form]) for form in ("unfused", "fused")) if cell else "–")
        rows.append(row)
    return page.table(("net", *RUNTIMES), rows)


def _counts(counts: dict[str, int]) -> str:
    return "/".join(str(counts[kind]) for kind in COUNTS)


def summary(results: Results) -> list[str]:
    """The figures in sentences."""
    compared = {name: faster(cell, "author") for name, cell in results.good.items()}
    known = {name: value for name, value in compared.items() if value is not None}
    slower = [f"{name.replace(' | ', ', ')}: {value}" for name, value in known.items() if value.below_one]
    quicker = sum(value.known and value.low > 1 for value in known.values())
    lines = [
        f"- Against the author's form: {len(known)} comparisons; the fused net is faster beyond the noise in {quicker},"
        f" slower beyond the noise in {len(slower)} (by chance alone, {0.025 * len(known):.1f} of each are expected)"
        f"{': ' + '; '.join(slower) if slower else ''}.",
        f"- Largest relative difference of an output, fused against unfused, in float32 and in every runtime:"
        f" {max(cell['errors']['fused'] for cell in results.good.values()):.0e}.",
    ]
    for runtime in RUNTIMES:
        found = [faster(cell, "unfused") for name, cell in results.good.items() if f"| {runtime} |" in name]
        medians = [value.median for value in found if value is not None]
        if medians:
            mean = float(np.exp(np.log(medians).mean()))
            lines.append(
                f"- {runtime}: fused {mean:.2f} times as fast as unfused in the geometric mean of {len(medians)} cells,"
                f" {min(medians):.2f} to {max(medians):.2f}."
            )
    return lines


def text(results: Results) -> str:
    """What the page shows."""
    if not results.good:
        return page.ABSENT
    parts = [*summary(results), "", page.machine(results), "", *page.failures(results)]
    parts += ["![Time of the unfused net over time of the fused one](images/speed_outputs.svg)", ""]
    for batch in BATCHES:
        parts += [f"### Unfused over fused, batch {batch}", "", ratios(results, "unfused", batch), ""]
        parts += [f"### Author's form over fused, batch {batch}", "", ratios(results, "author", batch), ""]
        parts += [f"### Fused, milliseconds, batch {batch}", "", times(results, batch), ""]
    parts += ["### What each runtime runs: convs/norms/adds/kernels, unfused → fused", "", graphs(results)]
    return "\n".join(parts)


def picture(results: Results, batch: int = 1) -> Figure:
    """Unfused over fused with its interval: one row per net, one colour per runtime."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    names = nets(results)[::-1]
    for index, runtime in enumerate(RUNTIMES):
        for row, name in enumerate(names):
            value = faster(results.good.get(key(name, runtime, batch)), "unfused")
            if value is None:
                continue
            ends = [[value.median - value.low], [value.high - value.median]] if value.known else None
            height = row + 0.1 * (len(RUNTIMES) / 2 - index)
            axes.errorbar(value.median, height, xerr=ends, fmt="o", markersize=4, color=f"C{index}")
        axes.plot([], [], "o", color=f"C{index}", label=runtime)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"time unfused / time fused, batch {batch} (median, 95% interval)")
    axes.legend(fontsize="small")
    return figure


def main() -> int:
    chosen = settings(__doc__, minutes=18, seconds=4)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder() / "inductor"))
    results = Results.resumed(chosen.file("outputs"), setup(chosen), chosen.fresh)
    results.cells = still_true(results.cells)
    run(cells(chosen), measure, results, chosen)
    if chosen.out is None:
        page.save(picture(results), "speed_outputs")
    page.publish("outputs", text(results), chosen.out is None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
