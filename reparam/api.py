"""``fuse``, and what it would do (``plan``) and did (``receipt``)."""

from typing import Any

from torch import nn

from reparam.cost import DEFAULT_COST, Cost
from reparam.graph.fusing import apply, collected_later, refuse_bad_model
from reparam.graph.lift import LIFTINGS, Lifting
from reparam.graph.options import Options, Rule
from reparam.graph.session import Session
from reparam.measure import measured
from reparam.report import Plan, Receipt
from reparam.target import put_in_faster_format, refuse_target


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    check: bool = True,
    cost: Cost = DEFAULT_COST,
    exclude: tuple[Rule, ...] = (),
    only: tuple[Rule, ...] | None = None,
    liftings: tuple[Lifting, ...] = LIFTINGS,
    example_inputs: Any = None,
    bias_maps: bool = False,
    target: Any = None,
) -> nn.Module:
    """Rewrite every linear region of a model into as few convolutions as possible.

    Args:
        model: any module, in eval mode.
        inplace: change ``model`` itself; on an error it is left as it was.
        check: compare every region with the operations that it replaces, in float64; a region that differs is left
            alone.
        cost: the policy that decides whether an exact rewrite is made.
        exclude: path patterns (``"head.*"``), types, or predicates of ``(path, module)``: these stay as they are.
        only: the same; everything outside of these modules stays as it is, and so does what they share with it.
        liftings: what is known to be linear; extend with ``reparam.LIFTINGS + (mine,)``.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; a copy of the model is run on
            them once, and modules that cannot be read without sizes are read for these. With ``check``, the fused
            model is compared with the model on them, by ``reparam.verify``.
        bias_maps: let a bias or a norm in front of a zero padding become a map behind it, which is exact for the size
            of ``example_inputs`` alone, whatever the batch; another size is an error. A map has as many parameters as
            the result of the convolution has elements.
        target: a tensor, a tuple of arguments or a dict of keyword arguments that the fused model is to be fast on, as
            it is run here. The default cost is replaced by ``reparam.measured``, and the weights of convolutions are
            put channels last, or first, where the model is faster then; so the result may have other strides.

    Returns:
        A model of the same class that computes the same; ``reparam.receipt`` tells what was done to it. New
            weights have the data type, the device and, without a target, the memory format of those that they replace.

    Raises:
        TrainingModeError: the model is in training mode.
        CheckError: on the example inputs, the fused model differs by more than rounding; the error carries the
            comparison.
        ReparamError: the argument is not a module, or does not run on the target.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> reparam.fuse(net)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    if target is not None:
        refuse_bad_model(model)
        refuse_target(model, target)
        cost = measured(target) if cost is DEFAULT_COST else cost
    options = Options(cost, exclude, liftings, example_inputs, only, bias_maps)
    fused = apply(model, options, inplace=inplace, check=check)
    if target is not None:
        put_in_faster_format(fused, target)
    return fused


def plan(
    model: nn.Module,
    *,
    cost: Cost = DEFAULT_COST,
    exclude: tuple[Rule, ...] = (),
    only: tuple[Rule, ...] | None = None,
    liftings: tuple[Lifting, ...] = LIFTINGS,
    example_inputs: Any = None,
    bias_maps: bool = False,
) -> Plan:
    """What ``fuse`` would do: regions before and after, and everything left alone with its reason.

    Args:
        model: any module, in eval mode; it is not changed.
        cost: as for ``fuse``.
        exclude: as for ``fuse``.
        only: as for ``fuse``.
        liftings: as for ``fuse``.
        example_inputs: as for ``fuse``.
        bias_maps: as for ``fuse``.

    Raises:
        TrainingModeError: the model is in training mode.
    """
    refuse_bad_model(model)
    with collected_later():
        return Session(model, Options(cost, exclude, liftings, example_inputs, only, bias_maps)).plan()


def receipt(model: nn.Module) -> Receipt:
    """What ``fuse`` did to a model: each region with its measured error, and what was left alone and why.

    The receipt is plain data in an attribute of the fused model: it stays through ``deepcopy``, ``pickle`` and
    ``torch.save`` of the model, is no part of the ``state_dict``, and is gone from parts of the model and from
    exported, scripted and ``torch.fx`` copies. Fusing once more replaces it.

    Args:
        model: what ``fuse`` or ``Plan.apply`` returned, or a copy of it.

    Raises:
        ReparamError: the model holds no receipt.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> (region,) = reparam.receipt(reparam.fuse(net)).regions
        >>> region.error < 1e-12
        True
    """
    return Receipt.of(model)
