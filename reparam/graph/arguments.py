"""With what a forward is read: holes for tensors, and constants."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, final

import torch
from torch import nn

from reparam.graph.signatures import parameters_of
from reparam.graph.unread import Unread, first_line


@final
class Hole:
    """Stands for one tensor (or an unknown object) in the arguments of a call."""

    def __repr__(self) -> str:
        return "<tensor>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hole)

    def __hash__(self) -> int:
        return hash(Hole)


HOLE: Final = Hole()
_TENSOR: Final = torch.empty(0, device="meta")
ArgumentSpec = Mapping[str, Any]  # parameter name -> HOLE, a constant, or a list/tuple/dict of them


def default_arguments(module: nn.Module, method: str = "forward") -> dict[str, Any] | Unread:
    """Holes for the parameters without a default, and the defaults of the others."""
    spec: dict[str, Any] = {}
    try:
        parameters = parameters_of(module, method)
    except (TypeError, ValueError) as error:
        return Unread(first_line(error))
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        spec[name] = HOLE if parameter.default is parameter.empty else parameter.default
    return spec


def has_hole(spec: Any) -> bool:
    """Whether an argument stands for a tensor, or holds one that does."""
    if isinstance(spec, Hole):
        return True
    if isinstance(spec, Mapping):
        return any(has_hole(v) for v in spec.values())
    return isinstance(spec, list | tuple) and any(has_hole(v) for v in spec)


def filled(spec: Any, proxy: Any) -> Any:
    """``spec`` with the elements of ``proxy`` in its holes."""
    if isinstance(spec, Hole):
        return proxy
    if isinstance(spec, dict):
        return {k: filled(v, proxy[k]) if has_hole(v) else v for k, v in spec.items()}
    if isinstance(spec, list | tuple):
        items = [filled(v, proxy[i]) if has_hole(v) else v for i, v in enumerate(spec)]
        return type(spec)(*items) if hasattr(spec, "_fields") else type(spec)(items)
    return spec


def others(kinds: Iterable[Any]) -> Iterator[Any]:
    """What an argument may be in place of a tensor if it was asked whether it is of some classes; None: unknown."""
    for kind in kinds:
        if kind is None:
            yield None
        elif isinstance(_TENSOR, kind) or issubclass(list, kind):
            yield [HOLE, HOLE]
            yield (HOLE, HOLE)
        elif issubclass(tuple, kind):
            yield (HOLE, HOLE)
        else:
            yield None
