"""A bias or a norm in front of a zero padding that becomes a map behind it, for one size of the input."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_layouts import wide
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.algebra import Affine, Conv, Refusal, diagonal, substitute
from reparam.cost import DEFAULT_COST
from reparam.errors import ReparamError
from reparam.nn import BiasMap

SIZE = (9, 8)


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, *(size or SIZE), dtype=torch.float64)


def maps(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the maps of a model."""
    return [tuple(m.bias.shape) for m in model.modules() if isinstance(m, BiasMap)]


def assert_equal(fused: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    found, expected = fused(x).detach(), model(x).detach()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


class Branches(nn.Module):
    """Two ways with a bias before their padding, and a norm of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1))
        self.second = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 5, padding=2, bias=False), nn.BatchNorm2d(4))
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.first(x) + 0.5 * self.second(x) + self.norm(x)))


class Functions(nn.Module):
    """A scale and shift written out, before a convolution that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(4, 1, 1))
        self.start, self.conv = nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.start(x) * self.scale + self.shift))


def behind(*layers: nn.Module) -> nn.Sequential:
    """Layers between activations."""
    return nn.Sequential(nn.ReLU(), *layers, nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "norm": (lambda: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), [(4, 9, 8)]),
    "bias": (lambda: behind(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 3, padding=1)), [(4, 9, 8)]),
    "stride": (lambda: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, padding=1)), [(4, 5, 4)]),
    "groups and dilation": (
        lambda: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)),
        [(4, 9, 8)],
    ),
    "pad by itself": (
        lambda: behind(nn.Conv2d(4, 16, 1), nn.ZeroPad2d((1, 0, 1, 2)), nn.Conv2d(16, 4, 3)),
        [(4, 10, 7)],
    ),
    "two layers behind": (
        lambda: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
        [(4, 9, 8)],
    ),
    "transposed": (lambda: behind(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 1, 4, 2, 1)), [(1, 18, 16)]),
    "transposed, output padding": (
        lambda: behind(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 1, 3, 2, 1, 1)),
        [(1, 18, 16)],
    ),
    "branches": (Branches, [(4, 9, 8)]),
    "functions": (Functions, [(4, 5, 4)]),
    "average": (lambda: behind(nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1)), [(4, 9, 8)]),
}


@pytest.mark.parametrize("case", CASES)
def test_bias_becomes_a_map(case: str) -> None:
    build, expected = CASES[case]
    torch.manual_seed(0)
    model = wide(build())
    more_convolutions = case == "average"  # a policy of one's own allows them
    cost = (lambda work: DEFAULT_COST(work)) if more_convolutions else DEFAULT_COST
    options = {"example_inputs": images(), "cost": cost}
    assert not maps(reparam.fuse(model, **options))
    fused = reparam.fuse(model, bias_maps=True, **options)
    assert maps(fused) == expected
    assert sum(isinstance(m, nn.modules.conv._ConvNd) for m in fused.modules()) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for batch in (1, 3):
        assert_equal(fused, model, images(batch=batch))
    (region,) = reparam.plan(model, bias_maps=True, **options).regions
    assert region.after[-1] == f"bias map {'x'.join(map(str, expected[0][1:]))}, for this size only"
    assert region.params_after == sum(p.numel() for p in fused.parameters())


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (1, 1)])
def test_another_size_is_an_error(size: tuple[int, int]) -> None:
    build, _ = CASES["norm"]
    fused = reparam.fuse(wide(build()), example_inputs=images(), bias_maps=True)
    with pytest.raises(AssertionError, match=r"bias_maps=True.*size of example_inputs only"):
        fused(images(*size))


@pytest.mark.parametrize("axes", [1, 3])
def test_other_dimensions(axes: int) -> None:
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (), (nn.Conv3d, nn.BatchNorm3d))[axes - 1]
    model = wide(behind(norm(4), conv(4, 4, 3, padding=1)))
    x = torch.randn(2, 4, *(5, 4, 6)[:axes], dtype=torch.float64)
    fused = reparam.fuse(model, example_inputs=x, bias_maps=True)
    assert maps(fused) == [(4, *(5, 4, 6)[:axes])]
    assert_equal(fused, model, x)


def test_without_a_size_there_is_no_map() -> None:
    with pytest.raises(ReparamError, match="expected example_inputs beside bias_maps=True"):
        reparam.fuse(wide(Branches()), bias_maps=True)


def test_what_varies_inside_stays_apart() -> None:
    model = wide(behind(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    plan = reparam.plan(model, example_inputs=images(), bias_maps=True)
    assert any("varies there" in str(refusal) for refusal in plan.left)
    assert not maps(plan.apply())


def test_a_map_that_costs_more_is_not_made() -> None:
    model = wide(behind(nn.BatchNorm2d(4), nn.Conv2d(4, 16, 3, padding=1)))
    assert not maps(reparam.fuse(model, example_inputs=images(), bias_maps=True))
    small = wide(behind(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    fewest = reparam.fuse(small, example_inputs=images(), bias_maps=True, cost=reparam.cost.parameters)
    assert not maps(fewest)


def test_states_pickles_and_deploy_files(tmp_path: Path) -> None:
    model = wide(Branches())
    fuse = partial(reparam.fuse, example_inputs=images(), bias_maps=True)
    fused = fuse(model)
    again = fuse(Branches().double().eval())
    again.load_state_dict(fused.state_dict())
    assert_equal(again, model, images())
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    assert_equal(torch.load(stored, weights_only=False), model, images())
    path = tmp_path / "net.safetensors"
    reparam.save_deploy(fused, path)
    build = lambda: Branches().double()  # noqa: E731
    assert_equal(reparam.load_deploy(build, path, fuse=fuse), model, images())
    for other in (partial(fuse, example_inputs=images(8, 8)), reparam.fuse):
        with pytest.raises(ReparamError, match="does not fit"):
            reparam.load_deploy(build, path, fuse=other)


def test_float32() -> None:
    model = wide(Branches())
    x = images()
    single = reparam.fuse(copy.deepcopy(model).float(), example_inputs=x.float(), bias_maps=True)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    with torch.no_grad():
        assert float((single(x.float()) - model(x)).abs().max() / model(x).abs().max()) < 1e-5


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export(suffix: str, tmp_path: Path) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, x = wide(Branches()).float(), images().float()
    fused = reparam.fuse(model, example_inputs=x, bias_maps=True)
    assert maps(fused)
    assert reparam.export(fused, x, tmp_path / f"net.{suffix}", original=model, dynamic_batch=True).ok


def test_fusing_again_changes_nothing() -> None:
    fused = reparam.fuse(wide(Branches()), example_inputs=images(), bias_maps=True)
    twice = reparam.fuse(fused, example_inputs=images(), bias_maps=True)
    assert twice.state_dict().keys() == fused.state_dict().keys()


# --- algebra ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_the_map_is_what_the_border_adds(data: st.DataObject) -> None:
    """Against torch's own operations, one after the other, on one axis and on two."""
    axes = data.draw(st.integers(1, 2))
    each = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation, lo, hi = each(1, 4), each(1, 3), each(1, 2), each(-1, 3), each(-1, 3)
    groups, size = data.draw(st.sampled_from([1, 2])), tuple(n + 9 for n in each(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(6, 4 // groups, *kernel, dtype=torch.float64)
    conv = Conv(6, 4, kernel, stride, dilation, lo, hi, groups, weight, lengths=size, one_size=True)
    scale, shift = torch.randn(2, 4, dtype=torch.float64)
    inner = Affine({"x": diagonal(4, axes, scale)}, biased=True, bias=shift)
    result = substitute(Affine({"v": conv}), {"v": inner})
    assert isinstance(result, Affine)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    flat = (-1, *(1,) * axes)
    amounts = [p for a, b in zip(reversed(lo), reversed(hi), strict=True) for p in (a, b)]
    run = (F.conv1d, F.conv2d)[axes - 1]
    wanted = run(
        F.pad(scale.reshape(flat) * x + shift.reshape(flat), amounts), weight, None, stride, 0, dilation, groups
    )
    assert result.bias is not None
    total = result.terms["x"]
    found = run(F.pad(x, amounts), total.weight, None, stride, 0, dilation, total.groups)
    bias = result.bias if result.size is not None else result.bias.reshape(flat)
    assert result.size is None or tuple(result.bias.shape) == (6, *result.size) == tuple(wanted.shape[1:])
    assert (result.size is not None) == any(p > 0 for p in (*lo, *hi))
    assert torch.allclose(found + bias, wanted, atol=1e-11)


def test_other_lengths_or_none_refuse() -> None:
    conv = Conv(4, 4, (3,), (1,), (1,), (1,), (1,))
    inner = Affine({"x": diagonal(4, 1)}, biased=True)
    for outer in (
        conv,
        Conv(4, 4, (3,), (1,), (1,), (1,), (1,), lengths=(7,)),
        Conv(4, 4, (3,), (1,), (1,), (1,), (1,), one_size=True),
    ):
        assert isinstance(substitute(Affine({"v": outer}), {"v": inner}), Refusal)


def test_in_place_and_as_plain_data() -> None:
    model = wide(Branches())
    changed = copy.deepcopy(model)
    reparam.fuse(changed, example_inputs=images(), bias_maps=True, inplace=True)
    assert_equal(changed, model, images())
    stored = io.BytesIO()
    torch.save(changed, stored)
    stored.seek(0)
    (region,) = reparam.receipt(torch.load(stored, weights_only=False)).regions
    assert region.after[-1] == "bias map 9x8, for this size only"
    assert region.error is not None
    assert region.error < 1e-12
