"""Pages made by `benchmarks/`: they show the committed runs, and what can be asked here gives the same answers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script of `benchmarks/` as a module."""
    path = str(ROOT / "benchmarks")
    if path not in sys.path:
        sys.path.append(path)
    return importlib.import_module(name)


TOOLS = script("tools")
RUN = json.loads((RESULTS / "tools.json").read_text(encoding="utf-8"))
# These take well under a second for each net; the others are asked by the script.
QUICK = [tool for tool in TOOLS.TOOLS if tool.name in ("reparam", "timm", "torch.fx", "torch.ao")]


def test_numerics_shows_the_committed_run() -> None:
    run = json.loads((RESULTS / "numerics.json").read_text(encoding="utf-8"))
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    assert script("numerics_page").filled(page, run) == page


def test_numerics_says_what_the_run_says() -> None:
    """The sentences below the tables."""
    rows = json.loads((RESULTS / "numerics.json").read_text(encoding="utf-8"))["rows"]
    nets = [row for row in rows if row["kind"] != "amplifier"]
    runs = sum(row["runs"] for row in nets)
    won = {key: sum(row["nearer"][key] for row in nets) for key in nets[0]["nearer"]}
    assert won["bfloat16, fused and cast"] > 0.9 * runs
    assert won["float32, fused"] < 0.5 * runs, "neither is the better one"
    for row in nets:
        assert row["errors"]["float64, fused"] < 1e-11
        assert row["errors"]["apart"] < row["errors"]["allowed"]
        late, early = row["errors"]["bfloat16, fused and cast"], row["errors"]["bfloat16"]
        assert late < 1.01 * early, row["name"]


def test_tools_shows_the_committed_run() -> None:
    assert TOOLS.table(RUN) in (DOCS / "tools.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", TOOLS.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("tool", QUICK, ids=lambda tool: tool.name)
def test_a_tool_answers_as_in_the_table(tool: object, case: object) -> None:
    if tool.package:
        if importlib.util.find_spec(tool.package) is None:
            pytest.skip(f"the package {tool.package} is not installed")
        found, asked = importlib.metadata.version(tool.package), RUN[tool.name]["version"]
        if found.partition("+")[0] != asked.partition("+")[0]:
            pytest.skip(f"{tool.package} {found} is installed, and {asked} was asked")
    assert TOOLS.answer(tool, case) == RUN[tool.name]["answers"][case.name]


def test_reparam_is_never_wrong_and_leaves_nothing() -> None:
    answers = {case.name: RUN["reparam"]["answers"][case.name] for case in TOOLS.CASES}
    assert {name: answer for name, answer in answers.items() if answer not in ("yes", "stays")} == {}
