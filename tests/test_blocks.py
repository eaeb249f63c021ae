"""Removable blocks are found by tracing, and every other unit says why it is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from prunesearch.methods.blocks import find_blocks, removable_blocks, remove_blocks
from prunesearch.methods.models.build import build_model

# name, image size, removable blocks by the paper's rule, by the residual rule
ZOO = [
    ("resnet20", 32, 6, 7),
    ("resnet56", 32, 24, 25),
    ("torchvision:resnet50", 64, 12, 12),
    ("torchvision:mobilenet_v2", 64, 10, 10),
    ("torchvision:mobilenet_v3_small", 64, 6, 6),
    ("torchvision:convnext_tiny", 64, 14, 18),
    ("torchvision:efficientnet_b0", 64, 9, 9),
    ("torchvision:regnet_y_400mf", 64, 12, 12),
    ("torchvision:swin_t", 64, 8, 12),
    ("vgg16_cifar", 32, 0, 0),
    ("torchvision:densenet121", 64, 0, 0),
    ("torchvision:googlenet", 64, 0, 0),
    ("torchvision:shufflenet_v2_x0_5", 64, 0, 0),
]


@pytest.mark.parametrize(("name", "size", "paper", "residual"), ZOO, ids=[z[0] for z in ZOO])
def test_blocks_of_the_zoo(name: str, size: int, paper: int, residual: int) -> None:
    model = build_model(name, num_classes=10)
    images = torch.randn(1, 3, size, size)
    blocks = find_blocks(model, images)
    free = removable_blocks(model, images, valid="residual")
    assert sum(block.removable for block in blocks) == paper
    assert len(free) == residual
    assert {block.name for block in blocks if block.removable} <= set(free)
    assert all(block.removable == (not block.reason) for block in blocks)
    _every_kernel_is_listed(model, [block.name for block in blocks])
    remove_blocks(model, free)
    assert model(images).shape == (1, 10)
    assert all(isinstance(model.get_submodule(block), nn.Identity) for block in free)


def test_vision_transformer() -> None:
    model = build_model(
        "torchvision:vit_b_16", num_classes=10, kwargs={"image_size": 32, "num_classes": 10}
    )
    free = removable_blocks(model, torch.randn(1, 3, 32, 32), valid="residual")
    assert free == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet20_by_name_stage_and_reason(shortcut: str) -> None:
    model = build_model("resnet20", num_classes=10, kwargs={"shortcut": shortcut})
    blocks = {block.name: block for block in find_blocks(model, torch.randn(1, 3, 32, 32))}
    free = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (1, 2)]
    assert [name for name, block in blocks.items() if block.removable] == free
    assert all(block.stage == name[:6] for name, block in blocks.items() if "layer" in name)
    assert "stem" in blocks["conv1"].reason
    assert "first block of stage layer1" in blocks["layer1.0"].reason
    assert blocks["layer2.0"].reason == "changes the shape from 16x32x32 to 32x16x16"
    assert "head" in blocks["fc"].reason
    assert blocks["layer1.1"].num_params == 2 * (16 * 16 * 9 + 2 * 16)


def test_stages_in_one_parent_are_named_after_their_first_block() -> None:
    model = build_model("torchvision:mobilenet_v2", num_classes=10)
    blocks = {block.name: block for block in find_blocks(model, torch.randn(1, 3, 32, 32))}
    assert [blocks[f"features.{i}"].stage for i in (7, 8, 10)] == ["features.7"] * 3
    assert not blocks["features.7"].removable and blocks["features.8"].removable


def test_a_plain_net_says_why() -> None:
    model = build_model("vgg16_cifar", num_classes=10)
    reasons = [block.reason for block in find_blocks(model, torch.randn(1, 3, 32, 32))]
    assert len(reasons) == 14
    assert "not residual" in reasons[1] and "changes the shape" in reasons[2]


class Residual(nn.Module):
    def __init__(self, width: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = shortcut or nn.Identity()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.relu_()) + self.shortcut(x)  # pre-activation, in place


class Awkward(nn.Module):
    """Only `good` is removable."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = Residual(4)
        self.projected = Residual(4, nn.Conv2d(4, 4, 1))
        self.twice = Residual(4)
        self.read = Residual(4)
        self.alias = self.named = Residual(4)
        self.good = Residual(4)
        self.keyword = Residual(4)
        self.unused = Residual(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.projected(self.first(self.stem(x)))))
        x = self.good(self.named(self.read(x) * self.read.scale))
        return self.head(self.keyword(x=x).mean((2, 3)))


def test_a_block_that_the_model_cannot_do_without_is_not_offered() -> None:
    blocks = {b.name: b for b in find_blocks(Awkward(), torch.randn(1, 3, 8, 8))}
    assert [name for name, block in blocks.items() if block.removable] == ["good"]
    reasons = {name: block.reason for name, block in blocks.items()}
    assert "first block" in reasons["first"]
    assert "not residual" in reasons["projected"]
    assert "called 2 times" in reasons["twice"]
    assert "'Identity' object has no attribute 'scale'" in reasons["read"]
    assert "several names" in reasons["alias"]
    assert "other than one tensor" in reasons["keyword"]
    assert "not called" in reasons["unused"]


def test_frozen_batch_norm_with_trained_statistics_hides_no_block() -> None:
    block = Bottleneck(16, 4, norm_layer=FrozenBatchNorm2d)
    for name, buffer in block.named_buffers():
        buffer.uniform_(0.5, 2) if "var" in name else buffer.normal_()
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), block)
    assert removable_blocks(model, torch.randn(1, 3, 8, 8), valid="residual") == ["2"]


def test_the_model_is_left_as_it_was() -> None:
    model = Awkward()
    model.good.train(False)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    modes = [module.training for module in modules]
    with torch.inference_mode():  # whatever the caller's mode
        find_blocks(model, torch.randn(1, 3, 8, 8))
    assert list(model.modules()) == modules
    assert [module.training for module in modules] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_unknown_names_are_refused_before_anything_is_removed() -> None:
    model = build_model("resnet20", num_classes=10)
    with pytest.raises(ValueError, match=r"\(=layer1.7\) must be a known name.*Did you mean"):
        remove_blocks(model, ["layer1.1", "layer1.7"])
    assert not isinstance(model.get_submodule("layer1.1"), nn.Identity)
    with pytest.raises(ValueError, match="Did you mean `residual`"):
        find_blocks(model, torch.randn(1, 3, 32, 32), valid="residuals")  # type: ignore[arg-type]


def _every_kernel_is_listed(model: nn.Module, units: list[str]) -> None:
    kernels = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(any(f"{name}.".startswith(f"{unit}.") for unit in units) for name in kernels)
