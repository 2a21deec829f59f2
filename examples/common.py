"""What the examples have in common: nets, devices and machines by name, saved weights, options that explain."""

import argparse
import difflib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from reparam import models

FACTORIES = {factory.__name__: factory for factory in models.VARIANTS}
TOLERANCE = 1e-4  # largest logit difference over largest logit: float32 rounding stays well below it


class InputError(ValueError):
    """Something that the user asked for cannot be done; the message says what would work."""


def build(arch: str, classes: int) -> models.RepVGG:
    """A net in training form: `small`, for small images, or any factory of `reparam.models`, for large ones."""
    if arch == "small":
        return models.RepVGG(depths=(1, 2, 4, 1), widths=(16, 32, 64, 128), strides=(1, 2, 2, 2), num_classes=classes)
    return FACTORIES[arch](num_classes=classes)


def save(net: nn.Module, path: Path, about: dict[str, Any]) -> None:
    # One entry of metadata, because safetensors writes several in random order.
    save_file(
        {key: value.cpu().contiguous() for key, value in net.state_dict().items()}, path, {"about": json.dumps(about)}
    )


def architecture(name: str) -> str:
    names = ["small", *FACTORIES]
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        raise argparse.ArgumentTypeError(f"nothing is called {name!r}; {listing(near or names)} would work")
    return name


def counted(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole_number


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def chosen_device(name: str) -> torch.device:
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def listing(words: Sequence[str]) -> str:
    shown = [*words[:20], *(["…"] if len(words) > 20 else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"
