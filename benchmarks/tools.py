"""What other tools fold, asked of each by the same small nets: writes docs/tools.md and results/tools.json.

Wide norm statistics, float64 (Inductor and MCT: float32, the type that they take), an even and an odd size. A tool that
is not installed keeps the answer of the last run, or says why it did not run.

    python benchmarks/tools.py                  # all that can be imported
    python benchmarks/tools.py --only timm      # those whose names hold the word
    python benchmarks/tools.py --page           # the page again, from the last run
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the path comes first)
from nets import counted, difference, randomise  # noqa: E402
from tools_asked import TOOLS, Tool  # noqa: E402
from tools_cases import CASES, OWN, C, Case  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.marks import put  # noqa: E402
from reparam.exporting.quiet import quietly  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "tools.md", ROOT / "benchmarks" / "results" / "tools.json"
BLOCK = "table: benchmarks/tools.py"
SIZES = ((12, 8), (9, 11))


@torch.no_grad()
def answer(tool: Tool, case: Case) -> str:
    """What becomes of one net."""
    net = randomise(case.build(), 0).to(tool.dtype).eval()
    inputs = [torch.randn(2, C, *size, generator=torch.Generator().manual_seed(1)).to(tool.dtype) for size in SIZES]
    wanted = [net(x) for x in inputs]
    graphs: list[list[str]] = []
    with quietly(), _graphs(graphs):
        try:
            folded = tool.fold(copy.deepcopy(net), inputs[0])
            found = [folded(x) for x in inputs]
        except ModuleNotFoundError:
            raise
        except Exception as error:
            return f"error: {type(error).__name__}"
    found = [y[0] if isinstance(y, list | tuple) else y for y in found]
    error = max(difference(a, b) for a, b in zip(wanted, found, strict=True))
    if not error <= 1e3 * torch.finfo(tool.dtype).eps:
        return f"**wrong** by {error:.1g}"
    before = _work(net, inputs[0])
    after = _work(folded, inputs[0]) if tool.counts else _in_graph(graphs[0], before[2])
    if all(a <= b for a, b in zip(after, case.best, strict=True)):
        return "stays" if case.best == before else "yes"
    if after == before:
        return "no"
    kinds = zip(("layers", "norms", "sums"), before, after, strict=True)
    return "in part: " + ", ".join(f"{kind} {old} → {new}" for kind, old, new in kinds if old != new)


def _work(net: Any, x: Tensor) -> tuple[int, int, int]:
    calls = counted(net, x)[1]
    return calls["conv"] + calls["linear"], calls["norm"], calls["add"]


@contextlib.contextmanager
def _graphs(found: list[list[str]]) -> Any:
    """The operations that Inductor is left with."""
    import torch._inductor.config as inductor

    def note(graph: Any) -> None:
        found.append([str(node.target) for node in graph.nodes if node.op == "call_function"])

    with inductor.patch({"post_grad_custom_post_pass": note}):
        yield


def _in_graph(names: list[str], sums: int) -> tuple[int, int, int]:
    """Work in a graph of small operations, in which a norm that is left is a difference with its mean.

    Sums are as before: the compiler puts them behind their convolutions, into one loop, and computes them all the same.
    """
    layers = sum("conv" in name or "linear" in name or "mm." in name or "mkl" in name for name in names)
    norms = sum("aten.sub" in name for name in names)
    return layers, norms, sums


@torch.no_grad()
def behaviour(tool: Tool) -> dict[str, str]:
    """Whether the class is kept, the argument left as it was, and what a net in training mode gets."""
    net = randomise(next(case for case in CASES if case.name.startswith("3×3 +")).build(), 0).to(tool.dtype).eval()
    x = torch.randn(2, C, *SIZES[0]).to(tool.dtype)
    wanted, state = net(x), copy.deepcopy(net.state_dict())
    found = {}
    with quietly(), _graphs([]):
        try:
            folded = tool.fold(net, x)
            found["the class is kept"] = "yes" if isinstance(folded, type(net)) else "no"
        except ModuleNotFoundError:
            raise
        except Exception as error:
            found["the class is kept"] = f"error: {type(error).__name__}"
    now = net.state_dict()
    same = state.keys() == now.keys() and all(torch.equal(state[key], value) for key, value in now.items())
    found["the argument is left as it was"] = "yes" if same and torch.equal(net(x), wanted) else "no"
    training = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)).to(tool.dtype).train()
    with quietly(), _graphs([]):
        try:
            folded = tool.fold(training, x)
            norms = counted(folded, x)[1]["norm"] if tool.counts else 1
            found["a net in training mode"] = "left alone" if norms else "folded"
        except Exception as error:
            found["a net in training mode"] = f"error: {type(error).__name__}"
    return found


def ask(tool: Tool) -> dict[str, Any]:
    try:
        answers = {case.name: answer(tool, case) for case in CASES}
        if tool.own is not None:
            own = tool.own
            answers[OWN] = answer(tool, Case(OWN, lambda: nn.Sequential(own()), (1, 0, 0)))
        answers |= behaviour(tool)
    except ModuleNotFoundError as error:
        return {"not run": str(error)}
    version = importlib.metadata.version(tool.package) if tool.package else reparam_version()
    return {"version": version, "answers": answers}


def reparam_version() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.*)"', text, re.MULTILINE)[1]  # type: ignore[index]


def table(run: dict[str, dict[str, Any]]) -> str:
    """One row for each question, one column for each tool."""
    tools = [tool for tool in TOOLS if "answers" in run.get(tool.name, {})]
    lines = ["| | " + " | ".join(tool.name for tool in tools) + " |", "|---|" + "---|" * len(tools)]
    lines += [
        f"| {name} | " + " | ".join(shown(run[tool.name]["answers"].get(name, "–")) for tool in tools) + " |"
        for name in run["reparam"]["answers"]
    ]
    versions = ", ".join(f"{tool.package} {run[tool.name]['version']}" for tool in tools if tool.package)
    lines += ["", f"Versions: {', '.join(dict.fromkeys(versions.split(', ')))}."]
    missing = [f"{tool.name}: {run[tool.name]['not run']}" for tool in TOOLS if "not run" in run.get(tool.name, {})]
    if missing:
        lines.append(f"Not run: {'; '.join(missing)}.")
    return "\n".join(lines) + "\n"


def shown(answer: str) -> str:
    """An answer without the type of its error, which the JSON file has."""
    return "error" if answer.startswith("error") else answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tools whose names hold this")
    parser.add_argument("--page", action="store_true", help="ask nothing")
    arguments = parser.parse_args()
    run: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for tool in TOOLS:
        if not arguments.page and arguments.only in tool.name:
            found = ask(tool)
            if "answers" in found or tool.name not in run:
                run[tool.name] = found
            print(tool.name, json.dumps(found, ensure_ascii=False, indent=1), flush=True)
            RESULTS.write_text(json.dumps(run, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BLOCK, table(run))


if __name__ == "__main__":
    main()
