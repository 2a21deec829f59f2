"""A heat map of the largest weight of every output channel, before and after, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reparam.errors import MissingPackageError, ReparamError
from reparam.files import in_a_folder

if TYPE_CHECKING:
    from reparam.graph.weight_ranges import ChannelRanges


def draw_ranges(ranges: "Sequence[ChannelRanges]", file: Path) -> Path:
    """Draw one line per region, one cell per output channel: its largest weight, in medians of the line."""
    if not ranges:
        raise ReparamError("expected a plan with regions, found none: nothing is fused, and print(plan) says why")
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError.of("matplotlib", "draws heat maps", "draw") from error
    endings = [f".{kind}" for kind in sorted(Figure().canvas.get_supported_filetypes())]
    if file.suffix not in endings:
        raise ReparamError(f"expected a file that ends in {', '.join(endings)}, found {file.name!r}: give it an ending")
    in_a_folder(file)
    figure = Figure(figsize=(12, 2.0 + 0.22 * len(ranges)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines = [([relative(r.before) for r in ranges], "before"), ([relative(r.after) for r in ranges], "after")]
    limit = max(max(float(np.abs(line).max()) for line in found) for found, _ in lines) or 1.0
    mesh: Any = None
    for axes, (found, when) in ((left, lines[0]), (right, lines[1])):
        for at, line in enumerate(found):
            edges = np.linspace(0, 1, len(line) + 1)
            norm = TwoSlopeNorm(0.0, -limit, limit)
            mesh = axes.pcolormesh(edges, [at - 0.45, at + 0.45], line[None, :], cmap="RdBu_r", norm=norm)
        spreads = [r.spread_before if when == "before" else r.spread_after for r in ranges]
        for at, spread in enumerate(spreads):
            axes.text(1.01, at, f"{spread:.1f}\N{MULTIPLICATION SIGN}", va="center", fontsize=7)
        axes.set_title(f"{when} (right: widest channel in medians)", fontsize=9)
        axes.set_xlabel("output channels, in order", fontsize=8)
        axes.set_xticks([])
    left.set_yticks(range(len(ranges)), [r.path or "(model)" for r in ranges], fontsize=7)
    left.invert_yaxis()
    bar = figure.colorbar(mesh, ax=[left, right], location="bottom", shrink=0.4, aspect=40)
    bar.set_label("largest weight of the channel, log2 of medians", fontsize=8)
    figure.savefig(file, dpi=120)
    return file


def relative(ranges: Sequence[float]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Ranges as log2 of their median; a channel of zeros as the smallest of the others."""
    values = np.asarray(ranges, dtype=np.float64)
    positive = values[values > 0]
    if not positive.size:
        return np.zeros_like(values)
    floor = np.maximum(values, positive.min())
    logarithms: np.ndarray[Any, np.dtype[np.float64]] = np.log2(floor / np.median(floor))
    return logarithms
