"""Read a checkpoint from a file, without running code that it may hold."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.checkpoints.fit import misfits, renamed
from reparam.checkpoints.unwrap import WRAPPER_PREFIXES, is_weights, weights_in
from reparam.errors import MissingPackageError, ReparamError


def safetensors_torch() -> Any:
    """The module ``safetensors.torch``.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError.of("safetensors", "reads and writes checkpoints", "deploy") from error
    return safetensors.torch


def read_checkpoint(
    path: str | Path, *, averaged: bool | None = None, trust_pickle: bool = False
) -> tuple[dict[str, Any], str]:
    """The weights in a file, whatever they are nested in.

    Args:
        path: a safetensors file, or one that ``torch.save`` wrote.
        averaged: take the moving average of the weights (True), the weights themselves (False), or the average if
            there is one (None).
        trust_pickle: unpickle everything, which **runs code that the file holds**. Otherwise only tensors and plain
            containers are read (``torch.load(weights_only=True)``).

    Returns:
        Key to tensor, and where they were found: names joined by dots, empty for the whole file.

    Raises:
        ReparamError: there is no such file, it cannot be read, holds code and is not trusted, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ReparamError(f"expected a checkpoint, found no file at {path}")
    content: Any = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path, trust_pickle)
    found, where = weights_in(content, averaged=averaged)
    if not is_weights(found):
        keys = sorted(str(key) for key in content)[:8] if isinstance(content, Mapping) else []
        shown = f"a dict with the keys {keys}" if keys else f"a value of type {type(content).__name__}"
        wanted = {None: "weights", True: "a moving average of weights", False: "weights"}[averaged]
        raise ReparamError(f"expected {wanted} in {path}, found {shown}: save model.state_dict()")
    return found, where


def load_checkpoint(
    model: nn.Module, path: str | Path, *, averaged: bool | None = None, trust_pickle: bool = False
) -> str:
    """Load a training checkpoint into a model.

    Weights nested under the usual names (``model``, ``state_dict``, ``model_ema`` …) are found, the prefixes of
    ``DistributedDataParallel``, ``torch.compile`` and averaged models are removed, and weights of other code bases are
    renamed for `reparam.models.RepVGG`.

    Args:
        model: changed in place, and only if everything fits.
        path: as for `read_checkpoint`.
        averaged: as for `read_checkpoint`.
        trust_pickle: as for `read_checkpoint`.

    Returns:
        Where in the file the weights were found: names joined by dots, empty for the whole file.

    Raises:
        ReparamError: the file cannot be read, or its weights do not fit; every key that does not is listed.
    """
    from reparam.models import RepVGG, load_weights

    weights, where = read_checkpoint(path, averaged=averaged, trust_pickle=trust_pickle)
    if isinstance(model, RepVGG):
        load_weights(model, weights)
        return where
    expected = model.state_dict()
    plain: dict[str, str] = {}
    for key in expected:
        short = key
        while short.startswith(WRAPPER_PREFIXES):
            short = short.partition(".")[2]
        plain.setdefault(short, key)
    found, given_as, doubled = renamed(weights, lambda key: plain.get(key, key))
    report = misfits(expected, found, given_as, doubled)
    if report:
        raise ReparamError(f"the weights in {path} do not fit {type(model).__name__}, nothing was changed{report}")
    model.load_state_dict(expected | found)
    return where


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    load = safetensors_torch().load_file
    try:
        tensors: dict[str, torch.Tensor] = load(path)
    except Exception as error:
        raise ReparamError(f"expected a safetensors file, found {path}, which cannot be read: {error}") from error
    return tensors


def _pickled(path: Path, trust: bool) -> Any:
    if trust:
        warnings.warn(f"unpickling {path} runs whatever code it holds", UserWarning, stacklevel=4)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust or not _is_pickle(path):
            raise _unreadable(path, error) from error
        reason = str(error).partition("\n")[0]
        raise ReparamError(
            f"expected tensors and plain containers in {path}, found pickled code, which was not run ({reason}):"
            " if you trust its source, pass trust_pickle=True (on the command line --trust-pickle)"
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file is one of torch's archives, or begins as a pickle does."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == pickle.PROTO


def _unreadable(path: Path, error: Exception) -> ReparamError:
    reason = str(error).partition("\n")[0]
    return ReparamError(
        f"expected a safetensors file or one that torch.save wrote, found {path}, which cannot be read:"
        f" {type(error).__name__}: {reason}"
    )
