"""Detectors, segmenters, matchers and super-resolution nets that Python packages ship, cut small."""

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from package_nets import Net, everywhere, get, timm_convert
from torch import Tensor, nn

# --- transformers -----------------------------------------------------------------------------------------------------


def pixels(x: Tensor) -> Mapping[str, Any]:
    return {"pixel_values": x}


class Detector(nn.Module):
    """A detector of transformers as a function of one tensor: class scores and boxes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) to (N, queries, classes) and (N, queries, 4)."""
        found = self.net(pixel_values=x)
        return found.logits, found.pred_boxes


def of_transformers(config: str, model: str, options: Callable[[], Mapping[str, Any]], name: str, **net: Any) -> Net:
    def build() -> nn.Module:
        return get(f"transformers.{model}")(get(f"transformers.{config}")(**options()))

    return Net("transformers", name, build, **{"arguments": pixels, **net})


def resnet() -> Any:
    """A backbone of three outputs, of 24, 32 and 40 channels."""
    return get("transformers.RTDetrResNetConfig")(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def hgnet() -> Any:
    return get("transformers.HGNetV2Config")(
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 16, 24, 32],
        stage_mid_channels=[8, 8, 12, 12],
        stage_out_channels=[16, 24, 32, 40],
        hidden_sizes=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        use_learnable_affine_block=True,
        out_features=["stage2", "stage3", "stage4"],
    )


DETR: Mapping[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 40],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 12,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_labels": 5,
}


def detr(backbone: Callable[[], Any], **options: Any) -> Callable[[], Mapping[str, Any]]:
    return lambda: {**DETR, "backbone_config": backbone(), **options}


LARGE = ((96, 96), (128, 96))

TRANSFORMERS = (
    of_transformers("RTDetrConfig", "RTDetrForObjectDetection", detr(resnet), "RT-DETR", sizes=LARGE),
    of_transformers(
        "RTDetrConfig",
        "RTDetrForObjectDetection",
        detr(resnet, freeze_backbone_batch_norms=False, hidden_expansion=0.5),
        "RT-DETR, half the width",
        sizes=LARGE,
    ),
    of_transformers("RTDetrV2Config", "RTDetrV2ForObjectDetection", detr(resnet), "RT-DETRv2", sizes=LARGE),
    of_transformers("DFineConfig", "DFineForObjectDetection", detr(hgnet), "D-FINE", sizes=LARGE),
    of_transformers("Deimv2Config", "Deimv2ForObjectDetection", detr(hgnet), "DEIMv2", sizes=LARGE),
    of_transformers(
        "PPLCNetV3Config",
        "PPLCNetV3Backbone",
        lambda: {
            "scale": 0.5,
            "block_configs": [
                [[3, 16, 32, 1, False]],
                [[3, 32, 64, 2, False], [3, 64, 64, 1, False]],
                [[3, 64, 64, 1, False]],
                [[5, 64, 96, 2, True]],
                [[5, 96, 96, 1, True]],
            ],
            "out_features": ["stage1", "stage2", "stage5"],
        },
        "PP-LCNetV3",
    ),
    of_transformers(
        "LevitConfig",
        "LevitForImageClassification",
        lambda: {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        "LeViT",
        sizes=((64, 64), (64, 64)),
    ),
    of_transformers(
        "TextNetConfig",
        "TextNetBackbone",
        lambda: {
            "stem_out_channels": 16,
            "hidden_sizes": [16, 16, 24, 24, 32],
            "conv_layer_kernel_sizes": [[[3, 3], [3, 1]], [[3, 3], [1, 3]], [[3, 3]], [[3, 1]]],
            "conv_layer_strides": [[1, 1], [2, 1], [2], [1]],
            "out_features": ["stage1", "stage3", "stage4"],
        },
        "TextNet",
    ),
    of_transformers(
        "EfficientLoFTRConfig",
        "EfficientLoFTRModel",
        lambda: {
            "stage_num_blocks": [1, 2, 2, 2],
            "out_features": [16, 16, 24, 32],
            "hidden_size": 32,
            "num_attention_layers": 1,
            "num_attention_heads": 8,
        },
        "EfficientLoFTR",
        arguments=lambda x: {"pixel_values": torch.stack([x, x.flip(-1)], 1)},
        sizes=((64, 64), (96, 64)),
    ),
)


# --- segmentation-models-pytorch --------------------------------------------------------------------------------------


def smp_convert(model: nn.Module) -> nn.Module:
    return get("segmentation_models_pytorch.encoders.mobileone.reparameterize_model")(model)


def smp(decoder: str, encoder: str, convert: Any, norms: int = 0, note: str = "", **options: Any) -> Net:
    def build() -> nn.Module:
        package = import_module("segmentation_models_pytorch")
        return getattr(package, decoder)(encoder, encoder_weights=None, classes=3, **options)

    return Net(
        "segmentation_models_pytorch",
        f"{decoder} over {encoder}",
        build,
        ((64, 64), (96, 64)),
        convert,
        norms=norms,
        note=note,
    )


NARROW = {"decoder_channels": (32, 24, 16, 16, 8)}
SEGMENTERS = (
    smp("Unet", "mobileone_s0", smp_convert, **NARROW),
    smp("FPN", "mobileone_s0", smp_convert, decoder_pyramid_channels=24, decoder_segmentation_channels=32),
    smp("DeepLabV3Plus", "mobileone_s0", smp_convert, decoder_channels=24),
    smp("Unet", "tu-repvgg_a0", timm_convert, **NARROW),
    smp("FPN", "tu-mobileone_s0", timm_convert, decoder_pyramid_channels=24, decoder_segmentation_channels=32),
    smp("Unet", "tu-fastvit_t8", timm_convert, **NARROW),
    smp(
        "UnetPlusPlus",
        "tu-repghostnet_050",
        timm_convert,
        norms=1,
        note="the decoder takes the value in front of the first norm",
        **NARROW,
    ),
    smp("Linknet", "tu-repvit_m0_9", timm_convert),
)


# --- kornia -----------------------------------------------------------------------------------------------------------


def kornia_detr() -> nn.Module:
    detr = import_module("kornia.models.rt_detr")
    config = detr.RTDETRConfig(
        "resnet18d", 5, neck_hidden_dim=32, neck_dim_feedforward=32, head_num_decoder_layers=2, head_num_queries=12
    )
    return detr.RTDETR.from_config(config)


KORNIA = (Net("kornia", "RT-DETR", kornia_detr, LARGE, everywhere("optimize_for_deployment")),)


# --- ultralytics ------------------------------------------------------------------------------------------------------


def ultralytics_convert(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).fuse(verbose=False)


def yolo(config: str, kind: str = "DetectionModel", **net: Any) -> Net:
    def build() -> nn.Module:
        tasks = import_module("ultralytics.nn.tasks")
        model: nn.Module = getattr(tasks, kind)(f"{config}.yaml", ch=3, verbose=False)
        return model

    return Net("ultralytics", config, build, ((64, 64), (96, 64)), ultralytics_convert, **net)


TWO_HEADS = "its converter removes the one-to-many head, and with it a part of the output"
YOLO = (
    yolo("yolov8n"),
    yolo("yolov9t"),
    yolo("yolov10n", note=TWO_HEADS),
    yolo("yolov6n"),
    yolo("yolo11n"),
    yolo("yolo11n-seg", "SegmentationModel"),
    yolo("yolo26n", note=TWO_HEADS),
    yolo("rtdetr-l", "RTDETRDetectionModel", large=True),
)


# --- spandrel ---------------------------------------------------------------------------------------------------------


def span() -> nn.Module:
    return get("spandrel.architectures.SPAN.SPAN")(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2)


SUPER_RESOLUTION = (Net("spandrel", "SPAN", span, ((24, 24), (17, 30))),)

DETECTORS: tuple[Net, ...] = (*TRANSFORMERS, *SEGMENTERS, *KORNIA, *YOLO, *SUPER_RESOLUTION)
