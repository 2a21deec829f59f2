"""Runtimes: each makes a call of a net on one input, and says which operations it runs.

`convs` are convolutions; `norms` and `adds` batch norms and sums that are a pass of their own over a feature map, not
part of a convolution's; `kernels` everything that is run and is not a mere view or a constant.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nets import counted
from torch import Tensor, nn

from benchmarks.subjects import first_tensors
from reparam.exporting.quiet import quietly

Counts = dict[str, int]


@dataclass(frozen=True)
class Prepared:
    """A net that is ready to run.

    Args:
        run: runs it once.
        outputs: of one run.
        counts: what it runs.
    """

    run: Callable[[], Any]
    outputs: list[Tensor]
    counts: Counts


@dataclass(frozen=True)
class Place:
    """Where a runtime may write.

    Args:
        file: of this net, form and batch, without a suffix; the name may hold dots.
        threads: that a runtime may use.
    """

    file: Path
    threads: int


def eager(net: nn.Module, x: Tensor, place: Place) -> Prepared:
    """PyTorch, operation by operation, contiguous."""
    output, found = counted(net, x)
    counts = {"convs": found["conv"], "norms": found["norm"], "adds": found["add"], "kernels": found["calls"]}
    return Prepared(lambda: net(x), first_tensors(output), counts)


def channels_last(net: nn.Module, x: Tensor, place: Place) -> Prepared:
    """The same, weights and input with their channels last."""
    return eager(net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last), place)


def compiled(net: nn.Module, x: Tensor, place: Place, freezing: bool = False) -> Prepared:
    """`torch.compile`."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    config.freezing = freezing
    config.fx_graph_cache = False  # a cached graph would not show its code
    run = torch.compile(net)
    with torch.inference_mode(), quietly():
        output, code = run_and_get_code(run, x)
    return Prepared(lambda: run(x), first_tensors(output), inductor_counts(code))


def frozen(net: nn.Module, x: Tensor, place: Place) -> Prepared:
    """`torch.compile` with weights taken for constants: norms are folded, weights laid out once."""
    return compiled(net, x, place, freezing=True)


KERNEL = re.compile(r"^\s*(?:\w+ = )?((?:extern_kernels|torch\.ops\.\w+|aten|cpp_fused|triton)[\w.]*)\(", re.MULTILINE)


def inductor_counts(codes: list[str]) -> Counts:
    """What the generated code calls.

    >>> code = "def call(args):\\n    a = extern_kernels.convolution(x)\\n    cpp_fused_add_relu_1(a)\\n"
    >>> inductor_counts([code])
    {'convs': 1, 'norms': 0, 'adds': 1, 'kernels': 2}
    """
    names = [name for code in codes for name in KERNEL.findall(code[code.rfind("def call(") :])]
    loops = [name for name in names if name.startswith(("cpp_fused", "triton"))]
    return {
        "convs": sum("convolution" in name for name in names if name not in loops),
        "norms": sum("batch_norm" in name for name in loops),
        "adds": sum("_add_" in f"{name}_" for name in loops),
        "kernels": len(names),
    }


def onnx_file(net: nn.Module, x: Tensor, place: Place) -> Path:
    """The net as torch exports it, once for all runtimes that read it."""
    path = place.file.with_name(f"{place.file.name}.onnx")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        with quietly():
            torch.onnx.export(net, (x,), partial, dynamo=True, verbose=False, external_data=False)
        partial.replace(path)
    return path


def onnxruntime(net: nn.Module, x: Tensor, place: Place) -> Prepared:
    """ONNX Runtime on the CPU, with all of its optimizations."""
    import onnx
    import onnxruntime as ort

    path = onnx_file(net, x, place)
    options = ort.SessionOptions()
    options.intra_op_num_threads = place.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it would slow what runs next
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    outputs = [torch.from_numpy(array) for array in session.run(None, feed)]
    return Prepared(lambda: session.run(None, feed), outputs, onnx_counts(node.op_type for node in nodes))


def onnx_counts(kinds: Iterator[str]) -> Counts:
    """What the optimized graph runs; a sum inside of a convolution counts as convolution."""
    names = [name for name in kinds if name not in {"Constant", "Identity", "Reshape", "Squeeze", "Unsqueeze"}]
    return {
        "convs": sum(name in {"Conv", "FusedConv"} for name in names),
        "norms": names.count("BatchNormalization"),
        "adds": names.count("Add") + names.count("Sum"),
        "kernels": len(names),
    }


def openvino(net: nn.Module, x: Tensor, place: Place) -> Prepared:
    """OpenVINO on the CPU, in float32 as all others."""
    import openvino as ov

    options = {
        "INFERENCE_NUM_THREADS": place.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    net_compiled = ov.Core().compile_model(str(onnx_file(net, x, place)), "CPU", options)
    request, feed = net_compiled.create_infer_request(), {0: x.numpy()}
    nodes = [
        {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "originalLayersNames")}
        for node in net_compiled.get_runtime_model().get_ordered_ops()
    ]
    outputs = [torch.from_numpy(array.copy()) for array in request.infer(feed).values()]
    return Prepared(lambda: request.infer(feed, share_inputs=True), outputs, openvino_counts(nodes))


def openvino_counts(nodes: list[Mapping[str, str]]) -> Counts:
    """What the compiled model runs: every node lists the operations that went into it."""
    run = [node for node in nodes if node["layerType"] not in {"Const", "Input", "Output", "Reshape"}]
    loops = [node["originalLayersNames"].lower() for node in run if node["layerType"] in {"Subgraph", "Eltwise"}]
    return {
        "convs": sum("Convolution" in node["layerType"] for node in run),
        "norms": sum("batch_norm" in names or "batchnorm" in names for names in loops),
        "adds": sum("add" in names for names in loops),
        "kernels": len(run),
    }


RUNTIMES: Mapping[str, Callable[[nn.Module, Tensor, Place], Prepared]] = {
    "eager": eager,
    "eager, channels last": channels_last,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "torch.compile": compiled,
    "Inductor, freezing": frozen,
}
COMPILE_FOR_LONG = ("torch.compile", "Inductor, freezing")
