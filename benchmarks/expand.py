"""Do branches help? Train a plain net, and the same net expanded with each preset, on few real images.

    python -m benchmarks.expand                 trains what benchmarks/results/expand.json lacks, then writes the page
    python -m benchmarks.expand --seeds 20      adds ten seeds
    python -m benchmarks.expand --report        trains nothing: only docs/expand_benchmark.md
    python -m benchmarks.expand --quick         three seeds, two epochs; prints, and writes to out/ only

Ten seeds take about ten minutes on one core. A run can be stopped at any moment: what is finished is in the file and is
not trained again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from benchmarks import ROOT, expand_report
from benchmarks.expand_cost import COST_ROUNDS, costs
from benchmarks.expand_training import COMPARED, VARIANTS, Settings, digits, run
from benchmarks.paired import FEWEST_ROUNDS
from common import machine

RESULTS = ROOT / "benchmarks" / "results" / "expand.json"
QUICK = ROOT / "out" / "expand_quick.json"


def missing(runs: dict[str, Any], seeds: int) -> Iterator[tuple[str, int]]:
    """Variants and seeds that are not in the file; one seed after the other, so that it holds whole comparisons."""
    for seed in range(seeds):
        yield from ((name, seed) for name in VARIANTS if str(seed) not in runs.get(name, {}))


def read(path: Path, settings: Settings) -> dict[str, Any]:
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.is_file():
        return {"settings": wanted, "runs": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != wanted:
        sys.exit(f"{path} holds runs with other settings: move it away to start anew")
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="default 10")
    parser.add_argument("--quick", action="store_true", help="three seeds, two epochs, nothing committed is changed")
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings, path, seeds = Settings(), RESULTS, args.seeds
    if args.quick:
        settings, path, seeds = Settings(epochs=2), QUICK, expand_report.FEWEST_SEEDS
    results = read(path, settings)
    if not args.report:
        everything = digits()
        if "costs" not in results:
            results["costs"] = costs(everything, settings, FEWEST_ROUNDS if args.quick else COST_ROUNDS)
            results["machine"] = f"{machine(torch.device('cpu'))}, 1 thread, torch {torch.__version__}"
            write(path, results)
        for name, seed in tqdm(list(missing(results["runs"], seeds)), desc="training", unit="net", disable=None):
            results["runs"].setdefault(name, {})[str(seed)] = run(VARIANTS[name], everything, settings, seed)
            write(path, results)
    print(expand_report.block(results, VARIANTS, COMPARED))
    if not args.quick:
        expand_report.update(results, VARIANTS, COMPARED)


if __name__ == "__main__":
    main()
