"""The command line: what it prints, writes and returns."""

import doctest
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import reparam

pytest.importorskip("typer")
from typer.testing import CliRunner

from reparam.cli.app import COMMANDS, app
from reparam.cli.source import ZOOS, Source

ROOT = Path(__file__).resolve().parents[1]
USER = '''
"""Nets of a user."""

import torch
from torch import nn

import reparam


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))).mean((2, 3)))


def net(width=6):
    torch.manual_seed(0)
    model = Net(width)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def forgotten_eval():
    return net()


def right():
    return reparam.fuse(net().eval())


def bias_dropped():
    model = right()
    model.first.bias.data.zero_()
    return model


def tap_shifted():
    model = right()
    model.first.weight.data = model.first.weight.data.roll(1, -1)
    return model


def other_eps():
    model = net().eval()
    model.norm.eps = 1e-3
    return model


def number():
    return 3


MODEL = net().eval()
'''
SHAPE = ["--input", "2x3x8x8"]


@pytest.fixture
def user(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(USER)
    return str(path)


def run(*arguments: str, code: int = 0) -> str:
    """What a command prints, on both streams."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def run_json(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# --- plan and verify --------------------------------------------------------------------------------------------------


def test_plan(user: str) -> None:
    printed = run("plan", f"{user}:net")
    assert "first Conv2d: conv 3x3, batch norm -> conv 3x3" in printed
    found = run_json("plan", f"{user}:net", "--kwargs", '{"width": 8}')
    assert [region["path"] for region in found["regions"]] == ["first"]
    assert found["regions"][0]["params_after"] == 8 * 27 + 8
    left = run_json("plan", f"{user}:net", "--exclude", "norm")["left"]
    assert [(refusal["rule"], refusal["path"]) for refusal in left] == [("excluded", "first"), ("excluded", "norm")]
    assert run_json("plan", f"{user}:net", "--only", "last")["regions"] == []


def test_plan_as_tables(user: str) -> None:
    lines = run("plan", f"{user}:net", "--markdown").splitlines()
    assert lines[0] == "**Net: 1 region is fused, 0 operations are left alone**"
    assert any(line.startswith("| first Conv2d | conv 3x3, batch norm | conv 3x3 |") for line in lines)


def test_draw(user: str, tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz", reason="needs the extra 'draw'")
    said = "Net: 1 region is fused, 0 operations are left alone"
    for name, start in (("net.svg", b"<?xml"), ("net.png", b"\x89PNG"), ("net.html", b"<!DOCTYPE html>")):
        assert run("draw", f"{user}:net", "--out", str(tmp_path / name)).endswith(f"wrote {tmp_path / name}: {said}\n")
        assert (tmp_path / name).read_bytes().startswith(start)
    part = run_json("draw", f"{user}:net", "--out", str(tmp_path / "part.svg"), "--module", "last")
    assert (part["regions"], part["left"], part["module"]) == (1, 0, "last")
    words = (tmp_path / "part.svg").read_text(encoding="utf-8")
    assert "before: last" in words
    assert "conv 3x3" not in words


def test_draw_ranges_of_the_weights_that_were_loaded(user: str, tmp_path: Path) -> None:
    out, other = tmp_path / "ranges.svg", tmp_path / "other.svg"
    run("draw", f"{user}:net", "--ranges", "--out", str(out))
    weights = Source(f"{user}:net", {}).build().state_dict()
    weights["first.weight"][2] *= 100
    torch.save(weights, tmp_path / "net.pth")
    run("draw", f"{user}:net", "--ranges", "--weights", str(tmp_path / "net.pth"), "--out", str(other))
    spread = re.compile(r"<!-- ([\d.]+)× -->")  # matplotlib writes each text as a comment, too
    assert max(map(float, spread.findall(other.read_text(encoding="utf-8")))) > 20
    assert max(map(float, spread.findall(out.read_text(encoding="utf-8")))) < 20


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--out", "net.gif"], "expected a file that ends in .svg, .png, .html, found 'net.gif': give it an ending"),
        (["--out", "n.html", "--ranges"], "found 'n.html': give it an ending"),
        (["--out", "no/net.svg"], "expected a folder to write net.svg into, found none at no: make it first"),
        (["--out", "no/net.png", "--ranges"], "expected a folder to write net.png into, found none at no"),
        (["--out", "net.svg", "--module", "lats"], "expected the path of a module that the forward of Net uses, found"),
        (["--out", "net.svg", "--module", "last", "--ranges"], "expected --ranges or --module, found both"),
    ],
)
def test_what_cannot_be_drawn(arguments: list[str], text: str, user: str) -> None:
    pytest.importorskip("pygraphviz", reason="needs the extra 'draw'")
    assert text in run("draw", f"{user}:net", *arguments, code=2)


def test_a_missing_folder_is_named(user: str, tmp_path: Path) -> None:
    expected = "expected a folder to write net.safetensors into, found none at"
    assert expected in run("fuse", f"{user}:net", "--out", str(tmp_path / "no" / "net.safetensors"), code=2)
    (tmp_path / "net.pt2").mkdir()
    said = run("export", f"{user}:net", *SHAPE, "--out", str(tmp_path / "net.pt2"), code=2)
    assert "expected the path of a file to write, found the folder" in said


def test_a_right_net_is_verified(user: str) -> None:
    assert run("verify", f"{user}:net", *SHAPE).startswith("equal: rounding explains every difference\n")
    found = run_json("verify", f"{user}:net", f"{user}:right", *SHAPE)
    assert (found["ok"], found["cause"], found["b"]) == (True, "rounding", f"{user}:right")
    assert [row["dtype"] for row in found["outputs"]] == ["float64", "float32"]


@pytest.mark.parametrize(
    ("factory", "cause", "where", "text"),
    [
        ("forgotten_eval", "training_mode", "norm", "b is in training mode"),
        ("bias_dropped", "computation", "first", "one number per channel"),
        ("tap_shifted", "computation", "first", "first receives the same in both and norm, folded into it, returns"),
        ("other_eps", "epsilon", "norm", "norm has eps 1e-05 in a and 0.001 in b"),
    ],
)
def test_diagnoses(factory: str, cause: str, where: str, text: str, user: str) -> None:
    found = run_json("verify", f"{user}:net", f"{user}:{factory}", *SHAPE, code=1)
    assert (found["ok"], found["cause"], found["where"]) == (False, cause, where)
    printed = run("verify", f"{user}:net", f"{user}:{factory}", "--modules", *SHAPE, code=1)
    assert printed.startswith("not equal: ")
    assert text in printed
    assert f"first module where they part: {where}\n" in printed
    assert "  modules:\n" in printed


# --- fuse -------------------------------------------------------------------------------------------------------------


def trained(user: str, path: Path) -> nn.Module:
    model = Source(f"{user}:net", {}).build().eval()
    with torch.no_grad():
        model.first.weight.mul_(3)
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}, "epoch": 3}, path)
    return model


def test_a_training_checkpoint_becomes_a_deploy_checkpoint(user: str, tmp_path: Path) -> None:
    weights, out = tmp_path / "net.pth", tmp_path / "net.safetensors"
    model = trained(user, weights)
    printed = run("fuse", f"{user}:net", "--weights", str(weights), "--out", str(out), *SHAPE)
    assert "equal: rounding explains every difference" in printed
    assert printed.endswith(f"wrote {out}\n")
    fused = reparam.fuse(model)
    assert {key: value.tolist() for key, value in load_file(out).items()} == {
        key: value.tolist() for key, value in fused.state_dict().items()
    }
    with safe_open(out, framework="pt") as file:
        assert (file.metadata()["source"], file.metadata()["kwargs"]) == (f"{user}:net", "{}")
    assert run_json("verify", f"{user}:net", str(out), "--weights", str(weights), *SHAPE)["ok"]
    other = run_json("verify", f"{user}:net", str(out), *SHAPE, code=1)  # the untrained net
    assert (other["cause"], other["where"]) == ("computation", "first")


def test_fuse_without_a_known_input(user: str, tmp_path: Path) -> None:
    found = run_json("fuse", f"{user}:net", "--out", str(tmp_path / "net.safetensors"))
    assert found["verification"] is None
    assert found["parameters_before"] > found["parameters_after"]
    printed = run("fuse", f"{user}:net", "--out", str(tmp_path / "net.safetensors"))
    assert "not compared, as --input is not given" in printed


def test_pickled_code_needs_trust(user: str, tmp_path: Path) -> None:
    path, out = tmp_path / "net.pt", tmp_path / "net.safetensors"
    torch.save({"model": nn.Conv2d(3, 6, 3)}, path)
    arguments = ["fuse", f"{user}:net", "--weights", str(path), "--out", str(out)]
    assert "found pickled code, which was not run" in run(*arguments, code=2)
    printed = run(*arguments, "--trust-pickle", code=2)
    assert f"warning: unpickling {path} runs whatever code it holds" in printed
    assert "do not fit Net, nothing was changed" in printed
    assert not out.exists()


def test_average_or_not(user: str, tmp_path: Path) -> None:
    model = Source(f"{user}:net", {}).build()
    average = {key: value * 2 for key, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": average}, tmp_path / "net.pth")
    biases = {}
    for option in ("--ema", "--no-ema"):
        out = tmp_path / f"{option}.safetensors"
        run("fuse", f"{user}:net", "--weights", str(tmp_path / "net.pth"), option, "--out", str(out))
        biases[option] = load_file(out)["last.bias"]
    assert torch.equal(biases["--ema"], 2 * biases["--no-ema"])


# --- bench and export -------------------------------------------------------------------------------------------------


def test_bench(user: str) -> None:
    timing = ["--rounds", "2", "--seconds", "0.02"]
    found = run_json("bench", f"{user}:net", *SHAPE, *timing)
    assert [found[name]["batch_norms"] for name in ("before", "after")] == [1, 0]
    assert [found[name]["multiply_adds"] for name in ("before", "after")] == [2 * (64 * 3 * 9 * 6 + 6 * 4)] * 2
    assert all(found[name]["milliseconds"] > 0 for name in ("before", "after"))
    assert (found["threads"], found["inputs"]) == (1, [[2, 3, 8, 8]])
    printed = run("bench", f"{user}:net", *SHAPE, *timing)
    assert "batch norms" in printed
    assert "times are medians" in printed


@pytest.mark.slow
def test_export(user: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx, program = tmp_path / "net.onnx", tmp_path / "net.pt2"
    found = run_json("export", f"{user}:net", "--out", str(onnx), "--out", str(program), "--dynamic-batch", *SHAPE)
    assert {path: result["ok"] for path, result in found["files"].items()} == {str(onnx): True, str(program): True}
    model = Source(f"{user}:net", {}).build().eval()
    x = torch.randn(5, 3, 8, 8)
    exported = torch.export.load(program).module()
    assert torch.allclose(exported(x), model(x), atol=1e-4)
    session = importlib.import_module("onnxruntime").InferenceSession(str(onnx))
    (found_by_onnx,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found_by_onnx), model(x), atol=1e-4)


def test_a_program_that_differs_is_not_left(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    wrong = reparam.fuse(model)
    with torch.no_grad():
        wrong[0].bias.add_(1)
    path = tmp_path / "net.pt2"
    with pytest.raises(reparam.CheckError) as info:
        reparam.export(wrong, torch.randn(1, 3, 8, 8), path, original=model)
    assert str(info.value).startswith("expected net.pt2 to compute what Sequential computes, found another result")
    assert not path.exists()


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "name", "options", "message"),
    [
        (nn.ReLU().eval(), "net.tflite", {}, "expected a path that ends with .onnx or .pt2, found "),
        (nn.ReLU(), "net.pt2", {}, "expected a model in eval mode, found ReLU in training mode: model.eval()"),
        (Branching().eval(), "net.pt2", {}, "expected a model that torch can export to .pt2, found Branching, on"),
    ],
    ids=["suffix", "training", "branch"],
)
def test_errors_of_export(model: nn.Module, name: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(reparam.ReparamError) as info:
        reparam.export(model, torch.randn(1, 3), tmp_path / name, **options)
    assert str(info.value).startswith(message)


def test_a_dynamic_batch_needs_an_axis(tmp_path: Path) -> None:
    with pytest.raises(reparam.ReparamError, match="expected inputs with a batch axis for dynamic_batch, found tensor"):
        reparam.export(nn.ReLU().eval(), torch.tensor(1.0), tmp_path / "net.pt2", dynamic_batch=True)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "reparam:repvgg_a9"], "expected a model of reparam, found 'repvgg_a9'; did you mean reparam:repvgg"),
        (["plan", "repvgg_b1g2"], "found 'repvgg_b1g2'; did you mean reparam:repvgg_b1g2?"),
        (["plan", "no_such_package:net"], "'no_such_package', which cannot be imported: ModuleNotFoundError: No"),
        (["plan", "tim:resnet18"], "which cannot be imported: ModuleNotFoundError: No module named 'tim'; did you"),
        (["plan", "nowhere.py:net"], "expected a Python file, found none at nowhere.py"),
        (["plan", "{user}:nett"], "found no 'nett' there; did you mean {user}:net"),
        (["plan", "{user}:number"], "expected {user}:number to return an nn.Module, found int"),
        (["plan", "{user}:net", "--kwargs", "{{"], "expected --kwargs as a JSON object, found '{{'"),
        (["plan", "{user}:net", "--kwargs", "3"], "expected --kwargs as a JSON object, found '3'"),
        (["plan", "{user}:net", "--kwargs", '{{"wide": 3}}'], "built from {{'wide': 3}}, but it raises TypeError"),
        (["plan", "{user}:MODEL", "--kwargs", '{{"wide": 3}}'], "expected no --kwargs, as {user}:MODEL is a model"),
        (["plan", "{user}:net", "--cost", "cheap"], "expected --cost to be one of default, macs, traffic, parameters"),
        (["verify", "{user}:net"], "expected the shape of the input of {user}:net, found none: pass --input 1x3x"),
        (["verify", "{user}:net", "--input", "3xq"], "expected --input as 1x3x224x224, found '3xq'"),
        (["verify", "{user}:net", "--input", "1x4x8x8"], "expected example_inputs on which the model runs, found"),
        (["verify", "{user}:net", "no.safetensors", *SHAPE], "expected a deploy checkpoint, found no file at no"),
        (["fuse", "{user}:net", "--weights", "no.pth", "--out", "x"], "expected a checkpoint, found no file at no."),
        (["export", "{user}:net", "--out", "net.tflite", *SHAPE], "expected a path that ends with .onnx or .pt2"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_errors(arguments: list[str], message: str, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(user=user) for argument in arguments]
    message = message.format(user=user)
    printed = run(*arguments, code=2)
    assert printed.startswith("error: ")
    assert message in printed
    assert message in run_json(*arguments, code=2)["error"]


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    printed = run("plan", f"{tmp_path}/broken.py:net", code=2)
    assert "broken.py to be importable, but it raises ModuleNotFoundError: No module named 'nothing_of_that" in printed
    assert f"did you mean {tmp_path}/broken.py?" in run("plan", f"{tmp_path}/brokn.py:net", code=2)


@pytest.mark.zoo
@pytest.mark.parametrize(("zoo", "name"), [("timm", "repvgg_a0"), ("torchvision", "resnet18")])
def test_names_of_zoos(zoo: str, name: str) -> None:
    pytest.importorskip("timm" if zoo == "timm" else "torchvision")
    assert len(run_json("plan", f"{zoo}:{name}")["regions"]) > 10
    printed = run("plan", f"{zoo}:{name[:-1]}x", code=2)
    assert f"expected a model of {zoo}, found '{name[:-1]}x'; did you mean {zoo}:{name[:4]}" in printed
    assert f"{zoo}:{name}" in run("plan", name, code=2)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    printed = run("plan", "timm:repvgg_a0", code=3)
    assert printed == "error: expected the package timm, which has the model, found none: pip install 'reparam[zoo]'\n"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from reparam.cli.entry import main

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 3
    text = "expected the package typer, which the command line is made of, found none: pip install 'reparam[cli]'"
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime", "onnx"])
def test_without_onnx(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from reparam.exporting import export as module

    if package != "onnxscript":
        monkeypatch.setattr(module.torch.onnx, "export", lambda *args, **kwargs: None)
        monkeypatch.setitem(sys.modules, "onnxscript", torch)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(reparam.MissingPackageError, match=rf"expected the package {package}, which .*reparam\[onnx\]"):
        reparam.export(nn.ReLU().eval(), torch.randn(1, 3), tmp_path / "net.onnx")


# --- as a program -----------------------------------------------------------------------------------------------------


def test_as_a_program(user: str) -> None:
    command = [sys.executable, "-m", "reparam", "verify", f"{user}:net", f"{user}:bias_dropped", *SHAPE, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["where"] == "first"
    assert done.stderr == ""


def test_help_names_commands_and_exit_codes() -> None:
    printed = run("--help")
    assert all(f" {name} " in printed for name in COMMANDS)
    assert "Exit codes: 0 done; 1 the models differ" in printed
    assert all(f"{zoo}:NAME" in " ".join(run("plan", "--help").split()) for zoo in ZOOS)


PAGE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(?P<language>python|console)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Python block is nets.py; every command is run, and prints what the page says."""
    pytest.importorskip("onnxscript")
    blocks = [(match["language"], match["text"]) for match in FENCE.finditer(PAGE)]
    (tmp_path / "nets.py").write_text(next(text for language, text in blocks if language == "python"))
    monkeypatch.chdir(tmp_path)
    checker, loose = doctest.OutputChecker(), doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    sessions = [session for language, text in blocks if language == "console" for session in text.split("$ ")[1:]]
    assert len(sessions) > 5
    for session in sessions:
        line, _, expected = session.partition("\n")
        _, *arguments = shlex.split(line, comments=True)
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == (1 if expected.startswith("not equal") else 0), result.output
        assert checker.check_output(expected, result.output, loose), f"{line}\n{result.output}"


@pytest.mark.zoo
@pytest.mark.slow
def test_from_timm_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    path = tmp_path / "net.onnx"
    printed = run("export", "timm:repvgg_a0", "--out", str(path), "--input", "1x3x64x64")
    assert printed.startswith(f"wrote {path}, compared with timm:repvgg_a0: equal: rounding explains every difference")
    assert path.stat().st_size > 8_000_000
