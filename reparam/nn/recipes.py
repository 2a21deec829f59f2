"""Which branches stand beside a convolution: published blocks by name, and free compositions.

A recipe looks at the geometry of a convolution, because the papers do: a norm of the input only where the shape is
kept, no 1x1 branch beside a depthwise kernel, dilated kernels by the length of the large one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

from reparam.errors import ReparamError
from reparam.nn.branches import (
    AVERAGE,
    COPY,
    HORIZONTAL,
    IDENTITY,
    POINT,
    POINT_THEN_KERNEL,
    SCALE,
    VERTICAL,
    Branch,
    dilated,
)
from reparam.nn.geometry import Geometry

Choice = Callable[[Geometry], tuple[Branch, ...]]


@final
@dataclass(frozen=True, slots=True)
class Widening:
    """The convolution itself becomes ``Widened``.

    Args:
        ratio: how many times as many channels.
        before: whether there is a 1x1 convolution in front, too.
    """

    ratio: int
    before: bool


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """What is put beside a convolution, and where norms stand.

    Args:
        name: for messages.
        branches: chooses the branches for a geometry.
        widening: how the convolution itself is widened; None: it stays one.
        norm_of_sum: a norm behind the convolution stays behind the sum and branches have none; otherwise the
            convolution takes it along and each branch has its own.
        norm_of_kernel: with ``norm_of_sum``, the convolution has another norm of its own.
        pointwise: whether convolutions of one tap are expanded, too.

    Example:
        >>> from torch import nn
        >>> thin = Recipe("thin", lambda geometry: (POINT,))
        >>> thin.branches(Geometry.of(nn.Conv2d(4, 4, 3)))[0].name
        'point'
    """

    name: str
    branches: Choice
    widening: Widening | None = None
    norm_of_sum: bool = False
    norm_of_kernel: bool = False
    pointwise: bool = False


def repvgg() -> Recipe:
    """3x3, 1x1 and identity, each with a norm.

    Source: Ding et al., "RepVGG", CVPR 2021, arXiv 2101.03697, section 3.3.
    """
    return Recipe("repvgg", lambda geometry: (POINT, IDENTITY))


def qarepvgg() -> Recipe:
    """As RepVGG, with a norm of the large kernel and one of the sum only, which is kinder to quantization.

    Source: Chu et al., "Make RepVGG Greater Again: A Quantization-aware Approach", AAAI 2024, arXiv 2212.01593.
    """
    return Recipe("qarepvgg", lambda geometry: (POINT, IDENTITY), norm_of_sum=True, norm_of_kernel=True)


def acnet() -> Recipe:
    """kxk, kx1 and 1xk, each with a norm.

    Source: Ding et al., "ACNet", ICCV 2019, arXiv 1908.03930, section 3.1.
    """
    return Recipe("acnet", lambda geometry: (VERTICAL, HORIZONTAL))


def dbb() -> Recipe:
    """kxk, 1x1, 1x1-kxk and 1x1-average; beside a depthwise kernel there is no 1x1 branch.

    Source: Ding et al., "Diverse Branch Block", CVPR 2021, arXiv 2103.13425, section 3.3.
    """

    def choose(geometry: Geometry) -> tuple[Branch, ...]:
        return (POINT_THEN_KERNEL, AVERAGE) if geometry.depthwise else (POINT, POINT_THEN_KERNEL, AVERAGE)

    return Recipe("dbb", choose)


def mobileone(kernels: int = 4) -> Recipe:
    """Several kxk, a 1x1 (where k > 1) and the identity, each with a norm; 1x1 convolutions are expanded, too.

    Args:
        kernels: how many kxk there are.

    Source: Vasu et al., "MobileOne", CVPR 2023, arXiv 2206.04040, section 3.3.
    """
    if kernels < 1:
        raise ReparamError(f"mobileone: expected at least one kernel, found {kernels}")

    def choose(geometry: Geometry) -> tuple[Branch, ...]:
        return (COPY,) * (kernels - 1) + (() if geometry.pointwise else (POINT,)) + (IDENTITY,)

    return Recipe(f"mobileone({kernels})", choose, pointwise=True)


# Length of the large kernel: (taps, dilation) of the branches beside it.
DILATED_KERNELS: Final[Mapping[int, tuple[tuple[int, int], ...]]] = MappingProxyType({
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
})  # fmt: skip


def dilated_reparam() -> Recipe:
    """A large kernel and smaller ones with dilation, each with a norm; kernels of 5 taps and more.

    Source: Ding et al., "UniRepLKNet", CVPR 2024, arXiv 2311.15599, section 3.1; the kernels of its code.
    """

    def choose(geometry: Geometry) -> tuple[Branch, ...]:
        lengths = {k for k in geometry.kernel if k > 1}
        known = [length for length in DILATED_KERNELS if lengths and length <= min(lengths)]
        return tuple(dilated(rate, taps) for taps, rate in DILATED_KERNELS[max(known)]) if known else ()

    return Recipe("dilated", choose)


def expandnet(ratio: int = 4) -> Recipe:
    """1x1, kxk and 1x1 in a row, with ``ratio`` times as many channels in between and no norm.

    Source: Guo et al., "ExpandNets", NeurIPS 2020, arXiv 1811.10495, section 3.1; the paper's ratio is 4.
    """
    return Recipe(f"expandnet({ratio})", lambda geometry: (), Widening(_ratio("expandnet", ratio), True), True)


def sesr(ratio: int = 4) -> Recipe:
    """kxk to ``ratio`` times as many channels, 1x1 back, and the identity; no norm.

    Source: Bhardwaj et al., "Collapsible Linear Blocks for Super-Efficient Super Resolution", MLSys 2022,
    arXiv 2103.09404, section 3.1; the paper widens 16 channels to 256.
    """
    return Recipe(f"sesr({ratio})", lambda geometry: (IDENTITY,), Widening(_ratio("sesr", ratio), False), True)


PRESETS: Final[Mapping[str, Callable[..., Recipe]]] = MappingProxyType({
    "repvgg": repvgg, "qarepvgg": qarepvgg, "acnet": acnet, "dbb": dbb, "mobileone": mobileone,
    "dilated": dilated_reparam, "expandnet": expandnet, "sesr": sesr,
})  # fmt: skip
BRANCHES: Final[Mapping[str, Branch]] = MappingProxyType({
    "1x1": POINT, "identity": IDENTITY, "scale": SCALE, "kxk": COPY, "1xk": HORIZONTAL, "kx1": VERTICAL,
    "avgpool": AVERAGE, "1x1-kxk": POINT_THEN_KERNEL,
})  # fmt: skip
CALL: Final = re.compile(r"(?P<name>[\w-]+)(?:\((?P<numbers>\s*\d+\s*(?:,\s*\d+\s*)*)\))?")


def recipe_of(given: object) -> Recipe:
    """The recipe that a name, a recipe, a branch or several branches stand for.

    Raises:
        ReparamError: a name is not known, or what is given is none of these.

    Example:
        >>> recipe_of("mobileone(2)").name, recipe_of(("1x1", "dilated(2)")).name
        ('mobileone(2)', '1x1 + dilated(2)')
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        name, numbers = _parsed(given)
        if name in PRESETS and not (name == "dilated" and numbers):
            try:
                return PRESETS[name](*numbers)
            except TypeError as error:
                raise ReparamError(f"{given!r}: {name} takes other numbers: {error}") from error
        return _composed((given,))
    if isinstance(given, Branch):
        return _composed((given,))
    if isinstance(given, Iterable):
        parts = tuple(given)
        if parts:
            return _composed(parts)
        raise ReparamError("expected at least one branch, found none")
    raise ReparamError(
        f"expected branches to be the name of a preset, a Recipe or a list of branches, found {type(given).__name__}"
    )


def _composed(parts: tuple[object, ...]) -> Recipe:
    branches = tuple(part if isinstance(part, Branch) else _branch(part) for part in parts)
    names = [part.name if isinstance(part, Branch) else str(part) for part in parts]
    return Recipe(" + ".join(names), lambda geometry: branches, pointwise=True)


def _branch(given: object) -> Branch:
    if isinstance(given, str):
        name, numbers = _parsed(given)
        if name in BRANCHES and not numbers:
            return BRANCHES[name]
        if name == "dilated" and len(numbers) in (1, 2) and min(numbers) > 0:
            return dilated(*numbers)
    presets = ", ".join(f"{name!r}" for name in PRESETS)
    known = ", ".join(f"{name!r}" for name in BRANCHES)
    found = repr(given) if isinstance(given, str) else type(given).__name__
    raise ReparamError(
        f"expected a branch ({known}, 'dilated(rate)') or, alone, a preset ({presets}), found {found}: use one of"
        " these, or a reparam.nn.Branch of your own"
    )


def _parsed(text: str) -> tuple[str, tuple[int, ...]]:
    match = CALL.fullmatch(text.strip())
    if match is None:
        return text, ()
    numbers = match["numbers"]
    return match["name"], tuple(int(n) for n in numbers.split(",")) if numbers else ()


def _ratio(name: str, ratio: int) -> int:
    if ratio < 1:
        raise ReparamError(f"{name}: expected a ratio of at least 1, found {ratio}")
    return ratio
