"""Save a fused model, and load it into a freshly built and fused one."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from reparam.checkpoints.fit import misfits
from reparam.checkpoints.read import safetensors_torch
from reparam.errors import ReparamError
from reparam.files import in_a_folder
from reparam.graph.generated import SOURCE, base_class

FORMAT: Final = "reparam-deploy-1"


def save_deploy(
    fused: nn.Module, path: str | Path, *, source: str = "", metadata: dict[str, str] | None = None
) -> None:
    """Save the weights of a fused model as a safetensors file that says what it belongs to.

    The file carries the version of this library, the source architecture, the hash of the plan, and what each module
    is, so that `load_deploy` can tell a model that was fused in another way.

    Args:
        fused: what ``reparam.fuse`` returned.
        path: of the file; an existing one is replaced.
        source: what the model is built from, say ``timm:repvgg_a0``; the name of its class by default.
        metadata: more to be kept in the file.

    Raises:
        ReparamError: safetensors is not installed, there is no folder to write into, the model has no numbers, or keeps
            something that is no tensor.
    """
    file = in_a_folder(Path(path))
    tensors: dict[str, torch.Tensor] = {}
    for key, value in fused.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ReparamError(
                f"expected tensors in the state of {type(fused).__name__}, found a {type(value).__name__} at {key}:"
                " a safetensors file holds tensors only"
            )
        if value.is_meta:
            raise ReparamError(f"expected numbers in {type(fused).__name__}, found a meta tensor at {key}")
        tensors[key] = value.detach().cpu().contiguous().clone()  # such a file has no shared memory
    described = describe(fused)
    header = {
        **(metadata or {}),
        "format": FORMAT,
        "reparam_version": _version(),
        "source": source or type(fused).__qualname__,
        "plan_hash": plan_hash(described),
        "modules": json.dumps(described),
    }
    safetensors_torch().save_file(tensors, file, metadata=header)


def load_deploy(
    build: Callable[[], nn.Module], path: str | Path, *, fuse: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """Build a model, fuse it, and load a file that `save_deploy` wrote.

    Args:
        build: returns the source architecture, with any weights.
        path: of the file.
        fuse: how it was fused, if not by ``reparam.fuse(model)``: say ``partial(reparam.fuse, cost=my_cost)``.

    Returns:
        The fused model in eval mode, with the weights and the data type of the file.

    Raises:
        ReparamError: safetensors is not installed, the file is no deploy checkpoint, or the model was fused in another
            way; every key and every module that differs is listed.

    Example:
        >>> import tempfile, torch, reparam
        >>> build = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> fused = reparam.fuse(build().eval())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reparam.save_deploy(fused, folder + "/net.safetensors")
        ...     loaded = reparam.load_deploy(build, folder + "/net.safetensors")
        >>> torch.equal(loaded[0].weight, fused[0].weight)
        True
    """
    from reparam.api import fuse as usual

    header, tensors = read_deploy(path)
    model = build()
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected build to return an nn.Module, found {type(model).__name__}")
    fused = (fuse or usual)(model.eval())
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) == 1:
        fused = fused.to(kinds.pop())
    expected = fused.state_dict()
    report = misfits(expected, tensors, {key: key for key in tensors}) or _differences(header, fused)
    if report:
        raise ReparamError(
            f"{path} does not fit {type(model).__name__} as it was built and fused here: it was saved by reparam"
            f" {header['reparam_version']} (here {_version()}) from {header['source']}{report}\n"
            "  Build the same architecture, and fuse it with the same options."
        )
    fused.load_state_dict(expected | tensors)
    return fused


def read_deploy(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Header and tensors of a file that `save_deploy` wrote.

    Raises:
        ReparamError: safetensors is not installed, there is no such file, or it is another kind of file.
    """
    library = safetensors_torch()
    path = Path(path)
    if not path.is_file():
        raise ReparamError(f"expected a deploy checkpoint, found no file at {path}")
    try:
        with library.safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
        tensors: dict[str, torch.Tensor] = library.load_file(path)
    except Exception as error:
        raise ReparamError(
            f"expected a deploy checkpoint (safetensors), found {path}, which cannot be read: {error}"
        ) from error
    if header.get("format") != FORMAT:
        found = header.get("format", "no such mark")
        raise ReparamError(
            f"expected a deploy checkpoint ({FORMAT}), found {path} with {found}: fuse the model and save it with"
            " reparam.save_deploy; weights as they were trained are read by reparam.load_checkpoint"
        )
    return header, tensors


def describe(model: nn.Module) -> dict[str, str]:
    """What each module is that owns tensors or has a generated forward, by path."""
    described: dict[str, str] = {}
    for path, module in model.named_modules():
        source = getattr(type(module), SOURCE, "")
        if source or any(True for _ in module.parameters(recurse=False)) or module._buffers:
            forward = f", forward {hashlib.sha256(source.encode()).hexdigest()[:8]}" if source else ""
            described[path] = f"{base_class(module).__name__}({module.extra_repr()}){forward}"
    return described


def plan_hash(described: dict[str, str]) -> str:
    """What a plan made of a model, in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(described.items())).encode()).hexdigest()[:16]


def _differences(header: dict[str, str], fused: nn.Module) -> str:
    here = describe(fused)
    if plan_hash(here) == header["plan_hash"]:
        return ""
    saved: dict[str, Any] = json.loads(header["modules"])
    lines = [
        f"{path or '(model)'}: saved {saved.get(path, 'nothing')}, here {here.get(path, 'nothing')}"
        for path in {**saved, **here}
        if saved.get(path) != here.get(path)
    ]
    return f"\n  other modules ({len(lines)}):\n    " + "\n    ".join(lines)


def _version() -> str:
    try:
        return version("reparam")
    except PackageNotFoundError:
        return "unknown"
