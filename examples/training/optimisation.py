"""What is decayed, how the learning rate goes, and how fast the average of the weights follows.

Source: Ding et al., "RepVGG", CVPR 2021, arXiv 2101.03697, section 4.1: SGD with momentum 0.9, a cosine learning rate
from 0.1 for 256 images per step, and a weight decay of 1e-4 on the kernels of convolutions and linear layers alone.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


def is_decayed(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether weight decay is for this parameter: matrices and kernels, not norms, biases and other vectors."""
    if isinstance(owner, _ConvNd | nn.Linear):
        return parameter is owner.weight
    return not isinstance(owner, NORMS) and sum(extent > 1 for extent in parameter.shape) > 1


def parameters_with_owners(net: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Every trained parameter once."""
    seen: set[nn.Parameter] = set()
    for owner in net.modules():
        for parameter in owner.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield owner, parameter


def decay_groups(net: nn.Module, decay: float, except_for: Collection[Tensor] = ()) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the parameters that are decayed, and all others.

    Args:
        net: whose trained parameters are meant.
        decay: λ of the penalty λ/2 · Σ w².
        except_for: kernels that are penalised in another way.
    """
    penalised_elsewhere = set(except_for)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for owner, parameter in parameters_with_owners(net):
        free = parameter in penalised_elsewhere or not is_decayed(owner, parameter)
        (others if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def share_of_rate(step: int, warm_up: int, steps: int) -> float:
    """The learning rate of a step as a share of the largest: a line up to it, then half a cosine down to 0.

    >>> [round(share_of_rate(step, 2, 6), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def cosine(optimizer: SGD, warm_up: int, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: share_of_rate(step, warm_up, steps))


def average_of(net: nn.Module) -> AveragedModel:
    """A running average of all parameters and buffers, a copy of the net at first."""
    return AveragedModel(net, use_buffers=True)


def follow(average: AveragedModel, net: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the net: average ← d · average + (1 − d) · net.

    d = min(decay, (1 + step) / (10 + step)), so that the average does not remember random weights for long.
    """
    average.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    with torch.no_grad():
        average.update_parameters(net)
