"""What a forward does with the tensors that it holds: whether it computes with them, or only hands them on.

A forward that only hands its parameters on, to operations of its input, gives the same graph whatever they hold. One
that computes with them (``if self.weight.sum() > 0``, a generated weight) may not, and may also write to them.
"""

from collections.abc import Callable
from typing import Any, Final, final

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


@final
class Watch(TorchFunctionMode):
    """While it lasts, notes whether torch is asked to compute with tensors alone, without a traced value.

    ``asked_type`` are the tensors whose type or device was asked for, ``looked_at`` those of which something else was,
    by identity.

    Args:
        first: called before the first such computation.
    """

    def __init__(self, first: Callable[[], None]) -> None:
        super().__init__()
        self.first = first
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
        return func(*args, **(kwargs or {}))
