"""Outcomes of the conditions of a forward that compute the same, as those of a frozen norm that asks for gradients.

detectron2's ``FrozenBatchNorm2d`` is arithmetic on buffers if its input requires a gradient, and ``F.batch_norm`` if
not. Outcomes are one iff each is one scale and shift per channel of the one input, with the same numbers up to the
rounding of the data type that they are held in (on the meta device, which has no numbers: with the same structure).

``F.batch_norm`` takes channels on axis 1 of any rank, so the outcome that stands for all is one that is written out:
the shape of its constants says where they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from reparam.algebra import Affine, Refusal, substitute
from reparam.graph.constants import is_constant, put_constants
from reparam.graph.effects import Effects
from reparam.graph.lift import Known, lift
from reparam.graph.net import Frame, Net, Value
from reparam.graph.operation import Operation
from reparam.graph.ranks import infer_ranks
from reparam.graph.sizes import is_plain
from reparam.graph.spaces import infer
from reparam.graph.trace import Trace

ROUNDINGS: Final = 4  # between two ways to compute a scale and a shift
Run = Callable[[Net, Frame], Any]


def settled(traced: Trace, run: Run) -> Trace:
    """A forward as the one outcome that all of its outcomes are; as it is if they are not the same.

    Args:
        traced: a forward with several outcomes.
        run: puts the operations of a call into a net, and returns their result.
    """
    outcomes = [replace(traced, otherwise=(), branches=""), *traced.otherwise]
    if any(True for _ in traced.module.children()) or any(_is_special(outcome) for outcome in outcomes):
        return traced
    net, results = _side_by_side(outcomes, run)
    operations = _operations(net, results)
    found = [_scale_and_shift(net.values[0], result, operations) for result in results]
    rounding = max(map(_rounding, outcomes))
    if not all(one is not None and found[0] is not None and _agree(found[0], one, rounding) for one in found):
        return traced
    normed = {value.frame for value, operation in operations.items() if operation.norm}
    written_out = next((frame.trace for frame in net.frames if frame not in normed), None)
    if written_out is None:
        return traced
    named = {name: getattr(written_out, name) for name in ("graph", "inputs", "tensors", "within")}
    return replace(outcomes[0], **named)


def _is_special(traced: Trace) -> bool:
    """Whether a reading is more than operations on one input."""
    return len(traced.inputs) != 1 or bool(traced.modes or traced.specialised or traced.cache or traced.recast)


def _side_by_side(outcomes: list[Trace], run: Run) -> tuple[Net, list[Any]]:
    """All outcomes as operations of one net with one input, and their results."""
    frames = [Frame(outcome.module, "", outcome) for outcome in outcomes]
    net = Net(frames[0], [], frames, None)
    (node,) = outcomes[0].inputs.values()
    net.values.append(Value(0, frames[0], node))
    results = []
    for frame in frames:
        (node,) = frame.trace.inputs.values()
        frame.env[node] = net.values[0]
        results.append(run(net, frame))
    for result in results:
        if isinstance(result, Value):
            result.returned = True
    put_constants(net)
    return net, results


def _operations(net: Net, results: list[Any]) -> Mapping[Value, Operation]:
    """The operations of a net; none if some are not linear, apart from constants, sizes and the like."""
    known = _known(net, results)
    lifted = {} if known is None else {value: lift(value, known) for value in net.values[1:] if not is_plain(value)}
    found = {value: operation for value, operation in lifted.items() if isinstance(operation, Operation)}
    inside = {part for operation in found.values() for part in operation.covers}
    return found if all(value in found or value in inside or is_constant(value) for value in lifted) else {}


def _known(net: Net, results: list[Any]) -> Known | None:
    """What is known about a net whose input has the channels of its results; None if these are not known.

    Tokens, on which ``F.batch_norm`` has channels elsewhere, do not count.
    """
    spaces = infer(net)
    space = next((spaces[result] for result in results if result in spaces), None)
    if space is None or not space.axes:
        return None
    shapes = {net.values[0]: (2, space.channels, *range(3, 3 + space.axes))}
    ranks = infer_ranks(net, shapes)
    return Known(infer(net, ranks, shapes), Effects(net), ranks)


def _scale_and_shift(source: Value, result: Any, operations: Mapping[Value, Operation]) -> Affine | None:
    """The formula of a result if it is one scale and shift per channel of ``source``."""
    done: dict[Value, Affine] = {}
    for value, operation in operations.items():
        formula = substitute(operation.numbers(), done)
        if isinstance(formula, Refusal):
            return None
        done[value] = formula
    found = done.get(result)
    if found is None or found.terms.keys() != {source} or not found.terms[source].diagonal or found.size is not None:
        return None
    return found


def _agree(one: Affine, other: Affine, rounding: float) -> bool:
    """Whether two scales and shifts are the same up to rounding."""
    if one.biased is not other.biased:
        return False
    numbers = [(_scale(formula), formula.bias) for formula in (one, other)]
    pairs = [(a, b) for a, b in zip(*numbers, strict=True) if a is not None and b is not None and not a.is_meta]
    most = max((float(number.abs().max()) for pair in pairs for number in pair), default=0.0)
    return all(bool(((a - b).abs() <= rounding * most).all()) for a, b in pairs)


def _scale(formula: Affine) -> Tensor:
    (conv,) = formula.terms.values()
    return torch.ones(1, dtype=torch.float64) if conv.weight is None else conv.weight.flatten().double()


def _rounding(traced: Trace) -> float:
    """How far two ways to compute a number from what a forward reads may come apart."""
    kinds = [tensor.dtype for tensor in traced.tensors.values() if tensor.is_floating_point()]
    return ROUNDINGS * max((torch.finfo(kind).eps for kind in kinds), default=0.0)
