"""`examples/train_imagenet.py --expand`: branches are trained, and the deployed net is that of the net without them."""

import csv
import json
from pathlib import Path

import pytest
import torch
from digit_folder import QUICK, refused, rows, train_imagenet, write_digits
from safetensors.torch import load_file

import reparam
from training import equivalent_decay, images, nets, state
from training.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SHORT = [*QUICK, "--epochs", "2", "--warm-up-epochs", "1", "--batch-size", "64", "--log-steps", "2"]
SHORT += ["--threads", "1", "--lr", "0.02"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def train(digits: Path, output: Path, *options: str) -> int:
    return train_imagenet.main([*SHORT, "--data", str(digits), "--output", str(output), *options])


CASES = {
    "dbb": ("torchvision:shufflenet_v2_x0_5", ["--expand", "dbb", "--export", "pt2"]),
    "repvgg": ("torchvision:shufflenet_v2_x0_5", ["--expand", "repvgg", "--equivalent-decay", "--export"]),
    "as_the_papers_start": ("timm:test_resnet", ["--expand", "acnet", "--no-preserve", "--export", "pt2", "onnx"]),
    "own": ("small", ["--expand", "kxk", "--equivalent-decay", "--export"]),
    "resnet18_dbb": ("torchvision:resnet18", ["--expand", "dbb", "--export", "pt2"]),
    "resnet18_repvgg": ("torchvision:resnet18", ["--expand", "repvgg", "--equivalent-decay", "--export"]),
}
LONG = [pytest.param(case, marks=[pytest.mark.long] * ("resnet18" in case)) for case in CASES]


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_from_the_start_to_the_deployed_net(case: str, digits: Path, tmp_path: Path) -> None:
    arch, options = CASES[case]
    pytest.importorskip("timm" if arch.startswith("timm") else "torchvision")
    assert train(digits, tmp_path, "--arch", arch, *options) == 0
    plain = reparam.fuse(nets.make(arch, 10, 16).eval())
    deployed = load_file(tmp_path / "deploy.safetensors")
    assert {key: value.shape for key, value in deployed.items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    plain.load_state_dict(deployed)
    trained = nets.make(arch, 10, 16, options[1]).eval()
    trained.load_state_dict(load_file(tmp_path / "training.safetensors"))
    x = images.some(images.load(digits, images.Recipe(16), 32, 0, 0, ALONE).validation, 80)
    with torch.no_grad():
        wanted = trained(x)
        assert (plain(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    report = json.loads((tmp_path / "deploy.json").read_text(encoding="utf-8"))
    assert report["expand"] == options[1]
    assert report["parameters"]["fused"] < report["parameters"]["trained"]
    suffixes = {name.rpartition(".")[2] for name in report["differences"]}
    assert suffixes == {"fused", "safetensors", *options[options.index("--export") + 1 :]}
    state.seed_all(0)
    start = nets.make(arch, 10, 16, options[1], "--no-preserve" not in options).state_dict()
    kernels = [key for key, value in start.items() if ".branches." in key and value.ndim > 1]
    assert kernels
    moved = [key for key in kernels if not torch.equal(start[key], trained.state_dict()[key])]
    assert moved == kernels, "branches that were not trained"


@pytest.mark.zoo
def test_branches_change_nothing_at_first_unless_asked_for() -> None:
    pytest.importorskip("timm")
    found = []
    for expand, preserve in ((None, True), ("acnet", True), ("acnet", False)):
        torch.manual_seed(0)
        found.append(nets.make("timm:test_resnet", 10, 16, expand, preserve).eval())
    torch.manual_seed(1)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        plain, kept, anew = (net(x) for net in found)
    assert torch.allclose(plain, kept, atol=1e-4)
    assert not torch.allclose(plain, anew, atol=1e-2)


@pytest.mark.zoo
@pytest.mark.parametrize(("preset", "branches"), [("repvgg", 2), ("acnet", 3), ("mobileone", 5)])
def test_equivalent_decay_finds_the_branches(preset: str, branches: int) -> None:
    """Beside a 3x3 kernel: a 1x1; a 3x1 and a 1x3; three more 3x3 and a 1x1. The identity has no kernel."""
    pytest.importorskip("torchvision")
    net = nets.make("torchvision:resnet18", 10, 16, preset)
    groups = equivalent_decay.branches_of(net)
    assert {len(group.members) for group in groups if group.members[0].conv.kernel_size == (3, 3)} == {branches}


@pytest.mark.zoo
@pytest.mark.slow
def test_resumed_it_is_the_same_training(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    options = ["--arch", "timm:test_resnet", "--expand", "dbb", "--checkpoint-steps", "3", "--export"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(digits, whole, *options) == 0
    advance = train_imagenet.train.__globals__["advance"]

    def failing(training: state.Training, *arguments: object) -> None:
        if training.step == 4:
            raise KeyboardInterrupt
        advance(training, *arguments)

    with monkeypatch.context() as patch:
        patch.setitem(train_imagenet.train.__globals__, "advance", failing)
        with pytest.raises(KeyboardInterrupt):
            train(digits, cut, *options)
    assert state.read(cut / "last.pt")["step"] == 3
    torch.manual_seed(12345)
    assert train(digits, cut, *options, "--resume") == 0
    for name in ("training.safetensors", "deploy.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert rows(whole / "epochs.csv") == rows(cut / "epochs.csv")


@pytest.mark.zoo
def test_what_a_step_costs_is_logged(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = ["--arch", "timm:test_resnet", "--expand", "acnet", "--epochs", "1", "--warm-up-epochs", "0", "--export"]
    assert train(digits, tmp_path, *options) == 0
    with (tmp_path / "steps.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [int(row["step"]) for row in found] == [2, 4, 5]
    for row in found:
        seconds = float(row["seconds_per_step"])
        assert seconds > 0
        assert float(row["images_per_second"]) == pytest.approx(64 / seconds)
        assert 50 < float(row["peak_mib"]) < 100_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--expand", "repvg"], "--expand repvg: expected a branch ('1x1', "),
        (["--expand", "dilated"], "--expand dilated: expected a convolution that dilated can expand, found none among"),
        (["--no-preserve"], "--no-preserve is about the branches of --expand, which is not given"),
    ],
)
def test_what_cannot_be_done_is_explained(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    small = ["--arch", "small", "--image-size", "16", "--batch-size", "32"]
    assert expected in refused(capsys, *small, "--data", str(digits), "--output", str(tmp_path), *options)
