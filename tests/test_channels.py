"""Channels that are picked, put behind each other, written and shuffled."""

from collections.abc import Callable

import pytest
import torch
from test_layouts import becomes, wide
from torch import Tensor, nn

import reparam


class Around(nn.Module):
    """A convolution, something that moves channels, and a pointwise convolution."""

    def __init__(self, move: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(channels, 1, 1)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.move(self.first(x)))


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "slice": (lambda y: y[:, 1:7:2], 3),
    "last slice": (lambda y: y[:, -3:], 3),
    "ellipsis": (lambda y: y[:, :5, ...], 5),
    "list": (lambda y: y[:, [5, 0, 5]], 3),
    "index_select": (lambda y: torch.index_select(y, 1, torch.tensor([7, 1])), 2),
    "narrow": (lambda y: y.narrow(1, 2, 4), 4),
    "chunk": (lambda y: torch.cat(list(y.chunk(3, 1))[::-1], 1), 8),
    "split": (lambda y: torch.cat([torch.split(y, [5, 3], dim=1)[i] for i in (1, 0)], dim=1), 8),
    "equal split": (lambda y: y.split(3, 1)[2], 2),
    "concat": (lambda y: torch.cat([y, y[:, :2]], dim=1), 10),
    "repeated": (lambda y: torch.cat([y] * 3, 1), 24),
    "shuffle": (lambda y: nn.functional.channel_shuffle(y, 4), 8),
    "sum of halves": (lambda y: y[:, :4] + y[:, 4:] * 2, 4),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_channels_is_a_matrix(name: str) -> None:
    move, channels = MOVES[name]
    fused = becomes(wide(Around(move, channels)), torch.randn(2, 8, 7, 6, dtype=torch.float64), layers=1)
    assert isinstance(fused, Around)


def test_a_written_part_is_a_matrix() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, 2:5] = self.mix(y[:, 2:5])
            return self.last(y)

    model = wide(Written())
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    assert torch.allclose(reparam.fuse(model)(x), model(x), atol=1e-12)


def test_without_a_batch_the_axis_is_another() -> None:
    move, channels = MOVES["concat"]
    fused = reparam.fuse(wide(Around(move, channels)))
    with pytest.raises((AssertionError, RuntimeError)):
        fused(torch.randn(8, 7, 6, dtype=torch.float64))


@pytest.mark.parametrize("kernels", [(3, 3), (3, 1)])
def test_branches_of_one_input_are_stacked_where_that_is_no_dearer(kernels: tuple[int, int]) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 4, k, padding=k // 2) for k in kernels)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.cat([conv(x) for conv in self.convs], 1))

    model = wide(Beside())
    becomes(model, torch.randn(2, 8, 7, 6, dtype=torch.float64), layers=1 if kernels == (3, 3) else 2)
    assert ("cost" in {refusal.rule for refusal in reparam.plan(model).left}) == (kernels != (3, 3))


def test_a_depthwise_part_stays_depthwise() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.point = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, rest = torch.split(x, [2, 6], dim=1)
            return self.point(torch.cat((self.part(first), rest), 1))

    model = wide(Partial())
    becomes(model, torch.randn(2, 8, 7, 6, dtype=torch.float64), layers=2)
    assert "cost" in {refusal.rule for refusal in reparam.plan(model).left}, str(reparam.plan(model))


def test_a_norm_behind_parts_goes_into_each() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tall, self.wide = nn.Conv2d(8, 4, (3, 1), padding=(1, 0)), nn.Conv2d(8, 4, (1, 3), padding=(0, 1))
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([self.tall(x), self.wide(x)], 1))

    becomes(wide(Parts()), torch.randn(2, 8, 7, 6, dtype=torch.float64), layers=2)


class JoinedNorm(nn.Module):
    """A norm of joined channels that a fused branch and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([self.first(x), torch.relu(self.second(x))[:, :4]], 1))
        return self.branch(y) + y


class JoinedConvs(JoinedNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([self.first(x), self.second(x.sigmoid())], 1))
        return self.branch(y) + y


def test_a_norm_that_went_back_counts_once() -> None:
    """Convolutions in front of the joint took it over; the fused branch behind it reads what they give."""
    becomes(wide(JoinedConvs()), torch.randn(2, 8, 7, 6, dtype=torch.float64), layers=3)


def test_a_norm_behind_a_joint_of_which_one_part_is_not_linear_stays() -> None:
    becomes(wide(JoinedNorm()), torch.randn(2, 8, 7, 6, dtype=torch.float64), layers=3, norms=1)


class Shifted(nn.Module):
    """A pool with stride and the same one place further, side by side: their sizes agree for even inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(1, 2)
        self.first, self.second = nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(6, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.norm(torch.cat([self.first(self.pool(x)), self.second(self.pool(x[:, :, 1:, 1:]))], 1))


def test_a_norm_behind_parts_whose_sizes_agree_for_even_inputs_goes_into_each() -> None:
    model = wide(Shifted())
    for size in ((8, 10), (12, 8)):
        becomes(model, torch.randn(2, 6, *size, dtype=torch.float64), layers=2, norms=0)
