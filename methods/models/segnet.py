"""SegNet: Badrinarayanan, Kendall and Cipolla 2017, arXiv:1511.00561, with VGG-16's encoder."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (width in units, convolutions)


class SegNet(nn.Module):
    """13 convolutions down and 13 up; what is pooled is put back where it came from.

    Each decoder stage unpools with the indices of the encoder stage of its size, channel by
    channel. So the last convolution of an encoder stage and the one that feeds the decoder stage
    of that size must keep the same channels: they are pruned together.

    Args:
        num_classes: Outputs of a pixel.
        in_channels: Channels of the images.
        width: Channels of the first stage; SegNet has 64.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        widths = [units * width for units, _ in STAGES]
        entries = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(
            _stage(entry, out, out, count)
            for entry, out, (_, count) in zip(entries, widths, STAGES, strict=True)
        )
        self.decoder = nn.ModuleList(
            _stage(inside, inside, out, count)
            for inside, out, (_, count) in zip(
                widths[:0:-1], widths[-2::-1], STAGES[:0:-1], strict=True
            )
        )
        self.last = _stage(width, width, width, STAGES[0][1] - 1)
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W], sides of at least 32 -> logits [B, num_classes, H, W]."""
        pooled = []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[2:]
            x, indices = self.pool(x)
            pooled.append((indices, size))
        for stage in [*self.decoder, self.last]:
            indices, size = pooled.pop()
            x = stage(self.unpool(x, indices, output_size=size))
        logits: Tensor = self.classifier(x)
        return logits


def segnet(num_classes: int = 12, in_channels: int = 3, width: int = 64) -> SegNet:
    """SegNet for segmentation: VGG-16's encoder, unpooling indices, 29.4 M parameters."""
    return SegNet(num_classes, in_channels, width)


def _stage(entry: int, inside: int, out: int, count: int) -> nn.Sequential:
    """Convolutions 3x3 with batch norm; the last one changes the width from `inside` to `out`."""
    layers: list[nn.Module] = []
    for index in range(count):
        into = entry if index == 0 else inside
        onto = out if index == count - 1 else inside
        layers += [nn.Conv2d(into, onto, 3, padding=1), nn.BatchNorm2d(onto), nn.ReLU()]
    return nn.Sequential(*layers)
