"""The training loop, and how a net is tested."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from common import InputError
from demo.images import Loader


def train(
    net: nn.Module,
    loader: Loader,
    test: Loader,
    *,
    epochs: int,
    rate: float,
    shift: int,
    flip: bool,
    seed: int,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train in place with AdamW and a cosine learning rate; returns loss and test accuracy per epoch."""
    history: list[dict[str, float]] = []
    if epochs == 0:
        return history
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    random = torch.Generator().manual_seed(seed)
    with tqdm(total=steps, desc="training", unit="batch") as bar:
        for epoch in range(1, epochs + 1):
            net.train()
            total, seen = 0.0, 0
            for images, labels in loader:
                batch = network_input(augmented(images, shift, flip, random), device)
                loss = functional.cross_entropy(net(batch), labels.to(device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(labels)
                seen += len(labels)
                bar.update()
            if not math.isfinite(total):
                raise InputError(f"the loss is no longer finite in epoch {epoch}; a smaller --lr than {rate} is needed")
            reached = accuracy(*predict(net.eval(), test, device))
            history.append({"epoch": epoch, "loss": total / seen, "accuracy": reached})
            bar.set_postfix(epoch=epoch, loss=f"{total / seen:.3f}", test=f"{reached:.2%}")
    return history


def augmented(
    images: Tensor,  # uint8 (batch, 3, size, size)
    shift: int,
    flip: bool,
    random: torch.Generator,
) -> Tensor:
    """Each image moved by up to `shift` pixels on both axes, its edge repeated, and mirrored half of the time."""
    batch, channels, height, width = images.shape
    moves = torch.randint(-shift, shift + 1, (2, batch, 1), generator=random)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    if flip:
        mirror = torch.rand(batch, 1, generator=random) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
    number, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return images[number, channel, rows[:, None, :, None], columns[:, None, None, :]]


def network_input(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float() / 127.5 - 1  # 0 ... 255 to -1 ... 1


@torch.inference_mode()
def predict(net: nn.Module, loader: Loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (images, classes) and true class numbers (images,), both on the CPU."""
    logits, labels = [], []
    for images, truth in loader:
        logits.append(net(network_input(images, device)).float().cpu())
        labels.append(truth)
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()
