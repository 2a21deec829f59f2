"""How many operations fused nets run, compared with what is committed: a fused net may not become dearer.

    python -m benchmarks.guard             compares; the exit code is 1 if a count has grown
    python -m benchmarks.guard --write     writes benchmarks/results/guard.json

Counts are those of one run: convolutions, linear layers, batch norms, sums of two whole tensors, all operations that
are no views; and multiply-adds and parameters. Nothing is timed, so a loaded machine changes nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from market import DiverseBranches, UniRepLk
from nets import counted, images, ready
from package_detectors import DETECTORS
from package_nets import CLASSIFIERS, quiet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reparam
from benchmarks import ROOT

FILE = ROOT / "benchmarks" / "results" / "guard.json"
CALLED = ("conv", "linear", "norm", "add", "calls")

Counts = dict[str, int]
Fuse = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Guarded:
    """A net whose counts are committed.

    Args:
        package: that has to be installed.
        build: builds the net.
        call: arguments and keywords of one call.
    """

    package: str
    build: Callable[[], nn.Module]
    call: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]]


def _small_repvgg() -> nn.Module:
    return reparam.models.RepVGG((1, 2, 2), (16, 32, 32), (1, 2, 1), {2: 2, 4: 4}, squeeze_excite=True, num_classes=5)


def _of_packages(*keys: str) -> dict[str, Guarded]:
    known = {net.key: net for net in (*CLASSIFIERS, *DETECTORS)}
    return {key: Guarded(known[key].package, known[key].build, known[key].call) for key in keys}


def _image(channels: int) -> Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]]:
    return lambda: ((images((16, 16), channels=channels),), {})


NETS: Mapping[str, Guarded] = {
    "RepVGG, groups and squeeze-excite": Guarded("torch", _small_repvgg, _image(3)),
    "UniRepLKNet block": Guarded("torch", UniRepLk, _image(8)),
    "diverse branch block": Guarded("torch", lambda: DiverseBranches(8, 8), _image(8)),
    **_of_packages(
        "timm/mobileone",
        "timm/fastvit_t8",
        "timm/repvit_m0_9",
        "timm/repghostnet_050",
        "timm/lcnetv2_small",
        "timm/levit_128s",
        "repvgg_pytorch/RepVGG",
        "transformers/RT-DETR",
        "transformers/TextNet",
        "ultralytics/yolov8n",
    ),
}


def present() -> dict[str, Guarded]:
    """The nets whose packages are installed."""
    return {name: net for name, net in NETS.items() if find_spec(net.package)}


def counts(net: Guarded, fuse: Fuse = reparam.fuse) -> Counts:
    """What the fused net runs."""
    torch.manual_seed(0)
    fused = fuse(ready(quiet(net.build)))
    arguments, keywords = net.call()
    found = counted(fused, *arguments, **keywords)[1]
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        fused(*arguments, **keywords)
    return {
        **{name: found[name] for name in CALLED},
        "multiply_adds": flops.get_total_flops() // 2,
        "parameters": sum(parameter.numel() for parameter in fused.parameters()),
    }


def regressions(committed: Mapping[str, Counts], found: Mapping[str, Counts]) -> list[str]:
    """Every count that has grown, and every net that is not committed.

    >>> regressions({"net": {"conv": 1}}, {"net": {"conv": 2}, "new": {"conv": 1}})
    ['net: conv 1 -> 2', 'new: not committed; run python -m benchmarks.guard --write']
    """
    lines = []
    for name, counts_found in found.items():
        if name not in committed:
            lines.append(f"{name}: not committed; run python -m benchmarks.guard --write")
            continue
        for kind, number in counts_found.items():
            before = committed[name].get(kind, -1)
            if number > before:
                lines.append(f"{name}: {kind} {before} -> {number}")
    return lines


def committed() -> dict[str, Counts]:
    """The committed counts."""
    found: dict[str, Counts] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="commit to what is found")
    write = parser.parse_args().write
    found = {name: counts(net) for name, net in present().items()}
    if write:
        absent = {*NETS} - {*found}
        if absent:
            parser.error(f"expected the packages of all nets, found none for {', '.join(sorted(absent))}")
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
        FILE.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
        return 0
    lines = regressions(committed(), found)
    print("\n".join(lines) or f"{len(found)} nets: no count has grown")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
