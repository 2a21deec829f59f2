"""Operations of a net as affine formulas, or the reason why one is a boundary.

A lifting is a plain function of a value and what is known about the net. It returns an ``Operation``, a ``Refusal``
(it is linear in principle, but not here), or None (not its business). The tuple ``LIFTINGS`` holds them in order;
extend it with ``+``.
"""

from reparam.graph.lift.base import Known, Lifted, Lifting
from reparam.graph.lift.lifting import LIFTINGS, lift

__all__ = ["LIFTINGS", "Known", "Lifted", "Lifting", "lift"]
