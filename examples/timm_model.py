"""A model of timm: what would be fused, the fused net, a deploy checkpoint and an ONNX file that is checked.

    python examples/timm_model.py
    python examples/timm_model.py --name mobileone_s1 --pretrained --out out

The same from a shell: `reparam plan timm:NAME`, `reparam export timm:NAME --out NAME.onnx`.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn

import reparam


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="repvgg_a0", help="as in timm.list_models()")
    parser.add_argument("--pretrained", action="store_true", help="take timm's published weights")
    parser.add_argument("--size", type=int, default=64, help="height and width of the image; default 64")
    parser.add_argument("--out", type=Path, help="folder to write to; default: one that is removed again")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    net = timm.create_model(args.name, pretrained=args.pretrained).eval()
    image = torch.randn(1, 3, args.size, args.size)

    plan = reparam.plan(net)
    print(plan)
    for refusal in plan.near_misses:
        print("one change of the model would fuse more:", refusal)

    # With example_inputs, a net that does not compute the same is an error, and is not handed back.
    fused = reparam.fuse(net, example_inputs=image)
    before, after = (sum(isinstance(m, nn.Conv2d) for m in model.modules()) for model in (net, fused))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    print(f"{before} convolutions -> {after}; {norms} batch norms are left")
    assert after <= before
    assert reparam.verify(net, fused, image).ok

    # timm's own methods go on working.
    with torch.inference_mode():
        features = [model.forward_features(image) for model in (net, fused)]
    difference = (features[0] - features[1]).abs().max() / features[0].abs().max()
    print(f"features differ by {difference:.1e} of the largest")
    assert difference < 1e-4

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        reparam.save_deploy(fused, folder / f"{args.name}.safetensors", source=f"timm:{args.name}")
        loaded = reparam.load_deploy(lambda: timm.create_model(args.name), folder / f"{args.name}.safetensors")
        assert torch.equal(loaded(image), fused(image))
        result = reparam.export(fused, image, folder / f"{args.name}.onnx", original=net)
        print(f"{args.name}.onnx, compared with the original: {result}")
        assert result.ok


if __name__ == "__main__":
    main()
