"""Nets by name: our RepVGG, any net of timm or torchvision, with or without branches added."""

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import reparam
from common import FACTORIES, InputError, build, listing


def make(arch: str, classes: int, size: int, expand: str | None = None, preserve: bool = True) -> nn.Module:
    """A net with random weights, in training mode.

    Args:
        arch: `small` or a factory of `reparam.models`; `timm:NAME`; `torchvision:NAME`.
        classes: outputs.
        size: height and width of the images, pixels.
        expand: a preset of `reparam.expand` that gives the convolutions branches; None leaves the net as it is.
        preserve: whether the branches change nothing at first, or start as the papers start them.

    Raises:
        InputError: no such net, its library is missing, or it does not give one vector of logits per image.
    """
    library, colon, name = arch.rpartition(":")
    if colon and library not in LIBRARIES:
        raise InputError(f"--arch {arch}: expected NAME, timm:NAME or torchvision:NAME")
    net = LIBRARIES[library](name, classes) if colon else own(name, classes)
    if expand is not None:
        net = expanded(net.eval(), expand, preserve)
    with torch.no_grad():
        found = net.eval()(torch.zeros(1, 3, size, size))
    if not isinstance(found, Tensor) or found.shape != (1, classes):
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"--arch {arch}: expected logits of shape (1, {classes}) for one image, found {shown}")
    return net.train()


def own(name: str, classes: int) -> nn.Module:
    known(name, ["small", *FACTORIES], "a net of timm is named timm:NAME, one of torchvision torchvision:NAME")
    return build(name, classes)


def of_timm(name: str, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--arch timm:{name} needs timm: pip install 'reparam[train]'") from error
    known(name, timm.list_models(), "timm.list_models() lists all")
    net: nn.Module = timm.create_model(name, num_classes=classes)
    return net


def of_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    known(name, models.list_models(models), "torchvision.models.list_models(torchvision.models) lists all")
    # Nets with auxiliary heads give several outputs in training mode.
    only_logits = {"aux_logits": False, "init_weights": True} if name in {"googlenet", "inception_v3"} else {}
    net: nn.Module = models.get_model(name, weights=None, num_classes=classes, **only_logits)
    return net


LIBRARIES: dict[str, Callable[[str, int], nn.Module]] = {"timm": of_timm, "torchvision": of_torchvision}


def known(name: str, names: Sequence[str], remedy: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        raise InputError(f"--arch: nothing is called {name!r}; {listing(near or names)} would work ({remedy})")


def expanded(net: nn.Module, preset: str, preserve: bool) -> nn.Module:
    """The net with branches."""
    expand = getattr(reparam, "expand", None)
    if expand is None:
        raise InputError(
            f"--expand {preset}: this version of reparam has no reparam.expand; install a later one, or train a net "
            "that has branches already, such as repvgg_a0"
        )
    try:
        branched: nn.Module = expand(net, preset, preserve=preserve)
    except reparam.ReparamError as error:
        raise InputError(f"--expand {preset}: {error}") from error
    return branched
