"""Load RepVGG weights that were saved from the original repository, from timm or from here.

| here                                | original              | timm                        | form     |
|-------------------------------------|-----------------------|-----------------------------|----------|
| `stages.0.0`                        | `stage0`              | `stem`                      | both     |
| `stages.2.5`                        | `stage2.5`            | `stages.1.5`                | both     |
| `.dense.conv`, `.dense.norm`        | `.rbr_dense.conv, bn` | `.conv_kxk.conv, bn`        | training |
| `.pointwise.conv`, `.pointwise.norm`| `.rbr_1x1.conv, bn`   | `.conv_1x1.conv, bn`        | training |
| `.skip`                             | `.rbr_identity`       | `.identity`                 | training |
| `.dense`                            | `.rbr_reparam`        | `.reparam_conv`             | deploy   |
| `.squeeze_excite.down`, `up`        | `.se.down`, `up`      | `.attn.fc1`, `fc2`          | both     |
| `head`                              | `linear`              | `head.fc`                   | both     |

Source: the two layouts are those of the code published with arXiv 2101.03697 and of timm's `byobnet`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from reparam.checkpoints.fit import misfits, renamed
from reparam.checkpoints.unwrap import weights_in
from reparam.errors import ReparamError
from reparam.models.repvgg import RepVGG


@dataclass(frozen=True)
class Layout:
    """How another code base names the modules of a RepVGG.

    Args:
        block: matches a module path inside a block; groups `stage` (absent in a stem), `block` (absent: 0) and `part`.
        stages_before: stages that come before the one that this layout counts as 0.
        parts: module path inside a block, there to here.
        head: the linear layer.
    """

    block: re.Pattern[str]
    stages_before: int
    parts: Mapping[str, str]
    head: str

    def path_here(self, path: str) -> str | None:
        """The path of the same module in our `RepVGG`, or None if this layout has no such module."""
        if path == self.head:
            return "head"
        match = self.block.fullmatch(path)
        if match is None or match["part"] not in self.parts:
            return None
        stage = 0 if match["stage"] is None else int(match["stage"]) + self.stages_before
        return f"stages.{stage}.{match['block'] or 0}.{self.parts[match['part']]}"


ORIGINAL = Layout(
    block=re.compile(r"stage(?P<stage>\d+)(\.(?P<block>\d+))?\.(?P<part>\D.*)"),
    stages_before=0,
    parts=MappingProxyType(
        {
            "rbr_dense.conv": "dense.conv",
            "rbr_dense.bn": "dense.norm",
            "rbr_1x1.conv": "pointwise.conv",
            "rbr_1x1.bn": "pointwise.norm",
            "rbr_identity": "skip",
            "rbr_reparam": "dense",
            "se.down": "squeeze_excite.down",
            "se.up": "squeeze_excite.up",
        }
    ),
    head="linear",
)
TIMM = Layout(
    block=re.compile(r"(stem|stages\.(?P<stage>\d+)\.(?P<block>\d+))\.(?P<part>\D.*)"),
    stages_before=1,
    parts=MappingProxyType(
        {
            "conv_kxk.conv": "dense.conv",
            "conv_kxk.bn": "dense.norm",
            "conv_1x1.conv": "pointwise.conv",
            "conv_1x1.bn": "pointwise.norm",
            "identity": "skip",
            "reparam_conv": "dense",
            "attn.fc1": "squeeze_excite.down",
            "attn.fc2": "squeeze_excite.up",
        }
    ),
    head="head.fc",
)
LAYOUTS = (ORIGINAL, TIMM)


def load_weights(model: RepVGG, state_dict: Mapping[str, Any]) -> None:
    """Copy weights into `model`, whichever of the three layouts names them.

    Weights in training form go into a model as built, weights in deploy form into a fused one. A state dict nested
    under `state_dict`, `model` or `model_ema`, and keys that start with `module.`, are understood. A batch norm's
    `num_batches_tracked` may be absent: the model then keeps its own.

    Args:
        model: a `RepVGG`, as built or after `reparam.fuse`; changed in place, and only if everything fits.
        state_dict: key to tensor. Tensors are cast to the model's dtype and device.

    Raises:
        ReparamError: `model` is no RepVGG or is on the meta device, or the weights do not fit; the message lists every
            missing, unexpected, wrongly shaped and doubly given key. Nothing is changed.
    """
    if not isinstance(model, RepVGG):
        raise ReparamError(f"load_weights: expected a reparam.models.RepVGG, found {type(model).__name__}")
    expected: dict[str, Tensor] = model.state_dict()
    if any(tensor.is_meta for tensor in expected.values()):
        raise ReparamError("load_weights: the model is on the meta device; first model.to_empty(device=...)")

    found, given_as, doubled = renamed(weights_in(state_dict)[0], key_here)
    report = misfits(expected, found, given_as, doubled)
    if report:
        remedy = _remedy(expected, found)
        raise ReparamError(f"load_weights: the weights do not fit, nothing was changed{report}{remedy}")
    model.load_state_dict(expected | found)


def key_here(key: str) -> str:
    """The key under which our `RepVGG` keeps the same tensor; a key of no known layout is returned as it is.

    >>> key_here("stage1.0.rbr_1x1.bn.weight"), key_here("stages.0.0.conv_1x1.bn.weight")
    ('stages.1.0.pointwise.norm.weight', 'stages.1.0.pointwise.norm.weight')
    """
    path, _, name = key.rpartition(".")
    for layout in LAYOUTS:
        here = layout.path_here(path)
        if here is not None:
            return f"{here}.{name}"
    return key


def _remedy(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What to do if the weights are in one form and the model in the other."""
    deploy_key, training_key = "stages.0.0.dense.weight", "stages.0.0.dense.conv.weight"
    if training_key in expected and deploy_key in found:
        return "\n  These are deploy weights and the model has its branches: load them into reparam.fuse(model.eval())."
    if deploy_key in expected and training_key in found:
        return "\n  These are training weights and the model is fused: load them into the model first, then fuse it."
    return ""
