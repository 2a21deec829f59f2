"""A linear part of a net, seen with some of its operations held apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self, final

from torch import Tensor, nn
from torch.nn import functional as F

from reparam.algebra import Affine, Conv, identity
from reparam.errors import ReparamError
from reparam.graph.calls import argument
from reparam.graph.lift import Known, lift
from reparam.graph.net import Value
from reparam.graph.net_plan import numbers
from reparam.graph.operation import Operation, absorbed
from reparam.graph.reader import read
from reparam.graph.reading import reading


@final
@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Operations that are together one affine formula.

    Args:
        operations: each with its own formula.
        inlined: those that disappear into ``result``.
        result: the value that the formula gives.
    """

    operations: Mapping[Value, Operation]
    inlined: Mapping[Value, None]
    result: Value

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """A module that is affine in its one input.

        Raises:
            ReparamError: its forward cannot be read, or what it returns does not depend on the input.
        """
        with reading():
            nets = read(module).nets
            if len(nets) != 1 or not isinstance(nets[0].result, Value):
                raise ReparamError("expected one forward that can be read and uses its input, found another module")
            (net,) = nets
            known = Known.of(net)
            lifted = {value: lift(value, known) for value in net.values}
        operations = {value: got for value, got in lifted.items() if isinstance(got, Operation)}
        result = net.result
        inlined = {value: None for value in operations if value is not result}
        return cls(operations, inlined, result)

    @property
    def members(self) -> list[Value]:
        """All operations, in order of execution."""
        return [*absorbed(self.operations, self.inlined, self.result), self.result]

    def formula(self, at: Value | None = None, apart: Iterable[Value] = ()) -> Affine:
        """The formula, with its numbers of now, of one value of the region.

        Args:
            at: the value; None: the result.
            apart: values that stay names in the formula.
        """
        value = self.result if at is None else at
        if value not in self.operations:
            return Affine({value: identity(0, 0)})
        held = set(apart)
        return numbers(self.operations, {v: None for v in self.inlined if v not in held}, value)

    def behind(self, value: Value) -> Conv | None:
        """The map from a value of the region to its result; None: the result does not depend on it."""
        if value is self.result:
            conv = next(iter(self.operations[value].terms.values()))
            return identity(conv.out_channels, conv.axes)
        return self.formula(apart=(value,)).terms.get(value)

    def below(self, value: Value) -> list[Value]:
        """The operations that the formula of a value contains, without itself."""
        return absorbed(self.operations, self.inlined, value)


def kernel_of(value: Value) -> Tensor | None:
    """The parameter that is the kernel or matrix of an operation, ``(out, in/groups, *kernel)``; None: it has none."""
    if value.module is not None:
        found = value.module._parameters.get("weight")
        return None if isinstance(value.module, nn.modules.batchnorm._NormBase) else found
    found = argument(value, 1, "weight")
    return found if isinstance(found, nn.Parameter) and found.dim() > 1 else None


def bias_of(value: Value) -> Tensor | None:
    """The parameter that is the shift of an operation, ``(out,)``; None: it has none."""
    if value.module is not None:
        return value.module._parameters.get("bias")
    position = 4 if value.node.target in (F.batch_norm, F.instance_norm) else 2
    found = argument(value, position, "bias")
    return found if isinstance(found, nn.Parameter) else None


def norm_of(value: Value, operation: Operation) -> nn.modules.batchnorm._BatchNorm | None:
    """The batch norm module that an operation is; None: it is something else."""
    return value.module if operation.norm and isinstance(value.module, nn.modules.batchnorm._BatchNorm) else None
