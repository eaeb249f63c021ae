"""The zoo: models built by name. A builder's first docstring line is its description."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .deeplab import deeplabv3_cityscapes
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
}
