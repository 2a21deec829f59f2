"""What the training example writes and reads again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digit_folder import rows
from torch import nn

from common import InputError
from training import optimisation, state
from training.journal import Journal
from training.loop import new_sums
from training.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


class TestState:
    def training(self) -> state.Training:
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        schedule = optimisation.cosine(optimizer, 1, 9)
        return state.Training(net, None, optimizer, schedule, scaler, new_sums(2, 2, device=CPU))

    def test_scale_of_the_loss_and_random_states_come_back(self, tmp_path: Path) -> None:
        training = self.training()
        for _ in range(3):
            training.scaler.scale(training.net(torch.ones(1, 2)).sum()).backward()
            training.scaler.step(training.optimizer)
            training.scaler.update()
            training.schedule.step()
        training.step = 3
        assert training.scaler.get_scale() == 16
        state.save(tmp_path / "last.pt", training, {"seed": 1}, 2, ALONE)
        drawn = (torch.rand(3).tolist(), np.random.rand(), state.random.random())  # noqa: NPY002 - is restored
        other = self.training()
        state.restore(tmp_path / "last.pt", other, {"seed": 1}, ALONE)
        assert (torch.rand(3).tolist(), np.random.rand(), state.random.random()) == drawn  # noqa: NPY002
        assert (other.step, other.scaler.get_scale()) == (3, 16)
        assert other.schedule.get_last_lr() == training.schedule.get_last_lr()
        momenta = [t.optimizer.state_dict()["state"][0]["momentum_buffer"] for t in (training, other)]
        assert torch.equal(*momenta)

    def test_another_number_of_processes_keeps_the_sums(self, tmp_path: Path) -> None:
        training = self.training()
        training.sums += 2
        state.save(tmp_path / "last.pt", training, {}, 1, ALONE)
        contents = state.read(tmp_path / "last.pt")
        contents["processes"] *= 3
        torch.save(contents, tmp_path / "last.pt")
        resumed = self.training()
        state.restore(tmp_path / "last.pt", resumed, {}, ALONE)
        assert resumed.sums.tolist() == [[6, 6], [6, 6]]

    @pytest.mark.parametrize(
        ("contents", "message"), [(b"", "cannot be read"), (b"PK\3\4", "cannot be read"), (None, "is not a checkpoint")]
    )
    def test_files_of_other_kinds_are_refused(self, tmp_path: Path, contents: bytes | None, message: str) -> None:
        path = tmp_path / "last.pt"
        torch.save({"net": {}}, path) if contents is None else path.write_bytes(contents)
        with pytest.raises(InputError, match=f"{message}.*; remove it to start anew"):
            state.read(path)


def test_a_resumed_journal_repeats_no_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        journal.add("steps", step, {"loss": step / 2})
    journal.add("epochs", 5, {"top1": 1})
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("6")  # killed while it was written
    journal = Journal(tmp_path, 3, tensorboard=False)
    journal.add("steps", 4, {"loss": 7})
    assert rows(tmp_path / "steps.csv") == [
        {"step": str(step), "loss": str(loss)} for step, loss in ((1, 0.5), (2, 1.0), (3, 1.5), (4, 7))
    ]
    assert not (tmp_path / "epochs.csv").exists()


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"--tensorboard needs TensorBoard .*pip install 'reparam\[train\]'"):
        Journal(tmp_path, 0, tensorboard=True)
