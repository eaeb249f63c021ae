"""A model: any callable that returns a `torch.nn.Module`."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: with it replaced by an identity, the model still runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> the same shape."""
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + x).relu()


class TinyNet(nn.Module):
    """A stem, some blocks, a linear classifier.

    Read widths from tensors (`x.flatten(1)`), never from numbers in the code (`x.view(-1, 16)`):
    that is all that pruning asks of a model.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(num_blocks)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def tiny_net(
    num_classes: int, in_channels: int = 1, width: int = 16, num_blocks: int = 3
) -> nn.Module:
    """A residual network of a few thousand weights."""
    return TinyNet(num_classes, in_channels, width, num_blocks)
