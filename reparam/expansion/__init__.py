"""Convolutions become multi-branch blocks, and fused nets get their branches back."""

from reparam.expansion.expand import expand, survey
from reparam.expansion.restore import restore
from reparam.expansion.sites import Survey

__all__ = ["Survey", "expand", "restore", "survey"]
