"""A value of which only the shape is read besides may vanish, where what takes its place has that shape."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import reparam


class Head(nn.Module):
    """Two pointwise convolutions, and a look at the value between them."""

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor], middle: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, middle, 1), nn.Conv2d(middle, 6, 1)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.look(y, self.second(y))


class NormFirst(nn.Module):
    """A norm, all sizes of its result, and a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, 2)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        batch, channels, height, width = y.shape
        return self.conv(y) + batch + 10 * channels + 100 * height + 1000 * width


def fused_like(model: nn.Module, x: Tensor, convs: int) -> nn.Module:
    """The fused model, which must give the same with so many convolutions."""
    fused = reparam.fuse(model)
    assert torch.allclose(fused(x), model(x), atol=1e-10)
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == convs
    return fused


X = torch.randn(3, 8, 9, 7, dtype=torch.float64)


@pytest.mark.parametrize(
    "look",
    [
        lambda y, z: z.view(y.size(0), -1),
        lambda y, z: z.reshape(y.shape[0], 6, -1),
        lambda y, z: z.flatten(1).view(y.shape[0], -1),
    ],
    ids=["size", "shape", "twice"],
)
def test_the_batch_may_be_read(look: Callable[[Tensor, Tensor], Tensor]) -> None:
    fused = fused_like(Head(look).double().eval(), X, 1)
    with pytest.raises(AssertionError, match="rank"):
        fused(X[0])  # without a batch, the first size is another


@pytest.mark.parametrize(
    "look", [lambda y, z: z + y.size(1), lambda y, z: z + y.shape[1] * y.shape[0]], ids=["size", "shape"]
)
def test_channels_that_change_may_not_be_read(look: Callable[[Tensor, Tensor], Tensor]) -> None:
    fused_like(Head(look).double().eval(), X, 2)


def test_all_sizes_of_a_norm_may_be_read() -> None:
    model = NormFirst().double().eval()
    fused = fused_like(model, X, 1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_a_sum_of_branches_whose_shapes_are_read_stays_right() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(8, 6, 3, 2, 1), nn.Conv2d(8, 6, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            wide, narrow = self.wide(x), self.narrow(x)
            return (wide + narrow).view(narrow.size(0), -1) * wide.shape[0]

    model = Branches().double().eval()
    assert torch.allclose(reparam.fuse(model)(X), model(X), atol=1e-10)
