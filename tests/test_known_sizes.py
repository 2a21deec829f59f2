"""Sums whose branches are equally long for some sizes only: fused for the sizes of an example."""

import pytest
import torch
from test_layouts import becomes, wide
from torch import Tensor, nn

import reparam
from reparam.algebra import Conv, Refusal, branch_sum


class Pooled(nn.Module):
    """A strided convolution beside an average of two by two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.pool = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.pool(x))


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 4, height, width, dtype=torch.float64)


def test_other_sizes_of_the_same_remainder_are_right() -> None:
    model = wide(Pooled())
    fused = reparam.fuse(model, example_inputs=images(8, 10))
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    for size in ((8, 10), (2, 4), (14, 6)):
        x = images(*size)
        assert torch.allclose(fused(x), model(x), atol=1e-12)
    (region,) = reparam.plan(model, example_inputs=images(8, 10)).regions
    assert region.after == ("conv 3x3, stride 2x2, for sizes that are 0 mod 2 only",)


@pytest.mark.parametrize("size", [(9, 10), (8, 3), (3, 3)])
def test_other_remainders_are_an_error(size: tuple[int, int]) -> None:
    fused = reparam.fuse(wide(Pooled()), example_inputs=images(8, 10))
    with pytest.raises(AssertionError, match="example_inputs"):
        fused(images(*size))


def test_without_an_example_the_branches_stay() -> None:
    becomes(wide(Pooled()), images(8, 10), layers=2)
    assert any("example_inputs" in refusal.remedy for refusal in reparam.plan(wide(Pooled())).left)


def test_remainders_of_a_sum() -> None:
    def strided(kernel: int, lo: int, hi: int, lengths: tuple[int, ...] | None) -> Conv:
        return Conv(4, 4, (kernel,), (3,), (1,), (lo,), (hi,), lengths=lengths)

    assert isinstance(branch_sum([strided(3, 1, 1, None), strided(1, 0, 0, None)]), Conv)
    assert isinstance(branch_sum([strided(3, 1, 1, None), strided(3, 0, 1, None)]), Refusal)
    assert isinstance(branch_sum([strided(3, 1, 1, (7,)), strided(3, 0, 1, (7,))]), Refusal)
    total = branch_sum([strided(3, 1, 1, (9,)), strided(3, 0, 1, (9,))])
    assert isinstance(total, Conv)
    assert total.remainders == ((0, 2),)
