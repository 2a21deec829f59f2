"""Models by name, from timm, torchvision, this library, a package or a file."""

import difflib
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from reparam.errors import MissingPackageError, ReparamError

ZOOS: Final = ("timm", "torchvision", "reparam")
FORMS: Final = "timm:NAME, torchvision:NAME, reparam:NAME, package.module:factory or path/file.py:factory"


@final
@dataclass(frozen=True, slots=True)
class Source:
    """A model by name.

    Args:
        name: as it was given.
        kwargs: arguments of its factory.
    """

    name: str
    kwargs: dict[str, Any]

    @property
    def zoo(self) -> str:
        """timm, torchvision or reparam; empty for a factory of the user's."""
        place = self.name.partition(":")[0]
        return place if place in ZOOS else ""

    def build(self) -> nn.Module:
        """The model, with random weights of seed 0 unless its arguments say otherwise.

        Raises:
            ReparamError: there is no such model, or its factory fails.
        """
        place, colon, name = self.name.rpartition(":")
        if not colon or not place or not name:
            close = [f"{zoo}:{self.name}" for zoo in ZOOS if self.name in _listed(zoo)]
            raise ReparamError(f"expected a model as {FORMS}, found {self.name!r}{_did_you_mean(close)}")
        factory = _of_zoo(place, name) if self.zoo else _of_user(place, name)
        torch.manual_seed(0)
        if isinstance(factory, nn.Module):
            if self.kwargs:
                raise ReparamError(f"expected no --kwargs, as {self.name} is a model and not a factory, found some")
            return factory
        try:
            model = factory(**self.kwargs)
        except Exception as error:
            raise ReparamError(
                f"expected {self.name} to be built from {self.kwargs}, but it raises {type(error).__name__}: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise ReparamError(f"expected {self.name} to return an nn.Module, found {type(model).__name__}")
        return model

    def inputs(self, model: nn.Module, shapes: Iterable[str]) -> tuple[Tensor, ...] | None:
        """Random inputs of the given shapes, or of the size that the zoo documents; None if neither is known.

        Raises:
            ReparamError: a shape cannot be read.
        """
        sizes = [parse_shape(shape) for shape in shapes]
        if not sizes and self.zoo:
            config: Any = getattr(model, "pretrained_cfg", None) or {}
            sizes = [(1, *config.get("input_size", (3, 224, 224)))]
        generator = torch.Generator().manual_seed(0)
        drawn = tuple(torch.randn(size, generator=generator) for size in sizes)
        return drawn or None


def called(name: str, wanted: str) -> Any:
    """What a function of the user's returns.

    Args:
        name: package.module:function or path/file.py:function.
        wanted: what it is to return, for messages.

    Raises:
        ReparamError: there is no such function, or it fails.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ReparamError(f"expected {wanted} as package.module:function or path/file.py:function, found {name!r}")
    try:
        return _of_user(place, function)()
    except ReparamError:
        raise
    except Exception as error:
        raise ReparamError(
            f"expected {name} to return {wanted}, but it raises {type(error).__name__}: {error}"
        ) from error


def parse_shape(text: str) -> tuple[int, ...]:
    """The sizes in ``1x3x224x224``.

    >>> parse_shape("1x3x8x8")
    (1, 3, 8, 8)
    """
    parts = text.replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ReparamError(f"expected --input as 1x3x224x224, found {text!r}")
    return tuple(int(part) for part in parts)


def parse_kwargs(text: str) -> dict[str, Any]:
    """The arguments in a JSON object.

    >>> parse_kwargs('{"num_classes": 10}')
    {'num_classes': 10}
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReparamError(f"expected --kwargs as a JSON object, found {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise ReparamError(f"expected --kwargs as a JSON object, found {text!r}")
    return found


def _of_zoo(zoo: str, name: str) -> Any:
    if name not in _listed(zoo, needed=True):
        close = difflib.get_close_matches(name, _listed(zoo), n=5, cutoff=0.5)
        close = [f"{zoo}:{match}" for match in close]
        close += [f"{other}:{name}" for other in ZOOS if other != zoo and name in _listed(other)]
        raise ReparamError(f"expected a model of {zoo}, found {name!r}{_did_you_mean(close)}")
    if zoo == "reparam":
        return getattr(importlib.import_module("reparam.models"), name)
    if zoo == "timm":
        timm = importlib.import_module("timm")
        return lambda **kwargs: timm.create_model(name, **kwargs)
    models = importlib.import_module("torchvision.models")
    return lambda **kwargs: models.get_model(name, **kwargs)


def _listed(zoo: str, *, needed: bool = False) -> list[str]:
    """Names of the models of a zoo; none if it is not installed and not needed."""
    if zoo == "reparam":
        return [variant.__name__ for variant in importlib.import_module("reparam.models").VARIANTS]
    try:
        module = importlib.import_module("timm" if zoo == "timm" else "torchvision.models")
    except ImportError as error:
        if needed:
            raise MissingPackageError.of(zoo, "has the model", "zoo") from error
        return []
    names: list[str] = module.list_models()
    return names


def _of_user(place: str, name: str) -> Any:
    module = _file(Path(place)) if place.endswith(".py") else _package(place)
    found = getattr(module, name, None)
    if found is None or not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        close = [f"{place}:{match}" for match in difflib.get_close_matches(name, names, n=5, cutoff=0.5)]
        raise ReparamError(f"expected a factory of a model in {place}, found no {name!r} there{_did_you_mean(close)}")
    return found


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        files = [str(file) for file in folder.glob("*.py")]
        close = difflib.get_close_matches(str(path), files, n=3, cutoff=0.5)
        raise ReparamError(f"expected a Python file, found none at {path}{_did_you_mean(close)}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"_reparam_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ReparamError(
            f"expected {path} to be importable, but it raises {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _package(place: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` has it
    try:
        return importlib.import_module(place)
    except Exception as error:
        close = [f"{zoo}:…" for zoo in difflib.get_close_matches(place, ZOOS, n=1)]
        raise ReparamError(
            f"expected {FORMS}, found {place!r}, which cannot be imported: {type(error).__name__}: {error}"
            f"{_did_you_mean(close)}"
        ) from error


def _did_you_mean(close: list[str]) -> str:
    return f"; did you mean {', '.join(close)}?" if close else ""
