"""The start that the README promises: its commands, run as they stand there."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra 'cli'")
from typer.testing import CliRunner

from reparam.cli.app import COMMANDS, app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("## Five minutes") :].split("\n## ")[0]
COMMAND = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)


def test_five_commands_or_fewer() -> None:
    commands = COMMAND.findall(SECTION)
    assert 2 <= len(commands) <= 5
    assert [line.split()[0] for line in commands] == ["pip", *["reparam"] * (len(commands) - 1)]


def test_what_is_installed_is_declared() -> None:
    """The extras exist, and bring what the commands import."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (names,) = re.findall(r"pip install '\.\[(.*?)\]'", SECTION)
    brought = {re.split(r"[\[<>=]", package)[0] for name in names.split(",") for package in extras[name]}
    assert {"typer", "rich", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime"} <= brought


@pytest.mark.zoo
def test_the_commands_do_what_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extras 'onnx' and 'zoo'")
    monkeypatch.chdir(tmp_path)
    printed = {}
    for line in COMMAND.findall(SECTION)[1:]:
        _, name, *arguments = shlex.split(line, comments=True)
        result = CliRunner().invoke(app, [name, *arguments])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        printed[name] = result.stdout
    assert printed["plan"].startswith("ByobNet: 22 regions are fused, 0 operations are left alone")
    assert "repvgg_a0.onnx, compared with timm:repvgg_a0: equal: rounding explains every diff" in printed["export"]
    onnx = pytest.importorskip("onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "repvgg_a0.onnx").graph.node]
    assert kinds.count("Conv") == 22
    assert "BatchNormalization" not in kinds


def test_named_commands_exist() -> None:
    (listed,) = re.findall(r"From a shell:\n(.*) \(\[all commands\]", README)
    assert [name.removeprefix("reparam ") for name in re.findall(r"`(.*?)`", listed)] == [*COMMANDS]


def test_packages_that_are_missing_are_named_with_extras_that_exist() -> None:
    """Every extra that an error names is one of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = 0
    for file in (ROOT / "reparam").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingPackageError.of":
                assert ast.literal_eval(node.args[2]) in extras, f"{file}:{node.lineno}"
                found += 1
    assert found > 5
