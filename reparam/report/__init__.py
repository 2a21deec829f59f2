"""What fusing a model would do, or did: regions, and everything left alone with its reason.

``Plan`` and ``Receipt`` are values: numbers, names and reasons, no weights. How they are printed and drawn is in
``reparam.show``.
"""

from reparam.report.plan import Plan
from reparam.report.receipt import Receipt
from reparam.report.region import Footprint, Kernel, Kind, Region, Step
from reparam.report.report import Report, Totals
from reparam.report.wiring import Node, Wiring

__all__ = ["Footprint", "Kernel", "Kind", "Node", "Plan", "Receipt", "Region", "Report", "Step", "Totals", "Wiring"]
