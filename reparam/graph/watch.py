"""What a forward does with the tensors that it holds: whether it computes with them, or only hands them on.

A forward that only hands its parameters on, to operations of its input, gives the same graph whatever they hold. One
that computes with them (``if self.weight.sum() > 0``, a generated weight) may not, and may also write to them.
"""

from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode


def _getters(*names: str) -> list[Any]:
    return [vars(Tensor)[name].__get__ if name in vars(Tensor) else getattr(Tensor, name).__get__ for name in names]


# what is asked of a tensor that holds for all parameters of a model of one type on one device
TYPE: Final = frozenset(
    [*_getters("dtype", "device", "is_cuda", "is_meta", "layout"), Tensor.is_floating_point, Tensor.is_complex]
)
# what is asked of a tensor without looking at its numbers
OUTSIDE: Final = TYPE | frozenset(
    [
        *_getters("shape", "ndim", "requires_grad"),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "ndimension")),
    ]
)
WRITTEN_OUT: Final = frozenset(["__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow"))])


@final
class Watch(TorchFunctionMode):
    """While it lasts, notes whether torch is asked to compute with tensors alone, without a traced value.

    ``asked_type`` are the tensors whose type or device was asked for, ``looked_at`` those of which something else was,
    by identity. ``changed`` are the addresses of memory in which an operation has changed numbers.

    Args:
        first: called before the first such computation.
    """

    def __init__(self, first: Callable[[], None]) -> None:
        super().__init__()
        self.first = first
        self.changed: set[int] = set()
        self.computed = False
        self.asked_type: set[int] = set()
        self.looked_at: set[int] = set()

    def __torch_function__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, after ``first`` if need be."""
        noted = self.asked_type if func in TYPE else self.looked_at
        noted.update(id(argument) for argument in args if isinstance(argument, Tensor))
        if not self.computed and func not in OUTSIDE and not any(issubclass(kind, fx.Proxy) for kind in types):
            self.computed = True
            self.first()
        target: Any = args[0] if args and _writes(func) else None
        if not issubclass(type(target), Tensor) or target.is_meta:  # a traced value says that it is a tensor
            return func(*args, **(kwargs or {}))
        before = target.detach().clone()
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, target):
            self.changed.add(target.untyped_storage().data_ptr())
        return result


def _writes(function: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(function, "__name__", "")
    return name in WRITTEN_OUT or (name.endswith("_") and not name.endswith("__"))
