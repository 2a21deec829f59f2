"""Why two models differ: each cause is undone on copies, and is the cause if the difference is gone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from reparam.verification.compare import Comparison
from reparam.verification.result import Cause
from reparam.verification.runs import ROOT, Inputs, Key, Record, observe

USUAL_EPS: Final = (0.0, 1e-3, 1e-5, 1e-6, 1e-4, 1e-8)
FEW_NORMS: Final = 8  # so many are tried one by one
DROPOUTS: Final = frozenset(
    {
        functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
        functional.feature_alpha_dropout, torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout,
    }
)  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A cause, where it is, and what to do."""

    cause: Cause
    where: str | None
    detail: str
    remedy: str


class WithoutDropout(TorchFunctionMode):
    """Within it, dropout hands on its input, whatever ``training`` says."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if kwargs.get("dropout_p"):
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextlib.contextmanager
def mode(modules: list[nn.Module], training: bool) -> Iterator[None]:
    """Within it, modules have another mode."""
    before = [(module, module.training) for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextlib.contextmanager
def eps_of(norms: Mapping[nn.Module, float]) -> Iterator[None]:
    """Within it, norms have another eps."""
    before: list[tuple[Any, float]] = [(norm, eps_in(norm)) for norm in norms]
    for norm, eps in norms.items():
        norm.eps = eps  # type: ignore[assignment]  # torch types every unknown attribute as a tensor
    try:
        yield
    finally:
        for norm, eps in before:
            norm.eps = eps


def eps_in(module: nn.Module) -> float:
    """The eps of a norm; nan for a module that has none."""
    eps = None if isinstance(module, nn.Identity) else module.__dict__.get("eps")  # one that took a norm's place has it
    return float(eps) if isinstance(eps, int | float) else float("nan")


def in_training(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules in training mode, those first for which it matters."""
    found = [(path, module) for path, module in model.named_modules() if module.training]
    return sorted(found, key=lambda item: not isinstance(item[1], _NormBase | _DropoutNd))


def training_mode(found: Comparison, again: Callable[[], Comparison]) -> Diagnosis | None:
    """Whether dropout alone, or the training mode of some modules, is the cause."""
    modes = {name: in_training(subject.model) for name, subject in (("a", found.a), ("b", found.b))}
    modules = [module for listed in modes.values() for _, module in listed]
    dropouts: list[nn.Module] = [module for module in modules if isinstance(module, _DropoutNd)]
    with WithoutDropout(), mode(dropouts, False):
        if again().ok:
            return _dropout(modes, dropouts)
    if not modules:
        return None
    with WithoutDropout(), mode(modules, False):
        if not again().ok:
            return None
    name, listed = next((name, listed) for name, listed in modes.items() if listed)
    model = found.a.model if name == "a" else found.b.model
    path, module = listed[0]
    if model.training:
        detail = f"{name} is in training mode, where batch norms use the statistics of the batch"
        return Diagnosis(Cause.TRAINING_MODE, path, detail, f"call {name}.eval() first")
    detail = f"{path} of {name} ({type(module).__name__}) is in training mode, while {name} itself is not"
    return Diagnosis(Cause.TRAINING_MODE, path, detail, f"call {name}.eval() first")


def _dropout(modes: Mapping[str, list[tuple[str, nn.Module]]], dropouts: list[nn.Module]) -> Diagnosis:
    for name, listed in modes.items():
        for path, module in listed:
            if module in dropouts:
                detail = (
                    f"dropout is active: {path or 'the model'} of {name} ({type(module).__name__}) is in training mode"
                )
                return Diagnosis(Cause.DROPOUT, path, detail, f"call {name}.eval() first")
    detail = "dropout is active in eval mode, too: a forward calls torch.nn.functional.dropout"
    return Diagnosis(Cause.DROPOUT, None, detail, "pass training=self.training there")


def other_eps(found: Comparison, calls: list[Key], inputs: Inputs, again: Callable[[], Comparison]) -> Diagnosis | None:
    """Whether the eps of norms is the cause: as attributes of both models, or as it was folded into weights."""
    theirs = dict(found.b.model.named_modules())
    unlike = {
        path: (norm, theirs[path])
        for path, norm in found.a.model.named_modules()
        if path in theirs and abs(eps_in(norm) - eps_in(theirs[path])) > 0
    }
    if unlike:
        with eps_of({norm: eps_in(other) for norm, other in unlike.values()}):
            same = again().ok
        if same:
            path, (norm, other) = next(iter(unlike.items()))
            detail = f"{path or 'the model'} has eps {eps_in(norm):g} in a and {eps_in(other):g} in b"
            more = f", and {len(unlike) - 1} more norms differ alike" if len(unlike) > 1 else ""
            return Diagnosis(Cause.EPSILON, path, detail + more, "give both the same eps")
    return _folded_eps(found, calls, inputs)


def _folded_eps(found: Comparison, calls: list[Key], inputs: Inputs) -> Diagnosis | None:
    """Whether the first modules that differ would not if their norms, or one of them, had one of the usual eps."""
    key, where = calls[-1], calls[0][0]
    kept = observe(found.b, inputs, inside=True, other=found.first, keep=key)
    target = Record(inputs={key: {}, ROOT: {}}, outputs={ROOT: {}, **kept.outputs})
    allowed = {row.name: row.tolerance for row in found.rows(key, "")}
    norms = {
        path: module
        for place, _ in calls
        for path, module in found.a.model.get_submodule(place).named_modules(prefix=place)
        if eps_in(module) == eps_in(module)
    }
    trials = [norms, *({path: norm} for path, norm in norms.items())] if 1 < len(norms) <= FEW_NORMS else [norms]
    for trial in trials if norms else ():
        present = {eps_in(norm) for norm in trial.values()}
        for eps in USUAL_EPS:
            if present == {eps}:
                continue
            with eps_of(dict.fromkeys(trial.values(), eps)):
                unlike = observe(found.a, inputs, inside=True, other=target).unlike[key][1]
            if all(error <= allowed.get(name, 0.0) for name, error in unlike.items()):
                here, *more = trial
                which = f"the norms of {where or 'the model'} have" if more else f"{here or 'the model'} has"
                shown = " and ".join(f"{value:g}" for value in sorted(present))
                detail = f"{which} eps {shown} in a, folded with eps {eps:g} in b"
                return Diagnosis(Cause.EPSILON, where if more else here, detail, "fold each norm with its own eps")
    return None


def random_numbers(found: Comparison, inputs: Inputs) -> Diagnosis | None:
    """Whether a model returns something else for another seed."""
    for subject in (found.a, found.b):
        before = observe(subject, inputs)
        after = observe(subject, inputs, other=before, seed=1)
        if any(after.unlike[ROOT][1].values()):
            detail = f"{subject.name} draws random numbers in its forward, and not the same ones as the other model"
            return Diagnosis(Cause.RANDOM, None, detail, "compare models that draw none")
    return None


def computation(found: Comparison, calls: list[Key], inputs: Inputs) -> Diagnosis:
    """What is left: a module that computes something else, with those after it that were folded into it."""
    key, where = calls[-1], calls[0][0]
    error = max(found.second.unlike[key][1].values(), default=float("inf"))
    which = where or "the model"
    returns = f"{key[0]}, folded into it, returns" if len(calls) > 1 else "returns"
    detail = f"{which} receives the same in both and {returns} something else (error {error:.1e})"
    if _constant_per_channel(found, key, inputs):
        detail += "; they differ by one number per channel: look for a bias or a mean that one of them lacks"
    return Diagnosis(Cause.COMPUTATION, where, detail, "")


def _constant_per_channel(found: Comparison, key: Key, inputs: Inputs) -> bool:
    theirs = observe(found.b, inputs, inside=True, other=found.first, keep=key).outputs[key]
    for name, expected in found.first.outputs[key].items():
        if name not in theirs or theirs[name].shape != expected.shape or expected.ndim < 2:
            return False
        difference = (theirs[name].to(expected) - expected).transpose(0, 1).flatten(1)  # (channels, everything else)
        spread = difference.amax(1) - difference.amin(1)
        if not bool(difference.shape[1] > 1 and spread.max() <= 1e-3 * difference.abs().max()):
            return False
    return True
