"""What was written, run as a module, so that it can be compared with the net that it came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten as flatten
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from reparam.errors import MissingPackageError


@final
class Written(nn.Module):
    """A file that was written, as a module without parameters.

    Args:
        run: takes the tensors among the arguments, in order, and returns the tensors of the result.
        dtype: to which floating point arguments are cast, as the file has one type for each.
        like: a result with the structure that is to be returned.
    """

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]], dtype: torch.dtype, like: Any) -> None:
        super().__init__()
        self._run, self._dtype, self._like = run, dtype, like
        self.eval()

    def __deepcopy__(self, memo: Any) -> "Written":
        return self  # it has no state of its own, and sessions of runtimes cannot be copied

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result for some arguments."""
        cast = tree_map(self._cast, (args, kwargs))
        results = iter(self._run([leaf for leaf in tree_leaves(cast) if isinstance(leaf, Tensor)]))
        leaves, structure = flatten(self._like)
        return tree_unflatten([next(results) if isinstance(x, Tensor) else x for x in leaves], structure)

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def onnx_file(path: Path, dtype: torch.dtype, like: Any) -> Written:
    """An ONNX file, checked by ``onnx`` and run by ``onnxruntime`` on the CPU."""
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]  # it has none
    except ImportError as error:
        raise MissingPackageError.of(str(error.name), "checks ONNX files", "onnx") from error
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return Written(run, dtype, like)


def program_file(path: Path, dtype: torch.dtype, like: Any, keywords: tuple[str, ...]) -> Written:
    """A program of ``torch.export``, loaded from its file."""
    module = torch.export.load(path).module()

    def run(tensors: list[Tensor]) -> list[Tensor]:
        positional = len(tensors) - len(keywords)
        result = module(*tensors[:positional], **dict(zip(keywords, tensors[positional:], strict=True)))
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    return Written(run, dtype, like)
