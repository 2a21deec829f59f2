"""How a model is planned, and what is wrong with options that cannot be used."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, final

from torch import nn

from reparam.cost import DEFAULT_COST, Cost, Work
from reparam.errors import ReparamError
from reparam.graph.lift import LIFTINGS, Lifting

Rule = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How a model is planned.

    Args:
        cost: the policy that decides whether an exact rewrite is made.
        exclude: path patterns (``"head.*"``), types or predicates of modules that stay as they are.
        only: the same, of modules outside of which everything stays as it is; None for the whole model.
        liftings: what is known to be linear.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, for modules that need sizes.
        bias_maps: whether the result need hold for the sizes of the example only.

    Raises:
        ReparamError: an option is of the wrong kind.
    """

    cost: Cost = DEFAULT_COST
    exclude: tuple[Rule, ...] = ()
    liftings: tuple[Lifting, ...] = LIFTINGS
    example_inputs: Any = None
    only: tuple[Rule, ...] | None = None
    bias_maps: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", rules(self.exclude))
        object.__setattr__(self, "only", None if self.only is None else rules(self.only, "only"))
        object.__setattr__(self, "liftings", _liftings(self.liftings))
        _check_cost(self.cost)
        if self.bias_maps and self.example_inputs is None:
            raise ReparamError(
                "expected example_inputs beside bias_maps=True, found none: a map of a bias holds for one size, so pass"
                " inputs of that size"
            )

    def excludes(self, path: str, module: nn.Module) -> bool:
        """Whether a module is excluded."""
        return matches(self.exclude, path, module)

    def includes(self, path: str, module: nn.Module) -> bool:
        """Whether a module is one of those to which fusing is confined."""
        return self.only is None or matches(self.only, path, module)

    def only_paths(self, model: nn.Module) -> frozenset[str] | None:
        """Paths of the modules to which fusing is confined; None if it is not confined."""
        if self.only is None:
            return None
        modules = model.named_modules(remove_duplicate=False)
        return frozenset(path for path, module in modules if self.includes(path, module))


def within(path: str, places: frozenset[str]) -> bool:
    """Whether a path is one of some places, or below one of them."""
    while path not in places:
        if not path:
            return False
        path = path.rpartition(".")[0]
    return True


def matches(chosen: tuple[Rule, ...], path: str, module: nn.Module) -> bool:
    """Whether one of the rules holds for a module."""
    for rule in chosen:
        if isinstance(rule, str):
            if fnmatchcase(path, rule):
                return True
        elif isinstance(rule, type):
            if isinstance(module, rule):
                return True
        elif rule(path, module):
            return True
    return False


def rules(given: Any, argument: str = "exclude") -> tuple[Rule, ...]:
    """The rules that a user gave for ``argument``.

    Raises:
        ReparamError: they are something else.
    """
    wanted = f"expected {argument} to be a tuple of path patterns, module types or functions of (path, module)"
    if isinstance(given, str):
        raise ReparamError(f"{wanted}, found one string {given!r}: write {argument}=({given!r},)")
    if not isinstance(given, list | tuple | set | frozenset):
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        raise ReparamError(f"{wanted}, found {name}: put it into a tuple")
    for rule in given:
        if isinstance(rule, str) or (isinstance(rule, type) and issubclass(rule, nn.Module)):
            continue
        if isinstance(rule, type | nn.Module) or not callable(rule):
            name = rule.__name__ if isinstance(rule, type) else type(rule).__name__
            raise ReparamError(f"{wanted}, found {name} in it: name a module by its path, or give its type")
    return tuple(given)


def _liftings(liftings: Any) -> tuple[Lifting, ...]:
    wanted = "expected liftings to be a tuple of functions such as reparam.LIFTINGS + (mine,)"
    if not isinstance(liftings, list | tuple):
        raise ReparamError(f"{wanted}, found {type(liftings).__name__}")
    for lifting in liftings:
        if not callable(lifting):
            raise ReparamError(f"{wanted}, found {type(lifting).__name__} in it")
    return tuple(liftings)


def _check_cost(cost: Any) -> None:
    wanted = "expected cost to be a function from reparam.Work to a number"
    if isinstance(cost, str):
        raise ReparamError(f"{wanted}, found the string {cost!r}: write cost=reparam.cost.{cost}")
    if not callable(cost):
        raise ReparamError(f"{wanted}, found {type(cost).__name__}")
    number = cost(Work(1.0, 1.0, 1, 1))
    if not isinstance(number, Real):
        raise ReparamError(f"{wanted}, found one that returns {type(number).__name__} instead of a number")
    if math.isnan(number):
        raise ReparamError(f"{wanted}, found one that returns nan")
