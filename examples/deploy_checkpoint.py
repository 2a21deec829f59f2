"""From a training checkpoint to a deploy checkpoint, and back into a net.

    python examples/deploy_checkpoint.py

A deploy checkpoint holds the fused weights and what they belong to; a net that was built in another way is refused.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import reparam
from reparam.models import RepVGG


def build(classes: int = 10) -> RepVGG:
    return RepVGG(depths=(1, 2), widths=(16, 32), strides=(2, 2), num_classes=classes)


def train(net: nn.Module) -> None:
    """Stands for training."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(3):
        images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    net = build().train()
    train(net)
    # What training loops write: weights nested and prefixed, with other things beside them.
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "training.pth")

    trained = build().eval()
    found = reparam.load_checkpoint(trained, folder / "training.pth")
    print(f"the weights were found under {found!r}")
    assert found == "state_dict"
    images = torch.randn(4, 3, 32, 32)
    fused = reparam.fuse(trained, example_inputs=images)
    reparam.save_deploy(fused, folder / "deploy.safetensors", source="examples/deploy_checkpoint.py:build")

    # Elsewhere: the same architecture is built and fused, and takes the weights. No training weights are needed.
    deployed = reparam.load_deploy(build, folder / "deploy.safetensors")
    assert torch.equal(deployed(images), fused(images))
    result = reparam.verify(trained, deployed, images)
    print(result)
    assert result.ok
    assert (folder / "deploy.safetensors").stat().st_size < (folder / "training.pth").stat().st_size

    # Another architecture is refused, with everything that differs.
    refused = ""
    try:
        reparam.load_deploy(lambda: build(classes=7), folder / "deploy.safetensors")
    except reparam.ReparamError as error:
        refused = str(error)
    print(refused)
    assert "head.weight: expected (7, 32), found (10, 32)" in refused


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
