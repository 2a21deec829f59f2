"""The algebra of affine convolutions: tensors and integers, no graphs."""

from reparam.algebra.affine import Affine, border_rule, substitute
from reparam.algebra.branch_sum import branch_sum
from reparam.algebra.conv import Border, Conv, Ints, diagonal, identity, interned, permuted, pointwise, selection
from reparam.algebra.conv_after_conv import conv_after_conv
from reparam.algebra.pending import Pending
from reparam.algebra.refusal import Refusal

__all__ = [
    "Affine",
    "Border",
    "Conv",
    "Ints",
    "Pending",
    "Refusal",
    "border_rule",
    "branch_sum",
    "conv_after_conv",
    "diagonal",
    "identity",
    "interned",
    "permuted",
    "pointwise",
    "selection",
    "substitute",
]
