"""`benchmarks/expand.py`: a stopped run goes on, every variant fuses to its plain net, and the page is what was run."""

import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy", reason="needs the extra 'bench'")
pytest.importorskip("pebble", reason="needs the extra 'bench'")

import reparam
from benchmarks import expand as experiment
from benchmarks import expand_report as report
from benchmarks.expand_cost import costs, structure
from benchmarks.expand_training import COMPARED, SIZE, VARIANTS, Images, Settings, make, run, split
from benchmarks.marks import shown

SMALL = Settings(images=60, epochs=6, batch=20, widths=(8,), depths=(2,))
COST = {
    "step_ratio": [2.0, 1.9, 2.1], "peak_ratio": 1.5, "parameters": 1000, "fused_ratio": [1.01, 0.9, 1.1],
    "fused_structure_equal": True, "fused": {"parameters": 90, "multiply_adds": 1234, "operations": 5},
}  # fmt: skip


def results(gains: dict[str, float], seeds: int = 6) -> dict[str, Any]:
    """Runs in which a variant is better than its plain net by a gain, give or take a tenth of a point."""
    drawn = random.Random(0)
    runs: dict[str, Any] = {}
    for name in VARIANTS:
        for seed in range(seeds):
            accuracy = 0.9 + seed / 100 + (gains.get(name, 0.0) + drawn.uniform(-0.1, 0.1)) / 100
            runs.setdefault(name, {})[str(seed)] = {"accuracy": accuracy, "changed_by_fusing": 0, "cpu_seconds": 1.0}
    settings = {"images": 300, "epochs": 15, "batch": 30}
    spent = {name: dict(COST) for name in VARIANTS}
    return {"settings": settings, "costs": spent, "machine": "a machine", "runs": runs}


def test_every_variant_fuses_to_its_plain_net() -> None:
    settings = Settings(widths=(4, 6), depths=(2, 2))
    found = {}
    for name, variant in VARIANTS.items():
        net = make(variant, settings, 0)
        found[name] = structure(reparam.fuse(net))
        assert found[name] == found[variant.plain]


def test_kernels_and_images_of_a_seed_are_shared() -> None:
    settings = Settings(widths=(4, 6), depths=(2, 2))
    plain, wide = (make(VARIANTS[name], settings, 3) for name in ("plain", "acnet"))
    assert torch.equal(plain[3].weight, wide[3].main.conv.weight)
    everything = torch.arange(50.0).view(50, 1, 1, 1), torch.arange(50)
    (images, labels), (_, others) = split(everything, 20, 3)
    assert torch.equal(images.flatten().long(), labels)
    assert sorted([*labels.tolist(), *others.tolist()]) == list(range(50))
    assert not torch.equal(labels, split(everything, 20, 4)[0][1])


def patterns() -> Images:
    """Ten patterns with noise, as images of ten classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 10
    clean = torch.randn(10, 1, SIZE, SIZE, generator=generator)
    return clean[labels] + 0.1 * torch.randn(120, 1, SIZE, SIZE, generator=generator), labels


def test_a_training_learns() -> None:
    found = run(VARIANTS["repvgg"], patterns(), replace(SMALL, epochs=20, widths=(8, 16), depths=(2, 2)), 0)
    assert found["training_accuracy"] > 0.5  # chance: 0.1
    assert found["changed_by_fusing"] == 0


def test_costs_are_those_of_the_nets() -> None:
    found = costs(patterns(), SMALL, 2)
    assert found.keys() == VARIANTS.keys()
    for name, cost in found.items():
        base = found[VARIANTS[name].plain]
        assert cost["fused"] == base["fused"]
        assert cost["fused_structure_equal"]
        assert cost["parameters"] >= base["parameters"]
        assert cost["peak_ratio"] >= 1
    # 1 -> 8 -> 8 channels with biases, and ten classes; a convolution and an activation twice, pool and linear layer
    assert found["plain"]["fused"] == {
        "parameters": 80 + 584 + 90, "multiply_adds": (72 + 576) * SIZE**2 + 80, "operations": 6
    }  # fmt: skip
    assert found["acnet"]["step_ratio"][0] > 1.2


@pytest.mark.slow
def test_the_quick_form_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = report.PAGE.read_bytes()
    monkeypatch.setattr(experiment, "QUICK", tmp_path / "expand.json")
    monkeypatch.setattr(experiment, "digits", patterns)
    monkeypatch.setattr(experiment, "Settings", lambda **_: replace(SMALL, epochs=2))
    monkeypatch.setattr(sys, "argv", ["expand.py", "--quick"])
    experiment.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:15]] == [f"| {variant.title}" for variant in VARIANTS.values()]
    assert all("same net" in line for line in lines[3:13])
    saved = json.loads((tmp_path / "expand.json").read_text(encoding="utf-8"))
    assert {name: sorted(runs) for name, runs in saved["runs"].items()} == {name: ["0", "1", "2"] for name in VARIANTS}
    assert "1 thread, torch" in saved["machine"]
    assert report.PAGE.read_bytes() == page


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "expand.json"
    trained: list[tuple[str, int]] = []

    def run(variant: Any, everything: Any, settings: Any, seed: int) -> dict[str, Any]:
        if len(trained) == 30:
            raise KeyboardInterrupt
        trained.append((variant.title, seed))
        return {"accuracy": 0.9, "changed_by_fusing": 0}

    monkeypatch.setattr(experiment, "QUICK", path)
    monkeypatch.setattr(experiment, "digits", lambda: None)
    monkeypatch.setattr(experiment, "costs", lambda *_: {name: dict(COST) for name in VARIANTS})
    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(sys, "argv", ["expand.py", "--quick"])
    with pytest.raises(KeyboardInterrupt):
        experiment.main()
    saved = json.loads(path.read_text())
    assert sum(len(seeds) for seeds in saved["runs"].values()) == 30
    assert list(saved["runs"]["plain"]) == ["0", "1", "2"]
    assert sorted(experiment.missing(saved["runs"], 3)) == sorted(
        (name, seed)
        for name, variant in VARIANTS.items()
        for seed in (0, 1, 2)
        if (variant.title, seed) not in trained
    )
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        experiment.read(path, Settings(epochs=3))


def test_gains_and_losses_are_told_apart_from_noise() -> None:
    found = results({"repvgg": 2.0, "acnet": -2.0, "dilated": 1.0})
    rows = {row.name: row for row in report.rows(found, VARIANTS)}
    assert {name: row.verdict for name, row in rows.items() if row.verdict} == {"repvgg": 1, "acnet": -1, "dilated": 1}
    low, high = rows["repvgg"].interval
    assert 1.8 < low < 2.0 < high < 2.2
    text = report.block(found, VARIANTS, 500)
    assert "- Better than the plain net: `repvgg`: identity and 1×1, `dilated`." in text
    assert "- Worse than the plain net: `acnet`." in text
    assert "Fusing changed 0 of 39,000 predictions" in text


def test_seeds_that_not_every_variant_has_do_not_count() -> None:
    found = results({})
    del found["runs"]["dilated"]["2"]
    assert report.finished_seeds(found, VARIANTS) == ["0", "1", "3", "4", "5"]
    found["runs"]["dilated"] = {}
    assert report.block(found, VARIANTS, 500) == "Run `python -m benchmarks.expand`.\n"


def test_the_page_is_what_was_run() -> None:
    saved = json.loads(experiment.RESULTS.read_text(encoding="utf-8"))
    assert shown(report.PAGE, report.BLOCK) == report.block(saved, VARIANTS, COMPARED)
    assert saved["settings"] == json.loads(json.dumps(asdict(Settings())))
    assert all(cost["fused_structure_equal"] for cost in saved["costs"].values())
    # what the page says in its own words
    assert len(report.finished_seeds(saved, VARIANTS)) == 10
    assert not any(row.verdict for row in report.rows(saved, VARIANTS))
