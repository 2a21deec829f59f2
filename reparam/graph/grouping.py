"""The best grouping of the branches of a sum, where that is not one convolution.

    sum_i Conv_i(x) = sum_k (sum_{i in group k} Conv_i)(x)

One convolution that holds the taps of a tall band and of a wide one is dearer than the two; yet a second tall band may
go into the first, and a small square into either. Each group becomes one convolution; a group of one branch that stood
apart stays where it is.

All partitions of up to ``EXACT`` branches are compared; more are joined pair by pair, always the best pair, up to
``MOST``.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Final, final

from reparam.algebra import Affine, Conv, Refusal, conv_after_conv
from reparam.algebra.branch_sum import branch_sums
from reparam.graph.draft import Draft
from reparam.graph.net import Value
from reparam.graph.net_plan import folded
from reparam.graph.placing import place
from reparam.graph.worth import EPSILON, Worth

EXACT: Final = 6  # branches, of which there are 203 partitions
MOST: Final = 24  # branches that are joined pair by pair: the time grows with the cube of their number

Partition = tuple[tuple[Value, ...], ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """A sum with its branches spelled out.

    Args:
        formula: over the branches and what is no branch.
        branches: formula of each over its one root, and composed with what the sum does to it.
        expanded: partial sums that were put in.
    """

    formula: Affine
    branches: Mapping[Value, tuple[Affine, Conv]]
    expanded: Mapping[Value, None]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Grouped:
    """A sum with its branches in groups.

    Args:
        formula: of the sum.
        names: of the root, in the formula, by branch.
        price: cost of the sum and of the branches that stay apart.
        convolutions: of these.
    """

    formula: Affine
    names: Mapping[Value, Value]
    price: float
    convolutions: int


@final
class Grouping:
    """Groups the branches of sums anew where that is cheaper."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth

    def regroup(self, total: Value) -> None:
        """Group the branches of a sum that have one input anew, if another grouping is cheaper."""
        if total in self.plan.inlined or total in self.plan.wraps or not self._sums(total):
            return
        spelled = None if self.draft.stays(total) is not None else self._spelled(total)
        if spelled is None:
            return
        by_root: dict[Value, list[Value]] = {}
        for branch, (inner, _) in spelled.branches.items():
            (root,) = inner.terms
            assert isinstance(root, Value)
            by_root.setdefault(root, []).append(branch)
        for root, branches in by_root.items():
            if len(branches) > 1 and not self._is_covered(total, spelled, root, branches):
                self._search(total, spelled, root, branches)

    def _sums(self, total: Value) -> bool:
        """Whether a value is a sum, or the norm or scale of one."""
        terms = self.plan.formulas[total].terms
        if len(terms) != 1:
            return len(terms) > 1
        ((root, conv),) = terms.items()
        if isinstance(root, Value) and self.draft.ok(root) and conv.diagonal:
            return len(self.plan.formulas[root].terms) > 1
        members = (*self.plan.absorbed(total), total) if total in self.plan.places else ()
        return any(len(self.plan.operations[member].terms) > 1 for member in members)

    def _is_covered(self, total: Value, spelled: _Sum, root: Value, branches: Sequence[Value]) -> bool:
        """Whether all branches are one convolution no larger than the largest of them: nothing is cheaper."""
        whole = self.plan.formulas[total].terms.get(root)
        if whole is None or any(branch not in self.plan.inlined for branch in branches):
            return False
        return _size(whole) <= max(_size(spelled.branches[branch][1]) for branch in branches)

    def _spelled(self, total: Value) -> _Sum | None:
        """The sum over its branches; None if it is no sum of branches that may disappear."""
        formula, expanded = self.draft.original[total], dict[Value, None]()
        branches: dict[Value, tuple[Affine, Conv]] = {}
        pending = [root for root in formula.terms if isinstance(root, Value)]
        while pending:
            if len(formula.terms) > MOST:
                return None
            value = pending.pop()
            if value not in formula.terms or not self._vanishes(value, {total, *expanded}):
                continue
            if value in self.plan.spread or value in self.plan.wraps:
                return None
            conv, inner = formula.terms[value], folded(self.plan.operations, self.plan.inlined, value, numeric=False)
            if isinstance(inner, Refusal):
                return None
            single = len(inner.terms) == 1 and not next(iter(inner.terms.values())).identity
            if single and conv.diagonal and not self._is_sum(value):
                if isinstance(self.draft.inline(formula, value, total, expanded, inner), Refusal):
                    continue  # memory is written in between, or the mode changes
                composed = conv_after_conv(conv, next(iter(inner.terms.values())))
                if isinstance(composed, Refusal):
                    return None
                branches[value] = inner, composed
                continue
            result = self.draft.inline(formula, value, total, expanded, self.draft.original[value])
            if isinstance(result, Refusal):
                return None
            formula = result
            expanded[value] = None
            pending += [root for root in formula.terms if isinstance(root, Value) and root not in branches]
        maps = formula.size is not None or any(inner.size is not None for inner, _ in branches.values())
        return None if maps else _Sum(formula, branches, expanded)

    def _is_sum(self, value: Value) -> bool:
        """Whether a value is a sum, or the norm or scale of one that disappeared into it."""
        while True:
            terms = self.plan.operations[value].terms
            if len(terms) != 1:
                return True
            ((root, conv),) = terms.items()
            if not conv.diagonal or root not in self.plan.inlined:
                return False
            value = root

    def _vanishes(self, value: Value, readers: set[Value]) -> bool:
        """Whether a value is gone, or may go, into a sum."""
        if value in self.plan.inlined:
            return True
        if value in self.plan.groupings:
            return False
        return self.draft.may_vanish(value) is None and self.draft.readers.get(value, {}).keys() <= readers

    def _search(self, total: Value, spelled: _Sum, root: Value, branches: Sequence[Value]) -> None:
        now = {total: self.plan.formulas[total]}
        apart = (*branches, *spelled.expanded)
        now |= {v: self.plan.formulas[v] for v in apart if v not in self.plan.inlined}
        members = {m for v in (*apart, total) for m in (*self.plan.absorbed(v), v)}
        most = self.worth.most_convolutions(members)
        best, least = None, self.worth.price(now) * (1 - EPSILON)
        for partition in self._partitions(total, spelled, root, branches):
            found = self._best_of(total, spelled, root, partition)
            if found is not None and found.price < least and found.convolutions <= most:
                best, least = found, found.price
        if best is not None:
            self._commit(total, spelled, root, best)

    def _partitions(self, total: Value, spelled: _Sum, root: Value, branches: Sequence[Value]) -> Iterator[Partition]:
        if len(branches) <= EXACT:
            yield from partitions(tuple(branches))
            return
        current: Partition = tuple((branch,) for branch in branches)
        while len(current) > 1:
            joined = []
            for a, b in combinations(range(len(current)), 2):
                rest = tuple(group for i, group in enumerate(current) if i not in (a, b))
                trial = ((*current[a], *current[b]), *rest)
                found = self._best_of(total, spelled, root, trial)
                if found is not None:
                    joined.append((found.price, trial))
            if not joined:
                return
            current = min(joined, key=lambda pair: pair[0])[1]
            yield current

    def _best_of(self, total: Value, spelled: _Sum, root: Value, partition: Partition) -> _Grouped | None:
        """A grouping, with the input itself, if it is a summand, in the group where it costs least."""
        stay = {g[0] for g in partition if len(g) == 1 and self._may_stay(spelled, g[0])}
        groups = [g for g in partition if g[0] not in stay or len(g) > 1]
        hosts = range(len(groups) + 1) if root in spelled.formula.terms else (0,)
        best: _Grouped | None = None
        for host in hosts:
            order = groups[host:] + groups[:host] if host < len(groups) else [(), *groups]
            found = self._grouped(total, spelled, root, order, stay)
            if found is not None and (best is None or found.price < best.price):
                best = found
        return best

    def _may_stay(self, spelled: _Sum, branch: Value) -> bool:
        return branch not in self.plan.inlined and spelled.formula.terms[branch].identity

    def _grouped(
        self, total: Value, spelled: _Sum, root: Value, groups: Sequence[tuple[Value, ...]], stay: Set[Value]
    ) -> _Grouped | None:
        """The sum with each group over a name of its own for the root; the first has that of the root itself."""
        names = {b: self.plan.alias(root, number) if number else root for number, g in enumerate(groups) for b in g}
        parts: dict[Value, list[Conv]] = {}
        biased = spelled.formula.biased
        for value, conv in spelled.formula.terms.items():
            assert isinstance(value, Value)
            if value in names or (value in self.plan.inlined and value in spelled.branches):
                inner, composed = spelled.branches[value]
                (source,) = inner.terms
                assert isinstance(source, Value)
                parts.setdefault(names.get(value, source), []).append(composed)
                biased |= inner.biased
            else:
                parts.setdefault(value, []).append(conv)
        terms = branch_sums(parts)
        if isinstance(terms, Refusal):
            return None
        formula = Affine(terms, biased)
        formulas = {total: formula, **{b: self.plan.formulas[b] for b in stay}}
        return _Grouped(formula, names, self.worth.price(formulas), self.worth.convolutions(formulas))

    def _commit(self, total: Value, spelled: _Sum, root: Value, best: _Grouped) -> None:
        gone = {**spelled.expanded, **dict.fromkeys(best.names)}
        inlined = self.plan.inlined | gone
        site, dead = self.draft.site, self.plan.dead
        where = place(total, best.formula, self.plan.operations, inlined, site, dead, self.plan.spread)
        if isinstance(where, Refusal):
            return
        self.draft.commit(total, best.formula, gone, where)
        self.plan.groupings.setdefault(total, {}).update({b: n for b, n in best.names.items() if n is not root})


def _size(conv: Conv) -> int:
    """Weights of a convolution."""
    return conv.taps * conv.in_channels * conv.out_channels // conv.groups


def partitions(items: tuple[Value, ...]) -> Iterator[Partition]:
    """All ways to cut items into groups.

    Example:
        >>> [[[*group] for group in found] for found in partitions("ab")]
        [[['a', 'b']], [['a'], ['b']]]
    """
    if not items:
        yield ()
        return
    first, rest = items[0], items[1:]
    for found in partitions(rest):
        for i, group in enumerate(found):
            yield (*found[:i], (first, *group), *found[i + 1 :])
        yield ((first,), *found)
