"""A model made fast on given inputs: its weights in the memory format in which it takes less time there."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from reparam.errors import ReparamError
from reparam.graph.memory_format import (
    CHANNELS_LAST,
    convolutions,
    has_channels_last,
    put_channels_first,
    put_channels_last,
)
from reparam.timing import in_turn
from reparam.verification.runs import Inputs

ROUNDS: Final = 7
ENOUGH: Final = 6  # rounds in which the other format must be faster: by chance alone that happens in 6 of 100 cases
SECONDS: Final = 0.1  # per format and round


def called_with(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """A call of a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    given = Inputs.of(inputs)
    return partial(model, *given.args, **given.kwargs)


def refuse_target(model: nn.Module, target: Any) -> None:
    """Raise if a model cannot be timed on a target; it is a copy of it that is run.

    Raises:
        ReparamError: it does not run there.
    """
    try:
        with torch.inference_mode():
            called_with(copy.deepcopy(model), target)()
    except Exception as error:
        raise ReparamError(
            f"expected a target on which the model can be timed, found one on which it raises {type(error).__name__}:"
            f" {error}; pass what the model is called with, on its device"
        ) from error


def put_in_faster_format(model: nn.Module, target: Any) -> None:
    """Put the weights of convolutions channels last, or first, if the model is faster on the target then.

    The format in which they are stays unless the other one is faster in ``ENOUGH`` of ``ROUNDS`` rounds, in which both
    are timed in turn.
    """
    weights = [conv.weight for conv in convolutions(model)]
    if not any(weight.dim() in CHANNELS_LAST for weight in weights):
        return
    change = put_channels_first if any(map(has_channels_last, weights)) else put_channels_last
    other = copy.deepcopy(model)
    change(other)
    runs = {"now": called_with(model, target), "other": called_with(other, target)}
    with torch.inference_mode():
        for run in runs.values():
            run()
    times = in_turn(runs, range(ROUNDS), SECONDS, torch.get_num_threads())
    pairs = zip(times["now"], times["other"], strict=True)
    if sum(other.median < now.median for now, other in pairs) >= ENOUGH:
        change(model)
