"""Operations of a net as affine formulas, or the reason why one is a boundary.

A lifting is a plain function of a value and what is known about the net. It returns an ``Operation``, a ``Refusal`` (the
operation is linear in principle, but not here), or None (not its business). The tuple ``LIFTINGS`` holds them in order;
extend it with ``+``.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reparam.algebra import Border, Conv, Refusal, diagonal, identity, pointwise
from reparam.algebra.sources import norm_coefficients, pool_is_conv, precise, window
from reparam.graph.effects import Effects, written
from reparam.graph.net import SHARED, Value, hooks
from reparam.graph.operation import Numbers, Operation
from reparam.graph.spaces import (
    CONV_FUNCTIONS,
    CONV_TRANSPOSE_FUNCTIONS,
    NORM_AXES,
    PRODUCTS,
    SUMS,
    Space,
    argument,
    name_of,
    narrow,
    stock,
    tensor_input,
)
from reparam.graph.proxy import assign

Lifted = Operation | Refusal | None


@final
@dataclass(frozen=True, slots=True)
class Known:
    """What is known about a net before its operations are lifted."""

    spaces: Mapping[Value, Space]
    effects: Effects

    def space(self, value: object) -> Space | None:
        """Space of a value, if known."""
        return self.spaces.get(value) if isinstance(value, Value) else None


Lifting = Callable[[Value, Known], Lifted]


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


def _detached(read: Callable[[], Tensor | None]) -> Numbers:
    def numbers() -> Tensor:
        value = read()
        assert value is not None
        return value.detach().cpu() if value.device.type == "mps" else value.detach()

    return numbers


def _weight_of(module: nn.Module) -> Numbers:
    """The weight that a module uses in eval mode, also where a hook generates it."""
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return _detached(lambda: hook.compute_weight(module))
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return _detached(lambda: hook.compute_weight(module, do_power_iteration=False))
    return _detached(lambda: module.weight)  # type: ignore[arg-type, return-value]


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = len(kernel)
    if padding == "valid":
        return (0,) * axes, (0,) * axes
    if padding == "same":  # torch puts the odd one behind
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    per_axis = _per_axis(padding, axes)
    return per_axis, per_axis


def _shape(kernel: tuple[int, ...]) -> str:
    return "x".join(map(str, kernel))


def _conv(
    source: Value,
    weight: Numbers,
    shape: tuple[int, ...],
    bias: Numbers | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    border: Border = Border.CONSTANT,
) -> Operation:
    kernel = tuple(shape[2:])
    axes = len(kernel)
    dilation = _per_axis(dilation, axes)
    lo, hi = _padding(padding, kernel, dilation)
    conv = Conv(
        out_channels=shape[0],
        in_channels=shape[1] * groups,
        kernel=kernel,
        stride=_per_axis(stride, axes),
        dilation=dilation,
        lo=lo,
        hi=hi,
        groups=groups,
        border=border,
    )
    return Operation(f"conv {_shape(kernel)}", {source: conv}, {source: weight}, bias)


def conv_module(value: Value, known: Known) -> Lifted:
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``."""
    module = value.module
    if stock(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    assert isinstance(module, nn.modules.conv._ConvNd)
    source = tensor_input(value)
    if source is None:
        return None
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return _conv(
        source,
        _weight_of(module),
        shape,
        None if module.bias is None else _detached(lambda: module.bias),
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        Border(module.padding_mode),
    )


def conv_function(value: Value, known: Known) -> Lifted:
    """``F.conv1d``, ``F.conv2d``, ``F.conv3d`` with a weight that does not depend on the input."""
    if value.module is not None or value.node.target not in CONV_FUNCTIONS:
        return None
    source = tensor_input(value)
    weight, bias = argument(value, 1, "weight"), argument(value, 2, "bias")
    if source is None or not isinstance(weight, Tensor) or isinstance(bias, Value):
        return Refusal("conv_after_conv", "the weight depends on the input")
    return _conv(
        source,
        _detached(lambda: weight),
        tuple(weight.shape),
        None if bias is None else _detached(lambda: bias),
        argument(value, 3, "stride", 1),
        argument(value, 4, "padding", 0),
        argument(value, 5, "dilation", 1),
        argument(value, 6, "groups", 1),
    )


def _transposed(
    source: Value,
    weight: Numbers,
    shape: tuple[int, ...],
    bias: Numbers | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Operation:
    kernel = tuple(shape[2:])
    axes = len(kernel)
    around = _per_axis(padding, axes)
    conv = Conv(
        out_channels=shape[1] * groups,
        in_channels=shape[0],
        kernel=kernel,
        stride=_per_axis(stride, axes),
        dilation=_per_axis(dilation, axes),
        lo=around,
        hi=around,
        groups=groups,
        transposed=True,
        output_padding=_per_axis(output_padding, axes),
    )
    return Operation(f"transposed conv {_shape(kernel)}", {source: conv}, {source: weight}, bias)


def conv_transpose_module(value: Value, known: Known) -> Lifted:
    """``nn.ConvTranspose1d``, ``2d``, ``3d``."""
    module = value.module
    if stock(module) not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        return None
    assert isinstance(module, nn.modules.conv._ConvTransposeNd)
    source = tensor_input(value)
    if source is None or len(value.inputs) > 1 or len(value.args) > 1:
        return None
    return _transposed(
        source,
        _weight_of(module),
        (module.in_channels, module.out_channels // module.groups, *module.kernel_size),
        None if module.bias is None else _detached(lambda: module.bias),
        module.stride,
        module.padding,
        module.output_padding,
        module.groups,
        module.dilation,
    )


def conv_transpose_function(value: Value, known: Known) -> Lifted:
    """``F.conv_transpose1d``, ``2d``, ``3d`` with a weight that does not depend on the input."""
    if value.module is not None or value.node.target not in CONV_TRANSPOSE_FUNCTIONS:
        return None
    source = tensor_input(value)
    weight, bias = argument(value, 1, "weight"), argument(value, 2, "bias")
    if source is None or not isinstance(weight, Tensor) or isinstance(bias, Value):
        return Refusal("conv_after_conv", "the weight depends on the input")
    return _transposed(
        source,
        _detached(lambda: weight),
        tuple(weight.shape),
        None if bias is None else _detached(lambda: bias),
        argument(value, 3, "stride", 1),
        argument(value, 4, "padding", 0),
        argument(value, 5, "output_padding", 0),
        argument(value, 6, "groups", 1),
        argument(value, 7, "dilation", 1),
    )


def linear_module(value: Value, known: Known) -> Lifted:
    """``nn.Linear``: one tap, no spatial axes."""
    module = value.module
    if stock(module) is not nn.Linear:
        return None
    assert isinstance(module, nn.Linear)
    source = tensor_input(value)
    if source is None:
        return None
    conv = pointwise(module.out_features, module.in_features, 0)
    bias = None if module.bias is None else _detached(lambda: module.bias)
    return Operation("linear", {source: conv}, {source: _weight_of(module)}, bias)


def linear_function(value: Value, known: Known) -> Lifted:
    """``F.linear`` and ``x @ W.T`` with a weight that does not depend on the input."""
    if value.module is not None:
        return None
    source = tensor_input(value)
    if value.node.target is F.linear:
        weight, bias = argument(value, 1, "weight"), argument(value, 2, "bias")
        if source is None or not isinstance(weight, Tensor) or isinstance(bias, Value):
            return Refusal("linear", "the weight depends on the input")
    elif name_of(value) in ("matmul", "__matmul__") and len(value.args) == 2:
        other, bias = value.args[1], None
        if source is None or not isinstance(other, Tensor):
            return None
        weight = other.t() if other.dim() == 2 else other
    else:
        return None
    if weight.dim() != 2:
        return None
    conv = pointwise(weight.shape[0], weight.shape[1], 0)
    return Operation(
        "linear",
        {source: conv},
        {source: _detached(lambda: weight)},
        None if bias is None else _detached(lambda: bias),
    )


def _norm(
    source: Value,
    space: Space,
    mean: Callable[[], Tensor],
    variance: Callable[[], Tensor],
    gamma: Callable[[], Tensor | None],
    beta: Callable[[], Tensor | None],
    eps: float,
) -> Operation:
    def coefficients() -> tuple[Tensor, Tensor]:
        return norm_coefficients(mean(), variance(), gamma(), beta(), eps)

    return Operation(
        "batch norm",
        {source: diagonal(space.channels, space.axes)},
        {source: lambda: coefficients()[0]},
        lambda: coefficients()[1],
        norm=True,
    )


def batch_norm_module(value: Value, known: Known) -> Lifted:
    """Batch norm with running statistics, in eval mode."""
    module = value.module
    if stock(module) not in NORM_AXES:
        return None
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    source = tensor_input(value)
    if source is None:
        return None
    if module.training:
        return Refusal("norm", "it is in training mode and uses the statistics of the batch", "call eval() on it")
    if module.running_mean is None or module.running_var is None:
        return Refusal("norm", "it keeps no running statistics and uses those of the batch", "track_running_stats=True")
    space = known.space(value)
    if space is None:
        return Refusal("norm", "the rank of its input is not known", "give example_inputs")
    return _norm(
        source,
        space,
        lambda: module.running_mean,  # type: ignore[arg-type, return-value]
        lambda: module.running_var,  # type: ignore[arg-type, return-value]
        lambda: module.weight,
        lambda: module.bias,
        module.eps,
    )


def batch_norm_function(value: Value, known: Known) -> Lifted:
    """``F.batch_norm`` with ``training=False``."""
    if value.module is not None:
        return None
    if value.node.target is F.batch_norm:
        mean, variance = argument(value, 1, "running_mean"), argument(value, 2, "running_var")
        gamma, beta = argument(value, 3, "weight"), argument(value, 4, "bias")
        training, eps = argument(value, 5, "training", False), argument(value, 7, "eps", 1e-5)
    elif value.node.target is torch.batch_norm:
        gamma, beta = argument(value, 1, "weight"), argument(value, 2, "bias")
        mean, variance = argument(value, 3, "running_mean"), argument(value, 4, "running_var")
        training, eps = argument(value, 5, "training", False), argument(value, 7, "eps", 1e-5)
    else:
        return None
    source, space = tensor_input(value), known.space(value)
    if training or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return Refusal("norm", "it uses the statistics of the batch", "call eval() on the module")
    if source is None or space is None or isinstance(gamma, Value) or isinstance(beta, Value):
        return Refusal("norm", "the rank of its input is not known", "give example_inputs")
    return _norm(source, space, lambda: mean, lambda: variance, lambda: gamma, lambda: beta, eps)


def _constant(constant: Any, space: Space | None) -> Numbers | None:
    """A constant as one number per channel, ``(channels,)``; None if it is not."""
    if isinstance(constant, bool) or not isinstance(constant, Real | Tensor) or space is None or space.channels == 0:
        return None
    channels = space.channels
    if isinstance(constant, Tensor):
        if not narrow(constant, space) or constant.is_complex():
            return None
        return lambda: precise(constant).reshape(-1).expand(channels)
    number = float(constant)
    return lambda: torch.full((channels,), number, dtype=torch.float64)


def _identity(known: Known, value: Value) -> Conv:
    space = known.space(value)
    return identity(0, 0) if space is None else identity(space.channels, space.axes)


def _combine(label: str, operands: list[tuple[Any, float]], known: Known) -> Lifted:
    """``sum_i c_i operand_i`` with numbers ``c_i``; constant operands go into the bias."""
    values = [(v, c) for v, c in operands if isinstance(v, Value)]
    constants = [(v, c) for v, c in operands if not isinstance(v, Value)]
    spaces = {known.space(v) for v, _ in values}
    space = next(iter(spaces)) if len(spaces) == 1 else None
    constants = [(v, c) for v, c in constants if not (isinstance(v, Real) and v == 0)]
    biases: list[tuple[Numbers, float]] = []
    for constant, factor in constants:
        vector = _constant(constant, space)
        if vector is None:
            return Refusal("constant_add", "the constant differs over space or may broadcast")
        biases.append((vector, factor))
    factors: dict[Value, float] = {}
    for v, c in values:
        factors[v] = factors.get(v, 0.0) + c
    terms: dict[Value, Conv] = {}
    weights: dict[Value, Numbers] = {}
    for v, c in factors.items():
        own = known.space(v)
        if c == 1:
            terms[v] = _identity(known, v)
            continue
        if own is None:
            return Refusal("scale", "the channels of a summand are not known", "give example_inputs")
        terms[v] = diagonal(own.channels, own.axes)
        weights[v] = _full(own.channels, c)
    bias: Numbers | None = None
    if biases:
        bias = lambda: torch.stack([vector() * factor for vector, factor in biases]).sum(0)  # noqa: E731
    return Operation(label, terms, weights, bias)


def _full(channels: int, number: float) -> Numbers:
    return lambda: torch.full((channels,), number, dtype=torch.float64)


def arithmetic_sum(value: Value, known: Known) -> Lifted:
    """``+``, ``-``, their in-place forms and methods, ``torch.add(..., alpha=)``, negation, sums of lists."""
    name = name_of(value)
    if name in ("neg", "negative", "__neg__"):
        return _combine("negation", [(value.args[0], -1.0)], known)
    if name in ("sum", "mean") and value.args and isinstance(value.args[0], Value):
        return _sum_of_stack(value, known, mean=name == "mean")
    reverse = name in ("rsub", "__rsub__")
    if name not in SUMS and not reverse:
        return None
    if len(value.args) == 2:
        first, second = value.args
    else:
        first, second = argument(value, 0, "input"), argument(value, 1, "other")
    alpha = value.kwargs.get("alpha", 1)
    if not isinstance(alpha, Real) or not isinstance(first, Value | Tensor | Real):
        return None
    if not isinstance(second, Value | Tensor | Real):
        return None
    subtracts = SUMS.get(name) is operator.sub or reverse
    factor = -float(alpha) if subtracts else float(alpha)
    operands = [(second, 1.0), (first, factor)] if reverse else [(first, 1.0), (second, factor)]
    return _combine("sub" if subtracts else "add", operands, known)


def _sum_of_stack(value: Value, known: Known, *, mean: bool) -> Lifted:
    """``torch.stack([a, b, ...]).sum(0)`` and ``mean(0)``."""
    stacked = value.args[0]
    dim = argument(value, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if name_of(stacked) != "stack" or value.kwargs.get("keepdim") or value.kwargs.get("dtype") is not None:
        return None
    items = argument(stacked, 0, "tensors")
    at = argument(stacked, 1, "dim", 0)
    if dim != at or at < 0 or not isinstance(items, list | tuple) or not all(isinstance(i, Value) for i in items):
        return None
    if len({known.space(i) for i in items}) != 1:
        return None
    result = _combine("sum of stack", [(i, 1.0 / len(items) if mean else 1.0) for i in items], known)
    return replace(result, covers=(stacked,)) if isinstance(result, Operation) else result


def scale(value: Value, known: Known) -> Lifted:
    """Multiplication or division by a number or by one number per channel."""
    name = name_of(value)
    if name not in PRODUCTS or len(value.args) != 2 or value.kwargs:
        return None
    first, second = value.args
    divides = "div" in name
    if isinstance(second, Value) and not isinstance(first, Value) and not divides:
        first, second = second, first
    if not isinstance(first, Value) or isinstance(second, Value):
        return Refusal("scale", "both factors depend on the input")
    if isinstance(second, Real) and not isinstance(second, bool) and second == 1:
        return Operation("scale", {first: _identity(known, first)}, {})
    space = known.space(first)
    factor = _constant(second, space)
    if factor is None or space is None:
        return Refusal("scale", "the factor is not one number per channel, or the channels are not known")
    numbers = (lambda: 1 / factor()) if divides else factor
    return Operation("scale", {first: diagonal(space.channels, space.axes)}, {first: numbers})


IDENTITY_NAMES: Final = frozenset("contiguous clone".split())


def passes_through(value: Value, known: Known) -> Lifted:
    """Operations that return their input: identity, dropout in eval mode, activations whose parameters make them so."""
    source = tensor_input(value)
    if source is None or value.node.op == "placeholder":
        return None
    module, kind, name = value.module, stock(value.module), name_of(value)
    same = False
    if module is not None:
        same = kind is nn.Identity or isinstance(module, nn.modules.dropout._DropoutNd) and (
            not module.training or module.p == 0
        )
        same = same or kind is nn.LeakyReLU and module.negative_slope == 1
        same = same or kind is nn.Hardtanh and (module.min_val, module.max_val) == (float("-inf"), float("inf"))
        same = same or kind is nn.RReLU and not module.training and module.lower + module.upper == 2  # type: ignore[operator]
    elif name in IDENTITY_NAMES and len(value.args) == 1:
        same = True
    elif name.endswith("dropout") or name in ("dropout1d", "dropout2d", "dropout3d"):
        training = argument(value, 2, "training", value.node.target is not torch.dropout)
        same = training is False or argument(value, 1, "p", 0.5) == 0
    elif name == "leaky_relu":
        same = argument(value, 1, "negative_slope", 0.01) == 1
    elif name == "getitem" and value.args[1] is Ellipsis:
        same = True
    elif name == "stochastic_depth":
        same = argument(value, 3, "training", True) is False
    return Operation("identity", {source: _identity(known, source)}, {}) if same else None


def _fill(constant: Any, space: Space) -> Tensor | None:
    number = 0.0 if constant is None else float(constant)
    return None if number == 0 else torch.full((space.channels,), number, dtype=torch.float64)


BORDERS: Final = {"reflect": Border.REFLECT, "replicate": Border.REPLICATE, "circular": Border.CIRCULAR}


def pad(value: Value, known: Known) -> Lifted:
    """``F.pad`` and the padding modules of torch."""
    source, kind = tensor_input(value), stock(value.module)
    mode, constant = "constant", None
    if value.module is not None:
        name = kind.__name__ if kind is not None else ""
        found = next((m for m in ("Zero", "Constant", "Reflection", "Replication", "Circular") if name.startswith(m)), "")
        if not found or "Pad" not in name:
            return None
        mode = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}.get(found, "constant")
        constant = getattr(value.module, "value", None)
        axes = int(name[-2])
        flat = _per_axis(value.module.padding, 2 * axes)
    elif value.node.target in (F.pad, torch.nn.functional.pad) or name_of(value) == "pad":
        flat = argument(value, 1, "pad")
        mode, constant = argument(value, 2, "mode", "constant"), argument(value, 3, "value")
    else:
        return None
    space = known.space(source)
    if source is None or space is None:
        return Refusal("pad", "the rank of the padded value is not known", "give example_inputs")
    if not isinstance(flat, list | tuple) or not all(isinstance(p, int) for p in flat):
        return Refusal("pad", "the padding depends on the size of the input", "give example_inputs")
    if constant is not None and not isinstance(constant, Real):
        return Refusal("pad", "the value that pads depends on the input")
    behind = [*flat, *[0] * (2 * space.axes - len(flat))]
    if any(behind[2 * space.axes :]):
        return Refusal("pad", "it pads channels or the batch")
    lo = tuple(behind[2 * i] for i in reversed(range(space.axes)))
    hi = tuple(behind[2 * i + 1] for i in reversed(range(space.axes)))
    if mode != "constant" and min(*lo, *hi, 0) < 0:
        return Refusal("pad", "a negative padding with a border mode")
    conv = window(space.channels, lo, hi, fill=_fill(constant, space) if mode == "constant" else None,
                  border=BORDERS.get(mode, Border.CONSTANT))  # fmt: skip
    return Operation("pad", {source: conv.structure}, {} if conv.identity else {source: _full(space.channels, 1.0)})


POOLS: Final = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}


def average_pool(value: Value, known: Known) -> Lifted:
    """``nn.AvgPool*d`` and ``F.avg_pool*d``."""
    source, kind, module = tensor_input(value), stock(value.module), value.module
    if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        axes = int(kind.__name__[-2])
        size, stride, padding = module.kernel_size, module.stride, module.padding  # type: ignore[union-attr]
        ceil_mode, include = module.ceil_mode, module.count_include_pad  # type: ignore[union-attr]
        divisor = getattr(module, "divisor_override", None)
    elif value.module is None and value.node.target in POOLS:
        axes = POOLS[value.node.target]
        size = argument(value, 1, "kernel_size")
        stride, padding = argument(value, 2, "stride"), argument(value, 3, "padding", 0)
        ceil_mode, include = argument(value, 4, "ceil_mode", False), argument(value, 5, "count_include_pad", True)
        divisor = argument(value, 6, "divisor_override")
    elif kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        axes = int(kind.__name__[-2])
        size, stride, padding = module.kernel_size, module.stride, module.padding  # type: ignore[union-attr]
        if set(_per_axis(size, axes)) != {1} or module.return_indices or any(_per_axis(padding, axes)):  # type: ignore[union-attr, arg-type]
            return None
        ceil_mode, include, divisor = False, True, None
    else:
        return None
    space = known.space(source)
    if source is None or space is None or space.axes != axes:
        return Refusal("pool_is_conv", "the channels of the pooled value are not known", "give example_inputs")
    kernel = _per_axis(size, axes)
    conv = pool_is_conv(
        space.channels,
        kernel,
        _per_axis(stride if stride is not None and stride != [] else size, axes),
        _per_axis(padding, axes),
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(include),
        divisor=divisor,
        numeric=False,
    )
    if isinstance(conv, Refusal):
        return conv
    if conv.identity:
        return Operation("identity", {source: conv}, {})
    number = 1 / (divisor or torch.Size(kernel).numel())
    shape = conv.weight_shape
    return Operation(f"average pool {_shape(kernel)}", {source: conv},
                     {source: lambda: torch.full(shape, number, dtype=torch.float64)})  # fmt: skip


def spatial_slice(value: Value, known: Known) -> Lifted:
    """``x[..., a:b:s]`` on spatial axes: crops and strided identities."""
    if name_of(value) != "getitem" or not isinstance(value.args[0], Value):
        return None
    source, index = value.args
    space = known.space(source)
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) or i is Ellipsis for i in index):
        return None
    if any(isinstance(part, Value) for i in index if isinstance(i, slice) for part in (i.start, i.stop, i.step)):
        return Refusal("slice", "its ends depend on the input", "give example_inputs")
    if space is None:
        return Refusal("slice", "the rank of the value is not known", "give example_inputs")
    if Ellipsis in index:
        at = index.index(Ellipsis)
        spatial = index[at + 1 :]
        if at > 0 or len(spatial) > space.axes:
            return None
        spatial = (slice(None),) * (space.axes - len(spatial)) + spatial
    else:
        if len(index) != space.axes + 2 or any(i != slice(None) for i in index[:2]):
            return None
        spatial = index[2:]
    lo, hi, stride = [], [], []
    for part in spatial:
        start, stop, step = part.start or 0, part.stop, part.step or 1
        if start < 0 or step < 1 or (stop is not None and stop >= 0):
            return Refusal("slice", "it counts from the far end, so it depends on the size", "give example_inputs")
        lo.append(-start)
        hi.append(0 if stop is None else stop)
        stride.append(step)
    conv = window(space.channels, tuple(lo), tuple(hi), tuple(stride))
    return Operation("slice", {source: conv.structure}, {} if conv.identity else {source: _full(space.channels, 1.0)})


def framed_pad(value: Value, known: Known) -> Lifted:
    """A zero padding whose border is then filled, side by side, with one constant per channel."""
    if value.node.target is not assign or not isinstance(value.args[0], Value):
        return None
    chain: list[Value] = []
    step: Value = value
    while step.node.target is assign and step in known.effects.pure and isinstance(step.args[0], Value):
        chain.append(step)
        step = step.args[0]
    if not chain or name_of(step) != "pad" or len(step.users) != 1 or any(len(c.users) != 1 for c in chain[1:]):
        return None
    padded = pad(step, known)
    if not isinstance(padded, Operation):
        return padded
    ((source, conv),) = padded.terms.items()
    space = known.space(source)
    assert space is not None
    open_sides = {(a, e) for a in range(space.axes) for e, p in ((0, conv.lo[a]), (1, conv.hi[a])) if p > 0}
    fills: list[Tensor] = []
    for write in chain:
        side = _side(write.args[1], conv)
        number = _constant(write.args[2], space)
        if side is None or number is None:
            return Refusal("pad", "what is written is not a whole side of the padding, one constant per channel")
        open_sides.discard(side)
        fills.append(number())
    same = all(f.device.type == "meta" or torch.equal(f, fills[0]) for f in fills)
    if open_sides or not same:
        return Refusal("pad", "the sides of the padding are filled by different constants, or one is not filled")
    return Operation(
        "pad by a constant",
        {source: replace(conv, fill=fills[0])},
        dict(padded.weights),
        covers=(step, *chain[1:]),
    )


def _side(index: Any, conv: Conv) -> tuple[int, int] | None:
    """Which side of the frame a slice names: (axis, 0 before or 1 behind)."""
    if not isinstance(index, tuple) or not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return None
    spatial = index[2:]
    if any(i != slice(None) for i in index[:2]) or len(index) > conv.axes + 2:
        return None
    named = [axis for axis, i in enumerate(spatial) if i != slice(None)]
    if len(named) != 1:
        return None
    axis, part = named[0], spatial[named[0]]
    if part.start in (0, None) and part.stop == conv.lo[axis]:
        return axis, 0
    if part.start == -conv.hi[axis] and part.stop is None:
        return axis, 1
    return None


LIFTINGS: Final[tuple[Lifting, ...]] = (
    conv_module,
    batch_norm_module,
    linear_module,
    conv_transpose_module,
    passes_through,
    arithmetic_sum,
    scale,
    conv_function,
    batch_norm_function,
    linear_function,
    conv_transpose_function,
    pad,
    framed_pad,
    average_pool,
    spatial_slice,
)


def lift(value: Value, known: Known, liftings: tuple[Lifting, ...] = LIFTINGS) -> Operation | Refusal | None:
    """The formula of an operation; a refusal if it could be linear and is not; None for everything else."""
    if value.node.op == "placeholder":
        return None
    result: Lifted = None
    for lifting in liftings:
        result = lifting(value, known)
        if result is not None:
            break
    if result is None or isinstance(result, Refusal):
        return result
    refused = _unsafe(value, result, known)
    return refused if refused is not None else result


def _unsafe(value: Value, operation: Operation, known: Known) -> Refusal | None:
    """Why a linear operation may not be rewritten where it stands."""
    if value.module is not None:
        reason = hooks(value.module)
        if reason:
            return Refusal("hooks", f"the module has a {reason}", "remove it before fusing")
        if value.shared and (next(value.module.parameters(), None) is not None or operation.norm):
            return Refusal("shared", SHARED, "give every caller a module of its own")
        if parametrize.is_parametrized(value.module) and value.module.training:
            return Refusal("parametrization", "the module is in training mode", "call eval() on it")
    for source, conv in operation.terms.items():
        space = known.space(source)
        if conv.in_channels and space is not None and (space.channels, space.axes) != (conv.in_channels, conv.axes):
            return Refusal("layout", f"its input has its channels elsewhere ({space}), or may broadcast")
    if value not in known.effects.pure and written(value):
        return Refusal("in_place", "it writes into memory that is read again later", "use the operation that copies")
    return None
