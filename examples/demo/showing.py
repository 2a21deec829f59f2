"""Tables and the picture."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

import reparam
from demo.comparison import Comparison, Figures

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the tables are then printed plainly
    RICH = False
else:
    RICH = True


def rows(result: Comparison) -> list[tuple[str, str, str, str]]:
    """Figure, before, after, change."""
    before, after = result.before, result.after

    def row(name: str, shown: Callable[[Figures], str], change: str) -> tuple[str, str, str, str]:
        return name, shown(before), shown(after), change

    def ratio(first: int, last: int, word: str) -> str:
        return f"{first / last:.2f}× {word}" if last else "none left"

    points = 100 * (after.accuracy - before.accuracy)
    return [
        row("test accuracy", lambda net: f"{net.accuracy:.2%}", f"{points:+.2f} points" if points else "equal"),
        row("parameters", lambda net: f"{net.parameters:,}", ratio(before.parameters, after.parameters, "fewer")),
        row("convolutions", lambda net: f"{net.convolutions}", ratio(before.convolutions, after.convolutions, "fewer")),
        row("batch norms", lambda net: f"{net.norms}", ratio(before.norms, after.norms, "fewer")),
        row(
            "multiply-adds per image",
            lambda net: f"{net.multiply_adds / 1e6:.2f} M",
            ratio(before.multiply_adds, after.multiply_adds, "fewer"),
        ),
        row("latency, 1 image", lambda net: f"{1e3 * net.latency:.2f} ms", f"{result.latency_ratio:.2f}× faster"),
        row(
            f"throughput, batch {result.batch}",
            lambda net: f"{net.throughput:,.0f} img/s",
            f"{result.throughput_ratio:.2f}× faster",
        ),
        row(
            f"peak activations, batch {result.batch}",
            lambda net: f"{net.peak_activations / 2**20:.2f} MiB",
            ratio(before.peak_activations, after.peak_activations, "smaller"),
        ),
    ]


def show(title: str, lines: Sequence[tuple[str, str, str, str]]) -> None:
    heads = ("", "before fuse", "after fuse", "change")
    if RICH:
        table = Table(title=title, title_justify="left")
        for number, head in enumerate(heads):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    print(title)
    for name, *cells in (heads, *lines):
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))


def show_plan(plan: reparam.Plan) -> None:
    print(f"\nplan: {len(plan.regions)} regions become one operation each, {len(plan.left)} operations are left alone")
    if plan.regions:
        first = plan.regions[0]
        print(f"  the first is {first.path}: {', '.join(first.before)} → {', '.join(first.after)}")
    for rule, number in Counter(refusal.rule for refusal in plan.left).most_common():
        print(f"  left alone by {rule}: {number}")
    print()


def draw(
    path: Path, title: str, history: Sequence[dict[str, float]], result: Comparison, logits: Iterable[Tensor]
) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    curve, bars, dots = figure.subplots(1, 3)

    epochs = [entry["epoch"] for entry in history]
    curve.set(title="training", xlabel="epoch", ylabel="loss on the training images")
    curve.plot(epochs, [entry["loss"] for entry in history], "o-", color="tab:blue", label="loss")
    right = curve.twinx()
    right.set_ylabel("accuracy on the test images, %")
    right.plot(epochs, [100 * entry["accuracy"] for entry in history], "s-", color="tab:orange", label="accuracy")
    curve.legend(handles=[*curve.lines, *right.lines], loc="center right")
    curve.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

    before, after = result.before, result.after
    share = {
        "parameters": after.parameters / before.parameters,
        "convolutions": after.convolutions / before.convolutions,
        "multiply-adds": after.multiply_adds / before.multiply_adds,
        "latency, 1 image": 1 / result.latency_ratio,
        f"time, batch {result.batch}": 1 / result.throughput_ratio,
        f"peak activations, batch {result.batch}": after.peak_activations / before.peak_activations,
    }
    bars.set(title="after fuse, % of before", xlim=(0, 120 * max(1, *share.values())))
    drawn = bars.barh(list(share), [100 * value for value in share.values()], color="tab:green")
    bars.bar_label(drawn, fmt="%.0f %%", padding=3)
    bars.invert_yaxis()

    first, last = (own.flatten().numpy() for own in logits)
    dots.set(
        title=f"test logits, equal within {result.largest_difference:.0e}",
        xlabel="before fuse",
        ylabel="after fuse",
    )
    dots.axline((0, 0), slope=1, color="gray", linewidth=0.8)
    dots.plot(first, last, ".", markersize=2, color="tab:blue", rasterized=True)
    figure.savefig(path, dpi=120)
