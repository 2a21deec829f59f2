"""The small examples run, and each checks what it says; they stay small."""

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDS = {
    "deploy_checkpoint": ("safetensors",),
    "detector": ("torchvision",),
    "own_block": (),
    "read_refusal": (),
    "timm_model": ("timm", "safetensors", "onnxscript", "onnxruntime"),
}
each_example = pytest.mark.parametrize("name", NEEDS)


@each_example
def test_an_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


@each_example
def test_an_example_is_short_and_checks_what_it_says(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") < 80
    tree = ast.parse(text)
    assert f"python examples/{name}.py" in (ast.get_docstring(tree) or "")
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 3


def test_the_page_names_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"common.py"}
    notebooks = {path.name for path in EXAMPLES.glob("*.ipynb")}
    missing = [name for name in sorted(scripts | notebooks) if f"`{name}`" not in page]
    assert not missing, f"examples/README.md does not name {missing}"
