"""Checkpoints of every make are read, no code in them is run, and deploy checkpoints know what they belong to."""

import builtins
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Block, C, conv, conv_norm, difference, images, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import reparam
from reparam import ReparamError, load_checkpoint, load_deploy, save_deploy
from reparam.checkpoints.read import read_checkpoint
from reparam.models import RepVGG

X = images().float()


def build() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.Conv2d(C, 2 * C, 1), nn.BatchNorm2d(2 * C))


def trained(seed: int = 0) -> nn.Sequential:
    return randomise(build(), seed).eval()


def weights(seed: int = 0) -> dict[str, Tensor]:
    return trained(seed).state_dict()


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ReparamError) as info:
        call()
    return str(info.value)


# --- training checkpoints ---------------------------------------------------------------------------------------------

PREFIXED = {f"module.{key}": value for key, value in weights().items()}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (weights(), ""),
        (PREFIXED, ""),
        ({f"_orig_mod.{key}": value for key, value in PREFIXED.items()}, ""),
        ({"model": weights(), "epoch": 3, "optimizer": {"lr": 0.1}}, "model"),
        ({"state_dict": PREFIXED}, "state_dict"),
        ({"model": {"state_dict": weights()}}, "model.state_dict"),
        ({"model": weights(1), "model_ema": weights()}, "model_ema"),
        ({"state_dict": weights(1), "state_dict_ema": PREFIXED}, "state_dict_ema"),
        ({"model": weights(1), "ema": {"model": weights()}}, "ema.model"),
        ({"model_state_dict": weights()}, "model_state_dict"),
        (AveragedModel(trained()).state_dict(), ""),
        ({"model": weights(), "model_ema": {}}, "model"),
    ],
    ids=[
        "plain", "module", "compiled", "model", "state_dict", "nested", "model_ema", "state_dict_ema", "ema",
        "model_state_dict", "averaged", "empty ema",
    ],
)  # fmt: skip
def test_weights_are_found(content: dict[str, Any], where: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pth")
    model = build().eval()
    assert load_checkpoint(model, tmp_path / "net.pth") == where
    assert difference(weights(), model.state_dict()) == 0


def test_the_average_or_not(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model": weights(1), "model_ema": weights(2)}, path)
    model = build()
    for averaged, where, seed in ((True, "model_ema", 2), (False, "model", 1), (None, "model_ema", 2)):
        assert load_checkpoint(model, path, averaged=averaged) == where
        assert difference(weights(seed), model.state_dict()) == 0
    torch.save({"model": weights(1)}, path)
    message = refused(lambda: read_checkpoint(path, averaged=True))
    assert message == (
        f"expected a moving average of weights in {path}, found a dict with the keys ['model']: save model.state_dict()"
    )


def test_weights_load_into_a_wrapped_model(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "net.safetensors")
    model = torch.nn.DataParallel(build())
    load_checkpoint(model, tmp_path / "net.safetensors")
    assert difference(weights(), model.module.state_dict()) == 0


def test_layouts_of_repvgg_are_understood(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depths": (1, 1), "widths": (4, 8), "strides": (2, 2), "num_classes": 3}
    first, second = randomise(RepVGG(**sizes)), RepVGG(**sizes)
    names = {"stages.0.0.": "stage0.", "stages.1.0.": "stage1.0.", "dense.conv": "rbr_dense.conv", "head": "linear"}
    names |= {"dense.norm": "rbr_dense.bn", "pointwise.conv": "rbr_1x1.conv", "pointwise.norm": "rbr_1x1.bn"}
    original = {}
    for key, value in first.state_dict().items():
        for here, there in names.items():
            key = key.replace(here, there)
        original[key] = value
    torch.save({"model": original}, tmp_path / "net.pth")
    load_checkpoint(second, tmp_path / "net.pth")
    assert difference(first.state_dict(), second.state_dict()) == 0


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    content = weights()
    del content["2.bias"]
    content |= {"head.weight": torch.zeros(1), "2.weight": torch.zeros(3, C, 1, 1)}
    torch.save(content, tmp_path / "net.pth")
    model = trained(1)
    message = refused(lambda: load_checkpoint(model, tmp_path / "net.pth"))
    assert message == f"""\
the weights in {tmp_path / "net.pth"} do not fit Sequential, nothing was changed
  missing (1):
    2.bias
  unexpected (1):
    head.weight
  wrong shape (1):
    2.weight: expected (12, 6, 1, 1), found (3, 6, 1, 1)"""
    assert difference(weights(1), model.state_dict()) == 0


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(zipped: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "net.pth", tmp_path / "code was run"
    torch.save({"model": weights(), "extra": Bomb(trace)}, path, _use_new_zipfile_serialization=zipped)
    message = refused(lambda: load_checkpoint(build(), path))
    assert message.startswith(f"expected tensors and plain containers in {path}, found pickled code, which was not run")
    assert message.endswith("pass trust_pickle=True (on the command line --trust-pickle)")
    assert not trace.exists()
    model = build()
    with pytest.warns(UserWarning, match="runs whatever code it holds"):
        load_checkpoint(model, path, trust_pickle=True)
    assert trace.exists()
    assert difference(weights(), model.state_dict()) == 0


def test_a_pickled_model_needs_trust(tmp_path: Path) -> None:
    torch.save({"model": trained()}, tmp_path / "net.pt")
    assert "found pickled code" in refused(lambda: load_checkpoint(build(), tmp_path / "net.pt"))
    model = build()
    with pytest.warns(UserWarning, match="unpickling"):
        assert load_checkpoint(model, tmp_path / "net.pt", trust_pickle=True) == "model"
    assert difference(weights(), model.state_dict()) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.pth", None, "expected a checkpoint, found no file at {path}"),
        ("net.pth", b"not a checkpoint", "expected a safetensors file or one that torch.save wrote, found {path}, "),
        ("net.safetensors", b"nothing", "expected a safetensors file, found {path}, which cannot be read: "),
        ("net.pth", [1, 2], "expected weights in {path}, found a value of type list: save model.state_dict()"),
        ("net.pth", {"epoch": 3}, "expected weights in {path}, found a dict with the keys ['epoch']: save "),
    ],
    ids=["absent", "garbage", "garbage safetensors", "list", "no weights"],
)
def test_files_without_weights(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert refused(lambda: load_checkpoint(build(), path)).startswith(message.format(path=path))


# --- deploy checkpoints -----------------------------------------------------------------------------------------------


def saved(tmp_path: Path, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Path]:
    fused = reparam.fuse(model or trained())
    save_deploy(fused, tmp_path / "net.safetensors", **options)
    return fused, tmp_path / "net.safetensors"


def test_a_deploy_checkpoint_comes_back(tmp_path: Path) -> None:
    fused, path = saved(tmp_path)
    loaded = load_deploy(build, path)
    assert not loaded.training
    assert torch.equal(loaded(X), fused(X))
    assert {key: tensor.tolist() for key, tensor in load_file(path).items()} == {
        key: tensor.tolist() for key, tensor in fused.state_dict().items()
    }
    half, path = saved(tmp_path, trained().half())
    assert difference(half.state_dict(), load_deploy(build, path).state_dict()) == 0


def test_what_a_deploy_checkpoint_says(tmp_path: Path) -> None:
    _, path = saved(tmp_path, source="mine:net", metadata={"dataset": "digits"})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header.keys() == {"format", "reparam_version", "source", "plan_hash", "modules", "dataset"}
    assert (header["format"], header["source"], header["dataset"]) == ("reparam-deploy-1", "mine:net", "digits")
    other = saved(tmp_path, trained(1))[1]  # other weights, same plan
    with safe_open(other, framework="pt") as file:
        assert file.metadata()["plan_hash"] == header["plan_hash"]
        assert file.metadata()["source"] == "Sequential"


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(conv(), nn.ReLU(), conv())
        model[2].weight = model[0].weight
        return model

    fused, path = saved(tmp_path, randomise(tied()).eval())
    loaded = load_deploy(tied, path)
    assert torch.equal(loaded(X), fused(X))
    assert loaded[2].weight is loaded[0].weight


def wider() -> nn.Sequential:
    model = build()
    model[2] = nn.Conv2d(C, 3 * C, 1)
    model[3] = nn.BatchNorm2d(3 * C)
    return model


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, source="mine")[1]
    assert refused(lambda: load_deploy(wider, path)) == f"""\
{path} does not fit Sequential as it was built and fused here: it was saved by \
reparam {version()} (here {version()}) from mine
  wrong shape (2):
    2.weight: expected (18, 6, 1, 1), found (12, 6, 1, 1)
    2.bias: expected (18,), found (12,)
  Build the same architecture, and fuse it with the same options."""


def version() -> str:
    from reparam.checkpoints.deploy import _version

    return _version()


def test_the_same_keys_in_another_structure_are_refused(tmp_path: Path) -> None:
    """Only the padding differs, which no tensor shows."""
    path = saved(tmp_path)[1]

    def unpadded() -> nn.Sequential:
        model = build()
        model[2].padding = (1, 1)
        return model

    message = refused(lambda: load_deploy(unpadded, path))
    assert "other modules (1):\n    2: saved Conv2d(6, 12, kernel_size=(1, 1), stride=(1, 1)), here Conv2d(" in message
    assert "padding=(1, 1)" in message


def test_other_options_of_fuse(tmp_path: Path) -> None:
    fuse = partial(reparam.fuse, exclude=("0", "0.*"))
    fused = fuse(trained())
    save_deploy(fused, tmp_path / "net.safetensors")
    assert "0.dense.0.weight" in refused(lambda: load_deploy(build, tmp_path / "net.safetensors"))
    assert torch.equal(load_deploy(build, tmp_path / "net.safetensors", fuse=fuse)(X), fused(X))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm()

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda folder: save_deploy(Stateful(), folder / "net.safetensors"),
            "expected tensors in the state of Stateful, found a dict at _extra_state: a safetensors file holds tensors",
        ),
        (
            lambda folder: save_deploy(nn.Linear(2, 2, device="meta"), folder / "net.safetensors"),
            "expected numbers in Linear, found a meta tensor at weight",
        ),
        (lambda path: load_deploy(build, path / "none"), "expected a deploy checkpoint, found no file at "),
        (lambda path: load_deploy(lambda: 3, saved(path)[1]), "expected build to return an nn.Module, found int"),
    ],
    ids=["extra state", "meta", "absent", "no module"],
)
def test_errors(call: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    assert refused(lambda: call(tmp_path)).startswith(message)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(weights(), path)
    message = refused(lambda: load_deploy(build, path))
    assert message.startswith(f"expected a deploy checkpoint (reparam-deploy-1), found {path} with no such mark: fuse ")
    path.write_bytes(pickle.dumps(3))
    message = refused(lambda: load_deploy(build, path))
    assert message.startswith(f"expected a deploy checkpoint (safetensors), found {path}, which cannot be read: ")


def test_without_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    path = saved(tmp_path)[1]
    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: load_deploy(build, path), lambda: load_checkpoint(build(), path)):
        assert refused(call).endswith("found none: pip install 'reparam[deploy]'")
