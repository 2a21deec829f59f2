"""Whether two models compute the same, and why not."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import nn

from reparam.errors import ReparamError
from reparam.verification.causes import (
    Diagnosis,
    WithoutDropout,
    computation,
    in_training,
    mode,
    other_eps,
    random_numbers,
    training_mode,
)
from reparam.verification.compare import Comparison, common_eps, compare
from reparam.verification.locate import first_parted, region
from reparam.verification.result import Cause, Verification
from reparam.verification.runs import Inputs, Subject

TELLING: Final = 0.25  # a tolerance above this is worth a note


def verify(a: nn.Module, b: nn.Module, example_inputs: Any, *, modules: bool = False) -> Verification:
    """Compare two models on one input, and say why they differ.

    Both are run in float64 and in the data type of their weights, as copies, with the same random numbers. What is
    allowed follows from the data type and the depth of the nets, and from how strongly the first net amplifies the
    rounding of its own weights (`reparam.verification.tolerance`). If they differ, causes are undone one by one on the
    copies: training mode, dropout, eps; the cause is the one without which they agree.

    Args:
        a: the model that is right, say before `fuse`; it is not changed.
        b: the model that is compared with it; it is not changed.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Floating point tensors are cast
            to the data type of each run.
        modules: also compare what every module returns that both models have under the same path. In a fused model,
            modules within a rewritten block return something else on purpose.

    Returns:
        The result, true if the models agree: print it, or read ``ok``, ``cause``, ``where``, ``outputs``.

    Raises:
        ReparamError: an argument is no module, is on the meta device, or does not run on these inputs.

    Example:
        >>> import torch, reparam
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> broken = reparam.fuse(net)
        >>> broken[0].bias.data += 1
        >>> result = reparam.verify(net, broken, torch.randn(1, 3, 8, 8))
        >>> result.ok, result.cause.name, result.where
        (False, 'COMPUTATION', '0')
    """
    for name, model in (("a", a), ("b", b)):
        _refuse_bad_model(name, model)
    inputs = Inputs.of(example_inputs)
    eps = common_eps(a, b)

    def comparison(dtype: torch.dtype | None, label: str) -> Callable[..., Comparison]:
        left, right = Subject.of("a", a, dtype), Subject.of("b", b, dtype)
        return lambda inside=False: compare(left, right, inputs, eps, label or _label(left, right), inside=inside)

    again = comparison(None, "")
    native = again(inside=modules)
    found, sharp, notes = [native], native, list[str]()
    if native.dtype != "float64":
        try:
            again_in_float64 = comparison(torch.float64, "float64")
            sharp = again_in_float64(inside=modules)
        except ReparamError as error:
            notes.append(f"compared in {native.dtype} only, because in float64 it does not run: {error.__cause__}")
        else:
            found, again = [sharp, native], again_in_float64
    if not sharp.ok:
        diagnosis = _diagnose(sharp, again, inputs, notes)
    elif not native.ok:
        diagnosis = _too_coarse(native, comparison(None, "")(inside=True))
    else:
        diagnosis = _agreement(found, a, b, notes)
    outputs = tuple(difference for one in found for difference in one.outputs())
    listed = sharp.modules() if modules else ()
    ok = sharp.ok and native.ok
    return Verification(
        ok, diagnosis.cause, diagnosis.where, diagnosis.detail, diagnosis.remedy, outputs, listed, tuple(notes)
    )


def _diagnose(found: Comparison, again: Callable[..., Comparison], inputs: Inputs, notes: list[str]) -> Diagnosis:
    if found.structure:
        return Diagnosis(Cause.STRUCTURE, None, found.structure, "compare models with the same outputs")
    diagnosis = training_mode(found, again)
    with ExitStack() as stack:
        if diagnosis is None:
            training = {s.name: in_training(s.model) for s in (found.a, found.b)}
            notes += [f"{name} is in training mode, and differs in eval mode, too" for name, m in training.items() if m]
            stack.enter_context(mode([module for listed in training.values() for _, module in listed], False))
            stack.enter_context(WithoutDropout())
        inner = again(inside=True)
        key = first_parted(inner)
        if diagnosis is None and key is not None:
            calls = region(inner, key)
            diagnosis = (
                random_numbers(inner, inputs)
                or other_eps(inner, calls, inputs, again)
                or computation(inner, calls, inputs)
            )
    assert diagnosis is not None
    if diagnosis.where is None:
        return Diagnosis(diagnosis.cause, key[0] if key is not None else None, diagnosis.detail, diagnosis.remedy)
    return diagnosis


def _too_coarse(native: Comparison, inner: Comparison) -> Diagnosis:
    overflow = any(difference.error == float("inf") for difference in native.outputs())
    detail = f"they agree in float64, but not in {native.dtype}: "
    detail += "one of them leaves its range" if overflow else "its rounding exceeds what is allowed"
    key = first_parted(inner)
    return Diagnosis(Cause.ROUNDING, key[0] if key is not None else None, detail, "use a wider data type")


def _agreement(found: list[Comparison], a: nn.Module, b: nn.Module, notes: list[str]) -> Diagnosis:
    training = [name for name, model in (("a", a), ("b", b)) if in_training(model)]
    notes += [f"{name} is in training mode" for name in training]
    largest = max((difference.tolerance for one in found for difference in one.outputs()), default=0.0)
    if largest > TELLING:
        notes.append(f"rounding alone may move these outputs by {largest:.0%}, so that agreement says little")
    if any(difference.error > 0 for one in found for difference in one.outputs()):
        return Diagnosis(Cause.ROUNDING, None, "rounding explains every difference", "")
    return Diagnosis(Cause.NONE, None, Cause.NONE.value, "")


def _label(a: Subject, b: Subject) -> str:
    names = dict.fromkeys(str(subject.dtype).removeprefix("torch.") for subject in (a, b) if subject.dtype is not None)
    return " and ".join(names) or "their own types"


def _refuse_bad_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected {name} to be an nn.Module, found {type(model).__name__}: pass the model itself")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ReparamError(
            f"expected {name} to have numbers, found {type(model).__name__} on the meta device: load its weights first"
        )
