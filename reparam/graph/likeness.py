"""Which modules are alike: their forwards do the same, whatever their parameters hold.

Two modules are alike if they agree in all that a forward can look at without computing with a tensor: class, training
mode, attributes, the shapes and types of parameters and buffers, and the same of their children by name. Attributes
that are not plain values agree only if they are the same object. A module with hooks, or with something in it that is
registered twice, is like no other.
"""

from collections import Counter
from typing import Any, Final, final

import torch
from torch import Tensor, nn

_REGISTRIES: Final = frozenset(["_parameters", "_buffers", "_modules"])
_OWN: Final = frozenset(nn.Module().__dict__) - _REGISTRIES - {"training", "_non_persistent_buffers_set"}
_ATOMS: Final = frozenset(
    [int, str, bool, type(None), bytes, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format]
)
_LISTS: Final = frozenset([tuple, list])
_SETS: Final = frozenset([set, frozenset])


@final
class Likeness:
    """Numbers for the modules of one model: alike modules have the same.

    Example:
        >>> pair = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, padding=1))
        >>> like = Likeness(pair)
        >>> [like.number(conv) == like.number(pair[0]) for conv in pair]
        [True, True, False]
    """

    def __init__(self, model: nn.Module) -> None:
        places: Counter[int] = Counter()
        for module in model.modules():
            for registry in () if _is_scripted(module) else (module._parameters, module._buffers, module._modules):
                places.update([id(entry) for entry in registry.values() if entry is not None])
        self._repeated = {key for key, count in places.items() if count > 1}
        self._numbers: dict[Any, int] = {}
        self._known: dict[int, int | None] = {}

    def number(self, module: nn.Module) -> int | None:
        """The number of a module; None for one that is like no other."""
        key = id(module)
        if key not in self._known:
            self._known[key] = None  # while it is looked at: a module within itself
            description = self._describe(module)
            if description is not None:
                self._known[key] = self._numbers.setdefault(description, len(self._numbers))
        return self._known[key]

    def _describe(self, module: nn.Module) -> tuple[Any, ...] | None:
        attributes = module.__dict__
        if _is_scripted(module) or any(attributes.get(name) for name in _OWN):
            return None
        parts: list[Any] = [type(module)]
        for name, child in module._modules.items():
            number = None if child is None else self.number(child)
            if child is not None and (number is None or id(child) in self._repeated):
                return None
            parts.append((name, number))
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and id(tensor) in self._repeated:
                    return None
                parts.append((name, None if tensor is None else _kind(tensor)))
        for name, value in attributes.items():
            if name not in _OWN and name not in _REGISTRIES:
                parts.append((name, _plain(value)))
        return tuple(parts)


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _plain(value: Any) -> Any:
    """Something hashable that two attributes have in common only if they are equal, or the same object."""
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind in _LISTS:
        return (kind, *[_plain(item) for item in value])
    if kind is dict:
        return (kind, *[(_plain(key), _plain(item)) for key, item in value.items()])
    if kind in _SETS:
        return kind, frozenset([_plain(item) for item in value])
    return kind, id(value)
