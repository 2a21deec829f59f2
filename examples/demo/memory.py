"""Memory of activations."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ActivationMemory(TorchDispatchMode):
    """Counts the bytes of activations that are alive, and their peak.

    Under this mode every ATen operation that the net calls passes through `__torch_dispatch__`. A storage that comes
    out of one for the first time is a new activation: its bytes are added, and a finalizer takes them off again when
    PyTorch frees the storage. Views and in-place results share a storage and so count once. Storages that existed
    before the forward are given as `known` and never count: parameters, buffers and the input batch. What a kernel
    allocates and frees inside one operation (the workspace of oneDNN or cuDNN) is not seen, and neither is the
    rounding of an allocator. So the figure is what the net's own tensors need on any device, not the size of the
    process; it includes tensors that only the Python code around the operations still holds.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._open = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._open:
                storage = leaf.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self._open.add(address)
                self.live += size
                weakref.finalize(storage, self._release, address, size)
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, address: int, size: int) -> None:
        self._open.discard(address)
        self.live -= size


def peak_activation_bytes(net: nn.Module, batch: Tensor) -> int:
    memory = ActivationMemory([*net.parameters(), *net.buffers(), batch])
    with torch.no_grad(), memory:
        net(batch)
    return memory.peak
