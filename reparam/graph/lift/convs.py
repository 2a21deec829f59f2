"""Convolutions and transposed convolutions, as modules and as functions."""

from typing import Any

from torch import Tensor, nn

from reparam.algebra import Border, Conv, Ints, Refusal
from reparam.graph.lift.base import Known, Lifted, detached, per_axis, shape_text, weight_of
from reparam.graph.net import Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.spaces import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS, argument, stock, tensor_input


def _padding(padding: Any, kernel: Ints, dilation: Ints) -> tuple[Ints, Ints]:
    axes = len(kernel)
    if padding == "valid":
        return (0,) * axes, (0,) * axes
    if padding == "same":  # torch puts the odd one behind
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    around = per_axis(padding, axes)
    return around, around


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
    dilation = per_axis(dilation, axes)
    lo, hi = _padding(padding, kernel, dilation)
    conv = Conv(
        out_channels=shape[0],
        in_channels=shape[1] * groups,
        kernel=kernel,
        stride=per_axis(stride, axes),
        dilation=dilation,
        lo=lo,
        hi=hi,
        groups=groups,
        border=border,
    )
    return Operation(f"conv {shape_text(kernel)}", {source: conv}, {source: weight}, bias)


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
        weight_of(module),
        shape,
        None if module.bias is None else detached(lambda: module.bias),
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
        detached(lambda: weight),
        tuple(weight.shape),
        None if bias is None else detached(lambda: bias),
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
    around = per_axis(padding, axes)
    conv = Conv(
        out_channels=shape[1] * groups,
        in_channels=shape[0],
        kernel=kernel,
        stride=per_axis(stride, axes),
        dilation=per_axis(dilation, axes),
        lo=around,
        hi=around,
        groups=groups,
        transposed=True,
        output_padding=per_axis(output_padding, axes),
    )
    return Operation(f"transposed conv {shape_text(kernel)}", {source: conv}, {source: weight}, bias)


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
        weight_of(module),
        (module.in_channels, module.out_channels // module.groups, *module.kernel_size),
        None if module.bias is None else detached(lambda: module.bias),
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
        detached(lambda: weight),
        tuple(weight.shape),
        None if bias is None else detached(lambda: bias),
        argument(value, 3, "stride", 1),
        argument(value, 4, "padding", 0),
        argument(value, 5, "output_padding", 0),
        argument(value, 6, "groups", 1),
        argument(value, 7, "dilation", 1),
    )
