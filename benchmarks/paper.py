"""The tables of the RepVGG paper as ratios, beside what is measured here.

    python -m benchmarks.paper             fills benchmarks/results/paper.json and docs/speed.md; about five minutes
    python -m benchmarks.paper --quick     three nets, printed

Runs on CUDA where there is a device, as the paper did, and else on the CPU.
"""

import sys
import warnings
from typing import Any

import torch
from matplotlib.figure import Figure
from nets import randomise
from scipy import stats
from torch import nn
from torch.fx.experimental.optimization import fuse as fold_norms

import reparam
from benchmarks import page
from benchmarks.branches import Sum, maps_held, with_branches
from benchmarks.cells import Results, Settings, code, run, settings, setup
from benchmarks.paired import ratio, time_forms
from benchmarks.published import QUICK, REFERENCE, TABLE_4, TABLE_6
from reparam.models import repvgg_b0
from reparam.models.count import count

CUDA_BATCH = 128  # the paper's
CPU_BATCH = 4
SIZE = 224


def cells(chosen: Settings) -> list[tuple[str, tuple[Any, ...]]]:
    names = QUICK if chosen.quick else tuple(TABLE_4)
    return [("counts", ("counts", names)), ("memory", ("memory",)), *((c, (c, names)) for c in ("branches", "speed"))]


def measure(chosen: Settings, what: str, *arguments: Any) -> dict[str, Any]:
    """One table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    return {"speed": speed, "branches": branches, "memory": memory, "counts": counts}[what](chosen, *arguments)


def batch(chosen: Settings) -> torch.Tensor:
    size = CUDA_BATCH if chosen.device.startswith("cuda") else CPU_BATCH
    return torch.randn(size, 3, SIZE, SIZE, device=chosen.device)


def ready(net: nn.Module, chosen: Settings) -> nn.Module:
    return randomise(net.eval()).to(chosen.device)


def timed(chosen: Settings, nets: dict[str, nn.Module]) -> dict[str, Any]:
    x = batch(chosen)
    with torch.inference_mode():
        for net in nets.values():
            net(x)
    runs = {name: (lambda net=net: net(x)) for name, net in nets.items()}
    return {"batch": len(x), "seconds": time_forms(runs, chosen.seconds, chosen.threads)}


def speed(chosen: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """Table 4: every net fused, as the paper folds the norms of all."""
    nets = {name: reparam.fuse(ready(TABLE_4[name].build(), chosen), check=False) for name in names}
    return timed(chosen, nets)


def branches(chosen: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """Table 6: RepVGG-B0 with fewer branches, as trained and with norms folded into the convolutions before them."""
    nets: dict[str, nn.Module] = {}
    for kept in TABLE_6:
        net = with_branches(repvgg_b0(), *kept)
        nets[branch_key(kept, "as trained")] = ready(net, chosen)
        nets[branch_key(kept, "norms folded")] = fold_norms(net)
    nets["fused"] = reparam.fuse(net, check=False)
    return timed(chosen, nets)


def branch_key(kept: tuple[bool, bool], form: str) -> str:
    identity, pointwise = kept
    present = [name for name, there in (("identity", identity), ("1×1", pointwise)) if there]
    return f"{' and '.join(present) or 'none'}, {form}"


def memory(chosen: Settings) -> dict[str, Any]:
    """Figure 3: feature maps that have to be held between two operations."""

    def conv() -> nn.Module:
        return nn.Conv2d(64, 64, 3, padding=1)

    def two() -> nn.Module:
        return nn.Sequential(conv(), nn.ReLU(inplace=True), conv())

    x = torch.randn(1, 64, 56, 56)
    trained = Sum([nn.Sequential(conv(), nn.BatchNorm2d(64)), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)]).eval()
    blocks = {
        "plain: convolutions one after the other": nn.Sequential(Sum([conv()]), Sum([conv()])),
        "residual, two convolutions": Sum([two(), nn.Identity()]),
        "RepVGG as trained": trained,
        "RepVGG fused": reparam.fuse(trained),
    }
    return {"maps": {name: maps_held(net, x) for name, net in blocks.items()}}


def counts(chosen: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """Table 4: parameters, FLOPs and Winograd multiplications of the fused nets."""
    found = {}
    for name in names:
        net = TABLE_4[name].build().to("meta").eval()  # a RegNet computes its widths with tensors while it is built
        found[name] = count(reparam.fuse(net, check=False), (3, SIZE, SIZE)).figures
    return {"counts": found}


# --- the page ---------------------------------------------------------------------------------------------------------


def speed_table(cell: dict[str, Any]) -> str:
    """Images per second here and there, and both relative to ResNet-50."""
    seconds, images = cell["seconds"], cell["batch"]
    rows, ours, theirs = [], [], []
    for name in sorted(seconds, key=lambda name: -TABLE_4[name].speed):
        relative = ratio(seconds[REFERENCE], seconds[name])
        published = TABLE_4[name].speed / TABLE_4[REFERENCE].speed
        per_second = images * ratio([1.0] * len(seconds[name]), seconds[name]).median
        rows.append([name, TABLE_4[name].speed, f"{published:.2f}", f"{per_second:.1f}", relative])
        ours.append(relative.median)
        theirs.append(published)
    head = ("net", "paper, img/s", f"paper, {REFERENCE} = 1", "here, img/s", f"here, {REFERENCE} = 1")
    agreement = stats.kendalltau(ours, theirs).statistic
    note = f"Batch {images}. Agreement of the two orders: Kendall's τ = {agreement:.2f} (1: the same order)."
    return f"{page.table(head, rows)}\n\n{note}"


def branch_table(cell: dict[str, Any]) -> str:
    seconds = cell["seconds"]
    head = ["branches beside the 3×3", "paper"]
    forms = ("as trained", "norms folded")
    rows = []
    for kept, images in TABLE_6.items():
        plain = [ratio(seconds["fused"], seconds[branch_key(kept, form)]) for form in forms]
        rows.append(
            [branch_key(kept, "").rstrip(", "), f"{images} img/s, {images / TABLE_6[False, False]:.2f}", *plain]
        )
    return page.table((*head, *(f"here, {form}" for form in forms)), rows) + "\n\nSpeed relative to the fused net."


def counts_table(cell: dict[str, Any]) -> str:
    rows = []
    for name, found in cell["counts"].items():
        row = TABLE_4[name]
        published = (f"{row.parameters:.2f}", row.flops, "–" if row.winograd_muls is None else row.winograd_muls)
        ours = (f"{found[0]:.2f}", found[1], found[2])
        rows.append([name, *(f"{x} ({y})" for x, y in zip(ours, published, strict=True))])
    head = ("net", "parameters, M (paper)", "FLOPs, B (paper)", "Winograd MULs, B (paper)")
    note = (
        "torchvision's ResNet-50 and -101 halve the image in the 3×3 convolutions of their blocks, the original nets in"
        " the 1×1 convolutions before these: so their FLOPs are more."
    )
    return f"{page.table(head, rows)}\n\n{note}"


def memory_table(cell: dict[str, Any]) -> str:
    return page.table(("block", "feature maps held"), [(k, f"{v:g}") for k, v in cell["maps"].items()])


PARTS = (
    ("speed", "### Table 4, speed\n\n![Speed here and in the paper](images/speed_paper.svg)", speed_table),
    ("branches", "### Table 6, what a branch costs before it is merged", branch_table),
    ("memory", "### Figure 3, memory", memory_table),
    ("counts", "### Table 4, counts", counts_table),
)


def text(results: Results) -> str:
    if not results.good:
        return page.ABSENT
    lines = [page.machine(results), "", *page.failures(results)]
    for name, title, make in PARTS:
        if name in results.good:
            lines += [title, "", make(results.good[name]), ""]
    return "\n".join(lines)


def picture(results: Results) -> Figure:
    """Speed here against speed in the paper, both relative to ResNet-50."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    seconds = results.good["speed"]["seconds"] if "speed" in results.good else {}
    for name in seconds:
        x, y = TABLE_4[name].speed / TABLE_4[REFERENCE].speed, ratio(seconds[REFERENCE], seconds[name]).median
        axes.plot(x, y, "o", color="C0" if name.startswith("RepVGG") else "C1")
        axes.annotate(name, (x, y), fontsize="x-small", xytext=(4, 2), textcoords="offset points")
    axes.axline((1, 1), slope=1, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel=f"paper: speed, {REFERENCE} = 1", ylabel=f"here: speed, {REFERENCE} = 1")
    return figure


def main() -> int:
    chosen = settings(__doc__, minutes=8, seconds=60)
    results = Results.resumed(chosen.file("paper"), setup(chosen) | {"reparam": code()}, chosen.fresh)
    run(cells(chosen), measure, results, chosen)
    if chosen.out is None:
        page.save(picture(results), "speed_paper")
    page.publish("paper", text(results), chosen.out is None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
