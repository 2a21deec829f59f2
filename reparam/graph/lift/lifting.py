"""All liftings, in order, and what makes a linear operation unsafe to rewrite."""

from typing import Final

from torch.nn.utils import parametrize

from reparam.algebra import Refusal
from reparam.graph.effects import written
from reparam.graph.lift.arithmetic import arithmetic_sum, scale
from reparam.graph.lift.base import Known, Lifted, Lifting
from reparam.graph.lift.convs import conv_function, conv_module, conv_transpose_function, conv_transpose_module
from reparam.graph.lift.linear import linear_function, linear_module
from reparam.graph.lift.norms import batch_norm_function, batch_norm_module
from reparam.graph.lift.pads import framed_pad, pad
from reparam.graph.lift.passing import passes_through
from reparam.graph.lift.pools import average_pool
from reparam.graph.lift.slices import spatial_slice
from reparam.graph.net import SHARED, Value, hooks
from reparam.graph.operation import Operation

LIFTINGS: Final[tuple[Lifting, ...]] = (
    conv_module,
    batch_norm_module,
    linear_module,
    conv_transpose_module,
    passes_through,
    arithmetic_sum,
    scale,
    conv_function,
    batch_norm_function,
    linear_function,
    conv_transpose_function,
    pad,
    framed_pad,
    average_pool,
    spatial_slice,
)


def lift(value: Value, known: Known, liftings: tuple[Lifting, ...] = LIFTINGS) -> Operation | Refusal | None:
    """The formula of an operation; a refusal if it could be linear and is not; None for everything else."""
    if value.node.op == "placeholder":
        return None
    result: Lifted = None
    for lifting in liftings:
        result = lifting(value, known)
        if result is not None:
            break
    if result is None or isinstance(result, Refusal):
        return result
    refused = _unsafe(value, result, known)
    return refused if refused is not None else result


def _unsafe(value: Value, operation: Operation, known: Known) -> Refusal | None:
    """Why a linear operation may not be rewritten where it stands."""
    if value.module is not None:
        reason = hooks(value.module)
        if reason:
            return Refusal("hooks", f"the module has a {reason}", "remove it before fusing")
        if value.shared and (next(value.module.parameters(), None) is not None or operation.norm):
            return Refusal("shared", SHARED, "give every caller a module of its own")
        if parametrize.is_parametrized(value.module) and value.module.training:
            return Refusal("parametrization", "the module is in training mode", "call eval() on it")
    for source, conv in operation.terms.items():
        space = known.space(source)
        if conv.in_channels and space is not None and (space.channels, space.axes) != (conv.in_channels, conv.axes):
            return Refusal("layout", f"its input has its channels elsewhere ({space}), or may broadcast")
    if value not in known.effects.pure and written(value):
        return Refusal("in_place", "it writes into memory that is read again later", "use the operation that copies")
    return None
