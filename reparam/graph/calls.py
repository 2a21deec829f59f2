"""What a call does, whichever way it is written: as a function, a method, an operator, or in an exported program."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.parameter import UninitializedParameter

from reparam.graph.net import Value

ALIASES: Final = {
    "iadd": "add", "radd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "rmul": "mul", "multiply": "mul",
    "truediv": "div", "itruediv": "div", "true_divide": "div", "divide": "div", "negative": "neg", "clip": "clamp",
    "_threshold": "threshold",
}  # fmt: skip
ACTIVATIONS: Final = frozenset(
    [
        "relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "rrelu", "prelu",
        "sigmoid", "tanh", "elu", "selu", "celu", "mish", "softplus", "threshold", "hardshrink", "softshrink",
    ]
)  # fmt: skip
DROPOUTS: Final = frozenset(
    ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"]
)
HOMES: Final = frozenset(["torch", "_operator", "operator", "math", "builtins", ""])


def stock(module: nn.Module | None) -> type | None:
    """The torch type whose forward a module runs, looking through parametrizations; None for other modules."""
    if module is None:
        return None
    kind = type(module)
    if kind.__module__ == "torch.nn.utils.parametrize":
        kind = kind.__mro__[1]
    return kind if kind.__module__.startswith("torch.nn.modules.") else None


def held_shape(module: nn.Module, *settings: int) -> tuple[int, ...]:
    """Shape of the weight that a module holds, which runs; as its settings say where the weight is computed.

    They differ where a layer was cut by hand.
    """
    weight = module._parameters.get("weight")
    return settings if weight is None or isinstance(weight, UninitializedParameter) else tuple(weight.shape)


@lru_cache(maxsize=4096)
def plain_name(target: str | Callable[..., Any]) -> str:
    """One name for all spellings of an operation of torch.

    The arguments of an operator of an exported program come in the order of the function of that name in ``torch``.

    Returns:
        The name; empty for functions and operators of others.

    Example:
        >>> import operator, torch
        >>> [plain_name(t) for t in (operator.iadd, "__radd__", torch.ops.aten.add_.Tensor, torch.add)]
        ['add', 'add', 'add', 'add']
    """
    if isinstance(target, OpOverload | OpOverloadPacket):
        qualified = target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name
        home, _, name = qualified.partition("::")
        if home != "aten":
            return ""
    elif isinstance(target, str):
        name = target
    else:
        home = getattr(target, "__module__", None) or ""
        name = getattr(target, "__name__", "") if home.partition(".")[0] in HOMES else ""
    special = name.startswith("__") and name.endswith("__")
    name = name[2:-2] if special else name.removesuffix("_")
    return ALIASES.get(name, name)


def name_of(value: Value) -> str:
    """Plain name of the function or method; empty for a module."""
    return "" if value.module is not None or value.node.op == "placeholder" else plain_name(value.node.target)


def argument(value: Value, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    return value.args[position] if len(value.args) > position else value.kwargs.get(name, default)


def tensor_input(value: Value) -> Value | None:
    """The value that a unary operation reads."""
    first = value.args[0] if value.args else next(iter(value.kwargs.values()), None)
    return first if isinstance(first, Value) else None
