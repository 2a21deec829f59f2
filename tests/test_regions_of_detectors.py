"""Regions as detectors and sequence models write them: frozen norms with two forms, crops, casts, accumulators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import SIZES, C, becomes, conv, conv_norm, images, ready
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import reparam

# --- a frozen norm that asks whether its input requires a gradient --------------------------------


class FrozenNorm(nn.Module):
    """``FrozenBatchNorm2d`` as detectron2 writes it."""

    def __init__(self, channels: int = C, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale = scale.reshape(1, -1, 1, 1)
            bias = bias.reshape(1, -1, 1, 1)
            out_dtype = x.dtype
            return x * scale.to(out_dtype) + bias.to(out_dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class Swapped(FrozenNorm):
    """The condition the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Bottleneck(nn.Module):
    """A block of a detector's backbone."""

    def __init__(self, norm: Callable[[], nn.Module], short: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(1), norm(), conv(3), norm()
        self.short = nn.Sequential(conv(1), norm()) if short else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm1(self.conv1(x)))
        return F.relu_(self.norm2(self.conv2(y)) + self.short(x))


@pytest.mark.parametrize("norm", [FrozenNorm, Swapped])
@pytest.mark.parametrize("short", [False, True])
def test_a_frozen_norm_with_two_forms_goes(norm: type[FrozenNorm], short: bool) -> None:
    model = ready(Bottleneck(norm, short))
    fused = becomes(model, *map(images, SIZES), conv=2 + short, norm=0, add=1, calls=5 + short)
    with torch.enable_grad():
        x = images().requires_grad_()
        assert torch.allclose(model(x * 1), fused(x * 1), rtol=1e-10, atol=1e-10)


def test_a_frozen_norm_with_two_forms_goes_without_numbers_too() -> None:
    with torch.device("meta"):
        empty = Bottleneck(FrozenNorm, short=True)
    fused = reparam.fuse(ready(Bottleneck(FrozenNorm, short=True)))
    assert reparam.fuse(empty.eval()).state_dict().keys() == fused.state_dict().keys()


class WithoutShift(FrozenNorm):
    """Its two forms differ: one has no shift."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return x * (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class OtherEps(FrozenNorm):
    """Its two forms differ a little."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1.001 * self.eps).rsqrt()
        if x.requires_grad:
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Clipped(FrozenNorm):
    """One of its forms is not linear."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        z = x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)
        return z if x.requires_grad else y.clamp(-1, 1)


class OnTheLastAxis(FrozenNorm):
    """One of its forms has channels on the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        if x.requires_grad:
            return x * scale + (self.bias - self.running_mean * scale)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@pytest.mark.parametrize("norm", [WithoutShift, OtherEps, Clipped, OnTheLastAxis])
def test_a_norm_whose_forms_differ_stays(norm: type[FrozenNorm]) -> None:
    model = ready(nn.Sequential(conv(3), norm()))
    fused = becomes(model, images((C, C)), conv=1, norm=1)
    x = images((C, C)).requires_grad_()
    assert torch.equal(model[1](x), fused[1](x))


# --- crops of causal convolutions -----------------------------------------------------------------


class Chomp(nn.Module):
    """What a temporal convolutional network crops behind."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class Causal(nn.Module):
    """A causal convolution beside a convolution of one tap."""

    def __init__(self, normed: bool = False, shortfall: int = 0) -> None:
        super().__init__()
        long = nn.Conv1d(C, C, 3, padding=4, dilation=2)
        self.long = nn.Sequential(parametrizations.weight_norm(long) if normed else long, Chomp(4 - shortfall))
        self.down = nn.Conv1d(C, C, 1, padding=shortfall and 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.long(x) + self.down(x))


def sounds(length: int) -> Tensor:
    return images((length,))


@pytest.mark.parametrize("normed", [False, True])
def test_a_crop_that_is_made_contiguous_goes_into_a_sum(normed: bool) -> None:
    becomes(ready(Causal(normed)), sounds(11), sounds(12), sounds(4), conv=1, add=0, convs=1)


def test_a_cropped_convolution_whose_taps_lie_elsewhere_stays_apart() -> None:
    becomes(ready(Causal(shortfall=2)), sounds(11), sounds(12), conv=2, add=1)


def test_a_norm_behind_a_crop_goes() -> None:
    causal = nn.Sequential(nn.Conv1d(C, C, 3, padding=2), Chomp(2), nn.BatchNorm1d(C), nn.ReLU())
    becomes(ready(causal), sounds(11), sounds(12), conv=1, norm=0)


def test_a_crop_that_is_read_elsewhere_too_stays() -> None:
    class Both(Causal):
        def forward(self, x: Tensor) -> Tensor:
            y = self.long[0](x)[:, :, :-4]
            return torch.relu(y.contiguous() + self.down(x)) * y

    becomes(ready(Both()), sounds(11), sounds(12), conv=2, add=1)


# --- casts, accumulators, scales whose shape is read ----------------------------------------------


class Branches(nn.Module):
    """A 3x3 and a 1x1 branch; a function says how they are summed."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = conv_norm(3), conv_norm(1), function
        self.scale = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def accumulated(net: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for branch in (net.a, net.b):
        y = y + branch(x)
    return y * net.scale.view(-1, 1, 1)


def accumulated_in_place(net: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for branch in (net.a, net.b):
        y += branch(x)
    return y


def accumulated_from_none(net: Any, x: Tensor) -> Tensor:
    y: Any = None
    for branch in (net.a, net.b):
        y = branch(x) if y is None else y + branch(x)
    return y


def scaled_by_channels(net: Any, x: Tensor) -> Tensor:
    y = net.a(x) + net.b(x)
    _, c, _, _ = y.shape
    return y * net.scale.view(1, c, 1, 1)


ONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a cast to the type of the input": lambda net, x: net.a(x).to(x.dtype) + net.b(x),
    "a cast to the input": lambda net, x: net.a(x).to(x) + net.b(x).type_as(x),
    "a cast by name": lambda net, x: net.a(x) + net.b(x).to(dtype=x.dtype, device=x.device, non_blocking=True),
    "a cast of a sum": lambda net, x: (net.a(x) + net.b(x)).to(x.dtype),
    "zeros that are added to": accumulated,
    "zeros that are written to": accumulated_in_place,
    "nothing that is added to": accumulated_from_none,
    "a scale for as many channels": scaled_by_channels,
    "a scale for channels of the input": lambda net, x: (net.a(x) + net.b(x)) * net.scale.view(x.size(1), 1, 1),
}


@pytest.mark.parametrize("function", ONE.values(), ids=ONE.keys())
def test_a_sum_becomes_one_convolution(function: Callable[[Any, Tensor], Tensor]) -> None:
    becomes(ready(Branches(function)), *map(images, SIZES), conv=1, norm=0, add=0, calls=1)


def test_a_scale_of_more_numbers_than_channels_is_none() -> None:
    def widened(net: Any, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        return (net.a(x) + net.b(x)) * net.scale.view(c // c, c, b // b, 1)

    becomes(ready(Branches(widened)), *map(images, SIZES), conv=1, norm=0, add=0, calls=2)


def in_half(net: Any, x: Tensor) -> Tensor:
    return net.a(x).to(torch.float32).to(x.dtype) + net.b(x)


def of_numbers(net: Any, x: Tensor) -> Tensor:
    return ((x * 2).to(torch.int64) * net.scale.view(-1, 1, 1)).to(torch.float32).to(x.dtype) + net.b(x)


def under_autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = net.a[0](x.float())
        return y.to(x.dtype) + net.b(x)


def of_another_type(net: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x, dtype=torch.float32)
    return (y + net.a(x).float()) + net.b(x)


@pytest.mark.parametrize("function", [in_half, of_numbers, of_another_type])
def test_a_cast_that_rounds_stays(function: Callable[[Any, Tensor], Tensor]) -> None:
    becomes(ready(Branches(function)), *map(images, SIZES), norm=0, add=2 if function is of_another_type else 1)


def test_a_cast_under_autocast_stays() -> None:
    model = ready(Branches(under_autocast)).float()
    x = images().float()
    expected, found = model(x), reparam.fuse(model)(x)
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=0.05, atol=0.1)


def test_a_cast_to_whole_numbers_stays() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.scale = conv(1), nn.BatchNorm2d(C), nn.Parameter(torch.ones(C, 1, 1))

        def forward(self, x: Tensor, whole: Tensor) -> Tensor:
            return self.norm(self.conv(x).to(whole.dtype).to(x.dtype))

    becomes(ready(Rounded()), (images(), images().long()), conv=1, norm=1)


def test_zeros_that_widen_what_is_added_stay() -> None:
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x) + self.conv(x)

    becomes(ready(Widening()), *map(images, SIZES), conv=1, add=1)


def test_zeros_of_another_size_stay() -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x) + self.conv(x)

    becomes(ready(Shrinking()), images((3, 3)), conv=1, add=1)
