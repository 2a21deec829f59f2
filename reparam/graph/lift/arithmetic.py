"""Sums, differences, and products with constants."""

import operator
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from reparam.algebra import Conv, Refusal, diagonal
from reparam.graph.lift.base import Known, Lifted, constant_vector, full, identity_of
from reparam.graph.net import Value
from reparam.graph.operation import Numbers, Operation
from reparam.graph.spaces import PRODUCTS, SUMS, argument, name_of


def _combine(label: str, operands: list[tuple[Any, float]], known: Known) -> Lifted:
    """``sum_i c_i operand_i`` with numbers ``c_i``; constant operands go into the bias."""
    values = [(v, c) for v, c in operands if isinstance(v, Value)]
    constants = [(v, c) for v, c in operands if not isinstance(v, Value)]
    spaces = {known.space(v) for v, _ in values}
    space = next(iter(spaces)) if len(spaces) == 1 else None
    constants = [(v, c) for v, c in constants if not (isinstance(v, Real) and v == 0)]
    biases: list[tuple[Numbers, float]] = []
    for constant, factor in constants:
        vector = constant_vector(constant, space)
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
            terms[v] = identity_of(known, v)
            continue
        if own is None:
            return Refusal("scale", "the channels of a summand are not known", "give example_inputs")
        terms[v] = diagonal(own.channels, own.axes)
        weights[v] = full(own.channels, c)
    bias: Numbers | None = None
    if biases:
        bias = lambda: torch.stack([vector() * factor for vector, factor in biases]).sum(0)  # noqa: E731
    return Operation(label, terms, weights, bias)


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
        return Operation("scale", {first: identity_of(known, first)}, {})
    space = known.space(first)
    factor = constant_vector(second, space)
    if factor is None or space is None:
        return Refusal("scale", "the factor is not one number per channel, or the channels are not known")
    numbers = (lambda: 1 / factor()) if divides else factor
    return Operation("scale", {first: diagonal(space.channels, space.axes)}, {first: numbers})
