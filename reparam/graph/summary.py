"""A plan for a reader: regions before and after, and what is left alone."""

from collections.abc import Iterable

from torch import nn

from reparam.algebra import Conv, Refusal
from reparam.cost import affine_work
from reparam.graph.net import Reading, Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.placing import Mode
from reparam.report import Region


def describe(plan: NetPlan, value: Value, error: float | None) -> Region:
    """One region before and after."""
    members = [*plan.members(value), *(wrap.norm for wrap in plan.wraps.get(value, ()))]
    before = [plan.operations[v] for v in members]
    formula = plan.formulas[value]
    work_before = [affine_work(op.structure, plan.sizes, plan.sizes[v]) for op, v in zip(before, members, strict=True)]
    work_after = affine_work(formula, plan.sizes, plan.sizes[value])
    scale = plan.sizes[value] or 1.0
    place = plan.places[value]
    path = place.container.path if place.container is not None else place.at.path
    after = tuple(_kind(conv, len(formula.terms) > 1) for conv in formula.terms.values())
    if formula.size is not None:
        after += (f"bias map {'x'.join(map(str, formula.size))}, for this size only",)
    return Region(
        path=path,
        before=tuple(op.label for op in before if op.label != "identity"),
        after=after,
        params_before=sum(_parameters(v) for v in members),
        params_after=work_after.parameters,
        macs_before=sum(work.macs for work in work_before) / scale,
        macs_after=work_after.macs / scale,
        how=place.mode.value,
        error=error,
    )


def dropped(plan: NetPlan, value: Value) -> Region:
    """A norm whose value nothing reads."""
    work = affine_work(plan.operations[value].structure, plan.sizes, plan.sizes[value])
    return Region(
        path=value.path,
        before=(plan.operations[value].label,),
        after=("nothing, for its value is not read",),
        params_before=_parameters(value),
        params_after=0,
        macs_before=work.macs / (plan.sizes[value] or 1.0),
        macs_after=0.0,
        how=Mode.SWAP.value,
    )


def _kind(conv: Conv, beside: bool) -> str:
    """A term of a formula in words."""
    if conv.identity:
        return "its input"
    if conv.scales and (beside or conv.axes == 0):
        return "scale"
    if conv.axes == 0:
        return f"linear {conv.in_channels} -> {conv.out_channels}"
    kind = "transposed conv" if conv.transposed else "conv"
    extras = "".join(
        f", {name} {'x'.join(map(str, got))}"
        for name, got in (("stride", conv.stride), ("dilation", conv.dilation))
        if set(got) != {1}
    )
    groups = f", groups {conv.groups}" if conv.groups > 1 else ""
    return f"{kind} {'x'.join(map(str, conv.kernel))}{extras}{groups}{_sizes(conv)}"


def _sizes(conv: Conv) -> str:
    """For which sizes a term holds, if not for all."""
    if conv.remainders is None:
        return ""
    allowed = [
        f"{' or '.join(map(str, r))} mod {s}" for s, r in zip(conv.stride, conv.remainders, strict=True) if len(r) < s
    ]
    return f", for sizes that are {' and '.join(dict.fromkeys(allowed))} only"


def left(reading: Reading, plans: Iterable[NetPlan]) -> list[Refusal]:
    """Everything left alone that could have been expected to fuse."""
    found: dict[tuple[str, str, str], Refusal] = {}

    def add(refusal: Refusal) -> None:
        found.setdefault((refusal.path, refusal.rule, refusal.condition), refusal)

    for path, unread in reading.unread.items():
        add(Refusal("unread", str(unread), "see the line that stopped it", path=path))
    for path, reason in reading.opaque.items():
        add(Refusal("opaque", reason, "call it once, without hooks", path=path))
    for plan in plans:
        covered = {c for operation in plan.operations.values() for c in operation.covers}
        for value, refusal in plan.boundaries.items():
            if value in covered:
                continue
            if refusal.rule not in ("scale", "layout", "constant_add", "slice") or value.module is not None:
                add(refusal)
        for (value, reader), refusal in plan.refusals.items():
            gone = (
                value in plan.inlined
                or reader in plan.inlined
                or any(plan.operations[v].hands_on for v in (value, reader))
            )
            if not gone and refusal.rule != "boundary" and value in plan.formulas[reader].terms:
                add(refusal)
        for value, operation in plan.operations.items():
            if operation.norm and not any(value in done for done in (plan.inlined, plan.places, plan.dropped)):
                add(_lonely(plan, value))
    return list(found.values())


def _parameters(value: Value) -> int:
    """Parameters of an operation; norm statistics are none."""
    if value.module is not None:
        return sum(p.numel() for p in value.module.parameters())
    tensors = {id(t): t for t in (*value.args, *value.kwargs.values()) if isinstance(t, nn.Parameter)}
    return sum(t.numel() for t in tensors.values())


def _lonely(plan: NetPlan, value: Value) -> Refusal:
    """Why a norm stays."""
    for (source, reader), refusal in plan.refusals.items():
        if refusal.rule != "boundary" and (source is value or reader is value):
            return refusal.at(value.path, source.name, reader.name)
    if value in plan.alone:
        return plan.alone[value]
    sources = ", ".join(f"{v.name} at {v.path or 'the root'}" for v in value.inputs)
    users = ", ".join(sorted({f"{v.name}" for v in value.users})) or "the caller"
    return Refusal(
        "norm",
        f"its input ({sources}) and its readers ({users}) are not linear",
        path=value.path,
        operands=(value.name,),
    )
