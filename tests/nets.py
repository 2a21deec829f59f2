"""Small nets and the oracle of `fuse`: same numbers in float64, counted calls, wide random statistics."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter, UninitializedTensorMixin
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reparam

C = 6  # channels of the small nets
SIZES = ((9, 11), (12, 8))  # one odd, one even
M = TypeVar("M", bound=nn.Module)


def images(size: Sequence[int] = SIZES[0], channels: int = C, batch: int = 2, seed: int = 0) -> Tensor:
    """Random images in float64, shape `(batch, channels, *size)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def randomise(model: M, seed: int = 0) -> M:
    """Put wide numbers in: norm means N(0, 1), variances U(0.5, 2), gammas of both signs, biases N(0, 1).

    Works in place and returns the model. A parameter of one long axis (norm weights, layer scales, biases of shape
    `(C,)`, `(C, 1, 1)`, `(1, C, 1, 1)`) is drawn as above, every other one (kernels) from N(0, 1 / fan-in): the seed
    decides all numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    def signed(like: Tensor) -> Tensor:
        draw = torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5
        sign = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
        return (draw * sign).to(like)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter) or parameter.is_meta or not parameter.is_floating_point():
                continue
            if parameter.numel() == max(parameter.shape, default=1) and parameter.numel() > 0:
                parameter.copy_(normal(parameter) if name.endswith("bias") else signed(parameter))
            elif parameter.numel() > 0:
                parameter.copy_(normal(parameter) / (parameter.numel() / parameter.shape[0]) ** 0.5)
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(buffer, UninitializedTensorMixin) or buffer.is_meta:
                continue
            if name == "running_mean":
                buffer.copy_(normal(buffer))
            elif name == "running_var":
                buffer.copy_(
                    (torch.rand(buffer.shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5).to(buffer)
                )
    return model


def ready(model: M, seed: int = 0) -> M:
    """The model with wide random numbers, in float64 and eval mode."""
    randomise(model, seed).to(torch.float64)
    model.eval()
    return model


# --- the oracle -----------------------------------------------------------------------------------


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested output with its path; containers yield their own type first: a list is no tuple."""
    if isinstance(value, Mapping):
        yield path, (type(value), tuple(value))
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield path, (type(value), len(value))
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, type(value)
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    else:
        yield path, value


def difference(expected: Any, found: Any, floor: float = 1e-6) -> float:
    """Largest error of any tensor in a nested value, relative to its largest finite magnitude (at least `floor`).

    Raises:
        AssertionError: when the structure, a shape, a dtype, a device, a leaf that is no tensor or the places of inf
            and NaN differ.
    """
    left, right = list(leaves(expected)), list(leaves(found))
    assert [path for path, _ in left] == [path for path, _ in right], f"other structure: {left} / {right}"
    worst = 0.0
    for (path, a), (_, b) in zip(left, right, strict=True):
        if not isinstance(a, Tensor):
            assert a == b or (a != a and b != b), f"{path}: expected {a!r}, found {b!r}"
            continue
        assert isinstance(b, Tensor), f"{path}: expected a tensor, found {type(b)}"
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), (
            f"{path}: expected {tuple(a.shape)} {a.dtype} {a.device}, found {tuple(b.shape)} {b.dtype} {b.device}"
        )
        if a.is_meta or not a.numel():
            continue
        a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
        finite = a.isfinite()
        assert torch.equal(finite, b.isfinite()), f"{path}: inf or NaN in other places"
        special = a[~finite]
        assert torch.equal(special.isnan(), b[~finite].isnan()), f"{path}: NaN in other places"
        assert torch.equal(special[~special.isnan()], b[~finite][~special.isnan()]), f"{path}: inf of another sign"
        error, size = (a - b)[finite].abs(), a[finite].abs()
        if error.numel() and error.max() > 0:
            worst = max(worst, float(error.max() / max(float(size.max()), floor)))
    return worst


def run(model: Callable[..., Any], inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, Any]:
    """Output of the model on a copy of the inputs, and the inputs afterwards: a caller's tensor may be written to."""
    inputs, keywords = copy.deepcopy((inputs, dict(keywords)))
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*inputs, **keywords), (inputs, keywords)


def same(
    model: Callable[..., Any],
    fused: Callable[..., Any],
    *inputs: Any,
    tolerance: float = 1e-10,
    floor: float = 1e-6,
    **keywords: Any,
) -> float:
    """Assert the same nested output and the same state of the caller's inputs afterwards; returns the error."""
    expected, ours = run(model, inputs, keywords), run(fused, inputs, keywords)
    worst = difference(expected[0], ours[0], floor)
    assert worst <= tolerance, f"outputs differ by {worst:.2e} relative (allowed {tolerance:.0e})"
    assert difference(expected[1], ours[1], floor) <= tolerance, "the inputs were left in another state"
    return worst


def snapshot(model: nn.Module) -> dict[str, Any]:
    """A model's state bit for bit: parameters, buffers, the classes of its modules and their modes."""
    return {
        "state": {key: copy.deepcopy(value) for key, value in model.state_dict(keep_vars=False).items()},
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
    }


# --- counted calls --------------------------------------------------------------------------------

_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"}
_NORMS = {
    "batch_norm",
    "native_batch_norm",
    "cudnn_batch_norm",
    "_batch_norm_impl_index",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", *_CONVOLUTIONS}
_ADDS = {"add", "add_", "sub", "sub_", "rsub"}
_FREE = {"detach", "alias", "lift_fresh", "empty", "_to_copy"}


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = {"conv": 0, "product": 0, "norm": 0, "add": 0, "calls": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.found["product"] += name in _PRODUCTS
        if name in _CONVOLUTIONS:
            self.found["conv"] += 1
        elif name in _NORMS:
            self.found["norm"] += 1
        elif name in _ADDS and isinstance(output, Tensor):
            whole = [isinstance(a, Tensor) and a.ndim == output.ndim and a.ndim > 1 for a in args[:2]]
            self.found["add"] += all(whole) and len(whole) == 2
        if name not in _FREE and not func.is_view:
            self.found["calls"] += 1
        return output


class _Linears(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is nn.functional.linear
        return func(*args, **(kwargs or {}))


def counted(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[Any, dict[str, int]]:
    """Output of one run without gradients, and what `count` says of it."""
    with torch.no_grad(), _Linears() as linears, _Dispatched() as dispatched:
        output = model(*inputs, **keywords)
    return output, {**dispatched.found, "linear": linears.found, **owned(model)}


def count(model: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, int]:
    """Calls of one run and modules owned.

    `conv`, `linear`, `product` (convolutions and products of matrices), `norm` (batch norm), `add` (sums and
    differences of two whole tensors), `calls` (every operation that is no view), and `convs`, `linears`, `norms`, the
    modules that the model owns.
    """
    inputs, keywords = copy.deepcopy((inputs, dict(keywords)))
    return counted(model, *inputs, **keywords)[1]


def owned(model: nn.Module) -> dict[str, int]:
    """Convolution, linear and batch-norm modules in the model."""
    kinds = {"convs": _ConvNd, "linears": nn.Linear, "norms": _BatchNorm}
    modules = list(model.modules())
    return {name: sum(isinstance(m, kind) for m in modules) for name, kind in kinds.items()}


def becomes(model: nn.Module, *calls: Any, tolerance: float = 1e-10, **expected: int) -> nn.Module:
    """Fuse a ready model, compare it on every call (a tensor or a tuple of arguments), assert the counted calls."""
    fused = fuse_purely(model)
    for arguments in calls:
        same(model, fused, *(arguments if isinstance(arguments, tuple) else (arguments,)), tolerance=tolerance)
    first = calls[0] if isinstance(calls[0], tuple) else (calls[0],)
    found = count(fused, *first)
    assert {key: found[key] for key in expected} == expected, f"before {count(model, *first)}, after {found}"
    return fused


# --- nets -----------------------------------------------------------------------------------------


def conv(kernel: int = 3, c_in: int = C, c_out: int = C, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": kernel // 2, "bias": False, **options})


def conv_norm(kernel: int = 3, c_in: int = C, c_out: int = C, **options: Any) -> nn.Sequential:
    """A convolution and its batch norm."""
    return nn.Sequential(conv(kernel, c_in, c_out, **options), nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """3x3 and 1x1 convolutions, each with a norm, and a normed identity, summed: one 3x3 convolution when fused."""

    def __init__(self, channels: int = C, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.dense = conv_norm(3, channels, channels, stride=stride)
        self.point = conv_norm(1, channels, channels, stride=stride)
        self.skip = nn.BatchNorm2d(channels) if stride == 1 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        if self.skip is not None:
            y = y + self.skip(x)
        return self.act(y)


def is_fused(block: nn.Module) -> bool:
    """Whether a `Block` has become one convolution."""
    found = owned(block)
    return found["convs"] == 1 and found["norms"] == 0


class Beside(nn.Module):
    """A module under test with a plain block before it: whatever the module does, the block must still be fused."""

    def __init__(self, odd: nn.Module, channels: int = C) -> None:
        super().__init__()
        self.block = Block(channels)
        self.odd = odd

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return self.odd(self.block(x), *arguments, **keywords)


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


def call(*arguments: Any, **keywords: Any) -> Call:
    """Arguments of one call, as they would be written in it."""
    return Call(arguments, keywords)


def stays_right(odd: nn.Module, *calls: Tensor | Call, tolerance: float = 1e-10, **options: Any) -> Beside:
    """Fuse `Beside(odd)`, compare it with the original on every call, twice in a row; the block must be fused.

    A call is a tensor or `call(...)`, the arguments of `odd`; without any, images of two sizes are used.
    Returns the fused net.
    """
    model = ready(Beside(odd))
    fused = fuse_purely(model, **options)
    for arguments in calls or tuple(images(size) for size in SIZES):
        arguments = arguments if isinstance(arguments, Call) else call(arguments)
        for _ in range(2):
            same(model, fused, *arguments.arguments, tolerance=tolerance, **arguments.keywords)
    assert is_fused(fused.block), f"the block beside it was not fused: {owned(fused.block)}"
    return fused


def fuse_purely(model: M, **options: Any) -> M:
    """Fuse, and assert that the argument has not changed and that its class was kept."""
    before = snapshot(model)
    fused = reparam.fuse(model, **options)
    assert difference(before, snapshot(model)) == 0, "the argument was modified"
    kind = (
        torch.fx.GraphModule if isinstance(model, torch.fx.GraphModule) else type(model)
    )  # each graph module has a class of its own
    assert isinstance(fused, kind), f"class lost: {type(fused)}"
    return fused
