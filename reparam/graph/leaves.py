"""Which modules are one operation: torch's own, and those that cannot be opened."""

from typing import Final

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

EXCLUDED: Final = "the module is excluded"
OUTSIDE: Final = "the module is excluded: it is not among those named by only"
SHARED: Final = "it is called in several places"
CLOSED: Final = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is an operation of torch itself, known by its type."""
    kind = type(module)
    if kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return False
    home = kind.__module__
    if home.startswith(("torch.nn.modules.", "torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")):
        return True
    return home == "torch.nn.utils.parametrize" and torch.nn.utils.parametrize.is_parametrized(module)


def hooks(module: nn.Module) -> str:
    """Names of the hooks that a module has, other than those that generate its weights."""
    known = (WeightNorm, SpectralNorm)
    found = []
    if module._forward_hooks:
        found.append("forward hook")
    if any(not isinstance(hook, known) for hook in module._forward_pre_hooks.values()):
        found.append("forward pre-hook")
    if module._backward_hooks or module._backward_pre_hooks:
        found.append("backward hook")
    return ", ".join(found)
