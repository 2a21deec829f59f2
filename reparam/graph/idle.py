"""What callers compute for a region that a child of theirs forms, and need not compute any more."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

from reparam.graph.net import Frame, Value


def idle_in_callers(
    home: Frame, members: Sequence[Value], passed: Collection[Value], passable: Callable[[Value, Frame], str]
) -> Mapping[Value, Frame] | str:
    """Members of a region that callers of the place where it is formed compute.

    Args:
        home: where the region is formed.
        members: the values that disappear.
        passed: those that hand on their input from now on.
        passable: why a value cannot be taken out of a forward; empty if it can.

    Returns:
        Each with the caller that computes it, or calls what does; or why one must go on being computed.
    """
    idle: dict[Value, Frame] = {}
    above = list(home.upwards())
    inside = {home}
    apart = [] if len(above) == 1 else [value for value in members if not _is_inside(value.frame, inside)]
    if not apart:
        return idle
    known, handing_on = set(members), set(passed)
    for value in apart:
        if value in handing_on:
            continue
        around = list(value.frame.upwards())
        depth, caller = next((i, frame) for i, frame in enumerate(above) if frame in around)
        call = next((frame.call for frame in around if frame.parent is caller), None)
        result = None if call is None else caller.env[call]
        if call is not None and not (isinstance(result, Value) and result in known):
            return f"{value.name} at {value.path or 'the root'} is computed by a caller, with other results"
        reason = next((why for frame in above[1 : depth + 1] if (why := passable(value, frame))), "")
        if reason:
            return reason
        idle[value] = caller
    return idle


def _is_inside(frame: Frame, inside: set[Frame]) -> bool:
    """Whether a frame is one of some frames, or called in one; what is found is added to these."""
    way = list(itertools.takewhile(lambda f: f not in inside, frame.upwards()))
    if way and way[-1].parent is None:
        return False
    inside.update(way)
    return True
