"""Builds torchvision's detectors, and wraps them as models of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import convnext_tiny, resnet
from torchvision.models.detection import FasterRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

Losses = Mapping[str, Tensor]
Detections = list[dict[str, Tensor]]
Targets = Sequence[Mapping[str, Tensor]]

RESNET_WIDTHS = {"resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}
CONVNEXT_WIDTHS = (96, 192, 384, 768)
TRAIN_FACTOR = 2  # proposals in training, in units of those in evaluation
ROI_SIDE = 7


class Detector(nn.Module):
    """One of torchvision's detectors, for images that are one normalised tensor already.

    Args:
        model: With `backbone`, `transform` and the rest, from torchvision. Its transform, which
            would normalise and resize, is replaced.
        keep_whole: Names of modules inside the model; see detectors.py.
    """

    def __init__(self, model: nn.Module, keep_whole: Sequence[str]) -> None:
        super().__init__()
        model.transform = AsTheyAre()
        self.model: Any = model
        self.keep_whole = tuple(f"model.{name}" for name in keep_whole)

    def forward(self, images: Tensor, targets: Targets | None = None) -> Losses | Detections:
        """Losses by name in train mode, detections in eval mode.

        Args:
            images: Normalised, [B, 3, H, W].
            targets: For each image `boxes` [n, 4] xyxy and `labels` [n], from 1; needed in train
                mode.

        Returns:
            In eval mode for each image `boxes`, `scores` and `labels`.
        """
        result: Losses | Detections = self.model(images, targets)
        return result

    def prunable_forward(self, images: Tensor) -> list[Tensor]:
        """The levels of the feature pyramid."""
        return list(self.model.backbone(images).values())


class SingleShotDetector(Detector):
    """One without a feature pyramid: its heads read the backbone's features, and follow them."""

    def prunable_forward(self, images: Tensor) -> list[Tensor]:
        """The heads' outputs for every default box."""
        return list(self.model.head(list(self.model.backbone(images).values())).values())


class AsTheyAre(nn.Module):
    """In place of torchvision's normalising and resizing: the canvases have their size."""

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        """The images as torchvision's own transform would give them, and the targets."""
        height, width = images.shape[-2:]
        return ImageList(images, [(height, width)] * len(images)), targets

    def postprocess(self, result: Any, image_shapes: Any, original_sizes: Any) -> Any:
        """The detections: nothing was resized."""
        return result


class ConstantProposals(RegionProposalNetwork):  # type: ignore[misc]  # torchvision has no types
    """Gives each image the same number of proposals in eval mode, so that they cost the same.

    Otherwise a model that proposes less would seem faster. An image's best proposal is repeated;
    its detections are suppressed as those of one box.
    """

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: Any, num_anchors: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes [n, 4] and their scores of each image; as many boxes for each in eval mode."""
        boxes, scores = super().filter_proposals(proposals, objectness, image_shapes, num_anchors)
        if not self.training:
            number = self.post_nms_top_n()
            boxes = [_filled(b, number, s) for b, s in zip(boxes, image_shapes, strict=True)]
        return boxes, scores


def build_faster_rcnn(
    backbone: BackboneWithFPN,
    num_classes: int,
    *,
    proposals: int,
    samples: int,
    head_width: int,
    smallest_anchor: int,
) -> Detector:
    """Faster R-CNN, otherwise with torchvision's defaults.

    Args:
        backbone: With a feature pyramid of five levels.
        num_classes: Without the background.
        proposals: Boxes an image that the head sees in evaluation; twice as many in training.
        samples: Of these, how many an image are trained on.
        head_width: Features of the box head.
        smallest_anchor: Side of the finest level's anchors in pixels; each level doubles it.
    """
    sides = tuple((smallest_anchor * 2**level,) for level in range(5))
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides)),
        box_head=TwoMLPHead(backbone.out_channels * ROI_SIDE**2, head_width),
        box_predictor=FastRCNNPredictor(head_width, num_classes + 1),
        box_batch_size_per_image=samples,
    )
    top = {"training": TRAIN_FACTOR * proposals, "testing": proposals}
    model.rpn = ConstantProposals(
        model.rpn.anchor_generator,
        model.rpn.head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=top,
        post_nms_top_n=top,
        nms_thresh=0.7,
    )
    return Detector(model, ["backbone.fpn", "rpn", "roi_heads"])


def build_retinanet(
    backbone: BackboneWithFPN, num_classes: int, *, smallest_anchor: int
) -> Detector:
    """RetinaNet with torchvision's defaults; the arguments are those of `build_faster_rcnn`."""
    sides = [smallest_anchor * 2**level for level in range(5)]
    anchors = tuple(tuple(int(side * 2 ** (step / 3)) for step in range(3)) for side in sides)
    generator = AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(sides))
    model = RetinaNet(backbone, num_classes + 1, anchor_generator=generator)
    return Detector(model, ["backbone.fpn", "head"])


def build_ssdlite(num_classes: int) -> Detector:
    """SSDLite on MobileNetV3-L with torchvision's defaults."""
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes + 1
    )
    return SingleShotDetector(model, [])


def resnet_fpn(name: str, fpn_channels: int, *, first_layer: int = 1) -> BackboneWithFPN:
    """ResNet with batch norms that train, since nothing is pretrained, and a pyramid on it.

    Args:
        name: Of the ResNet.
        fpn_channels: Width of the pyramid.
        first_layer: Layer of the ResNet that the pyramid begins with: 1 and a pooled last level
            as for Faster R-CNN, or 2 and two further levels as for RetinaNet.
    """
    layers = range(first_layer, 5)
    pooled = first_layer == 1
    return BackboneWithFPN(
        resnet.__dict__[name](weights=None, norm_layer=nn.BatchNorm2d),
        {f"layer{layer}": str(index) for index, layer in enumerate(layers)},
        [RESNET_WIDTHS[name][layer - 1] for layer in layers],
        fpn_channels,
        LastLevelMaxPool() if pooled else LastLevelP6P7(fpn_channels, fpn_channels),
    )


def convnext_fpn(fpn_channels: int) -> BackboneWithFPN:
    """ConvNeXt-T with a pyramid on its four stages."""
    stages = {"1": "0", "3": "1", "5": "2", "7": "3"}
    features = convnext_tiny(weights=None).features
    return BackboneWithFPN(features, stages, list(CONVNEXT_WIDTHS), fpn_channels)


def _filled(boxes: Tensor, number: int, image_shape: Sequence[int]) -> Tensor:
    """Repeats the first box, or the whole image where there is none, up to a number of boxes."""
    height, width = image_shape
    first = boxes[:1] if len(boxes) else boxes.new_tensor([[0, 0, width, height]])
    return torch.cat([boxes, first.expand(number - len(boxes), 4)])
