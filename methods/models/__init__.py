"""The zoo: models built by name. A builder's first docstring line is its description."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .deeplab import deeplabv3_cityscapes
from .detectors import (
    fasterrcnn_convnext_tiny_fpn,
    fasterrcnn_resnet18_fpn,
    fasterrcnn_resnet50_fpn,
    retinanet_resnet18_fpn,
    retinanet_resnet50_fpn,
    ssdlite_mobilenet_v3,
)
from .resnet_cifar import (
    resnet20,
    resnet32,
    resnet44,
    resnet50_cifar,
    resnet56,
    resnet110,
)
from .segnet import segnet
from .vgg_cifar import vgg16_cifar
from .yolov5 import yolov5m, yolov5n, yolov5s
from .yolov8 import yolov8n, yolov8s

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet50_cifar": resnet50_cifar,
    "vgg16_cifar": vgg16_cifar,
    "segnet": segnet,
    "deeplabv3_cityscapes": deeplabv3_cityscapes,
    "fasterrcnn_resnet18_fpn": fasterrcnn_resnet18_fpn,
    "fasterrcnn_resnet50_fpn": fasterrcnn_resnet50_fpn,
    "fasterrcnn_convnext_tiny_fpn": fasterrcnn_convnext_tiny_fpn,
    "retinanet_resnet18_fpn": retinanet_resnet18_fpn,
    "retinanet_resnet50_fpn": retinanet_resnet50_fpn,
    "ssdlite_mobilenet_v3": ssdlite_mobilenet_v3,
    "yolov5n": yolov5n,
    "yolov5s": yolov5s,
    "yolov5m": yolov5m,
    "yolov8n": yolov8n,
    "yolov8s": yolov8s,
}
