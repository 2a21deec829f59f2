"""Operations that return their input."""

from typing import Final

import torch
from torch import nn

from reparam.graph.lift.base import Known, Lifted, identity_of
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.spaces import argument, name_of, stock, tensor_input

IDENTITY_NAMES: Final = frozenset("contiguous clone".split())


def passes_through(value: Value, known: Known) -> Lifted:
    """Operations that return their input: identity, dropout in eval mode, activations whose parameters make them so."""
    source = tensor_input(value)
    if source is None or value.node.op == "placeholder":
        return None
    module, kind, name = value.module, stock(value.module), name_of(value)
    same = False
    if module is not None:
        same = kind is nn.Identity or isinstance(module, nn.modules.dropout._DropoutNd) and (
            not module.training or module.p == 0
        )
        same = same or kind is nn.LeakyReLU and module.negative_slope == 1
        same = same or kind is nn.Hardtanh and (module.min_val, module.max_val) == (float("-inf"), float("inf"))
        same = same or kind is nn.RReLU and not module.training and module.lower + module.upper == 2  # type: ignore[operator]
    elif name in IDENTITY_NAMES and len(value.args) == 1:
        same = True
    elif name.endswith("dropout") or name in ("dropout1d", "dropout2d", "dropout3d"):
        training = argument(value, 2, "training", value.node.target is not torch.dropout)
        same = training is False or argument(value, 1, "p", 0.5) == 0
    elif name == "leaky_relu":
        same = argument(value, 1, "negative_slope", 0.01) == 1
    elif name == "getitem" and value.args[1] is Ellipsis:
        same = True
    elif name == "stochastic_depth":
        same = argument(value, 3, "training", True) is False
    return Operation("identity", {source: identity_of(known, source)}, {}) if same else None
