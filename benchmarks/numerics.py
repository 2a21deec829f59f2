"""How far nets are from what they compute exactly, before and after `reparam.fuse`, by data type and depth.

The truth is the net in float64, with the numbers that it has in float32. An error is the largest difference from it,
relative to the largest output, root mean square over seeds.

    python benchmarks/numerics.py            # measures, about fifteen minutes on one core: writes results/numerics.json
    python benchmarks/numerics.py --page     # puts table and figure of the last run into docs/numerics.md
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

import timm  # noqa: E402 (the path comes first)
import torch  # noqa: E402
from nets import randomise  # noqa: E402
from numerics_page import write_page  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402
from tqdm import tqdm  # noqa: E402

import reparam  # noqa: E402
from common import machine  # noqa: E402
from reparam.models import RepVGGBlock  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "numerics.json"
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
NETS = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "resnet18", "mobilenetv3_small_100")
HALVES = (torch.bfloat16, torch.float16)
SEEDS = 5
SEEDS_TIMM = 3  # they take longer
WIDTH = 32


# --- nets and their numbers ---------------------------------------------------------------------------------------


def ladder(depth: int) -> nn.Module:
    """Blocks of RepVGG on top of each other."""
    return nn.Sequential(*(RepVGGBlock(WIDTH, WIDTH) for _ in range(depth)))


def wide(model: nn.Module, x: Tensor, seed: int) -> None:
    """Random statistics that fit no data: means N(0, 1), variances U(0.5, 2), scales of both signs."""
    randomise(model, seed)


@torch.no_grad()
def trained_like(model: nn.Module, x: Tensor, seed: int) -> None:
    """Statistics measured on data, as training leaves them; positive scales around 1, small shifts."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
            module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
            module.reset_running_stats()
            module.momentum = None  # the plain mean over what it sees
    torch.manual_seed(seed)
    model.train()(x)
    model.eval()


STATISTICS: dict[str, Callable[[nn.Module, Tensor, int], None]] = {"wide": wide, "trained-like": trained_like}


class Difference(nn.Module):
    """Two branches that nearly cancel: the second is 0.999 times the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)) for _ in "ab"
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 (a module)
        return self.a(x) - 0.999 * self.b(x)


def one_block(seed: int) -> tuple[nn.Module, Tensor]:
    return randomise(ladder(1), seed).eval(), image(seed)


def cancelling(seed: int) -> tuple[nn.Module, Tensor]:
    model = randomise(Difference(), seed).eval()
    model.b.load_state_dict(model.a.state_dict())
    return model, image(seed)


def small_variance(seed: int) -> tuple[nn.Module, Tensor]:
    """A convolution gives 100 ± 0.01, and a norm makes that 0 ± 1."""
    model = randomise(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)), seed)
    x = 1 + 1e-4 * image(seed)
    with torch.no_grad():
        model[0].weight.abs_().mul_(100 / model[0].weight.sum(dim=1, keepdim=True))
    trained_like(model, x, seed)
    model[1].eps = 0.0
    return model, x


AMPLIFIERS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "one block, nothing special": one_block,
    "branches that nearly cancel: a(x) − 0.999 a(x)": cancelling,
    "a norm that divides by little: 100 ± 0.01 becomes 0 ± 1": small_variance,
}


def image(seed: int, channels: int = WIDTH, size: int = 16, batch: int = 4) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


# --- errors -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def errors(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Error of every way to run a float32 net, infinite where a number overflows.

    `float64` has no better truth: its figure is the difference that fusing made.
    """
    exact = copy.deepcopy(model).double()
    truth = exact(x.double())

    def error(net: nn.Module, dtype: torch.dtype) -> float:
        off = float((net(x.to(dtype)).double() - truth).abs().max() / truth.abs().max())
        return off if math.isfinite(off) else math.inf

    fused = reparam.fuse(model, check=False)
    found = {
        "float64, fused": error(reparam.fuse(exact, check=False), torch.float64),
        "float32": error(model, torch.float32),
        "float32, fused": error(fused, torch.float32),
    }
    for dtype in HALVES:
        name, cast = str(dtype).removeprefix("torch."), copy.deepcopy(model).to(dtype)
        found[name] = error(cast, dtype)
        found[f"{name}, cast and fused"] = error(reparam.fuse(cast, check=False), dtype)
        found[f"{name}, fused and cast"] = error(copy.deepcopy(fused).to(dtype), dtype)
    report = reparam.verify(model, fused, x)
    found["apart"], found["allowed"] = next((d.error, d.tolerance) for d in report.outputs if d.dtype == "float32")
    return found


def measured(runs: Iterable[dict[str, float]]) -> dict[str, Any]:
    """Root mean square over seeds (None where one overflows), and in how many seeds the fused net was nearer."""
    rows = list(runs)
    means = {key: (sum(row[key] ** 2 for row in rows) / len(rows)) ** 0.5 for key in rows[0]}
    nearer = {}
    for key in ("float32, fused", *(key for key in means if "cast" in key)):
        dtype = key.partition(",")[0]
        nearer[key] = sum(row[key] < row[dtype] for row in rows if math.isfinite(row[dtype]))
    finite = {key: mean if math.isfinite(mean) else None for key, mean in means.items()}
    return {"errors": finite, "nearer": nearer, "runs": len(rows)}


def of_ladder(depth: int, statistics: str) -> dict[str, Any]:
    def runs() -> Iterator[dict[str, float]]:
        for seed in range(SEEDS):
            model, x = randomise(ladder(depth), seed).eval(), image(seed)
            STATISTICS[statistics](model, x, seed)
            yield errors(model, x)

    return {"kind": "ladder", "name": f"{depth} blocks", "depth": depth, "statistics": statistics, **measured(runs())}


def of_timm(name: str, statistics: str) -> dict[str, Any]:
    def runs() -> Iterator[dict[str, float]]:
        for seed in range(SEEDS_TIMM):
            torch.manual_seed(seed)
            model, x = timm.create_model(name, num_classes=100).eval(), image(seed, channels=3, size=96)
            STATISTICS[statistics](model, x, seed)
            yield errors(model, x)

    return {"kind": "timm", "name": name, "statistics": statistics, **measured(runs())}


def of_amplifier(name: str) -> dict[str, Any]:
    found = measured(errors(*AMPLIFIERS[name](seed)) for seed in range(SEEDS))
    return {"kind": "amplifier", "name": name, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page of the last run")
    if not parser.parse_args().page:
        torch.set_num_threads(1)
        work: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = [(of_amplifier, (n,)) for n in AMPLIFIERS]
        work += [(of_ladder, case) for case in itertools.product(DEPTHS, STATISTICS)]
        work += [(of_timm, case) for case in itertools.product(NETS, STATISTICS)]
        rows = [measure(*case) for measure, case in tqdm(work, unit="net")]
        versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
        run = {"machine": {"name": machine(torch.device("cpu")), **versions}, "rows": rows}
        RESULTS.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
