"""Copies of modules with other tensors in them, made without copying the old ones."""

import copy
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn

from reparam.graph.generated import SOURCE

_OWN: Final = frozenset(nn.Module().__dict__)
_VALUES: Final = frozenset(
    [int, float, str, bool, type(None), bytes, torch.dtype, torch.device, torch.Size, FunctionType, BuiltinFunctionType]
)
_COPYING: Final = (
    "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__",
    "__getnewargs_ex__",
)  # fmt: skip


def copies_itself(kind: type) -> bool:
    """Whether a class says itself how it is copied or pickled; torch's own layers do so in ways that are known."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            return False
        names = vars(base)
        layer = base.__module__.startswith("torch.nn.modules.") or SOURCE in names
        if not layer and any(name in names for name in _COPYING):
            return True
    return False


def shallow(module: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """A copy of a module whose attributes are plain values, with ``tensor(t)`` in the place of its tensors.

    Returns:
        The copy; None if a module in it holds more than plain values, has hooks, or is copied its own way.
    """
    kind, attributes = type(module), module.__dict__
    if copies_itself(kind):
        return None
    clone = kind.__new__(kind)
    own = clone.__dict__
    for name, value in attributes.items():
        if name not in _OWN:
            if type(value) is list and _is_value(tuple(value)):
                value = list(value)
            elif not _is_value(value):
                return None
            own[name] = value
        elif name in ("_parameters", "_buffers"):
            own[name] = {key: None if t is None else tensor(t) for key, t in value.items()}
        elif type(value) in _VALUES:
            own[name] = value
        elif name == "_non_persistent_buffers_set":
            own[name] = set(value)
        elif name != "_modules":
            if value:
                return None
            own[name] = type(value)()
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        below = None if child is None else shallow(child, tensor)
        if child is not None and below is None:
            return None
        children[name] = below
    own["_modules"] = children
    return clone


def _is_value(value: Any) -> bool:
    kind = type(value)
    return kind in _VALUES or isinstance(value, type) or (kind is tuple and all(_is_value(item) for item in value))


def precise_copy(module: nn.Module) -> nn.Module:
    """A deep copy of a module in float64 on the CPU."""
    made: dict[int, Any] = {}

    def once(given: Tensor) -> Tensor:
        if id(given) not in made:
            replaced = precise_tensor(given)
            made[id(given)] = nn.Parameter(replaced, given.requires_grad) if _is_parameter(given) else replaced
        result: Tensor = made[id(given)]
        return result

    found = shallow(module, once)
    if found is None:
        for given in (*module.parameters(), *module.buffers(), *_computed(module)):
            once(given)
        found = copy.deepcopy(module, made).to(
            device="cpu", dtype=torch.float64
        )  # made, unless it is copied its own way
    return found


def precise_tensor(tensor: Tensor) -> Tensor:
    """A copy in float64, if it holds such numbers, on the CPU."""
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


def _computed(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold as plain attributes with a gradient, as old hooks leave them: torch copies none."""
    for part in module.modules():
        yield from (value for value in part.__dict__.values() if isinstance(value, Tensor) and not value.is_leaf)


def _is_parameter(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.is_floating_point()


def copies_of_layers(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """The memo of ``copy.deepcopy`` with the layers of torch that hold nothing but tensors and plain values, copied.

    So are tensors that were computed with a gradient, which torch does not copy.
    """

    def copied(tensor: Tensor) -> Tensor:
        result: Tensor = copy.deepcopy(tensor, memo)
        return result

    memo.update({id(tensor): tensor.detach().clone() for tensor in _computed(model)})
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn.modules.") and not module._modules and id(module) not in memo:
            layer = shallow(module, copied)
            if layer is not None:
                memo[id(module)] = layer
    return memo
