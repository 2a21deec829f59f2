"""Parameters, buffers and tensors made while reading that a forward writes what depends on its input into."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from reparam.graph.in_place import IN_PLACE, VIEWS
from reparam.graph.proxy import assign


def writes_to_tensors(graph: fx.Graph) -> str:
    """What a forward writes to, if it is no value of its own; empty if nothing."""
    for node in graph.nodes:
        for target in _written(node):
            name = _tensor(target)
            if name:
                return f"forward writes to {name}"
    return ""


def changed_meanwhile(memory: Collection[int], read: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the parameters and buffers of those that were read whose memory was changed."""
    if not memory:
        return []
    registered = ((name, tensor) for name, tensor in read if not name.startswith("_constant"))
    return [name for name, tensor in registered if tensor.untyped_storage().data_ptr() in memory]


def _written(node: fx.Node) -> tuple[Any, ...]:
    if node.op not in ("call_method", "call_function"):
        return ()
    if "out" in node.kwargs:
        return (node.kwargs["out"],)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is F.batch_norm:
        training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
        statistics = (*node.args[1:3], *(node.kwargs.get(k) for k in ("running_mean", "running_var")))
        return () if training is False else statistics
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return node.args[:1] if in_place or node.target in (assign, *IN_PLACE) else ()


def _tensor(target: Any) -> str:
    """The tensor that a node reads, or a view of it; empty if it is a value."""
    while isinstance(target, fx.Node):
        if target.op == "get_attr":
            return str(target.target)
        name = target.target if isinstance(target.target, str) else getattr(target.target, "__name__", "")
        target = target.args[0] if name in VIEWS and target.args else None
    return ""
