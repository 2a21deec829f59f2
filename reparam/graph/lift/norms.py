"""Batch norms with fixed statistics."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reparam.algebra import Refusal, diagonal
from reparam.algebra.sources import norm_coefficients
from reparam.graph.lift.base import Known, Lifted
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.spaces import NORM_AXES, Space, argument, stock, tensor_input


def _norm(
    source: Value,
    space: Space,
    mean: Callable[[], Tensor],
    variance: Callable[[], Tensor],
    gamma: Callable[[], Tensor | None],
    beta: Callable[[], Tensor | None],
    eps: float,
) -> Operation:
    def coefficients() -> tuple[Tensor, Tensor]:
        return norm_coefficients(mean(), variance(), gamma(), beta(), eps)

    return Operation(
        "batch norm",
        {source: diagonal(space.channels, space.axes)},
        {source: lambda: coefficients()[0]},
        lambda: coefficients()[1],
        norm=True,
    )


def batch_norm_module(value: Value, known: Known) -> Lifted:
    """Batch norm with running statistics, in eval mode."""
    module = value.module
    if stock(module) not in NORM_AXES:
        return None
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    source = tensor_input(value)
    if source is None:
        return None
    if module.training:
        return Refusal("norm", "it is in training mode and uses the statistics of the batch", "call eval() on it")
    if module.running_mean is None or module.running_var is None:
        return Refusal("norm", "it keeps no running statistics and uses those of the batch", "track_running_stats=True")
    space = known.space(value)
    if space is None:
        return Refusal("norm", "the rank of its input is not known", "give example_inputs")
    return _norm(
        source,
        space,
        lambda: module.running_mean,  # type: ignore[arg-type, return-value]
        lambda: module.running_var,  # type: ignore[arg-type, return-value]
        lambda: module.weight,
        lambda: module.bias,
        module.eps,
    )


def batch_norm_function(value: Value, known: Known) -> Lifted:
    """``F.batch_norm`` with ``training=False``."""
    if value.module is not None:
        return None
    if value.node.target is F.batch_norm:
        mean, variance = argument(value, 1, "running_mean"), argument(value, 2, "running_var")
        gamma, beta = argument(value, 3, "weight"), argument(value, 4, "bias")
        training, eps = argument(value, 5, "training", False), argument(value, 7, "eps", 1e-5)
    elif value.node.target is torch.batch_norm:
        gamma, beta = argument(value, 1, "weight"), argument(value, 2, "bias")
        mean, variance = argument(value, 3, "running_mean"), argument(value, 4, "running_var")
        training, eps = argument(value, 5, "training", False), argument(value, 7, "eps", 1e-5)
    else:
        return None
    source, space = tensor_input(value), known.space(value)
    if training or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return Refusal("norm", "it uses the statistics of the batch", "call eval() on the module")
    if source is None or space is None or isinstance(gamma, Value) or isinstance(beta, Value):
        return Refusal("norm", "the rank of its input is not known", "give example_inputs")
    return _norm(source, space, lambda: mean, lambda: variance, lambda: gamma, lambda: beta, eps)
