"""Train a net with branches on a folder of images, on one process or many, then fuse and export it.

    python examples/train_imagenet.py --data imagenet --arch repvgg_a0
    torchrun --nproc-per-node=8 examples/train_imagenet.py --data imagenet --arch repvgg_b1g4
    torchrun --nproc-per-node=8 examples/train_imagenet.py --data imagenet --arch timm:resnet50 --expand acnet --resume

Images are `DATA/train/class/image.jpg` and `DATA/val/class/image.jpg`. The defaults are the recipe of the RepVGG paper
(arXiv 2101.03697, section 4.1) with five epochs of warm-up, smoothed labels and an average of the weights.

The output folder receives

    last.pt                 everything that a training needs to go on: `--resume` does, to the last bit
    steps.csv, epochs.csv   learning rate, losses, accuracies, speed, memory; `--tensorboard` writes them there, too
    training.safetensors    the net as it was trained, with its branches
    deploy.safetensors      the fused net; it loads into `reparam.fuse` of a freshly built net
    deploy.pt2, deploy.onnx the fused net as a program of `torch.export` and in ONNX (where onnx is installed)
    deploy.json             how far each of these is from the trained net

Killed at any moment and started again with `--resume`, a training repeats the steps since its last checkpoint with the
same images in the same order. On SIGTERM it writes a checkpoint first and leaves with status 75. The status is 1 if a
deployed form differs from the trained net by more than rounding.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import InputError, counted, fraction
from training import images, nets, state
from training.deploy import deploy
from training.equivalent_decay import branches_of
from training.journal import Journal
from training.loop import Course, Plan, new_sums, train
from training.optimisation import average_of, cosine, decay_groups
from training.processes import Processes, joined

STOPPED = 75  # exit status EX_TEMPFAIL: the same command, with --resume, goes on
# What may differ between a training and its resumption; all other options have to be the same.
FREE = {"data", "output", "resume", "device", "workers", "threads", "log_steps", "checkpoint_steps", "tensorboard"}
FREE |= {"export", "verify_images"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("net").add_argument
    add("--arch", default="repvgg_a0", metavar="NAME", help="of reparam.models, timm:NAME or torchvision:NAME")
    add(
        "--expand",
        metavar="PRESET",
        help="of reparam.expand (repvgg, acnet, dbb ...): add branches that change nothing at first",
    )
    add("--no-preserve", dest="preserve", action="store_false", help="start them as the papers do, which changes it")

    add = parser.add_argument_group("images").add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="holds train/class/ and val/class/")
    add("--image-size", type=counted(8), default=224, metavar="PIXELS", help="height and width; default 224")
    add("--crop-area", type=fraction, default=0.08, metavar="SHARE", help="least, of a random crop; default 0.08")
    add("--no-flip", dest="flip", action="store_false", help="do not mirror images")
    add("--auto-augment", choices=sorted(images.AUTO_AUGMENT), help="vary colours and shapes, too")
    add("--workers", type=counted(0), default=4, metavar="NUMBER", help="that read images, per process; default 4")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=counted(1), default=120, help="default 120")
    add("--batch-size", type=counted(2), default=256, metavar="IMAGES", help="of all processes together; default 256")
    add("--lr", type=at_least_zero, default=0.1, metavar="RATE", help="largest learning rate; default 0.1")
    add("--warm-up-epochs", type=counted(0), default=5, metavar="EPOCHS", help="default 5")
    add("--momentum", type=fraction, default=0.9, metavar="SHARE", help="default 0.9")
    add("--weight-decay", type=at_least_zero, default=1e-4, metavar="RATE", help="of kernels only; default 0.0001")
    add("--equivalent-decay", action="store_true", help="decay the kernel that branches amount to, not each branch's")
    add("--label-smoothing", type=at_least_zero, default=0.1, metavar="SHARE", help="default 0.1")
    add("--ema", type=at_least_zero, default=0.9999, metavar="DECAY", help="of averaged weights; 0: none")
    add("--seed", type=seed, default=0, help="of weights, order and crops; default 0")

    add = parser.add_argument_group("computing").add_argument
    add("--device", default="auto", help="cuda, mps or cpu; default: the fastest there is")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="default: bf16 or fp16 on CUDA, else fp32")
    add("--channels-last", action="store_true", help="memory layout that tensor cores like")
    add("--deterministic", action="store_true", help="only kernels that give the same bits every time")
    add("--threads", type=counted(1), metavar="NUMBER", help="of the CPU, per process; default: as torch finds")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, default=Path("out/imagenet"), metavar="FOLDER", help="default out/imagenet")
    add("--resume", action="store_true", help="go on from OUTPUT/last.pt; start anew if there is none")
    add("--log-steps", type=counted(1), default=50, metavar="STEPS", help="between two rows; default 50")
    add("--checkpoint-steps", type=counted(1), default=1000, metavar="STEPS", help="between checkpoints; default 1000")
    add("--tensorboard", action="store_true", help="write OUTPUT/tensorboard, too")
    add("--export", nargs="*", choices=["pt2", "onnx"], help="default: pt2, and onnx where it is installed")
    add("--verify-images", type=counted(2), default=64, metavar="IMAGES", help="compared after fusing; default 64")
    return parser, parser.parse_args(arguments)


def seed(text: str) -> int:
    value = counted(0)(text)
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2³¹, got {text!r}")
    return value


def at_least_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def precision(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def formats(asked: Sequence[str] | None) -> frozenset[str]:
    has_onnx = find_spec("onnx") is not None and find_spec("onnxscript") is not None
    if asked is None:
        return frozenset({"pt2", "onnx"} if has_onnx else {"pt2"})
    if "onnx" in asked and not has_onnx:
        raise InputError("--export onnx needs the packages onnx and onnxscript: pip install 'reparam[train]'")
    return frozenset(asked)


def prepared(args: argparse.Namespace, net: nn.Module, per_epoch: int, group: Processes) -> tuple[state.Training, Plan]:
    """A training before its first step, and how it is to go."""
    if args.ema >= 1 or args.label_smoothing >= 1:
        raise InputError("--ema and --label-smoothing need numbers below 1")
    if not args.preserve and not args.expand:
        raise InputError("--no-preserve is about the branches of --expand, which is not given")
    if args.warm_up_epochs >= args.epochs:
        raise InputError(f"--warm-up-epochs {args.warm_up_epochs} leaves nothing of --epochs {args.epochs}")
    net.to(group.device)
    if args.channels_last:
        net.to(memory_format=torch.channels_last)
    branches = branches_of(net) if args.equivalent_decay else []
    merged = [kernel for together in branches for kernel in together.kernels]
    optimizer = torch.optim.SGD(decay_groups(net, args.weight_decay, merged), args.lr, args.momentum)
    dtype = precision(args.precision, group.device)
    training = state.Training(
        net=net,
        average=average_of(net) if args.ema else None,
        optimizer=optimizer,
        schedule=cosine(optimizer, args.warm_up_epochs * per_epoch, args.epochs * per_epoch),
        scaler=torch.amp.GradScaler(group.device.type, enabled=dtype == torch.float16),
        sums=new_sums(2, 2, device=group.device),
    )
    plan = Plan(
        epochs=args.epochs,
        smoothing=args.label_smoothing,
        ema=args.ema,
        precision=dtype,
        decay=args.weight_decay,
        branches=branches,
        channels_last=args.channels_last,
        log_steps=args.log_steps,
        checkpoint_steps=args.checkpoint_steps,
    )
    return training, plan


def run(args: argparse.Namespace, group: Processes) -> Callable[[], bool] | None:
    """Train; returns what process 0 does afterwards (whether the deployed net agrees), or None if stopped."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    state.seed_all(args.seed)
    written = formats(args.export)
    checkpoint = args.output / "last.pt"
    if checkpoint.exists() and not args.resume:
        raise InputError(f"{checkpoint} is of another training: go on with --resume, or take another --output")

    recipe = images.Recipe(args.image_size, args.crop_area, args.flip, args.auto_augment)
    data = images.load(args.data, recipe, args.batch_size, args.seed, args.workers, group)
    fresh = partial(nets.make, args.arch, len(data.classes), args.image_size, args.expand, args.preserve)
    training, plan = prepared(args, fresh(), len(data.batches), group)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"classes": list(data.classes), "images": data.batches.images}
    state.seed_all(args.seed + 1 + group.rank)  # dropout differs between processes
    if checkpoint.exists():
        state.restore(checkpoint, training, settings, group)
    group.wait()  # all have read the checkpoint before one is written

    journal = Journal(args.output, training.step, args.tensorboard) if group.main else None
    if group.main:
        print(f"{args.arch}: {len(data.classes)} classes, {data.batches.images:,} images, {group.count} processes on")
        print(f"{group.device}, {str(plan.precision).removeprefix('torch.')}, from step {training.step}", flush=True)
    finished = train(training, data, plan, Course(checkpoint, settings, journal), group)
    if journal is not None:
        journal.close()
    if not finished:
        if group.main:
            print(f"stopped after step {training.step}; --resume goes on from {checkpoint}", file=sys.stderr)
        return None
    return partial(finish, args, training.result, fresh, data, written)


def finish(
    args: argparse.Namespace, net: nn.Module, fresh: Callable[[], nn.Module], data: images.Data, written: frozenset[str]
) -> bool:
    """Fuse, compare, export."""
    about: dict[str, Any] = {
        "arch": args.arch,
        "expand": args.expand,
        "classes": list(data.classes),
        "image_size": args.image_size,
        "mean": images.MEAN,
        "deviation": images.DEVIATION,
    }
    result = deploy(net, fresh, images.some(data.validation, args.verify_images), args.output, about, written)
    print(f"parameters: {result.parameters['trained']:,} → {result.parameters['fused']:,}")
    for name, difference in result.differences.items():
        print(f"{name}: largest logit difference {difference:.1e} of the largest logit")
    print(f"predictions changed: {result.predictions_changed} of {result.images}")
    return result.agrees


def main(arguments: Sequence[str] | None = None) -> int:
    parser, args = options(arguments)
    # In fp16 the first steps are left out until the scale of the loss fits; the schedule goes on.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    try:
        with joined(args.device) as group:
            last = run(args, group)
        if last is None:
            return STOPPED
        agrees = last() if group.main else True
    except InputError as error:
        parser.error(str(error))
    if not agrees:
        print("a deployed form differs from the trained net by more than rounding", file=sys.stderr)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
