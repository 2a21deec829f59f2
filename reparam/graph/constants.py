"""Constants in the data type or on the device of a value: ``g.to(x.dtype)``, ``torch.zeros(8, 1, 1, device=x.device)``.

Such a tensor is known up to rounding, so that operations read it as the parameter, or as the numbers, that it is made
from. The domain: real numbers in the floating-point type of a value that a layer with real weights computes or reads,
as an integer type would cut them off; and nobody writes to the tensor. One expanded to the shape of what it meets
(``y * g.expand_as(y)``) is what it is expanded from.
"""

from collections.abc import Callable, Container, Mapping
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from reparam.graph.by_rank import Shaped, Shapes, asks_rank, computes
from reparam.graph.calls import name_of, stock
from reparam.graph.effects import aliased, written
from reparam.graph.kinds import CONVS, NORMS, PRODUCTS, SUMS, passes_on
from reparam.graph.net import Net, Value
from reparam.graph.proxy import PLAIN, kind_of_plain
from reparam.graph.structures import values_in

CASTS: Final = frozenset(["to", "type", "type_as"])
SHAPING: Final = frozenset(["view", "reshape", "unsqueeze", "squeeze", "flatten", "contiguous", "getitem"])
COMPUTING: Final = frozenset([*SUMS, *PRODUCTS, "exp", "matmul", "neg", "rsqrt", "sqrt"])
READERS: Final = frozenset([*SUMS, *PRODUCTS, *CONVS, *NORMS, "linear", "matmul", "einsum"])
MADE: Final[Mapping[str, Callable[..., Tensor]]] = {
    name: getattr(torch, name) for name in ("arange", "eye", "full", "linspace", "ones", "tensor", "zeros")
}
NEW: Final[Mapping[str, Callable[..., Tensor]]] = {
    "new_full": torch.full, "new_ones": torch.ones, "new_tensor": torch.tensor, "new_zeros": torch.zeros,
}  # fmt: skip


def put_constants(net: Net) -> None:
    """Give the operations of a net such constants as tensors; they stay among the inputs."""
    constants: dict[Value, Tensor] = {}
    shaped: dict[Value, Shaped] = {}
    shapes = Shapes(net)
    for value in net.values:
        found = _constant(value, constants) if value.module is None else None
        if found is None and value.module is None and name_of(value) in ("view", "reshape", "getitem"):
            found = _of_rank(value, constants, shaped, shapes)
        if found is not None:
            constants[value] = found
            if value.args and isinstance(value.args[0], Value) and value.args[0] in shaped:
                shaped.setdefault(value, shaped[value.args[0]])
    for value in shaped:
        meets = [[v for v in user.inputs if v not in constants] for user in value.users if user not in constants]
        tensors = [[v for v in met if not v.node.meta.get(PLAIN)] for met in meets]
        if not all(shapes.reach(shaped[value], met, shaped) for met in tensors):
            del constants[value]
    while unsafe := [value for value in constants if not _is_safe(value, constants)]:
        for value in unsafe:
            del constants[value]
    for value in net.values:
        if value.module is None and name_of(value) in READERS:
            ranks = [shaped[source].rank for source in value.inputs if source in shaped and source in constants]
            value.rank = next((rank for rank in ranks if rank is not None), None)
            value.args = tuple(_put(argument, constants) for argument in value.args)
            value.kwargs = {name: _put(argument, constants) for name, argument in value.kwargs.items()}


def is_constant(value: Value) -> bool:
    """Whether all that read a value read it as a constant."""
    return bool(value.users) and not value.returned and all(value in _put_in(user) for user in value.users)


def reads_type(value: Value, operations: Container[Value]) -> bool:
    """Whether an operation reads a data type, device or rank, for constants of linear operations alone."""
    if is_constant(value):
        return all(user in operations or _leads_on(user, operations) for user in value.users)
    looks = name_of(value) == "getattr" and value.args[1] in ("dtype", "device")
    looks = looks or asks_rank(value) or computes(value) or name_of(value) in CASTS | SHAPING
    return looks and not value.returned and all(reads_type(user, operations) for user in value.users)


def _leads_on(value: Value, operations: Container[Value]) -> bool:
    """Whether a constant is computed, from others."""
    return name_of(value) in COMPUTING and bool(value.users) and reads_type(value, operations)


def constants_of(value: Value) -> list[Value]:
    """The operations that read the constants made from a data type or device."""
    if is_constant(value):
        return value.users
    return [reader for user in value.users for reader in constants_of(user)]


def made_for(value: Value, terms: Container[Value]) -> tuple[Value, ...]:
    """Constants that an operation alone reads, and the data types of its inputs from which they are made."""
    found: dict[Value, None] = {}
    pending = [source for source in _put_in(value) if source not in terms]
    while pending:
        current = pending.pop()
        found[current] = None
        pending += [source for source in current.inputs if source not in terms and source not in found]
    known = {value, *found}
    alone = all(user in known or _is_unread(user) for source in found for user in source.users)
    closed = not any(source.returned or source.node.op == "placeholder" or source.module for source in found)
    return tuple(found) if alone and closed else ()


def _is_unread(value: Value) -> bool:
    """Whether a value is a size that nothing reads, as those in ``b, c, h, w = x.shape``."""
    return not value.users and not value.returned and bool(value.node.meta.get(PLAIN))


def _put_in(value: Value) -> list[Value]:
    written_out = set(values_in((value.args, value.kwargs)))
    return [source for source in value.inputs if source not in written_out]


def _put(argument: Any, constants: Mapping[Value, Tensor]) -> Any:
    return constants.get(argument, argument) if isinstance(argument, Value) else argument


def _is_safe(value: Value, constants: Container[Value]) -> bool:
    """Whether nobody writes to a constant, nor to what it is made from."""
    first = value.args[:1] if name_of(value) not in COMPUTING else value.args
    made = value.node.target not in NEW and any(isinstance(part, Value) and part not in constants for part in first)
    return not made and all(_only_reads(user, value, constants) for user in value.users)


def _only_reads(user: Value, value: Value, constants: Container[Value]) -> bool:
    if name_of(value) == "expand_as" and not (
        name_of(user) in (*SUMS, *PRODUCTS) and any(argument is value.args[1] for argument in user.args)
    ):
        return False  # it has the shape of another operand, and broadcasting would not give it
    return value not in written(user) and (value not in aliased(user) or user in constants)


def _constant(value: Value, constants: Mapping[Value, Tensor]) -> Tensor | None:
    """The numbers of a constant; None for other operations."""
    name, first = name_of(value), value.args[0] if value.args else None
    if isinstance(first, Value) and name_of(first) != "expand_as":
        first = constants.get(first, first)
    rest = _with_one_size_open(value.args[1:]) if name in ("view", "reshape") else value.args[1:]
    fixed = not any(True for _ in values_in((rest, value.kwargs)))
    if isinstance(first, Tensor) and name in SHAPING and fixed:
        try:
            found = getattr(first, "__getitem__" if name == "getitem" else name)(*rest, **value.kwargs)
        except (IndexError, RuntimeError, TypeError):
            return None
        return found if isinstance(found, Tensor) else None
    if isinstance(first, Tensor) and name in CASTS and first.is_floating_point():
        options = dict(value.kwargs)
        fits = all(isinstance(options.pop(flag, False), bool) for flag in ("non_blocking", "copy"))
        return first if fits and all(_is_type(part) for part in (*value.args[1:], *options.values())) else None
    if isinstance(first, Tensor) and name == "expand_as" and len(value.args) == 2:
        return first
    if name in COMPUTING and not value.kwargs and not written(value):
        return _computed(value, constants)
    if name in MADE and value.node.target is MADE[name]:
        return _made(MADE[name], value.args, value.kwargs)
    if name in NEW and isinstance(first, Value) and value.node.op == "call_method" and is_real(first):
        return _made(NEW[name], value.args[1:], {"dtype": torch.float64, **value.kwargs})
    return None


def _computed(value: Value, constants: Mapping[Value, Tensor]) -> Tensor | None:
    """What is computed of constants alone, as the forward does if their types are known; None if it needs a value."""
    args = [constants.get(part, part) if isinstance(part, Value) else part for part in value.args]
    if any(isinstance(part, Value) for part in args) or not all(isinstance(part, Tensor | Real) for part in args):
        return None
    function: Any = value.node.target
    args = [part.detach() if isinstance(part, Tensor) else part for part in args]
    try:
        result = getattr(args[0], function)(*args[1:]) if isinstance(function, str) else function(*args)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return result if isinstance(result, Tensor) else None


def _of_rank(
    value: Value, constants: Mapping[Value, Tensor], shaped: dict[Value, Shaped], shapes: Shapes
) -> Tensor | None:
    """A constant in a shape that depends on the rank of a value; None for other operations."""
    first = constants.get(value.args[0], value.args[0]) if isinstance(value.args[0], Value) else value.args[0]
    found = shapes.of(value.args[1:]) if isinstance(first, Tensor) and not value.kwargs else None
    if found is None or not isinstance(first, Tensor):
        return None
    method = "__getitem__" if name_of(value) == "getitem" else name_of(value)
    try:
        result: Tensor = getattr(first, method)(*found.arguments)
    except (IndexError, RuntimeError, TypeError):
        return None
    shaped[value] = found
    return result


def _with_one_size_open(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes of which one is that of a value: it is what the number of elements leaves, or they would not fit."""
    listed = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    traced = [size for size in listed if isinstance(size, Value)]
    if len(traced) != 1 or kind_of_plain(traced[0].node) is not int or -1 in listed:
        return sizes
    return tuple(-1 if isinstance(size, Value) else size for size in listed)


def _made(function: Callable[..., Tensor], args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """A tensor of numbers, with those of an unknown type in float64."""
    options = dict(options)
    if not _is_type(options.pop("device", None)):
        return None
    if isinstance(options.get("dtype"), Value):
        if not _is_type(options["dtype"]):
            return None
        options["dtype"] = torch.float64
    if any(True for _ in values_in((args, options))) or options.pop("requires_grad", False):
        return None
    try:
        found = function(*args, **options)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.is_floating_point() or "dtype" not in options else None


def _is_type(argument: Any) -> bool:
    """Whether an argument is a device, a floating-point data type, or a value that has both."""
    if isinstance(argument, Value):
        if name_of(argument) == "getattr" and isinstance(argument.args[0], Value):
            return argument.args[1] == "device" or (argument.args[1] == "dtype" and is_real(argument.args[0]))
        return is_real(argument)
    if isinstance(argument, torch.dtype):
        return argument.is_floating_point
    return argument is None or isinstance(argument, torch.device | str)


def is_real(value: Value) -> bool:
    """Whether a layer with real weights computes a value or reads it, directly or through elementwise operations."""
    seen = {value}
    pending = [value]
    while pending:
        current = pending.pop()
        if _has_real_weights(current) or any(_has_real_weights(u) and u.inputs[0] is current for u in current.users):
            return True
        if passes_on(current) or name_of(current) in (*SUMS, *PRODUCTS):
            new = [source for source in current.inputs if source not in seen]
            seen.update(new)
            pending += new
    return False


def _has_real_weights(value: Value) -> bool:
    if value.module is not None:
        kind, weight = stock(value.module), getattr(value.module, "weight", None)
        layer = kind is not None and issubclass(kind, LAYERS)
        return layer and isinstance(weight, Tensor) and weight.is_floating_point()
    weight = value.args[1] if len(value.args) > 1 else value.kwargs.get("weight")
    called = name_of(value) in (*CONVS, *NORMS, "linear")
    return called and isinstance(weight, Tensor) and weight.is_floating_point()


LAYERS: Final = (torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._BatchNorm, torch.nn.Linear)
