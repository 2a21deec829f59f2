"""Every operation that is lifted: its formula against the operation itself, and a case just outside of its domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from reparam.algebra import Affine, Conv, Refusal, substitute
from reparam.graph.build import build
from reparam.graph.calls import plain_name
from reparam.graph.examples import record
from reparam.graph.lift import Known, Lifted, lift
from reparam.graph.net import Net, Value
from reparam.graph.operation import Operation
from reparam.graph.reader import read
from reparam.graph.reading import reading

C = 4
SIZES = ((9, 11), (8, 10))  # odd, even
Function = Callable[[Tensor], Tensor]


# --- formulas of whole nets -----------------------------------------------------------------------


class Holding(nn.Module):
    """A forward as a plain function of the module, which holds whatever it is given."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def ready(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and float64, with wide weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.data.copy_(drawn.abs() + 0.5 if "var" in name else drawn)
    return module.double().eval()


def around(function: Callable[..., Tensor], *, before: nn.Module | None = None, **parts: Any) -> nn.Module:
    """A 1x1 convolution, which fixes the channels, and a function of its result (and of what the module holds)."""
    first = nn.Conv2d(C, C, 1) if before is None else before
    plain = function.__code__.co_argcount == 1
    held = Holding(
        lambda self, x: function(self.first(x)) if plain else function(self, self.first(x)), first=first, **parts
    )
    return ready(held)


def lifted(model: nn.Module, example: Tensor | None = None) -> tuple[Net, dict[Value, Lifted]]:
    """All values of a net with what is known of them."""
    calls = None if example is None else record(model, example)
    with reading():
        net = read(model, calls).nets[0]
        known = Known.of(net, calls)
        return net, {value: lift(value, known) for value in net.values}


def refusals(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """What a net says about the operations that could have been linear."""
    return [str(found) for found in lifted(model, example)[1].values() if isinstance(found, Refusal)]


def formula(model: nn.Module, example: Tensor | None = None) -> tuple[Affine, list[Operation]]:
    """The result of a net in terms of its input, and the operations on the way."""
    net, found = lifted(model, example)
    done: dict[Value, Affine] = {}
    operations = []
    for value, operation in found.items():
        if not isinstance(operation, Operation):
            continue
        own = operation.numbers()
        total = substitute(own, {root: done[root] for root in own.terms if root in done})
        assert not isinstance(total, Refusal), str(total)
        done[value] = total
        operations.append(operation)
    assert net.result in done, f"{net.result} is not linear: {found.get(net.result)}"
    return done[net.result], operations


def one(model: nn.Module, *inputs: Tensor, **structure: Any) -> list[Operation]:
    """Assert that a net is one convolution of its input, with these fields and the same numbers; its operations."""
    total, operations = formula(model)
    ((root, conv),) = total.terms.items()
    assert isinstance(root, Value)
    assert root.node.op == "placeholder", f"reaches back to {root} only"
    assert {name: getattr(conv, name) for name in structure} == structure
    same(model, conv, total.bias, *inputs)
    return operations


def same(model: nn.Module, conv: Conv, bias: Tensor | None, *inputs: Tensor) -> None:
    """Assert that a net computes what a convolution does."""
    module = build(conv, bias, dtype=torch.float64, device="cpu")
    for x in inputs or tuple(images(size) for size in SIZES):
        with torch.no_grad():
            wanted, found = model(x.clone()), module(x)
        assert wanted.shape == found.shape
        assert float((wanted - found).abs().max()) <= 1e-12 * float(wanted.abs().max())


def images(size: tuple[int, ...], channels: int = C) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- names ----------------------------------------------------------------------------------------


def add(a: Tensor, b: Tensor) -> Tensor:
    """A function of somebody else with the name of one of torch."""
    return a * b


def test_spellings_of_one_operation_have_one_name() -> None:
    aten = torch.ops.aten
    spellings = {
        "add": (torch.add, "add", "add_", "__radd__", aten.add.Tensor, aten.add_.Tensor, aten.add),
        "div": (torch.div, torch.true_divide, "__truediv__", aten.div.Scalar),
        "conv2d": (F.conv2d, torch.conv2d, aten.conv2d.default, aten.conv2d.padding),
        "relu": (F.relu, torch.relu, "relu_", aten.relu_.default),
        "_native_batch_norm_legit_no_training": (aten._native_batch_norm_legit_no_training.default,),
    }
    for name, targets in spellings.items():
        assert {plain_name(target) for target in targets} == {name}


def test_functions_and_operators_of_others_have_no_name() -> None:
    library = torch.library.Library("reparam_tests", "DEF")
    library.define("conv2d(Tensor x) -> Tensor")
    assert plain_name(torch.ops.reparam_tests.conv2d.default) == plain_name(add) == ""


# --- crops and strides ----------------------------------------------------------------------------

CROPS: dict[str, tuple[Function, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "constants": (lambda x: x[:, :, 1:-2, 2:], (-1, -2), (-2, 0), (1, 1)),
    "size": (lambda x: x[:, :, 1 : x.size(2) - 1, 2 : x.size(3) - 3], (-1, -2), (-1, -3), (1, 1)),
    "shape": (lambda x: x[:, :, 1 : x.shape[2] - 1, 0 : x.shape[-1] - 2], (-1, 0), (-1, -2), (1, 1)),
    "part of a shape": (lambda x: x[:, :, : x.shape[2:][0] - 1, : x.shape[-2:][1] - 2], (0, 0), (-1, -2), (1, 1)),
    "whole size": (lambda x: x[..., : x.size()[-1] - 3], (0, 0), (0, -3), (1, 1)),
    "summed size": (lambda x: x[..., 1 : -2 + x.size(-2) + 1, :], (-1, 0), (-1, 0), (1, 1)),
    "beyond the end": (lambda x: x[:, :, 1 : x.size(2) + 2, :], (-1, 0), (0, 0), (1, 1)),
    "every second": (lambda x: x[:, :, ::2, ::2], (0, 0), (0, 0), (2, 2)),
    "every third from behind": (lambda x: x[..., 1::3], (0, -1), (0, 0), (1, 3)),
    "narrow": (lambda x: x.narrow(-1, 2, x.size(-1) - 5), (0, -2), (0, -3), (1, 1)),
    "torch.narrow": (lambda x: torch.narrow(x, -2, 1, x.size(-2) - 2), (-1, 0), (-1, 0), (1, 1)),
}


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS.keys())
def test_crops(crop: tuple[Function, Any, Any, Any]) -> None:
    function, lo, hi, stride = crop
    one(around(function), kernel=(1, 1), lo=lo, hi=hi, stride=stride)


def unpacked(x: Tensor) -> Tensor:
    _, _, height, width = x.shape
    return x[:, :, 1 : height - 1, 2 : width - 2]


def test_a_crop_to_sizes_that_were_unpacked() -> None:
    operations = one(around(unpacked), lo=(-1, -2), hi=(-1, -2))
    assert [part.name for part in operations[-1].covers], "the sizes belong to the slice"


def test_sizes_that_others_read_are_no_part_of_a_slice() -> None:
    def twice(x: Tensor) -> Tensor:
        height = x.size(2)
        return x[:, :, 1 : height - 1, 1:-1] - x[:, :, 0 : height - 2, 2:]

    total, operations = formula(around(twice))
    assert not any(operation.covers for operation in operations)
    assert len(total.terms) == 1


def test_one_index_per_axis_needs_a_rank() -> None:
    norm = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))  # which takes images in a batch only
    for function in (lambda x: x[:, :, 1:-1], lambda x: x.narrow(2, 1, x.size(2) - 2)):
        one(around(function, before=norm), lo=(-1, 0), hi=(-1, 0))
        assert any("the rank of the value is not known" in text for text in refusals(around(function)))


NO_CROPS: dict[str, tuple[Function, str]] = {
    "fixed end": (lambda x: x[..., :5], "depends on the size"),
    "from the far end": (lambda x: x[..., -3:], "depends on the size"),
    "half": (lambda x: x[..., : x.size(-1) // 2], "its ends depend on the input"),
    "size of another axis": (lambda x: x[..., : x.size(-2) - 1], "size of another axis"),
    "size of another value": (lambda x: x[..., : F.relu(x).size(-1) - 1], "its ends depend on the input"),
    "start from the size": (lambda x: x[..., x.size(-1) - 3 :], "its ends depend on the input"),
    "narrow to a fixed size": (lambda x: x.narrow(-1, 0, 4), "depends on the size"),
}


@pytest.mark.parametrize("crop", NO_CROPS.values(), ids=NO_CROPS.keys())
def test_slices_that_are_no_crop_for_every_size(crop: tuple[Function, str]) -> None:
    function, why = crop
    (found,) = refusals(around(function))
    assert found.startswith("slice")
    assert why in found


def test_slices_of_channels_are_not_spatial() -> None:
    assert not refusals(around(lambda x: x[:, 1:]))
    assert not refusals(around(lambda x: x.narrow(-3, 0, 2)))


# --- products with matrices -----------------------------------------------------------------------


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


LINEAR: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "F.linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": weights(5, C), "b": weights(5)}),
    "matmul": (lambda m, x: torch.matmul(x, m.w.T) + m.b, {"w": weights(5, C), "b": weights(5)}),
    "operator": (lambda m, x: x @ m.w.transpose(0, 1) - m.b, {"w": weights(5, C), "b": weights(5)}),
    "einsum": (lambda m, x: torch.einsum("bnc,dc->bnd", x, m.w), {"w": weights(5, C)}),
    "einsum, transposed": (lambda m, x: torch.einsum("cd,bnc->bnd", m.w, x), {"w": weights(C, 5)}),
    "einsum with an ellipsis": (lambda m, x: torch.einsum("... c, d c -> ... d", x, m.w), {"w": weights(5, C)}),
    "low rank": (
        lambda m, x: F.linear(x, m.w) + (x @ m.a.T @ m.b.T) * 0.5,
        {"w": weights(5, C), "a": weights(2, C), "b": weights(5, 2)},
    ),
    "low rank, scaled per channel": (
        lambda m, x: (x @ m.a.T @ m.b.T) * m.s / 3,
        {"a": weights(2, C), "b": weights(5, 2), "s": weights(5)},
    ),
    "low rank, layers": (
        lambda m, x: m.w(x) + m.b(m.a(F.dropout(x, 0.5, False))) * 2,
        {"w": nn.Linear(C, 5), "a": nn.Linear(C, 2, bias=False), "b": nn.Linear(2, 5, bias=False)},
    ),
}


@pytest.mark.parametrize("net", LINEAR.values(), ids=LINEAR.keys())
def test_products_with_a_matrix_on_the_last_axis(net: tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]) -> None:
    function, parts = net
    model = ready(Holding(function, **parts))
    one(model, tokens(2, 7, C), tokens(3, 6, C), kernel=(), in_channels=C, out_channels=5)


def test_addmm() -> None:
    def scaled(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.b, torch.addmm(m.b, x, m.w), m.w, beta=2, alpha=0.5)

    one(ready(Holding(scaled, w=weights(C, C), b=weights(C))), tokens(7, C), tokens(6, C), kernel=())


def test_mm_takes_matrices_only() -> None:
    model = ready(Holding(lambda m, x: m.norm(x.mm(m.w)), w=weights(C, 5), norm=nn.BatchNorm1d(5)))
    assert one(model, tokens(7, C), tokens(6, C))[-1].assumed_rank is None


def test_einsum_over_images() -> None:
    model = around(
        lambda m, x: torch.einsum("bchw,kc->bkhw", x, m.w) + m.b.view(-1, 1, 1), w=weights(5, C), b=weights(5)
    )
    one(model, kernel=(1, 1), out_channels=5)
    scaled = around(lambda m, x: torch.einsum("bchw,c->bchw", x, m.s), s=weights(C))
    one(scaled, kernel=(1, 1))


NO_PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "both from the input": lambda m, x: torch.einsum("bchw,bkhw->bck", x, x),
    "over space": lambda m, x: torch.einsum("bchw,kw->bchk", x, m.w),
    "transposed result": lambda m, x: torch.einsum("bchw,kc->bhwk", x, m.w),
    "diagonal": lambda m, x: torch.einsum("bchw,kc->bk", x, m.w),
}


@pytest.mark.parametrize("function", NO_PRODUCTS.values(), ids=NO_PRODUCTS.keys())
def test_einsums_that_are_no_pointwise_map(function: Callable[[Any, Tensor], Tensor]) -> None:
    net, found = lifted(around(function, w=weights(5, C)))
    assert not isinstance(found[net.values[-1]], Operation) or found[net.values[-1]].terms.keys() != {net.values[-2]}  # type: ignore[union-attr]


def test_a_weight_that_depends_on_the_input() -> None:
    assert "linear: the weight depends on the input" in refusals(around(lambda x: F.linear(x, x[0, 0])))
    assert any("the weight depends on the input" in text for text in refusals(around(lambda x: F.conv2d(x, x))))


def test_constants_with_more_axes_than_the_value() -> None:
    linear = nn.Linear(C, C)
    model = around(lambda m, x: x * m.s, before=linear, s=torch.ones(1, 1, C))
    assert any(text.startswith("scale") for text in refusals(model)), "of a matrix it would make three axes"
    ranked = around(lambda m, x: torch.einsum("bnc,c->bnc", x, m.s) * m.s.view(1, 1, C), before=linear, s=torch.ones(C))
    one(ranked, tokens(2, 7, C), tokens(2, 6, C), kernel=())


# --- weights that the forward computes ------------------------------------------------------------


def flags(model: nn.Module) -> list[bool]:
    return [found.generated for found in lifted(model)[1].values() if isinstance(found, Operation)]


def test_weights_that_are_computed_are_marked() -> None:
    parts = {"w": weights(C, C, 3, 3), "a": weights(C, 2), "b": weights(2, C)}
    made = Holding(lambda m, x: F.conv2d(x, m.w + (m.a @ m.b)[..., None, None], padding=1), **parts)
    assert flags(ready(made)) == [True]
    assert flags(ready(Holding(lambda m, x: x @ (m.a @ m.b), **parts))) == [True]
    assert flags(ready(Holding(lambda m, x: F.linear(x, m.b.exp()), **parts))) == [True]


def test_weights_that_are_read_or_viewed_are_not_marked() -> None:
    parts = {"w": weights(C, C, 3, 3), "a": weights(C, C), "conv": nn.Conv2d(C, C, 3)}
    assert flags(ready(Holding(lambda m, x: F.conv2d(x, m.w, padding=1), **parts))) == [False]
    assert flags(ready(Holding(lambda m, x: F.conv2d(x, m.a[..., None, None]), **parts))) == [False]
    assert flags(ready(Holding(lambda m, x: x @ m.a.T, **parts))) == [False]
    assert flags(ready(Holding(lambda m, x: F.conv2d(x, m.conv.weight), **parts))) == [False]


# --- identities by their parameters ---------------------------------------------------------------

INF = math.inf
IDENTITIES: dict[str, Function | nn.Module] = {
    "leaky": nn.LeakyReLU(1.0),
    "leaky, in place": nn.LeakyReLU(1.0, inplace=True),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 1),
    "hardtanh": nn.Hardtanh(-INF, INF),
    "F.hardtanh": lambda x: F.hardtanh(x, -INF, INF),
    "threshold": nn.Threshold(-INF, 0.0),
    "F.threshold": lambda x: F.threshold(x, -INF, 3.0),
    "clamp": lambda x: x.clamp(min=-INF).clamp(max=INF),
    "clip": lambda x: torch.clip(x, -INF, INF),
    "clamp_min": lambda x: torch.clamp_max(torch.clamp_min(x, -INF), INF),
    "rrelu": nn.RReLU(0.5, 1.5),
    "F.rrelu": lambda x: F.rrelu(x, 1.0, 1.0),
    "softshrink": nn.Softshrink(0.0),
    "F.hardshrink": lambda x: F.hardshrink(x, 0.0),
    "times one": lambda x: 1 * x / 1.0 - 0 + 0.0,
    "dropout": nn.Dropout2d(0.5),
    "F.dropout": lambda x: F.dropout2d(x, 0.5, False),
    "shuffles by one": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 1), 1),
    "copies": lambda x: x.clone().contiguous()[...],
    "whole slice": lambda x: x[:, :, 0:, :],
}


@pytest.mark.parametrize("what", IDENTITIES.values(), ids=IDENTITIES.keys())
def test_identities(what: Function | nn.Module) -> None:
    model = around(lambda m, x: m.act(x), act=what) if isinstance(what, nn.Module) else around(what)
    one(model, kernel=(1, 1))


NO_IDENTITIES: dict[str, Function | nn.Module] = {
    "relu": nn.ReLU(),
    "prelu": nn.PReLU(init=1.0),
    "leaky": nn.LeakyReLU(0.1),
    "hardtanh": nn.Hardtanh(-INF, 6.0),
    "relu6": nn.ReLU6(),
    "threshold": nn.Threshold(0.0, 0.0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp by the input": lambda x: x.clamp(max=x),
    "rrelu": nn.RReLU(),
    "softshrink": nn.Softshrink(0.5),
    "F.dropout": lambda x: F.dropout(x, 0.5),
    "pixel shuffle": nn.PixelShuffle(2),
}


@pytest.mark.parametrize("what", NO_IDENTITIES.values(), ids=NO_IDENTITIES.keys())
def test_no_identities(what: Function | nn.Module) -> None:
    model = around(lambda m, x: m.act(x), act=what) if isinstance(what, nn.Module) else around(what)
    net, found = lifted(model)
    assert found[net.result] is None


@pytest.mark.parametrize("slope", [0.3, 0.999])
def test_a_slope_on_its_way_to_one_is_named(slope: float) -> None:
    wanted = f"activation: its slope is {slope}, and only a slope of 1 is linear"
    for model in (
        around(lambda m, x: m.act(x), act=nn.LeakyReLU(slope)),
        around(lambda m, x: F.leaky_relu(x, m.slope), slope=slope),
        around(lambda m, x: m.act(x), act=nn.RReLU(slope, slope)),
    ):
        (found,) = refusals(model)
        assert found.startswith(wanted)


# --- pools ----------------------------------------------------------------------------------------

POOLS: dict[str, tuple[Function | nn.Module, dict[str, Any]]] = {
    "average": (nn.AvgPool2d(3, 2, 1), {"kernel": (3, 3), "stride": (2, 2), "lo": (1, 1)}),
    "average of one": (nn.AvgPool2d(1, 2, ceil_mode=True), {"kernel": (1, 1), "stride": (2, 2)}),
    "maximum of one": (nn.MaxPool2d(1, (2, 3)), {"kernel": (1, 1), "stride": (2, 3)}),
    "maximum of one, ceiled": (nn.MaxPool2d(1, 2, ceil_mode=True), {"kernel": (1, 1), "stride": (2, 2)}),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 1, 2), {"kernel": (1, 1), "stride": (2, 2)}),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 2), {"kernel": (2, 2), "stride": (2, 2)}),
    "adaptive, no sizes": (nn.AdaptiveAvgPool2d((None, None)), {"kernel": (1, 1)}),
    "adaptive maximum, no sizes": (nn.AdaptiveMaxPool2d((None, None)), {"kernel": (1, 1)}),
    "adaptive, own sizes": (lambda x: F.adaptive_avg_pool2d(x, x.shape[-2:]), {"kernel": (1, 1)}),
    "adaptive, own axes": (lambda x: F.adaptive_avg_pool2d(x, (x.size(-2), x.size(-1))), {"kernel": (1, 1)}),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_pools(pool: tuple[Function | nn.Module, dict[str, Any]]) -> None:
    what, structure = pool
    if not isinstance(what, nn.Module):
        one(around(what), **structure)
        return
    one(around(lambda m, x: m.act(x), act=what, before=nn.Conv2d(C, C, 1, bias=False)), **structure)


NO_POOLS: dict[str, tuple[Function | nn.Module, str]] = {
    "maximum": (nn.MaxPool2d(2), ""),
    "maximum with indices": (nn.MaxPool2d(1, 2, return_indices=True), ""),
    "global": (nn.AdaptiveAvgPool2d(1), ""),
    "one axis": (nn.AdaptiveAvgPool2d((None, 1)), ""),
    "sizes exchanged": (lambda x: F.adaptive_avg_pool2d(x, (x.size(-1), x.size(-2))), ""),
    "without the padding": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "divides by another number"),
    "partial windows": (nn.AvgPool2d(3, 2, ceil_mode=True), "partial window"),
}


@pytest.mark.parametrize("pool", NO_POOLS.values(), ids=NO_POOLS.keys())
def test_pools_that_are_no_convolution(pool: tuple[Function | nn.Module, str]) -> None:
    what, why = pool
    model = around(lambda m, x: m.act(x), act=what) if isinstance(what, nn.Module) else around(what)
    net, found = lifted(model)
    last = found[next(value for value in net.values if value.index == max(v.index for v in net.values))]
    assert why in str(last) if why else last is None


# --- pads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_pads(mode: str) -> None:
    dense = {"conv": nn.Conv2d(C, C, 3)}
    one(ready(Holding(lambda m, x: m.conv(F.pad(x, (1, 1, 2, 0), mode)), **dense)), lo=(2, 1), hi=(0, 1))


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_instance_norm_that_tracks_statistics(axes: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](C, C, 3, padding=1)
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
    norm = kind(C, affine=axes != 2, track_running_stats=True)
    one(around(lambda m, x: m.norm(x), before=conv, norm=norm), images((7, 5, 6)[:axes]), images((6, 8, 4)[:axes]))


def test_instance_norm_as_a_function() -> None:
    def fixed(m: Any, x: Tensor) -> Tensor:
        return F.instance_norm(x, m.mean, m.var, m.gamma, m.beta, False, 0.1, 1e-3)

    parts = {"mean": torch.zeros(C), "var": torch.ones(C), "gamma": weights(C), "beta": weights(C)}
    one(around(fixed, **parts), kernel=(1, 1))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(C), nn.InstanceNorm2d(C, track_running_stats=True).train()])
def test_instance_norm_of_every_image(norm: nn.Module) -> None:
    model = around(lambda m, x: m.norm(x), norm=norm)
    norm.train(norm.track_running_stats)  # type: ignore[arg-type]
    net, found = lifted(model)
    assert found[net.result] is None


def test_a_frozen_norm_of_torchvision() -> None:
    misc = pytest.importorskip("torchvision.ops.misc")
    model = ready(nn.Sequential(nn.Conv2d(C, C, 3, 2, bias=False), misc.FrozenBatchNorm2d(C, eps=1e-3)))
    one(model, kernel=(3, 3), stride=(2, 2))


def test_a_norm_without_statistics() -> None:
    model = around(lambda m, x: F.batch_norm(x, None, None, training=True))
    assert "norm: it uses the statistics of the batch; to fuse: call eval() on the module" in refusals(model)


# --- norms of matrices ----------------------------------------------------------------------------

RANKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], int | None]] = {
    "nothing known": (lambda m, x: m.norm(m.linear(x)), (7, C), 2),
    "tokens put in one row": (lambda m, x: m.norm(m.linear(x).flatten(0, 1)), (2, 7, C), 2),
    "flattened": (lambda m, x: m.norm(m.linear(x.flatten(1))), (7, C), None),
    "flattened by a module": (lambda m, x: m.norm(m.linear(m.flat(x))), (7, C, 1, 1), None),
    "pooled and squeezed": (lambda m, x: m.norm(m.linear(m.pool(x).squeeze(-1).squeeze(-1))), (7, C, 3, 3), None),
    "mean over space": (lambda m, x: m.norm(m.linear(m.conv(x).mean((2, 3)))), (7, C, 3, 3), None),
    "first token": (lambda m, x: m.norm(m.linear(m.conv(x).flatten(2).transpose(1, 2)[:, 0])), (7, C, 3, 3), None),
    "mean over tokens": (
        lambda m, x: m.norm(m.linear(m.conv(x).flatten(2).transpose(1, 2)).mean(1)),
        (7, C, 3, 3),
        None,
    ),
    "viewed": (lambda m, x: m.norm(m.linear(x).view(-1, C)), (2, 7, C), None),
    "einsum": (lambda m, x: m.norm(m.linear(torch.einsum("bc,dc->bd", x, m.linear.weight))), (7, C), None),
}


@pytest.mark.parametrize("net", RANKS.values(), ids=RANKS.keys())
def test_ranks_in_front_of_a_norm(net: tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], int | None]) -> None:
    function, shape, assumed = net
    parts = {"linear": nn.Linear(C, C), "norm": nn.BatchNorm1d(C), "conv": nn.Conv2d(C, C, 1)}
    model = ready(Holding(function, flat=nn.Flatten(), pool=nn.AdaptiveAvgPool2d(1), **parts))
    model(tokens(*shape))
    norms = [found for found in lifted(model)[1].values() if isinstance(found, Operation) and found.norm]
    assert [norm.assumed_rank for norm in norms] == [assumed]
    assert next(iter(norms[0].terms.values())).axes == 0


def test_an_example_gives_the_rank() -> None:
    model = ready(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)))
    assert formula(model)[1][-1].assumed_rank == 2
    assert formula(model, tokens(7, C))[1][-1].assumed_rank is None
    one(model, tokens(7, C), tokens(6, C), kernel=())


def test_a_norm_of_three_axes_behind_a_linear_layer() -> None:
    """Its channels are the tokens, of which there happen to be as many as features."""
    model = ready(Holding(lambda m, x: m.norm(m.linear(x.unflatten(1, (C, C)).flatten(2))), linear=nn.Linear(C, C),
                          norm=nn.BatchNorm1d(C)))  # fmt: skip
    model(tokens(7, C * C))
    net, found = lifted(model)
    assert isinstance(found[net.result], Refusal)
    assert "its input has its channels elsewhere" in str(found[net.result])


def test_a_norm_of_sequences() -> None:
    conv = nn.Conv1d(C, C, 3)
    assert one(around(lambda m, x: m.norm(x), before=conv, norm=nn.BatchNorm1d(C)), images((7,)), images((6,)),
               kernel=(3,))[-1].assumed_rank is None  # fmt: skip


def test_an_example_tells_that_a_sum_does_not_broadcast() -> None:
    model = ready(Holding(lambda m, x: m.conv(m.shift + x), conv=nn.Conv2d(C, 2, 1), shift=torch.zeros(1, C, 1, 1)))
    assert any(text.startswith("constant_add") for text in refusals(model))
    total, _ = formula(model, images(SIZES[0]))
    same(model, next(iter(total.terms.values())), total.bias)


# --- parts of an operation ------------------------------------------------------------------------


def test_a_stack_that_is_read_twice_stays() -> None:
    def twice(x: Tensor) -> Tensor:
        stacked = torch.stack([x, 2 * x])
        return stacked.sum(0) + stacked.amax(0)

    assert any(text.startswith("used_elsewhere: a part of it, stack") for text in refusals(around(twice)))


# --- exported programs ----------------------------------------------------------------------------


class Mixed(nn.Module):
    """Branches, norms, pools, pads, slices, in all their forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3), nn.Conv2d(C, C, (1, 3), padding="same", bias=False)
        self.n, self.m = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.pool, self.drop, self.pad = nn.AvgPool2d(3, 1, 1), nn.Dropout(), nn.ZeroPad2d(1)
        self.scale = nn.Parameter(torch.ones(C, 1, 1))
        self.last = nn.Conv2d(C, C, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(self.pad(x))) + self.m(self.b(x))
        y = torch.add(y, self.pool(x), alpha=2) - self.scale * x
        y = F.hardtanh(self.drop(y), -INF, INF)
        y = F.leaky_relu(y, 1.0) * 2
        return self.last(y[:, :, 1:-1, ::2]) / 3 - 1


def exported(model: nn.Module, x: Tensor, *, decomposed: bool = False) -> nn.Module:
    """The module of an exported program for images of any size."""
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    return (program.run_decompositions() if decomposed else program).module()


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_exported_programs(decomposed: bool) -> None:
    model = ready(Mixed())
    program = exported(model, images(SIZES[0]), decomposed=decomposed)
    names = {plain_name(v.node.target) for v in lifted(program)[0].values if v.node.op == "call_function"}
    assert ("convolution" if decomposed else "conv2d") in names
    one(program, kernel=(4, 5), stride=(1, 2))
    total, _ = formula(model)
    ours, _ = formula(program)
    for (_, a), (_, b) in zip(total.terms.items(), ours.terms.items(), strict=True):
        assert a.weight is not None
        assert b.weight is not None
        assert torch.allclose(a.weight, b.weight, atol=1e-12)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_exported_linear_layers(decomposed: bool) -> None:
    model = ready(nn.Sequential(nn.Linear(C, 3), nn.BatchNorm1d(3), nn.Linear(3, 5)))
    program = torch.export.export(model, (tokens(7, C),))
    program = program.run_decompositions() if decomposed else program
    operations = one(program.module(), tokens(7, C), kernel=(), out_channels=5)
    assert all(operation.assumed_rank is None for operation in operations)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_an_exported_transposed_convolution(decomposed: bool) -> None:
    model = ready(nn.Sequential(nn.ConvTranspose2d(C, 6, 3, 2, 1, output_padding=1, groups=2), nn.BatchNorm2d(6)))
    program = exported(model, images(SIZES[0]), decomposed=decomposed)
    one(program, transposed=True, stride=(2, 2), groups=2, output_padding=(1, 1))


def test_an_exported_crop_to_the_size_of_another_value() -> None:
    crop = exported(around(lambda x: x[:, :, 1 : x.size(2) - 1]), images(SIZES[0]))
    assert any("its ends depend on the input" in text for text in refusals(crop)), "it takes the size of the input"


def test_an_exported_operation_in_place_is_not_moved() -> None:
    def writes(x: Tensor) -> Tensor:
        rows = x.flatten(2)
        x.add_(1)
        return x.flatten(2) * rows

    net, found = lifted(exported(around(writes), images(SIZES[0])))
    (writer,) = [value for value in net.values if value.node.target is torch.ops.aten.add_.Tensor]
    assert "in_place" in str(found[writer])


# --- hooks and parametrizations keep what they did ------------------------------------------------


def test_parametrized_weights_are_those_of_eval_mode() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(C, C, 3))
    one(ready(nn.Sequential(conv, nn.BatchNorm2d(C))), kernel=(3, 3))
