"""Linear layers: one tap, no spatial axes."""

import torch.nn.functional as F
from torch import Tensor, nn

from reparam.algebra import Refusal, pointwise
from reparam.graph.lift.base import Known, Lifted, detached, weight_of
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.spaces import argument, name_of, stock, tensor_input


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
    bias = None if module.bias is None else detached(lambda: module.bias)
    return Operation("linear", {source: conv}, {source: weight_of(module)}, bias)


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
        {source: detached(lambda: weight)},
        None if bias is None else detached(lambda: bias),
    )
