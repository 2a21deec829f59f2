"""How many operations lie on the longest path to a tensor, counting those that round.

A product that adds up n terms, one after the other, rounds n times. If all terms have one sign, the k-th sum is k/n of
the result, and the roundings amount to ``u √(Σ (k/n)²) = u √(n / 3)`` of it; if they are independent, to less.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# These copy, choose or negate; their results are exact.
EXACT: Final = frozenset(
    [
        "relu", "relu_", "clone", "copy_", "_to_copy", "detach", "alias", "lift_fresh", "cat", "stack", "index",
        "index_select", "gather", "neg", "neg_", "abs", "sign", "maximum", "minimum", "max", "min", "amax", "amin",
        "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "hardtanh", "hardtanh_", "threshold", "where",
        "constant_pad_nd", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "fill_",
        "zero_", "roll", "flip", "repeat", "slice_scatter", "select_scatter", "empty_like", "zeros_like", "ones_like",
        "new_zeros", "new_empty", "_unsafe_view", "_reshape_copy", "channel_shuffle", "pixel_shuffle", "sort", "topk",
        *[f"{kind}_pad{axes}d" for kind in ("reflection", "replication") for axes in (1, 2, 3)],
    ]
)  # fmt: skip


class Depths(TorchDispatchMode):
    """While it is active, notes for every tensor how many rounding operations lead to it, and the coarsest dtype.

    Args:
        eps: of the numbers of the models; sums in a finer type count for less.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self._depths: Any = WeakTensorKeyDictionary()
        self.coarsest = 0.0

    def of(self, tensors: Mapping[str, Tensor]) -> float:
        """The largest depth of some tensors."""
        return max((self._depths.get(tensor, 0.0) for tensor in tensors.values()), default=0.0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to say that compilers skip it would import the compiler, which takes seconds

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        function: Callable[..., Any] = func
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = func.overloadpacket.__name__
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        depth = max((self._depths.get(tensor, 0.0) for tensor in read), default=0.0)
        if not (func.is_view or name in EXACT):
            depth += 1 + self._sums(name, args)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._depths[tensor] = depth
                if tensor.is_floating_point():
                    self.coarsest = max(self.coarsest, torch.finfo(tensor.dtype).eps)
        if name.endswith("_") and read and read[0]._base is not None:
            self._depths[read[0]._base] = max(depth, self._depths.get(read[0]._base, 0.0))
        return result

    def _sums(self, name: str, args: tuple[Any, ...]) -> float:
        """The roundings inside of a convolution or product of matrices, as that many of its results."""
        terms = _terms(name, args)
        if not terms:
            return 0.0
        finest = torch.finfo(torch.float32).eps  # in which sums of shorter numbers are formed
        eps = min(torch.finfo(args[0].dtype).eps, finest)
        return terms / 3 * min(eps / self.eps, 1.0) ** 2


def _terms(name: str, args: tuple[Any, ...]) -> int:
    """Terms of each sum in a convolution or product of matrices; 0 for other operations.

    >>> _terms("addmm", (torch.zeros(3), torch.zeros(2, 5), torch.zeros(5, 3)))
    5
    """
    if name in ("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution") and args[0].numel():
        weight = args[1]
        transposed = name != "mkldnn_convolution" and bool(args[6])
        outputs = weight.shape[1] * args[8] if transposed else weight.shape[0]
        return int(weight.numel() // max(outputs, 1))
    if name in ("mm", "bmm", "mv", "dot"):
        return int(args[0].shape[-1])
    return int(args[1].shape[-1]) if name in ("addmm", "baddbmm", "addmv") else 0
