"""Nets that Python packages ship: equal outputs, nothing lost, no more operations than the package's converter leaves.

Each test runs where its package is installed: `pip install '.[packages]'`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from nets import counted, difference, fuse_purely, images, ready, run
from package_detectors import DETECTORS
from package_nets import CLASSIFIERS, Net, converted, quiet
from torch import nn

NETS = {net.key: net for net in (*CLASSIFIERS, *DETECTORS) if not net.large}
KINDS = ("conv", "linear", "norm", "add")
# The package's converter crashes, or leaves out a part of the output.
OTHERWISE = ("repvgg_pytorch/RepVGGplus", "ultralytics/yolov10n", "ultralytics/yolo26n")


@dataclass(frozen=True)
class Pair:
    """A net before and after."""

    net: Net
    model: nn.Module
    fused: nn.Module


@functools.lru_cache(maxsize=1)
def pair_of(key: str) -> Pair:
    net = NETS[key]
    if find_spec(net.package) is None:
        pytest.skip(f"the package {net.package} is not installed")
    torch.manual_seed(0)
    model = ready(quiet(net.build))
    return Pair(net, model, fuse_purely(model))


@pytest.fixture(params=NETS, scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    """Shared by the tests that do not change it."""
    return pair_of(request.param)


pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),  # the packages' own, of every kind
]


def test_outputs_are_equal(pair: Pair) -> None:
    """With their classes and structure, at two sizes."""
    for index in range(2):
        arguments, keywords = pair.net.call(index)
        expected, found = run(pair.model, arguments, keywords), run(pair.fused, arguments, keywords)
        assert difference(expected, found) < 1e-9


def test_no_more_operations_than_the_package_leaves(pair: Pair) -> None:
    arguments, keywords = pair.net.call()
    before = counted(pair.model, *arguments, **keywords)[1]
    after = counted(pair.fused, *arguments, **keywords)[1]
    assert after["norm"] == pair.net.norms
    assert [kind for kind in (*KINDS, "calls") if after[kind] > before[kind]] == []
    if pair.net.convert is None or pair.net.key in OTHERWISE:
        return
    theirs = counted(converted(pair.net, pair.model), *arguments, **keywords)[1]
    assert after["norm"] <= theirs["norm"]
    assert after["add"] <= theirs["add"]
    assert sum(after[kind] for kind in KINDS) <= sum(theirs[kind] for kind in KINDS)
    assert after["conv"] + after["linear"] <= theirs["conv"] + theirs["linear"]


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def methods(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            yield from (name for name, value in vars(base).items() if callable(value) and not name.startswith("_"))


def test_classes_methods_and_attributes_are_kept(pair: Pair) -> None:
    """Of every module that is not replaced as a whole; convolutions and norms of torch are what is rewritten."""
    kept = dict(pair.fused.named_modules())
    assert type(pair.fused) is type(pair.model)
    for path, old in pair.model.named_modules():
        new = kept.get(path)
        if new is None or not isinstance(new, type(old)):
            assert path, "the class of the net is lost"
            continue
        assert [name for name in methods(type(old)) if not callable(getattr(new, name, None))] == []
        assert public(vars(old)) <= public(vars(new)), path
        for name, value in vars(old).items() if type(old).__module__.partition(".")[0] != "torch" else ():
            if isinstance(value, bool | int | float | str | tuple) and not name.startswith("_"):
                assert vars(new)[name] == value, f"{path}.{name}"


# --- what users of one package do -------------------------------------------------------------------------------------


def test_timm_gives_features_and_takes_another_classifier() -> None:
    pair = pair_of("timm/mobileone")
    x = images((64, 64), channels=3, batch=1)
    for name in ("forward_features", "forward_intermediates"):
        expected, found = run(getattr(pair.model, name), (x,), {}), run(getattr(pair.fused, name), (x,), {})
        assert difference(expected, found) < 1e-9
    model, fused = copy.deepcopy((pair.model, pair.fused))
    for net in (model, fused):
        net.reset_classifier(0)
    assert difference(run(model, (x,), {}), run(fused, (x,), {})) < 1e-9


@pytest.mark.parametrize("key", ["transformers/RT-DETR", "transformers/PP-LCNetV3", "transformers/TextNet"])
@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"return_dict": False}], ids=str)
def test_outputs_of_transformers(key: str, options: dict[str, Any]) -> None:
    """Classes of outputs, hidden states that hooks collect, tuples."""
    pair = pair_of(key)
    arguments, keywords = pair.net.call()
    expected = run(pair.model, arguments, keywords | options)
    assert difference(expected, run(pair.fused, arguments, keywords | options)) < 1e-9


def test_parts_of_a_segmenter() -> None:
    pair = pair_of("segmentation_models_pytorch/Unet over tu-repvgg_a0")
    x = images((64, 64), channels=3, batch=1)
    features = run(pair.model.encoder, (x,), {})
    assert difference(features, run(pair.fused.encoder, (x,), {})) < 1e-9
    expected = run(pair.model.decoder, (features[0],), {})
    assert difference(expected, run(pair.fused.decoder, (features[0],), {})) < 1e-9
    assert difference(run(pair.model.predict, (x,), {}), run(pair.fused.predict, (x,), {})) < 1e-9


def test_routes_of_a_detector() -> None:
    """The parent reads `f` and `i` of its children, of those that were replaced, too."""
    pair = pair_of("ultralytics/yolov9t")
    for old, new in zip(pair.model.model, pair.fused.model, strict=True):
        assert (new.i, new.f, new.type, new.np) == (old.i, old.f, old.type, old.np)
    assert pair.fused.save == pair.model.save
    x = images((64, 64), channels=3, batch=1)
    for layers in ([4], [9, 15]):
        expected = run(pair.model.predict, (x,), {"embed": layers})
        assert difference(expected, run(pair.fused.predict, (x,), {"embed": layers})) < 1e-9


@pytest.mark.xfail(strict=True, raises=AttributeError, reason="it asks for norms, and identities stand in their places")
def test_the_converter_of_a_package_after_ours() -> None:
    pair = pair_of("ultralytics/yolov8n")
    arguments, keywords = pair.net.call()
    after = converted(pair.net, pair.fused)
    assert difference(run(pair.model, arguments, keywords), run(after, arguments, keywords)) < 1e-9
