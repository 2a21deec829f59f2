"""Operations that a user declares to be linear, with their formula.

    y = bias + W * x,      W and bias from formula(module, x, ...)

Domain: exactly this type of module, or this operator; one argument depends on the input. The source is the user, so
the formula is compared with the operation, in float64, on random input of two sizes, whenever it is used.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from reparam.algebra import Border, Conv, Refusal
from reparam.errors import ReparamError
from reparam.graph.evaluate import Evaluator
from reparam.graph.lift.base import Known, Lifted, per_axis, shape_text
from reparam.graph.lift.convs import padding_of
from reparam.graph.net import Value
from reparam.graph.operation import Operation
from reparam.graph.run import run
from reparam.graph.space import Space
from reparam.graph.trial import inputs_of
from reparam.graph.unread import first_line

TOLERANCE: Final = 1e-9
RULE: Final = "declared"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """``bias + W * x``, with the arguments of ``torch.nn.functional.conv2d``, in any number of dimensions.

    Args:
        weight: ``(out, in/groups, *kernel)``; ``(out, in)`` acts on the last axis, as ``nn.Linear`` does.
        bias: ``(out,)``, or None.
        stride: one number, or one per axis.
        padding: one number, one per axis, one pair ``(before, behind)`` per axis, or ``"same"``; negative numbers crop.
        dilation: one number, or one per axis.
        groups: number of channel groups.
        padding_mode: as of ``nn.Conv2d``.

    Raises:
        ReparamError: they do not fit each other.

    Example:
        >>> causal = Formula(torch.ones(8, 8, 3), padding=((2, 0),))
        >>> causal.conv.lo, causal.conv.hi
        ((2,), (0,))
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: Any = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if weight.dim() < 2 or weight.shape[0] % self.groups:
            found = tuple(weight.shape)
            raise ReparamError(f"expected a weight (out, in/groups, *kernel) of {self.groups} groups, found {found}")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ReparamError(f"expected a bias of shape ({weight.shape[0]},), found {tuple(bias.shape)}")
        _ = self.conv

    @property
    def conv(self) -> Conv:
        """Its structure."""
        out, into, *kernel = self.weight.shape
        dilation = per_axis(self.dilation, len(kernel))
        lo, hi = padding_of(self.padding, tuple(kernel), dilation)
        return Conv(
            out_channels=out,
            in_channels=into * self.groups,
            kernel=tuple(kernel),
            stride=per_axis(self.stride, len(kernel)),
            dilation=dilation,
            lo=lo,
            hi=hi,
            groups=self.groups,
            border=Border(self.padding_mode),
        )


class _Unasked(Exception):
    """A formula asked for something that is not known."""


class _UnknownSpace:
    """Stands for the input where the code does not fix its channels."""

    def __getattr__(self, name: str) -> Any:
        raise _Unasked


@final
@dataclass(frozen=True, slots=True, eq=False)
class Declaration:
    """A lifting of one kind of operation; made by ``declare``."""

    kind: Any
    formula: Callable[..., Formula | Refusal | None]

    def __call__(self, value: Value, known: Known) -> Lifted:
        """The declared formula, if it is what the operation computes; else the reason why it is not used."""
        if value.declared is not self:
            return None
        if len(value.inputs) != 1:
            return Refusal(RULE, f"{len(value.inputs)} of its arguments depend on the input, and a formula has one")
        if value.module is not None and value.module.training:
            return Refusal(RULE, "it is in training mode", "call eval() on it")
        (source,) = value.inputs
        space = known.space(source)
        formula = self._formula(value, space)
        if not isinstance(formula, Formula):
            return formula
        conv = formula.conv
        label = f"conv {shape_text(conv.kernel)}" if conv.kernel else "linear"

        def weight() -> Tensor:
            return self._numbers(value, space).weight.detach()

        def bias() -> Tensor:
            found = self._numbers(value, space).bias
            assert found is not None
            return found.detach()

        bias_or_none = None if formula.bias is None else bias
        operation = Operation(f"declared {label}", {source: conv}, {source: weight}, bias_or_none)
        refusal = self._differs(value, operation)
        return operation if refusal is None else refusal

    def spaces(self, value: Value, source: Space | None) -> tuple[Space | None, Space | None]:
        """Spaces of the input and of the result."""
        formula = self._formula(value, source) if len(value.inputs) == 1 else None
        if not isinstance(formula, Formula):
            return None, None
        conv = formula.conv
        return Space(conv.in_channels, conv.axes), Space(conv.out_channels, conv.axes)

    def _formula(self, value: Value, space: Space | None, module: nn.Module | None = None) -> Formula | Refusal | None:
        (source,) = value.inputs
        given: Any = space if space is not None else _UnknownSpace()
        own = () if value.module is None else (value.module if module is None else module,)
        args = [given if argument is source else argument for argument in value.args]
        kwargs = {name: given if argument is source else argument for name, argument in value.kwargs.items()}
        try:
            with torch.no_grad():
                found = self.formula(*own, *args, **kwargs)
        except _Unasked:
            return Refusal(RULE, "the channels of its input are not known", "give example_inputs")
        except Exception as error:
            name = getattr(self.formula, "__qualname__", repr(self.formula))
            raise ReparamError(
                f"expected the formula {name} to describe {value.name} at {value.path or 'the root'}, found that it"
                f" raises {type(error).__name__}: {error}"
            ) from error
        if found is not None and not isinstance(found, Formula | Refusal):
            raise ReparamError(
                f"expected the formula of {value.name} at {value.path or 'the root'} to return a reparam.Formula, a"
                f" reparam.Refusal or None, found {type(found).__name__}"
            )
        return found

    def _numbers(self, value: Value, space: Space | None) -> Formula:
        """The formula of a copy in float64, with the numbers of now."""
        module = None if value.module is None else copy.deepcopy(value.module)
        if module is not None:
            on_mps = any(tensor.device.type == "mps" for tensor in (*module.parameters(), *module.buffers()))
            module = (module.cpu() if on_mps else module).double()
        found = self._formula(value, space, module)
        assert isinstance(found, Formula)
        return found

    def _differs(self, value: Value, operation: Operation) -> Refusal | None:
        """What is wrong with the formula, as far as random input of two sizes shows it."""
        numbers = operation.numbers()
        (conv,) = numbers.terms.values()
        if conv.weight is None or conv.weight.is_meta:
            return None
        try:
            with torch.no_grad():
                for trial in range(2):
                    inputs = inputs_of(numbers, trial)
                    wanted = run([value], value, inputs, {})
                    found, magnitude = Evaluator(numbers).run(inputs)
                    if wanted.shape != found.shape:
                        shapes = f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
                        return Refusal(RULE, f"its formula gives the shape {shapes}", "repair the formula")
                    error = float(((wanted - found).abs() / magnitude).max())
                    if not error <= TOLERANCE:
                        rounded = conv.weight.dtype != torch.float64 and error < torch.finfo(conv.weight.dtype).eps
                        remedy = "give its numbers in float64" if rounded else "repair the formula"
                        return Refusal(RULE, f"its formula differs from it by {error:.1e}", remedy)
        except Exception as error:  # user code on input that it was not written for
            return Refusal(RULE, f"it cannot be run on random input: {first_line(error)}")
        return None


def declare(kind: Any, formula: Callable[..., Formula | Refusal | None]) -> Declaration:
    """Say that an operation is linear, and how: a lifting for the argument ``liftings`` of ``fuse`` and ``plan``.

    Modules of this very type are then one operation and are not read; subclasses are not meant, as they may do
    something else. The formula is compared with the operation, in float64, on random input of two sizes, before it is
    used; if it differs, the operation is left alone, and the plan says so.

    Args:
        kind: a class of modules, or an operator (``torch.library.custom_op``, ``torch.ops.library.name``).
        formula: called as the operation is, behind the module itself if it is one. In the place of the tensor it gets
            what is known of it: ``x.channels``, on the axis in front of the last ``x.axes`` ones. It returns a
            ``reparam.Formula``; a ``reparam.Refusal`` if the operation is not linear here; or None if this is not its
            business.

    Raises:
        ReparamError: ``kind`` is something else.

    Example:
        >>> import torch, reparam
        >>> class Roll(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.roll(x, 1, -1)
        >>> def taps(module, x):
        ...     weight = torch.tensor([1.0, 0.0]).expand(x.channels, 1, 2)
        ...     return reparam.Formula(weight, padding=((1, 0),), groups=x.channels, padding_mode="circular")
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 1), Roll(), torch.nn.Conv1d(4, 4, 1)).eval()
        >>> reparam.plan(net, liftings=reparam.LIFTINGS + (reparam.declare(Roll, taps),)).regions[0].after
        ('conv 2',)
    """
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        if kind.__module__.startswith("torch.nn.modules."):
            raise ReparamError(f"expected a module class of yours, found {kind.__name__}, which torch defines")
    elif not isinstance(kind, CustomOpDef | OpOverload | OpOverloadPacket):
        raise ReparamError(
            f"expected a class of modules or an operator, found {type(kind).__name__}: a plain function is read"
            " through; put it into a module, or register it with torch.library.custom_op"
        )
    if not callable(formula):
        raise ReparamError(f"expected formula to be a function, found {type(formula).__name__}")
    return Declaration(kind, formula)


def declared_in(liftings: Iterable[object]) -> dict[Any, Declaration]:
    """The declarations among liftings, by type of module or operator; the first of a kind counts."""
    found: dict[Any, Declaration] = {}
    for lifting in liftings:
        if isinstance(lifting, Declaration):
            for name in _names(lifting.kind):
                found.setdefault(name, lifting)
    return found


def _names(kind: Any) -> list[Any]:
    """All that may stand in a graph for an operator."""
    if isinstance(kind, CustomOpDef):
        return [kind, kind._opoverload, kind._opoverload.overloadpacket]
    if isinstance(kind, OpOverloadPacket):
        return [kind, *(getattr(kind, name) for name in kind.overloads())]  # type: ignore[no-untyped-call]
    return [kind]
