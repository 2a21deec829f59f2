"""Fuse a model, in place or into a copy."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from reparam.errors import CheckError, ReparamError, TrainingModeError
from reparam.graph.clones import copies_itself, copies_of_layers
from reparam.graph.options import Options
from reparam.graph.session import Session
from reparam.graph.swap import State
from reparam.verification.verify import verify


def refuse_bad_model(model: object) -> None:
    """Raise if a model cannot be fused at all."""
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected an nn.Module, found {type(model).__name__}: pass the model itself")
    exported = isinstance(model, fx.GraphModule) and "eval" in vars(model)  # has no eval(): its mode is in its graph
    if model.training and not exported:
        raise TrainingModeError(
            f"expected a model in eval mode, found {type(model).__name__} in training mode, where batch norms use the"
            " statistics of the batch: call model.eval() first"
        )


def apply(model: nn.Module, options: Options, *, inplace: bool, check: bool) -> nn.Module:
    """Fuse a model, and compare the result with it on the example inputs, if there are any."""
    refuse_bad_model(model)
    compared = check and options.example_inputs is not None and not any(t.is_meta for t in model.parameters())
    with collected_later():
        if not inplace:
            fused = _fused_copy(model, options, check)
            _keep_modes(model, fused)
            if compared:
                _refuse_difference(model, fused, options.example_inputs)
        else:
            original = copy.deepcopy(model) if compared else model
            before = [State(module) for module in model.modules()] if compared else []
            Session(model, options).apply(check, one_by_one=not compared).attach(model)
            fused = model
            try:
                if compared:
                    _refuse_difference(original, model, options.example_inputs)
            except BaseException:
                for state in before:
                    state.restore()
                raise
    for module in fused.modules():
        if isinstance(module, DistributedDataParallel):
            reducer: Any = module
            reducer.__setstate__(reducer.__getstate__())  # its reducer refers to the parameters it was made with
    return fused


def _keep_modes(model: nn.Module, fused: nn.Module) -> None:
    """Let the copy of an exported model have no modes, as that has none: copies of graph modules lose it."""
    if isinstance(model, fx.GraphModule):
        for name in ("train", "eval"):
            method = vars(model).get(name)
            if isinstance(method, MethodType):
                setattr(fused, name, MethodType(method.__func__, fused))


def _fused_copy(model: nn.Module, options: Options, check: bool) -> nn.Module:
    """A fused copy of a model.

    What a copy would only be made for to be replaced is not copied: the model itself is fused, the result is copied
    without its new weights, and the model is made what it was. Where a module has its own way to be copied, which may
    need what fusing removes, the model is copied first.
    """
    if any(copies_itself(type(module)) for module in model.modules()):
        fused = copy.deepcopy(model)
        Session(fused, options).apply(check).attach(fused)
        return fused
    before = [State(module) for module in model.modules()]
    try:
        session = Session(model, options)
        receipt = session.apply(check)
        new = [p for fused in session.fused for m in fused.modules.values() if m is not None for p in m.parameters()]
        result = copy.deepcopy(model, copies_of_layers(model, {id(parameter): parameter for parameter in new}))
    finally:
        for state in before:
            state.restore()
    receipt.attach(result)
    return result


@contextmanager
def collected_later() -> Iterator[None]:
    """While it lasts, garbage is not looked for: what is read of a model is large, lives long, and is freed at once."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _refuse_difference(model: nn.Module, fused: nn.Module, example_inputs: Any) -> None:
    result = verify(model, fused, example_inputs)
    if not result.ok:
        raise CheckError(
            f"expected the fused model to compute what {type(model).__name__} computes, found another result on the"
            f" example inputs (a: the model, b: fused), so nothing was fused: {result}\n"
            "pass check=False to fuse all the same, or exclude= the module where they part",
            result,
        )
