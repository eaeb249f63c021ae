"""The numbers of the criteria against hand-worked ones and explicit loops (FGP: test_fgp.py)."""

import copy

import pytest
import torch
import torch_pruning as tp
from criterion_nets import LAYERS, NUM_CLASSES, Task, make_model, make_task, unrolled
from torch import nn
from torch.nn import functional as F

from prunesearch.methods.criteria import score_channels
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import Recipe, apply, group_scores
from prunesearch.methods.tasks.no_data import NoData
from prunesearch.search.bench.criteria import MOST_PASSES, bench_criteria, criteria_table

torch.set_num_threads(1)

OWNED = {
    "stem": ["stem.weight", "stem.bias"],
    "block.conv1": ["block.conv1.weight", "block.bn1.weight", "block.bn1.bias"],
    "block.conv2": ["block.conv2.weight", "block.bn2.weight", "block.bn2.bias"],
    "up": ["up.weight", "up.bias", "norm.weight", "norm.bias"],
    "fc1": ["fc1.weight", "fc1.bias"],
    "fc2": ["fc2.weight", "fc2.bias"],
}


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def task():
    return make_task()


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
    expected = {layer: torch.zeros(len(scores[layer])) for layer in LAYERS}
    for images, target in task.batches:
        model.zero_grad()
        F.cross_entropy(model(images), target).backward()
        parameters = dict(model.named_parameters())
        for layer in LAYERS:
            for channel in range(len(scores[layer])):
                for key in OWNED[layer]:
                    values = (parameters[key] * parameters[key].grad).detach() ** 2
                    if key == "up.weight":  # [in 4, out 3 a group]: inputs 0-1 feed outputs 0-2
                        group, inside = divmod(channel, 3)
                        values = values[2 * group : 2 * group + 2, inside]
                    else:
                        values = values[channel]
                    expected[layer][channel] += values.sum() / len(task.batches)
    for layer in LAYERS:
        torch.testing.assert_close(scores[layer], expected[layer], rtol=1e-5, atol=0)


# ---- what reads no data ---------------------------------------------------------------------


def batch_norm_resnet():
    """A ResNet-20 with projections, whose batch norms all differ."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 2)
    return model


@pytest.fixture(scope="module")
def resnet():
    """The model, its plan, and its groups as torch-pruning has them."""
    model, images = batch_norm_resnet(), torch.randn(2, 3, 16, 16)
    graph = tp.DependencyGraph().build_dependency(
        model, images, unwrapped_parameters=[], customized_pruners={}, ignored_layers=[]
    )
    plan = plan_pruning(model, images)
    groups = {
        group.name: graph.get_pruning_group(
            model.get_submodule(group.name),
            tp.prune_conv_out_channels,
            list(range(group.num_channels)),
        )
        for group in plan.groups
    }
    return model, plan, groups


def scores_of_groups(name, resnet, **options):
    model, plan, _ = resnet
    task = NoData((3, 16, 16))
    layers = score_channels(name, model, task, plan.layers, options=options)
    return {group.name: group_scores(group, layers) for group in plan.groups}


def test_slimming_equals_torch_pruning(resnet):
    importance = tp.importance.BNScaleImportance(normalizer=None)
    for name, scores in scores_of_groups("slimming", resnet).items():
        torch.testing.assert_close(scores.float(), importance(resnet[2][name]), rtol=1e-6, atol=0)


def test_slimming_takes_the_weights_of_a_layer_without_a_scale():
    plain, scaled = nn.Conv2d(1, 2, (1, 2)), nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[[[3.0, -4.0]]], [[[0.0, 2.0]]]]))
    for between in (nn.ReLU(), nn.BatchNorm2d(2, affine=False), nn.MaxPool2d(1)):
        norm = nn.BatchNorm2d(2)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([-0.5, 0.25]))
        model = nn.Sequential(plain, between, scaled, norm)
        scores = score_channels("slimming", model, NoData((1, 4, 4)), ["0", "2"])
        assert scores["0"].tolist() == [5, 2] and scores["2"].tolist() == [0.5, 0.25]


def test_lamp_by_hand_and_as_torch_pruning_has_it(resnet):
    layer = nn.Linear(1, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [-1.0], [3.0], [1.0]]))
    scores = score_channels("lamp", nn.Sequential(layer), NoData((1,)), ["0"])["0"]
    expected = torch.tensor([4 / 13, 1 / 15, 9 / 9, 1 / 14])  # of the equal ones the first is less
    torch.testing.assert_close(scores, expected)
    nn.init.zeros_(layer.weight)
    assert (
        score_channels("lamp", nn.Sequential(layer), NoData((1,)), ["0"])["0"].tolist() == [0] * 4
    )
    model, plan, groups = resnet
    scores = score_channels("lamp", model, NoData(), plan.layers)
    importance = tp.importance.LAMPImportance(group_reduction="first")  # the layer's own filters
    for name, group in groups.items():
        torch.testing.assert_close(scores[name], importance(group), rtol=1e-4, atol=0)


@pytest.mark.parametrize("normalize", ["mean", "none"])
def test_group_norm_equals_torch_pruning(normalize, resnet):
    importance = tp.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer="mean" if normalize == "mean" else None
    )
    for name, scores in scores_of_groups("group_norm", resnet, normalize=normalize).items():
        torch.testing.assert_close(scores.float(), importance(resnet[2][name]), rtol=1e-5, atol=0)


def test_group_norm_is_what_the_model_loses_with_the_channel(model, task):
    """Grouped and transposed convolutions, linear layers: torch-pruning errs on the first."""

    def energy(model):
        return sum(
            float(m.weight.detach().double().square().sum())
            for m in model.modules()
            if getattr(m, "weight", None) is not None
        )

    model.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
    scores = score_channels("group_norm", model, task, LAYERS, options={"normalize": "none"})
    plan = plan_pruning(model, task.example_input(2))
    assert [group.name for group in plan.groups] == ["stem", "block.conv1", "up", "fc1"]
    for group in plan.groups:
        columns = group.num_channels // group.parts
        values = group_scores(group, scores)[:columns]
        for column in range(columns):
            kept = [i for i in range(group.num_channels) if i % columns != column]
            pruned = apply(copy.deepcopy(model), plan, Recipe((), {group.name: tuple(kept)}))
            lost = energy(model) - energy(pruned)
            assert values[column].item() == pytest.approx(lost, rel=1e-5), (group.name, column)


def test_fpgm_equals_a_double_loop(model):
    with torch.no_grad():
        model.stem.weight[2] = model.stem.weight[0]  # two filters alike
    scores = score_channels("fpgm", model, NoData(), LAYERS)
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight.detach()
        if layer == "up":  # [in 4, out 3 a group]: inputs 0-1 feed outputs 0-2
            filters = [weight[2 * (c // 3) : 2 * (c // 3) + 2, c % 3] for c in range(6)]
        else:
            filters = list(weight)
        expected = torch.tensor(
            [sum((a - b).pow(2).sum().sqrt() for b in filters) for a in filters]
        )
        torch.testing.assert_close(scores[layer], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rounds", "keep"), [(1, 0.5), (7, 0.2), (30, 1.0)])
def test_synflow_equals_an_explicit_loop(rounds, keep):
    torch.manual_seed(0)
    conv, up, fc = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Linear(4, 3)
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), norm.running_mean.normal_()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(conv, norm, nn.ReLU(), up, nn.ReLU(), head, fc)

    def total(weights, masks):
        """The network written out; a channel that is cut off gives nothing."""
        x = torch.ones(1, 3, 5, 5, dtype=torch.float64)
        x = F.conv2d(x, weights[0], conv.bias.abs().double())
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt().view(
            -1, 1, 1
        ).double()
        x = x * norm.weight.abs()[:, None, None] + norm.bias.abs()[:, None, None]
        x = (x * masks[0].view(-1, 1, 1)).relu()
        x = F.conv_transpose2d(x, weights[1], up.bias.abs().double(), groups=2)
        x = (x * masks[1].view(-1, 1, 1)).relu().mean((2, 3))
        return ((x @ weights[2].T + fc.bias.abs()) * masks[2]).sum()

    def flows(masks):
        weights = [m.weight.detach().double().abs().requires_grad_() for m in (conv, up, fc)]
        gradients = torch.autograd.grad(total(weights, masks), weights)
        a, b, c = ((w * g).abs().detach() for w, g in zip(weights, gradients, strict=True))
        columns = [b[3 * (i // 2) : 3 * (i // 2) + 3, i % 2].sum() for i in range(4)]
        return [float(f) for f in (*a.sum((1, 2, 3)), *columns, *c.sum(1))]

    removed = []
    for i in range(rounds + 1):
        masks = torch.ones(13, dtype=torch.float64)
        masks[removed] = 0
        flow = flows(torch.split(masks, [6, 4, 3]))
        left = 0 if i == rounds else 13 * keep ** ((i + 1) / rounds)
        for channel in sorted(set(range(13)) - set(removed), key=flow.__getitem__):
            if 13 - len(removed) - 1 >= left - 1e-12:
                removed.append(channel)
    places = torch.empty(13)
    places[removed] = torch.arange(1.0, 14.0) / 13
    scores = score_channels(
        "synflow",
        model,
        NoData((3, 5, 5)),
        ["0", "3", "6"],
        options={"rounds": rounds, "keep": keep},
    )
    assert torch.equal(torch.cat(list(scores.values())), places)


def test_synflow_gives_nothing_to_what_no_flow_reaches():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # nobody reads channel 1
    scores = score_channels("synflow", model, NoData((3, 2, 2)), ["0", "2"])
    assert scores["0"][1] == 0 and (scores["0"][[0, 2, 3]] > 0).all() and (scores["2"] > 0).all()


# ---- what reads images ----------------------------------------------------------------------


@pytest.mark.parametrize("feature_point", ["conv", "act"])
@pytest.mark.parametrize("num_batches", [1, 5])
def test_hrank_equals_a_loop_over_maps(feature_point, num_batches, model, task):
    options = {"feature_point": feature_point, "num_batches": num_batches}
    scores = score_channels("hrank", model, task, LAYERS, options=options)
    images = torch.cat([images for images, _ in task.batches[:num_batches]])
    for index, layer in enumerate(LAYERS):
        expected = torch.zeros(len(scores[layer]))
        for image in images:
            feature = list(unrolled(model, image[None])[0].values())[index]
            for channel, map_ in enumerate(feature[feature_point == "act"][0].detach()):
                map_ = map_.reshape(1, 1) if map_.ndim == 0 else map_
                expected[channel] += torch.linalg.matrix_rank(map_) / len(images)
        torch.testing.assert_close(scores[layer], expected, rtol=1e-6, atol=0)


def test_hrank_by_hand():
    images = torch.zeros(2, 3, 3, 3)
    images[0, 0], images[1, 0] = torch.eye(3), torch.ones(3, 3)  # ranks 3 and 1
    images[0, 1, 0] = 1.0  # ranks 1 and 0
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[:, :, None, None])
    scores = score_channels("hrank", model, Task([(images, torch.zeros(2))]), ["0"])
    assert scores["0"].tolist() == [2, 0.5, 0]


def hessian_loop(model, task, parameters):
    """Sum over images of the squared gradients of the image's own loss, {name: tensor}."""
    squares = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for images, labels in task.batches:
        for image, label in zip(images, labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None]), label[None]).backward()
            for name, tensor in parameters.items():
                squares[name] += tensor.grad**2
    return squares


def test_hessian_equals_an_explicit_loop_over_images(model, task):
    scores = score_channels("hessian", model, task, LAYERS)
    parameters = dict(model.named_parameters())
    parameters = {key: parameters[key] for keys in OWNED.values() for key in keys}
    squares = hessian_loop(model, task, parameters)
    for layer, keys in OWNED.items():
        for channel in range(len(scores[layer])):
            expected = 0.0
            for key in keys:
                cost = parameters[key].detach() ** 2 * squares[key] / 11
                if key == "up.weight":  # [in 4, out 3 a group]: inputs 0-1 feed outputs 0-2
                    group, inside = divmod(channel, 3)
                    expected += float(cost[2 * group : 2 * group + 2, inside].sum())
                else:
                    expected += float(cost[channel].sum())
            assert scores[layer][channel].item() == pytest.approx(expected, rel=1e-4), layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 6, (3, 5), padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, (3, 2), dilation=2),
        nn.Linear(7, 5),  # of [B, 4, 7, 7]
        nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 5, padding="same")),
        nn.Sequential(shared := nn.Conv2d(4, 4, 3), nn.ReLU(), shared),
    ],
    ids=lambda layer: str(layer)[:60],
)
def test_hessian_knows_every_convolution(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.LazyLinear(NUM_CLASSES))
    images = torch.randn(18, 4, 7, 7)  # more than a chunk
    model(images[:1])
    task = Task([(images, torch.arange(18) % NUM_CLASSES)])
    name = next(n for n, m in model.named_modules() if hasattr(m, "weight"))
    module = model.get_submodule(name)
    parameters = dict(module.named_parameters())
    squares = hessian_loop(model, task, parameters)
    cost = {key: value * parameters[key].detach() ** 2 for key, value in squares.items()}
    scores = score_channels("hessian", model, task, [name])[name]
    assert scores.sum().item() == pytest.approx(
        float(sum(v.sum() for v in cost.values())) / 18, rel=1e-4
    )
    if not isinstance(module, nn.ConvTranspose2d):
        expected = sum(v.reshape(len(scores), -1).sum(1) for v in cost.values()) / 18
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


# ---- the cost -------------------------------------------------------------------------------


def test_the_benchmark_counts_in_passes():
    criteria = ["magnitude_l1", "slimming", "fgp", "taylor", "hessian"]
    result = bench_criteria(model="resnet20", images=32, rounds=1, criteria=criteria)
    assert [row["criterion"] for row in result["rows"]] == criteria
    assert criteria_table(result).row_count == len(criteria)
    for row in result["rows"]:
        assert row["passes"] == pytest.approx(row["seconds"] / result["pass_s"])
        assert 0 < row["passes"] < MOST_PASSES
