"""Fused nets under torchao's quantization, and the benchmark that fills the table of docs/recipes.md."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nets import Block, images, ready
from torch import Tensor, nn

import reparam
from benchmarks.marks import shown

pytest.importorskip("torchao", reason="needs the extra 'quantize'")
pytest.importorskip("mlxtend", reason="needs the extra 'examples'")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_quantization", ROOT / "benchmarks" / "quantization.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def targets(program: nn.Module) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes)  # type: ignore[union-attr]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def test_a_fused_net_is_quantized(benchmark: ModuleType) -> None:
    torch.manual_seed(0)
    net = ready(nn.Sequential(Block(), Block())).float()
    fused, batches = reparam.fuse(net), [images(batch=4).float()]
    errors = {}
    for per_channel in (True, False):
        int8 = benchmark.quantized(fused, batches, per_channel=per_channel)
        assert targets(int8).count("conv2d") == 2
        assert "quantize_per_tensor" in targets(int8)
        assert ("quantize_per_channel" in targets(int8)) is per_channel
        assert "add.Tensor" not in targets(int8)
        with torch.no_grad():
            errors[per_channel] = error(int8(batches[0]), net(batches[0]))
    assert 1e-4 < errors[True] < 0.05
    assert errors[True] < errors[False], "one scale per weight tensor is coarser"


@pytest.mark.long
def test_a_norm_that_is_kept_is_folded_after_training(benchmark: ModuleType) -> None:
    """As on the page: the norms behind the sums stay while int8 is trained, and go when it is converted."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    x = images(batch=4).float()
    partly = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    program = torch.export.export(partly.train(), (x,)).module()
    training = prepare_qat_pt2e(program, x86.X86InductorQuantizer().set_global(config))
    for _ in range(3):
        training(x)
    assert "batch_norm" in targets(training)
    int8 = convert_pt2e(training)
    assert "batch_norm" not in targets(int8)
    assert targets(int8).count("conv2d") == 1


def test_the_table_is_that_of_the_committed_run(benchmark: ModuleType) -> None:
    assert shown(benchmark.PAGE, benchmark.BLOCK) == benchmark.table()


def test_the_table_says_what_the_run_says(benchmark: ModuleType, tmp_path: Path) -> None:
    row: dict[str, Any] = {"accuracy": 0.5, "changed": 3, "error": 0.25}
    forms = dict.fromkeys(benchmark.FORMS, row) | {"fused, int8": {"accuracy": 0.125, "changed": 7, "error": 2e-7}}
    nets = [{"seed": s, "epochs": 9, "images": 1000, "forms": forms, "spreads": [[1.5, 2.5]]} for s in (4, 5)]
    about = {"name": "a machine", "torch": "3", "torchao": "4"}
    (tmp_path / "run.json").write_text(json.dumps({"machine": about, "nets": nets}))
    lines = benchmark.table(tmp_path / "run.json").splitlines()
    assert lines[0] == (
        "| net | test accuracy, seed 4 | test accuracy, seed 5 | mean | predictions changed | error of the logits |"
    )
    assert "| as trained | 50.0% | 50.0% | 50.00% | 3, 3 | 25.0% |" in lines
    assert "| `fuse`, then int8, one scale per channel | 12.5% | 12.5% | 12.50% | 7, 7 | 2e-07 |" in lines
    assert "is 1.5 medians wide before `fuse` and 2.5 after, the widest of all 1.5 and 2.5." in " ".join(lines[-4:-1])
    assert lines[-1] == "Machine: a machine, 1 thread, torch 3, torchao 4."
