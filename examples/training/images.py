"""Images by folder, in an order that any process can find again.

The order of an epoch and the random crop of every image follow from the seed, the epoch and the number of the image
alone. So they are the same for any number of processes and of workers, and a training that stops after any step goes on
with the batch that would have come next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from common import InputError, listing
from training.processes import Processes

# Means and standard deviations of red, green and blue, as fractions of the largest value, over ImageNet's images.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHOWN = 0.875  # of the shorter side of a validation image is inside the centre crop
AUTO_AUGMENT: dict[str, type[v2.Transform]] = {
    "autoaugment": v2.AutoAugment,
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}

Drawn = tuple[int, int]  # number of an image, and the seed of its random transform
Sample = tuple[Tensor, int]  # uint8 image (3, size, size), class number
Loader = DataLoader[Sample]  # yields uint8 images (batch, 3, size, size) and class numbers (batch,)


@dataclass(frozen=True)
class Recipe:
    """How training images are varied.

    Args:
        size: height and width of what the net sees, pixels.
        crop_area: smallest share of an image's area that a random crop may show.
        flip: whether half of the images are mirrored.
        auto_augment: a key of `AUTO_AUGMENT`, or None.
    """

    size: int
    crop_area: float = 0.08
    flip: bool = True
    auto_augment: str | None = None

    def training(self) -> v2.Transform:
        """Random crops, scaled to the size."""
        steps: list[v2.Transform] = [v2.RandomResizedCrop(self.size, (self.crop_area, 1.0), antialias=True)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.auto_augment:
            steps.append(AUTO_AUGMENT[self.auto_augment]())
        return v2.Compose([*steps, v2.PILToTensor()])

    def validation(self) -> v2.Transform:
        """The whole image but for its border."""
        wide = v2.Resize(round(self.size / SHOWN), antialias=True)
        return v2.Compose([wide, v2.CenterCrop(self.size), v2.PILToTensor()])


class Repeatable(Dataset[Sample]):
    """Images whose random transform depends on a seed that comes with the number of the image."""

    def __init__(self, folder: ImageFolder, transform: v2.Transform) -> None:
        self.folder = folder
        self.transform = transform

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, drawn: Drawn) -> Sample:
        index, seed = drawn
        image, label = self.folder[index]
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices, too
        try:
            return self.transform(image), label
        finally:
            torch.set_rng_state(state)


class Batches(Sampler[list[Drawn]]):
    """The batches of one process in one epoch, from any position on.

    Every epoch is a new permutation of all images, cut into global batches; a rest that fills no batch is left out.
    Each process takes its own slice of every global batch.

    Args:
        images: how many there are.
        batch: images in a global batch, a multiple of the number of processes.
        seed: of the permutations and the transforms.
        processes: whose rank picks the slice.

    Attributes:
        epoch: that is drawn next.
        start: batches of that epoch which are done already.
    """

    def __init__(self, images: int, batch: int, seed: int, processes: Processes) -> None:
        if batch % processes.count:
            raise InputError(
                f"--batch-size {batch} counts the images of all {processes.count} processes together and must be a "
                f"multiple of {processes.count}"
            )
        if batch > images:
            raise InputError(f"{images} images to train on do not fill one batch; at most --batch-size {images} works")
        self.images, self.batch, self.seed = images, batch, seed
        self.each = batch // processes.count
        self.first = processes.rank * self.each
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.images // self.batch

    def __iter__(self) -> Iterator[list[Drawn]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        epoch, start = self.epoch, self.start
        for position in range(start, len(self)):
            begin = position * self.batch + self.first
            yield [(int(index), self._seed(epoch, int(index))) for index in order[begin : begin + self.each]]

    def _seed(self, epoch: int, index: int) -> int:
        return int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Data:
    """Where the images of one process come from."""

    classes: tuple[str, ...]
    batches: Batches  # those of `training`
    training: Loader
    validation: Loader
    validation_images: int  # of all processes


def load(path: Path, recipe: Recipe, batch: int, seed: int, workers: int, processes: Processes) -> Data:
    """The images of `path/train/class/` and `path/val/class/`.

    Raises:
        InputError: a folder is missing or empty, the two do not have the same classes, or there are too few images.
    """
    train, held_out = images_of(path, "train"), images_of(path, "val")
    if train.classes != held_out.classes:
        odd = sorted(set(train.classes) ^ set(held_out.classes))
        raise InputError(f"{path / 'train'} and {path / 'val'} need the same classes; only one has {listing(odd)}")
    held_out.transform = recipe.validation()
    batches = Batches(len(train), batch, seed, processes)
    own = Subset(held_out, range(processes.rank, len(held_out), processes.count))
    # Generators of their own: a loader draws from its generator whenever it starts, which a resumed training does
    # more often.
    alike: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": processes.device.type == "cuda",
    }
    return Data(
        classes=tuple(train.classes),
        batches=batches,
        training=DataLoader(
            Repeatable(train, recipe.training()), batch_sampler=batches, generator=torch.Generator(), **alike
        ),
        validation=DataLoader(own, batches.each, generator=torch.Generator(), **alike),
        validation_images=len(held_out),
    )


def images_of(path: Path, part: str) -> ImageFolder:
    if not (path / part).is_dir():
        raise InputError(
            f"{path / part} is not a folder; --data takes a folder that holds train/CLASS/IMAGE.jpg and "
            "val/CLASS/IMAGE.jpg"
        )
    try:
        return ImageFolder(str(path / part), loader=opened)
    except FileNotFoundError as error:
        raise InputError(f"{path / part}: {error}; every class needs images") from error


def opened(path: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except OSError as error:
        raise InputError(f"{path} is not a readable image ({error}); repair or remove it") from error


def network_input(images: Tensor, device: torch.device) -> Tensor:
    """Images as the net sees them: uint8 (batch, 3, size, size) to float32, means 0 and deviations 1 over ImageNet."""
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.to(device, non_blocking=True).float() / 255 - mean) / deviation


def some(loader: Loader, number: int) -> Tensor:
    """The first images of a loader as the net sees them, float (number, 3, size, size), on the CPU."""
    found: list[Tensor] = []
    for images, _ in loader:
        found.append(network_input(images, torch.device("cpu")))
        if sum(map(len, found)) >= number:
            break
    return torch.cat(found)[:number]
