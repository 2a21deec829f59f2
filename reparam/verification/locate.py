"""The first module where two models part.

A module that received the same and returned something else is where they part, as far as the two modules are meant to
compute the same. In a fused model the modules within a rewritten block are not: its convolution returns what the sum of
the block returned before. So a module is entered only where both models call the same children in the same order; and a
child whose result differs is passed over if its parent was rewritten and a later child returns the same again.
"""

from collections.abc import Iterable

from torch import nn

from reparam.verification.compare import Comparison
from reparam.verification.runs import ROOT, Key


def first_parted(found: Comparison) -> Key | None:
    """The call of the first module where two models part; that of the model itself, or None if they do not part."""
    if not found.parted(ROOT):
        return None
    key = ROOT
    while (inner := _inner(found, key)) is not None:
        key = inner
    return key


def region(found: Comparison, key: Key) -> list[Key]:
    """A call, and the calls after it that do nothing any more in the second model: what they did was folded into it."""
    calls = [key]
    siblings = _children(found.first.order, found.first.parents, found.first.parents.get(key, ROOT))
    for later in siblings[siblings.index(key) + 1 :] if key in siblings else ():
        gone = isinstance(found.b.model.get_submodule(later[0]), nn.Identity)
        if not gone or isinstance(found.a.model.get_submodule(later[0]), nn.Identity):
            break
        calls.append(later)
    return calls


def _inner(found: Comparison, key: Key) -> Key | None:
    children, theirs = (_children(record.order, record.parents, key) for record in (found.first, found.second))
    if children != theirs:
        return None
    rewritten = not _alike(found.a.model.get_submodule(key[0]), found.b.model.get_submodule(key[0]))
    for index, child in enumerate(children):
        if child not in found.second.unlike or not found.parted(child) or not found.same_inputs(child):
            continue
        if rewritten and any(not found.parted(later) for later in children[index + 1 :]):
            continue
        return child
    return None


def _children(order: Iterable[Key], parents: dict[Key, Key], key: Key) -> list[Key]:
    return [call for call in order if parents.get(call) == key]


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules consist of the same kinds of modules and tensors."""

    def form(module: nn.Module) -> list[object]:
        tensors = (*module.named_parameters(), *module.named_buffers())
        kinds: list[object] = [(path, _kind(child)) for path, child in module.named_modules()]
        return kinds + [(name, tuple(tensor.shape)) for name, tensor in tensors]

    return form(a) == form(b)


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__qualname__, module.extra_repr().partition(", eps=")[0]
