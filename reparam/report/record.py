"""Reports as plain data, and back."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from reparam.algebra import Refusal
from reparam.report.region import Footprint, Kernel, Kind, Region, Step

if TYPE_CHECKING:
    from reparam.report.report import Report


def of_report(report: "Report") -> dict[str, Any]:
    """A report as dicts, lists, strings and numbers."""
    return {
        "model": report.model_type,
        "regions": [_of_region(region) for region in report.regions],
        "left": [_fields(refusal) for refusal in report.left],
        "boundaries": [_fields(refusal) for refusal in report.boundaries],
        "modules": dict(report.modules),
        "totals": _fields(report.totals),
    }


def _of_region(region: Region) -> dict[str, Any]:
    return _fields(region) | {"before": list(region.before), "after": list(region.after)}


def _fields(record: Any) -> dict[str, Any]:
    return {name: _plain(getattr(record, name)) for name in _names(type(record))}  # type: ignore[arg-type]  # a class is hashable


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _plain(value: Any) -> Any:
    """Records as dicts, tuples as lists, enumerations as their values."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Kind) else _fields(value)


def to_report(
    record: Mapping[str, Any],
) -> tuple[tuple[Region, ...], tuple[Refusal, ...], str, Mapping[str, str], tuple[Refusal, ...]]:
    """Regions, refusals, class, modules and boundaries of a report that was plain data."""
    left, boundaries = (tuple(map(_to_refusal, record[key])) for key in ("left", "boundaries"))
    return tuple(map(_to_region, record["regions"])), left, record["model"], dict(record["modules"]), boundaries


def _to_refusal(record: Mapping[str, Any]) -> Refusal:
    return Refusal(**{**record, "operands": tuple(record["operands"])})


def _to_region(record: Mapping[str, Any]) -> Region:
    fields = {key: value for key, value in record.items() if key not in ("before", "after")}
    fields["steps"] = tuple(Step(**step) for step in record["steps"])
    fields["result"] = tuple(_to_kernel(kernel) for kernel in record["result"])
    for when in ("footprint_before", "footprint_after"):
        fields[when] = None if record[when] is None else Footprint(**record[when])
    return Region(**fields)


def _to_kernel(record: Mapping[str, Any]) -> Kernel:
    numbers = {key: tuple(record[key]) for key in ("kernel", "stride", "dilation")}
    padding = tuple((before, behind) for before, behind in record["padding"])
    sizes = record["remainders"]
    remainders = None if sizes is None else tuple(map(tuple, sizes))
    return Kernel(**{**record, **numbers, "kind": Kind(record["kind"]), "padding": padding, "remainders": remainders})
