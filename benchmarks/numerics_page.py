"""Tables and figure of `benchmarks/numerics.py`, put between the marks of docs/numerics.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import marks

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, FIGURE = DOCS / "numerics.md", DOCS / "figures" / "numerics.svg"
COLUMNS = {
    "float64, fused": "float64: fused",
    "float32": "float32: net",
    "float32, fused": "fused",
    "bfloat16": "bf16: net",
    "bfloat16, cast and fused": "cast, fused",
    "bfloat16, fused and cast": "fused, cast",
    "float16": "fp16: net",
    "float16, cast and fused": "cast, fused",
    "float16, fused and cast": "fused, cast",
}
SHARES = {
    "float32, fused": "float32, fused",
    "bfloat16, cast and fused": "bf16, cast and then fused",
    "bfloat16, fused and cast": "bf16, fused and then cast",
    "float16, cast and fused": "fp16, cast and then fused",
    "float16, fused and cast": "fp16, fused and then cast",
}
STYLES = {"": ("C7", "--"), ", cast and fused": ("C1", "-"), ", fused and cast": ("C0", "-"), ", fused": ("C0", "-")}


def write_page(run: dict[str, Any]) -> None:
    """Write the figure, and the tables between their marks."""
    draw(run["rows"], FIGURE)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), run), encoding="utf-8")


def filled(page: str, run: dict[str, Any]) -> str:
    """The page with the tables of a run."""
    for name, text in parts(run).items():
        page = marks.filled(page, f"{name}: benchmarks/numerics.py", text)
    return page


def parts(run: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks, by name."""
    kinds = {kind: [row for row in run["rows"] if row["kind"] == kind] for kind in ("ladder", "timm", "amplifier")}
    machine = run["machine"]
    rows = [*kinds["ladder"], *kinds["timm"]]
    within = max(row["errors"]["apart"] / row["errors"]["allowed"] for row in rows)
    return {
        "depth": table("blocks", kinds["ladder"]),
        "nets": table("net", kinds["timm"]),
        "amplifiers": table("", kinds["amplifier"]),
        "nearer": nearer(rows),
        "verify": "Over all nets above, the difference of net and fused net in float32 was at most"
        f" {within:.2f} of what `verify` allows.\n",
        "machine": f"{machine['name']}, one thread, torch {machine['torch']}, timm {machine['timm']}.\n",
    }


def table(first: str, rows: Sequence[dict[str, Any]]) -> str:
    """Errors as a Markdown table."""
    lines = [f"| {first} | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
    for row in rows:
        name = str(row["depth"]) if row["kind"] == "ladder" else row["name"]
        name += f", {row['statistics']}" if "statistics" in row else ""
        lines.append(f"| {name} | {' | '.join(shown(row['errors'][key]) for key in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def shown(error: float | None) -> str:
    """An error; None is an overflow."""
    return "overflows" if error is None else f"{error:.0e}".replace("e-0", "e-") if error < 0.095 else f"{error:.2g}"


def nearer(rows: Sequence[dict[str, Any]]) -> str:
    """In how many runs the fused net was nearer to the truth, and by how much on average."""
    lines = ["| | nearer to the truth than the net in this type | its error, relative to that of the net |"]
    lines.append("|---|---:|---:|")
    for key, name in SHARES.items():
        dtype = key.partition(",")[0]
        finite = [row for row in rows if row["errors"][dtype] is not None and row["errors"][key] is not None]
        ratio = 1.0
        for row in finite:
            ratio *= (row["errors"][key] / row["errors"][dtype]) ** (1 / len(finite))
        runs, won = (sum(number) for number in zip(*((r["runs"], r["nearer"][key]) for r in finite), strict=True))
        lines.append(f"| {name} | {won} of {runs} runs | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Error by depth, one panel for each data type."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    ladder = [row for row in rows if row["kind"] == "ladder" and row["statistics"] == "trained-like"]
    panels = {"float32": (", fused",), "bfloat16": (", cast and fused", ", fused and cast")}
    panels["float16"] = panels["bfloat16"]
    settings = {"svg.hashsalt": "reparam", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False}
    with plt.rc_context({**settings, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
        for axis, (dtype, ways) in zip(axes, panels.items(), strict=True):
            for way in ("", *ways):
                found = [(row["depth"], row["errors"][dtype + way]) for row in ladder]
                points = [(depth, error) for depth, error in found if error is not None]
                colour, line = STYLES[way]
                label = way.removeprefix(", ").replace(" and ", ", then ") or "not fused"
                axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=".", label=label)
            depths = [row["depth"] for row in ladder]
            axis.set(xscale="log", yscale="log", title=dtype, xlabel="RepVGG blocks")
            axis.set_xticks(depths, [str(depth) for depth in depths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        axes[0].set_ylabel("largest error / largest output")
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
