"""Figures of the RepVGG paper, for comparison.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, arXiv 2101.03697: table 4 (speed in
images per second of a GTX 1080Ti, batch 128, float32, 224×224, norms folded in all nets; parameters in millions; FLOPs
and Winograd multiplications in billions), table 6 (images per second of RepVGG-B0 before the branches are merged).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from reparam import models


@dataclass(frozen=True)
class Published:
    """A row of table 4.

    Args:
        build: the net here.
        speed: images per second.
        parameters: millions.
        flops: billions; a multiplication with its addition is one.
        winograd_muls: billions; None where the paper gives none.
    """

    build: Callable[[], nn.Module]
    speed: int
    parameters: float
    flops: float
    winograd_muls: float | None


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module("torchvision.models"), name)()


TABLE_4: Mapping[str, Published] = {
    "RepVGG-A0": Published(models.repvgg_a0, 3256, 8.30, 1.4, 0.7),
    "ResNet-18": Published(torchvision("resnet18"), 2442, 11.68, 1.8, 1.0),
    "RepVGG-A1": Published(models.repvgg_a1, 2339, 12.78, 2.4, 1.3),
    "RepVGG-B0": Published(models.repvgg_b0, 1817, 14.33, 3.1, 1.6),
    "ResNet-34": Published(torchvision("resnet34"), 1419, 21.78, 3.7, 1.8),
    "RepVGG-A2": Published(models.repvgg_a2, 1322, 25.49, 5.1, 2.7),
    "RepVGG-B1g4": Published(models.repvgg_b1g4, 868, 36.12, 7.3, 3.9),
    "EfficientNet-B0": Published(torchvision("efficientnet_b0"), 829, 5.26, 0.4, None),
    "RepVGG-B1g2": Published(models.repvgg_b1g2, 792, 41.36, 8.8, 4.6),
    "ResNet-50": Published(torchvision("resnet50"), 719, 25.53, 3.9, 2.8),
    "RepVGG-B1": Published(models.repvgg_b1, 685, 51.82, 11.8, 5.9),
    "RegNetX-3.2GF": Published(torchvision("regnet_x_3_2gf"), 671, 15.26, 3.2, 2.9),
    "ResNeXt-50": Published(torchvision("resnext50_32x4d"), 484, 24.99, 4.2, 4.1),
    "ResNet-101": Published(torchvision("resnet101"), 430, 44.49, 7.6, 5.5),
    "VGG-16": Published(torchvision("vgg16"), 415, 138.35, 15.5, 6.9),
}
REFERENCE = "ResNet-50"
QUICK = ("RepVGG-A0", "ResNet-18", "ResNet-50")

# Whether the identity and the 1×1 branch are there.
TABLE_6: Mapping[tuple[bool, bool], int] = {
    (False, False): 1810,
    (True, False): 1569,
    (False, True): 1230,
    (True, True): 1061,
}
