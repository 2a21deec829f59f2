"""The steps of a training, the tests between its epochs, and how it stops and goes on."""

import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import InputError
from training.equivalent_decay import Branches, penalty
from training.images import Data, Loader, network_input
from training.journal import Journal
from training.memory import peak_mib
from training.optimisation import follow
from training.processes import Processes
from training.state import Training, save

WINDOW, EPOCH = 0, 1  # rows of Training.sums


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        epochs: passes over the images.
        smoothing: of the labels.
        ema: decay of the average of the weights.
        precision: that activations are computed in.
        decay: of the equivalent kernels of `branches`.
        branches: groups whose equivalent kernel is decayed; empty for ordinary decay alone.
        channels_last: memory layout of the images.
        log_steps: steps between two rows of the journal.
        checkpoint_steps: steps between two checkpoints; one is written at the end of every epoch besides.
    """

    epochs: int
    smoothing: float
    ema: float
    precision: torch.dtype
    decay: float
    branches: Sequence[Branches]
    channels_last: bool
    log_steps: int
    checkpoint_steps: int


@dataclass(frozen=True)
class Course:
    """Where the traces of a training go.

    Args:
        checkpoint: the file.
        settings: that go into the checkpoint.
        journal: None on all processes but the main one.
    """

    checkpoint: Path
    settings: Mapping[str, Any]
    journal: Journal | None


@dataclass
class StopRequest:
    """Whether this process was asked to end soon."""

    received: bool = field(default=False)


@contextmanager
def stop_on(*signals: signal.Signals) -> Iterator[StopRequest]:
    """Note a signal in place of ending at once, so that nothing is lost."""
    request = StopRequest()

    def note(*_: object) -> None:
        request.received = True

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(training: Training, data: Data, plan: Plan, course: Course, group: Processes) -> bool:
    """Train from `training.step` to the end; returns False if a SIGTERM has stopped it before, after a checkpoint.

    Raises:
        InputError: the loss is no longer finite.
    """
    per_epoch = len(data.batches)
    steps = plan.epochs * per_epoch
    wrapped = parallel(training.net, group)
    started, counted = time.perf_counter(), training.step
    bar = tqdm(total=steps, initial=training.step, desc="training", unit="step", disable=None if group.main else True)
    with bar, stop_on(signal.SIGTERM) as request:
        while training.step < steps:
            epoch, data.batches.start = divmod(training.step, per_epoch)
            data.batches.epoch = epoch
            wrapped.train()
            for images, labels in data.training:
                rate = float(training.schedule.get_last_lr()[0])
                advance(training, wrapped, images, labels, plan, group.device)
                bar.update()
                step, stop = training.step, False
                last = step % per_epoch == 0
                if last or step % plan.log_steps == 0:
                    figures, stop = logged(training, request, group)
                    seconds = time.perf_counter() - started
                    figures["images_per_second"] = figures["images"] / seconds
                    figures["seconds_per_step"] = seconds / (step - counted)
                    figures["peak_mib"] = peak_mib(group.device)
                    started, counted = time.perf_counter(), step
                    bar.set_postfix(epoch=epoch + 1, loss=f"{figures['loss']:.3f}")
                    if course.journal:
                        course.journal.add("steps", step, {"epoch": epoch + 1, "learning_rate": rate, **figures})
                if last:
                    row = {"epoch": epoch + 1, "training_loss": mean_loss(training, EPOCH, group)}
                    row |= tested(training.result, data, plan.smoothing, group)
                    started = time.perf_counter()
                    bar.set_postfix(epoch=epoch + 1, loss=f"{row['training_loss']:.3f}", top1=f"{row['top1']:.2%}")
                    if course.journal:
                        course.journal.add("epochs", step, row)
                if last or stop or step % plan.checkpoint_steps == 0:
                    before = time.perf_counter()
                    save(course.checkpoint, training, course.settings, per_epoch, group)
                    started += time.perf_counter() - before
                if stop and step < steps:
                    return False
    return True


def parallel(net: nn.Module, group: Processes) -> nn.Module:
    if group.count == 1:
        return net
    return DistributedDataParallel(net, device_ids=[group.device] if group.device.type == "cuda" else None)


def advance(
    training: Training,
    wrapped: nn.Module,
    images: Tensor,  # uint8 (batch, 3, size, size)
    labels: Tensor,  # (batch,)
    plan: Plan,
    device: torch.device,
) -> None:
    """One step."""
    batch, labels = network_input(images, device), labels.to(device, non_blocking=True)
    if plan.channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, plan.precision, enabled=plan.precision != torch.float32):
        logits = wrapped(batch)
    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=plan.smoothing)
    whole = loss + plan.decay / 2 * penalty(plan.branches) if plan.branches else loss
    training.optimizer.zero_grad()
    training.scaler.scale(whole).backward()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.schedule.step()
    if training.average is not None:
        follow(training.average, training.net, plan.ema, training.step)
    training.sums[:, 0] += loss.detach() * len(labels)
    training.sums[:, 1] += len(labels)
    training.step += 1


def logged(training: Training, request: StopRequest, group: Processes) -> tuple[dict[str, float], bool]:
    """The figures since the last row, and whether any process was asked to stop."""
    window = training.sums[WINDOW]
    loss, images, stops = group.total(torch.cat([window, window.new_tensor([request.received])])).tolist()
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is no longer finite before step {training.step}; take a smaller --lr, a longer --warm-up-epochs "
            "or --precision bf16"
        )
    window.zero_()
    return {"loss": loss / images, "images": images}, stops > 0


def mean_loss(training: Training, row: int, group: Processes) -> float:
    """The mean loss that a row of the sums holds; the row starts anew."""
    loss, images = group.total(training.sums[row]).tolist()
    training.sums[row].zero_()
    return float(loss / images)


def tested(net: nn.Module, data: Data, smoothing: float, group: Processes) -> dict[str, float]:
    """Loss and share of right answers over the validation images, which the processes divide among themselves."""
    group.share_buffers(net)
    loss, first, five = group.total(counted_right(net.eval(), data.validation, smoothing, group.device)).tolist()
    images = data.validation_images
    return {"validation_loss": loss / images, "top1": first / images, "top5": five / images}


@torch.inference_mode()
def counted_right(net: nn.Module, loader: Loader, smoothing: float, device: torch.device) -> Tensor:
    """(3,): sum of losses, number of images whose first, and one of whose first five answers is right."""
    sums = new_sums(3, device=device)
    for images, truth in loader:
        labels = truth.to(device, non_blocking=True)
        logits = net(network_input(images, device)).float()
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        sums += torch.stack([loss, right[:, 0].sum(), right.sum()])
    return sums


def new_sums(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
