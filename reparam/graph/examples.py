"""Sizes of every call of a model, from one run on example inputs."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from reparam.errors import ReparamError
from reparam.graph.proxy import meta


@final
@dataclass(frozen=True, slots=True)
class Call:
    """Arguments and result of one call of a module, with meta tensors."""

    arguments: Mapping[str, Any]
    result: Any


@final
class Examples:
    """What one module received and what its children returned."""

    def __init__(self, calls: Mapping[str, list[Call]], path: str) -> None:
        self._calls = calls
        self._path = path
        self._next: dict[str, int] = {}

    def argument(self, name: str) -> Any:
        """An argument of the first call, or None."""
        mine = self._calls.get(self._path)
        return mine[0].arguments.get(name) if mine else None

    def result(self, child: str) -> Any:
        """What the next call of a child returns, or None."""
        calls = self._calls.get(f"{self._path}.{child}" if self._path else child, [])
        at = self._next.get(child, 0)
        self._next[child] = at + 1
        return calls[min(at, len(calls) - 1)].result if calls else None


def record(model: nn.Module, inputs: Any) -> dict[str, list[Call]]:
    """Run a copy of a model once, and note the sizes of the arguments and the result of every call.

    Args:
        model: the model; it is not run itself.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        ReparamError: the model does not run on these inputs.
    """
    args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    runner = copy.deepcopy(model)
    calls: dict[str, list[Call]] = {}
    for path, module in runner.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def note(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
            calls.setdefault(path, []).append(Call(_named(module, args, kwargs), meta(result)))

        module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            runner(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:
        raise ReparamError(
            f"expected example_inputs on which the model runs, found {_shapes((args, kwargs))}, on which it raises"
            f" {type(error).__name__}: {error}"
        ) from error
    return calls


def _named(module: nn.Module, args: Any, kwargs: Any) -> Mapping[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {}
    return {name: meta(value) for name, value in bound.arguments.items()}


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {k: _shapes(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shapes(v) for v in value]
    return value
