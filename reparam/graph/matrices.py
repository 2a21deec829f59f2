"""Products of a value with a constant matrix, in all spellings: ``F.linear``, ``x @ W.T``, ``addmm``, ``einsum``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from reparam.graph.calls import argument, name_of
from reparam.graph.net import Value


@final
@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``W x + b`` on the channels of a value.

    Args:
        source: the value.
        constant: the tensor from which the matrix comes, as it stands in the call.
        shape: ``(out, in)``.
        axes: spatial axes behind the channels.
        matrix: gives the matrix, ``(out, in)``.
        bias: gives the bias, ``(out,)``; None: there is none.
    """

    source: Value
    constant: Tensor
    shape: tuple[int, int]
    axes: int
    matrix: Callable[[], Tensor]
    bias: Callable[[], Tensor] | None = None


def product(value: Value) -> Product | None:
    """The product that an operation is; None for other operations, and where the matrix depends on the input."""
    name = name_of(value)
    if name == "linear":
        return _linear(argument(value, 0, "input"), argument(value, 1, "weight"), argument(value, 2, "bias"))
    if name in ("matmul", "mm") and len(value.args) == 2:
        return _transposed(value.args[0], value.args[1], None, 1, 1)
    if name == "addmm":
        bias, source, matrix = (argument(value, i, n) for i, n in enumerate(("input", "mat1", "mat2")))
        return _transposed(source, matrix, bias, value.kwargs.get("alpha", 1), value.kwargs.get("beta", 1))
    return _einsum(value) if name == "einsum" else None


def _linear(source: Any, weight: Any, bias: Any) -> Product | None:
    if not isinstance(source, Value) or not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(bias, Value):
        return None
    shift = None if bias is None else lambda: bias.expand(weight.shape[0])
    return Product(source, weight, (weight.shape[0], weight.shape[1]), 0, lambda: weight, shift)


def _transposed(source: Any, matrix: Any, bias: Any, alpha: Any, beta: Any) -> Product | None:
    """``beta bias + alpha x @ matrix``."""
    if not isinstance(source, Value) or not isinstance(matrix, Tensor) or matrix.dim() != 2:
        return None
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        return None
    shift = None
    if bias is not None and beta != 0:
        if not isinstance(bias, Tensor) or bias.numel() != matrix.shape[1] or bias.shape[-1:] != matrix.shape[1:]:
            return None
        shift = lambda: bias.reshape(-1) if beta == 1 else bias.reshape(-1) * beta  # noqa: E731
    scaled = (lambda: matrix.t()) if alpha == 1 else (lambda: matrix.t() * alpha)
    return Product(source, matrix, (matrix.shape[1], matrix.shape[0]), 0, scaled, shift)


def subscripts(value: Value) -> tuple[Value, str, Tensor, str, str] | None:
    """An ``einsum`` of a value and a constant: both with their subscripts, and those of the result; None for others.

    An ellipsis becomes one dot.
    """
    operands = value.args[1] if len(value.args) == 2 and isinstance(value.args[1], list | tuple) else value.args[1:]
    if name_of(value) != "einsum" or len(operands) != 2 or not isinstance(value.args[0], str):
        return None
    inputs, arrow, result = value.args[0].replace(" ", "").replace("...", ".").partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2 or len(set(result)) != len(result) or any(len({*n}) != len(n) for n in names):
        return None
    (first, second), (a, b) = operands, names
    if isinstance(first, Tensor) and isinstance(second, Value):
        (first, second), (a, b) = (second, first), (b, a)
    if not isinstance(first, Value) or not isinstance(second, Tensor) or "." in b:
        return None
    return first, a, second, b, result


def channel_axes(letters: str, channel: str) -> int | None:
    """Spatial axes behind the axis ``channel`` of a value with these subscripts; None if it cannot hold channels."""
    place = letters.index(channel)
    axes = len(letters) - 1 - place
    return axes if axes == 0 or (place == 1 and "." not in letters) else None


def _einsum(value: Value) -> Product | None:
    """``bchw,kc->bkhw``: one letter of the value gives way to another of the matrix."""
    parsed = subscripts(value)
    if parsed is None:
        return None
    source, letters, constant, names, result = parsed
    inner = [c for c in names if c in letters]
    outer = [c for c in names if c not in letters]
    if len(names) != 2 or len(inner) != 1 or len(outer) != 1 or result != letters.replace(inner[0], outer[0]):
        return None
    axes = channel_axes(letters, inner[0])
    if axes is None:
        return None
    matrix = constant if names.index(outer[0]) == 0 else constant.t()
    return Product(source, constant, (matrix.shape[0], matrix.shape[1]), axes, lambda: matrix)
