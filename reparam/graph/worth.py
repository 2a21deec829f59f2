"""What a step of a plan gains: sizes of values, work of formulas, and the policy that compares them."""

from collections.abc import Iterable, Mapping
from math import inf, prod
from typing import Final, final

from torch import nn

from reparam.algebra import Affine, Refusal
from reparam.cost import NO_MORE_CONVOLUTIONS, Cost, Work, affine_work, operation_work, resolution
from reparam.graph.calls import argument, name_of
from reparam.graph.net import Net, Value
from reparam.graph.operation import Operation
from reparam.graph.rank_rules import spatial_axes
from reparam.measure import Measured

EPSILON: Final = 1e-9
POOLS: Final = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd)


@final
class Worth:
    """Work of the values of a net under one cost policy.

    Args:
        cost: the policy.
        sizes: relative spatial elements of each value.
        original: formulas of the operations as they stand in the net.
        operations: these operations.
    """

    def __init__(
        self,
        cost: Cost,
        sizes: Mapping[Value, float],
        original: Mapping[Value, Affine],
        operations: Mapping[Value, Operation],
    ) -> None:
        self.cost = cost
        self.sizes = sizes
        self.original = original
        self.operations = operations

    def _work(self, value: Value, formula: Affine) -> Work:
        if formula is self.original.get(value):
            return work_as_it_stands(self.operations[value], self.sizes, self.sizes[value])
        return affine_work(formula, self.sizes, self.sizes[value])

    def _sum(self, formulas: Mapping[Value, Affine]) -> Work:
        works = [self._work(value, formula) for value, formula in formulas.items()]
        return works[0] if len(works) == 1 else sum(works, Work())

    def _seconds(self, formulas: Mapping[Value, Affine]) -> float:
        assert isinstance(self.cost, Measured)
        return sum(
            self.cost.time_of(formula, self.sizes, self.sizes[value], formula is self.original.get(value))
            for value, formula in formulas.items()
        )

    def total(self, formulas: Mapping[Value, Affine]) -> float:
        """Cost of the values as their formulas say."""
        return self.cost(self._sum(formulas))

    def price(self, formulas: Mapping[Value, Affine]) -> float:
        """The same, in seconds where the policy measures."""
        return self._seconds(formulas) if isinstance(self.cost, Measured) else self.total(formulas)

    def more_operations(self, before: Mapping[Value, Affine], after: Mapping[Value, Affine]) -> bool:
        """Whether a step needs more operations than there were."""
        return self._sum(after).launches > self._sum(before).launches

    def convolutions(self, formulas: Mapping[Value, Affine]) -> int:
        """Convolutions that compute the values as their formulas say."""
        return self._sum(formulas).convolutions

    def most_convolutions(self, values: Iterable[Value]) -> float:
        """As many as there were in these operations; under ``always``, measured and unknown policies any number."""
        if self.cost not in NO_MORE_CONVOLUTIONS:
            return inf
        return self.convolutions({value: self.original[value] for value in values})

    def gain(
        self, before: Mapping[Value, Affine], after: Mapping[Value, Affine], gone: Work | None = None
    ) -> Refusal | None:
        """Why a step is not worth it: it must cost less, and need no more operations; ``gone`` vanishes beside it.

        Under the policies of ``reparam.cost`` but ``always``, it needs no more convolutions either.
        """
        old, new = self._sum(before) + (gone or Work()), self._sum(after)
        if new.launches > old.launches:
            return Refusal("cost", f"{new.launches} operations would replace {old.launches}")
        if new.convolutions > old.convolutions and self.cost in NO_MORE_CONVOLUTIONS:
            why = f"more convolutions would be run: {new.convolutions} instead of {old.convolutions}"
            return Refusal("cost", why, "pass cost=reparam.cost.always")
        if isinstance(self.cost, Measured):
            slow, fast = self._seconds(before), self._seconds(after)
            if self.cost.faster(slow, fast, old, new):
                return None
            return Refusal("cost", f"the merged operation takes {fast / (slow or 1.0):.2f} times as long")
        if not self.cost(new) < self.cost(old) * (1 - EPSILON):
            ratio = self.cost(new) / (self.cost(old) or 1.0)
            return Refusal("cost", f"the merged operation costs {ratio:.2f} times as much", "pass another cost")
        return None

    def saved(self, before: Mapping[Value, Affine], after: Mapping[Value, Affine]) -> float:
        """What a step saves, as a part of what there was; 0 if it is not worth it."""
        if self.gain(before, after) is not None:
            return 0.0
        measured = isinstance(self.cost, Measured)
        old, new = (self._seconds(f) if measured else self.cost(self._sum(f)) for f in (before, after))
        return max((old - new) / abs(old), EPSILON) if old else EPSILON


def work_as_it_stands(operation: Operation, sizes: Mapping[Value, float], size_out: float) -> Work:
    """Work of an operation of a net; ``sizes`` and ``size_out`` are spatial elements of its inputs and its result."""
    return operation_work(
        operation.structure,
        sizes,
        size_out,
        passes=operation.arithmetic,
        copies=operation.copies,
        pools=operation.pool,
    )


def relative_sizes(net: Net, operations: Mapping[Value, Operation]) -> dict[Value, float]:
    """Spatial elements of every value, relative to the inputs of the net."""
    sizes: dict[Value, float] = {}
    for value in net.values:
        if value in operations:
            terms = operations[value].terms
            sizes[value] = max((resolution(conv, sizes[root]) for root, conv in terms.items()), default=1.0)
        else:
            sizes[value] = max((sizes[source] for source in value.inputs), default=1.0) / _pooled(value)
    return sizes


def _pooled(value: Value) -> int:
    """Elements of which a maximum pool, or another one that is not linear, makes one."""
    axes, module = spatial_axes(value), value.module
    if not axes or not (isinstance(module, POOLS) or name_of(value).startswith(("max_pool", "avg_pool"))):
        return 1
    names = enumerate(("kernel_size", "stride"), 1)
    kernel, stride = [argument(value, at, name) if module is None else getattr(module, name) for at, name in names]
    step = stride or kernel
    steps = (step,) * axes if isinstance(step, int) else step
    return prod(steps) if isinstance(steps, list | tuple) and all(isinstance(s, int) for s in steps) else 1
