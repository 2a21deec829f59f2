"""What the tests of `examples/train_imagenet.py` share: real images in a folder, and how its files are compared."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

NEEDS = "needs the extras 'train' and 'examples'"
Image = pytest.importorskip("PIL.Image", reason=NEEDS)
datasets = pytest.importorskip("sklearn.datasets", reason=NEEDS)
train_imagenet = pytest.importorskip("train_imagenet", reason=NEEDS)

QUICK = ["--device", "cpu", "--workers", "0", "--image-size", "16", "--crop-area", "0.7", "--no-flip", "--ema", "0.9"]
MEASURED = {"images_per_second", "seconds_per_step", "peak_mib"}
SMALL = [*QUICK, "--arch", "small", "--log-steps", "1"]


def write_digits(folder: Path) -> Path:
    """400 of the 8×8 digits that scikit-learn carries: 320 to train on, 80 to test on."""
    data = datasets.load_digits()
    for number, (image, label) in enumerate(zip(data.images[:400], data.target[:400], strict=True)):
        path = folder / ("train" if number % 5 else "val") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype("uint8")).save(path)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    """Without speed and memory, which are never the same."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: text for key, text in row.items() if key not in MEASURED} for row in csv.DictReader(file)]


def same_weights(first: Path, second: Path, name: str = "training.safetensors") -> bool:
    one, other = load_file(first / name), load_file(second / name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_imagenet.main(["--device", "cpu", "--workers", "0", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err
