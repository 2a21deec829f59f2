"""Operations that write to their first argument, and those whose result may share its memory."""

import operator
from typing import Final

import torch

from reparam.graph.proxy import assign

IN_PLACE: Final = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, assign,
    *(
        getattr(getattr(torch.ops.aten, f"{name}_"), kind)
        for name in ("add", "sub", "mul", "div")
        for kind in ("Tensor", "Scalar")
    ),
}  # fmt: skip

# results that may share the memory of their first argument
VIEWS: Final = frozenset((
    "getitem", "reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "transpose", "swapaxes",
    "swapdims", "permute", "movedim", "moveaxis", "t", "chunk", "split", "split_with_sizes", "tensor_split",
    "unbind", "squeeze", "unsqueeze", "expand", "expand_as", "narrow", "select", "diagonal", "unfold", "detach",
    "contiguous", "to", "type", "float", "double", "half", "bfloat16", "type_as", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "broadcast_to", "getattr", "T", "mT",
    "slice", "alias", "real", "imag", "as_strided", "pixel_shuffle", "pixel_unshuffle", "adaptive_avg_pool2d",
))  # fmt: skip
