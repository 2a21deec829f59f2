"""Whether weights fit a model, and in what they do not."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor


def misfits(
    expected: Mapping[str, Any], found: Mapping[str, Any], given_as: Mapping[str, str], doubled: Collection[str] = ()
) -> str:
    """Everything in which weights do not fit a model, as lines; empty if they fit.

    Args:
        expected: state dict of the model.
        found: key to value, under the keys of the model.
        given_as: what each of them is called in the checkpoint.
        doubled: keys that were given twice.
    """
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [given_as[key] for key in found if key not in expected]
    misshapen = [
        f"{given_as[key]}: expected {form(tensor)}, found {form(found[key])}"
        for key, tensor in expected.items()
        if key in found and form(found[key]) != form(tensor)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen), ("given twice", doubled))
    return "".join(f"\n  {kind} ({len(lines)}):\n    " + "\n    ".join(lines) for kind, lines in kinds if lines)


def form(value: object) -> tuple[int, ...] | str:
    """The shape of a tensor that can be copied, else what it is."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return "a meta tensor" if value.is_meta else tuple(value.shape)


def renamed(
    weights: Mapping[str, Any], rename: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Weights under other keys; what each of them was called; and what was given twice."""
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    doubled: list[str] = []
    for given, value in weights.items():
        key = rename(given)
        if key in found:
            doubled.append(f"{key}: {given_as[key]} and {given}")
        found[key], given_as[key] = value, given
    return found, given_as, doubled
