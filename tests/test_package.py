"""The package from outside: types, names, and how long it takes to import."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  # loaded once here, so that the files are in memory when the import is timed

import reparam

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "typed_user.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# CPU time of the process, which other work on the machine does not lengthen, and after torch and its own imports.
TIMED = "import time, torch; start = time.process_time(); import reparam; print(time.process_time() - start)"
LIGHT = "import sys, torch; before = {*sys.modules}; import reparam; print(*sorted({*sys.modules} - before))"


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_typed_program_runs() -> None:
    lines = run(sys.executable, str(PROGRAM)).splitlines()
    assert lines[1:] == [
        "True True None",
        "1 True 1",
        "Sequential 1",
        "Sequential model True",
        "expected a model in eval mode",
        "expected a convolution that acnet fits",
    ]


def test_the_typed_program_uses_every_public_name() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {*reparam.__all__} - imported - read == {"models"}, "which is imported from"
    assert "from reparam.models import" in PROGRAM.read_text(encoding="utf-8")


def test_a_typed_program_is_accepted(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    config = tmp_path / "mypy.ini"  # a user's, not this repository's
    config.write_text("[mypy]\nstrict = true\n")
    # `reparam` is followed as an installed package is: its own errors are not the user's.
    command = (sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path), str(PROGRAM))
    assert run(*command).startswith("Success: no issues found in 1 source file")


def test_a_wrong_program_is_not_accepted(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import reparam\nreparam.fuse(3)\nreparam.fuze\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(wrong)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert 'Argument 1 to "fuse" has incompatible type "int"; expected ' in done.stdout
    assert 'Module has no attribute "fuze"' in done.stdout


def test_every_public_name_is_there() -> None:
    assert sorted(reparam.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == [
        *reparam.__all__
    ]
    for name in reparam.__all__:
        assert getattr(reparam, name) is not None
    assert {*reparam.__all__} <= {*dir(reparam)}
    with pytest.raises(AttributeError, match="module 'reparam' has no attribute 'fuze'"):
        _ = reparam.fuze  # type: ignore[attr-defined]


def test_import_takes_no_time() -> None:
    times = [float(run(sys.executable, "-c", TIMED)) for _ in range(5)]
    assert statistics.median(times) < 0.05, times


def test_import_loads_nothing_else() -> None:
    """No module of its own is loaded before it is needed, and none of the packages in extras at all."""
    assert run(sys.executable, "-c", LIGHT).split() == ["reparam"]
