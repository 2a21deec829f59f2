"""Model files without their own conversion: `fuse` gives what their converter gave, from their forward alone."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from nets import ready
from package_nets import quiet

import reparam


def script() -> ModuleType:
    spec = spec_from_file_location("migration", Path(__file__).resolve().parents[1] / "benchmarks" / "migration.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["migration"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


MIGRATION = script()

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]  # the packages' own warnings, of every kind
each_file = pytest.mark.parametrize("migration", MIGRATION.MIGRATIONS, ids=lambda migration: migration.module)


@each_file
def test_the_forward_alone_is_enough(migration: object) -> None:
    if find_spec(migration.package) is None:
        pytest.skip(f"the package {migration.package} is not installed")
    found = MIGRATION.measure(migration)
    assert found.lines > 40
    assert found.error < 1e-12
    assert found.theirs < 1e-12
    for kind in ("conv", "linear", "norm", "add"):
        assert found.ours_left[kind] <= found.theirs_left[kind]


@each_file
def test_checkpoints_of_training_still_fit(migration: object) -> None:
    """Nothing that is stored goes: the stripped net has the keys of the original one, before `fuse`."""
    if find_spec(migration.package) is None:
        pytest.skip(f"the package {migration.package} is not installed")
    model = ready(quiet(migration.build))
    plain, _ = MIGRATION.migrated(migration, model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert not any(hasattr(block, name) for block in plain.modules() for name in ("switch_to_deploy", "fuse_convs"))
    fused = reparam.fuse(plain)
    again = reparam.fuse(quiet(migration.build).double().eval())
    again.load_state_dict(fused.state_dict())
