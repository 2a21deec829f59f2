"""The commands ``expand`` and ``restore``: what they print, write and return."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import reparam

pytest.importorskip("typer")
from test_command_line import SHAPE, USER, run, run_json

from reparam.cli import branches
from reparam.cli.source import Source, called

MORE = """

def branched():
    return reparam.expand(net().eval(), "acnet", preserve=False)


def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 8, 8) * 2 + 1 for _ in range(2)]


def failing():
    raise RuntimeError("no such folder")


def stack():
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


def narrow():
    return nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 3, 1))
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(USER + MORE)
    return str(path)


def built(name: str) -> nn.Module:
    return Source(name, {}).build().eval()


# --- expand -----------------------------------------------------------------------------------------------------------


def test_what_would_be_expanded_is_shown(nets: str) -> None:
    printed = run("expand", f"{nets}:net", "--branches", "acnet")
    assert printed.startswith("1 convolutions become blocks:\n  first: vertical, horizontal\n0 convolutions stay:\n")
    assert "not compared, as --input is not given" in printed
    assert printed.endswith("nothing was written, as --out is not given\n")
    found = run_json("expand", f"{nets}:net", "--branches", "1x1", "--branches", "dilated(1, 3)", *SHAPE)
    assert found["chosen"] == {"first": ["point", "dilated_1"]}
    assert (found["left"], found["out"], found["branches"]) == ({}, None, ["1x1", "dilated(1, 3)"])
    expanded = reparam.expand(built(f"{nets}:net"), ["1x1", "dilated(1, 3)"])
    assert found["parameters_after"] == sum(parameter.numel() for parameter in expanded.parameters())
    assert found["parameters_before"] < found["parameters_after"]
    assert found["verification"]["ok"]


def test_the_default_is_repvgg(nets: str) -> None:
    assert run_json("expand", f"{nets}:net")["chosen"] == {"first": ["point"]}


def test_the_checkpoint_loads_into_the_expanded_net(nets: str, tmp_path: Path) -> None:
    weights, out = tmp_path / "net.pth", tmp_path / "wide.safetensors"
    model = built(f"{nets}:net")
    with torch.no_grad():
        model.first.weight.mul_(3)
    torch.save({"state_dict": model.state_dict()}, weights)
    printed = run("expand", f"{nets}:net", "--branches", "acnet", "--weights", str(weights), "--out", str(out), *SHAPE)
    assert "equal: rounding explains every difference" in printed
    assert printed.endswith(f"wrote {out}\n")
    expanded = built(f"{nets}:branched")
    reparam.load_checkpoint(expanded, out)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(expanded(x), model(x), atol=1e-4)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"source": f"{nets}:net", "kwargs": "{}", "branches": "acnet"}


def test_where_leaves_the_others_alone(nets: str) -> None:
    assert list(run_json("expand", f"{nets}:stack", "--branches", "kxk")["chosen"]) == ["0", "2.0"]
    found = run_json("expand", f"{nets}:stack", "--branches", "kxk", "--where", "2.*")
    assert (list(found["chosen"]), found["left"]) == (["2.0"], {})


def test_without_preserve_nothing_is_compared(nets: str, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    printed = run("expand", f"{nets}:net", "--branches", "acnet", "--no-preserve", "--out", str(out), *SHAPE)
    assert "not compared, as --no-preserve starts branches anew" in printed
    assert bool((load_file(out)["first.branches.vertical.norm.weight"] == 1).all())


def test_statistics_are_measured_on_inputs_of_the_user(nets: str, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    run("expand", f"{nets}:net", "--calibrate", f"{nets}:batches", "--out", str(out), *SHAPE)
    state = load_file(out)
    torch.manual_seed(1)
    images = torch.cat([torch.randn(8, 3, 8, 8) * 2 + 1 for _ in range(2)])
    seen = nn.functional.conv2d(images, state["first.branches.point.conv.weight"])
    assert torch.allclose(state["first.branches.point.norm.running_mean"], seen.mean((0, 2, 3)), atol=1e-5)


def test_a_net_that_differs_is_not_written(nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, plain = tmp_path / "wide.safetensors", reparam.expand

    def wrong(*args: object, **kwargs: object) -> nn.Module:
        model = plain(*args, **kwargs)  # type: ignore[arg-type]
        model.last.bias.data.add_(1)
        return model

    monkeypatch.setattr(branches.reparam, "expand", wrong)
    found = run_json("expand", f"{nets}:net", "--out", str(out), *SHAPE, code=1)
    assert (found["verification"]["ok"], found["verification"]["where"], found["out"]) == (False, "last", None)
    assert run("expand", f"{nets}:net", "--out", str(out), *SHAPE, code=1).endswith(f"did not write {out}\n")
    assert not out.exists()


# --- restore ----------------------------------------------------------------------------------------------------------


def deployed(nets: str, folder: Path, *options: str) -> tuple[Path, nn.Module]:
    """A deploy checkpoint of the branched net, and the fused net."""
    torch.manual_seed(3)
    model = built(f"{nets}:branched")
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    trained, out = folder / "trained.safetensors", folder / "deploy.safetensors"
    save_file(model.state_dict(), trained)
    run("fuse", f"{nets}:branched", "--weights", str(trained), "--out", str(out), *options)
    return out, reparam.fuse(model)


def test_branches_come_back(nets: str, tmp_path: Path) -> None:
    path, fused = deployed(nets, tmp_path)
    out = tmp_path / "again.safetensors"
    printed = run("restore", f"{nets}:branched", str(path), "--out", str(out), *SHAPE)
    assert "equal: rounding explains every difference" in printed
    assert printed.endswith(f"wrote {out}\n")
    restored = built(f"{nets}:branched")
    reparam.load_checkpoint(restored, out)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(restored(x), fused(x), atol=1e-4)
    found = run_json("restore", f"{nets}:branched", str(path), "--out", str(out), "--calibrate", f"{nets}:batches")
    assert found["parameters_before"] < found["parameters_after"]
    assert (found["verification"], found["out"]) == (None, str(out))
    batches = torch.cat(called(f"{nets}:batches", "inputs"))
    seen = nn.functional.conv2d(batches, load_file(out)["first.main.conv.weight"], padding=1).mean((0, 2, 3))
    assert torch.allclose(load_file(out)["first.main.norm.running_mean"], seen, atol=1e-4)


@pytest.mark.parametrize(
    "options", [("--exclude", "first.branches.*"), ("--only", "first"), ("--cost", "always")], ids=lambda o: o[0]
)
def test_options_are_those_it_was_fused_with(nets: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    path, _ = deployed(nets, tmp_path, *options)
    out = tmp_path / "again.safetensors"
    assert run_json("restore", f"{nets}:branched", str(path), "--out", str(out), *options, *SHAPE)["verification"]["ok"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["expand", "{nets}:net", "--branches", "repvg"], "expected a branch ('1x1', 'identity', 'scale', 'kxk',"),
        (["expand", "{nets}:net", "--branches", "acnet", "--branches", "1x1"], "alone, a preset ('repvgg', "),
        (["expand", "{nets}:net", "--where", "last"], "last: expected a convolution, found Linear: name the conv"),
        (["expand", "{nets}:net", "--where", "middle.*"], "where to name modules of the model, found 'middle.*'"),
        (["expand", "{nets}:net", "--where", "first", "--branches", "identity"], "first: expected a convolution that"),
        (["expand", "{nets}:net", "--out", "net.pth"], "path for --out that ends with .safetensors, found net.pth"),
        (["expand", "{nets}:net", "--out", "no/net.safetensors"], "expected a folder for --out, found none at no"),
        (["expand", "{nets}:net", "--calibrate", "batches"], "package.module:function or path/file.py:function, found"),
        (["expand", "{nets}:net", "--calibrate", "{nets}:batchs"], "found no 'batchs' there; did you mean {nets}:ba"),
        (["expand", "{nets}:net", "--calibrate", "{nets}:failing"], "but it raises RuntimeError: no such folder"),
        (["expand", "{nets}:net", "--calibrate", "{nets}:number"], "calibrate to be an iterable of inputs, found int"),
        (["expand", "{nets}:net", "--calibrate", "{nets}:batches", "--no-preserve"], "calibrate without preserve=Fal"),
        (["expand", "{nets}:net", "--weights", "no.pth"], "expected a checkpoint, found no file at no.pth"),
        (["restore", "{nets}:net", "no.safetensors", "--out", "a.safetensors"], "expected a deploy checkpoint, found"),
        (["restore", "{nets}:net", "trained.safetensors", "--out", "a.safetensors"], "fuse the model and save it with"),
        (["restore", "{nets}:narrow", "deploy.safetensors", "--out", "a.safetensors"], "does not fit Sequential as"),
        (["restore", "{nets}:net", "deploy.safetensors", "--out", "a.pt"], "that ends with .safetensors, found a.pt"),
        (
            ["restore", "{nets}:narrow", "narrow.safetensors", "--cost", "always", "--out", "a.safetensors"],
            "lose channels",
        ),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_errors(arguments: list[str], message: str, nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "restore":
        deployed(nets, tmp_path)
        run("fuse", f"{nets}:narrow", "--cost", "always", "--out", "narrow.safetensors")
    arguments, message = [argument.format(nets=nets) for argument in arguments], message.format(nets=nets)
    printed = run(*arguments, code=2)
    assert printed.startswith("error: ")
    assert message in printed
    assert message in run_json(*arguments, code=2)["error"]
    assert not list(tmp_path.glob("a.*"))
