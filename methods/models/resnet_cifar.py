"""ResNets for small images: He et al. 2016, arXiv:1512.03385, section 4.2, and its ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class ZeroPadShortcut(nn.Module):
    """Shortcut option A: strides over the image and pads new channels with zeros, symmetrically.

    The mapping of channels lives in two integer buffers, so that channels can be removed on
    either side by editing them: input channel `src[i]` feeds output channel `dst[i]`, and every
    other output channel is zero.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least `in_channels`.
        stride: Every stride-th row and column is kept.
    """

    src: Tensor
    dst: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        offset = (out_channels - in_channels) // 2
        self.register_buffer("src", torch.arange(in_channels))
        self.register_buffer("dst", torch.arange(in_channels) + offset)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        x = x[:, :, :: self.stride, :: self.stride].index_select(1, self.src)
        zeros = x.new_zeros(x.shape[0], self.out_channels, x.shape[2], x.shape[3])
        return zeros.index_copy(1, self.dst, x)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = make_shortcut(in_channels, width, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, width, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu2(out + self.shortcut(x))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is in the 3x3."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(in_channels, out_channels, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, 4 * width, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        result: Tensor = self.relu3(out + self.shortcut(x))
        return result


class CifarResNet(nn.Module):
    """A ResNet with a 3x3 stem and no max-pool.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Blocks in each stage; every stage but the first halves the image.
        widths: Width of each stage's blocks.
        num_classes: Outputs.
        in_channels: Channels of the images.
        shortcut: `A` (zero padding, no parameters) or `B` (1x1 convolution) where shapes change.

    Raises:
        ValueError: If `shortcut` is neither.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and stage > 1 else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.num_stages = len(depths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def resnet20(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "B") -> CifarResNet:
    """ResNet-20 for small images: 3 stages of 3 basic blocks, 0.27 M parameters."""
    return _basic(20, num_classes, in_channels, shortcut)


def resnet32(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "B") -> CifarResNet:
    """ResNet-32 for small images: 3 stages of 5 basic blocks, 0.47 M parameters."""
    return _basic(32, num_classes, in_channels, shortcut)


def resnet44(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "B") -> CifarResNet:
    """ResNet-44 for small images: 3 stages of 7 basic blocks, 0.66 M parameters."""
    return _basic(44, num_classes, in_channels, shortcut)


def resnet56(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "B") -> CifarResNet:
    """ResNet-56 for small images: 3 stages of 9 basic blocks, 0.86 M parameters."""
    return _basic(56, num_classes, in_channels, shortcut)


def resnet110(
    num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "B"
) -> CifarResNet:
    """ResNet-110 for small images: 3 stages of 18 basic blocks, 1.73 M parameters."""
    return _basic(110, num_classes, in_channels, shortcut)


def resnet50_cifar(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-50 with a 3x3 stem and no max-pool: 4 stages of bottlenecks, 23.5 M parameters."""
    return CifarResNet(
        Bottleneck,
        depths=(3, 4, 6, 3),
        widths=(64, 128, 256, 512),
        num_classes=num_classes,
        in_channels=in_channels,
        shortcut="B",
    )


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding and no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def make_shortcut(in_channels: int, out_channels: int, stride: int, option: Shortcut) -> nn.Module:
    """Identity where the shape stays, else option A or B.

    Raises:
        ValueError: If `option` is neither.
    """
    if option not in ("A", "B"):
        raise ValueError(
            f"`shortcut` (={option!r}) must be 'A' (zero padding) or 'B' (1x1 convolution): there "
            "are no other shortcuts. Use 'B'."
        )
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _basic(depth: int, num_classes: int, in_channels: int, shortcut: Shortcut) -> CifarResNet:
    return CifarResNet(
        BasicBlock,
        depths=[(depth - 2) // 6] * 3,
        widths=(16, 32, 64),
        num_classes=num_classes,
        in_channels=in_channels,
        shortcut=shortcut,
    )
