"""Everything that a training is made of, written to one file and read back to the last bit.

The file is complete at every moment: it is written beside the old one and then takes its place.
"""

import os
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from common import InputError
from training.processes import Processes

FORM = 1  # of the file


@dataclass
class Training:
    """A training after `step` steps.

    Args:
        net: being trained, not wrapped.
        average: of its weights; None if none is kept.
        optimizer: with momenta.
        schedule: of the learning rate.
        scaler: of the loss; does nothing unless in fp16.
        sums: (2, 2), since the last row of the journal and since the epoch began: sum of losses, number of images;
            those of this process.
        step: how many steps are done.
    """

    net: nn.Module
    average: AveragedModel | None
    optimizer: SGD
    schedule: LambdaLR
    scaler: GradScaler
    sums: Tensor
    step: int = 0

    @property
    def result(self) -> nn.Module:
        """What is tested and deployed: the average, if there is one."""
        if self.average is None:
            return self.net
        averaged: nn.Module = self.average.module
        return averaged

    @property
    def parts(self) -> dict[str, Any]:
        """All that have a `state_dict`."""
        parts = {
            "net": self.net,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}


def save(path: Path, training: Training, settings: Mapping[str, Any], steps_per_epoch: int, group: Processes) -> None:
    """Write the training; every process has to call this.

    Args:
        path: where process 0 writes.
        training: of this process.
        settings: that a resumed training must share.
        steps_per_epoch: tells the position within the epoch.
        group: all processes, whose random states and sums go in.
    """
    each = group.gathered({"random": random_state(group.device), "sums": training.sums.cpu()})
    if not group.main:
        return
    contents = {
        "form": FORM,
        "settings": dict(settings),
        "step": training.step,
        "epoch": training.step // steps_per_epoch,
        "position": training.step % steps_per_epoch,
        "processes": each,
        **{name: part.state_dict() for name, part in training.parts.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def restore(path: Path, training: Training, settings: Mapping[str, Any], group: Processes) -> None:
    """Read a training into freshly made parts; every process has to call this.

    With another number of processes the data go on in the same order, but random numbers that the net itself draws
    (dropout) start anew, as they belong to a process.

    Raises:
        InputError: the file is no such checkpoint, was written under other settings, or is not the same on all nodes.
    """
    contents = read(path)
    found = contents["settings"]
    other = [
        f"{name}: {found.get(name)!r} in the checkpoint, {value!r} now"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if other:
        raise InputError(
            f"{path} is of a training with other settings; change them back, or --output. " + "; ".join(other)
        )
    steps = group.gathered(contents["step"])
    if len(set(steps)) > 1:
        raise InputError(
            f"{path} holds step {steps} on processes 0 to {group.count - 1}; all nodes must see one folder"
        )
    for name, part in training.parts.items():
        part.load_state_dict(contents[name])
    training.step = contents["step"]
    each = contents["processes"]
    if len(each) == group.count:
        training.sums.copy_(each[group.rank]["sums"])
        set_random_state(each[group.rank]["random"], group.device)
    elif group.main:
        training.sums.copy_(sum(entry["sums"] for entry in each))


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise InputError(f"{path} cannot be read ({reason}); remove it to start anew") from error
    if not isinstance(contents, dict) or contents.get("form") != FORM:
        raise InputError(f"{path} is not a checkpoint of this script; remove it to start anew")
    return contents


def seed_all(seed: int) -> None:
    """Start every generator that a net or a transform might draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a library may draw from this one
    random.seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Of every generator that a net or a transform might draw from, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - a library may draw from this one
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "python": [version, list(words), next_gauss],
        "device": device_generator(device).get_rng_state() if device.type != "cpu" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - as above
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    if state["device"] is not None and device.type != "cpu":
        device_generator(device).set_rng_state(state["device"])


def device_generator(device: torch.device) -> Any:  # torch.cuda or torch.mps, which have one generator per process here
    return torch.get_device_module(device)
