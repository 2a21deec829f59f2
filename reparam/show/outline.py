"""The tree of a report: the modules in which regions and refusals stand, equal siblings folded."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from reparam.algebra import Refusal
from reparam.report import Region, Report

HERE: Final = "\N{HORIZONTAL ELLIPSIS}"


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A region, and the positions in the report of it and of those that are folded into it."""

    region: Region
    numbers: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Branch:
    """One module of a report.

    Args:
        path: dotted path; empty for the model itself.
        kind: its class.
        regions: those that stand in it, with the largest error of the folded ones.
        left: what is left alone in it, near misses apart.
        children: branches below it.
        same: paths of all siblings that are alike, its own first.
    """

    path: str
    kind: str
    regions: tuple[Entry, ...] = ()
    left: tuple[Refusal, ...] = ()
    children: "tuple[Branch, ...]" = ()
    same: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """Path and class, of folded siblings the first and the last path and their number."""
        place = self.path or "(model)"
        if len(self.same) > 1:
            place = f"{self.same[0]} \N{HORIZONTAL ELLIPSIS} {self.same[-1]} (\N{MULTIPLICATION SIGN}{len(self.same)})"
        return f"{place} {self.kind}"


def outline(report: Report) -> Branch:
    """The tree of a report; equal siblings that follow each other are folded."""
    regions: dict[str, list[Entry]] = {}
    for number, region in enumerate(report.regions):
        regions.setdefault(region.path, []).append(Entry(region, (number,)))
    left: dict[str, list[Refusal]] = {}
    for refusal in report.left:
        if not refusal.near:
            left.setdefault(refusal.path, []).append(refusal)
    wanted = {""}
    for path in (*regions, *left):
        names = path.split(".")
        wanted.update(".".join(names[:depth]) for depth in range(1, len(names) + 1))
    order = [path for path in report.modules if path in wanted]
    order += sorted(wanted - report.modules.keys())
    below: dict[str, list[str]] = {}
    for path in order:
        if path:
            below.setdefault(path.rpartition(".")[0], []).append(path)

    def build(path: str) -> Branch:
        children = fold([build(child) for child in below.get(path, ())])
        kind = report.modules.get(path, report.model_type if not path else "")
        return Branch(path, kind, tuple(regions.get(path, ())), tuple(left.get(path, ())), children, (path,))

    return build("")


def fold(branches: Iterable[Branch]) -> tuple[Branch, ...]:
    """Equal branches that follow each other as one; a branch that holds nothing but one other is replaced by it."""
    found: list[tuple[Any, Branch]] = []
    for branch in map(_shortened, branches):
        kind = (branch.path.count("."), _signature(branch, branch.path))
        if found and found[-1][0] == kind and len(branch.same) == 1:
            found[-1] = kind, _joined(found[-1][1], branch)
        else:
            found.append((kind, branch))
    return tuple(branch for _, branch in found)


def _shortened(branch: Branch) -> Branch:
    if len(branch.children) == 1 and not branch.regions and not branch.left:
        return branch.children[0]
    return branch


def _joined(first: Branch, other: Branch) -> Branch:
    """Two equal branches as one, with the larger error of each pair of regions."""
    regions = [_worse(one, two) for one, two in zip(first.regions, other.regions, strict=True)]
    pairs = zip(first.children, other.children, strict=True)
    children = tuple(replace(_joined(a, b), same=a.same) for a, b in pairs)
    return replace(first, regions=tuple(regions), children=children, same=(*first.same, *other.same))


def _worse(one: Entry, two: Entry) -> Entry:
    errors = [error for error in (one.region.error, two.region.error) if error is not None]
    region = replace(one.region, error=max(errors)) if errors else one.region
    return Entry(region, (*one.numbers, *two.numbers))


def _signature(branch: Branch, base: str) -> Any:
    """What makes two branches alike: everything but errors and the path at which they stand."""
    return (
        branch.kind,
        len(branch.same),
        _below(branch.path, base),
        tuple(_anywhere(entry.region, base) for entry in branch.regions),
        tuple(replace(refusal, path="", condition=_said(refusal.condition, base)) for refusal in branch.left),
        tuple(_signature(child, base) for child in branch.children),
    )


def _below(path: str, base: str) -> str:
    """A path, seen from ``base`` if it lies below it."""
    inside = path == base or path.startswith(f"{base}.")
    return f"{HERE}{path[len(base) :]}" if base and inside else path


def _said(condition: str, base: str) -> str:
    """A condition in which the paths below ``base``, which follow "at" or "of", are seen from there."""
    return re.sub(rf"(?<=\b(?:at|of) ){re.escape(base)}(?=\.|\b(?!\w))", HERE, condition) if base else condition


def _anywhere(region: Region, base: str) -> Region:
    steps = tuple(replace(step, path=_below(step.path, base)) for step in region.steps)
    return replace(region, path="", error=None, steps=steps)


def near_misses(report: Report) -> Iterator[tuple[Refusal, tuple[str, ...]]]:
    """Near misses that differ, each with all paths at which it is found."""
    found: dict[Any, tuple[Refusal, list[str]]] = {}
    for refusal in report.near_misses:
        condition = _said(refusal.condition, refusal.path)
        key = replace(refusal, path="", condition=condition)
        found.setdefault(key, (refusal, []))[1].append(refusal.path)
    for refusal, paths in found.values():
        yield refusal, tuple(paths)


def counted(number: int, noun: str) -> str:
    """``1 region``, ``2 regions``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
