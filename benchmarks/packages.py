"""Fuse the nets that Python packages ship, and compare with the packages' own converters: writes docs/packages.md.

Small members with random weights and wide norm statistics, in float64; `pip install -e '.[packages,test]'`.

    python benchmarks/packages.py                  # all, about three minutes on one core
    python benchmarks/packages.py --only yolo LCNet    # those whose names hold one of the words: printed, not written
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the path comes first)
from nets import counted, difference, ready, run  # noqa: E402
from package_detectors import DETECTORS  # noqa: E402
from package_nets import CLASSIFIERS, Net, converted, quiet  # noqa: E402
from tqdm import tqdm  # noqa: E402

import reparam  # noqa: E402

PAGE = ROOT / "docs" / "packages.md"
DISTRIBUTIONS = {
    "holocron": "pylocron",
    "mobileone_pytorch": "mobileone-pytorch",
    "repvgg_pytorch": "repvgg-pytorch",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "ultralytics": "ultralytics-opencv-headless",
}
INTRODUCTION = """\
# Nets of other packages

Written by `benchmarks/packages.py`: small members of the nets that Python packages ship, with random weights and wide
norm statistics, fused by `reparam.fuse` and by the package's own converter. Counts are calls of one run: convolutions
and linear layers, batch norms, additions of two whole tensors. Errors are the largest relative difference of any output
in float64, of `reparam.fuse` at two input sizes where the net takes two. The converters run with float64 as the default
type, for several of them (of RepViT, LeViT and EfficientViT in timm, of MobileOne in pylocron) make float32 modules
whatever the net is.
"""
HEAD = """\
| net | conv + linear | norms | adds | error | its converter: conv + linear, norms, adds | its error | notes |
|---|---:|---:|---:|---:|---:|---:|---|"""


@dataclass(frozen=True)
class Row:
    """What was measured of one net.

    Args:
        net: the net.
        before: calls of one run.
        after: the same after `reparam.fuse`.
        error: the largest relative error of any output.
        theirs: calls after the package's own converter, and its error; or why there are none.
        unread: forwards that could not be read: the reason and the line, by path.
    """

    net: Net
    before: dict[str, int]
    after: dict[str, int]
    error: float
    theirs: tuple[dict[str, int], float] | str
    unread: dict[str, str]

    def line(self) -> str:
        """The row in Markdown."""
        name = DISTRIBUTIONS.get(self.net.package, self.net.package)
        cells = [f"{name}: {self.net.name}"]
        groups = (("conv", "linear"), ("norm",), ("add",))
        cells += [f"{total(self.before, *kinds)} → {total(self.after, *kinds)}" for kinds in groups]
        cells.append(f"{self.error:.0e}")
        if isinstance(self.theirs, str):
            cells += [self.theirs, "–"]
        else:
            counts, error = self.theirs
            parts = (total(counts, "conv", "linear"), total(counts, "norm"), total(counts, "add"))
            cells += [", ".join(map(str, parts)), f"{error:.0e}"]
        cells.append(self.net.note)
        return f"| {' | '.join(cells)} |"


def total(counts: dict[str, int], *kinds: str) -> int:
    return sum(counts[kind] for kind in kinds)


def measure(net: Net) -> Row:
    torch.manual_seed(0)
    model = ready(quiet(net.build))
    arguments, keywords = net.call()
    expected, before = counted(model, *arguments, **keywords)
    plan = reparam.plan(model)
    fused = plan.apply()
    errors = []
    for index in range(2):
        inputs = net.call(index)
        errors.append(difference(run(model, *inputs), run(fused, *inputs)))
    after = counted(fused, *arguments, **keywords)[1]
    unread = {refusal.path: refusal.condition for refusal in plan.left if refusal.rule == "unread"}
    return Row(net, before, after, max(errors), theirs(net, model, expected), unread)


def theirs(net: Net, model: torch.nn.Module, expected: object) -> tuple[dict[str, int], float] | str:
    if net.convert is None:
        return "none"
    arguments, keywords = net.call()
    try:
        found, counts = counted(converted(net, model), *arguments, **keywords)
    except Exception as error:  # whatever another package raises is its result
        return f"crashes: {type(error).__name__}"
    try:
        return counts, difference(expected, found)
    except AssertionError:
        return "another output"


def unread_lines(rows: list[Row]) -> list[str]:
    """Lines of code that stopped the reading, the most frequent first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        for path, reason in row.unread.items():
            text = re.sub(r"/\S*/site-packages/", "", " ".join(reason.split()))
            found[text].append(f"{row.net.key} {path}".strip())
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [f"{len(places)} × {places[0]}: {text}" for text, places in ordered]


def versions(rows: list[Row]) -> str:
    names = dict.fromkeys(DISTRIBUTIONS.get(row.net.package, row.net.package) for row in rows)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *names))


def page(rows: list[Row]) -> str:
    before, after = (sum(getattr(row, when)["norm"] for row in rows) for when in ("before", "after"))
    return "\n".join(
        [
            INTRODUCTION,
            f"- {len(rows)} nets; batch norms {before} → {after}; largest relative error"
            f" {max(row.error for row in rows):.0e}.",
            f"- Versions: {versions(rows)}.",
            "- No converter gave other numbers; they leave norms, leave out outputs, or crash, as the table says.",
            "",
            HEAD,
            *(row.line() for row in rows),
            "",
            '"Another output" is a converter that leaves out a part of what the net returns.',
            "",
            "## Forwards that could not be read",
            "",
            "What is inside of them is fused all the same; only what they do with it themselves is left alone.",
            "",
            "How often, the first of them, the reason, and the line that stopped the reading:",
            "",
            "```text",
            *unread_lines(rows),
            "```",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="nets whose names hold one of the words")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    nets = [net for net in (*CLASSIFIERS, *DETECTORS) if not only or any(word in net.key for word in only)]
    text = page([measure(net) for net in tqdm(nets, unit="net")])
    if only:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
