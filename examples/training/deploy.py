"""From a trained net to files that are deployed: fuse, compare, write, read back, compare again."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import reparam
from common import TOLERANCE, save

ONNX_LARGEST = 1_900_000_000  # bytes of weights in the file itself; the format's messages end at 2 GiB


@dataclass(frozen=True)
class Deployed:
    """How far every deployed form is from the trained net, in logits, over the largest logit."""

    images: int
    largest_logit: float
    differences: dict[str, float]  # by file; `fused` is the net in memory
    predictions_changed: int  # by fusing
    parameters: dict[str, int]  # `trained`, `fused`

    @property
    def agrees(self) -> bool:
        """Whether all forms compute the same function up to rounding."""
        return all(difference <= TOLERANCE for difference in self.differences.values())


@torch.no_grad()
def deploy(
    net: nn.Module,
    fresh: Callable[[], nn.Module],
    images: Tensor,  # float (number, 3, size, size)
    folder: Path,
    about: Mapping[str, Any],
    formats: frozenset[str],
) -> Deployed:
    """Fuse a net and write it to `training.safetensors`, `deploy.safetensors` and, as asked for, `.pt2` and `.onnx`.

    Args:
        net: trained; not changed.
        fresh: builds a net of the same structure.
        images: to compare the forms with, on the CPU, in float32.
        folder: for the files.
        about: goes with the weights.
        formats: of "pt2" and "onnx".
    """
    net = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format).eval()
    fused = reparam.fuse(net)
    wanted = net(images)
    largest = float(wanted.abs().max())
    folder.mkdir(parents=True, exist_ok=True)
    found = {"fused": fused(images)}

    save(net, folder / "training.safetensors", dict(about))
    weights = folder / "deploy.safetensors"
    save(fused, weights, dict(about))
    reloaded = reparam.fuse(fresh().eval())
    reloaded.load_state_dict(load_file(weights))
    found[weights.name] = reloaded(images)

    if formats:
        batch = torch.export.Dim.AUTO
        program = torch.export.export(fused, (images[:2],), dynamic_shapes=({0: batch},))
        if "pt2" in formats:
            path = folder / "deploy.pt2"
            torch.export.save(program, path)
            found[path.name] = torch.export.load(path).module()(images)
        if "onnx" in formats:
            found |= exported_to_onnx(program, images, folder / "deploy.onnx")

    result = Deployed(
        images=len(images),
        largest_logit=largest,
        differences={name: float((own - wanted).abs().max()) / largest for name, own in found.items()},
        predictions_changed=int((found["fused"].argmax(1) != wanted.argmax(1)).sum()),
        parameters={
            name: sum(parameter.numel() for parameter in form.parameters())
            for name, form in (("trained", net), ("fused", fused))
        },
    )
    (folder / "deploy.json").write_text(json.dumps({**about, **asdict(result)}, indent=2) + "\n", encoding="utf-8")
    return result


def exported_to_onnx(program: torch.export.ExportedProgram, images: Tensor, path: Path) -> dict[str, Tensor]:
    """Write the file; its logits, if onnxruntime is there to compute them."""
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    torch.onnx.export(program, (), path, dynamo=True, external_data=size > ONNX_LARGEST, verbose=False)
    if find_spec("onnxruntime") is None:
        print(f"{path} is written, but not compared: onnxruntime is not installed")
        return {}
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return {path.name: torch.from_numpy(logits)}
