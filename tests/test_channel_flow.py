"""Channels are followed through shuffles, splits, unpooling, shared layers and bare tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.labels import along, divided, overlay, spread, varies
from prunesearch.methods.proof import difference, masked
from prunesearch.methods.surgery import PruningPlan, Recipe, apply

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem `a`, something, a layer `b` that reads it, and a classifier."""

    def __init__(self, width: int = 12, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 8, 1)
        self.fc = nn.Linear(8, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.between(self.a(x))).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def plan_of(model: nn.Module) -> PruningPlan:
    _randomise(model)
    return plan_pruning(model, IMAGES)


def assert_exact(model: nn.Module, plan: PruningPlan) -> None:
    """A third of all columns at random: pruned equals masked."""
    generator = torch.Generator().manual_seed(1)
    kept = {}
    for group in plan.groups:
        size = group.num_channels // group.parts
        columns = torch.randperm(size, generator=generator)[: max(1, 2 * size // 3)].sort().values
        kept[group.name] = tuple(p * size + int(i) for p in range(group.parts) for i in columns)
    recipe = Recipe((), kept)
    with torch.no_grad():
        pruned = apply(copy.deepcopy(model), plan, recipe)(IMAGES)
        wanted = masked(copy.deepcopy(model), plan.groups, recipe)(IMAGES)
    assert difference(pruned, wanted) < 1e-5


class Shuffled(Net):
    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Chunked(Net):
    """The split of a C2f block: one half goes on, both are concatenated again."""

    def between(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left, self.inner(right)], 1)


class Unpooled(Net):
    """SegNet's: the decoder's channels take the places that the encoder's left."""

    def between(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(self.decoder(pooled), places, 2)


class Flattened(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.linear(torch.flatten(F.max_pool2d(self.a(x), 4), 1)).relu())


class Concatenated(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.side(x)], 1)


class Shared(Net):
    """One layer reads two levels, as the heads of detectors do."""

    def forward(self, x: Tensor) -> Tensor:
        fine = self.a(x)
        coarse = self.coarse(F.max_pool2d(x, 2))
        return self.fc(self.b(fine).mean((2, 3)) + self.b(coarse).mean((2, 3)))


class Scaled(Net):
    """Bare tensors that follow channels: a parameter, and a frozen norm's buffers."""

    def __init__(self) -> None:
        super().__init__(frozen=FrozenBatchNorm2d(12))
        self.gamma = nn.Parameter(torch.ones(12, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return self.frozen(self.gamma * x)


class Tokens(Net):
    """A class token and positions on patches, a layer norm, a mix of tokens."""

    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(12), mix=nn.Linear(65, 65))
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 65, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.fc(x[:, 0])


GOOD = {
    "shuffle": (lambda: Shuffled(), {"a": 2, "b": 1}),
    "chunk": (lambda: Chunked(inner=nn.Conv2d(6, 6, 1)), {"a": 2, "b": 1, "inner": 1}),
    "unpool": (lambda: Unpooled(decoder=nn.Conv2d(12, 12, 1)), {"a": 1, "b": 1}),
    "flatten": (lambda: Flattened(linear=nn.Linear(48, 8)), {"a": 1, "linear": 1}),
    "concatenation": (
        lambda: Concatenated(side=nn.Conv2d(12, 4, 1), b=nn.Conv2d(16, 8, 1)),
        {"a": 1, "b": 1, "side": 1},
    ),
    "shared": (lambda: Shared(coarse=nn.Conv2d(3, 12, 1)), {"a": 1, "b": 1}),
    "bare tensors": (lambda: Scaled(), {"a": 1, "b": 1}),
    "tokens": (lambda: Tokens(), {"a": 1}),
}


@pytest.mark.parametrize("case", GOOD)
def test_groups_are_found_and_exact(case: str) -> None:
    build, parts = GOOD[case]
    torch.manual_seed(0)
    model = build().eval()
    plan = plan_of(model)
    assert {group.name: group.parts for group in plan.groups} == parts, plan.excluded
    assert_exact(model, plan)


def test_unpooling_ties_the_layers_that_no_tensor_connects() -> None:
    plan = plan_of(Unpooled(decoder=nn.Conv2d(12, 12, 1)).eval())
    assert plan["a"].layers == ("a", "decoder")


class Padded(Net):
    """Option A, written out."""

    def between(self, x: Tensor) -> Tensor:
        return F.pad(self.narrow(x), (0, 0, 0, 0, 3, 3)) + x


class Gated(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


class Averaged(Net):
    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Attended(Net):
    def between(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return ((rows @ rows.transpose(1, 2)).softmax(-1) @ rows).view_as(x)


class Mixed(Net):
    """Two layers' channels are cut up together: no part of one of them is a whole part."""

    def between(self, x: Tensor) -> Tensor:
        both = torch.cat([x, self.side(x)], 1)
        first, second = both.chunk(2, 1)
        return first * second


BAD = {
    "padding": (lambda: Padded(narrow=nn.Conv2d(12, 6, 1)), "a", "constant channels added"),
    "gate": (lambda: Gated(gate=nn.Conv2d(12, 1, 1)), "gate", "several channels at once"),
    "mean": (lambda: Averaged(), "a", "reduced over its channels (mean"),
    "attention": (lambda: Attended(), "a", "as attention does"),
    "split": (
        lambda: Mixed(side=nn.Conv2d(12, 4, 1), b=nn.Conv2d(8, 8, 1)),
        "a",
        "split or shuffled by position",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_go_is_left_alone_with_the_reason(case: str) -> None:
    build, layer, reason = BAD[case]
    torch.manual_seed(0)
    model = build().eval()
    plan = plan_of(model)
    assert reason in plan.excluded[layer]
    assert "b" in {group.name for group in plan.groups}
    assert_exact(model, plan)


class Detecting(Net):
    """Its own forward ends in a choice that depends on the weights."""

    keep_whole = ("b",)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.prunable_forward(x)[0].flatten()
        return scores[scores > 0]

    def prunable_forward(self, x: Tensor) -> list[Tensor]:
        return [self.b(self.a(x))]


def test_a_model_says_what_is_traced_and_what_stays_whole() -> None:
    plan = plan_of(Detecting().eval())
    assert [group.name for group in plan.groups] == ["a"]
    assert plan.excluded["b"] == "lies in b, which the model keeps whole"
    assert "does not reach" in plan.excluded["fc"]


def test_layer_norm_keeps_the_order_of_the_channels() -> None:
    """More channels than a hash table of that many entries keeps in order."""
    norm = nn.LayerNorm(768)
    _randomise(norm)
    model = nn.Sequential(nn.Linear(4, 768), norm, nn.Linear(768, 2)).eval()
    plan = plan_pruning(model, torch.randn(2, 4))
    kept = tuple(range(5, 768, 3))
    pruned = apply(copy.deepcopy(model), plan, Recipe((), {"0": kept}))
    assert torch.equal(pruned[1].weight, norm.weight[list(kept)])


def test_the_model_is_left_as_it_was() -> None:
    model = Tokens().eval()
    state = copy.deepcopy(model.state_dict())
    plan_pruning(model, IMAGES)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(ValueError, match="must run on one image.*NotImplementedError"):
        plan_pruning(Net().eval(), IMAGES)


def test_labels() -> None:
    labels = spread(torch.arange(4), (2, 4, 3, 3), 1)
    assert varies(labels, 1) and not varies(labels, 2)
    found = along(labels, 1)
    assert found is not None and found.tolist() == [0, 1, 2, 3]
    assert along(labels, 2) is None
    padded = F.pad(labels.contiguous(), (1, 1), value=-1)
    assert along(padded, 1) is not None and not varies(padded, 3)
    merged, pairs = overlay(labels, labels + 10, labels.shape)
    assert torch.equal(merged, labels)
    assert pairs.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert list(divided((1, 8, 5, 5), (1, 2, 4, 5, 5))) == [(1, 2)]
    assert list(divided((2, 8, 5, 5), (2, 8, 25))) == []
    assert list(divided((1, 6, 6, 4), (1, 3, 2, 3, 2, 4))) == [(1, 3), (2, 3)]


def _randomise(model: nn.Module) -> None:
    """Norms and scales as after training: fresh ones would hide a wrong order."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if "var" in name or name.endswith("weight"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif buffer.is_floating_point():
            buffer.normal_(0, 0.5, generator=generator)
