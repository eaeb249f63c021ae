"""Layer scores equal captum's; bypassed and zeroed units do what they say."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LayerGradientShap, LayerGradientXActivation
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.methods.blocks import removable_blocks, remove_blocks
from prunesearch.methods.layer_attribution import detector_losses, score_layers
from prunesearch.methods.layer_bypass import bypass, bypassable_layers, zero
from prunesearch.methods.layer_gradients import gradient_shap
from prunesearch.methods.models.build import build_model


class Net(nn.Module):
    """Every layer's output is overwritten by what follows, if `inplace`."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=inplace)
        self.block = Block(inplace)
        self.twice = nn.Conv2d(6, 6, 1)
        self.unused = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.norm(self.stem(x))))
        for _ in range(2):
            x = self.twice(x)
            x = x.mul_(2) if self.inplace else x * 2
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.relu(out) + x


class Task:
    """Five images in batches of 3 and 2."""

    num_classes = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(5, 3, 6, 6, generator=generator)
        self.labels = torch.tensor([0, 1, 2, 3, 1])

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(3), self.labels.split(3), strict=True))

    def training_loss(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return self.loss(model(images), target)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


LAYERS = ["stem", "norm", "block", "block.conv", "head"]  # those called once


def make_net(inplace: bool) -> Net:
    torch.manual_seed(0)
    net = Net(inplace)
    nn.init.normal_(net.norm.running_mean, std=0.3)
    nn.init.uniform_(net.norm.running_var, 0.5, 1.5)
    return net


def scores(model: nn.Module, layers: list[str], seed: int = 0, **options: Any) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    return score_layers(model, Task(), layers, generator=generator, **options)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("inplace", [False, True])
def test_grad_x_act_equals_captum(reduce: str, inplace: bool) -> None:
    reference = make_net(False).eval()
    found = scores(make_net(inplace), LAYERS, reduce=reduce)
    for name in LAYERS:
        expected = []
        for images, labels in Task().calibration_batches():
            captum = LayerGradientXActivation(
                lambda x, y: F.cross_entropy(reference(x), y).view(1),
                reference.get_submodule(name),
            )
            product = captum.attribute(images, additional_forward_args=labels).abs()
            expected.append(product.sum().item() if reduce == "sum" else product.mean().item())
        assert found[name] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_several_calls_add_up_and_what_is_not_used_is_zero(inplace: bool) -> None:
    net, total = make_net(False).eval(), 0.0
    for images, labels in Task().calibration_batches():
        first = net.twice(net.block(net.relu(net.norm(net.stem(images))))).detach()
        first.requires_grad_()
        second = net.twice(first * 2)
        loss = F.cross_entropy(net.head((second * 2).mean((2, 3))), labels)
        for activation, grad in zip(
            (first, second), torch.autograd.grad(loss, (first, second)), strict=True
        ):
            total += (activation * grad).abs().sum().item() / 2
    found = scores(make_net(inplace), ["twice", "unused"])
    assert found == {"twice": pytest.approx(total, rel=1e-5), "unused": 0.0}


def test_gradient_shap_equals_captum_on_the_same_draws() -> None:
    net, samples = make_net(False).eval(), 4
    images, labels = Task().calibration_batches()[0]
    starts = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))

    def per_image(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none") / len(images)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    np.random.seed(3)
    np.random.choice(1, samples * len(images))  # captum draws a baseline for each image first
    share = torch.tensor(np.random.uniform(0, 1, samples * len(images)), dtype=torch.float32)
    draws = [
        (images, starts.expand_as(images), part)
        for part in share.view(len(images), samples).unbind(1)
    ]
    modules = {name: net.get_submodule(name) for name in LAYERS}
    found = gradient_shap(net, loss, modules, labels, draws)
    for name in LAYERS:
        np.random.seed(3)
        expected = LayerGradientShap(per_image, net.get_submodule(name)).attribute(
            images, starts, n_samples=samples, stdevs=0.0, additional_forward_args=labels
        )
        assert expected.abs().max() > 1e-4
        assert torch.allclose(found[name][0], expected.detach(), rtol=1e-4, atol=1e-7)


def test_gradient_shap_scores() -> None:
    net = make_net(True)
    assert scores(net, LAYERS, score="gradient_shap") == scores(net, LAYERS, score="gradient_shap")
    found = [
        scores(net, LAYERS, score="gradient_shap", **options)
        for options in (
            {},
            {"n_samples": 1},
            {"baselines": "images"},
            {"stdev": 0.1},
            {"seed": 1},
        )
    ]
    assert len({result["stem"] for result in found}) == len(found)
    for result in found:
        assert list(result) == LAYERS and min(result.values()) > 0
    # The first convolution's output moves in a straight line from baseline to image, so that over
    # many points its attributions add up to the change of the loss.
    images, labels = Task().calibration_batches()[0]
    net.eval()
    starts = torch.zeros_like(images)
    draws = [(images, starts, torch.full((3,), (i + 0.5) / 200)) for i in range(200)]
    found_sum = gradient_shap(
        net, lambda m, x, y: F.cross_entropy(m(x), y), {"stem": net.stem}, labels, draws
    )["stem"][0].sum()
    change = F.cross_entropy(net(images), labels) - F.cross_entropy(net(starts), labels)
    assert found_sum.item() == pytest.approx(change.item(), rel=1e-2)


def test_layer_l1_and_random() -> None:
    net = make_net(False)
    l1 = scores(net, ["stem", "block", "norm"], score="layer_l1")
    kernel = net.stem.weight.detach().abs()
    assert l1["stem"] == pytest.approx(kernel.sum().item(), rel=1e-6)
    assert l1["block"] == pytest.approx(net.block.conv.weight.detach().abs().sum().item())
    assert l1["norm"] == 0
    mean = scores(net, ["stem"], score="layer_l1", reduce="mean")
    assert mean["stem"] == pytest.approx(kernel.mean().item(), rel=1e-6)
    first, again, other = (scores(net, LAYERS, seed, score="random") for seed in (0, 0, 1))
    assert first == again != other and len(set(first.values())) == len(LAYERS)


@pytest.mark.parametrize("score", ["grad_x_act", "gradient_shap", "layer_l1", "random"])
def test_the_model_is_left_as_it_was(score: str) -> None:
    net = make_net(True).train()
    net.norm.eval()
    net.head.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    task = Task()
    images = task.images.clone()
    score_layers(net, task, LAYERS, score=score, generator=torch.Generator())  # type: ignore
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
    assert flags == [p.requires_grad for p in net.parameters()]
    assert modes == [m.training for m in net.modules()]
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(images, task.images)


def test_all_layers_take_one_pass_forward_and_one_backward_a_batch() -> None:
    net = make_net(False)

    def flops(layers: list[str]) -> int:
        with FlopCounterMode(display=False) as counter:
            scores(net, layers)
        return counter.get_total_flops()

    assert flops(LAYERS) == flops(["stem"]) > 0


def test_a_detector_is_scored_by_the_sum_of_its_losses() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)
    )
    backbone.out_channels = 8  # type: ignore[assignment]
    model = torchvision.models.detection.FasterRCNN(
        backbone,
        num_classes=3,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=torchvision.models.detection.rpn.AnchorGenerator(
            ((8, 16),), ((1.0,),)
        ),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2),
        box_detections_per_img=5,
        rpn_pre_nms_top_n_train=50,
    )
    targets = [{"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}] * 2
    images = list(torch.rand(2, 3, 32, 32))

    class Detection:
        def calibration_batches(self) -> list[Any]:
            return [(images, targets)]

        def training_loss(self, model: Any, images: Any, target: Any, /) -> Any:
            raise AssertionError

    before = copy.deepcopy(model.state_dict())
    layers = ["backbone.0", "backbone.3", "rpn.head.conv", "roi_heads.box_head.fc6"]
    found, again = (
        score_layers(
            model,
            Detection(),
            layers,
            generator=torch.Generator().manual_seed(0),
            batch_loss=detector_losses,
        )
        for _ in range(2)
    )
    assert found == again and min(found.values()) > 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert all(module.training for module in model.modules())
    # The same by captum, with the same proposals drawn.
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))

    def total(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return sum(detector_losses(model, list(x), targets).values()).view(1)  # type: ignore

    for name in layers[:2]:
        product = LayerGradientXActivation(total, model.get_submodule(name)).attribute(
            torch.stack(images)
        )
        assert found[name] == pytest.approx(product.abs().sum().item(), rel=1e-4)


def test_wrong_input_is_refused() -> None:
    net = make_net(False)
    for options, message in [
        ({"layers": ["stam"]}, r"`layers` \(=stam\).*Did you mean `stem`"),
        ({"layers": [""]}, "`layers`"),
        ({"score": "grad_x"}, "`layers.score` .*Did you mean `grad_x_act`"),
        ({"reduce": "max"}, "`layers.reduce`"),
        ({"baselines": "black"}, "`layers.baselines`"),
        ({"n_samples": 0}, "`layers.n_samples` .* from 1 up"),
        ({"stdev": -1.0}, "`layers.stdev`"),
    ]:
        with pytest.raises(ValueError, match=message):
            scores(net, **{"layers": ["stem"], **options})
    with pytest.raises(ValueError, match="must return one tensor"):
        scores(nn.Sequential(Pair(), First(), nn.Flatten(), nn.Linear(108, 4)), ["0"])
    nn.init.constant_(net.head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"`layers` \(=stem\) must have a finite score"):
        scores(net, ["stem"])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


def random_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def test_units_of_a_resnet() -> None:
    model = build_model("resnet20", num_classes=10)
    images = torch.randn(2, 3, 16, 16)
    units = bypassable_layers(model, images)
    assert set(removable_blocks(model, images, valid="residual")) < set(units)
    layers = {name: modules for name, modules in units.items() if len(modules) > 1}
    assert layers == {
        f"layer{i}.0.conv2": (f"layer{i}.0.conv2", f"layer{i}.0.bn2") for i in (2, 3)
    }
    assert list(units)[:4] == ["layer1.0", "layer1.1", "layer1.2", "layer2.0.conv2"]


@pytest.mark.parametrize(
    ("name", "some", "never"),
    [
        ("vgg16_cifar", 8, ""),
        ("torchvision:shufflenet_v2_x0_5", 13, "conv1.0"),
        ("torchvision:mobilenet_v2", 10, "features.0.0"),
        # behind an identity, `out += identity` would overwrite what the ReLU keeps for backward
        ("torchvision:resnet18", 5, "layer2.0.conv2"),
    ],
)
def test_each_unit_and_all_together_can_go(name: str, some: int, never: str) -> None:
    torch.manual_seed(0)
    model = random_norms(build_model(name, num_classes=10))
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    units = bypassable_layers(model, images)
    assert len(units) >= some and never not in units
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    pairs = list(chain.from_iterable(units.values()))
    assert len(pairs) == len(set(pairs))
    assert not any(a.startswith(f"{b}.") for a in pairs for b in pairs)

    def flops(candidate: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            candidate.train()(images).sum().backward()
        return counter.get_total_flops()

    assert flops(bypass(copy.deepcopy(model), pairs)) < flops(model)


def test_neighbours_in_front_of_operations_in_place() -> None:
    """Two ReLUs in place, one behind the other, would overwrite what backward needs."""
    layers = [[nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True)] for _ in range(3)]
    layers[0][0] = nn.Conv2d(3, 6, 1)
    model = nn.Sequential(
        *chain.from_iterable(layers), nn.Flatten(), nn.Linear(96, 96), nn.Linear(96, 4)
    )
    images = torch.randn(2, 3, 4, 4)
    expected = model[8](model[7](model[6](model[1](model[0](images)))))
    units = bypassable_layers(model, images)
    assert units == {"2": ("2",), "4": ("4",), "7": ("7",)}
    assert model[1].inplace
    bypass(model, ["2", "4"])
    assert torch.equal(model(images), expected)
    model(images).sum().backward()


def test_a_bypassed_layer_passes_its_input_on() -> None:
    model = random_norms(build_model("resnet20", num_classes=10)).eval()
    images = torch.randn(2, 3, 16, 16)
    block = model.get_submodule("layer2.0")
    entered: list[Tensor] = []
    with torch.no_grad():
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        model(images)
        middle = F.relu(block.bn1(block.conv1(entered[0])))  # type: ignore[operator]
        expected = F.relu(middle + block.shortcut(entered[0]))  # type: ignore[operator]
        bypass(model, ["layer2.0.conv2", "layer2.0.bn2"])
        assert torch.equal(block(entered[0]), expected)


def test_zero_keeps_the_architecture_and_lasts() -> None:
    torch.manual_seed(0)
    model = random_norms(build_model("resnet20", num_classes=10)).eval()
    images = torch.randn(4, 3, 16, 16)
    units = bypassable_layers(model, images)
    dense = copy.deepcopy(model)
    names = [*units["layer2.0.conv2"], "layer1.1"]
    zero(model, names)
    outputs: list[Tensor] = []
    model.get_submodule("layer2.0.bn2").register_forward_hook(lambda *a: outputs.append(a[2]))
    with torch.no_grad():
        zeroed = model(images)
    # A residual block that adds nothing is an identity, behind a ReLU.
    other = zero(remove_blocks(dense, ["layer1.1"]), units["layer2.0.conv2"])
    assert torch.equal(zeroed, other(images))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    assert len(outputs) == 3 and not any(output.any() for output in outputs)
    fresh = build_model("resnet20", num_classes=10)
    fresh.load_state_dict(model.state_dict())
    assert not fresh.get_submodule("layer2.0.bn2").weight.any()  # type: ignore[operator]


@pytest.mark.parametrize("change", [bypass, zero])
def test_unknown_modules_are_refused(change: Any) -> None:
    net = make_net(False)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"`modules` \(=blok\).*Did you mean `block`"):
        change(net, ["stem", "blok"])
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True)
    )
    assert isinstance(net.stem, nn.Conv2d)
    change(net, ["block.conv", "block", "block.conv"])  # what lies inside goes with it
    net(torch.randn(1, 3, 6, 6))
