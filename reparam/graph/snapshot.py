"""What a forward may change while it is read, and how to undo it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from reparam.graph.beside import Beside
from reparam.graph.contents import OWN, Contents, OutOfReach, contents, is_iterator


@final
@dataclass
class Snapshot:
    """What a forward may change: attributes of the module and its children, tensors that it reads, random state."""

    module: nn.Module
    contents: list[Contents] = field(default_factory=list)
    attributes: list[tuple[nn.Module, dict[str, Any], list[dict[str, Any]]]] = field(default_factory=list)
    hidden: list[tuple[dict[str, Any], str, Any, OutOfReach]] = field(default_factory=list)

    cached: str = ""

    def __post_init__(self) -> None:
        self.known: set[int] = set()
        self.beside = Beside(type(self.module))
        self.contents += self.beside.contents
        for module in (self.module, *(c for c in self.module._modules.values() if c is not None)):
            self.add(module)
        self.torch_random = torch.get_rng_state()
        self.python_random = random.getstate()
        self.numpy_random = _numpy_random()

    def add(self, module: nn.Module) -> None:
        """Remember one more module, whose iterators are out of reach until all is restored."""
        if id(module) in self.known or isinstance(module, torch.jit.ScriptModule):
            return
        self.known.add(id(module))
        registered: list[dict[str, Any]] = [dict(registry) for registry in _registries(module)]
        self.attributes.append((module, dict(module.__dict__), registered))
        self.contents += contents(module)
        for name, value in module.__dict__.items():
            if name not in OWN and is_iterator(value):
                self.hidden.append((module.__dict__, name, value, OutOfReach(name)))
                module.__dict__[name] = self.hidden[-1][-1]

    def restore(self, read: Mapping[str, tuple[Tensor, Tensor]]) -> str:
        """Undo every change.

        Args:
            read: tensors that were read, by name, with their content before.

        Returns:
            What was changed, or an empty string; a collection that was only filled is named by ``cached`` instead.
        """
        changed = self.beside.restore()
        for held, name, value, stand_in in self.hidden:
            if held.get(name) is stand_in:
                held[name] = value
        for module, attributes, registered in self.attributes:
            now = module.__dict__
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                names = [k for k in {**now, **attributes} if now.get(k, self) is not attributes.get(k, self)]
                changed = f"forward sets attributes of the module ({', '.join(sorted(names)[:3])})"
                now.clear()
                now.update(attributes)
            for current, before in zip(_registries(module), registered, strict=True):
                if any(current.get(k) is not v for k, v in before.items()) or len(current) != len(before):
                    changed = "forward replaces parameters, buffers or children of the module"
                    current.clear()
                    current.update(before)
        for collection in self.contents:
            done = collection.restore()
            if done == "filled":
                self.cached = collection.name
            elif done:
                changed = f"forward changes {collection.name}"
        for name, (value, old) in read.items():
            if not _unchanged(value, old):
                changed = f"forward changes {name}"
                value.data = old
        if not torch.equal(torch.get_rng_state(), self.torch_random):
            torch.set_rng_state(self.torch_random)
            changed = changed or "forward draws random numbers"
        if random.getstate() != self.python_random:
            random.setstate(self.python_random)
            changed = changed or "forward draws random numbers"
        if _numpy_random() != self.numpy_random:
            name, keys, *rest = self.numpy_random
            np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
            changed = changed or "forward draws random numbers"
        return changed


def _numpy_random() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (what a forward may draw from)
    return (name, keys.tobytes(), *rest)  # type: ignore[union-attr]


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _unchanged(value: Tensor, old: Tensor) -> bool:
    if value.shape != old.shape or value.dtype != old.dtype:
        return False
    if not value.is_floating_point():
        return bool(torch.equal(value, old))
    return bool(torch.equal(value.nan_to_num(), old.nan_to_num()))
