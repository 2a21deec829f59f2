"""Cells of a benchmark: each measured in a process of its own, under a time limit, and written down at once.

A cell that raises, ends its process or takes too long is recorded with what happened. A run that was interrupted goes
on where it stopped: what has been measured under the same setup is not measured again, what failed is tried again.
"""

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from benchmarks import ROOT
from common import counted, machine

COMMITTED = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "out" / "benchmarks"
DISTRIBUTIONS = ("torch", "torchvision", "timm", "transformers", "onnxruntime", "openvino")
STARTING = 60.0  # seconds for a process to begin
PRELOADED = ["torch", "timm"]  # once, before the processes are made


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Args:
        out: folder for the results, which are printed; by default they are the committed ones, and go into the page.
        quick: little time, few nets.
        fresh: measure again what has been measured.
        threads: of every runtime.
        seconds: timing of one cell, all of its forms together.
        minutes: after which no further cell is begun.
        timeout: seconds after which a cell is ended.
        device: of torch.
    """

    out: Path | None = None
    quick: bool = False
    fresh: bool = False
    threads: int = 1
    seconds: float = 4.0
    minutes: float = 18.0
    timeout: float = 600.0
    device: str = "cpu"

    def file(self, name: str) -> Path:
        """Where results go."""
        return (self.out or COMMITTED) / f"{name}.json"


def settings(description: str | None, minutes: float, seconds: float, arguments: list[str] | None = None) -> Settings:
    """Settings from the command line; `minutes` and `seconds` are the defaults of a whole run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few nets, little time; implies --out out/benchmarks/quick")
    add("--out", type=Path, help="folder for the results, which are then printed; the page stays as it is")
    add("--fresh", action="store_true", help="measure again what has been measured")
    add("--threads", type=counted(1), default=len(os.sched_getaffinity(0)), help="default: all cores")
    add("--seconds", type=float, help=f"timing of one cell (default {seconds:g})")
    add("--minutes", type=float, default=minutes, help=f"begin no further cell after them (default {minutes:g})")
    add("--timeout", type=float, default=Settings.timeout, help=f"seconds of a cell (default {Settings.timeout:g})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch (default: cuda if present)")
    given = vars(parser.parse_args(arguments))
    given["out"] = given["out"] or (SCRATCH / "quick" if given["quick"] else None)
    given["seconds"] = given["seconds"] or (min(seconds, 0.5) if given["quick"] else seconds)
    return Settings(**given)


def setup(chosen: Settings) -> dict[str, Any]:
    """What the times depend on: results of another setup are not mixed with these."""
    return {
        "machine": machine(torch.device(chosen.device)),
        "device": chosen.device,
        "threads": chosen.threads,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in DISTRIBUTIONS if _installed(name)},
    }


def code() -> str:
    """What the code that decides what `fuse` returns is, in eight digits."""
    digest = hashlib.sha256((ROOT / "reparam" / "cost.py").read_bytes())
    for folder in ("algebra", "graph"):
        for path in sorted((ROOT / "reparam" / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass
class Results:
    """Cells by name, in a JSON file.

    Args:
        path: of the file.
        setup: see `setup`.
        cells: what was measured, or `{"error": ...}`.
    """

    path: Path
    setup: dict[str, Any]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What is in a file; nothing, if there is none."""
        return cls(path, **json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls(path, {})

    @classmethod
    def resumed(cls, path: Path, now: dict[str, Any], fresh: bool = False) -> "Results":
        """What is in a file, if it is of the same setup."""
        old = cls.read(path)
        return cls(path, now, {} if fresh or old.setup != now else old.cells)

    def measured(self, name: str) -> bool:
        """Whether a cell is there and did not fail."""
        return "error" not in self.cells.get(name, {"error": "absent"})

    @property
    def good(self) -> dict[str, dict[str, Any]]:
        """Cells that did not fail."""
        return {name: cell for name, cell in self.cells.items() if self.measured(name)}

    @property
    def failed(self) -> dict[str, str]:
        """What happened to the others."""
        return {name: cell["error"] for name, cell in self.cells.items() if not self.measured(name)}

    def put(self, name: str, cell: dict[str, Any]) -> None:
        """Add a cell, and write the file: all of it or nothing."""
        self.cells[name] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(self.cells.items()))
        partial = self.path.with_suffix(".part")
        partial.write_text(f'{{"setup": {json.dumps(self.setup)},\n "cells": {{\n{rows}\n}}}}\n', encoding="utf-8")
        partial.replace(self.path)


def run(cells: Iterable[tuple[str, tuple[Any, ...]]], measure: Callable[..., Any], to: Results, by: Settings) -> None:
    """Measure what is not there yet.

    Args:
        cells: names and arguments, the important ones first.
        measure: a function of a module, which gets the settings and the arguments of a cell, in another process.
        to: gets the cells.
        by: limits of time.
    """
    begun = time.monotonic()
    waiting = [(name, arguments) for name, arguments in cells if not to.measured(name)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPool(max_workers=1, max_tasks=1, context=context) as pool:
        bar = tqdm(waiting, unit="cell", smoothing=0)
        for name, arguments in bar:
            bar.set_postfix_str(name)
            if time.monotonic() - begun > 60 * by.minutes:
                break
            future = pool.schedule(measure, args=(by, *arguments), timeout=by.timeout)
            cell: dict[str, Any]
            try:
                cell = future.result(2 * by.timeout + STARTING)  # `timeout` above begins when the process is there
            except TimeoutError:
                future.cancel()  # ends the process, if it did not begin
                cell = {"error": f"more than {by.timeout:.0f} s"}
            except ProcessExpired as error:
                cell = {"error": f"the process ended with code {error.exitcode}"}
            except Exception as error:  # whatever a runtime raises is its result
                cell = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            if "error" in cell:
                tqdm.write(f"{name}: {cell['error']}")
            to.put(name, cell)
    missing = sum(name not in to.cells for name, _ in waiting)
    if missing:
        tqdm.write(f"{missing} cells are left after {by.minutes:g} minutes: run again to go on")
