"""What a forward may change while it is read, and how to undo it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

_OWN: Final = frozenset(nn.Module().__dict__)


@final
@dataclass
class Snapshot:
    """What a forward may change: attributes of the module and its children, tensors that it reads, random state."""

    module: nn.Module
    collections: list[tuple[str, Any, Any]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, dict[str, Any], list[dict[str, Any]]]] = field(default_factory=list)

    cached: str = ""

    def __post_init__(self) -> None:
        children = (c for c in self.module._modules.values() if c is not None)
        for module in (self.module, *(c for c in children if not isinstance(c, torch.jit.ScriptModule))):
            registered: list[dict[str, Any]] = [dict(registry) for registry in _registries(module)]
            self.attributes.append((module, dict(module.__dict__), registered))
            for name, value in module.__dict__.items():
                if name not in _OWN and type(value) in (dict, list, set):
                    self.collections.append((name, value, value.copy()))
        self.torch_random = torch.get_rng_state()
        self.python_random = random.getstate()

    def restore(self, read: Mapping[str, tuple[Tensor, Tensor]]) -> str:
        """Undo every change.

        Args:
            read: tensors that were read, by name, with their content before.

        Returns:
            What was changed, or an empty string; a collection that was only filled is named by ``cached`` instead.
        """
        changed = ""
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
        for name, collection, before in self.collections:
            if len(collection) != len(before) or any(a is not b for a, b in zip(collection, before, strict=True)):
                self.cached = name
                collection.clear()
                collection.extend(before) if isinstance(collection, list) else collection.update(before)
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
        return changed


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _unchanged(value: Tensor, old: Tensor) -> bool:
    if value.shape != old.shape or value.dtype != old.dtype:
        return False
    if not value.is_floating_point():
        return bool(torch.equal(value, old))
    return bool(torch.equal(value.nan_to_num(), old.nan_to_num()))
