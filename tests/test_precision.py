"""bf16, fp16 and float32: fused nets stay within the rounding of one convolution, and hard statistics do no harm.

The bound. A fused convolution rounds each weight once, its bias once, and its output once, each by at most u = eps / 2,
relative; sums run in float32 or better. Against the original in float64, on the same input,

    |y_fused − y| ≤ u·(Σ|W||x| + |b|) + u·|y| ≤ eps·(Σ|W||x| + |b|)

where W and b are the exact fused weights. A weight below the smallest normal number is off by half the smallest
subnormal instead, `tiny·eps/2`. In float32 the sum itself adds rounding of the same size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from nets import Block, C, conv, conv_norm, count, difference, images, is_fused, owned, randomise, ready, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reparam
from reparam.algebra.pending import BUFFER
from reparam.models import RepVGG, RepVGGBlock

HALF = [torch.bfloat16, torch.float16]
FLOATS = [*HALF, torch.float32]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)

every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)


def only_layer(net: nn.Module) -> nn.Module:
    """The one convolution or linear layer of a fused net."""
    (layer,) = (module for module in net.modules() if isinstance(module, LAYERS))
    return layer


@torch.no_grad()
def magnitude(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `eps` is multiplied by: Σ|W||x| + |b|, and one subnormal per weight in units of eps."""
    layer = copy.deepcopy(layer)
    layer.weight.abs_().add_(torch.finfo(dtype).tiny)
    layer.bias.abs_()
    return layer(x.double().abs())


def within_one_convolution(model: nn.Module, x: Tensor, dtype: torch.dtype) -> nn.Module:
    """Fuse a one-convolution net of this dtype and compare it with itself in float64; returns the fused net."""
    exact = copy.deepcopy(model).double()
    fused, fused_exact = reparam.fuse(model), reparam.fuse(exact)
    layer, layer_exact = only_layer(fused), only_layer(fused_exact)
    assert owned(fused)["norms"] == 0
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    same(exact, fused_exact, x.double(), tolerance=1e-12)
    assert torch.equal(layer.weight, layer_exact.weight.to(dtype)), "weights were rounded more than once"
    assert torch.equal(layer.bias, layer_exact.bias.to(dtype)), "the bias was rounded more than once"
    with torch.no_grad():
        expected, found = exact(x.double()), fused(x)
    assert found.dtype == model(x).dtype
    allowed = torch.finfo(dtype).eps * magnitude(layer_exact, x, dtype) * (4 if dtype == torch.float32 else 1.1)
    excess = float(((found.double() - expected).abs() / allowed).max())
    assert excess <= 1, f"{excess:.2f} of the rounding of one convolution"
    return fused


class GroupedBlock(nn.Module):
    """Branches of 2 and 4 groups and an average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_norm(3, 8, 8, groups=2), conv_norm(1, 8, 8, groups=4)
        self.c = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def linear_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24))


def conv1d_norm() -> nn.Module:
    return nn.Sequential(nn.Conv1d(16, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8))


def conv3d_norm() -> nn.Module:
    return nn.Sequential(nn.Conv3d(4, 8, 3, bias=False), nn.BatchNorm3d(8))


def transposed_norm() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8))


NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (Block, (2, C, 9, 11)),
    (lambda: Block(64), (2, 64, 12, 8)),
    (lambda: Block(stride=2), (2, C, 9, 11)),
    (lambda: RepVGGBlock(16, 16, groups=4), (2, 16, 9, 11)),
    (GroupedBlock, (2, 8, 9, 11)),
    (lambda: conv_norm(3, 8, 8, groups=8), (2, 8, 9, 11)),
    (transposed_norm, (2, 16, 5, 7)),
    (conv1d_norm, (2, 16, 17)),
    (conv3d_norm, (2, 4, 5, 6, 7)),
    (linear_norm, (8, 64)),
]
NAMES = ["block", "wide", "strided", "groups", "mixed_groups", "depthwise", "transposed", "1d", "3d", "linear"]
every_net = pytest.mark.parametrize(("build", "shape"), NETS, ids=NAMES)


def numbers(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- one convolution --------------------------------------------------------------------------------------------------


@every_float
@every_net
def test_within_the_rounding_of_one_convolution(
    build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for seed in range(2):
        model = randomise(build(), seed).eval().to(dtype)
        within_one_convolution(model, numbers(shape, seed).to(dtype), dtype)


@every_half
def test_every_block_of_a_net_is_within_the_rounding_of_one_convolution(dtype: torch.dtype) -> None:
    """On the input that it has in the fused net of this dtype."""
    net = randomise(RepVGG((1, 2, 3), (8, 16, 24), (2, 1, 2), {2: 2, 4: 2}, num_classes=5)).eval().to(dtype)
    fused = reparam.fuse(net)
    value = images((20, 23), channels=3).to(dtype)
    assert count(fused, value)["norm"] == 0
    with torch.no_grad():
        assert fused(value).dtype == dtype
        assert fused(value).isfinite().all()
    for stage, fused_stage in zip(net.stages, fused.stages, strict=True):
        for block, fused_block in zip(stage, fused_stage, strict=True):
            linear = copy.deepcopy(block)
            linear.act = nn.Identity()
            within_one_convolution(linear, value, dtype)
            with torch.no_grad():
                value = fused_block(value)


@every_half
def test_a_fused_net_is_about_as_good_as_the_net_itself(dtype: torch.dtype) -> None:
    """It rounds its weights, the net its intermediate values. Errors of the logits, root mean square over ten seeds."""
    ours, theirs = [], []
    for seed in range(10):
        net = randomise(RepVGG((1, 1, 2), (8, 16, 24), (2, 1, 2), num_classes=50), seed).eval().to(dtype)
        x = images((16, 16), channels=3, batch=8, seed=seed).to(dtype)
        fused, exact = reparam.fuse(net), copy.deepcopy(net).double()
        with torch.no_grad():
            wanted = exact(x.double())
            scale = wanted.square().mean()
            ours.append((fused(x).double() - wanted).square().mean() / scale)
            theirs.append((net(x).double() - wanted).square().mean() / scale)
    assert sum(ours) < 4 * sum(theirs), f"mean square error {sum(ours) / 10:.1e} fused, {sum(theirs) / 10:.1e} unfused"


# --- several dtypes in one model --------------------------------------------------------------------------------------


def keep_norms(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All in this dtype but norms, which stay in float32, as mixed-precision training leaves them."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return model


@every_half
@pytest.mark.parametrize("build", [lambda: conv_norm(3), Block, lambda: conv_norm(1, C, 8, stride=2)])
def test_norms_in_float32_after_convolutions_in_half(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = keep_norms(randomise(build()).eval(), dtype)
    within_one_convolution(model, images().to(dtype), dtype)


@every_half
def test_the_statistics_in_float32_are_not_rounded_first(dtype: torch.dtype) -> None:
    """A mean that bf16 and fp16 do not have."""
    model = keep_norms(randomise(conv_norm(1)).eval(), dtype)
    model[1].running_mean.fill_(1 + 2**-20)
    model[1].running_var.fill_(1.0)
    model[1].eps = 0.0
    model[1].weight.data.fill_(2**10)
    model[1].bias.data.fill_(2**10)
    fused = within_one_convolution(model, images().to(dtype), dtype)
    assert torch.equal(only_layer(fused).bias, torch.full((C,), -(2**-10), dtype=dtype))


class Casts(nn.Module):
    """The first block in one dtype, the second in another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(torch.float64))


@every_float
def test_blocks_of_different_dtypes_keep_their_own(dtype: torch.dtype) -> None:
    model = ready(Casts())
    model.first.to(dtype)
    fused = reparam.fuse(model)
    assert is_fused(fused.first)
    assert is_fused(fused.second)
    assert {p.dtype for p in fused.first.parameters()} == {dtype}
    assert {p.dtype for p in fused.second.parameters()} == {torch.float64}
    same(model, fused, images().to(dtype), tolerance=16 * torch.finfo(dtype).eps)
    value = images()
    same(model.second, fused.second, value, tolerance=1e-12)


class Promotes(nn.Module):
    """Branches of two dtypes: their sum has the wider one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.low = conv_norm(3), conv_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.low(x.float())


def test_branches_of_two_dtypes_are_not_summed() -> None:
    model = ready(Promotes())
    model.low.float()
    fused = reparam.fuse(model)
    x = images()
    with torch.no_grad():
        assert fused(x).dtype == torch.float64
    assert {p.dtype for p in fused.low.parameters()} == {torch.float32}
    same(model, fused, x, tolerance=1e-5)
    same(model.wide, fused.wide, x, tolerance=1e-12)
    wanted = {"conv": 2, "norm": 0, "add": 1}
    assert {key: value for key, value in count(fused, x).items() if key in wanted} == wanted


@pytest.mark.parametrize("build", [lambda: Block(16), lambda: conv_norm(3, 16, 16)], ids=["block", "conv_norm"])
def test_a_fused_net_runs_under_autocast(build: Callable[[], nn.Module]) -> None:
    model = randomise(build()).eval()
    fused = reparam.fuse(model)
    x = images(channels=16).float()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = fused(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


# --- statistics at their limits ---------------------------------------------------------------------------------------


def set_norms(model: nn.Module, **values: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in values.items():
                if name == "eps":
                    module.eps = value
                else:
                    getattr(module, name).data.fill_(value)
    return model


@pytest.mark.parametrize("build", [Block, lambda: conv_norm(3)])
@pytest.mark.parametrize(
    "values",
    [
        {"running_var": 0.0},
        {"running_var": 1e-30},
        {"running_var": 1e-12, "eps": 0.0},
        {"running_var": 5e-324, "eps": 1e-3},
        {"running_var": 1e300, "weight": 1e150},
        {"running_var": 1e-40, "eps": 1e-40, "running_mean": 1e-20},
        {"running_mean": 1e8, "running_var": 1e-4},
    ],
    ids=str,
)
def test_small_and_large_variances(build: Callable[[], nn.Module], values: dict[str, float]) -> None:
    model = set_norms(ready(build()), **values)
    fused = reparam.fuse(model)
    assert count(fused, images())["norm"] == 0
    same(model, fused, images(), tolerance=1e-12)


@every_float
@pytest.mark.parametrize("values", [{"running_var": 0.0}, {"running_var": 1e-6, "running_mean": 3.0}], ids=str)
def test_small_variances_in_low_precision(values: dict[str, float], dtype: torch.dtype) -> None:
    model = set_norms(randomise(conv_norm(3)).eval(), **values).to(dtype)
    within_one_convolution(model, images().to(dtype), dtype)


@every_half
def test_weights_below_the_smallest_normal_number(dtype: torch.dtype) -> None:
    """In fp16 they keep an absolute accuracy only; the original scales its sums in float32."""
    model = set_norms(randomise(conv_norm(3)).eval(), running_var=3e4, weight=1e-3, bias=0.0, running_mean=0.0)
    model.to(dtype)
    within_one_convolution(model, images().to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_that_the_dtype_cannot_hold_are_not_made_infinite(dtype: torch.dtype) -> None:
    """The original is finite, so the fused net must be: its norm stays, or goes without harm."""
    limit = torch.finfo(dtype).max
    model = set_norms(randomise(conv_norm(3)).eval(), running_mean=0.0, running_var=1.0, bias=0.0, eps=0.0).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(10)
        model[1].weight.fill_(limit / 8)
    x = images().to(dtype)
    x = x / x.abs().max() / 1000
    fused = reparam.fuse(model)
    with torch.no_grad():
        expected, found = model(x), fused(x)
    assert expected.isfinite().all()
    assert found.isfinite().all()
    assert difference(expected, found) <= 8 * torch.finfo(dtype).eps
    assert all(tensor.isfinite().all() for tensor in fused.state_dict().values())


def test_a_variance_of_zero_without_eps_gives_what_the_net_gives() -> None:
    model = set_norms(ready(nn.Sequential(conv(3), nn.BatchNorm2d(C), Block())), eps=1e-5)
    model[1].eps = 0.0
    model[1].running_var[2] = 0.0
    x = images()
    with torch.no_grad():
        assert not model(x).isfinite().all()
    fused = reparam.fuse(model)
    same(model, fused, x)
    assert is_fused(fused[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_what_the_net_gives(value: float) -> None:
    model = ready(nn.ModuleList([conv_norm(3), Block()]))
    with torch.no_grad():
        model[0][0].weight[1, 2, 1, 1] = value
    fused = reparam.fuse(model)
    assert is_fused(fused[1])
    for old, new in zip(model, fused, strict=True):
        same(old, new, images())


def zero_gammas(block: Block, names: Sequence[str]) -> Block:
    norms = {"dense": block.dense[1], "point": block.point[1], "skip": block.skip}
    for name in names:
        nn.init.zeros_(norms[name].weight)
    return block


@pytest.mark.parametrize("names", [("dense",), ("point", "skip"), ("dense", "point", "skip")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
def test_gammas_of_zero(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """A branch that is switched off takes no part, and the structure does not depend on it."""
    model = zero_gammas(ready(Block()), names)
    model.act = nn.Identity()
    expected = {key: value.shape for key, value in reparam.fuse(ready(Block())).state_dict().items()}
    if dtype == torch.float64:
        fused = reparam.fuse(model)
        same(model, fused, images(), tolerance=1e-12)
    else:
        fused = within_one_convolution(model.to(dtype), images().to(dtype), dtype)
    assert {key: value.shape for key, value in fused.state_dict().items()} == expected
    layer = only_layer(fused)
    if len(names) == 3:
        assert not layer.weight.any()
    if "dense" in names:
        taps = layer.weight.detach().clone()
        taps[:, :, 1, 1] = 0
        assert not taps.any()


def test_gammas_of_zero_and_variances_of_zero() -> None:
    model = set_norms(ready(Block()), weight=0.0, running_var=0.0)
    fused = reparam.fuse(model)
    assert is_fused(fused)
    same(model, fused, images(), tolerance=1e-12)


@every_half
def test_branches_that_cancel(dtype: torch.dtype) -> None:
    """Fused, they cancel exactly; unfused, their rounding is left."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_norm(3), conv_norm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x)

    model = randomise(Cancels()).eval()
    state: dict[str, Any] = model.a.state_dict()
    model.b.load_state_dict(state)
    fused = within_one_convolution(model.to(dtype), images().to(dtype), dtype)
    assert not only_layer(fused).weight.any()
    assert not fused(images().to(dtype)).any()


class LargestDouble(TorchDispatchMode):
    """Numbers of the largest float64 tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.float64 and not output.is_meta:
            self.found = max(self.found, output.numel())
        return output


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(96, 960, 3, padding=1), nn.BatchNorm2d(960)),
        lambda: nn.Sequential(nn.BatchNorm2d(960), nn.Conv2d(960, 960, 1)),
        lambda: nn.Sequential(nn.BatchNorm2d(960), nn.Conv2d(960, 1920, 3, groups=2, padding=0), nn.BatchNorm2d(1920)),
        lambda: nn.Sequential(nn.BatchNorm1d(960), nn.Linear(960, 960), nn.BatchNorm1d(960)),
    ],
    ids=["norm behind", "norm in front", "norms around groups", "norms around a linear layer"],
)
def test_no_large_weight_is_held_in_float64(build: Callable[[], nn.Module]) -> None:
    model = randomise(build()).eval()
    with LargestDouble() as largest:
        fused = reparam.fuse(model, check=False)
    assert owned(fused)["norms"] == 0
    assert 0 < largest.found <= 1.1 * BUFFER < only_layer(fused).weight.numel()
    first = next(model.children())
    channels = getattr(first, "in_channels", getattr(first, "num_features", 0))
    x = torch.randn(2, channels, *(5, 6)[: 0 if isinstance(first, nn.BatchNorm1d) else 2])
    same(model.double(), fused.double(), x.double(), tolerance=1e-5)  # weights are rounded to float32
