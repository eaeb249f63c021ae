"""DeepLabV3 as it is trained on Cityscapes. Chen et al. 2017, arXiv:1706.05587.

The deep stem, the multi-grid of the last stage and the head under deep supervision are those of
the network with 46.0 M parameters that pruning papers compare on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPANSION = 4
MULTI_GRID = (1, 2, 4)
RATES = (12, 24, 36)  # of the atrous pyramid at an output stride of 8


class Bottleneck(nn.Module):
    """1x1, 3x3 with dilation and 1x1 convolution, each with batch norm, beside a shortcut."""

    def __init__(self, entry: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(entry, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if entry != out or stride != 1:
            conv = nn.Conv2d(entry, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, entry, H, W] -> [B, 4 x width, H / stride, W / stride]."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        result: Tensor = self.relu3(self.bn3(self.conv3(y)) + self.shortcut(x))
        return result


class AtrousPyramid(nn.Module):
    """Five views of the features, of one pixel up to the whole image, joined and mixed."""

    def __init__(self, entry: int, inside: int, out: int) -> None:
        super().__init__()
        self.point = conv_norm(entry, inside, 1)
        self.atrous = nn.ModuleList(conv_norm(entry, inside, 3, rate) for rate in RATES)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.whole = conv_norm(entry, inside, 1)
        self.project = conv_norm((2 + len(RATES)) * inside, out, 1)
        self.dropout = nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, entry, H, W] -> [B, out, H, W]."""
        whole = F.interpolate(self.whole(self.pool(x)), x.shape[2:], mode="nearest")
        views = [whole, self.point(x), *(atrous(x) for atrous in self.atrous)]
        result: Tensor = self.dropout(self.project(torch.cat(views, 1)))
        return result


class DeepLabV3(nn.Module):
    """A ResNet with an output stride of 8, an atrous pyramid, and an auxiliary head.

    The auxiliary head only helps to train: it is left out where no gradients are taken.

    Args:
        num_classes: Outputs of a pixel.
        in_channels: Channels of the images.
        width: Of the first stage's blocks; ResNet-50 has 64. All other widths follow.
        depths: Blocks in each stage.
    """

    def __init__(
        self, num_classes: int, in_channels: int, width: int, depths: Sequence[int]
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_norm(in_channels, width, 3, stride=2),
            conv_norm(width, width, 3),
            conv_norm(width, 2 * width, 3),
            nn.MaxPool2d(3, 2, 1),
        )
        grids = [[1] * depths[0], [1] * depths[1], [2] * depths[2]]
        grids.append([4 * MULTI_GRID[i % len(MULTI_GRID)] for i in range(depths[3])])
        entry = 2 * width
        for stage, dilations in enumerate(grids, start=1):
            inside = width * 2 ** (stage - 1)
            blocks = []
            for index, dilation in enumerate(dilations):
                stride = 2 if stage == 2 and index == 0 else 1
                blocks.append(Bottleneck(entry, inside, stride, dilation))
                entry = EXPANSION * inside
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.pyramid = AtrousPyramid(entry, 4 * width, 8 * width)
        self.head = nn.Sequential(
            conv_norm(8 * width, 4 * width, 3),
            conv_norm(4 * width, 4 * width, 3),
            nn.Conv2d(4 * width, num_classes, 1),
        )
        self.auxiliary = nn.Sequential(
            conv_norm(entry // 2, 8 * width, 3),
            nn.Dropout2d(0.1),
            nn.Conv2d(8 * width, num_classes, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Logits of each pixel of [B, in_channels, H, W] images.

        Returns:
            [B, num_classes, H, W]; where gradients are taken, these as `out` and those of the
            auxiliary head as `aux`.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._logits(x)[0]
        out, auxiliary = self._logits(x, auxiliary=True)
        return {"out": out, "aux": auxiliary}

    def prunable_forward(self, x: Tensor) -> list[Tensor]:
        """Both outputs: channels are found on them, so that the auxiliary head follows."""
        return self._logits(x, auxiliary=True)

    def _logits(self, x: Tensor, *, auxiliary: bool = False) -> list[Tensor]:
        size = x.shape[2:]
        features = self.get_submodule("layer2")(self.get_submodule("layer1")(self.stem(x)))
        features = self.get_submodule("layer3")(features)
        deep = self.get_submodule("layer4")(features)
        logits = [_enlarged(self.head(self.pyramid(deep)), size)]
        if auxiliary:
            logits.append(_enlarged(self.auxiliary(features), size))
        return logits


def deeplabv3_cityscapes(
    num_classes: int = 19,
    in_channels: int = 3,
    width: int = 64,
    depths: Sequence[int] = (3, 4, 6, 3),
) -> DeepLabV3:
    """DeepLabV3 on ResNet-50 for segmentation: deep stem, auxiliary head, 46.0 M parameters."""
    return DeepLabV3(num_classes, in_channels, width, depths)


def conv_norm(
    entry: int, out: int, size: int, dilation: int = 1, *, stride: int = 1
) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU; the size stays at a stride of 1."""
    padding = dilation * (size // 2)
    conv = nn.Conv2d(entry, out, size, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, list(size), mode="bilinear", align_corners=False)
