"""VGG-16 for small images: Simonyan and Zisserman 2015, arXiv:1409.1556, with batch norm."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (width, convolutions)


class CifarVGG(nn.Module):
    """13 biased 3x3 convolutions with batch norm, five max-pools and one linear layer.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width, num_convs in STAGES:
            for _ in range(num_convs):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                ]
                layers += [nn.ReLU()]
                channels = width
            # ceil_mode changes nothing at 32 px, and lets smaller images survive five halvings.
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.features(x))))
        return logits


def vgg16_cifar(num_classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """VGG-16 for small images: 13 convolutions and one linear layer, 14.7 M parameters."""
    return CifarVGG(num_classes, in_channels)
