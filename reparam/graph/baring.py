"""Scale and shift of a norm with statistics of its input that go into the linear operations behind it.

    Conv(gamma * n(x) + beta) = Conv'(n(x)),      W' = W diag(gamma),      b' = b + (sum_a W[a]) beta

Every reader must be able to take them along; what is left is the norm without them.
"""

from dataclasses import replace
from typing import final

from reparam.algebra import Affine, Refusal
from reparam.cost import Work
from reparam.graph.draft import Draft
from reparam.graph.leaves import hooks
from reparam.graph.net import Value
from reparam.graph.passages import lets_through, parts
from reparam.graph.placing import Mode, Place
from reparam.graph.statistic_norms import tail_of
from reparam.graph.through import only_shape, standing, taken_over
from reparam.graph.worth import Worth
from reparam.graph.wraps import Wrap
from reparam.measure import Measured


@final
class Baring:
    """Lets scales and shifts at the end of norms disappear into what reads the norms."""

    def __init__(self, draft: Draft, worth: Worth) -> None:
        self.draft = draft
        self.plan = draft.plan
        self.worth = worth

    def bare(self, norm: Value) -> None:
        """Make a norm bare if that is exact and pays; note the reason if it is not."""
        space = self.plan.known.space(norm)
        tail = tail_of(norm, space)
        if tail is None or space is None:
            return
        operation = tail.operation(norm, space)
        found = self._readers(norm, space.channels)
        if isinstance(found, Refusal):
            return  # nothing linear reads it: an ordinary norm
        after = taken_over(self.draft, norm, operation.structure, found)
        refusal = after if isinstance(after, Refusal) else self._worth(found, after, tail.work)
        refusal = refusal or self._fixed(norm, [value for value, _ in found])
        places = None if refusal is not None or isinstance(after, Refusal) else standing(self.draft, after)
        if places is None or isinstance(places, Refusal) or isinstance(after, Refusal):
            refused = places if isinstance(places, Refusal) else refusal
            assert refused is not None
            self.plan.alone[norm] = refused.at(norm.path, norm.name, found[0][0].name)
            return
        self.plan.operations[norm] = operation
        self.plan.bared.append(norm)
        for value, wrap in found:
            self.plan.formulas[value] = after[value]
            self.plan.wraps.setdefault(value, []).append(wrap)
            self.plan.places[value] = replace(places[value], bared=(norm,))
        self.plan.groups.append((norm, [value for value, _ in found]))

    def _worth(self, found: list[tuple[Value, Wrap]], after: dict[Value, Affine], gone: Work) -> Refusal | None:
        """Why it does not pay: the kernel of a norm scales and shifts in the same pass, so only parameters go."""
        before = {value: self.plan.formulas[value] for value, _ in found}
        if not isinstance(self.worth.cost, Measured) and self.worth.gain(before, after, gone) is None:
            return None
        why = "its own kernel scales and shifts in the same pass, so only parameters would be saved"
        return Refusal("cost", why, "pass cost=reparam.cost.parameters")

    def _fixed(self, norm: Value, readers: list[Value]) -> Refusal | None:
        """Why a norm cannot be changed; None if it can."""
        site = self.draft.site
        if norm.module is None:
            reason = site.passable(norm, norm.frame)
        elif hooks(norm.module):
            reason = f"the module has a {hooks(norm.module)}"
        else:
            where = Place(norm, Mode.SWAP, {}, ())
            reason = site.replaceable(norm) or site.exposed([norm], [], where)
        reason = reason or site.crossing([norm, *readers])
        return Refusal("place", reason) if reason else self.draft.stays(norm)

    def _readers(self, norm: Value, channels: int) -> list[tuple[Value, Wrap]] | Refusal:
        """All operations that read the norm, through passages perhaps, each with what it takes over."""
        found: list[tuple[Value, Wrap]] = []
        pending: list[tuple[Value, tuple[Value, ...]]] = [(norm, ())]
        while pending:
            value, passages = pending.pop()
            if value.returned:
                return Refusal("used_elsewhere", f"the value of {value.name} is a result")
            for reader in self._reading(value):
                formula = self.plan.formulas.get(reader)
                carries = formula is None or lets_through(reader, self.plan.known.spaces, self.plan.operations)
                if carries and reader not in self.plan.places:
                    inputs = parts(reader, self.plan.known.spaces)
                    if formula is not None and self.plan.operations[reader].relays:
                        inputs = [(value, 0)]
                    if inputs != [(value, 0)]:
                        return Refusal("norm", f"{reader.name} at {reader.path or 'the root'} is not linear")
                    pending.append((reader, (*passages, reader)))
                    continue
                assert formula is not None
                if list(formula.terms) != [value] or reader in self.plan.wraps:
                    return Refusal("norm", f"{reader.name} at {reader.path or 'the root'} reads something else, too")
                found.append((reader, Wrap(norm, 0, channels, value, passages)))
        return found or Refusal("norm", "nothing reads it")

    def _reading(self, value: Value) -> list[Value]:
        """Values that are computed from ``value``, those that vanish replaced by what they vanish into."""
        materialised = {
            reader: None
            for reader, formula in self.plan.formulas.items()
            if reader not in self.plan.inlined and reader not in self.plan.dead and value in formula.terms
        }
        others = [
            user
            for user in value.users
            if user not in self.plan.operations and user not in self.plan.dead and not only_shape(user, value)
        ]
        return [*materialised, *others]
