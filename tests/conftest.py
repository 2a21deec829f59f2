"""Hypothesis profiles: `dev` draws anew in every run, `ci` the same examples every time.

`HYPOTHESIS_PROFILE=ci` picks one; where the variable `CI` is set, `ci` is the default.
"""

import os

from hypothesis import HealthCheck, Phase, settings

# Geometry is drawn under conditions, and an example may fuse a net: neither the filter nor the clock says anything.
# A failing example is explained by its geometry, so no time is spent on explaining it by lines of code.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
UNINFORMATIVE = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile("dev", deadline=None, phases=PHASES, suppress_health_check=UNINFORMATIVE)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
