"""Write a model as an ONNX file or a program of ``torch.export``, and compare the file with the original net."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from reparam.errors import CheckError, MissingPackageError, ReparamError
from reparam.exporting.quiet import quietly
from reparam.exporting.written import Written, onnx_file, program_file
from reparam.files import in_a_folder
from reparam.verification.result import Verification
from reparam.verification.runs import Inputs
from reparam.verification.verify import verify

SUFFIXES: Final = (".onnx", ".pt2")
LARGEST_MESSAGE: Final = 1_900_000_000  # bytes; a larger ONNX file keeps its weights beside it


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    original: nn.Module | None = None,
    dynamic_batch: bool = False,
) -> Verification:
    """Write a model for another runtime, load the file, and compare it with the original net.

    Args:
        model: in eval mode, say what ``reparam.fuse`` returned.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        path: ``.onnx`` writes an ONNX file, checked with onnxruntime; ``.pt2`` a program of ``torch.export``. An
            existing file is replaced.
        original: the net before `fuse`; what was written is compared with it. By default, with ``model``.
        dynamic_batch: let the first axis of every input have any size; otherwise the sizes are those of the inputs.

    Returns:
        The comparison of ``original`` (a) with the file (b).

    Raises:
        CheckError: what was written differs by more than rounding; the file is removed.
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
        ReparamError: the suffix is another one, there is no folder to write into, or the model cannot be exported.

    Example:
        >>> import tempfile, torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> x = torch.randn(1, 3, 16, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = reparam.export(reparam.fuse(net), x, folder + "/net.pt2", original=net)
        >>> result.ok
        True
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ReparamError(f"expected a path that ends with .onnx or .pt2, found {path}")
    in_a_folder(path)
    if model.training:
        raise ReparamError(
            f"expected a model in eval mode, found {type(model).__name__} in training mode: model.eval()"
        )
    inputs = Inputs.of(example_inputs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    args, kwargs = inputs.fresh(dtype, next((p.device for p in model.parameters()), torch.device("cpu")))
    with torch.no_grad():
        like = copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    write = _onnx if path.suffix == ".onnx" else _program
    written = write(model, args, kwargs, path, dtype, like, dynamic_batch)
    result = verify(original or model, written, example_inputs)
    if not result.ok:
        path.unlink(missing_ok=True)
        raise CheckError(
            f"expected {path.name} to compute what {type(original or model).__name__} computes, found another result"
            f" (a: the net, b: the file), so the file was removed: {result}",
            result,
        )
    return result


def _onnx(
    model: nn.Module, args: Any, kwargs: Any, path: Path, dtype: torch.dtype, like: Any, dynamic: bool
) -> Written:
    try:
        import onnxscript  # noqa: F401  # torch.onnx needs it, and says so late
    except ImportError as error:
        raise MissingPackageError.of("onnxscript", "writes ONNX files", "onnx") from error
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    args, kwargs, shapes = _prepared(args, kwargs, dynamic)
    with quietly(), _explained(model, path):
        torch.onnx.export(
            model,
            args,
            path,
            kwargs=kwargs,
            dynamo=True,
            external_data=size > LARGEST_MESSAGE,
            dynamic_shapes=shapes,
            verbose=False,
        )
    return onnx_file(path, dtype, like)


def _program(
    model: nn.Module, args: Any, kwargs: Any, path: Path, dtype: torch.dtype, like: Any, dynamic: bool
) -> Written:
    args, kwargs, shapes = _prepared(args, kwargs, dynamic)
    with quietly(), _explained(model, path), torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        torch.export.save(program, path)
    return program_file(path, dtype, like, tuple(kwargs))


def _prepared(args: Any, kwargs: Any, dynamic: bool) -> tuple[Any, Any, Any]:
    """Inputs and the sizes that are left open; a batch of one is doubled, as torch takes a size of 1 for fixed."""
    if not dynamic:
        return args, kwargs, None

    def doubled(value: Any) -> Any:
        alone = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if alone else value

    args, kwargs = tree_map(doubled, (args, kwargs))
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise ReparamError(
                f"expected inputs with a batch axis for dynamic_batch, found {leaf!r}: export with fixed sizes"
            )
    batch = torch.export.Dim("batch")
    shapes = tree_map(lambda leaf: {0: batch}, (args, kwargs))
    return args, kwargs, (*shapes[0], *shapes[1].values())


@contextlib.contextmanager
def _explained(model: nn.Module, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ReparamError(
            f"expected a model that torch can export to {path.suffix}, found {type(model).__name__}, on which it raises"
            f" {type(error).__name__}: {reason}"
        ) from error
