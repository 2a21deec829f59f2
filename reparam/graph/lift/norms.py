"""Norms with fixed statistics: batch norm, and instance norm that tracks them."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reparam.algebra import Refusal, diagonal
from reparam.algebra.sources import norm_coefficients
from reparam.graph.calls import argument, name_of, stock, tensor_input
from reparam.graph.kinds import NORM_AXES, NORMS
from reparam.graph.lift.base import Known, Lifted
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.space import Space

THREE_RESULTS = "_native_batch_norm_legit_no_training"


def _norm(
    source: Value | None,
    space: Space | None,
    known: Known,
    statistics: Callable[[], tuple[Tensor, Tensor]],  # mean and variance, (channels,) each
    affine: Callable[[], tuple[Tensor | None, Tensor | None]],  # gamma and beta, (channels,) each
    eps: float,
    covers: tuple[Value, ...] = (),
) -> Lifted:
    """Channels are on axis 1, so a norm without spatial axes is one of a matrix ``(N, C)``."""
    if source is None or space is None:
        return Refusal("norm", "the rank of its input is not known", "give example_inputs")

    def coefficients() -> tuple[Tensor, Tensor]:
        return norm_coefficients(*statistics(), *affine(), eps)

    return Operation(
        "batch norm",
        {source: diagonal(space.channels, space.axes)},
        {source: lambda: coefficients()[0]},
        lambda: coefficients()[1],
        covers=covers,
        norm=True,
        assumed_rank=2 if space.axes == 0 and known.rank(source).most > 2 else None,
    )


def norm_module(value: Value, known: Known) -> Lifted:
    """Batch norm or instance norm with running statistics, in eval mode."""
    module, source = value.module, tensor_input(value)
    if stock(module) not in NORM_AXES or source is None:
        return None
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    mean, variance = module.running_mean, module.running_var
    fixed = not module.training and mean is not None and variance is not None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not (fixed and module.track_running_stats):
        return None
    if module.training:
        return Refusal("norm", "it is in training mode and uses the statistics of the batch", "call eval() on it")
    if mean is None or variance is None:
        return Refusal("norm", "it keeps no running statistics and uses those of the batch", "track_running_stats=True")
    affine = lambda: (module.weight, module.bias)  # noqa: E731
    return _norm(source, known.space(value), known, lambda: (mean, variance), affine, module.eps)


def norm_function(value: Value, known: Known) -> Lifted:
    """``F.batch_norm`` and ``F.instance_norm`` with fixed statistics, and the operators of exported programs."""
    call = value
    if (
        name_of(value) == "getitem"
        and isinstance(value.args[1], int)
        and value.args[1] == 0
        and isinstance(value.args[0], Value)
    ):
        call = value.args[0]
    name = name_of(call)
    if name not in NORMS or (name == THREE_RESULTS) is (call is value):
        return None
    if name != THREE_RESULTS:
        flag, usual = ("training", False) if name == "batch_norm" else ("use_input_stats", True)
        if argument(call, 5, flag, usual) is not False:
            of_the_batch = Refusal("norm", "it uses the statistics of the batch", "call eval() on the module")
            return of_the_batch if name == "batch_norm" else None
    order = ("weight", "bias", "running_mean", "running_var")
    if call.node.target in (F.batch_norm, F.instance_norm):
        order = ("running_mean", "running_var", "weight", "bias")
    given: dict[str, Any] = {what: argument(call, place, what) for place, what in enumerate(order, 1)}
    mean, variance, gamma, beta = (given[what] for what in ("running_mean", "running_var", "weight", "bias"))
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return Refusal("norm", "it uses the statistics of the batch", "give it running statistics")
    if isinstance(gamma, Value) or isinstance(beta, Value):
        return Refusal("norm", "its scale or shift depends on the input")
    eps = argument(call, 6 if name == THREE_RESULTS else 7, "eps", 1e-5)
    if isinstance(eps, Value):
        return Refusal("norm", "its eps depends on the input")
    space, covers = known.space(value), () if call is value else (call,)
    return _norm(tensor_input(call), space, known, lambda: (mean, variance), lambda: (gamma, beta), eps, covers)
