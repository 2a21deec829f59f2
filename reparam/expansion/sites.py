"""Convolutions that can become blocks, each with the batch norm behind it, and why others cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import nn

from reparam.algebra import Affine, Refusal
from reparam.cost import DEFAULT_COST
from reparam.errors import ReparamError
from reparam.expansion.misfit import misfit, quantized_kind
from reparam.expansion.region import Region, norm_of
from reparam.graph.draft import Draft
from reparam.graph.examples import record
from reparam.graph.lift import LIFTINGS, Known
from reparam.graph.net import Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.options import Options, Rule, matches
from reparam.graph.placing import Mode, Place
from reparam.graph.planner import plan_net
from reparam.graph.reader import read
from reparam.graph.reading import reading
from reparam.graph.site import Limits
from reparam.nn.geometry import CONVS, Convolution, Geometry, Norm, UnfitError
from reparam.nn.multi_branch import fitting
from reparam.nn.recipes import Recipe

WILD: Final = frozenset("*?[")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A convolution that becomes a block.

    Args:
        path: dotted path of the convolution.
        conv: the module.
        norm: the norm behind it, if it is a module that is called here only.
        alone: the formula of the convolution.
        normed: the formula of both; that of the convolution if there is no norm.
    """

    path: str
    conv: Convolution
    norm: Norm | None
    alone: Affine
    normed: Affine


@final
@dataclass(frozen=True, slots=True)
class Survey:
    """What would be expanded, and what not.

    Args:
        chosen: path of each convolution that becomes a block, with the names of its branches.
        left: path of each convolution that stays, with the reason.
    """

    chosen: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]
    sites: tuple[Site, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{len(self.chosen)} convolutions become blocks:"]
        lines += [f"  {path}: {', '.join(names) or 'widened'}" for path, names in self.chosen.items()]
        lines.append(f"{len(self.left)} convolutions stay:")
        return "\n".join([*lines, *(f"  {path}: {reason}" for path, reason in self.left.items())])


def find_sites(model: nn.Module, recipe: Recipe, where: tuple[Rule, ...] | None, example_inputs: Any = None) -> Survey:
    """Look at every convolution that ``where`` chooses; None: at all.

    Raises:
        ReparamError: one of them is quantized, is named by its whole path and cannot be expanded, or a branch that is
            not of this library cannot stand beside it.
    """
    wanted = _wanted(model, where)
    found = _read(model, wanted, example_inputs)
    chosen: dict[str, tuple[str, ...]] = {}
    left: dict[str, str] = {}
    sites: list[Site] = []
    for path, conv in wanted.items():
        site = found.get(path, _unread_reason(conv))
        if isinstance(site, Site):
            try:
                parts = fitting(site.conv, recipe, site.norm)
            except UnfitError as error:
                site = str(error)
            except ReparamError as error:
                raise ReparamError(
                    f"{path}: {error}; raise reparam.nn.UnfitError in it where it does not fit"
                ) from error
            else:
                _refuse_misfits(site, recipe, parts)
                chosen[path] = tuple(parts)
                sites.append(site)
        if isinstance(site, str):
            left[path] = site
    for rule in where or ():
        if isinstance(rule, str) and not WILD & set(rule) and rule in left:
            raise ReparamError(f"{rule}: expected a convolution that {recipe.name} can expand: {left[rule]}")
    return Survey(chosen, left, tuple(sites))


def _wanted(model: nn.Module, where: tuple[Rule, ...] | None) -> dict[str, nn.Module]:
    """Convolutions by path."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if where is not None and not matches(where, path, module):
            continue
        kind = quantized_kind(module)
        if kind and "conv" in type(module).__name__.lower():
            raise ReparamError(
                f"{path}: expected a convolution in floating point, found the quantized {kind}: expand before you"
                " quantize, or choose others with where"
            )
        if isinstance(module, nn.modules.conv._ConvNd):
            wanted[path] = module
    for rule in where or ():
        if isinstance(rule, str) and not any(matches((rule,), path, module) for path, module in modules.items()):
            raise ReparamError(f"expected where to name modules of the model, found {rule!r}, which names none")
        if isinstance(rule, str) and not WILD & set(rule) and rule not in wanted:
            kind = type(modules[rule]).__name__
            raise ReparamError(f"{rule}: expected a convolution, found {kind}: name the convolutions in it, {rule}.*")
    return wanted


def _refuse_misfits(site: Site, recipe: Recipe, parts: Mapping[str, nn.Module]) -> None:
    """Look at the branches if some of them are not of this library."""
    branches = recipe.branches(Geometry.of(site.conv))
    if all(branch.make.__module__.startswith("reparam.") for branch in branches):
        return
    ((_, kernel),) = site.alone.terms.items()
    for name, module in parts.items():
        reason = misfit(module, kernel)
        if reason:
            raise ReparamError(
                f"{site.path}: branch {name}: {reason}; let its function raise reparam.nn.UnfitError"
                " where it does not fit"
            )


def _unread_reason(conv: nn.Module) -> str:
    if type(conv) not in CONVS.values():
        return f"it is a {type(conv).__name__}, and only plain nn.Conv1d, nn.Conv2d and nn.Conv3d are expanded"
    return "no forward that could be read calls it: example_inputs may help"


def _read(model: nn.Module, wanted: Mapping[str, nn.Module], example_inputs: Any) -> dict[str, Site | str]:
    calls = None if example_inputs is None else record(model, example_inputs)
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    found: dict[str, Site | str] = {}
    with reading():
        got = read(model, calls)
        limits = Limits(model, got, Options())
        for net in got.nets:
            known, site = Known.of(net, calls), limits.site(net)
            draft = Draft(net, known, LIFTINGS, limits.movable, site)
            plan = plan_net(net, known, DEFAULT_COST, LIFTINGS, limits.movable, site)
            for value in net.values:
                if value.module is None or value.path not in wanted or type(value.module) not in CONVS.values():
                    continue
                shared = any(len(owners[id(p)]) > 1 for p in value.module.parameters(recurse=False))
                other = _merged_with(plan, value)
                if shared:
                    found[value.path] = "its parameters are those of another module, too"
                elif other is not None:
                    found[value.path] = f"fuse makes one convolution of it and {other.path or other.name}: fuse first"
                else:
                    found[value.path] = _site(draft, value)
    return found


def _merged_with(plan: NetPlan, conv: Value) -> Value | None:
    """A convolution, pool or padding in a row with this one that ``fuse`` would join with it."""
    step = conv
    while step in plan.inlined:
        readers = [r for r in step.users if r in plan.operations and step in plan.operations[r].terms]
        for reader in readers:
            if not plan.operations[reader].terms[step].diagonal:
                return reader
        if len(readers) != 1:
            return readers[0] if readers else None
        (step,) = readers
    sources = list(plan.operations[conv].terms) if conv in plan.operations else []
    while sources and sources[0] in plan.inlined:
        terms = plan.operations[sources[0]].terms
        if len(terms) > 1 or not all(term.diagonal for term in terms.values()):
            return sources[0]
        sources = list(terms)
    return None


def _site(draft: Draft, value: Value) -> Site | str:
    conv, operations = value.module, draft.plan.operations
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    refusal = draft.plan.boundaries.get(value) or draft.stays(value)
    if refusal is not None:
        return refusal.condition
    if value not in operations:
        return "its input is not known"
    reason = draft.site.replaceable(value) or _exposed(draft, value, ())
    if reason:
        return reason
    if all(term.diagonal for term in operations[value].terms.values()):
        return "it is one number per channel"
    if conv.weight.is_complex():
        return "its weights are complex"
    alone = Region(operations, {}, value).formula()
    reader = _norm_behind(draft, value)
    if reader is None:
        return Site(value.path, conv, None, alone, alone)
    both = Region(operations, {value: None}, reader).formula()
    return Site(value.path, conv, norm_of(reader, operations[reader]), alone, both)


def _norm_behind(draft: Draft, value: Value) -> Value | None:
    """The batch norm that alone reads a convolution, and that can hand on its input from now on."""
    readers = list(draft.readers.get(value, ()))
    if len(readers) != 1 or value in draft.held:
        return None
    (reader,) = readers
    operation = draft.plan.operations[reader]
    if norm_of(reader, operation) is None or operation.assumed_rank is not None or draft.stays(reader) is not None:
        return None
    if isinstance(draft.inline(operation.structure, value, reader, {}), Refusal):
        return None
    if draft.site.replaceable(reader) or draft.site.crossing([value, reader]) or _exposed(draft, value, (reader,)):
        return None
    return reader


def _exposed(draft: Draft, value: Value, passed: tuple[Value, ...]) -> str:
    place = Place(value, Mode.SWAP, {}, passed)
    return draft.site.exposed([value, *passed], (), place)
