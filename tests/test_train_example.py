"""`examples/train_imagenet.py`, killed and resumed, loses nothing; what it cannot do, it explains."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digit_folder import NEEDS, QUICK, SMALL, refused, rows, same_weights, train_imagenet, write_digits

from training import nets, state

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_imagenet.py"
EXPANDED = ["--arch", "timm:test_resnet", "--expand", "acnet"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests of dictionaries, lists and tensors are not equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [found for key in one for found in differing(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        return [found for at, value in enumerate(one) for found in differing(value, other[at], f"{path}.{at}")]
    return [] if one == other else [path]


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """torchrun, if it still runs, and the processes that it has started, which would outlive it."""
    if process.poll() is not None:
        return
    table = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in table.splitlines()]
    for pid in (process.pid, *(int(child) for parent, child in pairs if int(parent) == process.pid)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
class TestKilled:
    """Two processes, killed between two checkpoints, against the same training left in peace."""

    epochs, per_epoch, checkpoint_steps, killed_after = 4, 10, 4, 14

    def command(self, digits: Path, output: Path, *more: str) -> list[str]:
        lengths = ["--epochs", str(self.epochs), "--warm-up-epochs", "1", "--batch-size", "32"]
        places = ["--data", str(digits), "--output", str(output), "--checkpoint-steps", str(self.checkpoint_steps)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return [*launcher, str(SCRIPT), *SMALL, *lengths, *places, "--export", *more]

    @contextmanager
    def started(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
            try:
                yield process
            finally:
                kill_with_children(process)

    def finish(self, command: list[str]) -> None:
        with self.started(command) as process:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output

    def kill(self, command: list[str], steps: Path) -> None:
        """Without a warning, as soon as enough steps are written."""
        with self.started(command) as process:
            while not (steps.exists() and steps.read_text().count("\n") > self.killed_after):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)

    @pytest.mark.parametrize("net", [[], EXPANDED], ids=["plain", "expanded"])
    def test_resumed_it_is_the_same_training(self, net: list[str], digits: Path, tmp_path: Path) -> None:
        if net:
            pytest.importorskip("timm")
        peaceful, killed = tmp_path / "peaceful", tmp_path / "killed"
        self.finish(self.command(digits, peaceful, *net))
        self.kill(self.command(digits, killed, *net), killed / "steps.csv")

        reached = len(rows(killed / "steps.csv"))
        saved = state.read(killed / "last.pt")
        assert self.killed_after <= reached < self.epochs * self.per_epoch
        assert 0 < saved["step"] <= reached
        assert (saved["epoch"], saved["position"]) == divmod(saved["step"], self.per_epoch)
        assert not (killed / "deploy.safetensors").exists()

        self.finish(self.command(digits, killed, *net, "--resume"))
        # Every step has the loss of the same images under the same weights, and is there once.
        assert rows(killed / "steps.csv") == rows(peaceful / "steps.csv")
        assert [int(row["step"]) for row in rows(killed / "steps.csv")] == [*range(1, self.epochs * self.per_epoch + 1)]
        assert rows(killed / "epochs.csv") == rows(peaceful / "epochs.csv")
        # Weights, averages, momenta, schedule, random states of both processes: all bits.
        whole = [state.read(folder / "last.pt") for folder in (peaceful, killed)]
        assert differing(*whole) == []
        assert whole[0]["step"] == self.epochs * self.per_epoch
        assert len(whole[0]["processes"]) == 2
        assert same_weights(peaceful, killed)
        assert same_weights(peaceful, killed, "deploy.safetensors")


@pytest.mark.slow
class TestStopped:
    """One process of its own, a net with dropout, that sends itself SIGTERM between two steps."""

    options = (*QUICK, "--arch", "torchvision:mobilenet_v3_small", "--epochs", "1", "--warm-up-epochs", "0", "--export")
    stopped_after = """
import signal, sys
import train_imagenet
from training import loop
advance = loop.advance
def disturbed(training, *arguments):
    advance(training, *arguments)
    if training.step == 3:
        signal.raise_signal(signal.SIGTERM)
loop.advance = disturbed
sys.exit(train_imagenet.main(sys.argv[1:]))
"""

    def run(
        self, digits: Path, output: Path, *more: str, disturbed: bool = False
    ) -> "subprocess.CompletedProcess[str]":
        program = ["-c", self.stopped_after] if disturbed else [str(SCRIPT)]
        options = [*self.options, "--batch-size", "40", "--log-steps", "2", "--data", str(digits)]
        command = [sys.executable, *program, *options, "--output", str(output), *more]
        path = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=600)

    def test_sigterm_saves_and_resuming_loses_nothing(self, digits: Path, tmp_path: Path) -> None:
        peaceful = self.run(digits, tmp_path / "peaceful")
        assert peaceful.returncode == 0, peaceful.stderr
        stopped = self.run(digits, tmp_path / "stopped", disturbed=True)
        assert stopped.returncode == train_imagenet.STOPPED, stopped.stderr
        assert "stopped after step 4; --resume goes on from" in stopped.stderr
        assert state.read(tmp_path / "stopped" / "last.pt")["step"] == 4
        resumed = self.run(digits, tmp_path / "stopped", "--resume")
        assert resumed.returncode == 0, resumed.stderr
        contents = [state.read(tmp_path / name / "last.pt") for name in ("peaceful", "stopped")]
        assert differing(*contents) == []
        assert same_weights(tmp_path / "peaceful", tmp_path / "stopped")
        assert rows(tmp_path / "peaceful" / "steps.csv") == rows(tmp_path / "stopped" / "steps.csv")


def test_bfloat16_and_tensorboard(digits: Path, tmp_path: Path) -> None:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=NEEDS)
    options = [*SMALL, "--precision", "bf16", "--epochs", "1", "--warm-up-epochs", "0", "--batch-size", "64"]
    options += ["--export", "--tensorboard", "--ema", "0", "--data", str(digits), "--output", str(tmp_path)]
    assert train_imagenet.main(options) == 0
    contents = state.read(tmp_path / "last.pt")
    assert "average" not in contents
    assert contents["scaler"] == {}
    assert {value.dtype for value in contents["net"].values()} == {torch.float32, torch.int64}
    written = board.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(str(event.step), pytest.approx(event.value)) for event in written.Scalars("steps/loss")]
    assert [(row["step"], float(row["loss"])) for row in rows(tmp_path / "steps.csv")] == losses


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--arch", "repvgg_a9"], "nothing is called 'repvgg_a9'; repvgg_a"),
        (["--arch", "torchvision:resnet19"], "nothing is called 'resnet19'; resnet1"),
        (["--arch", "keras:resnet50"], "expected NAME, timm:NAME or torchvision:NAME"),
        (["--arch", "torchvision:fcn_resnet50", "--image-size", "32"], "nothing is called 'fcn_resnet50'"),
        (["--batch-size", "321"], "320 images to train on do not fill one batch; at most --batch-size 320 works"),
        (["--epochs", "3", "--warm-up-epochs", "3"], "--warm-up-epochs 3 leaves nothing of --epochs 3"),
        (["--ema", "1"], "need numbers below 1"),
        (["--lr", "-1"], "expected a number of at least 0, got '-1'"),
        (
            ["--lr", "1e30", "--epochs", "1", "--warm-up-epochs", "0", "--log-steps", "1"],
            "the loss is no longer finite",
        ),
        (["--arch", "torchvision:squeezenet1_1", "--image-size", "32", "--equivalent-decay"], "no parallel branches"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    ],
)
def test_what_cannot_be_done_is_explained(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    small = ["--arch", "small", "--image-size", "16", "--batch-size", "32"]
    assert expected in refused(capsys, *small, "--data", str(digits), "--output", str(tmp_path), *options)


def test_expand_needs_a_version_that_has_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nets, "reparam", SimpleNamespace())
    options = ["--arch", "small", "--expand", "acnet", "--batch-size", "32", "--output", str(tmp_path)]
    message = refused(capsys, "--data", str(digits), *options)
    assert "--expand acnet: this version of reparam has no reparam.expand; install a later one" in message


def test_commands_of_the_documentation_are_understood() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    .*examples/train_imagenet\.py(.*)", page + train_imagenet.__doc__, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        _, args = train_imagenet.options(shlex.split(command))
        assert args.data == Path("imagenet")
