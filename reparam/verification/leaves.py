"""The tensors in a nested value, by name, and how far two of them are apart."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Leaves = dict[str, Tensor]


def leaves(value: Any, name: str) -> Leaves:
    """The tensors and numbers in a nested value.

    Args:
        value: tensors in dicts, lists, tuples and dataclasses, at any depth; anything else is passed over.
        name: what the whole value is called.

    >>> list(leaves({"boxes": torch.zeros(2), "scores": [torch.ones(1), None]}, "output"))
    ["output['boxes']", "output['scores'][0]"]
    """
    return dict(_walk(value, name))


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), f"{name}.{field.name}")


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest magnitude of the first.

    Args:
        expected: a tensor of any shape and dtype.
        found: what is compared with it, on any device.

    Returns:
        The error; infinity if the shapes or the places of inf and NaN differ. For integers and booleans, the share of
        elements that differ.

    >>> relative_error(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]))
    0.25
    """
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((expected != found.to(expected.device)).double().mean())
    exact = torch.complex128 if expected.is_complex() or found.is_complex() else torch.float64
    left, right = (t.detach().to("cpu", exact) for t in (expected, found))
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()):
        return float("inf")
    if not finite.all():
        special = left[~finite], right[~finite]
        if not torch.equal(special[0].nan_to_num(), special[1].nan_to_num()):
            return float("inf")
        left, right = left[finite], right[finite]
        if left.numel() == 0:
            return 0.0
    difference = float((left - right).abs().max())
    return difference / max(float(left.abs().max()), torch.finfo(torch.float32).tiny)
