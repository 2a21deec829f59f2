"""Figures of docs/algebra.md, as SVG in docs/figures: `python docs/make_figures.py`. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

FIGURES = Path(__file__).resolve().parent / "figures"
SETTINGS = {"svg.hashsalt": "reparam", "svg.fonttype": "path", "font.size": 10}
BLUE, OCHRE = "#4a7fb5", "#b58900"
SHIFT = (-0.2, 0.18, 0.2)  # of a label, away from its line
PLAIN, FIRST, SECOND, BOTH, BAD = "#e8e8ee", "#90b8e0", "#f2c14e", "#7fb685", "#e07a5f"


def box(axis: Any, x: float, y: float, text: str, colour: str, dashed: bool = False) -> None:
    """A cell with its centre at ``(x, y)``."""
    line = "--" if dashed else "-"
    axis.add_patch(plt.Rectangle((x - 0.45, y - 0.32), 0.9, 0.64, facecolor=colour, edgecolor="#555", linestyle=line))
    axis.text(x, y, text, ha="center", va="center")


def row(axis: Any, y: float, name: str, cells: dict[float, tuple[str, str]], start: float) -> None:
    """A name and its cells."""
    axis.text(start, y, name, ha="right", va="center")
    for x, (text, colour) in cells.items():
        box(axis, x, y, text, colour)


def canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Any, Any]:
    """A figure without axes."""
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.set(xlim=x, ylim=y, aspect="equal")
    axis.axis("off")
    return figure, axis


def branch_sum() -> Any:
    """Taps of three branches at their offsets, and of their sum."""
    figure, axis = canvas(7, 3.1, (-6.4, 2.8), (-0.6, 3.9))
    row(axis, 3.4, "3 taps, d = 2, lo = 2", {-2.0: ("A", FIRST), 0.0: ("B", FIRST), 2.0: ("C", FIRST)}, -2.8)
    row(axis, 2.4, "1 tap", {0.0: ("P", SECOND)}, -2.8)
    row(axis, 1.4, "identity", {0.0: ("I", PLAIN)}, -2.8)
    total = {-2.0: ("A", FIRST), 0.0: ("B+P+I", BOTH), 2.0: ("C", FIRST)}
    row(axis, 0.2, "sum: 3 taps, d = 2, lo = 2", total, -2.8)
    axis.plot([-6.3, 2.7], [0.8, 0.8], color="#555", linewidth=0.8)
    for offset in range(-2, 3):
        axis.text(offset, -0.45, f"{offset:+d}" if offset else "0", ha="center", va="center", color="#777")
    axis.text(-2.8, -0.45, "offset", ha="right", va="center", color="#777")
    return figure


def chain() -> Any:
    """Which inputs one output of a chain reads: two taps after three taps of stride 2."""
    figure, axis = canvas(7, 3.1, (-1.9, 7.9), (-0.5, 3.9))
    for at in range(8):
        box(axis, at, 0, f"x{at}", PLAIN if 1 <= at <= 5 else "white")
    for m, centre in ((0, 2.0), (1, 4.0)):
        box(axis, centre, 1.7, f"v[{m}]", FIRST)
        for a in range(3):
            axis.plot([centre, centre - 1 + a], [1.38, 0.32], color=BLUE, linewidth=1.2)
            axis.text(centre - 0.5 + a / 2 + SHIFT[a], 0.9, f"V{a}", ha="center", fontsize=8, color=BLUE)
        axis.plot([3.0, centre], [3.08, 2.02], color=OCHRE, linewidth=1.2)
        axis.text((3 + centre) / 2 - 0.25 + m / 2, 2.6, f"U{m}", ha="center", fontsize=8, color=OCHRE)
    box(axis, 3.0, 3.4, "u[0]", SECOND)
    axis.text(5.0, 3.4, "five taps of stride 2: U0V0, U0V1, U0V2 + U1V0, U1V1, U1V2", fontsize=8, va="center")
    axis.set(xlim=(-0.7, 11.5))
    return figure


def border() -> Any:
    """Why a bias does not pass a padding by zeros, and passes one by itself."""
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.7), layout="constrained")
    cases = (
        ("what the net does:\nthe reader pads by zeros", "0", PLAIN, "U0·0 + U1·v0 + U2·v1"),
        ("what the formula gives there,\nif v = Wx + b", "b", BAD, "U0·b + U1·v0 + U2·v1"),
        ("padded by the bias:\nboth are the same", "b", BOTH, "U0·b + U1·v0 + U2·v1"),
    )
    for axis, (title, outside, colour, result) in zip(axes, cases, strict=True):
        axis.set(xlim=(-1.7, 3.2), ylim=(-0.6, 2.7), aspect="equal")
        axis.axis("off")
        axis.set_title(title, fontsize=9)
        box(axis, -1, 0, outside, colour, dashed=True)
        for at in range(3):
            box(axis, at, 0, f"v{at}", FIRST)
        axis.text(2.75, 0, "…", va="center", ha="center")
        axis.axvline(-0.5, ymin=0.05, ymax=0.33, color="#555", linewidth=1.5)
        box(axis, 0, 1.5, "u0", SECOND)
        for at in (-1, 0, 1):
            axis.plot([0, at], [1.18, 0.32], color=OCHRE, linewidth=1.2)
            axis.text(at * 0.5 - 0.08 - 0.06 * (at < 0), 0.7, f"U{at + 1}", fontsize=8, ha="right", color=OCHRE)
        axis.text(0.6, 2.25, result, fontsize=9, ha="center")
    return figure


def extension() -> Any:
    """Outputs outside the value: constant only if all their taps are outside."""
    figure, axis = canvas(8, 2.9, (-5.8, 5.4), (-0.6, 3.2))
    for at in range(-3, 5):
        inside = at >= 0
        box(axis, at, 0, f"x{at}" if inside else "0", PLAIN if inside else "white", dashed=not inside)
    axis.text(-3.7, 0, "x, extended", ha="right", va="center")
    for y, lo, name in ((1.3, 2, "lo = 2: full padding"), (2.5, 1, "lo = 1")):
        first = -1 - lo
        touches = first + 2 >= 0
        axis.text(-3.7, y, name, ha="right", va="center")
        centre = first + 1
        box(axis, centre, y, "v[−1]", BAD if touches else BOTH, dashed=True)
        axis.plot([first, first + 2], [y - 0.42, y - 0.42], color="#555", linewidth=2)
        text = "reads x0: varies" if touches else "reads zeros only: a constant"
        axis.text(centre + 1.4, y, text, ha="left", va="center", color=BAD if touches else "#3d7a4d")
    return figure


def main() -> None:
    """Write all figures."""
    FIGURES.mkdir(exist_ok=True)
    with plt.rc_context(SETTINGS):
        for draw in (branch_sum, chain, border, extension):
            figure = draw()
            figure.savefig(FIGURES / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
