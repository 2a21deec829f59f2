"""Small nets, each of which asks one thing of a tool that folds norms or branches; used by `benchmarks/tools.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A module here is described where it is used; its forward is its description.
# ruff: noqa: D102

C = 6


def conv(kernel: int | tuple[int, int] = 3, **options: object) -> nn.Conv2d:
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(C, C, kernel, **{"padding": tuple(k // 2 for k in sides), "bias": False, **options})


class Swapped(nn.Module):
    """Two convolutions and their norms, registered in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm1, self.norm2 = conv(), conv(1), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Shared(nn.Module):
    """One convolution that two norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = conv(), nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.first(self.conv(x))) + F.relu(self.second(self.conv(x.flip(-1))))


class Branches(nn.Module):
    """A block of RepVGG under names of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(conv(), nn.BatchNorm2d(C))
        self.small = nn.Sequential(conv(1), nn.BatchNorm2d(C))
        self.skip = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.small(x) + self.skip(x))


class Shapes(nn.Module):
    """Branches of other shapes: 1×3, 3×1, grouped, an average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall, self.grouped = conv((1, 3)), conv((3, 1)), conv(3, groups=3)
        self.pool, self.norm = nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.wide(x) + self.tall(x) + self.grouped(x) + self.pool(x)))


class Padded(nn.Module):
    """The chain of a diverse branch block: 1×1, norm, a border of the norm's own shift, 3×3, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.norm = conv(1), nn.BatchNorm2d(C)
        self.conv, self.last = conv(3, padding=0), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(self.point(x)), (1, 1, 1, 1))
        norm = self.norm
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        border = border.view(1, -1, 1, 1)
        y[:, :, :1, :], y[:, :, -1:, :], y[:, :, :, :1], y[:, :, :, -1:] = border, border, border, border
        return F.relu(self.last(self.conv(y)))


class Adapted(nn.Module):
    """A linear layer and a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(C, C), nn.Linear(C, 2, bias=False), nn.Linear(2, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return F.relu(self.base(x) + 0.5 * self.up(self.down(x)))


class Decides(nn.Module):
    """A forward that looks at its data, around a convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.mean() > 0 else -x)


def chain() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU())


def transposed() -> nn.Module:
    layer = nn.ConvTranspose2d(C, C, 2, 2, groups=2)
    return nn.Sequential(layer, nn.BatchNorm2d(C), nn.ReLU())


def norm_first(padding: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(C), conv(3, padding=padding), nn.ReLU())


def two_convs() -> nn.Module:
    return nn.Sequential(conv(3), conv(1, bias=True), nn.ReLU())


@dataclass(frozen=True)
class Case:
    """One question.

    Args:
        name: what it asks for.
        build: the net.
        best: calls of convolutions and linear layers, norms and sums that are possible; what is left to do.
    """

    name: str
    build: Callable[[], nn.Module]
    best: tuple[int, int, int]


OWN = "3×3 + 1×1 + identity, in a block of the tool's own"
CASES = (
    Case("convolution → norm", chain, (1, 0, 0)),
    Case("… registered in another order than called", Swapped, (2, 0, 0)),
    Case("… transposed, with groups", transposed, (1, 0, 0)),
    Case("norm → convolution without padding", lambda: norm_first(0), (1, 0, 0)),
    Case("norm → zero-padded convolution (must stay)", lambda: norm_first(1), (1, 1, 0)),
    Case("one convolution, two norms (must stay)", Shared, (2, 2, 1)),
    Case("3×3 → 1×1", two_convs, (1, 0, 0)),
    Case("3×3 + 1×1 + identity, each with its norm", Branches, (1, 0, 0)),
    Case("1×3 + 3×1 + grouped 3×3 + average pool", Shapes, (1, 0, 0)),
    Case("1×1 → norm → border of its shift → 3×3 → norm", Padded, (1, 0, 0)),
    Case("linear + low rank", Adapted, (1, 0, 0)),
    Case("convolution → norm under a forward that looks at its data", Decides, (1, 0, 0)),
)
