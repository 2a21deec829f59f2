"""The operations of a model and what they read, before and after, as plain data."""

from collections.abc import Iterable, Sequence

from reparam.graph.net import Value
from reparam.graph.net_plan import NetPlan
from reparam.graph.sizes import is_plain
from reparam.graph.summary import kernels, region_members, region_path
from reparam.report import Node, Wiring

Region = tuple[NetPlan, Value]


def wire(plans: Iterable[NetPlan], regions: Sequence[Region]) -> Wiring:
    """What a picture of a model is drawn from; ``regions`` are numbered by their position."""
    before: dict[int, Node] = {}
    after: dict[int, Node] = {}
    first = 0
    for plan in plans:
        own = {value: number for number, (owner, value) in enumerate(regions) if owner is plan}
        _wire_net(plan, own, first, before, after)
        first += len(plan.net.values)
    return Wiring(before, after)


def _wire_net(
    plan: NetPlan, regions: dict[Value, int], first: int, before: dict[int, Node], after: dict[int, Node]
) -> None:
    shown = [value for value in plan.net.values if value not in plan.dead and not is_plain(value)]
    member_of = _members(plan, regions)
    passed = {norm for norm, _ in plan.groups}
    joined = (wrap for wraps in plan.wraps.values() for wrap in wraps if wrap.joined is not None)
    unread = {wrap.passages[1] for wrap in joined}  # shuffles of branches that others took over
    old: dict[Value, int] = {}
    new: dict[Value, int] = {}
    for value in shown:
        key, region = first + value.index, member_of.get(value)
        if region is None and _copies(plan, value):  # its readers are shown to read what it copies
            (source,) = plan.operations[value].terms
            old[value], new[value] = old.get(source, key), new.get(source, key)
            continue
        operation = plan.operations.get(value)
        bared = value in plan.bared
        label = value.name if operation is None or bared else operation.label
        linear = operation is not None and not bared
        name = str(value.node.target) if value.module is not None else ""
        before[key] = Node(label, value.path, _keys(value.inputs, old), region, linear, name)
        old[value] = key
        if value in unread:
            continue
        if region is None or bared:
            after[key] = Node(label, value.path, _keys(value.inputs, new), None, linear, name)
            new[value] = key
        elif value in regions and value not in plan.dropped:
            formula = plan.formulas[value]
            text = " + ".join(str(kernel) for kernel in kernels(formula) if str(kernel) != "its input")
            roots = tuple(plan.aliases.get(root, root) for root in formula.terms if isinstance(root, Value))
            after[key] = Node(text or "bias", region_path(plan, value), _keys(roots, new), region, True)
            new[value] = key
        elif value in passed:
            (source,) = plan.formulas[value].terms
            new[value] = new.get(source, key)


def _members(plan: NetPlan, regions: dict[Value, int]) -> dict[Value, int]:
    """Every value of a region, with its number; what disappears into several counts for the first."""
    found: dict[Value, int] = {}
    for value, number in regions.items():
        for member in region_members(plan, value):
            for part in (*plan.operations[member].covers, member):
                found.setdefault(part, number)
    return found


def _copies(plan: NetPlan, value: Value) -> bool:
    """Whether a value is that of another one, and is left as it is."""
    operation = plan.operations.get(value)
    return operation is not None and operation.hands_on and value not in plan.inlined and value not in plan.places


def _keys(values: Iterable[Value], keys: dict[Value, int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(keys[value] for value in values if value in keys))
