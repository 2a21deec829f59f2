"""The example runs end to end on few images, says what is wrong with its input, and measures what it claims."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import reparam

pytest.importorskip("PIL", reason="needs the extra 'examples'")
pytest.importorskip("matplotlib", reason="needs the extra 'examples'")
pytest.importorskip("mlxtend", reason="needs the extra 'examples'")
pytest.importorskip("tqdm", reason="needs the extra 'examples'")
from PIL import Image

from common import build
from demo.comparison import paired_timing
from demo.images import folder
from demo.memory import peak_activation_bytes
from demo.training import augmented

SCRIPT = Path(__file__).parents[1] / "examples" / "repvgg.py"
QUICK = ["--device", "cpu", "--rounds", "2"]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("example_repvgg", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    deterministic = torch.backends.cudnn.deterministic
    yield module
    torch.backends.cudnn.deterministic = deterministic
    del sys.modules[spec.name]


def figures(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "repvgg.json").read_text(encoding="utf-8"))
    return loaded


def drawn_classes(folder: Path, classes: dict[str, int], number: int) -> None:
    """Noise about one gray level per class, as PNG files of 20×24 pixels."""
    random = np.random.default_rng(0)
    for name, level in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(number):
            noisy = (level + random.integers(-40, 40, (20, 24))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{index}.png")


def refused(example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        example.main([*QUICK, *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def output(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on 1,000 digits wrote."""
    folder = tmp_path_factory.mktemp("digits")
    arguments = ["--limit", "1000", "--epochs", "3", "--batch-size", "20", "--output", str(folder)]
    assert example.main([*QUICK, *arguments]) == 0
    return folder


class TestDigits:
    def test_fusing_changes_no_prediction(self, output: Path) -> None:
        found = figures(output)
        assert found["predictions_changed"] == 0
        assert found["before"]["accuracy"] == found["after"]["accuracy"]
        assert found["largest_difference"] < 1e-5 * found["largest_logit"]

    def test_training_is_real(self, output: Path) -> None:
        found = figures(output)
        assert found["data"]["train"] > 790
        assert found["after"]["accuracy"] > 0.5  # chance: 0.1
        assert [entry["epoch"] for entry in found["history"]] == [1, 2, 3]

    def test_one_convolution_per_block_is_left(self, output: Path) -> None:
        before, after = figures(output)["before"], figures(output)["after"]
        blocks = 1 + 2 + 4 + 1
        assert (before["convolutions"], after["convolutions"]) == (2 * blocks, blocks)
        assert after["norms"] == 0 < before["norms"]
        assert after["parameters"] < before["parameters"]
        assert after["multiply_adds"] < before["multiply_adds"]
        assert after["peak_activations"] < before["peak_activations"]

    def test_deploy_checkpoint_gives_the_same_net(self, output: Path) -> None:
        assert figures(output)["reloaded"] == {
            "accuracy": figures(output)["after"]["accuracy"],
            "largest_difference": 0,
        }
        weights = load_file(output / "deploy.safetensors")
        fused = reparam.fuse(build("small", 10).eval())
        assert weights.keys() == fused.state_dict().keys()

    def test_checkpoints_say_what_they_are(self, output: Path) -> None:
        with safe_open(output / "training.safetensors", "pt") as file:
            about = json.loads(file.metadata()["about"])
        assert about == {"arch": "small", "classes": list("0123456789"), "image_size": 28}

    def test_picture_is_drawn(self, output: Path) -> None:
        with Image.open(output / "repvgg.png") as picture:
            picture.load()
            assert picture.width > picture.height > 300

    def test_training_checkpoint_can_be_fused_without_training(
        self, output: Path, example: ModuleType, tmp_path: Path
    ) -> None:
        weights = str(output / "training.safetensors")
        arguments = ["--weights", weights, "--epochs", "0", "--limit", "1000", "--output", str(tmp_path)]
        assert example.main([*QUICK, *arguments]) == 0
        assert figures(tmp_path)["before"]["accuracy"] == figures(output)["before"]["accuracy"]


def test_same_seed_gives_the_same_net(example: ModuleType, tmp_path: Path) -> None:
    drawn_classes(tmp_path / "photos", {"dark": 60, "light": 200}, number=20)
    arguments = ["--data", str(tmp_path / "photos"), "--image-size", "16", "--epochs", "1", "--batch-size", "8"]
    written = []
    for run, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(run)
        assert example.main([*QUICK, *arguments, "--seed", str(seed), "--output", str(folder)]) == 0
        written.append((folder / "deploy.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


class TestFolder:
    def test_own_images(self, example: ModuleType, tmp_path: Path) -> None:
        drawn_classes(tmp_path / "photos", {"dark": 60, "light": 200}, number=20)
        report = tmp_path / "deeper" / "figures.json"
        arguments = ["--data", str(tmp_path / "photos"), "--image-size", "16", "--epochs", "1", "--batch-size", "8"]
        assert example.main([*QUICK, *arguments, "--flip", "--output", str(tmp_path), "--json", str(report)]) == 0
        found = json.loads(report.read_text(encoding="utf-8"))
        assert found["data"] == {"name": "photos", "classes": 2, "size": 16, "train": 32, "test": 8}
        assert found["predictions_changed"] == 0

    def test_given_split(self, tmp_path: Path) -> None:
        drawn_classes(tmp_path / "train", {"dark": 60, "light": 200}, number=6)
        drawn_classes(tmp_path / "val", {"dark": 60, "light": 200}, number=2)
        data = folder(tmp_path, size=8, limit=None, test_fraction=0.5, seed=0)
        assert (len(data.train), len(data.test)) == (12, 4)
        image, label = data.test[3]
        assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.uint8, 1)

    def test_splits_with_other_classes_are_refused(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn_classes(tmp_path / "train", {"dark": 60, "light": 200}, number=1)
        drawn_classes(tmp_path / "test", {"dark": 60, "pale": 200}, number=1)
        assert "need the same classes; only one of them has light or pale" in refused(
            example, capsys, "--data", str(tmp_path)
        )

    def test_folder_without_classes_is_refused(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn_classes(tmp_path, {"only": 60}, number=2)
        (tmp_path / "only" / "1.png").rename(tmp_path / "loose.png")
        message = refused(example, capsys, "--data", str(tmp_path))
        assert "1 folders with images (and 1 images outside them); at least two are needed, one per class" in message

    def test_missing_folder_is_refused(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "is not a folder; --data takes" in refused(example, capsys, "--data", str(tmp_path / "none"))

    def test_too_few_images_are_refused(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn_classes(tmp_path, {"dark": 60, "light": 200}, number=1)
        assert "leave 2 to train on and 0 to test on" in refused(example, capsys, "--data", str(tmp_path))

    def test_broken_image_is_named(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn_classes(tmp_path, {"dark": 60, "light": 200}, number=5)
        broken = tmp_path / "dark" / "3.png"
        broken.write_bytes(b"no image")
        assert f"{broken} is not a readable image" in refused(
            example, capsys, "--data", str(tmp_path), "--output", str(tmp_path / "out")
        )


class TestOptions:
    def test_near_architectures_are_named(self, example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        message = refused(example, capsys, "--arch", "RepVGG-A0")
        assert "nothing is called 'RepVGG-A0'" in message
        assert "repvgg_a0" in message

    def test_unknown_architecture_lists_all(self, example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        assert "small, repvgg_a0, repvgg_a1" in refused(example, capsys, "--arch", "xyz")

    def test_every_factory_can_be_named(self) -> None:
        with torch.device("meta"):
            net = build("repvgg_b1g4", 7)
        assert net.head.out_features == 7

    @pytest.mark.parametrize(
        ("option", "value", "expected"),
        [
            ("--device", "nonsense", "--device nonsense cannot be used here"),
            ("--weights", "none.safetensors", "is not a file; a training checkpoint is needed"),
            ("--epochs", "-1", "expected a whole number of at least 0"),
            ("--test-fraction", "1.5", "expected a number between 0 and 1"),
        ],
    )
    def test_bad_values_are_explained(
        self, example: ModuleType, capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
    ) -> None:
        assert expected in refused(example, capsys, "--limit", "50", option, value)

    def test_weights_of_another_net_are_refused(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pth")
        message = refused(example, capsys, "--limit", "50", "--weights", str(tmp_path / "other.pth"))
        assert "the weights do not fit" in message


class Branches(nn.Module):
    """The sum of `count` convolutions, all of whose results are alive before they are added."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class TestActivationMemory:
    """One activation of the nets below has 2 · 5 · 5 numbers of 4 bytes."""

    batch = torch.zeros(1, 2, 5, 5)
    one = 2 * 5 * 5 * 4

    def test_freed_activations_leave(self) -> None:
        # While a layer runs, its input and its output are alive; the batch itself does not count.
        chain = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(5)))
        assert peak_activation_bytes(chain, self.batch) == 2 * self.one
        assert peak_activation_bytes(chain[:1], self.batch) == self.one

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_parallel_branches_stay(self, count: int) -> None:
        # All branches, and the stack of them; when the list is gone, the stack and the sum are less than that.
        assert peak_activation_bytes(Branches(count), self.batch) == 2 * count * self.one

    def test_in_place_results_and_views_count_once(self) -> None:
        net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Unflatten(1, (2, 5, 5)))
        assert peak_activation_bytes(net, self.batch) == self.one

    def test_parameters_do_not_count(self) -> None:
        # The linear layer's weight is transposed, which gives a view of a storage that was there before.
        assert peak_activation_bytes(nn.Linear(50, 3), torch.zeros(1, 50)) == 3 * 4


def test_paired_timing_measures_both() -> None:
    short, long = nn.Identity(), nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(10)))
    timing = paired_timing(long, short, torch.zeros(4, 8, 32, 32), rounds=5)
    assert timing.before > timing.after > 0
    assert timing.speedup > 2


def test_shifts_repeat_the_edge() -> None:
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    assert torch.equal(augmented(images, 0, False, torch.Generator()), images)
    moved = augmented(images, 1, False, torch.Generator().manual_seed(1))
    padded = nn.functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    for image, wide in zip(moved, padded, strict=True):
        crops = [wide[:, top : top + 4, left : left + 4] for top in range(3) for left in range(3)]
        assert any(torch.equal(image, crop) for crop in crops)
