"""Linear layers and other products with a constant matrix."""

from typing import Final

from torch import nn

from reparam.algebra import Refusal, pointwise
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.lift.base import Known, Lifted, bias_of, generated, numbers_of, weight_of
from reparam.graph.matrices import product
from reparam.graph.net import Value
from reparam.graph.operation import Operation

BOTH: Final = Refusal("scale", "both factors depend on the input")


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
    return Operation("linear", {source: conv}, {source: weight_of(module)}, bias_of(module))


def linear_function(value: Value, known: Known) -> Lifted:
    """``F.linear``, ``x @ W.T``, ``addmm``, ``einsum``: products with a matrix that does not depend on the input."""
    found = product(value)
    if found is None and name_of(value) in ("matmul", "bmm", "einsum"):
        return BOTH if len(set(value.inputs)) > 1 else None
    if found is None:
        depends = name_of(value) == "linear" and isinstance(argument(value, 1, "weight"), Value)
        return Refusal("linear", "the weight depends on the input") if depends else None
    source = found.source
    return Operation(
        "linear" if found.axes == 0 else f"product over {found.axes} axes",
        {source: pointwise(*found.shape, found.axes)},
        {source: numbers_of(found.matrix)},
        None if found.bias is None else numbers_of(found.bias),
        generated=generated(value, found.constant),
    )
