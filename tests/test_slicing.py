"""Copies of a model: equal to `copy.deepcopy`, apart from it, and laid out as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.layout import prefer_channels_last
from prunesearch.methods.models.build import build_model
from prunesearch.methods.slicing import clone
from prunesearch.methods.surgery import Recipe, prune


class Tangled(nn.Module):
    """Shares a layer, ties a weight, refers back to itself and holds its own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.c, self.b.weight = self.b, nn.Parameter(torch.randn(8, 8, 1, 1))
        self.tied = nn.Conv2d(8, 8, 1)
        self.tied.weight = self.b.weight
        self.order: list[Any] = [self.a, self.b]
        self.a.owner = [self]  # type: ignore[assignment]
        self.register_buffer("scale", torch.ones(8, 1, 1))
        self.same = self.scale
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return self.norm(self.tied(self.c(x))) * self.same


def test_a_clone_keeps_what_is_shared_and_shares_nothing() -> None:
    model, images = Tangled(), torch.randn(2, 3, 6, 6)
    expected = model(images)
    copied = clone(model)
    assert torch.equal(copied(images), expected)
    assert copied.c is copied.b is copied.order[1] and copied.tied.weight is copied.b.weight
    assert copied.a.owner[0] is copied and copied.same is copied.scale
    assert isinstance(copied, Tangled) and list(copied.state_dict()) == list(model.state_dict())
    originals = {id(item) for item in (*model.modules(), *model.parameters(), *model.buffers())}
    copies = {id(item) for item in (*copied.modules(), *copied.parameters(), *copied.buffers())}
    assert not originals & copies
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.zero_()
    assert torch.equal(model(images), expected)


def test_hooks_and_modes_are_copied() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={}).eval()
    model.layer1.train()
    seen: list[int] = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(1))
    model.conv1.weight.requires_grad_(False)
    copied = clone(model)
    copied(torch.randn(2, 3, 8, 8))
    assert seen == [1]
    assert [m.training for m in copied.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_what_is_left_out_is_an_identity() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    copied = clone(model, without=["layer1.1", "no such"])
    assert isinstance(copied.layer1[1], nn.Identity) and not isinstance(
        model.layer1[1], nn.Identity
    )
    assert set(model.state_dict()) - set(copied.state_dict()) == {
        key for key in model.state_dict() if key.startswith("layer1.1.")
    }


def test_the_pruned_copy_has_the_layout_and_the_frozen_layers_of_its_model() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={}).eval()
    images = torch.randn(2, 3, 16, 16)
    plan = plan_pruning(model, images)
    recipe = Recipe(("layer1.1",), {group.name: (0, 2, 5) for group in plan.alive(["layer1.1"])})
    plain = prune(model, plan, recipe)
    before = copy.deepcopy(model.state_dict())
    model.conv1.weight.requires_grad_(False)
    assert prefer_channels_last(model, images)
    last = prune(model, plan, recipe)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for key, value in last.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
        if value.ndim == 4:
            assert value.is_contiguous(memory_format=torch.channels_last)
    assert not last.conv1.weight.requires_grad and last.fc.weight.requires_grad
    torch.testing.assert_close(last(images), plain(images), rtol=1e-4, atol=1e-5)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(len(x), -1))


def test_a_model_that_cannot_be_laid_out_so_stays_as_it_is() -> None:
    model = Viewing().eval().requires_grad_(False)
    assert not prefer_channels_last(model, torch.randn(2, 3, 6, 6))
    assert model.conv.weight.is_contiguous() and not model.conv.weight.requires_grad
    with pytest.raises(RuntimeError, match="view"):
        model.to(memory_format=torch.channels_last)(torch.randn(2, 3, 6, 6))
