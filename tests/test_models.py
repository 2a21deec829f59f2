"""RepVGG: architecture, figures and weights, against a plain re-implementation and timm's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import difference, ready
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import reparam
from reparam import ReparamError, models
from reparam.models import RepVGG, load_weights
from reparam.models.checkpoints import key_here
from reparam.models.count import PUBLISHED, Count, count, main
from reparam.models.repvgg import VARIANTS

SMALL: dict[str, Any] = {"depths": (1, 2, 3), "widths": (8, 8, 16), "strides": (1, 2, 2), "num_classes": 5}
WIDE: dict[str, Any] = SMALL | {"widths": (8, 32, 48)}  # wide enough for squeeze-excite and groups
KINDS: dict[str, dict[str, Any]] = {
    "dense": SMALL,
    "grouped": WIDE | {"groups_of_layer": {2: 2, 4: 4}},
    "squeeze_excite": WIDE | {"widths": (16, 32, 48), "squeeze_excite": True},
}

# Depths and widths of every variant, written out from the paper's tables.
A, B, D = (1, 2, 4, 14, 1), (1, 4, 6, 16, 1), (1, 8, 14, 24, 1)
SHAPES = {
    "repvgg_a0": (A, (48, 48, 96, 192, 1280), 1),
    "repvgg_a1": (A, (64, 64, 128, 256, 1280), 1),
    "repvgg_a2": (A, (64, 96, 192, 384, 1408), 1),
    "repvgg_b0": (B, (64, 64, 128, 256, 1280), 1),
    "repvgg_b1": (B, (64, 128, 256, 512, 2048), 1),
    "repvgg_b1g2": (B, (64, 128, 256, 512, 2048), 2),
    "repvgg_b1g4": (B, (64, 128, 256, 512, 2048), 4),
    "repvgg_b2": (B, (64, 160, 320, 640, 2560), 1),
    "repvgg_b2g2": (B, (64, 160, 320, 640, 2560), 2),
    "repvgg_b2g4": (B, (64, 160, 320, 640, 2560), 4),
    "repvgg_b3": (B, (64, 192, 384, 768, 2560), 1),
    "repvgg_b3g2": (B, (64, 192, 384, 768, 2560), 2),
    "repvgg_b3g4": (B, (64, 192, 384, 768, 2560), 4),
    "repvgg_d2se": (D, (64, 160, 320, 640, 2560), 1),
}

every_variant = pytest.mark.parametrize("build", VARIANTS, ids=lambda build: build.__name__)
every_kind = pytest.mark.parametrize("kind", KINDS)


# --- the same net, written plainly under the original repository's names ----------------------------------------------


def conv_bn(cin: int, cout: int, kernel: int, stride: int, groups: int) -> nn.Module:
    branch = nn.Module()
    branch.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    branch.bn = nn.BatchNorm2d(cout)
    return branch


class PlainBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, groups: int, se: bool, deploy: bool) -> None:
        super().__init__()
        self.deploy, self.has_se = deploy, se
        self.has_identity = cin == cout and stride == 1 and not deploy
        if deploy:
            self.rbr_reparam = nn.Conv2d(cin, cout, 3, stride, 1, groups=groups)
        else:
            self.rbr_dense = conv_bn(cin, cout, 3, stride, groups)
            self.rbr_1x1 = conv_bn(cin, cout, 1, stride, groups)
        if self.has_identity:
            self.rbr_identity = nn.BatchNorm2d(cin)
        if se:
            self.se = nn.Module()
            self.se.down = nn.Conv2d(cout, cout // 16, 1)
            self.se.up = nn.Conv2d(cout // 16, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            total = self.rbr_reparam(x)
        else:
            total = self.rbr_dense.bn(self.rbr_dense.conv(x)) + self.rbr_1x1.bn(self.rbr_1x1.conv(x))
        if self.has_identity:
            total = total + self.rbr_identity(x)
        if self.has_se:
            pooled = F.adaptive_avg_pool2d(total, 1)
            total = total * torch.sigmoid(self.se.up(F.relu(self.se.down(pooled))))
        return F.relu(total)


class PlainRepVGG(nn.Module):
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        groups_of_layer: dict[int, int] | None = None,
        squeeze_excite: bool = False,
        num_classes: int = 1000,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.path: list[str] = []
        layer, cin = 0, 3
        for stage, (depth, width, stride) in enumerate(zip(depths, widths, strides, strict=True)):
            blocks = []
            for index in range(depth):
                groups = (groups_of_layer or {}).get(layer, 1)
                blocks.append(PlainBlock(cin, width, 1 if index else stride, groups, squeeze_excite, deploy))
                layer, cin = layer + 1, width
            self.path.append(f"stage{stage}")
            setattr(self, f"stage{stage}", blocks[0] if stage == 0 else nn.Sequential(*blocks))
        self.linear = nn.Linear(cin, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.path:
            x = getattr(self, name)(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def plain_variant(name: str, **options: Any) -> PlainRepVGG:
    depths, widths, groups = SHAPES[name]
    grouped = dict.fromkeys(range(2, 27, 2), groups)
    return PlainRepVGG(depths, widths, groups_of_layer=grouped, squeeze_excite=name.endswith("se"), **options)


def on_meta(build: Callable[..., nn.Module], *args: Any, **keywords: Any) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **keywords).eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key_here(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (17, 20)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def error(expected: nn.Module, found: nn.Module) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    with torch.no_grad():
        return difference(expected(image()), found(image()))


# --- architecture -----------------------------------------------------------------------------------------------------


def test_shapes_of_a_small_net() -> None:
    net = RepVGG(**SMALL, in_channels=1).eval()
    x = torch.zeros(3, 1, 9, 14)
    assert net.forward_features(x).shape == (3, 16, 3, 4)
    assert net(x).shape == (3, 5)


def test_a_variant_takes_classes_channels_and_strides() -> None:
    net = on_meta(models.repvgg_a0, num_classes=7, in_channels=1, strides=(1, 1, 2, 2, 2))
    x = torch.empty(2, 1, 28, 28, device="meta")
    assert net.forward_features(x).shape == (2, 1280, 4, 4)
    assert net(x).shape == (2, 7)


@every_variant
def test_variant_has_the_papers_layers(build: Callable[..., RepVGG]) -> None:
    assert shapes(on_meta(build)) == shapes(on_meta(plain_variant, build.__name__))
    assert build.__name__ in dir(models)


@every_kind
def test_identity_branch_is_there_where_shapes_allow(kind: str) -> None:
    net = RepVGG(**KINDS[kind])
    for block in (block for stage in net.stages for block in stage):
        conv = block.dense.conv
        assert (block.skip is not None) == (conv.in_channels == conv.out_channels and conv.stride == (1, 1))
        assert block.pointwise.conv.groups == conv.groups


def test_groups_are_in_every_second_layer_after_the_stem() -> None:
    net = on_meta(models.repvgg_b1g4)
    groups = [block.dense.conv.groups for stage in net.stages for block in stage]
    assert groups == [1, *(4 if layer % 2 == 0 else 1 for layer in range(1, 27)), 1]


def test_squeeze_excite_is_in_d2se_alone_and_narrows_sixteenfold() -> None:
    hidden = [m.down.out_channels for m in on_meta(models.repvgg_d2se).modules() if isinstance(m, models.SqueezeExcite)]
    assert hidden == [4, *[10] * 8, *[20] * 14, *[40] * 24, 160]
    assert not any(isinstance(m, models.SqueezeExcite) for m in on_meta(models.repvgg_b2).modules())


def test_stages_of_different_number_are_refused() -> None:
    with pytest.raises(ReparamError, match="one entry per stage, found 2, 1 and 2"):
        RepVGG(depths=(1, 2), widths=(8,), strides=(1, 1))
    with pytest.raises(ReparamError, match="one entry per stage, found 0, 0 and 0"):
        RepVGG(depths=(), widths=(), strides=())


def test_groups_of_a_layer_that_does_not_exist_are_refused() -> None:
    with pytest.raises(ReparamError, match=r"names layers \[6, 9\], the net has 0 to 5"):
        RepVGG(**SMALL, groups_of_layer={9: 2, 6: 2, 1: 2})


# --- fused ------------------------------------------------------------------------------------------------------------


@every_variant
def test_fused_variant_has_one_convolution_per_block(build: Callable[..., RepVGG]) -> None:
    fused = reparam.fuse(on_meta(build))
    blocks = [block for stage in fused.stages for block in stage]
    assert shapes(fused) == shapes(on_meta(plain_variant, build.__name__, deploy=True))
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in fused.modules()) == len(blocks)
    assert all(type(block.dense) is nn.Conv2d for block in blocks)
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    assert isinstance(fused, RepVGG)


@every_kind
def test_fused_net_computes_the_same(kind: str) -> None:
    net = ready(RepVGG(**KINDS[kind]))
    assert error(net, reparam.fuse(net)) < 1e-10


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    counted = count(reparam.fuse(on_meta(getattr(models, name))))
    parameters, flops, winograd_muls = PUBLISHED[name]
    assert counted.figures == (parameters, flops, winograd_muls)
    assert abs(counted.parameters / 1e6 - parameters) < 0.011
    # The paper counts biases, which are some hundredths of a percent; weights alone are short of its figure.
    assert -0.014 < counted.weights / 1e6 - parameters < 0.005


@every_variant
def test_fused_variant_costs_what_the_plain_deploy_net_costs(build: Callable[..., RepVGG]) -> None:
    plain = on_meta(plain_variant, build.__name__, deploy=True)
    assert count(reparam.fuse(on_meta(build))) == count(plain)
    assert count(plain).parameters == sum(parameter.numel() for parameter in plain.parameters())


def test_count_of_layers_worked_out_by_hand() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),  # 8×8 -> 4×4: not for Winograd
        shared,
        nn.BatchNorm2d(4),
        shared,
        nn.Conv2d(4, 4, 1, groups=2),
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # weights meet the 4×4 input
        nn.Flatten(),
        nn.Linear(2 * 8 * 8, 10),
    )
    weights = (108, 144, 8, 32, 1280)
    direct = 108 * 16 + 8 * 16 + 32 * 16 + 1280
    counted = count(net.eval(), (3, 8, 8))
    assert counted == Count(sum(weights), 4 + 4 + 2 + 10, direct + 2 * 144 * 16, direct + 2 * 144 * 16 / 2.25)
    assert counted.parameters == sum(p.numel() for p in net.parameters()) - 8


def test_counting_leaves_the_model_as_it_was() -> None:
    net = ready(RepVGG(**SMALL))
    before = copy.deepcopy(net.state_dict())
    logits = net(image())
    count(net, (3, 16, 16))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(net(image()), logits)
    assert not any(module._forward_hooks for module in net.modules())


def test_the_command_prints_every_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["count"])
    main()
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(lines) == [build.__name__ for build in VARIANTS]
    assert lines["repvgg_b1g2"] == ["41.36", "(41.36)", "8.8", "(8.8)", "4.6", "(4.6)"]
    assert len(lines["repvgg_d2se"]) == 3


# --- weights ----------------------------------------------------------------------------------------------------------


@every_kind
def test_original_training_weights_load(kind: str) -> None:
    theirs = ready(PlainRepVGG(**KINDS[kind]))
    ours = ready(RepVGG(**KINDS[kind]), seed=1)
    assert error(theirs, ours) > 0.01
    load_weights(ours, theirs.state_dict())
    assert error(theirs, ours) < 1e-12


@every_kind
def test_original_deploy_weights_load_into_the_fused_net(kind: str) -> None:
    theirs = ready(PlainRepVGG(**KINDS[kind], deploy=True))
    ours = reparam.fuse(ready(RepVGG(**KINDS[kind]), seed=1))
    load_weights(ours, theirs.state_dict())
    assert error(theirs, ours) < 1e-12


def timm_net(name: str) -> tuple[nn.Module, RepVGG]:
    """timm's net, narrowed where it is large, and ours of the same shape; different random weights."""
    timm = pytest.importorskip("timm")
    if name == "repvgg_a0":
        theirs, ours = timm.create_model(name), models.repvgg_a0()
    elif name == "repvgg_b1g4":
        theirs = timm.create_model(name, width_factor=0.25, num_classes=5)
        ours = RepVGG(B, (16, 32, 64, 128, 512), groups_of_layer=dict.fromkeys(range(2, 27, 2), 4), num_classes=5)
    else:
        block = timm.models.byobnet.ByoBlockCfg
        blocks = (block("rep", d=2, c=32, s=2), block("rep", d=3, c=48, s=2))
        theirs = timm.create_model(name, stem_chs=16, blocks=blocks, num_classes=5)
        ours = RepVGG((1, 2, 3), (16, 32, 48), (2, 2, 2), squeeze_excite=True, num_classes=5)
    return ready(theirs), ready(ours, seed=1)


timm_nets = pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se"])


@pytest.mark.zoo
@timm_nets
def test_timm_training_weights_load(name: str) -> None:
    theirs, ours = timm_net(name)
    assert error(theirs, ours) > 0.01
    load_weights(ours, theirs.state_dict())
    assert error(theirs, ours) < 1e-10


@pytest.mark.zoo
@timm_nets
def test_timm_deploy_weights_load_into_the_fused_net(name: str) -> None:
    theirs, ours = timm_net(name)
    deploy = pytest.importorskip("timm.utils.model").reparameterize_model(theirs)
    fused = reparam.fuse(ours)
    load_weights(fused, deploy.state_dict())
    assert error(deploy, fused) < 1e-10


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in SHAPES if not name.endswith("g2")])  # which timm does not have
def test_variant_has_the_shapes_of_timms(name: str) -> None:
    timm = pytest.importorskip("timm")
    assert shapes(on_meta(getattr(models, name))) == shapes(on_meta(timm.create_model, name))


@every_kind
def test_our_own_weights_load_in_either_form(kind: str) -> None:
    first, second = ready(RepVGG(**KINDS[kind])), ready(RepVGG(**KINDS[kind]), seed=1)
    fused, fused_second = reparam.fuse(first), reparam.fuse(second)
    load_weights(fused_second, fused.state_dict())
    assert error(fused, fused_second) == 0
    load_weights(second, first.state_dict())
    assert error(first, second) == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights},
        lambda weights: {"model": {"state_dict": weights}},
        lambda weights: {f"module.{key}": tensor for key, tensor in weights.items()},
        lambda weights: {"state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in weights.items()}},
        lambda weights: {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")},
        lambda weights: {key: nn.Parameter(tensor, tensor.is_floating_point()) for key, tensor in weights.items()},
    ],
    ids=["state_dict", "model", "nested", "module", "module_and_compile", "no_num_batches_tracked", "parameters"],
)
def test_wrapped_weights_load(wrap: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    theirs, ours = ready(PlainRepVGG(**SMALL)), ready(RepVGG(**SMALL), seed=1)
    load_weights(ours, wrap(theirs.state_dict()))
    assert error(theirs, ours) < 1e-12
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in ours.parameters())


def test_absent_num_batches_tracked_keeps_the_models() -> None:
    ours = RepVGG(**SMALL)
    weights = {key: tensor for key, tensor in ours.state_dict().items() if "num_batches" not in key}
    ours.stages[0][0].dense.norm.num_batches_tracked.fill_(7)
    load_weights(ours, weights)
    assert ours.stages[0][0].dense.norm.num_batches_tracked == 7


def test_weights_take_the_models_dtype() -> None:
    ours = RepVGG(**SMALL).half()
    load_weights(ours, PlainRepVGG(**SMALL).state_dict())
    assert all(parameter.dtype == torch.float16 for parameter in ours.parameters())


def refused(model: nn.Module, weights: dict[str, Any]) -> str:
    """The message of the refusal; the model must be as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ReparamError) as info:
        load_weights(model, weights)  # type: ignore[arg-type]
    after = model.state_dict()
    assert all(tensor.is_meta or torch.equal(tensor, before[key]) for key, tensor in after.items())
    return str(info.value)


def test_everything_that_does_not_fit_is_listed_and_nothing_changes() -> None:
    weights: dict[str, Any] = ready(PlainRepVGG(**SMALL), seed=1).state_dict()
    del weights["stage1.1.rbr_identity.bias"], weights["stage0.rbr_1x1.conv.weight"]
    weights["stage7.0.rbr_reparam.bias"] = torch.zeros(3)
    weights["optimizer"] = [0.1]
    weights["linear.weight"] = torch.zeros(9, 16)
    weights["stage2.0.rbr_dense.bn.weight"] = 1.0
    assert refused(ready(RepVGG(**SMALL)), weights) == """\
load_weights: the weights do not fit, nothing was changed
  missing (2):
    stages.0.0.pointwise.conv.weight
    stages.1.1.skip.bias
  unexpected (2):
    stage7.0.rbr_reparam.bias
    optimizer
  wrong shape (2):
    stage2.0.rbr_dense.bn.weight: expected (16,), found a float
    linear.weight: expected (5, 16), found (9, 16)"""


def test_a_weight_given_under_two_names_is_refused() -> None:
    net = ready(RepVGG(**SMALL))
    message = refused(net, net.state_dict() | {"linear.bias": torch.zeros(5)})
    assert message.endswith("given twice (1):\n    head.bias: head.bias and linear.bias")


def test_weights_of_the_other_form_are_refused_with_the_remedy() -> None:
    net = ready(RepVGG(**SMALL))
    fused = reparam.fuse(net)
    deploy = refused(net, PlainRepVGG(**SMALL, deploy=True).state_dict())
    assert deploy.endswith("load them into reparam.fuse(model.eval()).")
    assert "stage0.rbr_reparam.weight" in deploy
    assert "stages.0.0.dense.conv.weight" in deploy
    training = refused(fused, PlainRepVGG(**SMALL).state_dict())
    assert training.endswith("load them into the model first, then fuse it.")


def test_weights_on_the_meta_device_are_refused() -> None:
    net = ready(RepVGG(**SMALL))
    weights = net.state_dict() | {"head.bias": torch.empty(5, device="meta")}
    assert "head.bias: expected (5,), found a meta tensor" in refused(net, weights)


def test_a_model_on_the_meta_device_is_refused_with_the_remedy() -> None:
    assert "first model.to_empty(device=...)" in refused(on_meta(RepVGG, **SMALL), RepVGG(**SMALL).state_dict())


def test_another_model_is_refused() -> None:
    net = PlainRepVGG(**SMALL)
    assert refused(net, net.state_dict()) == "load_weights: expected a reparam.models.RepVGG, found PlainRepVGG"
