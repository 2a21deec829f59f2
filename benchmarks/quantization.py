"""Post-training int8 quantization of the demo's net, before and after `fuse`: fills a table of docs/recipes.md.

    make demo                                    trains the net; ARGS='--seed 1 --output out/seed1' another one
    pip install '.[examples,quantize]'
    python benchmarks/quantization.py            quantizes out/repvgg, or the folders that are named
    python benchmarks/quantization.py --table    only writes the table again, from the JSON

Weights and activations are rounded to int8 and the arithmetic between is that of float32, as `convert_pt2e` gives it:
what is measured is accuracy, not speed. The activations' ranges are those of 500 images of the training set.
"""

import argparse
import json
import os
import statistics
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402 (the path comes first)
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402

import reparam  # noqa: E402
from benchmarks.marks import put  # noqa: E402
from common import build, machine  # noqa: E402
from demo.images import digits  # noqa: E402
from demo.training import accuracy, network_input, predict  # noqa: E402

PAGE = ROOT / "docs" / "recipes.md"
RESULTS = ROOT / "benchmarks" / "results" / "quantization.json"
BLOCK = "table: benchmarks/quantization.py"
BATCH, CALIBRATION = 250, 2  # images, batches
CPU = torch.device("cpu")
FORMS = {
    "branches, float32": "as trained",
    "fused, float32": "`fuse`",
    "branches, int8": "int8, one scale per channel",
    "fused, int8": "`fuse`, then int8, one scale per channel",
    "branches, int8 per tensor": "int8, one scale per weight tensor",
    "fused, int8 per tensor": "`fuse`, then int8, one scale per weight tensor",
}


def quantized(net: nn.Module, batches: Sequence[Tensor], *, per_channel: bool) -> nn.Module:
    """The net with int8 weights and activations, whose ranges the batches tell."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    if not per_channel:
        config = replace(config, weight=one_scale())
    quantizer = x86.X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(torch.export.export(net, (batches[0],)).module(), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def one_scale() -> Any:
    """One scale for a whole weight tensor."""
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12),
    )


def measured(folder: Path) -> dict[str, Any]:
    """Test a net that the demo has trained, in all forms, on the images that it was not trained on."""
    about = json.loads((folder / "repvgg.json").read_text(encoding="utf-8"))
    seed, epochs = about["settings"]["seed"], about["settings"]["epochs"]
    data = digits(28, None, 0.2, seed)
    net = build("small", 10)
    net.load_state_dict(load_file(folder / "training.safetensors"))
    net.eval()
    plan = reparam.plan(net)
    fused = plan.apply()
    testing = DataLoader(data.test, BATCH)
    calibration = [network_input(images, CPU) for images, _ in DataLoader(data.train, BATCH)][:CALIBRATION]
    forms = {"branches, float32": net, "fused, float32": fused}
    for name, form in tqdm([("branches", net), ("fused", fused)], desc=f"seed {seed}"):
        forms[f"{name}, int8"] = quantized(form, calibration, per_channel=True)
        forms[f"{name}, int8 per tensor"] = quantized(form, calibration, per_channel=False)
    reference, labels = predict(net, testing, CPU)
    found = {}
    for name in FORMS:
        logits, _ = predict(forms[name], testing, CPU)
        found[name] = {
            "accuracy": accuracy(logits, labels),
            "changed": int((logits.argmax(1) != reference.argmax(1)).sum()),
            "error": ((logits - reference).square().mean() / reference.square().mean()).sqrt().item(),
        }
    spreads = [(entry.spread_before, entry.spread_after) for entry in plan.ranges()]
    return {"seed": seed, "epochs": epochs, "images": len(labels), "forms": found, "spreads": spreads}


def table(results: Path = RESULTS) -> str:
    """The text between the marks."""
    run = json.loads(results.read_text(encoding="utf-8"))
    nets = run["nets"]
    heads = [f"test accuracy, seed {net['seed']}" for net in nets] + ["mean"] * (len(nets) > 1)
    heads += ["predictions changed", "error of the logits"]
    lines = [f"| net | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, title in FORMS.items():
        rows = [net["forms"][name] for net in nets]
        cells = [f"{row['accuracy']:.1%}" for row in rows]
        if len(nets) > 1:
            cells.append(f"{statistics.fmean(row['accuracy'] for row in rows):.2%}")
        cells.append(", ".join(str(row["changed"]) for row in rows))
        error = statistics.fmean(row["error"] for row in rows)
        cells.append("–" if not error else f"{error:.1%}" if error > 1e-4 else f"{error:.0e}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    before, after = (statistics.median(pair[at] for net in nets for pair in net["spreads"]) for at in (0, 1))
    about = run["machine"]
    explained = (
        f"Net `small` of the demo, {nets[0]['epochs']} epochs, {nets[0]['images']:,} test images. The error is the root"
        " mean square of what the logits are off by, relative to that of the logits. In the median of all regions, the"
        f" widest channel of a kernel is {before:.1f} medians wide before `fuse` and {after:.1f} after, the widest of"
        f" all {max(pair[0] for net in nets for pair in net['spreads']):.1f} and"
        f" {max(pair[1] for net in nets for pair in net['spreads']):.1f}."
    )
    machine_line = f"Machine: {about['name']}, 1 thread, torch {about['torch']}, torchao {about['torchao']}."
    return "\n".join([*lines, "", *textwrap.wrap(explained, 120), machine_line]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    demo = Path("out/repvgg")
    add("folders", type=Path, nargs="*", default=[demo], help="that examples/repvgg.py wrote; default out/repvgg")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="default benchmarks/results/quantization.json")
    add("--table", action="store_true", help="measure nothing, write the table from the JSON")
    args = parser.parse_args()
    if not args.table:
        import torchao

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # of torch about itself, while it exports
        nets = [measured(folder) for folder in args.folders]
        about = {"name": machine(CPU), "torch": torch.__version__, "torchao": torchao.__version__}
        run = {"machine": about, "nets": nets}
        args.json.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    text = table(args.json)
    print(text, end="")
    if args.json == RESULTS:
        put(PAGE, BLOCK, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
