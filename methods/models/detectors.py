"""torchvision's detectors as models of this package: [B, 3, H, W] in, nothing resized again.

A model whose forward autograd cannot follow, or not to the end, says what can be pruned of it:

`prunable_forward(images) -> list[Tensor]`: the part of the forward that reads and makes the
    channels that may go. It is differentiable, keeps the images of a batch apart, and its outputs
    have the same shapes whatever the weights. Channel groups are found and proven on it.
`keep_whole: tuple[str, ...]`: names of modules inside which no layer loses output channels (the
    inputs of their layers follow what is removed before them).

Here that is the backbone with the inputs of the feature pyramid: the pyramid, the region proposals
and the heads are kept. A model without these attributes is pruned on its own forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import convnext_tiny, resnet
from torchvision.models.detection import FasterRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

Losses = Mapping[str, Tensor]
Detections = list[dict[str, Tensor]]
Targets = Sequence[Mapping[str, Tensor]]

RESNET_WIDTHS = {"resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}
CONVNEXT_WIDTHS = (96, 192, 384, 768)
TRAIN_FACTOR = 2  # proposals in training, in units of those in evaluation


class Detector(nn.Module):
    """One of torchvision's detectors, for images that are one normalised tensor already.

    Args:
        model: With `backbone`, `transform` and the rest, from torchvision. Its transform, which
            would normalise and resize, is replaced.
        keep_whole: See the module's docstring.
    """

    def __init__(self, model: nn.Module, keep_whole: Sequence[str]) -> None:
        super().__init__()
        model.transform = _AsTheyAre()
        self.model = model
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
        return list(self.model.backbone(images).values())  # type: ignore[operator, union-attr]


class SingleShotDetector(Detector):
    """One without a feature pyramid, whose heads read the backbone's features themselves."""

    def prunable_forward(self, images: Tensor) -> list[Tensor]:
        """The heads' outputs for every default box."""
        features = list(self.model.backbone(images).values())  # type: ignore[operator, union-attr]
        outputs: Mapping[str, Tensor] = self.model.head(features)  # type: ignore[operator]
        return list(outputs.values())


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


def fasterrcnn_resnet50_fpn(num_classes: int = 10, **options: Any) -> Detector:
    """Faster R-CNN, ResNet-50 with feature pyramid, 41.3 M; Ren et al. 2015, Lin et al. 2017."""
    return _faster_rcnn(_resnet_fpn("resnet50", options), num_classes, **options)


def fasterrcnn_resnet18_fpn(num_classes: int = 10, **options: Any) -> Detector:
    """Faster R-CNN on ResNet-18, narrow heads and small anchors: for small images, 12.4 M."""
    options = {"fpn_channels": 64, "head_width": 256, **SMALL, **options}
    return _faster_rcnn(_resnet_fpn("resnet18", options), num_classes, **options)


def fasterrcnn_convnext_tiny_fpn(num_classes: int = 10, **options: Any) -> Detector:
    """Faster R-CNN, ConvNeXt-T with feature pyramid; Liu et al. 2022, arXiv:2201.03545."""
    features = convnext_tiny(weights=None).features
    levels = {"1": "0", "3": "1", "5": "2", "7": "3"}
    width = options.pop("fpn_channels", 256)
    backbone = BackboneWithFPN(features, levels, list(CONVNEXT_WIDTHS), width)
    return _faster_rcnn(backbone, num_classes, **options)


def retinanet_resnet50_fpn(num_classes: int = 10, **options: Any) -> Detector:
    """RetinaNet, ResNet-50 with feature pyramid; Lin et al. 2017, arXiv:1708.02002."""
    return _retinanet(_resnet_fpn("resnet50", options, first_level=2), num_classes, **options)


def retinanet_resnet18_fpn(num_classes: int = 10, **options: Any) -> Detector:
    """RetinaNet on ResNet-18, narrow heads and small anchors: for small images."""
    options = {"fpn_channels": 64, "smallest_anchor": 16, **options}
    return _retinanet(_resnet_fpn("resnet18", options, first_level=2), num_classes, **options)


def ssdlite_mobilenet_v3(num_classes: int = 10, **options: Any) -> Detector:
    """SSDLite on MobileNetV3-L; Liu et al. 2016, arXiv:1512.02325; Howard et al. 2019."""
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes + 1, **options
    )
    return SingleShotDetector(model, ["head"])


SMALL = {"proposals": 64, "samples": 64, "smallest_anchor": 16}


def _faster_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    proposals: int = 1000,
    samples: int = 512,
    head_width: int = 1024,
    smallest_anchor: int = 32,
) -> Detector:
    """Faster R-CNN with torchvision's defaults.

    Args:
        backbone: With a feature pyramid of five levels.
        num_classes: Without the background.
        proposals: Boxes an image that the head sees in evaluation; twice as many in training.
        samples: Of these, how many an image are trained on.
        head_width: Features of the box head.
        smallest_anchor: Side of the finest level's anchors in pixels; each level doubles it.
    """
    head = None if head_width == 1024 else _box_head(backbone, head_width)
    predictor = None if head is None else _predictor(head_width, num_classes + 1)
    model = FasterRCNN(
        backbone,
        None if head is not None else num_classes + 1,
        rpn_anchor_generator=AnchorGenerator(
            tuple((smallest_anchor * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5
        ),
        box_head=head,
        box_predictor=predictor,
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


def _retinanet(backbone: nn.Module, num_classes: int, *, smallest_anchor: int = 32) -> Detector:
    """RetinaNet with torchvision's defaults; see `_faster_rcnn`."""
    sides = [smallest_anchor * 2**level for level in range(5)]
    anchors = tuple(tuple(int(side * 2 ** (step / 3)) for step in range(3)) for side in sides)
    model = RetinaNet(
        backbone,
        num_classes + 1,
        anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
    )
    return Detector(model, ["backbone.fpn", "head"])


def _resnet_fpn(name: str, options: dict[str, Any], *, first_level: int = 1) -> nn.Module:
    """ResNet with batch norms that train, since nothing is pretrained, and a pyramid on it.

    Args:
        name: Of the ResNet.
        options: `fpn_channels` is taken out of it.
        first_level: Layer of the ResNet that the pyramid begins with.
    """
    width = options.pop("fpn_channels", 256)
    body = resnet.__dict__[name](weights=None, norm_layer=nn.BatchNorm2d)
    layers = range(first_level, 5)
    last = LastLevelMaxPool() if first_level == 1 else LastLevelP6P7(width, width)
    return BackboneWithFPN(
        body,
        {f"layer{layer}": str(index) for index, layer in enumerate(layers)},
        [RESNET_WIDTHS[name][layer - 1] for layer in layers],
        width,
        extra_blocks=last,
    )


def _box_head(backbone: Any, width: int) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import TwoMLPHead

    head: nn.Module = TwoMLPHead(backbone.out_channels * 7**2, width)
    return head


def _predictor(width: int, num_classes: int) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    predictor: nn.Module = FastRCNNPredictor(width, num_classes)
    return predictor


def _filled(boxes: Tensor, number: int, image_shape: Sequence[int]) -> Tensor:
    """Repeats the first box, or the whole image where there is none, up to a number of boxes."""
    height, width = image_shape
    whole = boxes.new_tensor([[0, 0, width, height]])
    first = boxes[:1] if len(boxes) else whole
    return torch.cat([boxes, first.expand(number - len(boxes), 4)])


class _AsTheyAre(nn.Module):
    """In place of torchvision's normalising and resizing: the canvases have their size."""

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        height, width = images.shape[-2:]
        return ImageList(images, [(height, width)] * len(images)), targets

    def postprocess(self, result: Any, image_shapes: Any, original_sizes: Any) -> Any:
        return result
