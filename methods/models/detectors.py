"""Detectors: [B, 3, H, W] in, losses in train mode and boxes in eval mode out.

A model whose forward autograd cannot follow, or not to the end, says what can be pruned of it:

`prunable_forward(images) -> list[Tensor]`: the part of the forward that reads and makes the
    channels that may go. It is differentiable, keeps the images of a batch apart, and its outputs
    have the same shapes whatever the weights. Channel groups are found and proven on it.
`keep_whole: tuple[str, ...]`: names of modules inside which no layer loses output channels (the
    inputs of their layers follow what is removed before them).

In torchvision's detectors that is the backbone with the inputs of the feature pyramid: the
pyramid, the region proposals and the heads are kept. A model without these attributes is pruned on
its own forward.

Images are normalised tensors of one size already, and no detector resizes them. Torchvision is
imported when a model is built: it takes a second.
"""

from __future__ import annotations

from torch import nn


def fasterrcnn_resnet50_fpn(
    num_classes: int = 10,
    *,
    fpn_channels: int = 256,
    proposals: int = 1000,
    samples: int = 512,
    head_width: int = 1024,
    smallest_anchor: int = 32,
) -> nn.Module:
    """Faster R-CNN on ResNet-50 with feature pyramid (Ren et al. 2015, Lin et al. 2017)."""
    from .torchvision_detectors import build_faster_rcnn, resnet_fpn

    return build_faster_rcnn(
        resnet_fpn("resnet50", fpn_channels),
        num_classes,
        proposals=proposals,
        samples=samples,
        head_width=head_width,
        smallest_anchor=smallest_anchor,
    )


def fasterrcnn_resnet18_fpn(
    num_classes: int = 10,
    *,
    fpn_channels: int = 64,
    proposals: int = 64,
    samples: int = 64,
    head_width: int = 256,
    smallest_anchor: int = 16,
) -> nn.Module:
    """Faster R-CNN on ResNet-18 with narrow heads and small anchors, for small images."""
    from .torchvision_detectors import build_faster_rcnn, resnet_fpn

    return build_faster_rcnn(
        resnet_fpn("resnet18", fpn_channels),
        num_classes,
        proposals=proposals,
        samples=samples,
        head_width=head_width,
        smallest_anchor=smallest_anchor,
    )


def fasterrcnn_convnext_tiny_fpn(
    num_classes: int = 10,
    *,
    fpn_channels: int = 256,
    proposals: int = 1000,
    samples: int = 512,
    head_width: int = 1024,
    smallest_anchor: int = 32,
) -> nn.Module:
    """Faster R-CNN on ConvNeXt-T with feature pyramid (Liu et al. 2022, arXiv:2201.03545)."""
    from .torchvision_detectors import build_faster_rcnn, convnext_fpn

    return build_faster_rcnn(
        convnext_fpn(fpn_channels),
        num_classes,
        proposals=proposals,
        samples=samples,
        head_width=head_width,
        smallest_anchor=smallest_anchor,
    )


def retinanet_resnet50_fpn(
    num_classes: int = 10, *, fpn_channels: int = 256, smallest_anchor: int = 32
) -> nn.Module:
    """RetinaNet on ResNet-50 with feature pyramid (Lin et al. 2017, arXiv:1708.02002)."""
    from .torchvision_detectors import build_retinanet, resnet_fpn

    backbone = resnet_fpn("resnet50", fpn_channels, first_layer=2)
    return build_retinanet(backbone, num_classes, smallest_anchor=smallest_anchor)


def retinanet_resnet18_fpn(
    num_classes: int = 10, *, fpn_channels: int = 64, smallest_anchor: int = 16
) -> nn.Module:
    """RetinaNet on ResNet-18 with narrow heads and small anchors, for small images."""
    from .torchvision_detectors import build_retinanet, resnet_fpn

    backbone = resnet_fpn("resnet18", fpn_channels, first_layer=2)
    return build_retinanet(backbone, num_classes, smallest_anchor=smallest_anchor)


def ssdlite_mobilenet_v3(num_classes: int = 10) -> nn.Module:
    """SSDLite on MobileNetV3-L (Liu et al. 2016, arXiv:1512.02325; Howard et al. 2019)."""
    from .torchvision_detectors import build_ssdlite

    return build_ssdlite(num_classes)
