"""A detector whose towers are shared: RetinaNet of torchvision, with batch norms in its heads.

    python examples/detector.py

Each tower runs on five levels of the pyramid, and its forward loops over them, which cannot be read. The modules
inside are read on their own, so all norms go nonetheless, once for all levels.
"""

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import reparam

CLASSES, WIDTH = 5, 32


def build() -> RetinaNet:
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(resnet18(), levels, [128, 256, 512], WIDTH, LastLevelP6P7(WIDTH, WIDTH))
    net = RetinaNet(backbone, CLASSES, min_size=128, max_size=160, score_thresh=0.0, detections_per_img=50)
    anchors = net.anchor_generator.num_anchors_per_location()[0]
    net.head = RetinaNetHead(WIDTH, anchors, CLASSES, norm_layer=nn.BatchNorm2d)
    return net


def main() -> None:
    torch.manual_seed(0)
    net = build().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # stands for training: every norm does something
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    net.eval()

    plan = reparam.plan(net)
    unread = [refusal for refusal in plan.left if refusal.rule == "unread"]
    for refusal in unread:
        print(refusal)
    assert {"head.classification_head", "head.regression_head"} <= {refusal.path for refusal in unread}

    fused = plan.apply()
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (net, fused)]
    print(f"{norms[0]} batch norms -> {norms[1]}; {len(plan.regions)} regions, each with one convolution")
    assert norms == [28, 0]
    towers = [region.path for region in plan.regions if region.path.startswith("head.")]
    assert len(towers) == 8, "two towers of four convolutions, whatever the number of levels"

    images = [torch.rand(3, 128, 96, dtype=torch.float64), torch.rand(3, 100, 160, dtype=torch.float64)]
    with torch.inference_mode():
        before, after = net(images), fused(images)
    for first, last in zip(before, after, strict=True):
        assert len(first["boxes"]) == 50
        assert torch.equal(first["labels"], last["labels"])
        torch.testing.assert_close(last["boxes"], first["boxes"], rtol=0, atol=1e-8)  # pixels
        torch.testing.assert_close(last["scores"], first["scores"], rtol=1e-9, atol=0)
    print("the detections of both images are the same")


if __name__ == "__main__":
    main()
