"""Multi-branch blocks as plain modules: they know nothing of how they will be fused.

made = reparam.nn.block(nn.Conv2d(8, 8, 3, padding=1, bias=False), "dbb", norm=nn.BatchNorm2d(8))
"""

from reparam.nn.branches import Branch, dilated
from reparam.nn.geometry import Geometry, UnfitError
from reparam.nn.multi_branch import MultiBranch, block
from reparam.nn.parts import BiasMap, ChannelScale, NormAndPad, Widened
from reparam.nn.recipes import (
    BRANCHES,
    PRESETS,
    Recipe,
    Widening,
    acnet,
    dbb,
    dilated_reparam,
    expandnet,
    mobileone,
    qarepvgg,
    repvgg,
    sesr,
)

__all__ = [
    "BRANCHES",
    "PRESETS",
    "BiasMap",
    "Branch",
    "ChannelScale",
    "Geometry",
    "MultiBranch",
    "NormAndPad",
    "Recipe",
    "UnfitError",
    "Widened",
    "Widening",
    "acnet",
    "block",
    "dbb",
    "dilated",
    "dilated_reparam",
    "expandnet",
    "mobileone",
    "qarepvgg",
    "repvgg",
    "sesr",
]
