"""The contract of every criterion, and its numbers against explicit loops."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunesearch.methods.criteria import (
    CRITERIA,
    describe,
    score_channels,
    validate_options,
)
from prunesearch.methods.criteria.features import find_activations, observed

torch.set_num_threads(1)

NUM_CLASSES = 3
LAYERS = ["stem", "block.conv1", "block.conv2", "up", "fc1", "fc2"]
FGP_OPTIONS = {
    "feature_point": ["conv", "act"],
    "class_agg": ["sum", "min", "mean"],
    "presence": ["predicted", "label"],
    "map_norm": ["none", "layer_max"],
    "criterion": ["both", "feature_only", "gradient_only"],
    "classes": [None, [2, 0]],
}


class Block(nn.Module):
    """A residual block whose one ReLU is used twice, in place, and whose sum is in place."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """Every kind of layer that can be scored, dropout, functional and in-place activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(5, NUM_CLASSES)
        self.spare = nn.Conv2d(3, 2, 1)  # never run

    def forward(self, x):
        x = self.block(F.relu(self.stem(x), inplace=True))
        x = F.silu(self.norm(self.up(x))).mean((2, 3))
        return self.fc2(self.drop(torch.tanh(self.fc1(x))))


@dataclass
class Task:
    batches: list
    num_classes: int = NUM_CLASSES

    def calibration_batches(self):
        return self.batches

    def loss(self, logits, target):
        return F.cross_entropy(logits, target)


def make_model():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 2)
                module.bias.normal_()
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.3, 1.0)
        model.eval()
        images = torch.cat([images for images, _ in make_task().batches])
        model.fc2.bias -= model(images).mean(0)  # so that every class is predicted for an image
    return model


def make_task():
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.randn(11, 3, 6, 6, generator=generator)
    labels = torch.arange(11) % NUM_CLASSES
    return Task([(images[:6], labels[:6]), (images[6:], labels[6:])])


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def task():
    return make_task()


@pytest.fixture(params=CRITERIA)
def name(request):
    return request.param


# ---- the contract -------------------------------------------------------------------------


def test_scores_have_the_shape_and_range_of_the_contract(name, model, task):
    scores = score_channels(name, model, task, LAYERS, seed=0, options={})
    assert list(scores) == LAYERS
    for layer, width in zip(LAYERS, [4, 4, 4, 6, 5, 3], strict=True):
        assert scores[layer].shape == (width,)
        assert scores[layer].dtype == torch.float32 and scores[layer].device.type == "cpu"
        assert scores[layer].isfinite().all() and (scores[layer] >= 0).all()
        assert not scores[layer].requires_grad
        assert scores[layer].unique().numel() > 1, "scores must tell channels apart"


def test_scores_are_decided_by_the_seed_alone(name, model, task):
    first = score_channels(name, model, task, LAYERS, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = score_channels(name, model, task, LAYERS, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    assert all(torch.equal(first[layer], second[layer]) for layer in LAYERS)
    other = score_channels(name, model, task, LAYERS, seed=4)
    same = all(torch.equal(first[layer], other[layer]) for layer in LAYERS)
    assert same == (name != "random")


def test_a_model_that_is_always_random_is_scored_reproducibly(name, model, task):
    model.drop.forward = lambda x: F.dropout(x, 0.5, training=True)
    runs = [score_channels(name, model, task, ["stem"], seed=5)["stem"] for _ in range(2)]
    assert torch.equal(*runs)


def test_the_model_is_left_as_it_was(name, model, task):
    model.train()
    model.block.bn1.eval()
    model.stem.weight.requires_grad_(False)
    model.fc1.weight.grad = torch.full_like(model.fc1.weight, 7.0)
    calls = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    before, images = snapshot(model), task.batches[0][0].clone()
    score_channels(name, model, task, LAYERS, seed=0)
    assert_same(before, snapshot(model))
    assert torch.equal(task.batches[0][0], images) and not task.batches[0][0].requires_grad


def test_the_model_is_left_as_it_was_when_its_forward_fails(name, model, task):
    if name in ("random", "magnitude_l1", "magnitude_l2"):
        pytest.skip("reads no data, so runs no forward")
    model.train()
    task.batches[1] = (torch.zeros(2, 5, 6, 6), torch.zeros(2, dtype=torch.int64))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="channels"):
        score_channels(name, model, task, LAYERS, seed=0)
    assert_same(before, snapshot(model))


def test_training_mode_and_frozen_parameters_change_no_score(name, model, task):
    expected = score_channels(name, model, task, LAYERS, seed=0)
    model.train().requires_grad_(False)
    scores = score_channels(name, model, task, LAYERS, seed=0)
    for layer in LAYERS:
        torch.testing.assert_close(scores[layer], expected[layer])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_outer_gradient_mode_does_not_matter(name, mode, model, task):
    expected = score_channels(name, model, task, LAYERS, seed=0)
    with mode():
        scores = score_channels(name, model, task, LAYERS, seed=0)
    assert all(torch.equal(scores[layer], expected[layer]) for layer in LAYERS)


def test_a_layer_scores_the_same_alone(name, model, task):
    together = score_channels(name, model, task, LAYERS, seed=0)
    if name == "random":
        pytest.skip("draws layer after layer")
    alone = score_channels(name, model, task, ["block.conv2"], seed=0)
    torch.testing.assert_close(alone["block.conv2"], together["block.conv2"])


def test_a_layer_that_does_not_run_scores_zero_where_data_is_read(name, model, task):
    scores = score_channels(name, model, task, ["spare", "stem"], seed=0)["spare"]
    assert scores.shape == (2,)
    assert (name in ("taylor", "fgp")) == bool((scores == 0).all())


def test_a_model_that_overwrites_its_input_does_not_spoil_the_task(name, model, task):
    batches = [(images.clone(), labels) for images, labels in task.batches]
    overwriting = nn.Sequential(nn.ReLU(inplace=True), model)
    for options in [{}, {"feature_point": "act"}] if name == "fgp" else [{}]:
        score_channels(name, overwriting, task, ["1.stem"], options=options)
    for (images, _), (before, _) in zip(task.batches, batches, strict=True):
        assert torch.equal(images, before)


def test_a_nan_in_the_model_is_an_error(name, model, task):
    if name == "random":
        pytest.skip("looks at no weight")
    with torch.no_grad():
        model.stem.weight[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"`criterion` \(='.*'\) must give finite scores"):
        score_channels(name, model, task, ["stem"], seed=0)


def test_every_criterion_has_a_description(name):
    line = describe(name)
    assert line.endswith((".", ").")) or ":" in line
    assert "\n" not in line and 20 < len(line) < 100


def test_errors_name_the_field_the_value_and_the_nearest(model, task):
    with pytest.raises(ValueError, match=r"`criterion` \(='tailor'\) .*'taylor'\?"):
        score_channels("tailor", model, task, LAYERS, seed=0)
    with pytest.raises(ValueError, match=r"`fgp.clas_agg` \(='sum'\) .*'class_agg'\?"):
        validate_options("fgp", {"clas_agg": "sum"})
    with pytest.raises(ValueError, match=r"`fgp.class_agg` \(='max'\) must be one of sum, min"):
        validate_options("fgp", {"class_agg": "max"})
    with pytest.raises(ValueError, match=r"`taylor.classes` \(=1\) must be an option"):
        validate_options("taylor", {"classes": 1})
    for classes in ([], "01", 1, [0, True], [0.0]):
        with pytest.raises(ValueError, match=r"`fgp.classes` .* must be a list of class indices"):
            validate_options("fgp", {"classes": classes})
    with pytest.raises(ValueError, match=r"from 0 to 2: 3 is not one"):
        score_channels("fgp", model, task, LAYERS, options={"classes": [0, 3]})
    with pytest.raises(ValueError, match=r"`layers` \(='block.conv9'\) .*'block.conv"):
        score_channels("random", model, task, ["block.conv9"])
    with pytest.raises(ValueError, match="it is a BatchNorm2d"):
        score_channels("random", model, task, ["norm"])


# ---- the numbers ----------------------------------------------------------------------------


def test_magnitude_by_hand():
    conv = nn.Conv2d(1, 2, (1, 2))
    up = nn.ConvTranspose2d(4, 4, 1, groups=2)  # two inputs and two outputs a group
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[3.0, -4.0]]], [[[0.0, 2.0]]]]))
        conv.bias.fill_(100)
        # rows are inputs; inputs 0 and 1 feed outputs 0 and 1, inputs 2 and 3 outputs 2 and 3
        weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, -8.0]])
        up.weight.copy_(weight[:, :, None, None])
    model = nn.Sequential(conv, up)
    l1 = score_channels("magnitude_l1", model, Task([]), ["0", "1"])
    l2 = score_channels("magnitude_l2", model, Task([]), ["0", "1"])
    assert l1["0"].tolist() == [7, 2] and l2["0"].tolist() == [5, 2]
    assert l1["1"].tolist() == [4, 6, 12, 14]
    torch.testing.assert_close(l2["1"], torch.tensor([10.0, 20.0, 74.0, 100.0]).sqrt())


def test_taylor_equals_an_explicit_autograd_computation(model, task):
    scores = score_channels("taylor", model, task, LAYERS)
    owned = {
        "stem": ["stem.weight", "stem.bias"],
        "block.conv1": ["block.conv1.weight", "block.bn1.weight", "block.bn1.bias"],
        "block.conv2": ["block.conv2.weight", "block.bn2.weight", "block.bn2.bias"],
        "up": ["up.weight", "up.bias", "norm.weight", "norm.bias"],
        "fc1": ["fc1.weight", "fc1.bias"],
        "fc2": ["fc2.weight", "fc2.bias"],
    }
    expected = {layer: torch.zeros(len(scores[layer])) for layer in LAYERS}
    for images, target in task.batches:
        model.zero_grad()
        F.cross_entropy(model(images), target).backward()
        parameters = dict(model.named_parameters())
        for layer in LAYERS:
            for channel in range(len(scores[layer])):
                for key in owned[layer]:
                    values = (parameters[key] * parameters[key].grad).detach() ** 2
                    if key == "up.weight":  # [in 4, out 3 a group]: inputs 0-1 feed outputs 0-2
                        group, inside = divmod(channel, 3)
                        values = values[2 * group : 2 * group + 2, inside]
                    else:
                        values = values[channel]
                    expected[layer][channel] += values.sum() / len(task.batches)
    for layer in LAYERS:
        torch.testing.assert_close(scores[layer], expected[layer], rtol=1e-5, atol=0)


def unrolled(model, image):
    """`Net.forward` written out, every feature kept: ({layer: (conv, act)}, logits)."""
    block = model.block
    stem = model.stem(image)
    stem_act = stem.relu()
    conv1 = block.conv1(stem_act)
    conv1_act = block.bn1(conv1).relu()
    conv2 = block.conv2(conv1_act)
    conv2_act = block.bn2(conv2)  # the sum ends the way
    up = model.up((conv2_act + stem_act).relu())
    up_act = F.silu(model.norm(up))
    fc1 = model.fc1(up_act.mean((2, 3)))
    fc1_act = fc1.tanh()
    fc2 = model.fc2(fc1_act)
    features = [(stem, stem_act), (conv1, conv1_act), (conv2, conv2_act), (up, up_act)]
    features += [(fc1, fc1_act), (fc2, fc2)]
    return dict(zip(LAYERS, features, strict=True)), fc2


def reference_heat(model, task, feature_point, presence, map_norm, criterion):
    """One image and one class at a time: {layer: {class: [heat of each image, [C]]}}."""
    heats = {layer: {d: [] for d in range(NUM_CLASSES)} for layer in LAYERS}
    for images, labels in task.batches:
        for image, label in zip(images, labels, strict=True):
            for d in range(NUM_CLASSES):
                features, logits = unrolled(model, image[None])
                if d != (logits.argmax() if presence == "predicted" else label):
                    continue
                for layer in LAYERS:
                    feature = features[layer][feature_point == "act"]
                    (gradient,) = torch.autograd.grad(logits[0, d], feature, retain_graph=True)
                    maps = feature.detach()[0].flatten(1) if feature.ndim == 4 else feature.T
                    weight = gradient[0].flatten(1) if feature.ndim == 4 else gradient.T
                    weight = weight.mean(1, keepdim=True)
                    if criterion == "both":
                        maps = (weight * maps).relu()
                    elif criterion == "feature_only":
                        maps = maps.abs()
                    else:
                        maps = weight.abs()
                    if map_norm == "layer_max" and maps.max() > 0:
                        maps = maps / maps.max()
                    heats[layer][d].append(maps.detach().sum(1))
    return heats


@pytest.mark.parametrize("criterion", FGP_OPTIONS["criterion"])
@pytest.mark.parametrize("feature_point", FGP_OPTIONS["feature_point"])
def test_fgp_equals_an_explicit_loop_over_images_and_classes(feature_point, criterion, task):
    model = make_model()
    rest = [FGP_OPTIONS[key] for key in ("presence", "map_norm", "class_agg", "classes")]
    for presence, map_norm in itertools.product(*rest[:2]):
        heats = reference_heat(model, task, feature_point, presence, map_norm, criterion)
        assert all(heats["stem"].values()), "every class must have an image"
        for class_agg, classes in itertools.product(*rest[2:]):
            options = dict(
                feature_point=feature_point, criterion=criterion, presence=presence,
                map_norm=map_norm, class_agg=class_agg, classes=classes,
            )  # fmt: skip
            scores = score_channels("fgp", model, task, LAYERS, options=options)
            for layer in LAYERS:
                used = range(NUM_CLASSES) if classes is None else classes
                means = torch.stack([torch.stack(heats[layer][d]).mean(0) for d in used])
                expected = {"sum": means.sum(0), "min": means.amin(0), "mean": means.mean(0)}
                torch.testing.assert_close(
                    scores[layer], expected[class_agg], rtol=1e-5, atol=1e-7, msg=f"{options}"
                )


class Branching(nn.Module):
    """The batch norm's result has two users, so neither sigmoid nor ReLU is the activation."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), use

    def forward(self, x):
        return self.use(self.norm(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.cat([x, x.relu()], 1),
        lambda x: x.mean((2, 3), keepdim=True) + x.relu_(),
        lambda x: F.max_pool2d(x, 2).relu(),
    ],
)
def test_an_activation_is_followed_only_while_it_is_the_only_user(use, task):
    model, seen = Branching(use).eval(), []
    images = task.batches[0][0]
    activations = find_activations(model, ["conv"], images[:1])
    with observed(model, ["conv"], lambda name, f: seen.append((name, f.clone())), activations):
        model(images)
    ((name, feature),) = seen
    assert name == "conv"
    torch.testing.assert_close(feature, model.norm(model.conv(images)))


def test_fgp_options_change_the_scores(model, task):
    """Each value of each option gives other scores, so no option is ignored."""
    default = score_channels("fgp", model, task, ["block.conv1"])["block.conv1"]
    for option, values in FGP_OPTIONS.items():
        for value in values[1:]:
            scores = score_channels("fgp", model, task, ["block.conv1"], options={option: value})
            assert not torch.allclose(scores["block.conv1"], default), (option, value)


def test_fgp_does_not_depend_on_how_images_are_batched(model, task):
    images, labels = (torch.cat(parts) for parts in zip(*task.batches, strict=True))
    single = Task(
        [(image[None], label[None]) for image, label in zip(images, labels, strict=True)]
    )
    one, many = (score_channels("fgp", model, t, LAYERS) for t in (single, task))
    for layer in LAYERS:
        torch.testing.assert_close(one[layer], many[layer], rtol=1e-5, atol=1e-7)


def test_fgp_leaves_out_classes_without_images(model, task):
    few = Task([(task.batches[0][0], torch.tensor([0, 0, 2, 2, 0, 2]))])
    options = {"presence": "label", "class_agg": "min"}
    scores = score_channels("fgp", model, few, ["stem"], options=options)["stem"]
    named = score_channels("fgp", model, few, ["stem"], options={**options, "classes": [0, 2]})
    assert torch.equal(scores, named["stem"]) and scores.max() > 0
    with pytest.raises(ValueError, match="no image has one of them"):
        score_channels("fgp", model, few, ["stem"], options={**options, "classes": [1]})


class CountBackward(torch.autograd.Function):
    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        CountBackward.passes += 1
        return gradient


@pytest.mark.parametrize(("point", "traces"), [("conv", 0), ("act", 1)])
def test_fgp_costs_one_forward_and_backward_a_batch(point, traces, model, task):
    passes = []
    forward = model.block.forward
    model.block.forward = lambda x: passes.append(len(x)) or CountBackward.apply(forward(x))
    CountBackward.passes = 0
    score_channels("fgp", model, task, LAYERS, options={"feature_point": point})
    assert passes == [1] * traces + [6, 5]  # to find the activations, one image once
    assert CountBackward.passes == 2


def test_fgp_adds_up_the_calls_of_a_shared_layer(task):
    torch.manual_seed(0)
    first, shared, last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, NUM_CLASSES)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    twin = copy.deepcopy(shared)
    parts = [first, nn.ReLU(), shared, nn.ReLU(), shared, pool, last]
    split = [first, nn.ReLU(), shared, nn.ReLU(), twin, pool, last]
    together = score_channels("fgp", nn.Sequential(*parts), task, ["2"])["2"]
    apart = score_channels("fgp", nn.Sequential(*split), task, ["2", "4"])
    torch.testing.assert_close(together, apart["2"] + apart["4"])


def test_fgp_refuses_a_model_that_is_no_differentiable_classifier(model, task):
    with pytest.raises(ValueError, match=r"needs logits \[batch, 3\], and the model gives \[6, 4"):
        score_channels("fgp", nn.Sequential(model.stem), task, ["0"])
    model.block.forward = lambda x: x.detach()
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        score_channels("fgp", model, task, ["stem"])


def snapshot(model):
    """Everything of a model that scoring must not change."""
    state = {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "parameters": {key: id(value) for key, value in model.named_parameters()},
        "requires_grad": {key: value.requires_grad for key, value in model.named_parameters()},
        "training": {key: module.training for key, module in model.named_modules()},
        "hooks": {
            key: [len(value) for attr, value in vars(module).items() if attr.endswith("_hooks")]
            for key, module in model.named_modules()
        },
        "attributes": {key: sorted(vars(module)) for key, module in model.named_modules()},
    }
    grads = {key: value.grad for key, value in model.named_parameters()}
    state["grads"] = {k: None if grad is None else grad.clone() for k, grad in grads.items()}
    return state


def assert_same(before, after):
    for key in before:
        if key in ("tensors", "grads"):
            assert before[key].keys() == after[key].keys()
            for name, value in before[key].items():
                other = after[key][name]
                assert (value is other is None) or torch.equal(value, other), (key, name)
        else:
            assert before[key] == after[key], key
