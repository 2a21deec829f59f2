"""Find the weights in a checkpoint: training loops nest them, and wrappers of models prefix their names."""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

WRAPPER_PREFIXES: Final = ("module.", "_orig_mod.")  # DistributedDataParallel and averaged models, torch.compile
AVERAGED: Final = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN: Final = ("state_dict", "model", "model_state_dict", "net", "network")
BESIDE: Final = frozenset({"n_averaged"})  # torch.optim.swa_utils.AveragedModel keeps it beside the weights


def weights_in(checkpoint: Any, *, averaged: bool | None = None) -> tuple[dict[str, Any], str]:
    """The innermost state dict of a checkpoint, its keys without the prefixes of wrappers.

    Args:
        checkpoint: a state dict, a dict that holds one, or a model.
        averaged: take the moving average of the weights (True), the weights themselves (False), or the average if
            there is one (None). A state dict that is not nested is taken as it is.

    Returns:
        Key to tensor, and where they were found: names joined by dots, empty for the checkpoint itself.

    >>> import torch
    >>> weights_in({"epoch": 3, "model": {"module.conv.weight": torch.zeros(1)}})
    ({'conv.weight': tensor([0.])}, 'model')
    """
    order = {None: AVERAGED + PLAIN, True: AVERAGED, False: PLAIN}[averaged]
    path: list[str] = []
    while True:
        if isinstance(checkpoint, nn.Module):
            checkpoint = checkpoint.state_dict()
        inner = next((name for name in order if _holds_weights(checkpoint, name)), None)
        if inner is None:
            break
        path.append(inner)
        checkpoint, order = checkpoint[inner], AVERAGED + PLAIN
    found: Mapping[str, Any] = checkpoint if isinstance(checkpoint, Mapping) else {}
    return {_without_prefixes(str(key)): value for key, value in found.items() if key not in BESIDE}, ".".join(path)


def _holds_weights(checkpoint: Any, name: str) -> bool:
    if not isinstance(checkpoint, Mapping):
        return False
    inner = checkpoint.get(name)
    return isinstance(inner, nn.Module) or (isinstance(inner, Mapping) and len(inner) > 0)


def is_weights(found: Mapping[str, Any]) -> bool:
    """Whether a dict is a state dict: some of its values are tensors."""
    return any(isinstance(value, Tensor) for value in found.values())


def _without_prefixes(key: str) -> str:
    while key.startswith(WRAPPER_PREFIXES):
        key = key.partition(".")[2]
    return key
