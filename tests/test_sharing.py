"""What fusing shares and computes late is what each module would give by itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.algebra import Conv, Pending, branch_sum, diagonal, identity
from reparam.algebra.conv_after_conv import conv_after_conv
from reparam.algebra.groups import rows
from reparam.graph import direct
from reparam.graph.direct import by_columns, tap_by_tap
from reparam.graph.likeness import Likeness
from reparam.graph.reader import read
from reparam.graph.reading import reading


class Branches(nn.Module):
    """A block whose forward may look at what it holds."""

    def __init__(self, looks: str = "") -> None:
        super().__init__()
        self.wide, self.thin = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.gate = nn.Parameter(torch.ones(1))
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        if self.looks == "item" and self.gate.item() > 0:
            y = y + self.thin(x)
        if self.looks == "bool" and self.gate > 0:
            y = y + self.thin(x)
        if self.looks == "numpy" and self.gate.detach().numpy()[0] > 0:
            y = y + self.thin(x)
        if self.looks == "weight":
            y = y + F.conv2d(x, self.thin.weight.softmax(0), padding=0)
        return torch.relu(self.norm(y))


def same(model: nn.Module, fused: nn.Module) -> bool:
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted, found = model(x), fused(x)
    return bool((wanted - found).abs().max() <= 1e-10 * wanted.abs().max())


@pytest.mark.parametrize("looks", ["", "item", "bool", "numpy", "weight"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_looks_at_weights_is_read_for_each_module(looks: str, inplace: bool) -> None:
    model = randomise(nn.Sequential(*(Branches(looks) for _ in range(3)))).double().eval()
    for block, gate in zip(model, (1.0, -1.0, 1.0), strict=True):
        block.gate.data.fill_(gate)
    assert same(model, reparam.fuse(copy.deepcopy(model), inplace=inplace))


def test_alike_modules_are_read_once_and_edited_apart() -> None:
    model = randomise(nn.Sequential(*(Branches() for _ in range(3)), nn.Sequential(Branches(), nn.ReLU()))).eval()
    with reading():
        (net,) = read(model).nets
    traces = [frame.trace for frame in net.frames if isinstance(frame.module, Branches)]
    assert len(traces) == 4
    assert len({id(trace.graph) for trace in traces}) == 1
    assert [trace.module for trace in traces] == [*list(model)[:3], model[3][0]]
    model = model.double()
    assert same(model, reparam.fuse(model, exclude=("1.*",)))


def different(change: Any) -> bool:
    pair = nn.Sequential(Branches(), Branches())
    change(pair[1])
    like = Likeness(pair)
    return like.number(pair[0]) is None or like.number(pair[0]) != like.number(pair[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "looks", "item"),
        lambda block: setattr(block, "extra", 1),
        lambda block: setattr(block, "extra", object()),
        lambda block: setattr(block, "extra", torch.zeros(1)),
        lambda block: setattr(block, "wide", nn.Conv2d(4, 4, 3, padding=1)),
        lambda block: setattr(block.wide, "padding", (0, 0)),
        lambda block: setattr(block.norm, "eps", 1e-3),
        lambda block: block.norm.eval(),
        lambda block: block.half(),
        lambda block: block.gate.requires_grad_(False),
        lambda block: block.register_forward_hook(lambda *_: None),
        lambda block: block.thin.register_forward_pre_hook(lambda *_: None),
        lambda block: setattr(block, "forward", lambda x: x),
        lambda block: setattr(block, "other", block.wide),
        lambda block: setattr(block.thin, "bias", block.norm.bias),
    ],
)
def test_what_tells_modules_apart(change: Any) -> None:
    assert different(change)
    assert not different(lambda block: block.wide.weight.data.zero_())


@pytest.mark.parametrize("groups", [(1, 1), (1, 4), (2, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_that_are_computed_late(groups: tuple[int, int], dtype: torch.dtype) -> None:
    ones, zeros = (1, 1), (0, 0)
    fewer, more = groups
    wide = Conv(8, 8, (3, 5), ones, (1, 1), (1, 2), (1, 2), fewer, torch.randn(8, 8 // fewer, 3, 5).to(dtype))
    thin = Conv(8, 8, ones, ones, ones, zeros, zeros, more, torch.randn(8, 8 // more, 1, 1).to(dtype))
    scale = diagonal(8, 2, torch.randn(8, dtype=torch.float64))

    def late(conv: Conv) -> Conv:
        assert conv.weight is not None
        return Conv(*(getattr(conv.structure, name) for name in NAMES), pending=Pending.of(conv.structure, conv.weight))

    def total(first: Conv, second: Conv) -> Conv:
        branch = conv_after_conv(scale, first)
        assert isinstance(branch, Conv)
        inner = branch_sum([branch, second])
        assert isinstance(inner, Conv)
        outer = conv_after_conv(scale, inner)
        assert isinstance(outer, Conv)
        result = branch_sum([outer, identity(8, 2)])
        assert isinstance(result, Conv)
        return result

    early = total(wide, thin)
    for pair in ((late(wide), late(thin)), (late(wide), thin), (wide, late(thin))):
        found = total(*pair)
        assert found.structure.kernel == early.kernel
        assert (rows(found) - rows(early)).abs().max() < 1e-12


NAMES = (
    "out_channels", "in_channels", "kernel", "stride", "dilation", "lo", "hi", "groups", "weight", "identity",
)  # fmt: skip


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("way", "groups", "out", "inner"),
    [
        (by_columns, 4, 2, 3),
        (by_columns, 5, 3, 1),
        (by_columns, 4, 1, 2),
        (by_columns, 1, 4, 3),
        (by_columns, 6, 1, 1),
        (tap_by_tap, 6, 1, 1),
        (tap_by_tap, 1, 1, 1),
    ],
)
def test_convolutions_of_the_check_are_those_of_torch(
    axes: int, way: Callable[..., Tensor], groups: int, out: int, inner: int
) -> None:
    convolution = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    x = torch.randn(2, groups * inner, *range(7, 7 + axes), dtype=torch.float64)
    bias = torch.randn(groups * out, dtype=torch.float64)
    for kernel, stride, padding, dilation in itertools.product(((3, 2, 1), (1, 1, 2)), (1, 2), (0, 2), (1, 2)):
        weight = torch.randn(groups * out, inner, *kernel[:axes], dtype=torch.float64)
        options = (stride,) * axes, (padding,) * axes, (dilation, *(1,) * (axes - 1)), groups
        for shift in (bias, None):
            wanted, found = convolution(x, weight, shift, *options), way(x, weight, shift, *options)
            assert wanted.shape == found.shape
            assert (wanted - found).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("layer", "way"),
    [
        (nn.Conv2d(256, 256, 1), "by_columns"),
        (nn.Conv2d(128, 128, 3), "by_columns"),
        (nn.Conv1d(64, 128, 3, groups=64), "by_columns"),
        (nn.Conv3d(32, 32, 3, groups=32), "tap_by_tap"),
        (nn.Conv2d(32, 32, 13, groups=32), ""),
        (nn.Conv2d(8, 8, 3), ""),
    ],
    ids=lambda case: str(case),
)
def test_the_check_takes_the_faster_way(layer: nn.Module, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            taken.append(name)
            return function(*args)

        return run

    for name in ("by_columns", "tap_by_tap"):
        monkeypatch.setattr(direct, name, noted(name, getattr(direct, name)))
    layer.double()
    x = torch.randn(2, layer.in_channels, *range(15, 15 + layer.weight.dim() - 2), dtype=torch.float64)
    with torch.no_grad(), direct.Direct():
        found = layer(x)
    assert (found - layer(x)).abs().max() < 1e-12
    assert taken == [way] * bool(way)


def test_an_error_while_copying_leaves_the_model_as_it_was() -> None:
    class Uncopied:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copy")

    model = nn.Sequential(Branches(), Branches()).eval()
    model.tag = Uncopied()  # type: ignore[assignment]
    before = [(type(module), dict(module._modules), dict(module._parameters)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="no copy"):
        reparam.fuse(model)
    assert before == [(type(module), dict(module._modules), dict(module._parameters)) for module in model.modules()]


def test_the_model_is_what_it_was_after_it_was_fused_into_a_copy() -> None:
    model = randomise(nn.Sequential(Branches(), Branches())).double().eval()
    before = [(module, type(module), list(module.__dict__.items())) for module in model.modules()]
    keys = list(model.state_dict())
    fused = reparam.fuse(model)
    assert before == [(module, type(module), list(module.__dict__.items())) for module in model.modules()]
    assert list(model.state_dict()) == keys
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert own.isdisjoint(t.data_ptr() for t in fused.state_dict().values())
    assert same(model, fused)
