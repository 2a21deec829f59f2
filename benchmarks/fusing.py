"""Time and memory of fusing itself, beside the converters of timm and torch.fx.

Every round runs all converters once, in another order each time, on one model; ratios are taken within a round. The
tables show processor time, which other programs on the machine disturb less; ratios of wall time are in the JSON. In
place, each call gets a fresh copy, made before the clock starts. Memory is that of a process of its own: the most that
it held while it fused, beyond what it held before. Writes `benchmarks/results/fusing.json` and the tables of
`docs/speed_fusing.md`.

    python benchmarks/fusing.py                                    # all, about 15 minutes on 2 idle cores
    python benchmarks/fusing.py --only repvgg_a0 --rounds 3 --dry  # printed, nothing written
    python benchmarks/fusing.py --parts growth meta                # the other figures stay as they are
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from timm.utils.model import reparameterize_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.fx.experimental.optimization import fuse as fuse_fx  # noqa: E402
from tqdm import tqdm  # noqa: E402

import reparam  # noqa: E402
from benchmarks.marks import put  # noqa: E402
from benchmarks.phases import PHASES, phases  # noqa: E402
from common import machine  # noqa: E402

NETS = (
    "repvgg_a0", "repvgg_b0", "repvgg_b3", "mobileone_s1", "fastvit_t8", "fastvit_ma36", "repvit_m1_0", "resnet50",
)  # fmt: skip
WAYS = ("copy", "in place")
OURS = ("unchecked", "checked")
PARTS = ("times", "phases", "first", "memory", "growth", "meta")
BLOCKS = (10, 30, 100, 300, 1000, 2000)
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "fusing.json", ROOT / "docs" / "speed_fusing.md"
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # then the memory of a process is what it uses
BLOCK = "figures: benchmarks/fusing.py"


class Block(nn.Module):
    """A RepVGG block of few channels, with which a net of any depth is built."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.thin = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of three branches."""
        return torch.relu(self.wide(x) + self.thin(x) + self.norm(x))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (torchvision.models.resnet50() if name == "resnet50" else timm.create_model(name)).eval()


def converter(name: str, which: str, inplace: bool) -> Callable[[nn.Module], nn.Module]:
    if which == "theirs":
        other = fuse_fx if name == "resnet50" else reparameterize_model
        return lambda model: other(model, inplace=inplace)
    return lambda model: reparam.fuse(model, inplace=inplace, check=which == "checked")


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartile 1": first, "quartile 3": third}


def timed(call: Callable[[nn.Module], nn.Module], model: nn.Module) -> tuple[float, float]:
    """Wall time and processor time of one call, in seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(model)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    del result
    return wall, cpu


def compare(name: str, way: str, rounds: int) -> dict[str, Any]:
    """Times of the converters on one net, and ratios of ours to theirs within each round."""
    model, inplace = build(name), way == "in place"
    which = ["theirs", *OURS]
    calls = {key: converter(name, key, inplace) for key in which}
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in which}
    for turn in range(rounds + 1):
        for key in which[turn % 3 :] + which[: turn % 3]:
            given = copy.deepcopy(model) if inplace else model
            found = timed(calls[key], given)
            if turn:  # the first round warms up
                times[key].append(found)
    result: dict[str, Any] = {
        "milliseconds": {key: 1e3 * statistics.median(cpu for _, cpu in times[key]) for key in which}
    }
    for key in OURS:
        pairs = list(zip(times[key], times["theirs"], strict=True))
        result[key + ", wall"] = spread([ours[0] / theirs[0] for ours, theirs in pairs])
        result[key + ", processor"] = spread([ours[1] / theirs[1] for ours, theirs in pairs])
    return result


# --- in processes of their own --------------------------------------------------------------------


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(FREED_AT_ONCE if arguments[0] == "peak" else {})}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def held(line: str) -> float:
    """Memory of this process, in MiB: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(text.split()[1]) / 1024 for text in lines if text.startswith(line))


def peak(name: str, which: str, way: str) -> dict[str, float]:
    """Most memory that is held while a net is converted, beyond what was held before."""
    inplace = way == "in place"
    warm = nn.Sequential(Block(4), Block(4)).eval()
    converter("repvgg_a0", which, inplace)(warm)
    model = build(name)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 2**20
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = held("VmRSS")
    result = converter(name, which, inplace)(model)
    largest = max(p.numel() * p.element_size() for p in result.parameters()) / 2**20
    return {"model": size, "largest weight": largest, "extra": held("VmHWM") - before}


def first(name: str, which: str) -> dict[str, float]:
    """Time of the first call in a process."""
    model = build(name)
    return {"milliseconds": 1e3 * timed(converter(name, which, False), model)[1]}


def growth() -> dict[str, Any]:
    """Processor time for nets of more and more blocks, and the exponent that fits it."""
    seconds = {}
    reparam.fuse(nn.Sequential(*(Block(4) for _ in range(BLOCKS[0]))).eval())
    for count in BLOCKS:
        model = nn.Sequential(*(Block(4) for _ in range(count))).eval()
        again = 5 if count < 300 else 1
        seconds[count] = statistics.median(timed(converter("", "checked", False), model)[1] for _ in range(again))
    x, y = [math.log(count) for count in seconds], [math.log(value) for value in seconds.values()]
    return {"seconds": seconds, "exponent": statistics.linear_regression(x, y).slope}


def on_meta() -> dict[str, float]:
    """Time for a net of a billion parameters without weights."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block(1750) for _ in range(33))).eval()
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "seconds": timed(converter("", "checked", False), model)[1]}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"peak": peak, "first": first, "growth": growth, "meta": on_meta}


# --- the tables -----------------------------------------------------------------------------------


def ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['quartile 1']:.2f} to {found['quartile 3']:.2f})"


def times_table(nets: dict[str, Any], threads: str) -> list[str]:
    lines = [
        f"Threads: {threads}. Processor time over theirs, median (quartiles):",
        "",
        "| net | theirs, ms | unchecked | checked | theirs in place, ms | unchecked | checked |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, ways in nets.items():
        cells = [name]
        for way in WAYS:
            cells.append(f"{ways[way]['milliseconds']['theirs']:.0f}")
            cells += [ratio(ways[way][f"{key}, processor"]) for key in OURS]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def phases_table(nets: dict[str, Any]) -> list[str]:
    names = (*PHASES, "rest", "all")
    lines = ["Where a checked call spends it, one thread, ms of processor time:", ""]
    lines += [f"| net | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {net} | {' | '.join(f'{found[name]:.0f}' for name in names)} |" for net, found in nets.items()]
    return [*lines, ""]


def first_table(nets: dict[str, Any]) -> list[str]:
    lines = ["First call in a process, one thread, ms of processor time:", ""]
    lines += ["| net | theirs | unchecked | checked |", "|---|---:|---:|---:|"]
    for name, found in nets.items():
        lines.append(f"| {name} | {' | '.join(f'{found[key]:.0f}' for key in ('theirs', *OURS))} |")
    return [*lines, ""]


def memory_table(nets: dict[str, Any]) -> list[str]:
    head = [f"{key}, {way}" for way in WAYS for key in ("theirs", *OURS)]
    lines = ["Memory beyond the model's own while it is fused, at most, MiB:", ""]
    lines += [f"| net | model | largest weight | {' | '.join(head)} |", f"|---|{'---:|' * (len(head) + 2)}"]
    for name, found in nets.items():
        numbers = [found["model"], found["largest weight"], *(found[key] for key in head)]
        lines.append(f"| {name} | {' | '.join(f'{number:.0f}' for number in numbers)} |")
    return [*lines, ""]


def table(results: dict[str, Any]) -> str:
    lines = [f"Machine: {results['machine']}, torch {results['torch']}, timm {results['timm']}.", ""]
    for threads, nets in results.get("times", {}).items():
        lines += times_table(nets, threads)
    lines += phases_table(results["phases"]) if "phases" in results else []
    lines += first_table(results["first"]) if "first" in results else []
    lines += memory_table(results["memory"]) if "memory" in results else []
    if "growth" in results:
        steps = ", ".join(f"{count} in {value:.2f} s" for count, value in results["growth"]["seconds"].items())
        lines += [f"Blocks of a net, fused and checked: {steps}: exponent {results['growth']['exponent']:.2f}.", ""]
    if "meta" in results:
        billions, seconds = results["meta"]["parameters"] / 1e9, results["meta"]["seconds"]
        lines += [f"A net of {billions:.2f} billion parameters on the meta device: {seconds:.1f} s."]
    return "\n".join(lines).rstrip()


def measure(parts: list[str], nets: list[str], rounds: int, threads: list[int], results: dict[str, Any]) -> None:
    """Measure some parts, and put them in the place of what an earlier run found."""
    for count in threads if "times" in parts else ():
        torch.set_num_threads(count)
        found = results.setdefault("times", {}).setdefault(str(count), {})
        for name in tqdm(nets, desc=f"{count} threads"):
            found[name] = {"rounds": rounds, **{way: compare(name, way, rounds) for way in WAYS}}
    torch.set_num_threads(1)
    for name in tqdm(nets, desc="phases") if "phases" in parts else ():
        results.setdefault("phases", {})[name] = phases(build(name), rounds)
    for name in tqdm(nets, desc="first calls") if "first" in parts else ():
        firsts = {key: child("first", name, key)["milliseconds"] for key in ("theirs", *OURS)}
        results.setdefault("first", {})[name] = firsts
    for name in tqdm(nets, desc="memory") if "memory" in parts else ():
        memory = results.setdefault("memory", {}).setdefault(name, {})
        for way in WAYS:
            for key in ("theirs", *OURS):
                got = child("peak", name, key, way)
                memory[f"{key}, {way}"] = got["extra"]
                memory["model"], memory["largest weight"] = got["model"], got["largest weight"]
    for part in ("growth", "meta"):
        if part in parts:
            results[part] = child(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETS, default=list(NETS), metavar="NET", help="some nets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured anew")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        torch.set_num_threads(1)
        kind, *arguments = options.child
        print(json.dumps(CHILDREN[kind](*arguments)))
        return
    about = {"machine": machine(torch.device("cpu")), "torch": torch.__version__, "timm": timm.__version__}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() and not options.dry else {}
    if any(results.get(key) != value for key, value in about.items()):
        results = dict(about)
    measure(options.parts, options.only, options.rounds, options.threads, results)
    text = table(results)
    print(text)
    if not options.dry:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        put(PAGE, BLOCK, text)


if __name__ == "__main__":
    main()
