"""What the benchmarks run and count: runtimes, the paper's nets, convolutions alone; nothing is said of speed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from market import UniRepLk
from nets import images, owned, ready, same
from torch import nn

import reparam

for package in ("matplotlib", "pebble", "scipy", "timm", "tqdm", "typer"):
    pytest.importorskip(package, reason="needs the extras 'test', 'examples' and 'zoo'")

from benchmarks import authors, limit, outputs, paper  # noqa: E402 (what they need comes first)
from benchmarks.branches import Sum, maps_held, with_branches  # noqa: E402
from benchmarks.cells import Results, Settings  # noqa: E402
from benchmarks.paired import FEWEST_ROUNDS  # noqa: E402
from benchmarks.published import TABLE_4, TABLE_6  # noqa: E402
from benchmarks.runtimes import inductor_counts, onnx_counts, openvino_counts  # noqa: E402
from benchmarks.subjects import Subject  # noqa: E402
from reparam import models  # noqa: E402

# --- runtimes ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two parallel convolutions with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.first(x) + self.second(x))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subject = Subject(Two, (3, 8, 8), "nobody", lambda net: net)
    monkeypatch.setitem(outputs.SUBJECTS, "small-1.0", subject)  # type: ignore[index]
    monkeypatch.setenv("REPARAM_BENCHMARKS", str(tmp_path))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("runtime", ["eager", "eager, channels last", "ONNX Runtime", "OpenVINO"])
def test_a_cell_holds_all_forms(runtime: str) -> None:
    package = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}.get(runtime)
    if package:
        pytest.importorskip("onnxscript")
        pytest.importorskip(package)
    found = outputs.measure(Settings(seconds=0.01), "small-1.0", runtime, 2)
    assert found["counts"]["unfused"]["convs"] == 2
    assert found["counts"]["fused"]["convs"] == 1
    assert found["counts"]["fused"]["norms"] == found["counts"]["fused"]["adds"] == 0
    assert found["counts"]["author"] == found["counts"]["unfused"]
    assert all(error < 1e-5 for error in found["errors"].values())
    assert {form: len(times) >= FEWEST_ROUNDS for form, times in found["seconds"].items()} == dict.fromkeys(
        ("unfused", "fused", "author"), True
    )


@pytest.mark.usefixtures("small")
def test_cells_hold_as_long_as_fuse_returns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"small-1.0 | eager | 1": outputs.measure(Settings(seconds=0.01), "small-1.0", "eager", 1)}
    assert outputs.still_true(cells) == cells
    other = Subject(lambda: nn.Sequential(Two(), nn.Conv2d(4, 4, 1)), (3, 8, 8))
    monkeypatch.setitem(outputs.SUBJECTS, "small-1.0", other)  # type: ignore[index]
    assert outputs.still_true(cells) == {}


@pytest.mark.usefixtures("small")
def test_cells_without_the_form_of_an_author_are_measured_anew() -> None:
    cell = outputs.measure(Settings(seconds=0.01), "small-1.0", "eager", 1)
    del cell["seconds"]["author"]
    assert outputs.still_true({"small-1.0 | eager | 1": cell}) == {}


def test_authors_steps_by_hand_keep_the_numbers_and_leave_what_they_leave() -> None:
    blocks = ready(nn.Sequential(UniRepLk(8), UniRepLk(8)))
    deployed = authors.unireplknet(copy.deepcopy(blocks))
    same(blocks, deployed, images((15, 18), 8), tolerance=1e-12)
    found, ours = owned(deployed), owned(reparam.fuse(blocks))
    assert (found["convs"], found["linears"], found["norms"]) == (2 * 3, 2 * 2, 0)
    assert found == ours


def test_the_encoder_of_rt_detr_is_deployed_by_hand() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'packages'")
    block = transformers.models.rt_detr.modeling_rt_detr.RTDetrRepVggBlock(transformers.RTDetrConfig())
    net = ready(nn.Sequential(block))
    deployed = authors.rt_detr(copy.deepcopy(net))
    same(net, deployed, images((9, 12), block.conv1.conv.in_channels), tolerance=1e-12)
    assert (owned(deployed)["convs"], owned(deployed)["norms"]) == (1, 0)


def test_outputs_that_differ_are_seen() -> None:
    x = torch.arange(4.0).reshape(1, 4)
    assert outputs.error([x], [x + 0.3]) == pytest.approx(0.1)
    assert outputs.error([x], [x.flip(1)]) == 1
    assert outputs.error([x], [x.flip(1)], ranked=True) == 0


INDUCTOR = """
from elsewhere import cpp_fused_add_9
def call(args):
    arg0_1, = args
    cpp_fused_convolution_0(arg0_1, buf0)
    buf1 = extern_kernels.convolution(arg0_1, buf0)
    buf2 = torch.ops.mkldnn._convolution_pointwise.default(buf1, w, None, [1], [1], [1], 1, 'relu', [], '')
    torch.ops.mkldnn._convolution_pointwise_.binary(buf2, buf1, w)
    cpp_fused__native_batch_norm_legit_no_training_add_relu_3(buf2)
    buf4 = empty_strided_cpu((1, 2), (2, 1), torch.float32)
    extern_kernels.addmm(arg1, buf2, out=buf4)
"""


def test_operations_of_generated_code() -> None:
    assert inductor_counts([INDUCTOR]) == {"convs": 3, "norms": 1, "adds": 1, "kernels": 6}


def test_operations_of_an_optimized_graph() -> None:
    kinds = ["Conv", "FusedConv", "Relu", "Add", "BatchNormalization", "Constant", "Reshape"]
    assert onnx_counts(iter(kinds)) == {"convs": 2, "norms": 1, "adds": 1, "kernels": 5}


def test_operations_of_a_compiled_model() -> None:
    nodes = [
        {"layerType": "Const", "originalLayersNames": "add"},
        {"layerType": "Convolution", "originalLayersNames": "conv,node_add,relu"},  # the sum is inside
        {"layerType": "Subgraph", "originalLayersNames": "node_native_batch_norm,node_add_1,relu"},
        {"layerType": "Reorder", "originalLayersNames": ""},
    ]
    assert openvino_counts(nodes) == {"convs": 1, "norms": 1, "adds": 1, "kernels": 3}


# --- the paper and the limit ------------------------------------------------------------------------------------------


def test_published_figures_bear_out_what_the_paper_says_of_them() -> None:
    """Its text: A0 is 33% faster than ResNet-18, A2 83% than ResNet-50, B1g4 101% than ResNet-101."""
    faster = {("RepVGG-A0", "ResNet-18"): 33, ("RepVGG-A2", "ResNet-50"): 83, ("RepVGG-B1g4", "ResNet-101"): 101}
    for (ours, other), percent in faster.items():
        assert int(100 * (TABLE_4[ours].speed / TABLE_4[other].speed - 1)) == percent


def test_counts_are_the_papers() -> None:
    found = paper.counts(Settings(), ("RepVGG-A0", "RepVGG-B1g4", "ResNet-18", "VGG-16"))["counts"]
    for name in found:
        row = TABLE_4[name]
        assert found[name] == (row.parameters, row.flops, row.winograd_muls)


@pytest.mark.parametrize("name", ["RegNetX-3.2GF", "EfficientNet-B0", "ResNeXt-50"])
def test_other_nets_are_counted(name: str) -> None:
    assert paper.counts(Settings(), (name,))["counts"][name][0] == TABLE_4[name].parameters


@pytest.mark.parametrize("kept", TABLE_6)
def test_branches_that_are_kept(kept: tuple[bool, bool]) -> None:
    identity, pointwise = kept
    net = with_branches(models.RepVGG((1, 2), (8, 8), (1, 1), num_classes=2), identity, pointwise)
    blocks = [module for module in net.modules() if isinstance(module, Sum)]
    assert [len(block.branches) for block in blocks] == [
        1 + pointwise,  # three channels become eight: there is no identity
        1 + identity + pointwise,
        1 + identity + pointwise,
    ]
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_feature_maps_held() -> None:
    """Figure 3 of the paper: a residual block holds two, a plain one one."""
    assert paper.memory(Settings())["maps"] == {
        "plain: convolutions one after the other": 1,
        "residual, two convolutions": 2,
        "RepVGG as trained": 3,
        "RepVGG fused": 1,
    }
    assert maps_held(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU()), torch.zeros(1, 4, 4, 4)) == 2


def test_layers_of_a_net_run_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)).eval()
    x = torch.randn(2, 3, 13, 13)
    found = limit.layers(net, x)
    assert [tuple(layer.x.shape) for layer in found] == [(2, 3, 13, 13), (2, 4, 6, 6)]
    assert [layer.macs for layer in found] == [2 * 36 * 4 * 27, 2 * 16 * 4 * 18]
    assert found[0].numbers == 2 * 3 * 169 + 108 + 2 * 4 * 36
    for layer in found:
        with torch.no_grad():
            expected = layer.conv(layer.x)
            assert torch.allclose(limit.packed(layer, "none")(layer.x), expected, atol=1e-6)
            assert torch.allclose(limit.packed(layer, "relu")(layer.x), expected.relu(), atol=1e-6)
    with torch.inference_mode():
        for form in limit.forms(net, net, x).values():
            form()


def test_text_of_the_limit(tmp_path: Path) -> None:
    found = Results(tmp_path / "limit.json", {"machine": "a machine", "device": "cpu", "threads": 2})
    found.put("machine", {"macs_per_second": 1e9, "bytes_per_second": 1e9})
    seconds = {form: [0.02 if form == "net" else 0.01] * 7 for form in limit.FORMS}
    found.put("RepVGG-A0 | 1", {"macs": 5_000_000, "work": [[5_000_000, 1000]], "seconds": seconds})
    shown = limit.text(found)
    assert f"| RepVGG-A0, 1 |{' 0.50 (0.50–0.50) |' * 6}" in shown
    assert "| RepVGG-A0, 1 | 0.01 | 5.00 | 5.00 | 0.50 |" in shown


def test_text_of_the_paper(tmp_path: Path) -> None:
    found = Results(tmp_path / "paper.json", {"machine": "a machine", "device": "cpu", "threads": 2})
    names = ("RepVGG-A0", "ResNet-18", "ResNet-50")
    found.put("speed", {"batch": 4, "seconds": {name: [1.0 + i] * 7 for i, name in enumerate(names)}})
    forms = {paper.branch_key(kept, form): [2.0] * 7 for kept in TABLE_6 for form in ("as trained", "norms folded")}
    found.put("branches", {"batch": 4, "seconds": {**forms, "fused": [1.0] * 7}})
    shown = paper.text(found)
    assert "| RepVGG-A0 | 3256 | 4.53 | 4.0 | 3.00 (3.00–3.00) |" in shown
    assert "Kendall's τ = 1.00" in shown
    assert "| identity and 1×1 | 1061 img/s, 0.59 | 0.50 (0.50–0.50) | 0.50 (0.50–0.50) |" in shown
