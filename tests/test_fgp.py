"""FGP's scores against explicit loops over images and classes, for classifiers and segmenters."""

import copy
import itertools

import pytest
import torch
from criterion_nets import FGP_OPTIONS, LAYERS, NUM_CLASSES, Task, make_model, make_task, unrolled
from torch import nn
from torch.nn import functional as F

from prunesearch.methods.criteria import score_channels
from prunesearch.methods.criteria.features import find_activations, observed

torch.set_num_threads(1)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def task():
    return make_task()


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
    with pytest.raises(ValueError, match=r"gives \[6, 4"):
        score_channels("fgp", nn.Sequential(model.stem), task, ["0"])
    model.block.forward = lambda x: x.detach()
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        score_channels("fgp", model, task, ["stem"])


# ---- segmentation ----------------------------------------------------------------------------


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.up = nn.ConvTranspose2d(5, 4, 2, stride=2)
        self.head = nn.Conv2d(4, NUM_CLASSES, 1)

    def features(self, x):
        down = self.down(x)
        down_act = self.norm(down).relu()
        up = self.up(down_act)
        up_act = F.relu(up)
        head = self.head(up_act)
        return {"down": (down, down_act), "up": (up, up_act), "head": (head, head)}

    def forward(self, x):
        return self.head(F.relu(self.up(self.norm(self.down(x)).relu())))


def segmentation():
    torch.manual_seed(0)
    model = Segmenter().eval()
    images = torch.randn(5, 3, 6, 6)
    labels = torch.randint(0, NUM_CLASSES, (5, 6, 6))
    labels[0] = labels[0].clamp(max=1)  # an image without class 2
    labels[1, :3] = 255  # to be ignored
    with torch.no_grad():
        model.head.bias -= model(images).mean((0, 2, 3))
    return model, Task([(images[:3], labels[:3]), (images[3:], labels[3:])])


@pytest.mark.parametrize("presence", FGP_OPTIONS["presence"])
@pytest.mark.parametrize("feature_point", FGP_OPTIONS["feature_point"])
@pytest.mark.parametrize("criterion", FGP_OPTIONS["criterion"])
def test_fgp_of_a_segmentation_model_equals_a_loop(criterion, feature_point, presence):
    model, task = segmentation()
    options = {"criterion": criterion, "feature_point": feature_point, "presence": presence}
    for class_agg in FGP_OPTIONS["class_agg"]:
        options["class_agg"] = class_agg
        scores = score_channels("fgp", model, task, ["down", "up", "head"], options=options)
        for layer in scores:
            heats = {d: [] for d in range(NUM_CLASSES)}
            for images, labels in task.batches:
                for image, label in zip(images, labels, strict=True):
                    for d in range(NUM_CLASSES):
                        features = model.features(image[None])
                        logits, feature = (
                            features["head"][0],
                            features[layer][feature_point == "act"],
                        )
                        classes = logits[0].argmax(0) if presence == "predicted" else label
                        inside = (classes == d).nonzero().tolist()
                        if not inside:
                            continue
                        p_d = sum(logits[0, d, u, v] for u, v in inside)
                        weight = torch.autograd.grad(p_d, feature)[0][0].mean((1, 2))[
                            :, None, None
                        ]
                        maps = {
                            "both": (weight * feature[0]).relu(),
                            "feature_only": feature[0].abs(),
                            "gradient_only": weight.abs(),
                        }[criterion]
                        heats[d].append(maps.detach().sum((1, 2)))
            means = torch.stack([torch.stack(heat).mean(0) for heat in heats.values()])
            expected = {"sum": means.sum(0), "min": means.amin(0), "mean": means.mean(0)}
            torch.testing.assert_close(scores[layer], expected[class_agg], rtol=1e-5, atol=1e-6)


def test_fgp_of_a_segmentation_model_costs_a_backward_pass_for_each_class_present():
    model, task = segmentation()
    task.batches[1][1][:] = 1  # the first batch has three classes, and the second one
    up = model.up.forward
    model.up.forward = lambda x: CountBackward.apply(up(x))
    CountBackward.passes = 0
    score_channels("fgp", model, task, ["down"], options={"presence": "label"})
    assert CountBackward.passes == 3 + 1


def test_fgp_refuses_label_maps_of_another_size():
    model, task = segmentation()
    task.batches = [(images, labels[:, :3]) for images, labels in task.batches]
    with pytest.raises(
        ValueError, match=r"labels are \[3, 3, 6\], the model's outputs \[3, 6, 6\]"
    ):
        score_channels("fgp", model, task, ["down"], options={"presence": "label"})
    score_channels("fgp", model, task, ["down"])
