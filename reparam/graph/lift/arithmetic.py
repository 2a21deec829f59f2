"""Sums, differences, and products with constants."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from reparam.algebra import Conv, Refusal, diagonal
from reparam.algebra.sources import precise
from reparam.graph.calls import argument, name_of, tensor_input
from reparam.graph.kinds import ADDED_PRODUCTS, PRODUCTS, SUMS, operands
from reparam.graph.lift.base import Known, Lifted, constant_vector, full, identity_of, passed
from reparam.graph.matrices import subscripts
from reparam.graph.net import Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.spaces import einsum_scale
from reparam.graph.stacks import stack_of, summands


def _combine(label: str, operands: Sequence[tuple[Any, float]], known: Known) -> Lifted:
    """``sum_i c_i operand_i`` with numbers ``c_i``; constant operands go into the bias."""
    factors: dict[Value, float] = {}
    for operand, factor in operands:
        if isinstance(operand, Value):
            factors[operand] = factors.get(operand, 0.0) + factor
    spaces = {known.space(value) for value in factors}
    biases: list[tuple[Numbers, float]] = []
    for operand, factor in operands:
        if isinstance(operand, Value) or (isinstance(operand, Real) and operand == 0):
            continue
        vectors = [constant_vector(operand, value, known) for value in factors] if len(spaces) == 1 else []
        if not vectors or vectors[0] is None:
            return Refusal("constant_add", "the constant differs over space or may broadcast")
        biases.append((vectors[0], factor))
    terms: dict[Value, Conv] = {}
    weights: dict[Value, Numbers] = {}
    for value, factor in factors.items():
        space = known.space(value)
        if factor == 1:
            terms[value] = identity_of(value, known)
            continue
        if space is None:
            return Refusal("scale", "the channels of a summand are not known", "give example_inputs")
        terms[value] = diagonal(space.channels, space.axes)
        weights[value] = full(space.channels, factor)
    bias: Numbers | None = None
    if biases:
        bias = lambda: torch.stack([vector() * factor for vector, factor in biases]).sum(0)  # noqa: E731
    return Operation(label, terms, weights, bias, arithmetic=True)


def arithmetic_sum(value: Value, known: Known) -> Lifted:
    """``+``, ``-``, their in-place forms and methods, ``torch.add(..., alpha=)``, negation, sums of lists."""
    name = name_of(value)
    if name == "neg":
        return _combine("negation", [(value.args[0], -1.0)], known)
    if name in ("sum", "mean") and value.args and isinstance(value.args[0], Value):
        return _sum_of_stack(value, known)
    if name not in SUMS:
        return None
    first, second = argument(value, 0, "input"), argument(value, 1, "other")
    alpha = argument(value, 2, "alpha", 1)
    if not isinstance(alpha, Real) or not isinstance(first, Value | Tensor | Real):
        return None
    if not isinstance(second, Value | Tensor | Real):
        return None
    factor = float(alpha) if name == "add" else -float(alpha)
    operands = [(second, 1.0), (first, factor)] if name == "rsub" else [(first, 1.0), (second, factor)]
    return _combine("add" if name == "add" else "sub", operands, known)


def _sum_of_stack(value: Value, known: Known) -> Lifted:
    """``torch.stack([a, b, ...]).sum(0)`` and ``mean(0)``."""
    items = summands(value, known.ranks)
    if not items or len({known.space(item) for item in items}) != 1:
        return None
    factor = 1.0 / len(items) if name_of(value) == "mean" else 1.0
    result = _combine("sum of stack", [(item, factor) for item in items], known)
    return replace(result, covers=stack_of(value)) if isinstance(result, Operation) else result


def scale(value: Value, known: Known) -> Lifted:
    """Multiplication or division by a number or by one number per channel."""
    name = name_of(value)
    if name not in PRODUCTS or len(value.args) != 2 or value.kwargs:
        return None
    first, second = value.args
    if isinstance(second, Value) and not isinstance(first, Value) and name == "mul":
        first, second = second, first
    if not isinstance(first, Value) or isinstance(second, Value):
        return Refusal("scale", "both factors depend on the input")
    if type(second) in (int, float) and second == 1:
        return replace(passed(first, known), label="scale", arithmetic=True)
    space, factor = known.space(first), constant_vector(second, first, known)
    if factor is None or space is None:
        return Refusal("scale", "the factor is not one number per channel, or the channels are not known")
    numbers = (lambda: 1 / factor()) if name == "div" else factor
    return Operation("scale", {first: diagonal(space.channels, space.axes)}, {first: numbers}, arithmetic=True)


def zeros(value: Value, known: Known) -> Lifted:
    """``torch.zeros_like(x)``, where sums start: ``0 x``, so that it is checked to have the shape of what is added."""
    source = tensor_input(value)
    space = known.space(source)
    if name_of(value) != "zeros_like" or len(value.args) != 1 or value.kwargs:
        return None
    if source is None or space is None or space.channels == 0:
        return Refusal("scale", "the channels of its input are not known", "give example_inputs")
    nothing = {source: full(space.channels, 0.0)}
    return Operation("zeros", {source: diagonal(space.channels, space.axes)}, nothing, arithmetic=True)


def added_product(value: Value, known: Known) -> Lifted:
    """``torch.addcmul(z, a, x, value=v)``, which is ``z + v a x``, and ``torch.addcdiv``, for a constant ``a``."""
    if name_of(value) not in ADDED_PRODUCTS:
        return None
    (added, source, constant), number = operands(value), value.kwargs.get("value", 1)
    divides = name_of(value) == "addcdiv"
    if isinstance(constant, Value) and not divides:
        source, constant = constant, source
    if not isinstance(source, Value) or isinstance(constant, Value) or not isinstance(number, Real):
        return Refusal("scale", "both factors depend on the input")
    space, vector = known.space(source), constant_vector(constant, source, known)
    if vector is None or space is None:
        return Refusal("scale", "the factor is not one number per channel, or the channels are not known")
    own = 1.0 if added is source else 0.0

    def factor() -> Tensor:
        return own + (float(number) / vector() if divides else float(number) * vector())

    terms = {} if added is source or not isinstance(added, Value) else {added: identity_of(added, known)}
    bias = None if isinstance(added, Value) else constant_vector(added, source, known)
    if bias is None and not isinstance(added, Value):
        return Refusal("constant_add", "the constant differs over space or may broadcast")
    terms[source] = diagonal(space.channels, space.axes)
    return Operation("scale", terms, {source: factor}, bias, arithmetic=True)


def channel_product(value: Value, known: Known) -> Lifted:
    """``einsum("bchw,c->bchw", x, scale)``."""
    space, parsed = einsum_scale(value), subscripts(value)
    if space is None or parsed is None:
        return None
    source, _, constant, _, _ = parsed
    weights: dict[Value, Numbers] = {source: lambda: precise(constant)}
    return Operation("scale", {source: diagonal(space.channels, space.axes)}, weights, arithmetic=True)
