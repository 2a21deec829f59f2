"""Fuse every architecture family of timm, and torchvision's nets, and hold each to what `reparam.fuse` promises.

For every net: wide random norm statistics and layer scales, outputs before and after in float64 at two input sizes
where the net allows, modules and calls before and after, what timm's own converter leaves, how many modules could be
read, and why each norm that is left was left. Writes `docs/zoo.md` and `benchmarks/results/zoo.json`.

    python benchmarks/zoo.py                            # all, about 20 minutes on 2 cores
    python benchmarks/zoo.py --only 'repvgg*' -v        # some, printed, nothing written
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import fnmatch
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each of the processes

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from nets import counted, difference  # noqa: E402
from timm.models import list_models, list_modules  # noqa: E402
from timm.utils.model import reparameterize_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402
from torch.nn.modules.conv import _ConvNd  # noqa: E402
from tqdm import tqdm  # noqa: E402

import reparam  # noqa: E402
from common import machine  # noqa: E402

TABLE, RESULTS = ROOT / "docs" / "zoo.md", ROOT / "benchmarks" / "results" / "zoo.json"
FAMILIES = ROOT / "benchmarks" / "results" / "zoo_families.json"
TOLERANCE = 1e-9
LARGEST = 70_000_000  # parameters; larger nets take too long in float64
# Nets whose figures under timm's own converter are public; the smallest member of a family is often another one.
COMPARED = (
    "repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "ghostnetv3_100", "levit_128s",
    "nextvit_small", "mobilenetv4_conv_small", "shvit_s1",
)  # fmt: skip

# Sizes to try, in this order: the smallest one that the net takes is used.
EVEN = ((96, 128), (128, 128), (160, 160), (192, 192), (224, 224), (256, 256), (384, 384), (512, 512))
OTHER = ((95, 97), (127, 129), (128, 96), (64, 96), (160, 128), (160, 160), (192, 192), (224, 224), (256, 256))
CLIPS = ((8, 64, 64), (16, 112, 112), (16, 224, 224))
OTHER_CLIPS = ((7, 65, 63), (9, 97, 95), (10, 64, 96), (14, 80, 96), (18, 128, 96))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One net of the zoo."""

    library: str
    family: str
    name: str
    parameters: int
    convolutions: int


# --- which nets -----------------------------------------------------------------------------------


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules built inside keep their parameters on the meta device; builders may compute with other tensors."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(self, name, None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad))

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = plain


def weigh(build: Callable[[], nn.Module]) -> tuple[int, int]:
    """Parameters and convolutions of a net, built without weights."""
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:  # the builder reads values of tensors
        with weightless():
            model = build()
    return sum(p.numel() for p in model.parameters()), sum(isinstance(m, _ConvNd) for m in model.modules())


def query_timm(module: str) -> list[list[Any]]:
    """Every architecture of one timm module: `[module, name, parameters, convolutions]`."""
    found: list[list[Any]] = []
    for name in list_models(module=module):
        try:
            found.append([module, name, *weigh(lambda name=name: timm.create_model(name))])
        except Exception as error:
            print(f"{name} cannot be built: {error}", file=sys.stderr)
    return found


def timm_entries(jobs: int) -> list[Entry]:
    """The member with the fewest parameters of each family: same module, same letters at the front of the name."""
    if FAMILIES.exists() and (cached := json.loads(FAMILIES.read_text()))["timm"] == timm.__version__:
        members = cached["members"]
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            parts = pool.imap(query_timm, list_modules())
            members = [
                member for part in tqdm(parts, total=len(list_modules()), desc="timm's families") for member in part
            ]
        FAMILIES.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(map(json.dumps, members))
        FAMILIES.write_text(f'{{"timm": "{timm.__version__}", "members": [\n{lines}\n]}}\n')
    smallest: dict[tuple[str, str], Entry] = {}
    compared = []
    for module, name, parameters, convolutions in members:
        prefix = re.match("[a-z]+", name)
        family = f"{module}/{prefix[0] if prefix else name}"
        entry = Entry("timm", family, name, parameters, convolutions)
        if name in COMPARED:
            compared.append(entry)
        if convolutions:
            best = smallest.setdefault((module, family), entry)
            if (parameters, name) < (best.parameters, best.name):
                smallest[module, family] = entry
    return sorted({*smallest.values(), *compared}, key=lambda entry: (entry.family, entry.name))


def torchvision_entries() -> list[Entry]:
    """All classification, segmentation, detection and video nets of torchvision that hold a convolution."""
    models = torchvision.models
    kinds = {
        "classification": models,
        "segmentation": models.segmentation,
        "detection": models.detection,
        "video": models.video,
    }
    entries = []
    for kind, module in kinds.items():
        for name in models.list_models(module=module):
            parameters, convolutions = weigh(lambda name=name: build_torchvision(name))
            entries.append(Entry("torchvision", kind, name, parameters, convolutions))
    return entries


def build_torchvision(name: str) -> nn.Module:
    """A net of torchvision with random weights; detectors that resize their input do so to a small size."""
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    if re.match("fasterrcnn|maskrcnn|keypointrcnn|retinanet|fcos", name):
        options |= {"min_size": 96, "max_size": 128}
    if "rcnn" in name:
        options |= {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": True}
    return torchvision.models.get_model(name, **options)


def build(entry: Entry) -> nn.Module:
    """The net with random weights, in float64 and eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(entry.name) if entry.library == "timm" else build_torchvision(entry.name)
    return model.to(torch.float64).eval()


# --- inputs and numbers ---------------------------------------------------------------------------


def make_input(entry: Entry, size: tuple[int, ...], channels: int, seed: int = 0) -> Any:
    """A batch of two images or clips of one size; a list of images for detectors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, channels, *size, generator=generator, dtype=torch.float64) * 2 - 0.5
    return list(x) if entry.family == "detection" else x


def find_inputs(entry: Entry, model: nn.Module) -> tuple[list[tuple[int, ...]], list[Any], str]:
    """Inputs of up to two sizes that the net takes, and the last error that it gave."""
    channels, *own = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    clips = entry.family == "video"
    sizes, inputs, error = [], [], ""
    for choice in (CLIPS, OTHER_CLIPS) if clips else ((*EVEN, tuple(own)), OTHER):
        for size in choice:
            if size in sizes:
                continue
            x = make_input(entry, size, channels)
            try:
                with torch.no_grad():
                    model(x)
            except Exception as problem:
                error = f"{size}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"[
                    :200
                ]
                continue
            sizes.append(size)
            inputs.append(x)
            break
    return sizes, inputs, error


@torch.no_grad()
def widen(model: nn.Module, x: Any) -> None:
    """Wide random norms and scales that keep the signal alive.

    Constant vectors (norm weights, layer scales, zero biases) are drawn anew, gammas of both signs. Each norm's
    statistics are drawn around those of its input in a run: means by N(0, 1) standard deviations, variances by a factor
    of U(0.5, 2).
    """
    generator = torch.Generator().manual_seed(1)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(like)

    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        if flat.numel() == max(parameter.shape, default=1) and (flat == flat[0]).all():
            sign = torch.where(uniform(flat, 0, 1) < 0.3, -1.0, 1.0).to(flat)
            drawn = uniform(flat, -0.5, 0.5) if flat[0] == 0 else sign * uniform(flat, 0.5, 1.5)
            parameter.copy_(drawn.reshape(parameter.shape))

    def measure(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        mean, variance = norm.running_mean, norm.running_var
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            return
        value = arguments[0].transpose(0, 1).reshape(mean.numel(), -1)
        # Divided by its own deviation, a channel that is nearly constant, or nearly zero beside the others, would be
        # nothing but rounding: what is left of sums of numbers that are much larger.
        floor = torch.maximum(0.3 * value.square().mean(1).sqrt(), 0.1 * value.square().mean().sqrt()).clamp(min=1e-3)
        deviation = torch.maximum(value.std(1).nan_to_num(0.0), floor)
        mean.copy_(value.mean(1) + deviation * torch.randn(mean.shape, generator=generator, dtype=torch.float64))
        variance.copy_(deviation.square() * uniform(variance, 0.5, 2.0))

    handles = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, _BatchNorm)]
    model(x)
    for handle in handles:
        handle.remove()


# --- one net --------------------------------------------------------------------------------------


def watch(model: nn.Module) -> list[Any]:
    """Outputs of the parts of a detector before its thresholds drop boxes, in a list that each run fills."""
    seen: list[Any] = []
    for name in ("backbone", "rpn.head", "head", "roi_heads.box_head"):
        try:
            part = model.get_submodule(name)
        except AttributeError:
            continue
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def readers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own a convolution or a norm themselves, by path."""
    kinds = (_ConvNd, _BatchNorm)
    return {
        path: module
        for path, module in model.named_modules()
        if any(isinstance(child, kinds) for child in module.children())
    }


def reasons(fused: nn.Module, plan: Any) -> list[str]:
    """Why each norm that is left was left, most frequent reasons first: `count × reason (first path)`."""
    left = [name for name, module in fused.named_modules() if isinstance(module, _BatchNorm)]
    refusals: dict[str, list[Any]] = collections.defaultdict(list)
    for refusal in plan.left:
        for path in {refusal.path, *refusal.operands}:
            refusals[path].append(refusal)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in left:
        parents = [path.rsplit(".", depth)[0] for depth in range(1, path.count(".") + 1)]
        refusal = next((r for place in (path, *parents) for r in refusals.get(place, ())), None)
        reason = without_folders(f"{refusal.rule}: {refusal.condition}") if refusal else "no reason given"
        found[reason].append(path)
    return [
        f"{len(paths)} × {reason} ({paths[0]})"
        for reason, paths in sorted(found.items(), key=lambda item: -len(item[1]))
    ]


def theirs(model: nn.Module, x: Any, expected: Any) -> dict[str, Any]:
    """What timm's own converter leaves, and its relative error."""
    try:
        converted = reparameterize_model(model)
        output, counts = counted(converted, copy.deepcopy(x))
        try:
            error: float | str = difference(expected, output)
        except AssertionError as problem:
            error = str(problem).splitlines()[0][:120]
        return {**counts, "error": error}
    except Exception as problem:
        return {"crash": f"{type(problem).__name__}: {problem}"[:200]}


def examine(entry: Entry, dry: bool) -> dict[str, Any]:
    """Everything that the table says of one net."""
    row: dict[str, Any] = {**dataclasses.asdict(entry), "status": "ok"}
    start = time.process_time()
    model = build(entry)
    sizes, inputs, error = find_inputs(entry, model)
    row |= {"sizes": sizes, "build_seconds": time.process_time() - start}
    if not inputs:
        return {**row, "status": f"no input: {error}"}
    widen(model, copy.deepcopy(inputs[0]))
    start = time.process_time()
    outputs = []
    seen = watch(model) if entry.family == "detection" and not dry else []
    if not seen:
        for x in inputs:
            output, counts = counted(model, copy.deepcopy(x))
            outputs.append(output)
            row.setdefault("before", counts)
    row["run_seconds"] = (time.process_time() - start) / len(inputs)
    if dry:
        return row
    return row | compare(entry, model, inputs, outputs, row["before"])


def without_folders(text: str) -> str:
    """Files by their names within a package, whatever the machine."""
    for folder in (sysconfig.get_path("purelib"), str(ROOT)):
        text = text.replace(f"{folder}/", "")
    return text


def compare(
    entry: Entry, model: nn.Module, inputs: list[Any], outputs: list[Any], before: dict[str, int]
) -> dict[str, Any]:
    """Fuse, and compare outputs, classes, attributes, counts."""
    start = time.process_time()
    plan = reparam.plan(model)
    planned = time.process_time()
    fused = plan.apply()
    row: dict[str, Any] = {"plan_seconds": planned - start, "apply_seconds": time.process_time() - planned}
    errors: list[float | str] = []
    for x, expected in zip(inputs, outputs, strict=True):
        output, counts = counted(fused, copy.deepcopy(x))
        row.setdefault("after", counts)
        try:
            errors.append(difference(expected, output))
        except AssertionError as problem:
            errors.append(str(problem).splitlines()[0][:200])
    for name in ("forward_features", "forward_intermediates"):
        if hasattr(model, name) and entry.library == "timm":
            with torch.no_grad():
                errors.append(difference(getattr(model, name)(inputs[0]), getattr(fused, name)(inputs[0])))
    lost = sorted(set(dir(model)) - set(dir(fused)) - set(model._modules))
    owners = readers(model)
    unread = {refusal.path: without_folders(str(refusal)) for refusal in plan.left if refusal.rule == "unread"}
    row |= {
        "errors": errors,
        "class_kept": isinstance(fused, type(model)),
        "lost": lost,
        "owners": len(owners),
        "unread": {path: reason for path, reason in unread.items() if path in owners},
        "regions": len(plan.regions),
        "norms_left": reasons(fused, plan),
        "timm": theirs(model, inputs[0], outputs[0]) if entry.library == "timm" else None,
    }
    return row


# What must not be more than timm's own converter leaves.
NO_MORE = {"convs": "convolutions", "product": "convolutions and products", "norms": "norms"}


def problems(row: dict[str, Any]) -> list[str]:
    """What breaks a promise in one row."""
    if row["status"] != "ok":
        return [] if row["status"].startswith("skipped") else [row["status"]]
    if "after" not in row:
        return []
    found = []
    before, after, converter = row["before"], row["after"], row["timm"] or {}
    found += [f"outputs differ: {error}" for error in row["errors"] if isinstance(error, str) or not error < TOLERANCE]
    found += [] if row["class_kept"] else ["class lost"]
    found += [f"lost {', '.join(row['lost'][:5])}"] if row["lost"] else []
    totals = {kind: (before[kind], after[kind]) for kind in ("convs", "product", "norm", "calls")}
    totals["product, norm and add"] = tuple(
        sum(counts[kind] for kind in ("product", "norm", "add")) for counts in (before, after)
    )
    found += [f"{new} {kind} instead of {old}" for kind, (old, new) in totals.items() if new > old]
    if "norms" in converter:
        for kind, label in NO_MORE.items():
            ours, others = after[kind], converter[kind]
            found += [f"{ours} {label}, timm leaves {others}"] if ours > others else []
    found += (
        ["a norm is left without a reason"] if any("no reason given" in reason for reason in row["norms_left"]) else []
    )
    return found


# --- many nets ------------------------------------------------------------------------------------


def serve(channel: multiprocessing.connection.Connection, entry: Entry, dry: bool) -> None:
    """Examine one net in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        channel.send(examine(entry, dry))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        status = f"crash: {type(error).__name__}: {str(error)[:300]} ({place})"
        channel.send({**dataclasses.asdict(entry), "status": status, "traceback": traceback.format_exc()})


def run_all(entries: Iterable[Entry], jobs: int, seconds: float, dry: bool) -> Iterator[dict[str, Any]]:
    """Rows as they get done: one process for each net, ended when it takes too long; a crash costs one row."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "reparam"])
    waiting = collections.deque(entries)
    running: dict[multiprocessing.connection.Connection, tuple[Any, Entry, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            entry = waiting.popleft()
            ours, other = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(other, entry, dry), daemon=True)
            process.start()
            other.close()
            running[ours] = (process, entry, time.monotonic())
        for channel in multiprocessing.connection.wait(list(running), timeout=1.0):
            process, entry, _ = running.pop(channel)
            try:
                row = channel.recv()
            except EOFError:
                process.join()
                row = {**dataclasses.asdict(entry), "status": f"crash: the process ended with code {process.exitcode}"}
            process.join()
            yield row
        for channel, (process, entry, started) in list(running.items()):
            if time.monotonic() - started > seconds:
                del running[channel]
                process.kill()
                process.join()
                yield {**dataclasses.asdict(entry), "status": f"timeout: more than {seconds:.0f} s"}


def choose(arguments: argparse.Namespace) -> tuple[list[Entry], list[dict[str, Any]]]:
    """The nets to run, and rows for those that are too large."""
    entries = [*timm_entries(arguments.jobs), *torchvision_entries()]
    entries = [
        e
        for e in entries
        if e.convolutions and (not arguments.only or any(fnmatch.fnmatch(e.name, p) for p in arguments.only))
    ]
    small = [entry for entry in entries if entry.parameters <= arguments.largest]
    large = [
        {**dataclasses.asdict(e), "status": f"skipped: {e.parameters / 1e6:.0f} M parameters"}
        for e in entries
        if e not in small
    ]
    small.sort(key=lambda entry: -entry.parameters)  # the slow ones first, so that no core waits for them at the end
    return small[: arguments.limit], large


# --- the table ------------------------------------------------------------------------------------


def cell(before: int, after: int) -> str:
    """`before → after`, or one number when nothing changed."""
    return f"{before} → {after}" if before != after else str(before)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "after" not in row:
        return f"| {row['name']} | {row['parameters'] / 1e6:.1f} | {row['status']} |||||||||"
    before, after, converter = row["before"], row["after"], row["timm"] or {}
    other = (
        f"{converter['convs'] + converter['linears']}, {converter['norms']}"
        if "convs" in converter
        else "crashes"
        if converter
        else ""
    )
    if isinstance(converter.get("error"), str) or converter.get("error", 0.0) > 1e-6:
        other += ", wrong"
    error = max(row["errors"], key=lambda e: float("inf") if isinstance(e, str) else e)
    shapes = ", ".join("×".join(map(str, size)) for size in row["sizes"])
    cells = [
        row["name"],
        f"{row['parameters'] / 1e6:.1f}",
        shapes,
        cell(before["convs"] + before["linears"], after["convs"] + after["linears"]),
        cell(before["norms"], after["norms"]),
        other,
        cell(before["add"], after["add"]),
        cell(before["calls"], after["calls"]),
        error if isinstance(error, str) else f"{error:.0e}",
        f"{row['owners'] - len(row['unread'])}/{row['owners']}",
        f"{row['plan_seconds'] + row['apply_seconds']:.1f}",
    ]
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


INTRODUCTION = """\
Written by `benchmarks/zoo.py`. One small member of every architecture family of timm that holds a convolution, and
torchvision's classification, segmentation, detection and video nets, with wide random norm statistics and layer scales.
*error* is the largest relative difference of any output, those of `forward_features` and `forward_intermediates`
included, and below 1e-9. *timm's converter* is what `timm.utils.reparameterize_model` leaves (conv + linear, norms);
convolutions, norms, and convolutions and products of matrices together are never more than it leaves, and than there
were. *Calls* are all operations of one run that are no views; *read* are the modules owning a convolution or a norm
whose forward was read; *s* the processor seconds of planning, folding and checking.
"""
HEAD = """\
| net | M params | input | conv + linear | norms | timm's converter | adds | calls | error | read | s |
| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The figures at the head of the page."""
    done = [row for row in rows if "after" in row]
    owners, unread = sum(row["owners"] for row in done), sum(len(row["unread"]) for row in done)
    worst = max((error for row in done for error in row["errors"] if not isinstance(error, str)), default=0.0)
    norms = sum(row["before"]["norms"] for row in done), sum(row["after"]["norms"] for row in done)
    families = len({row["family"] for row in done if row["library"] == "timm"})
    return [
        f"- {len(done)} nets: {families} families of timm {timm.__version__}, "
        f"{sum(row['library'] == 'torchvision' for row in done)} nets of torchvision "
        f"{torchvision.__version__.split('+')[0]}; torch {torch.__version__.split('+')[0]}, float64; "
        f"{machine(torch.device('cpu'))}.",
        f"- Largest relative error {worst:.1e}.",
        f"- Norms: {norms[0]} → {norms[1]}.",
        f"- Modules that own a convolution or a norm: {owners}, of which {1 - unread / max(owners, 1):.2%} were read.",
        f"- Broken promises: {sum(bool(problems(row)) for row in rows)}.",
    ]


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the table, in Markdown."""
    rows = sorted(rows, key=lambda row: (row["library"], row["family"], row["name"]))
    text = [
        "# The zoo",
        "",
        *INTRODUCTION.splitlines(),
        "",
        *summary(rows),
    ]
    for library in ("timm", "torchvision"):
        text += [
            "",
            f"## {library}",
            "",
            HEAD,
            *(line(row) for row in rows if row["library"] == library and not row["status"].startswith("skipped")),
        ]
    skipped = [
        f"{row['name']} ({row['parameters'] / 1e6:.0f} M)" for row in rows if row["status"].startswith("skipped")
    ]
    text += [
        "",
        "## Too large for this run",
        "",
        ", ".join(skipped) or "None.",
        "",
        "## Norms that are left, and why",
        "",
    ]
    text += [f"- {row['name']}: {'; '.join(row['norms_left'])}" for row in rows if row.get("norms_left")] or ["None."]
    text += ["", "## Modules that could not be read", ""]
    text += [
        f"- {row['name']} `{path}`: {reason}" for row in rows for path, reason in row.get("unread", {}).items()
    ] or ["None."]
    text += ["", "## Where timm's own converter fails", ""]
    failures = [(row["name"], row["timm"]) for row in rows if row.get("timm")]
    text += [
        f"- {name}: {converter.get('crash') or 'relative error ' + str(converter['error'])}"
        for name, converter in failures
        if "crash" in converter or isinstance(converter["error"], str) or converter["error"] > 1e-6
    ] or ["Nowhere."]
    broken = [(row["name"], problems(row)) for row in rows if problems(row)]
    if broken:
        text += ["", "## Broken promises", "", *(f"- {name}: {'; '.join(found)}" for name, found in broken)]
    return "\n".join(text) + "\n"


def main() -> int:
    """Run the zoo; the exit code is 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="names to run, with * and ?; nothing is written then"
    )
    parser.add_argument("--limit", type=int, help="run so many nets only; nothing is written then")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one net (default 300)")
    parser.add_argument(
        "--largest", type=float, default=LARGEST, help=f"most parameters of a net (default {LARGEST:,})"
    )
    parser.add_argument("--dry", action="store_true", help="do not fuse: only find inputs and run the nets as they are")
    parser.add_argument("--list", action="store_true", help="list the nets and stop")
    parser.add_argument("--json", type=Path, help="write the rows to this file, whatever was run")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every row")
    arguments = parser.parse_args()

    entries, rows = choose(arguments)
    if arguments.list:
        for entry in entries:
            print(f"{entry.library:12} {entry.family:36} {entry.name:40} {entry.parameters / 1e6:6.1f} M")
        return 0
    started = time.monotonic()
    bar = tqdm(
        run_all(entries, arguments.jobs, arguments.timeout, arguments.dry), total=len(entries), unit="net", smoothing=0
    )
    for row in bar:
        rows.append(row)
        bar.set_postfix_str(row["name"])
        if arguments.verbose:
            tqdm.write(line(row))
        for problem in problems(row):
            tqdm.write(f"{row['name']}: {problem}")
            if arguments.verbose and "traceback" in row:
                tqdm.write(row["traceback"])
    print("\n".join(summary(rows)), f"\n- {(time.monotonic() - started) / 60:.1f} minutes.")
    rows.sort(key=lambda row: (row["library"], row["family"], row["name"]))
    whole = not (arguments.only or arguments.limit or arguments.dry) and arguments.largest >= LARGEST
    if arguments.json or whole:
        path = arguments.json or RESULTS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if whole:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(page(rows))
    return int(any(map(problems, rows)))


if __name__ == "__main__":
    sys.exit(main())
