"""All liftings, in order, and what makes a linear operation unsafe to rewrite."""

from dataclasses import replace
from typing import Final

from torch._ops import OpOverload

from reparam.algebra import Refusal
from reparam.graph.constants import made_for
from reparam.graph.effects import written
from reparam.graph.leaves import SHARED, hooks
from reparam.graph.lift.arithmetic import added_product, arithmetic_sum, channel_product, scale, zeros
from reparam.graph.lift.base import Known, Lifted, Lifting, changing_weights
from reparam.graph.lift.casts import cast
from reparam.graph.lift.channels import channel_assignment, channel_selection, channel_shuffle, concatenation
from reparam.graph.lift.convs import conv_function, conv_module, conv_transpose_module
from reparam.graph.lift.layouts import order_of_axes
from reparam.graph.lift.linear import linear_function, linear_module
from reparam.graph.lift.norms import norm_function, norm_module
from reparam.graph.lift.pads import framed_pad, pad
from reparam.graph.lift.passing import passes_through
from reparam.graph.lift.pools import adaptive_pool, pool
from reparam.graph.lift.slices import spatial_slice
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.sizes import is_idle, is_plain
from reparam.graph.structures import values_in

LIFTINGS: Final[tuple[Lifting, ...]] = (
    conv_module,
    norm_module,
    linear_module,
    conv_transpose_module,
    passes_through,
    cast,
    order_of_axes,
    arithmetic_sum,
    scale,
    zeros,
    added_product,
    conv_function,
    norm_function,
    linear_function,
    channel_product,
    pad,
    framed_pad,
    pool,
    adaptive_pool,
    spatial_slice,
    channel_selection,
    concatenation,
    channel_shuffle,
    channel_assignment,
)
IN_PLACE: Final = Refusal("in_place", "it writes into memory that is read again later", "use the operation that copies")


def lift(value: Value, known: Known, liftings: tuple[Lifting, ...] = LIFTINGS) -> Lifted:
    """The formula of an operation; a refusal if it could be linear and is not; None for everything else."""
    if value.node.op == "placeholder" or is_plain(value) or _of_constants(value):
        return None
    changing = "" if value.module is None else changing_weights(value.module)
    if changing:
        return Refusal("parametrization", changing, "call eval() on it, or remove the parametrization")
    result: Lifted = None
    for lifting in liftings:
        result = lifting(value, known)
        if result is not None:
            break
    if result is None or isinstance(result, Refusal):
        return result
    if value.rank is not None:
        result = replace(result, assumed_rank=value.rank)
    made = made_for(value, result.terms)
    if made:
        result = replace(result, covers=(*result.covers, *made))
    refused = _unsafe(value, result, known)
    return refused if refused is not None else _sized(result, known)


def _of_constants(value: Value) -> bool:
    """Whether an operation is computed of constants alone."""
    return bool(value.inputs) and not any(True for _ in values_in((value.args, value.kwargs)))


def _sized(operation: Operation, known: Known) -> Operation:
    """With the lengths of the inputs, on which sums of strided operations, and maps of a bias, may depend."""
    if not known.shapes or (not known.one_size and all(set(conv.stride) <= {1} for conv in operation.terms.values())):
        return operation
    terms = {
        v: replace(conv, lengths=known.lengths(v, conv.axes), one_size=known.one_size)
        for v, conv in operation.terms.items()
    }
    return replace(operation, terms=terms)


def _unsafe(value: Value, operation: Operation, known: Known) -> Refusal | None:
    """Why a linear operation may not be rewritten where it stands."""
    if value.module is not None:
        reason = hooks(value.module)
        if reason:
            return Refusal("hooks", f"the module has a {reason}", "remove it before fusing")
        if value.shared and (next(value.module.parameters(), None) is not None or operation.norm):
            return Refusal("shared", SHARED, "give every caller a module of its own")
    for source, conv in operation.terms.items():
        space = known.space(source)
        if conv.in_channels and space is not None and (space.channels, space.axes) != (conv.in_channels, conv.axes):
            return Refusal("layout", f"its input has its channels elsewhere ({space}), or may broadcast")
    inside = {value, *operation.covers}
    for part in operation.covers:
        if part.returned or any(user not in inside and not is_idle(user) for user in part.users):
            return Refusal("used_elsewhere", f"a part of it, {part.name}, is also read elsewhere", "compute it twice")
    if value not in known.effects.pure and (written(value) or _writes(value)) and not _returns_its_input(operation):
        return IN_PLACE
    return None


def _writes(value: Value) -> bool:
    """Whether an operator of an exported program writes its first argument."""
    target = value.node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _returns_its_input(operation: Operation) -> bool:
    """Whether what an operation writes is what was there."""
    return operation.bias is None and [conv.identity for conv in operation.terms.values()] == [True]
