"""Run a private copy of a model, and look at what its modules receive and return."""

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from reparam.errors import ReparamError
from reparam.graph.swap import State
from reparam.verification.depth import Depths
from reparam.verification.leaves import Leaves, leaves, relative_error

Key = tuple[str, int]  # path of a module, and which of its calls
ROOT: Key = ("", 0)


@final
@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(example: Any) -> "Inputs":
        """From a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
        if isinstance(example, Mapping):
            return Inputs((), dict(example))
        return Inputs(example if isinstance(example, tuple) else (example,), {})

    def fresh(self, dtype: torch.dtype | None, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A copy on a device, its floating point tensors in ``dtype``."""

        def prepare(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)
            cast = dtype if value.is_floating_point() else None
            return value.detach().to(device, cast or value.dtype, copy=True)

        args, kwargs = tree_map(prepare, (self.args, dict(self.kwargs)))
        return args, kwargs

    def __str__(self) -> str:
        def shape(value: Any) -> str:
            return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

        return ", ".join([*map(shape, self.args), *(f"{name}={shape(value)}" for name, value in self.kwargs.items())])


@final
@dataclass(frozen=True, slots=True)
class Subject:
    """A copy of a model that is run as often as needed.

    Args:
        name: what messages call it, ``a`` or ``b``.
        model: the copy; nobody else has it.
        dtype: to which floating point inputs are cast; None if the model has no floating point numbers of its own.
        device: on which it runs.
    """

    name: str
    model: nn.Module
    dtype: torch.dtype | None
    device: torch.device

    @staticmethod
    def of(name: str, model: nn.Module, dtype: torch.dtype | None = None) -> "Subject":
        """Copy a model, and convert the copy if a dtype is given; its device must have that dtype, or it moves."""
        mine = copy.deepcopy(model)
        device = next((t.device for t in _numbers(model)), torch.device("cpu"))
        if dtype is torch.float64 and device.type == "mps":
            device = torch.device("cpu")
        if dtype is not None:
            mine = mine.to(device, dtype)
        floats = (t.dtype for t in _numbers(mine) if t.is_floating_point())
        return Subject(name, mine, next(floats, dtype), device)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model; what it changes of itself is undone.

        Raises:
            ReparamError: it raises an error.
        """
        before = [State(module) for module in self.model.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            return self.model(*args, **kwargs)
        except Exception as error:
            kind = type(self.model).__name__
            training = f"; it is in training mode: call {self.name}.eval() first" if self.model.training else ""
            raise ReparamError(
                f"expected example_inputs on which {self.name} ({kind}) runs, found {Inputs(args, kwargs)}, on which it"
                f" raises {type(error).__name__}: {error}{training}"
            ) from error
        finally:
            for state in before:
                state.restore()
            for buffer, content in buffers:
                buffer.copy_(content)

    @contextlib.contextmanager
    def rounded_anew(self, by: float) -> Iterator[None]:
        """Within it, every number of the model is off by ``by``, relative to itself, up or down at random."""
        generator = torch.Generator().manual_seed(0)
        before: list[tuple[Tensor, Tensor]] = []
        for tensor in _numbers(self.model):
            if tensor.is_floating_point():
                sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
                before.append((tensor, tensor.data))
                tensor.data = tensor.data + tensor.data * (sign * by)
        try:
            yield
        finally:
            for tensor, data in before:
                tensor.data = data


@final
@dataclass
class Record:
    """What the modules of a model received and returned in one run, or how far that is from another run.

    Args:
        order: calls in the order in which they began.
        parents: the call around each call.
        inputs: what each call received; empty if this run was compared with another.
        outputs: what each call returned; empty if this run was compared with another.
        depths: of what each call returned.
        unlike: relative differences of what each call received and returned, from those of the other run.
        coarsest: eps of the coarsest dtype that was met.
    """

    order: list[Key] = field(default_factory=list)
    parents: dict[Key, Key] = field(default_factory=dict)
    inputs: dict[Key, Leaves] = field(default_factory=dict)
    outputs: dict[Key, Leaves] = field(default_factory=dict)
    depths: dict[Key, dict[str, float]] = field(default_factory=dict)
    unlike: dict[Key, tuple[dict[str, float], dict[str, float]]] = field(default_factory=dict)
    coarsest: float = 0.0


def observe(
    subject: Subject,
    inputs: Inputs,
    *,
    inside: bool = False,
    other: Record | None = None,
    keep: Key = ROOT,
    seed: int = 0,
    eps: float | None = None,
) -> Record:
    """Run a model once.

    Args:
        subject: the model.
        inputs: its arguments; a copy is passed.
        inside: look at every module, not only at the model as a whole.
        other: compare with this run at once, and keep no tensors except what one call returns.
        keep: that call; by default, of the model itself.
        seed: of random numbers.
        eps: of the numbers of the models; if it is given, depths and the coarsest type are noted.

    Raises:
        ReparamError: the model does not run on these inputs.
    """
    record = Record()
    depths = Depths(eps or 1.0)
    stack: list[Key] = []
    counts: dict[str, int] = {}
    received: dict[Key, Leaves] = {}

    def enter(path: str, given: Any) -> None:
        key = (path, counts.get(path, 0))
        counts[path] = key[1] + 1
        record.order.append(key)
        if stack:
            record.parents[key] = stack[-1]
        stack.append(key)
        received[key] = _kept(leaves(given, "input")) if inside else {}

    def leave(result: Any) -> None:
        key = stack.pop()
        found = leaves(result, "output")
        record.depths[key] = {name: depths.of({name: tensor}) for name, tensor in found.items()}
        arguments = received.pop(key)
        if other is not None and key in other.outputs:
            record.unlike[key] = _errors(other.inputs[key], arguments), _errors(other.outputs[key], found)
        if other is None:
            record.inputs[key] = arguments
        if other is None or key in (ROOT, keep):
            record.outputs[key] = _kept(found)

    handles = []
    for path, module in subject.model.named_modules() if inside else ():
        if path and not isinstance(module, torch.jit.ScriptModule):

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                enter(path, (*args, *kwargs.values()))

            def after(module: nn.Module, args: Any, result: Any) -> None:
                leave(result)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    args, kwargs = inputs.fresh(subject.dtype, subject.device)
    try:
        with torch.no_grad(), same_random_numbers(subject.device, seed), depths if eps else contextlib.nullcontext():
            enter("", (*args, *kwargs.values()))
            leave(subject.run(args, kwargs))
    finally:
        for handle in handles:
            handle.remove()
    record.coarsest = depths.coarsest
    return record


@contextlib.contextmanager
def same_random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Within it, random numbers are those of a seed; afterwards, what they would have been."""
    state = random.getstate()
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def _kept(found: Leaves) -> Leaves:
    """Copies: a module that comes later may write in place."""
    return {name: tensor.clone() for name, tensor in found.items()}


def _errors(expected: Leaves, found: Leaves) -> dict[str, float]:
    names = {**expected, **found}
    return {
        name: relative_error(expected[name], found[name]) if name in expected and name in found else float("inf")
        for name in names
    }


def _numbers(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
