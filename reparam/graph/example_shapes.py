"""Shapes of all values for the example inputs: those that the run saw, and what follows from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reparam.graph.examples import Call
from reparam.graph.net import Net, Value
from reparam.graph.run import result_on_meta
from reparam.graph.shapes import Shape, shapes_of


def all_shapes(net: Net, calls: Mapping[str, list[Call]]) -> dict[Value, Shape]:
    """Shapes of the values of a net, as far as they can be known.

    Calls of modules were seen while the model ran; functions between them are run on tensors without content. What
    cannot be run so is not known, and neither is what depends on it alone.
    """
    shapes = shapes_of(net, calls)
    results: dict[Value, Any] = {}
    with torch.no_grad():
        for value in net.values:
            if value in shapes:
                results[value] = torch.empty(shapes[value], device="meta")
                continue
            if value.node.op == "placeholder" or any(source not in results for source in value.inputs):
                continue
            try:
                results[value] = result_on_meta(value, results)
            except Exception:  # anything that a function may raise on tensors without content
                continue
            if isinstance(results[value], Tensor):
                shapes[value] = tuple(results[value].shape)
    return shapes
