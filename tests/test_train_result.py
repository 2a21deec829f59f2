"""What `examples/train_imagenet.py` writes when a training goes to its end."""

import json
from pathlib import Path

import pytest
import torch
from digit_folder import SMALL, refused, rows, train_imagenet, write_digits
from safetensors import safe_open
from safetensors.torch import load_file

import reparam
from common import build
from training import images, state
from training.optimisation import average_of
from training.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def output(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result")
    lengths = ["--epochs", "12", "--warm-up-epochs", "1", "--batch-size", "32", "--equivalent-decay"]
    assert train_imagenet.main([*SMALL, *lengths, "--data", str(digits), "--output", str(folder)]) == 0
    return folder


def test_training_is_real(output: Path) -> None:
    course = rows(output / "epochs.csv")
    assert len(course) == 12
    assert float(course[-1]["top1"]) > 0.8  # chance: 0.1
    assert float(course[-1]["top5"]) >= float(course[-1]["top1"])
    assert float(course[-1]["training_loss"]) < float(course[0]["training_loss"])


def test_rate_warms_up_and_goes_down(output: Path) -> None:
    rates = [float(row["learning_rate"]) for row in rows(output / "steps.csv")]
    assert rates[:10] == pytest.approx([0.01 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-4


def test_average_of_the_checkpoint_is_what_was_saved(output: Path) -> None:
    contents, saved = state.read(output / "last.pt"), load_file(output / "training.safetensors")
    average = average_of(build("small", 10))
    average.load_state_dict(contents["average"])
    assert int(average.n_averaged) == contents["step"]
    assert all(torch.equal(value, saved[key]) for key, value in average.module.state_dict().items())
    assert not torch.equal(contents["net"]["head.weight"], saved["head.weight"])


def test_every_deployed_form_predicts_the_same(output: Path, digits: Path) -> None:
    """On all validation images, read again from the files alone."""
    trained, deployed = build("small", 10), reparam.fuse(build("small", 10).eval())
    trained.load_state_dict(load_file(output / "training.safetensors"))
    deployed.load_state_dict(load_file(output / "deploy.safetensors"))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in deployed.modules())
    data = images.load(digits, images.Recipe(16), 32, 0, 0, ALONE)
    x = images.some(data.validation, 80)
    labels = torch.tensor(data.validation.dataset.dataset.targets)
    with torch.no_grad():
        wanted = trained.eval()(x)
        found = {"deploy.safetensors": deployed(x)}
        found["deploy.pt2"] = torch.export.load(output / "deploy.pt2").module()(x)
    session = pytest.importorskip("onnxruntime").InferenceSession(output / "deploy.onnx")
    found["deploy.onnx"] = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    for name, logits in found.items():
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max(), name
        assert torch.equal(logits.argmax(1), wanted.argmax(1)), name
    accuracy = (wanted.argmax(1) == labels).double().mean()
    assert float(rows(output / "epochs.csv")[-1]["top1"]) == pytest.approx(float(accuracy))


def test_files_say_what_they_are(output: Path) -> None:
    with safe_open(output / "deploy.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    report = json.loads((output / "deploy.json").read_text(encoding="utf-8"))
    assert (about["arch"], about["classes"], about["image_size"]) == ("small", list("0123456789"), 16)
    assert report["predictions_changed"] == 0
    assert {"fused", "deploy.safetensors", "deploy.pt2"} <= report["differences"].keys()
    assert report["parameters"]["fused"] < report["parameters"]["trained"]


def test_another_training_does_not_overwrite_it(output: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--data", str(digits), "--output", str(output), "--arch", "small")
    assert "last.pt is of another training: go on with --resume, or take another --output" in message


def test_other_settings_do_not_resume_it(output: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--epochs", "12", "--warm-up-epochs", "1", "--batch-size", "32", "--lr", "0.2", "--resume"]
    message = refused(capsys, *options, "--data", str(digits), "--output", str(output))
    assert "lr: 0.1 in the checkpoint, 0.2 now" in message
    assert "equivalent_decay: True in the checkpoint, False now" in message
    assert "epochs" not in message.partition("take another --output. ")[2]
