"""`fuse` adds no convolution: norms pass pools, scales stay products, and convolutions that pad keep their weights."""

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import SIZES, becomes, conv, count, images, owned, ready, same
from torch import Tensor, nn

import reparam
from reparam.nn import ChannelScale

C = 4


def first_of(model: nn.Module, rule: str) -> str:
    """The first reason with a rule in the plan of a model."""
    return next(str(entry) for entry in reparam.plan(model).left if entry.rule == rule)


# --- pools ------------------------------------------------------------------------------------------------------------


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MEANS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.AvgPool2d(2),
    "overlapping": lambda: nn.AvgPool2d(3, 1),
    "large": lambda: nn.AvgPool2d(7, count_include_pad=False),
    "padding is not counted": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "partial windows": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "function": lambda: Called(lambda x: F.avg_pool2d(x, 3, 2, [1, 1], False, False)),
    "function, by name": lambda: Called(lambda x: F.avg_pool2d(x, kernel_size=(3, 2), padding=(0, 0))),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "padding is counted": lambda: nn.AvgPool2d(3, 2, 1),
    "sums": lambda: nn.AvgPool2d(2, divisor_override=1),
    "sums, partial windows": lambda: nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=5),
    "maxima": lambda: nn.MaxPool2d(2),
    "function": lambda: Called(lambda x: F.avg_pool2d(x, 3, padding=1)),
}
calls = [images(size, C) for size in SIZES]


@pytest.mark.parametrize("pool", MEANS.values(), ids=MEANS)
def test_a_norm_goes_through_a_pool_into_the_convolution_behind_it(pool: Callable[[], nn.Module]) -> None:
    """Where that has a norm, too: all three become one."""
    model = ready(nn.Sequential(nn.BatchNorm2d(C), pool(), conv(1, C, 8), nn.BatchNorm2d(8), nn.ReLU()))
    fused = becomes(model, *calls, conv=1, norm=0)
    assert type(fused[1]) is type(model[1])


@pytest.mark.parametrize("pool", MEANS.values(), ids=MEANS)
def test_a_norm_goes_through_a_pool_into_the_convolution_in_front_of_it(pool: Callable[[], nn.Module]) -> None:
    model = ready(nn.Sequential(conv(1, C, 8), pool(), nn.BatchNorm2d(8), nn.ReLU()))
    becomes(model, *calls, conv=1, norm=0)


@pytest.mark.parametrize("pool", OTHERS.values(), ids=OTHERS)
def test_a_norm_does_not_go_through_a_pool_that_changes_constants(pool: Callable[[], nn.Module]) -> None:
    model = ready(nn.Sequential(nn.BatchNorm2d(C), pool(), conv(3, C, 8), nn.ReLU()))
    becomes(model, *calls, conv=1, norm=1)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool2d(x, kernel_size=(x.size(2), x.size(3))),
        lambda x: F.avg_pool2d(x, 2, stride=(x.size(2) // 2, 3)),
        lambda x: F.max_pool2d(x, (x.size(2), 1)),
        lambda x: F.max_pool2d(x, 1, [x.size(2) // 2, 1]),
    ],
    ids=["average", "stride", "maximum", "single elements"],
)
def test_a_pool_whose_window_depends_on_the_input_is_left_alone(pool: Callable[[Tensor], Tensor]) -> None:
    """An entry of its window is no number, and what is around it is fused."""
    model = ready(nn.Sequential(conv(3, C, 8), nn.BatchNorm2d(8), nn.ReLU(), Called(pool), conv(1, 8, C)))
    becomes(model, *calls, conv=2, norm=0)


@pytest.mark.parametrize("mean", [lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)])
def test_a_shift_goes_through_a_mean_into_the_linear_layer_behind_it(mean: Callable[[Tensor], Tensor]) -> None:
    """Alone, it is no scale: the layer keeps its weight and gets another bias."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(1, C, 1, 1)), nn.Parameter(torch.zeros(1, C, 1, 1))
            self.head = nn.Linear(C, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(mean(x * self.scale + self.shift))

    model = ready(Shifted())
    fused = becomes(model, *calls, linear=1)
    assert count(fused, calls[0])["calls"] < count(model, calls[0])["calls"]


def test_the_norm_of_a_pool_that_reads_otherwise_stays() -> None:
    """The pool is read by two: the convolution in front of it cannot have two norms."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.norm = conv(3, C, C), nn.AvgPool2d(2, count_include_pad=False), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(torch.relu(self.conv(x)))
            return torch.relu(self.norm(y)) - torch.sigmoid(y)

    becomes(ready(Twice()), *calls, conv=1, norm=1)


def test_no_convolution_is_made_of_a_pool_and_its_norm_unless_asked_for() -> None:
    model = ready(nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(C), nn.ReLU()))
    becomes(model, *calls, conv=0, norm=1)
    assert "more convolutions would be run: 1 instead of 0; to fuse: pass cost=reparam.cost.always" in first_of(
        model, "cost"
    )
    fused = reparam.fuse(model, cost=reparam.cost.always)
    same(model, fused, calls[0])
    assert owned(fused) == {"convs": 1, "linears": 0, "norms": 0}


@pytest.mark.parametrize("policy", [reparam.cost.macs, reparam.cost.traffic, reparam.cost.parameters])
def test_no_named_policy_but_always_makes_one(policy: reparam.cost.Cost) -> None:
    model = ready(nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.ReLU()))
    assert owned(reparam.fuse(model, cost=policy))["convs"] == 0


def test_a_policy_of_ones_own_decides_about_convolutions_itself() -> None:
    model = ready(nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(C), nn.ReLU()))
    assert owned(reparam.fuse(model, cost=lambda work: work.launches))["convs"] == 1
    assert owned(reparam.fuse(model, cost=lambda work: work.launches + 2 * work.convolutions))["convs"] == 0


# --- sums -------------------------------------------------------------------------------------------------------------


def test_a_convolution_of_concatenated_channels_is_not_cut_in_two() -> None:
    class Ghost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = conv(1, C, C), conv(3, C, C), conv(1, 2 * C, C)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return torch.relu(self.last(torch.cat([y, torch.relu(self.second(y))], 1)[:, : 2 * C]))

    becomes(ready(Ghost()), *calls, conv=3)


# --- scales -----------------------------------------------------------------------------------------------------------


def test_norms_alone_become_a_product() -> None:
    """A depthwise convolution of one tap takes many times as long."""
    model = ready(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C), nn.BatchNorm2d(C)))
    fused = becomes(model, *calls, conv=0, norm=0, calls=2)
    assert isinstance(fused[1], ChannelScale)
    assert reparam.receipt(fused).regions[0].after == ("scale",)
    assert reparam.fuse(fused) is not fused
    same(model, reparam.fuse(fused), calls[0])


# --- convolutions that pad by themselves ------------------------------------------------------------------------------


class Same(nn.Conv2d):
    """Pads what its input needs for ``ceil(size / stride)`` results."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [
            max((-(-size // s) - 1) * s + k - size, 0)
            for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        ]
        x = F.pad(x, [side for m in reversed(missing) for side in (m // 2, m - m // 2)])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(Same):
    """With a kernel of mean zero."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[-1] % 2))
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Gained(Same):
    """With one more parameter."""

    def __init__(self, *arguments: int, **options: int) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[-1] % 2))
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Same, Standardised])
def test_a_convolution_that_pads_by_itself_holds_its_new_weights(kind: type[Same], bias: bool) -> None:
    model = ready(nn.Sequential(kind(C, 8, 3, stride=2, groups=2, bias=bias), nn.BatchNorm2d(8), nn.ReLU()))
    old = model[0].weight
    fused = becomes(model, *calls, conv=1, norm=0)
    assert owned(fused) == {"convs": 1, "linears": 0, "norms": 0}
    assert isinstance(fused[0], kind)
    assert list(fused.state_dict()) == ["0.weight", "0.bias"]
    assert model[0].weight is old
    for copied in (pickle.loads(pickle.dumps(fused)), reparam.fuse(fused)):
        same(model, copied, calls[1])
    loaded = reparam.fuse(ready(nn.Sequential(kind(C, 8, 3, stride=2, groups=2, bias=bias), nn.BatchNorm2d(8)), seed=5))
    loaded.load_state_dict(fused.state_dict())
    same(model, nn.Sequential(loaded, nn.ReLU()), calls[0])


def test_in_place_the_weights_are_filled_in() -> None:
    model = ready(nn.Sequential(Same(C, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()))
    expected = model(calls[0])
    fused = reparam.fuse(model, inplace=True)
    assert fused is model
    assert torch.allclose(fused(calls[0]), expected, rtol=0, atol=1e-12)
    assert not any(parameter.is_meta for parameter in fused.parameters())


def test_a_convolution_with_more_parameters_gets_a_child() -> None:
    gained = ready(nn.Sequential(Gained(C, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    fused = becomes(gained, *calls, conv=1, norm=0)
    assert list(fused.state_dict()) == ["0.fused.weight", "0.fused.bias"]


def test_weights_that_another_forward_reads_stay() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = Same(C, C, 3), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x.to(self.conv.weight.dtype)))) + self.conv.weight.sum()

    becomes(ready(Reads()), *calls, conv=1)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_a_result_whose_batch_is_read_is_still_the_result_of_one_convolution() -> None:
    """Nothing is taken for granted about the input of a module whose result stays what it is."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
            return x * torch.sigmoid(y).view(x.shape[0], -1, 1, 1)

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * 2, self.bias, self.stride, self.padding)

    model = ready(nn.Sequential(Scaled(C, 8, 3), Gate()))
    fused = becomes(model, *calls)
    assert type(fused[0]) is nn.Conv2d
    assert count(fused, calls[0])["calls"] < count(model, calls[0])["calls"]
