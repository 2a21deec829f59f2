"""Weights that are generated, in the data types in which nets are used: the region is fused, and no check fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import C, conv, counted, images, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import reparam


class Standardised(nn.Conv2d):
    """Its weight is standardised, as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Centred(nn.Conv2d):
    """The same by hand, with the method of torch."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5), self.bias)


class Factors(nn.Module):
    """A weight of two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.kernels = nn.Parameter(torch.randn(C, 4)), nn.Parameter(torch.randn(4, C, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.einsum("or,rikl->oikl", self.rows, self.kernels), padding=1)


class Frozen(nn.Module):
    """A norm as arithmetic on buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


CONVS: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: Standardised(C, C, 3, padding=1),
    "centred": lambda: Centred(C, C, 3, padding=1),
    "factors": Factors,
    "plain": lambda: conv(3),
    "weight norm": lambda: parametrizations.weight_norm(conv(3)),
    "spectral norm": lambda: parametrizations.spectral_norm(conv(3)),
    "weight norm by a hook": lambda: nn.utils.weight_norm(conv(3)),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(conv(3)),
}


class Branches(nn.Module):
    def __init__(self, conv_: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.first, self.second = conv_(), conv(1), norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.a(x)) + self.second(self.b(x)) + x


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(C), Frozen], ids=["norm", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CONVS)
def test_generated_weights(name: str, dtype: torch.dtype, norm: Callable[[], nn.Module]) -> None:
    model = randomise(Branches(CONVS[name], norm)).eval().to(dtype)
    fused = reparam.fuse(model)
    assert not reparam.receipt(fused).left
    x = images().to(dtype)
    with torch.no_grad():
        wanted: Any = model(x)
    found, calls = counted(fused, x)
    assert (calls["conv"], calls["norm"], calls["add"], found.dtype) == (1, 0, 0, dtype)
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error < (16 if dtype is torch.bfloat16 else 256) * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_net_that_torch_cannot_copy(inplace: bool) -> None:
    model = Branches(lambda: nn.utils.weight_norm(conv(3)), lambda: nn.BatchNorm2d(C)).eval()
    assert not model.a.weight.is_leaf, "it was built with a gradient, and has not run since"
    wanted = Branches(lambda: conv(3), lambda: nn.BatchNorm2d(C)).eval()
    for name, parameter in wanted.named_parameters():
        parameter.data = model.a.weight.detach() if name == "a.weight" else model.get_parameter(name).detach()
    fused = reparam.fuse(model, inplace=inplace)
    assert torch.allclose(fused(images().float()), wanted(images().float()), atol=1e-5)
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 1
