"""BlockWIPG equals a plain loop over images and perturbations, block by block, without data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunesearch.methods.criteria.block_gradients import blocks_of
from prunesearch.methods.criteria.blockwipg import blockwipg
from prunesearch.methods.models.build import build_model
from prunesearch.methods.models.resnet_cifar import BasicBlock
from prunesearch.methods.tasks.no_data import NoData

IMAGES, PERTURBATIONS, SIGMA = 3, 4, 0.2


class Squeeze(nn.Module):
    """A residual block whose last layers are linear, and whose channels come second."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Linear(channels, 3)
        self.up = nn.Linear(3, channels)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        gates = self.up(self.down(features.mean((2, 3))).relu()).sigmoid()
        out: Tensor = x + features * gates[:, :, None, None]
        return out


class Tiny(nn.Module):
    """A stem, a residual block, one that changes the shape, a grouped layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.block1 = BasicBlock(4, 4, 1, "B")
        self.block2 = BasicBlock(4, 6, 2, "B")
        self.squeeze = Squeeze(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.fc = nn.Linear(8, 5)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu_()  # in place: the features must survive it

    def upper(self, x: Tensor) -> Tensor:
        return self.up(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.upper(self.squeeze(self.block2(self.block1(self.stem(x)))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class DoubleNoData(NoData):
    def example_input(self, batch_size: int = 1) -> Tensor:
        return super().example_input(batch_size).double()


LAYERS = [
    "conv1",
    "block1.conv1",
    "block1.conv2",
    "block2.conv1",
    "block2.conv2",
    "block2.shortcut.0",
    "squeeze.conv",
    "squeeze.down",
    "squeeze.up",
    "up",
    "fc",
]
TASK = DoubleNoData((3, 6, 6), num_classes=5)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "max"},
    {"norm": "none"},
    {"fisher": "mean_squared", "norm": "none"},
    {"fisher": "mean_squared"},
    {"variance_level": "channel"},
    {"stopgrad": True},
    {"terms": "I_n", "norm": "none"},
    {"terms": "I_p", "norm": "none"},
    {"terms": "I_p", "norm": "max", "fisher": "mean_squared"},
    {"terms": "I_n", "norm": "none", "variance_level": "channel", "stopgrad": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_a_loop(options: dict[str, Any]) -> None:
    model = _model()
    found = _score(model, **options)
    expected = _reference(model, **options)
    assert list(found) == LAYERS
    for layer in LAYERS:
        assert found[layer].dtype == torch.float32
        torch.testing.assert_close(found[layer].double(), expected[layer], rtol=1e-5, atol=1e-9)


def test_the_options_matter() -> None:
    model = _model()
    scores = [torch.cat(list(_score(model, **options).values())) for options in OPTIONS]
    for index, one in enumerate(scores):
        assert all(not torch.allclose(one, other, rtol=1e-4) for other in scores[:index])


def test_blocks_are_residual_blocks_and_single_layers() -> None:
    assert blocks_of(_model(), LAYERS, TASK.example_input(1)) == {
        "conv1": ("conv1",),
        "block1": ("block1.conv1", "block1.conv2"),
        "block2": ("block2.conv1", "block2.conv2", "block2.shortcut.0"),
        "squeeze": ("squeeze.conv", "squeeze.down", "squeeze.up"),
        "up": ("up",),
        "fc": ("fc",),
    }


def test_model_is_left_alone_and_seeds_decide() -> None:
    model = _model().train()
    model.block1.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    one, same, other = (_score(model, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[layer], same[layer]) for layer in LAYERS)
    assert not torch.equal(one["conv1"], other["conv1"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("block1.")
    }
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.conv1.weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scores_of_a_layer_do_not_depend_on_the_others() -> None:
    model = _model()
    everything = _score(model)
    few = _score(model, layers=["block2.conv1"])
    torch.testing.assert_close(few["block2.conv1"], everything["block2.conv1"])


def test_a_layer_that_is_called_twice_or_never() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x).relu()).relu().mean((2, 3))

    model = Odd().double().eval()
    options: dict[str, Any] = {"norm": "none", "terms": "I_p", "num_images": 2}
    found = _score(model, layers=["twice", "never"], **options)
    assert torch.equal(found["never"], torch.zeros(4))
    x = _draw(torch.Generator().manual_seed(0), 2, 3, 6, 6)
    total = torch.zeros(3, dtype=torch.float64)
    for h in (x, model.twice(x).relu().detach()):
        s = model.twice(h).relu().mean((2, 3)).log_softmax(1).amax(1).mean()
        total += torch.autograd.grad(s, model.twice.weight)[0].square().sum((1, 2, 3))
    torch.testing.assert_close(found["twice"].double(), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["vgg16_cifar", "torchvision:mobilenet_v2"])
def test_runs_on_real_models(name: str) -> None:
    model = build_model(name, num_classes=10, kwargs={})
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    scores = _score(
        model, layers=layers, task=NoData(), num_images=1, n_perturbations=2, sigma=0.1
    )
    for values in scores.values():
        assert values.isfinite().all() and values.min() >= 0 and values.max() > 0


def _model() -> Tiny:
    generator = torch.Generator().manual_seed(5)
    model = Tiny().double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = _draw(generator, *tensor.shape) * 0.4
                positive = "var" in name or ("bn" in name and name.endswith("weight"))
                tensor.copy_(values.abs() + 0.5 if positive else values)
    return model


def _score(
    model: nn.Module,
    *,
    layers: list[str] = LAYERS,
    task: NoData = TASK,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    options = {"num_images": IMAGES, "n_perturbations": PERTURBATIONS, "sigma": SIGMA} | options
    generator = torch.Generator().manual_seed(seed)
    return blockwipg(model, task, layers, generator=generator, **options)


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).double()


def _reference(
    model: Tiny,
    terms: str = "I_m",
    norm: str = "sum",
    fisher: str = "squared_mean",
    variance_level: str = "weight",
    stopgrad: bool = False,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = _draw(generator, IMAGES, 3, 6, 6)
    noises = [_draw(generator, PERTURBATIONS, 3, 6, 6) * SIGMA for _ in range(IMAGES)]
    blocks: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
        (model.stem, ["conv1"]),
        (model.block1, ["block1.conv1", "block1.conv2"]),
        (model.block2, ["block2.conv1", "block2.conv2", "block2.shortcut.0"]),
        (model.squeeze, ["squeeze.conv", "squeeze.down", "squeeze.up"]),
        (model.upper, ["up"]),
        (lambda h: model.fc(h.mean((2, 3))), ["fc"]),
    ]
    scores = {}
    for index, (block, layers) in enumerate(blocks):

        def features(x: Tensor, count: int = index) -> Tensor:
            with torch.no_grad():
                for earlier, _ in blocks[:count]:
                    x = earlier(x)
            return x

        for layer in layers:
            weight = model.get_submodule(layer).weight
            variances, slopes = [], []
            for z in range(IMAGES):
                x = images[z : z + 1]
                gradients = []
                for d in range(PERTURBATIONS):
                    clean = block(features(x))
                    clean = clean.detach() if stopgrad else clean
                    distance = (clean - block(features(x + noises[z][d]))).abs().sum()
                    g = _rows(layer, torch.autograd.grad(distance, weight)[0].abs())
                    gradients.append(g.sum(1, keepdim=True) if variance_level == "channel" else g)
                stack = torch.stack(gradients)
                variances.append((stack - stack.mean(0)).square().mean(0))
                out = block(features(x))
                pooled = out.mean((2, 3)) if out.ndim == 4 else out
                s = pooled.log_softmax(1)[0, pooled[0].argmax()]
                slopes.append(_rows(layer, torch.autograd.grad(s, weight)[0]))
            noise = torch.stack(variances).mean(0).sum(1)
            stack = torch.stack(slopes)
            mean_first = fisher == "squared_mean"
            small = stack.mean(0).square() if mean_first else stack.square().mean(0)
            both = {"I_n": noise, "I_p": small.sum(1)}
            chosen = [both[name] for name in ("I_n", "I_p") if terms in (name, "I_m")]
            scale = {"sum": torch.sum, "max": torch.max, "none": lambda _: 1.0}[norm]
            scores[layer] = sum(t / scale(t) for t in chosen).detach()
    return scores


def _rows(layer: str, gradient: Tensor) -> Tensor:
    if layer != "up":
        return gradient.flatten(1)
    parts = [gradient[:3].transpose(0, 1), gradient[3:].transpose(0, 1)]  # two groups of inputs
    return torch.cat(parts).flatten(1)
