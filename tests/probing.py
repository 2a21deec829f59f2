"""What a module does, seen from outside: how often a run calls what, and whether dense probing finds one convolution.

Neither looks at the code under test: `tally` watches the calls of one run, `probe` pushes every unit impulse through.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from market import Counts
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = {f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)}
MATRICES = {"linear", "bilinear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum"}
NORMS = {"batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"}
POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
ADDITIONS = {"add", "sub", "subtract", "rsub", "add_", "sub_"}
SCALINGS = {"mul", "div", "multiply", "divide", "true_divide", "mul_", "div_"}


@dataclass(frozen=True)
class Tally:
    """What one run called on its input, and what on constants."""

    counts: Counts
    constant: int  # convolutions, matrix products and norms on constants alone
    macs: int  # multiply-adds on the input; a pool counts its taps, a norm, scale or addition one per element


class Watch(TorchFunctionMode):
    """Counts calls, telling the values that depend on the input from constants."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {id(x): x for x in inputs}  # kept alive, so that no id is used twice
        self.found = {"convs": 0, "norms": 0, "adds": 0, "scales": 0}
        self.constant = 0
        self.macs = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        operands = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in operands if isinstance(leaf, Tensor)]
        live = [tensor for tensor in tensors if id(tensor) in self.kept]
        name = getattr(func, "__name__", "").strip("_")
        name = name[1:] if name[:1] in "ir" and name[1:] in {"add", "sub", "mul", "truediv"} else name
        name = "div" if name == "truediv" else name
        if live:
            written = [args[0]] if name == "setitem" else []
            for tensor in tree_leaves(out) + written:
                if isinstance(tensor, Tensor):
                    self.kept[id(tensor)] = tensor
            self._count(name, operands, tensors, live, out)
        elif tensors and name in CONVOLUTIONS | MATRICES | NORMS:
            self.constant += 1
        return out

    def _count(self, name: str, operands: list[Any], tensors: list[Tensor], live: list[Tensor], out: Any) -> None:
        if name in CONVOLUTIONS:
            x, weight = tensors[:2]
            size = x if "transpose" in name else out
            self.found["convs"] += 1
            self.macs += size.numel() * math.prod(weight.shape[1:])
        elif name in MATRICES:
            self.found["convs"] += len(live) < len(tensors)
            width = live[0].shape[1] if name == "einsum" else live[0].shape[-1]
            self.macs += out.numel() * width
        elif name in NORMS:
            self.found["norms"] += 1
            self.macs += out.numel()
        elif name in POOLS:
            kernel = operands[1]
            self.macs += out.numel() * (kernel if name == "avg_pool1d" else kernel ** (out.ndim - 2))
        elif name in ADDITIONS and len(tensors) == 2:
            self.found["adds"] += 1
            self.macs += out.numel()
        elif name in SCALINGS and len(live) == 1:
            self.found["scales"] += 1
            self.macs += out.numel()


def tally(module: nn.Module, inputs: Sequence[Tensor]) -> Tally:
    """Run a copy of the module once and count."""
    module = copy.deepcopy(module)
    inputs = [x.clone() for x in inputs]
    with torch.no_grad(), Watch(inputs) as watch:
        module(*inputs)
    return Tally(Counts(**watch.found), watch.constant, watch.macs)


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.PReLU, nn.LeakyReLU)


def without_activations(module: nn.Module) -> nn.Module:
    """A copy whose activation modules are gone."""
    module = copy.deepcopy(module)
    for child in module.modules():
        for name, grandchild in child.named_children():
            if type(grandchild) in ACTIVATIONS:
                setattr(child, name, nn.Identity())
    return module


Offset = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """Whether a map of one size is a zero-padded convolution: its taps, or the first thing that fails."""

    failure: str  # empty: it is one
    size: tuple[int, ...]
    stride: int = 1
    taps: Mapping[Offset, Tensor] = field(default_factory=dict)  # offset of the input -> (out, in), zeros left out
    reach: tuple[tuple[int, int], ...] = ()  # per axis, the least and the largest offset that this size can show
    bias: Tensor | None = None  # (out,)


def probe(module: nn.Module, channels: int, size: tuple[int, ...], tolerance: float = 1e-9) -> Probe:
    """Push all impulses of one size through and look for one zero-padded convolution.

    The map is one iff it is affine, its bias is constant over space, and its dense matrix holds, at every place up
    to the border, one matrix per offset `input - stride * output`.
    """

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x.clone())

    places = math.prod(size)
    origin = run(torch.zeros(1, channels, *size, dtype=torch.float64))  # (1, out, *size out)
    impulses = torch.eye(channels * places, dtype=torch.float64).view(-1, channels, *size)
    columns = torch.cat([run(part) for part in impulses.split(256)]) - origin
    x = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("np,p...->n...", x.flatten(1), columns) + origin
    tolerance *= float(expected.abs().max()) + 1.0
    if (run(x) - expected).abs().max() > tolerance:
        return Probe("not affine", size)
    bias = origin[0].flatten(1)
    if (bias - bias[:, :1]).abs().max() > tolerance:
        return Probe("the bias varies over space", size)

    out_size = tuple(columns.shape[2:])
    matrix = columns.view(channels, places, columns.shape[1], -1)  # (in, places, out, places out)
    failures = {}
    for stride in (1, 2, 3, 4):
        taps, reach, failures[stride] = _taps(matrix, size, out_size, stride, tolerance)
        if taps:
            return Probe("", size, stride, taps, reach, bias[:, 0])
    return Probe(failures[max(1, round(size[0] / out_size[0]))], size)


def _taps(
    matrix: Tensor, size: tuple[int, ...], out_size: tuple[int, ...], stride: int, tolerance: float
) -> tuple[dict[Offset, Tensor], tuple[tuple[int, int], ...], str]:
    """The matrix at each offset and the reach of this size, or the reason why some offset has two matrices."""
    inputs = torch.cartesian_prod(*[torch.arange(n) for n in size]).view(-1, 1, len(size))
    outputs = torch.cartesian_prod(*[torch.arange(n) for n in out_size]).view(1, -1, len(size))
    offsets, group = torch.unique((inputs - stride * outputs).flatten(0, 1), dim=0, return_inverse=True)
    entries = matrix.permute(1, 3, 2, 0).flatten(0, 1)  # (pairs of places, out, in)
    shape = (len(offsets), *entries.shape[1:])
    index = group.view(-1, 1, 1).expand_as(entries)
    low = torch.full(shape, math.inf, dtype=entries.dtype).scatter_reduce_(0, index, entries, "amin")
    high = torch.full(shape, -math.inf, dtype=entries.dtype).scatter_reduce_(0, index, entries, "amax")
    spread = (high - low).flatten(1).amax(1)
    if spread.max() > tolerance:
        return {}, (), f"two matrices at offset {tuple(offsets[spread.argmax()].tolist())}"
    reach = tuple(zip(offsets.amin(0).tolist(), offsets.amax(0).tolist(), strict=True))
    found = {tuple(o.tolist()): tap for o, tap in zip(offsets, low, strict=True) if tap.abs().max() > tolerance}
    return found, reach, "" if found else "no taps"


def one_convolution(module: nn.Module, channels: int, sizes: Sequence[tuple[int, ...]]) -> str:
    """Empty if one and the same zero-padded convolution gives the module's output at all sizes, else why not."""
    probes = [probe(module, channels, size) for size in sizes]
    for found in probes:
        if found.failure:
            return f"{found.failure} at size {found.size}"
    first = probes[0]
    for other in probes[1:]:
        if other.stride != first.stride or not torch.allclose(other.bias, first.bias):
            return f"another stride or bias at size {other.size}"
        for offset in first.taps.keys() | other.taps.keys():
            seen = all(
                low <= o <= high for p in (first, other) for o, (low, high) in zip(offset, p.reach, strict=True)
            )
            if seen and (
                offset not in first.taps
                or offset not in other.taps
                or not torch.allclose(first.taps[offset], other.taps[offset])
            ):
                return f"another tap at offset {offset} at size {other.size}"
    return ""
