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
import io
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the path comes first)
from nets import counted, difference, randomise  # noqa: E402
from tools_cases import CASES, OWN, C, Case  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import reparam  # noqa: E402
from benchmarks.marks import put  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "tools.md", ROOT / "benchmarks" / "results" / "tools.json"
BLOCK = "table: benchmarks/tools.py"
SIZES = ((12, 8), (9, 11))
Fold = Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Tool:
    """One tool.

    Args:
        name: of its column.
        package: the distribution whose version is noted.
        fold: what a user calls.
        dtype: in which it is asked.
        counts: whether what it made can be counted by running it.
        own: a block of several branches that the tool brings along.
    """

    name: str
    package: str
    fold: Fold
    dtype: torch.dtype = torch.float64
    counts: bool = True
    own: Callable[[], nn.Module] | None = None


def by_reparam(net: nn.Module, x: Tensor) -> nn.Module:
    return reparam.fuse(net)


def by_timm(net: nn.Module, x: Tensor) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(net)


def by_fx(net: nn.Module, x: Tensor) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(net)


def by_ao(net: nn.Module, x: Tensor) -> nn.Module:
    """It is told what to fuse, by name: every convolution or linear layer with the norm of the same order of calls."""
    from torch.ao.quantization import fuse_modules

    called: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, __, name=name: called.append((name, module)))
        for name, module in net.named_modules()
        if not any(True for _ in module.children())
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    pairs = [
        [name, after]
        for (name, first), (after, second) in itertools.pairwise(called)
        if isinstance(first, layers) and isinstance(second, nn.BatchNorm2d)
    ]
    return fuse_modules(net, pairs) if pairs else net


def by_inductor(net: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    import torch._inductor.config as inductor

    with inductor.patch({"freezing": True}):
        torch.compiler.reset()
        compiled = torch.compile(net)
        compiled(x)
    return compiled


def by_mct(net: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """What it does to a graph before quantization, and the float model that the graph stands for."""
    import model_compression_toolkit as mct
    from model_compression_toolkit.core.graph_prep_runner import graph_preparation_runner
    from model_compression_toolkit.core.pytorch.back2framework.float_model_builder import FloatPyTorchModelBuilder
    from model_compression_toolkit.core.pytorch.default_framework_info import DEFAULT_PYTORCH_INFO as INFO
    from model_compression_toolkit.core.pytorch.pytorch_implementation import PytorchImplementation
    from model_compression_toolkit.target_platform_capabilities.targetplatform2framework import attach2pytorch

    target = attach2pytorch.AttachTpcToPytorch().attach(mct.get_target_platform_capabilities())
    config = mct.core.QuantizationConfig()
    graph = graph_preparation_runner(net, lambda: iter([[x]]), config, INFO, PytorchImplementation(), target)
    model, _ = FloatPyTorchModelBuilder(graph).build_model()
    return model


def by_mmcv(net: nn.Module, x: Tensor) -> nn.Module:
    from mmcv.cnn import fuse_conv_bn

    return fuse_conv_bn(net)


def by_ultralytics(net: nn.Module, x: Tensor) -> nn.Module:
    """Its ``fuse`` belongs to a model whose parts are in ``model``."""
    from ultralytics.nn.tasks import BaseModel

    class Holder(BaseModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model = net

        def info(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Holder().fuse(verbose=False).model


def by_super_gradients(net: nn.Module, x: Tensor) -> nn.Module:
    from super_gradients.modules.repvgg_block import fuse_repvgg_blocks_residual_branches

    fuse_repvgg_blocks_residual_branches(net)
    return net


def own_timm() -> nn.Module:
    from timm.models.byobnet import MobileOneBlock

    return MobileOneBlock(C, C)


def own_ultralytics() -> nn.Module:
    from ultralytics.nn.modules import RepConv

    return RepConv(C, C, 3, bn=True)


def own_super_gradients() -> nn.Module:
    from super_gradients.modules.repvgg_block import RepVGGBlock

    return RepVGGBlock(C, C)


TOOLS = (
    Tool("reparam", "", by_reparam, own=lambda: reparam.models.RepVGGBlock(C, C)),
    Tool("timm", "timm", by_timm, own=own_timm),
    Tool("torch.fx", "torch", by_fx),
    Tool("torch.ao", "torch", by_ao),
    Tool("Inductor", "torch", by_inductor, torch.float32, counts=False),
    Tool("MCT", "model-compression-toolkit", by_mct, torch.float32),
    Tool("mmcv", "mmcv-lite", by_mmcv),
    Tool("ultralytics", "ultralytics-opencv-headless", by_ultralytics, own=own_ultralytics),
    Tool("super-gradients", "super-gradients", by_super_gradients, own=own_super_gradients),
)


# --- asking -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def answer(tool: Tool, case: Case) -> str:
    """What becomes of one net."""
    net = randomise(case.build(), 0).to(tool.dtype).eval()
    inputs = [torch.randn(2, C, *size, generator=torch.Generator().manual_seed(1)).to(tool.dtype) for size in SIZES]
    wanted = [net(x) for x in inputs]
    graphs: list[list[str]] = []
    with quiet(), _graphs(graphs):
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
    with quiet(), _graphs([]):
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
    with quiet(), _graphs([]):
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
