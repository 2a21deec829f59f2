"""Replace modules where they are registered, and undo it."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, final

from torch import nn

from reparam.report.receipt import ATTRIBUTE


@final
class State:
    """What a module consists of, to put it back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(module.__dict__)
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
        self.registered = [(registry, dict(registry.items())) for registry in registries]

    def restore(self) -> None:
        """Make it what it was."""
        if self._is_as_it_was():
            return
        if type(self.module) is not self.kind:
            object.__setattr__(self.module, "__class__", self.kind)
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for registry, entries in self.registered:
            if not _same(registry, entries):
                registry.clear()
                registry.update(entries)

    def _is_as_it_was(self) -> bool:
        pairs = [(self.module.__dict__, self.attributes), *self.registered]
        return type(self.module) is self.kind and all(_same(now, before) for now, before in pairs)


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether two mappings hold the same objects under the same names, in the same order."""
    pairs = zip(now.items(), before.items(), strict=False)
    return len(now) == len(before) and all(a == b and one is other for (a, one), (b, other) in pairs)


def homes_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module is registered."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                homes.setdefault(id(child), []).append((parent, name))
    return homes


def replace_module(homes: Mapping[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered."""
    for parent, name in homes[id(old)]:
        parent._modules[name] = new


def carry_attributes(old: nn.Module, new: nn.Module) -> None:
    """Plain attributes that were set on a replaced module go along; those that a convolution has stay its own."""
    for name, value in carried(old).items():
        if not hasattr(new, name):
            new.__dict__[name] = value


def carried(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module: neither torch's own nor parameters, buffers and children, nor its receipt."""
    own = nn.Module().__dict__.keys() | {"forward", ATTRIBUTE}
    return {name: value for name, value in module.__dict__.items() if name not in own}


def delete(module: nn.Module, target: str) -> None:
    """Remove a child, parameter or buffer; a list keeps the positions of the others."""
    parent_path, _, name = target.rpartition(".")
    try:
        parent = module.get_submodule(parent_path)
    except AttributeError:
        return
    if name in parent._modules:
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            parent._modules[name] = nn.Identity()
        else:
            del parent._modules[name]
    elif name in parent._parameters:
        parent._parameters[name] = None
    elif name in parent._buffers:
        parent._buffers[name] = None


def holds_tensors(module: nn.Module, target: str) -> bool:
    """Whether a descendant is there and has parameters or buffers, in it or below."""
    child = module
    for name in target.split("."):
        found = child._modules.get(name)
        if found is None:
            return False
        child = found
    return next(chain(child.parameters(), child.buffers()), None) is not None
