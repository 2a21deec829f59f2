"""Hypothesis profiles: `dev` draws anew in every run, `ci` the same examples every time.

`HYPOTHESIS_PROFILE=ci` picks one; where the variable `CI` is set, `ci` is the default.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, Phase, settings

# Geometry is drawn under conditions, and an example may fuse a net: neither the filter nor the clock says anything.
# A failing example is explained by its geometry, so no time is spent on explaining it by lines of code.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
UNINFORMATIVE = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile("dev", deadline=None, phases=PHASES, suppress_health_check=UNINFORMATIVE)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# What packages replace in others when they are imported.
PATCHED = [("torch", "save"), *([("PIL.Image", "open")] if find_spec("PIL") is not None else [])]
ORIGINALS = [(import_module(home), name, getattr(import_module(home), name)) for home, name in PATCHED]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Every test finds these functions as their own packages define them."""
    for home, name, function in ORIGINALS:
        setattr(home, name, function)
    yield
    for home, name, function in ORIGINALS:
        setattr(home, name, function)
