"""Regions that must be found, however PyTorch code writes them: the structure after fusing, and the numbers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import (
    SIZES,
    Beside,
    C,
    becomes,
    conv,
    conv_norm,
    count,
    fuse_purely,
    images,
    is_fused,
    randomise,
    ready,
    same,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import reparam

ONE = {"conv": 1, "norm": 0, "add": 0}


class Three(nn.Module):
    """A 3x3, a 1x1 and an identity branch, each with a norm; subclasses say how they are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_norm(3), conv_norm(1), nn.BatchNorm2d(C)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_norm(3), conv_norm(1), nn.BatchNorm2d(C)])


# --- ways to write a sum --------------------------------------------------------------------------


class ListOfValues(Listed):
    def forward(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.branches]
        y = values[0]
        for value in values[1:]:
            y = y + value
        return y


class DictOfBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"dense": conv_norm(3), "point": conv_norm(1), "skip": nn.BatchNorm2d(C)})

    def forward(self, x: Tensor) -> Tensor:
        values = {name: branch(x) for name, branch in self.branches.items()}
        return values["dense"] + values["point"] + values["skip"]


class Loop(Listed):
    def forward(self, x: Tensor) -> Tensor:
        y: Any = 0
        for branch in self.branches:
            y = y + branch(x)
        return y


class WhileLoop(Listed):
    def forward(self, x: Tensor) -> Tensor:
        y, index = self.branches[0](x), 1
        while index < len(self.branches):
            y, index = y + self.branches[index](x), index + 1
        return y


class BuiltinSum(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class Reduce(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(operator.add, (branch(x) for branch in self.branches))


class ReduceWithTorchAdd(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(torch.add, [branch(x) for branch in self.branches])


class StackSum(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class StackSumKeywords(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(torch.stack([branch(x) for branch in self.branches], dim=1), dim=1)


class InPlaceAdd(Three):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y += self.c(x)
        return y


class AddMethod(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).add(self.b(x)).add_(self.c(x))


class LeadingZero(Listed):
    def forward(self, x: Tensor) -> Tensor:
        scale_branch = 0
        identity = 0.0
        return 0 + scale_branch + identity + self.branches[0](x) + self.branches[1](x) + self.branches[2](x)


class AddAlpha(Three):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.a(x), torch.add(self.b(x), self.c(x), alpha=2), alpha=-0.5)


class Sub(Three):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.a(x) - self.b(x), self.c(x), alpha=3)


class SubMethods(Three):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).sub(self.b(x))
        y -= self.c(x)
        return y


class ReverseSub(Three):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 - self.a(x) + torch.rsub(self.b(x), 2.0) - self.c(x)


class Negative(Three):
    def forward(self, x: Tensor) -> Tensor:
        return -self.a(x) + torch.neg(self.b(x)) + self.c(x).negative()


class TimesConstant(Three):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * 2 + 0.5 * self.b(x) + torch.mul(self.c(x), -1.5)
        y *= 0.25
        return y


class OverConstant(Three):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) / 3 + torch.div(self.b(x), 0.5) + self.c(x)) / 2.0


class ScalarBuffers(Three):
    """Scales held as zero-dimensional and one-element tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.beta: Tensor
        self.register_buffer("beta", torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.alpha + self.b(x) / self.beta + self.c(x)


class SameValueTwice(Three):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + y + self.b(x) + self.c(x) - y


@pytest.mark.parametrize(
    "net",
    [
        ListOfValues, DictOfBranches, Loop, WhileLoop, BuiltinSum, Reduce, ReduceWithTorchAdd, StackSum,
        StackSumKeywords, InPlaceAdd, AddMethod, LeadingZero, AddAlpha, Sub, SubMethods, ReverseSub, Negative,
        TimesConstant, OverConstant, ScalarBuffers, SameValueTwice,
    ],
)  # fmt: skip
def test_every_spelling_of_a_sum_becomes_one_convolution(net: type[nn.Module]) -> None:
    becomes(ready(net()), *map(images, SIZES), **ONE, calls=1, norms=0)


# --- scales, norms, residuals, things in between --------------------------------------------------


@pytest.mark.parametrize("axes", [(-1, -1), (1, 1), (2, [-3]), (-5, 0), (4, -1)])
def test_stacks_are_summed_over_the_axis_that_was_stacked(axes: tuple[Any, Any]) -> None:
    class Stacked(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([f(x) for f in self.branches], dim=axes[0]).sum(dim=axes[1])

    becomes(ready(Stacked()), *map(images, SIZES), **ONE, convs=1, norms=0)


@pytest.mark.parametrize("axis", [0, -1])
def test_a_mean_of_a_stack_has_the_channels_of_its_values(axis: int) -> None:
    class Mean(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([f(x) for f in self.branches], axis).mean(axis) * 2

    becomes(ready(Mean()), *map(images, SIZES), **ONE, calls=1)


def test_another_axis_of_a_stack_is_no_sum_of_its_values() -> None:
    class Other(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([f(x) for f in self.branches], -1).sum(-2) * 2

    becomes(ready(Other()), *map(images, SIZES), conv=2)


class LayerScale(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LayerScaled(nn.Module):
    """`x + gamma · (mixer(x) - norm(x))`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))
        self.mixer = nn.ModuleList([conv_norm(3), conv_norm(1)])
        self.norm = nn.BatchNorm2d(C)
        self.scale = LayerScale(shape)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.gamma * (self.mixer[0](x) + self.mixer[1](x) - self.norm(x))
        return self.scale(y)


@pytest.mark.parametrize("shape", [(C, 1, 1), (1, C, 1, 1)])
def test_layer_scales(shape: tuple[int, ...]) -> None:
    becomes(ready(LayerScaled(shape)), *map(images, SIZES), **ONE, calls=1, norms=0)


class ReshapedScale(Three):
    """A scale of shape (C,) that forward brings into shape."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mul(self.gamma.reshape(1, -1, 1, 1)) + self.b(x) * self.gamma[None, :, None, None]
        return y + self.c(x) * self.gamma.view(C, 1, 1)


class NormAfterSum(Three):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x) + self.b(x) + self.c(x) + x)


class NormAfterPartialSum(NormAfterSum):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x) + self.b(x)) + self.c(x) + x


class NormsAfterSumsTwice(NormAfterSum):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.a(x) + x) + self.b(x)) + self.c(x)


class InnerAndOuterResidual(nn.Module):
    """A 3x3 with a residual inside, a 1x1 behind it, and a residual around both."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point = conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        inner = x + self.dense(x)
        return x + self.point(inner)


class DropPath(nn.Module):
    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class RandomThingsBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(
            conv(3), nn.Dropout2d(0.2), DropPath(), nn.Identity(), nn.BatchNorm2d(C), nn.Dropout(0.1, inplace=True)
        )
        self.b, self.drop_path = conv_norm(1), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.b(x), 0.3, self.training)
        return x + self.drop_path(self.a(x)) + nn.functional.dropout2d(y, training=self.training)


@pytest.mark.parametrize(
    "net",
    [ReshapedScale, NormAfterSum, NormAfterPartialSum, NormsAfterSumsTwice, InnerAndOuterResidual, RandomThingsBetween],
)
def test_norms_residuals_and_things_in_between(net: Callable[[], nn.Module]) -> None:
    becomes(ready(net()), *map(images, SIZES), **ONE, calls=1, norms=0)


# --- a convolution in one module, its norm in the next --------------------------------------------


class NormThenAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(C), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class NormAct(nn.BatchNorm2d):
    """A norm whose forward also activates: a subclass that is more than its base."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        exponential_average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        bn_training = True if self.training else (self.running_mean is None) and (self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            bn_training,
            exponential_average_factor,
            self.eps,
        )
        return self.act(self.drop(x))


class ConvNormAct(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn = conv(3), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SumThenNormAct(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.bn = conv_norm(3), conv(1), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x) + x)


@pytest.mark.parametrize("norm", [NormThenAct, functools.partial(NormAct, C)], ids=["module", "subclass of the norm"])
@pytest.mark.parametrize("net", [ConvNormAct, SumThenNormAct])
def test_norm_and_activation_in_the_next_module(net: Callable[..., nn.Module], norm: Callable[[], nn.Module]) -> None:
    becomes(ready(net(norm)), *map(images, SIZES), **ONE, calls=2)


# --- functional forms -----------------------------------------------------------------------------


class Raw(nn.Module):
    """A 3x3 and a 1x1 kernel and one norm, all held as bare parameters and buffers."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        self.dims = dims
        self.dense, self.point = (
            nn.Parameter(torch.randn(C, C, *(3,) * dims) / 8),
            nn.Parameter(torch.randn(C, C, *(1,) * dims) / 3),
        )
        self.gamma, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.bias, False, 0.1, 1e-3)


class FunctionalConvs(Raw):
    def forward(self, x: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return self.norm(convolve(x, self.dense, padding=1)) + convolve(x, self.point, self.bias) + self.norm(x)


class TorchConvs(Raw):
    def forward(self, x: Tensor) -> Tensor:
        convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[self.dims]
        return self.norm(convolve(x, self.dense, None, 1, 1)) + convolve(x, self.point)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("net", [FunctionalConvs, TorchConvs])
def test_functional_convolutions_and_norms(net: Callable[[int], nn.Module], dims: int) -> None:
    becomes(ready(net(dims)), images((7, 9, 5)[:dims]), images((8, 6, 10)[:dims]), **ONE, calls=1)


class FunctionalPad(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.dense) + F.conv2d(x, self.point)


class AsymmetricPadAndCrop(Raw):
    def forward(self, x: Tensor) -> Tensor:
        shifted = F.conv2d(F.pad(x, [2, 0, 0, 2], "constant", 0.0), self.dense)
        cropped = F.conv2d(F.pad(x, (2, 2, 2, 2)), self.dense)[:, :, 1:-1, 1:-1]
        return shifted + cropped + F.conv2d(x, self.point)


class FunctionalPool(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return (
            F.conv2d(x, self.dense, padding=1)
            + F.avg_pool2d(x, 3, 1, 1)
            + self.norm(F.avg_pool2d(F.conv2d(x, self.point), 3, stride=1, padding=1))
        )


@pytest.mark.parametrize("net", [FunctionalPad, AsymmetricPadAndCrop, FunctionalPool])
def test_functional_pads_and_pools(net: Callable[[], nn.Module]) -> None:
    model = ready(net())
    becomes(model, *map(images, SIZES), conv=1, norm=0, add=0)


@pytest.mark.parametrize("dims", [1, 3])
def test_functional_pools_in_other_dimensions(dims: int) -> None:
    class Net(Raw):
        def forward(self, x: Tensor) -> Tensor:
            pool, convolve = (F.avg_pool1d, F.conv1d) if self.dims == 1 else (F.avg_pool3d, F.conv3d)
            return convolve(x, self.dense, padding=1) + pool(x, 3, 1, 1)

    becomes(ready(Net(dims)), images((7, 9, 5)[:dims]), images((8, 6, 10)[:dims]), **ONE, calls=1)


class FunctionalLinears(nn.Module):
    """Parallel linear layers on the last axis: a low-rank branch is made by the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, C)), nn.Parameter(torch.zeros(C))
        self.down, self.up = nn.Parameter(torch.randn(2, C)), nn.Parameter(torch.randn(C, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 0.5 * F.linear(F.linear(x, self.down), self.up)


class KernelsOfChildren(nn.Module):
    """Calls its convolutions as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.thin = conv(3), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.wide.weight, self.wide.bias, padding=1)
        return F.conv2d(y, self.thin.weight, self.thin.bias)


class Listing(nn.Module):
    """Cannot be read: how many values it goes through depends on the input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([y.relu() for y in self.inner(x)])


def test_functional_convolutions_in_a_parent_that_cannot_be_read() -> None:
    layer = nn.Sequential(KernelsOfChildren(), nn.BatchNorm2d(C))
    becomes(ready(Listing(layer)), images(), conv=1, norm=0, convs=1, norms=0)


def test_functional_linears() -> None:
    rows = torch.randn(5, C, dtype=torch.float64)
    becomes(ready(FunctionalLinears()), rows, rows[:3, None], linear=1, add=0, conv=0)


# --- norms written out, generated weights ---------------------------------------------------------


class WrittenOutNorm(nn.Module):
    """A frozen batch norm as detectors write it: arithmetic on buffers."""

    def __init__(self, channels: int = C) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        variance, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class WrittenOutNormByHand(WrittenOutNorm):
    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        centred = x - self.running_mean.view(shape)
        return centred / torch.sqrt(self.running_var.view(shape) + 1e-5) * self.weight.view(shape) + self.bias.view(
            shape
        )


@pytest.mark.parametrize("norm", [WrittenOutNorm, WrittenOutNormByHand])
def test_frozen_norm_as_arithmetic_on_buffers(norm: Callable[[], nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.short, self.short_norm = conv(3), norm(), conv(1), norm()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.short_norm(self.short(x))

    becomes(ready(Net()), *map(images, SIZES), **ONE, calls=1)


ADDED_PRODUCTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a constant and a scale": lambda net, a, b: torch.addcmul(net.beta, net.alpha, a + b),
    "the factor last, and a number": lambda net, a, b: torch.addcmul(net.beta, a + b, net.alpha, value=-0.5),
    "a value and a scaled one": lambda net, a, b: torch.addcmul(a, net.alpha, b, value=2),
    "a method": lambda net, a, b: a.addcmul(b, net.alpha),
    "by name": lambda net, a, b: torch.addcmul(input=a, tensor1=net.alpha, tensor2=b),
    "a value and itself, scaled": lambda net, a, b: torch.addcmul(a, a, net.alpha) + b,
    "a quotient": lambda net, a, b: torch.addcdiv(net.beta, a + b, net.alpha, value=3),
}


@pytest.mark.parametrize("added", ADDED_PRODUCTS.values(), ids=ADDED_PRODUCTS.keys())
def test_a_product_that_is_added(added: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    class Added(Three):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.beta = nn.Parameter(torch.rand(C, 1, 1)), nn.Parameter(torch.rand(1, C, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return added(self, self.a(x), self.b(x))

    becomes(ready(Added()), *map(images, SIZES), **ONE, calls=1)


class AffineOfPatches(nn.Module):
    """A scale and a shift of the features of tokens, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.before, self.after = conv(3), nn.Linear(C, C), nn.Linear(C, C)
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, C)), nn.Parameter(torch.zeros(1, 1, C))

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.gelu(self.patches(x)).flatten(2).transpose(1, 2)
        return self.after(F.gelu(torch.addcmul(self.beta, self.alpha, self.before(tokens))))


def test_a_scale_and_shift_of_tokens() -> None:
    becomes(ready(AffineOfPatches()), *map(images, SIZES), conv=1, linear=2, product=3)
    assert not [p for p in fuse_purely(ready(AffineOfPatches())).state_dict() if p in ("alpha", "beta")]


def test_added_products_that_are_no_scale() -> None:
    class Gated(Three):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addcmul(self.a(x), self.b(x), x) + torch.addcdiv(x, torch.ones(C, 1, 1), self.b(x))

    becomes(ready(Gated()), *map(images, SIZES), conv=3)
    (refusal,) = (refusal for refusal in reparam.plan(ready(Gated())).left if refusal.rule == "scale")
    assert refusal.condition == "both factors depend on the input"


class Branches(nn.Module):
    """A 3x3 and a 1x1 branch, whose inputs and sum are given by a function."""

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = conv_norm(3), conv_norm(1), function

    def forward(self, x: Any) -> Tensor:
        return self.function(self, x)


ITEMS: dict[str, Callable[[Any, Any], Tensor]] = {
    "of a dict": lambda net, x: net.a(x["image"]) + net.b(x["image"]),
    "of a dict in a dict": lambda net, x: net.a(x["more"]["image"]) + net.b(x["more"]["image"]),
    "of a list": lambda net, x: net.a(x["list"][1]) - net.b(x["list"][1]),
    "a slice of images": lambda net, x: net.a(x["image"][:, :, :5]) + net.b(x["image"][:, :, :5]),
    "a slice of the batch": lambda net, x: net.a(x["image"][1:]) + net.b(x["image"][1:]),
    "a slice of channels": lambda net, x: net.a(x["wide"][:, :C]) + net.b(x["wide"][:, :C]),
}


def items(size: tuple[int, int]) -> tuple[dict[str, Any]]:
    x, y = images(size), images(size, seed=1)
    return ({"image": x, "more": {"image": y}, "list": [x, y], "wide": images(size, 2 * C)},)


@pytest.mark.parametrize("function", ITEMS.values(), ids=ITEMS.keys())
def test_an_item_that_is_read_twice_is_one_value(function: Callable[[Any, Any], Tensor]) -> None:
    becomes(ready(Branches(function)), *map(items, SIZES), conv=1, norm=0, add=0, convs=1)


def updated(net: Any, x: Any) -> Tensor:
    y = net.a(x["image"])
    x.update(image=y.relu())
    return y + net.b(x["image"])


def put(net: Any, x: Any) -> Tensor:
    y = net.a(x["image"])
    x["image"] = y.relu()
    return y + net.b(x["image"])


def turned(net: Any, x: Any) -> Tensor:
    y = net.a(x["list"][1])
    x["list"].reverse()
    return y + net.b(x["list"][1])


def taken(net: Any, x: Any) -> Tensor:
    y = net.a(x["list"][0])
    x["list"].pop(0)
    return y + net.b(x["list"][0])


def doubled(net: Any, x: Any) -> Tensor:
    y = net.a(x["image"])
    x["image"].mul_(2)
    return y + net.b(x["image"])


def written_in_part(net: Any, x: Any) -> Tensor:
    y = net.a(x["image"][:, :, :5])
    x["image"][:, :, 0] = 0.0
    return y + net.b(x["image"][:, :, :5])


@pytest.mark.parametrize("function", [updated, put, turned, taken, doubled, written_in_part])
def test_an_item_that_was_changed_in_between_is_another_value(function: Callable[[Any, Any], Tensor]) -> None:
    becomes(ready(Branches(function)), *map(items, SIZES), conv=2, add=1)


def test_a_module_that_is_called_twice_is_named_where_a_sum_stays_apart() -> None:
    model = ready(Branches(lambda net, x: net.a(x) + net.b(x) + net.a(x)))
    (refusal,) = (refusal for refusal in reparam.plan(model).left if refusal.rule == "in_place")
    assert "Sequential at a is called in between" in refusal.condition


class Einsum(nn.Module):
    """Two kernels multiplied in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Parameter(torch.randn(C, 4) / 2), nn.Parameter(torch.randn(4, C, 3, 3) / 4)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("om,mikl->oikl", self.outer, self.inner)
        return self.norm(F.conv2d(x, weight, padding=1)) + x


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        mean, std = weight.mean(dim=(1, 2, 3), keepdim=True), weight.std(dim=(1, 2, 3), keepdim=True)
        return (
            self.norm(F.conv2d(x, (weight - mean) / (std + 1e-5), self.conv.bias, self.conv.stride, self.conv.padding))
            + x
        )


class RefinedByAConvolution(nn.Module):
    """A convolution module that is called on the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, 3, 3) / 4)
        self.refine = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight + self.refine(self.weight), padding=1)) + x


@pytest.mark.parametrize("net", [Einsum, Standardised, RefinedByAConvolution])
def test_weights_generated_in_forward(net: Callable[[], nn.Module]) -> None:
    becomes(ready(net()), *map(images, SIZES), **ONE, calls=1)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def weight_norm(module: nn.Conv2d) -> nn.Module:
    return parametrizations.weight_norm(module)


def old_weight_norm(module: nn.Conv2d) -> nn.Module:
    return torch.nn.utils.weight_norm(module)


def spectral_norm(module: nn.Conv2d) -> nn.Module:
    return parametrizations.spectral_norm(module)


def registered(module: nn.Conv2d) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [weight_norm, old_weight_norm, spectral_norm, registered])
def test_parametrized_weights(wrap: Callable[[nn.Conv2d], nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.short = wrap(conv(3)), nn.BatchNorm2d(C), wrap(conv(1, bias=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.short(x)

    model = ready(Net())
    with torch.no_grad():
        model(images())  # the old weight norm leaves a weight with a gradient history before, which deepcopy refuses
    becomes(model, *map(images, SIZES), **ONE, calls=1, norms=0)


# --- subclasses and kinds of norm -----------------------------------------------------------------


class StandardisedConv(nn.Conv2d):
    """A subclass with a readable forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PaddedInside(nn.Conv2d):
    """A subclass that pads in forward, though its `padding` says 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5 + 1.0


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias, eps=self.eps)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ScaledNorm, ShiftedNorm])
@pytest.mark.parametrize(
    "first",
    [StandardisedConv(C, C, 3, padding=1), PaddedInside(C, C, 3), Renamed(C, C, 3, padding="same")],
    ids=lambda m: type(m).__name__,
)
def test_subclasses_with_a_readable_forward(first: nn.Module, norm: Callable[[int], nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.short = first, norm(C), conv_norm(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.short(x)

    becomes(ready(Net()), *map(images, SIZES), **ONE, calls=1)


@pytest.mark.parametrize(
    "norm",
    [nn.SyncBatchNorm(C), nn.BatchNorm2d(C, affine=False), nn.BatchNorm2d(C, eps=0.1, momentum=None)],
    ids=["SyncBatchNorm", "without affine", "cumulative average"],
)
def test_kinds_of_batch_norm(norm: nn.Module) -> None:
    class Net(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a(x) + self.b(x)) + self.c(x)

    model = Net()
    model.last = norm
    becomes(ready(model), *map(images, SIZES), **ONE, calls=1, norms=0)


def test_lazy_modules_after_initialisation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.LazyConv2d(C, 3, padding=1), nn.LazyBatchNorm2d())
            self.b = nn.Sequential(nn.LazyConv2d(C, 1), nn.LazyBatchNorm2d())

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = Net()
    model(images().float())
    becomes(ready(model), *map(images, SIZES), **ONE, calls=1, norms=0)


# --- sums that stay in part -----------------------------------------------------------------------


class OneBranchActivates(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.relu(self.b(x)) + self.c(x)


class OneBranchIsGated(Three):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return sum([self.a(x), x * self.gate(x), self.b(x), self.c(x)])


class TwoRoots(Three):
    def __init__(self) -> None:
        super().__init__()
        self.d = conv_norm(1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.a(x) + self.d(z) + self.b(x) + self.c(z)


class TwoRootsInside(Three):
    def __init__(self) -> None:
        super().__init__()
        self.d, self.act, self.norm = conv_norm(3), nn.ReLU(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(x)
        return self.norm(self.a(x) + self.d(z) + self.b(x) + self.c(z))


def test_sum_with_one_branch_that_is_not_linear() -> None:
    becomes(ready(OneBranchActivates()), *map(images, SIZES), conv=2, norm=0, add=1, norms=0)
    becomes(ready(OneBranchIsGated()), *map(images, SIZES), conv=2, norm=0, add=1, norms=0)


def test_two_roots_in_one_sum() -> None:
    pairs = [(images(size), images(size, seed=1)) for size in SIZES]
    becomes(ready(TwoRoots()), *pairs, conv=2, norm=0, add=1, norms=0)
    becomes(ready(TwoRootsInside()), *map(images, SIZES), conv=2, norm=0, add=1, norms=0)


class NothingAdded(nn.Module):
    """A branch that is missing is the number 0, and a gain that is off is the number 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_norm(3), conv_norm(1), None

    def forward(self, x: Tensor) -> Tensor:
        skipped = 0 if self.c is None else self.c(x)
        y = (self.a(x) + self.b(x) + skipped) * 1
        y += skipped
        return y.relu()


def test_a_sum_with_zero_is_not_computed() -> None:
    """One convolution and the activation: `+ 0` and `* 1` are passes over the tensor, too."""
    becomes(ready(NothingAdded()), *map(images, SIZES), **ONE, calls=2, norms=0)
    becomes(ready(nn.Sequential(NothingAdded(), NothingAdded())), *map(images, SIZES), conv=2, calls=4)


class NormBeforeTokens(nn.Module):
    """A residual branch with its norm in front; the sizes of the image are read from the normed value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.BatchNorm2d(C), nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.relu())
        batch, channels, height, width = y.shape
        tokens = self.mix(y.flatten(2).transpose(-2, -1)).softmax(-1)
        return x.relu() + tokens.transpose(-2, -1).reshape(batch, channels, height, width)


def test_a_norm_goes_into_the_tokens_behind_it() -> None:
    becomes(ready(NormBeforeTokens()), *map(images, SIZES), norm=0, norms=0, linear=1)


# --- the same everywhere --------------------------------------------------------------------------


class Nested(nn.Module):
    """A sum of sums: each branch is such a block itself."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.left = Nested(depth - 1) if depth else conv_norm(3)
        self.right = Nested(depth - 1) if depth else conv_norm(1)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.left(x) + self.right(x)) + x


def test_nested_blocks_become_one_convolution() -> None:
    becomes(ready(Nested()), *map(images, SIZES), **ONE, calls=1, norms=0)


def test_the_plan_lists_what_fuse_does() -> None:
    model = ready(Beside(Loop()))
    plan = reparam.plan(model)
    assert {region.path for region in plan.regions} == {"block", "odd"} or len(plan.regions) == 2, str(plan)
    fused = plan.apply()
    assert is_fused(fused.block)
    for region in plan.regions:
        assert len(region.after) < len(region.before)
        assert region.params_after <= region.params_before
        assert region.macs_after <= region.macs_before


# --- scales ----------------------------------------------------------------------------------------


class ScaledShortcut(nn.Module):
    """`x + a * (f(act(x)) - x)`: what is left of the shortcut is one number per channel."""

    def __init__(self, features: bool) -> None:
        super().__init__()
        self.f = nn.Linear(C, C) if features else conv_norm(1)
        self.alpha = nn.Parameter(torch.rand(C) if features else torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * (self.f(F.relu(x)) - x)


@pytest.mark.parametrize("features", [True, False])
def test_a_scaled_shortcut_is_a_product_and_no_convolution(features: bool) -> None:
    model = ready(ScaledShortcut(features))
    x = torch.randn(5, C, dtype=torch.float64) if features else images()
    fused = fuse_purely(model)
    same(model, fused, x)
    found = count(fused, x)
    assert (found["convs"] + found["linears"], found["norms"], found["add"]) == (1, 0, 1)
    assert found["calls"] < count(model, x)["calls"]
    assert sum(p.numel() for p in fused.parameters()) == C * C + 2 * C


def test_sums_and_products_alone_are_no_reason_for_a_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_norm(3), conv_norm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.gelu(F.relu(self.a(x)) * 2 / 3 + 1)) * 0.5

    becomes(ready(Net()), images(), conv=2, norm=0, convs=2)


# --- regions that are hard to check ----------------------------------------------------------------


class MixedKernels(nn.Module):
    """Parts of the channels go through kernels of several sizes; one norm stands behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(1)
        self.convs = nn.ModuleList(conv(k, C // 2, C // 2, stride=2, groups=C // 2) for k in (3, 7))
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        parts = F.relu(self.first(x)).split(C // 2, 1)
        return F.relu(self.norm(torch.cat([f(part) for f, part in zip(self.convs, parts, strict=True)], 1)))


class OneSizeOnly(nn.Module):
    """Patches of images of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.size = conv(3), nn.BatchNorm2d(C), tuple(images().shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == self.size[0], f"expected {self.size}")
        assert x.shape[3] == self.size[1], f"expected {self.size}"
        return self.norm(self.proj(x))


@pytest.mark.parametrize(("block", "convs"), [(MixedKernels, 3), (OneSizeOnly, 1)])
def test_regions_that_do_not_run_on_any_input(block: type[nn.Module], convs: int) -> None:
    becomes(ready(nn.Sequential(block(), nn.ReLU())), images(), conv=convs, norm=0, convs=convs, norms=0)


# --- constants in the type of a value --------------------------------------------------------------


class WithConstants(nn.Module):
    """A convolution and constants; ``formula`` says how they meet the input."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.formula = conv(3), formula
        self.g, self.v = nn.Parameter(torch.ones(C, 1, 1)), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.formula(self, x))


def behind(formula: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The formula of what the convolution computes."""
    return lambda m, x: formula(m, m.conv(x))


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "type": lambda m, x: m.conv(x) * m.g.to(x.dtype),
    "like": lambda m, x: m.conv(x) * m.g.to(x),
    "type_as": lambda m, x: m.conv(x) * m.g.type_as(x),
    "device": lambda m, x: m.conv(x) * m.g.to(x.device),
    "both": lambda m, x: m.conv(x) + m.g.to(dtype=x.dtype, device=x.device),
    "view": lambda m, x: m.conv(x) + m.v.to(x.dtype).view(1, -1, 1, 1),
    "index": lambda m, x: m.conv(x) + m.v.to(x.dtype)[:, None, None],
    "of the result": behind(lambda m, y: y * m.g.to(y.dtype)),
    "like the result": behind(lambda m, y: y * m.g.to(y)),
    "one type for two": behind(lambda m, y: (lambda kind: y * m.g.to(kind) + (m.g + 1).to(kind))(y.dtype)),
    "of a sum": lambda m, x: (lambda y: y * m.g.to(y.dtype))(m.conv(x) + x),
    "zeros": lambda m, x: m.conv(x) + torch.zeros(1, C, 1, 1, dtype=x.dtype, device=x.device),
    "arange": lambda m, x: m.conv(x) + torch.arange(C, device=x.device).view(-1, 1, 1),
    "new_tensor": lambda m, x: m.conv(x) * x.new_tensor([1.0, -2, 3, 0.5, 5, 7]).view(-1, 1, 1),
    "expand_as": behind(lambda m, y: y * m.g.expand_as(y)),
    "new_full": lambda m, x: m.conv(x) - x.new_full((1, C, 1, 1), 0.3),
    "computed": lambda m, x: m.conv(x) * (m.g.to(x.dtype) * 2 + torch.ones(C, 1, 1, device=x.device)),
    "computed of the result": behind(lambda m, y: y + torch.exp(-m.g.to(y.dtype)) / 3),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_in_the_type_of_a_value_is_a_constant(name: str) -> None:
    becomes(ready(WithConstants(CONSTANTS[name])), *map(images, SIZES), conv=1, add=0, calls=2)


@pytest.mark.parametrize("written", [False, True], ids=["read", "written"])
def test_a_weight_made_on_the_device_of_a_value(written: bool) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lower = conv(3), nn.Parameter(torch.randn(C, C))
            self.register_buffer("mask", torch.tril(torch.ones(C, C), -1))

        def forward(self, x: Tensor) -> Tensor:
            one = torch.eye(C, device=x.device)
            weight = (self.lower * self.mask + one) @ (one + 2 * self.mask.T)
            y = F.conv2d(self.conv(x), weight.view(C, C, 1, 1)).relu()
            return y * one.mul_(2).mean() if written else y

    model = randomise(Mixing()).eval()
    fused = becomes(model, *(images(size).float() for size in SIZES), tolerance=1e-5, conv=2 if written else 1)
    assert not [refusal for refusal in reparam.receipt(fused).left if refusal.rule == "check"]


NO_CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "integer": lambda m, x: m.conv(x) * m.g.to(device=x.device, dtype=torch.int64),
    "written": lambda m, x: (lambda g: m.conv(x) * g * g.mul_(2))(m.g.detach().to(x.dtype).clone()),
    "expanded": lambda m, x: (lambda y: y + m.g.expand_as(y)[:, :, :1, :1] * m.g.expand_as(y).sum())(m.conv(x)),
    "written by a view": lambda m, x: (lambda g: m.conv(x) * g[:, None, None] * g.mul_(2).mean())(
        m.v.detach().clone().to(x.dtype)
    ),
    "weight": lambda m, x: F.conv2d(x, m.conv.weight.to(x.dtype), padding=1) * m.g.to(x.dtype),
    "used": lambda m, x: F.relu(m.conv(m.conv(x)) * m.g.to(x.dtype)) * m.g.to(x.dtype) + m.conv(x).dtype.itemsize,
}


@pytest.mark.parametrize("name", NO_CONSTANTS)
def test_other_tensors_in_the_type_of_a_value_stay_right(name: str) -> None:
    model = ready(WithConstants(NO_CONSTANTS[name]))
    same(model, fuse_purely(model), images())


@pytest.mark.parametrize(
    "constant",
    [lambda m, mask: m.g.to(mask.dtype), lambda m, mask: mask.new_tensor([1.5, 2, 3, 4, 5, 6]).view(-1, 1, 1)],
    ids=["cast", "new"],
)
def test_a_constant_in_a_type_that_may_be_an_integer_is_cut_off(constant: Callable[[Any, Tensor], Tensor]) -> None:
    class Masked(WithConstants):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return F.relu(self.conv(x) * constant(self, mask))

    model = ready(Masked(lambda m, x: x))
    becomes(model, (images(), torch.ones(3, dtype=torch.int64)), (images(), images()), conv=1, product=1)


# --- transposed convolutions ----------------------------------------------------------------------


class Rising(nn.Module):
    """A step up in a net like a U; subclasses say how the two ways meet."""

    def __init__(self, kernel: int = 3, width: int = C) -> None:
        super().__init__()
        self.pre = nn.Conv2d(C, C, 1, bias=False)
        self.up, self.skip = nn.ConvTranspose2d(C, C, kernel, 2, 1), conv(1)
        self.norm = nn.BatchNorm2d(width)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.max_pool2d(x, 2, ceil_mode=True)


class SizedByKeyword(Rising):
    def forward(self, x: Tensor) -> Tensor:
        skip, y = self.both(x)
        return F.relu(self.norm(self.up(self.pre(y), output_size=skip.shape[-2:]))) + skip


class SizedByPosition(Rising):
    def forward(self, x: Tensor) -> Tensor:
        skip, y = self.both(x)
        return F.relu(self.norm(self.up(self.pre(y), skip.size()) * 0.5 + 1)) + skip


class SizedByList(Rising):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.pre(self.both(x)[1]), output_size=[x.shape[2], x.shape[3]])
        return F.relu(self.norm(y)) + x


@pytest.mark.parametrize("kind", [SizedByKeyword, SizedByPosition, SizedByList])
def test_a_transposed_convolution_whose_size_is_asked_for(kind: type[Rising]) -> None:
    becomes(ready(kind()), *map(images, SIZES), conv=1, norms=0)


class SizedInTwoWays(Rising):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)[1]
        return F.relu(self.up(y, output_size=x.shape[2:]) + self.up(y, output_size=[x.shape[2], x.shape[3]]) + x)


class SizedTwins(Rising):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.ConvTranspose2d(C, C, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)[1]
        return F.relu(self.up(y, x.shape[2:]) + self.other(y, x.shape[2:]) + x)


class SizedSum(Rising):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(self.both(x)[1], output_size=x.shape[2:]) + self.skip(x)))


@pytest.mark.parametrize("kind", [SizedInTwoWays, SizedTwins, SizedSum])
def test_what_asks_for_its_size_stays_where_it_is_called(kind: type[nn.Module]) -> None:
    becomes(ready(kind()), *map(images, SIZES), conv=2)


class JoinedWays(Rising):
    def forward(self, x: Tensor) -> Tensor:
        skip, y = self.both(x)
        return F.relu(self.norm(torch.cat([self.up(y, output_size=skip.shape[2:]), self.skip(skip)], 1)))


class JoinedWaysOfEvenSize(Rising):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([self.up(F.max_pool2d(x, 2)), self.skip(x)], 1)))


class AddedWays(Rising):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(F.max_pool2d(x, 2)) + self.skip(x)))


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (lambda: JoinedWays(3, 2 * C), SIZES),
        (lambda: JoinedWaysOfEvenSize(4, 2 * C), [(12, 8), (8, 10)]),
        (lambda: AddedWays(4), [(12, 8), (8, 10)]),
    ],
    ids=["joined", "joined, even", "added"],
)
def test_a_norm_of_two_ways_that_meet_at_one_size(model: Callable[[], Rising], sizes: Any) -> None:
    fused = becomes(ready(model()), *map(images, sizes), conv=2, norm=0, norms=0)
    assert not [refusal for refusal in reparam.receipt(fused).left if refusal.rule == "check"]


# --- sums that other libraries write --------------------------------------------------------------


class EinopsSum(Listed):
    """``einops.reduce(torch.stack(...), "k b c h w -> b c h w", "sum")``, as einops does it."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([branch(x) for branch in self.branches])
        shape = y.shape
        _ = [1 * size for size in (shape[0], shape[1], shape[2], shape[3])]
        return y.permute([1, 2, 3, 4, 0]).sum(dim=(4,))


def test_a_sum_over_an_axis_that_was_put_last() -> None:
    becomes(ready(EinopsSum()), *map(images, SIZES), **ONE, calls=1, norms=0)


@pytest.mark.parametrize(("order", "dim"), [((0, 1, 3, 4, 2), 0), ((1, 0, 2, 3, 4), 0), ((1, 2, 0, 3, 4), -1)])
def test_a_sum_over_a_stack_in_another_order_is_none_of_its_values(order: tuple[int, ...], dim: int) -> None:
    class Turned(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([branch(x) for branch in self.branches]).permute(*order).sum(dim) * 2

    fused = becomes(ready(Turned()), *map(images, SIZES), conv=2)
    assert not [refusal for refusal in reparam.receipt(fused).left if refusal.rule == "check"]


class LowRankUpdate(nn.Module):
    """A linear layer with a low-rank update, on tokens that were made of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.down, self.up = nn.Linear(C, C), nn.Linear(C, 2, bias=False), nn.Linear(2, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        return self.full(y) + 0.5 * self.up(self.down(y))


def test_linear_branches_behind_a_change_of_layout() -> None:
    becomes(ready(LowRankUpdate()), *map(images, SIZES), product=1, add=0, linears=1)


class Shifted(nn.Module):
    """Shifts and scales by one number, as in Fixup."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3), conv(1)
        self.before, self.behind = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.second(x + self.before) * self.scale + self.behind + x


def test_one_number_for_all_channels_of_an_input() -> None:
    becomes(ready(Shifted()), *map(images, SIZES), conv=2, add=0, calls=3)


class OfIntegers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x / 255 - 0.5) / 0.5)


def test_an_image_of_integers_stays_one() -> None:
    becomes(ready(OfIntegers()).float(), torch.arange(2 * C * 16, dtype=torch.uint8).view(2, C, 4, 4), conv=1, calls=4)


class WeightsInTheTypeOfTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tensor([0.3, 0.7], dtype=x.dtype)
        return weights[0] * self.a(x) + weights[1] * self.b(x)


def test_a_list_of_weights_in_the_type_of_the_input() -> None:
    becomes(ready(WeightsInTheTypeOfTheInput()), *map(images, SIZES))
