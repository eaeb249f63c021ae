"""DSD: hand-worked sets, edits and freezes; then whole trainings against explicit loops."""

import copy
import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from prunesearch.methods.data import load_data
from prunesearch.methods.models.build import build_model
from prunesearch.methods.options import check_options, options_of
from prunesearch.methods.sparse_training import (
    RUN_ARGUMENTS,
    SPARSE_TRAINING,
    SparseHistory,
    sparse_train,
)
from prunesearch.methods.sparse_training.channels import Channels
from prunesearch.methods.sparse_training.freeze import Freezer, frozen_parts, producers_of
from prunesearch.methods.sparse_training.masks import (
    METRICS,
    ImportantSet,
    num_important,
    sparsity_gradient,
)
from prunesearch.methods.sparse_training.step import Penalty
from prunesearch.methods.tasks.classification import ClassificationTask

RUN = {"lam": 0.05, "q": 0.4, "epochs": 3, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    data = load_data("digits", image_size=8, limit=160)
    return ClassificationTask(data, batch_size=26, calibration_size=32)


class TwoNorms(nn.Module):
    """Two convolutions with batch norms of 3 and 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, bias=True)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 2, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model() -> TwoNorms:
    torch.manual_seed(0)
    model = TwoNorms()
    for norm in (model.bn1, model.bn2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(model: nn.Module, task: ClassificationTask, **options: object) -> SparseHistory:
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    arguments = {"generator": seeded(), **RUN, **options}
    return sparse_train(model, task, norms, **arguments)  # type: ignore[arg-type]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- the important set -----------------------------------------------------------------------

TAU = tensor(2.0, -1.0, 0.5, -3.0, 0.1)
GRAD = tensor(0.1, 0.5, 0.2, -0.01, 4.0)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("abs_gradient", [0.1, 0.5, 0.2, 0.01, 4.0]),
        ("abs_scale", [2.0, 1.0, 0.5, 3.0, 0.1]),
        ("product", [0.2, -0.5, 0.1, 0.03, 0.4]),
        ("abs_product", [0.2, 0.5, 0.1, 0.03, 0.4]),
    ],
)
def test_metrics_by_hand(metric, expected):
    torch.testing.assert_close(METRICS[metric](TAU, GRAD), tensor(*expected))


@pytest.mark.parametrize(
    ("metric", "threshold", "expected"),
    [  # 5 channels and q = .4: 3 stay; in each norm 1 of 3 and 1 of 2
        ("abs_product", "global", [1, 1, 0, 0, 1]),
        ("product", "global", [1, 0, 1, 0, 1]),
        ("abs_scale", "global", [1, 1, 0, 1, 0]),
        ("abs_gradient", "global", [0, 1, 1, 0, 1]),
        ("abs_product", "layer", [0, 1, 0, 0, 1]),
        ("abs_scale", "layer", [1, 0, 0, 1, 0]),
    ],
)
def test_the_important_set_by_hand(metric, threshold, expected):
    important = ImportantSet([3, 2], 0.4, metric=metric, threshold=threshold)
    mask = important.update(TAU, GRAD, new_epoch=True)
    assert mask.tolist() == [bool(value) for value in expected]
    assert important.num_important == sum(expected)


@pytest.mark.parametrize("threshold", ["global", "layer"])
def test_ties_go_to_the_lower_index_and_never_change_the_count(threshold):
    important = ImportantSet([4, 4], 0.5, threshold=threshold, metric="abs_scale")
    ones = important.update(torch.ones(8), torch.ones(8), new_epoch=True)
    assert ones.tolist() == (
        [True] * 4 + [False] * 4 if threshold == "global" else [True, True, False, False] * 2
    )
    zeros = ImportantSet([500, 500], 0.5, threshold=threshold)
    assert zeros.update(torch.zeros(1000), torch.ones(1000), new_epoch=True).sum() == 500


def test_the_number_that_stays_is_n_times_one_minus_q_rounded_down():
    assert num_important(10, 0.55) == 4
    assert [num_important(100, percent / 100) for percent in range(1, 100)] == [
        *range(99, 0, -1)
    ]  # 100 * (1 - .43) is 56.99999999999999 in floating point
    assert num_important(3, 0.9) == 0


def test_a_layer_keeps_a_channel_at_least():
    mask = ImportantSet([3, 2], 0.9, threshold="layer").update(TAU, GRAD, new_epoch=True)
    assert mask.tolist() == [False, True, False, False, True]
    assert ImportantSet([3, 2], 0.9).update(TAU, GRAD, new_epoch=True).sum() == 0


@pytest.mark.parametrize(
    ("metric_update", "expected"),
    [("iteration", [0, 1, 0, 1]), ("epoch", [0, 0, 0, 1]), ("once", [0, 0, 0, 0])],
)
def test_the_set_is_chosen_anew_when_it_is_due(metric_update, expected):
    important = ImportantSet([2], 0.5, metric="abs_scale", metric_update=metric_update)
    largest = [
        int(important.update(scales, torch.zeros(2), new_epoch=new_epoch).nonzero())
        for scales, new_epoch in [
            (tensor(2, 1), True),
            (tensor(1, 2), False),
            (tensor(2, 1), False),
            (tensor(1, 2), True),
        ]
    ]
    assert largest == expected


@pytest.mark.parametrize(
    ("metric_update", "expected"), [("iteration", [0, 0, 1, 1]), ("epoch", [0, 0, 0, 1])]
)
def test_the_running_mean_of_the_metric_by_hand(metric_update, expected):
    important = ImportantSet([2], 0.5, metric="abs_scale", metric_update=metric_update, ema=0.5)
    # running means of channel 0: 4, 2, 1, 0.5; of channel 1: 0, 1.5, 2.25, 2.625
    series = [(tensor(4, 0), True), *[(tensor(0, 3), new) for new in (False, False, True)]]
    got = [
        int(important.update(scales, torch.zeros(2), new_epoch=new).nonzero())
        for scales, new in series
    ]
    assert got == expected


# --- the edits of the gradients --------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_important", "on_redundant", "expected"),
    [
        ("none", "none", [0, 0, 0, 0, 0]),
        ("reward", "penalize", [-1, 1, 1, -1, 0]),
        ("penalize", "none", [1, -1, 0, 0, 0]),
        ("reward", "none", [-1, 1, 0, 0, 0]),
        ("none", "penalize", [0, 0, 1, -1, 0]),
        ("none", "reward", [0, 0, -1, 1, 0]),
        ("penalize", "penalize", [1, -1, 1, -1, 0]),
        ("reward", "reward", [-1, 1, -1, 1, 0]),
        ("penalize", "reward", [1, -1, -1, 1, 0]),
    ],
)
def test_what_lambda_multiplies_by_hand(on_important, on_redundant, expected):
    values = tensor(2.0, -1.0, 0.5, -3.0, 0.0)
    mask = torch.tensor([True, True, False, False, False])
    edit = sparsity_gradient(values, mask, on_important, on_redundant)
    assert edit.tolist() == expected


def test_the_penalty_is_added_to_the_gradients_of_each_norm(model):
    with torch.no_grad():
        model.bn1.weight.copy_(tensor(2.0, -1.0, 0.5))
        model.bn2.weight.copy_(tensor(-3.0, 0.1))
        model.bn1.bias.copy_(tensor(-1.0, 1.0, -1.0))
        model.bn2.bias.copy_(tensor(1.0, 0.0))
    model.bn1.weight.grad, model.bn2.weight.grad = GRAD.split([3, 2])
    model.bn1.bias.grad, model.bn2.bias.grad = torch.ones(3), torch.ones(2)
    channels = Channels(model, ["bn1", "bn2"])
    important = ImportantSet(channels.widths, 0.4)
    mask = important.update(channels.tau(), channels.tau_grad(), new_epoch=True)
    Penalty(0.25, "reward", "penalize", "none", "penalize").add(channels, mask)
    # E = channels 0, 1, 4
    torch.testing.assert_close(model.bn1.weight.grad, tensor(0.1 - 0.25, 0.5 + 0.25, 0.2 + 0.25))
    torch.testing.assert_close(model.bn2.weight.grad, tensor(-0.01 - 0.25, 4.0 - 0.25))
    torch.testing.assert_close(model.bn1.bias.grad, tensor(1.0, 1.0, 1.0 - 0.25))
    torch.testing.assert_close(model.bn2.bias.grad, tensor(1.0 + 0.25, 1.0))


# --- the freeze ------------------------------------------------------------------------------

REDUNDANT = [torch.tensor([True, False, True]), torch.tensor([False, True])]


def frozen_steps(model, task, freeze, scope, *, momentum=0.9, num_steps=4):
    """Plain steps that fill the momentum, then steps with frozen channels.

    Returns:
        The optimizer; the state when the freeze begins, and the one after each step.
    """
    norms = {"bn1": model.bn1, "bn2": model.bn2}
    producers = producers_of(model, norms, task.example_input(2)) if scope == "filter" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    freezer, states = None, []
    for number, (images, target) in enumerate(list(task.batches("train"))[:2] * num_steps):
        optimizer.zero_grad()
        task.loss(model(images), target).backward()
        if number < 2:
            optimizer.step()
            continue
        if freezer is None:
            states.append(state(model))
            freezer = Freezer(optimizer, frozen_parts(norms, REDUNDANT, producers), freeze)
        freezer.step()
        states.append(state(model))
    return optimizer, states


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_exact_freeze_holds_bit_by_bit(model, task, momentum):
    optimizer, (first, *later) = frozen_steps(model, task, "exact", "bn", momentum=momentum)
    if momentum:
        for norm, redundant in zip((model.bn1, model.bn2), REDUNDANT, strict=True):
            buffer = optimizer.state[norm.weight]["momentum_buffer"]
            assert ((buffer == 0) == redundant).all()
    for now in later:
        for name, redundant in zip(("bn1", "bn2"), REDUNDANT, strict=True):
            for kind in ("weight", "bias"):
                key = f"{name}.{kind}"
                assert torch.equal(now[key][redundant], first[key][redundant])
                assert (now[key][~redundant] != first[key][~redundant]).all()
        assert (now["conv1.weight"] != first["conv1.weight"]).all()


def test_a_zero_gradient_alone_still_moves(model, task):
    _, (first, *later) = frozen_steps(model, task, "grad_zero", "bn")
    for now in later:
        for name, redundant in zip(("bn1", "bn2"), REDUNDANT, strict=True):
            assert (now[f"{name}.weight"][redundant] != first[f"{name}.weight"][redundant]).all()
    # without momentum only the decay of lr * weight_decay a step is left
    _, still = frozen_steps(copy.deepcopy(model), task, "grad_zero", "bn", momentum=0.0)
    for before, after in pairwise(still):
        torch.testing.assert_close(after["bn1.weight"][0], before["bn1.weight"][0] * (1 - 0.001))


def test_the_filter_scope_freezes_the_filters_in_front_too(model, task):
    _, (first, *later) = frozen_steps(model, task, "exact", "filter")
    for now in later:
        for conv, redundant in (("conv1", REDUNDANT[0]), ("conv2", REDUNDANT[1])):
            key = f"{conv}.weight"
            assert torch.equal(now[key][redundant], first[key][redundant])
            assert (now[key][~redundant] != first[key][~redundant]).any()
        bias = now["conv1.bias"] == first["conv1.bias"]
        assert bias[REDUNDANT[0]].all() and now["fc.weight"].ne(first["fc.weight"]).any()


def test_the_frozen_filters_of_a_grouped_transposed_convolution():
    conv, norm = nn.ConvTranspose2d(4, 6, 1, groups=2), nn.BatchNorm2d(6)
    redundant = torch.tensor([True, False, False, False, True, True])
    frozen = frozen_parts({"bn": norm}, [redundant], {"bn": [conv]})
    # a channel is frozen if and only if no change of a free weight changes it
    image = torch.randn(1, 4, 2, 2, generator=seeded())
    before = conv(image)
    with torch.no_grad():
        conv.weight += (~frozen[conv.weight]).float()
        conv.bias += (~frozen[conv.bias]).float()
    assert ((conv(image) == before).all(3).all(2)[0] == redundant).all()


def test_the_filter_scope_needs_a_layer_in_front(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ValueError, match=r"`freeze_scope` \(=filter\) .* 0 takes .*Use `bn`"):
        train(model, task, freeze_scope="filter")


# --- whole trainings against explicit loops --------------------------------------------------


def reference(model, task, passes, *, lam, q, lr, momentum, weight_decay, **options):
    """DSD one channel at a time, with an SGD of its own. `passes`: (phase, images)."""
    given = {
        name: options.get(name, default)
        for name, default in options_of(sparse_train, without=RUN_ARGUMENTS).items()
    }
    norms = [model.bn1, model.bn2]
    where = [(norm, c) for norm in norms for c in range(norm.num_features)]
    convs = {model.bn1: model.conv1, model.bn2: model.conv2}
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    important, generator = None, seeded()
    for phase, images in passes:
        batches = task.train_batches(generator, max_images=images)
        for number, (x, y) in enumerate(batches):
            model.train()
            model.zero_grad()
            task.loss(model(x), y).backward()
            due = {"iteration": True, "epoch": number == 0, "once": False}
            if important is None or (phase == 1 and due[given["metric_update"]]):
                important = explicit_set(where, q, given)
            frozen = []
            for norm, c in where:
                chosen = "important" if (norm, c) in important else "redundant"
                for p, kind in ((norm.weight, "tau"), (norm.bias, "beta")):
                    if phase == 1:
                        sign = {"none": 0, "penalize": 1, "reward": -1}[given[f"{kind}_{chosen}"]]
                        p.grad[c] += sign * lam * math.copysign(1, p[c].item())
                    elif chosen == "redundant":
                        frozen.append((p, c))
                if phase == 2 and chosen == "redundant" and given["freeze_scope"] == "filter":
                    frozen += [(p, c) for p in convs[norm].parameters()]
            for p, c in frozen:
                p.grad[c] = 0
            values = [p[c].detach().clone() for p, c in frozen]
            with torch.no_grad():
                for p, buffer in buffers.items():
                    buffer.mul_(momentum).add_(p.grad + weight_decay * p)
                    p -= lr * buffer
                if given["freeze"] == "exact":
                    for (p, c), value in zip(frozen, values, strict=True):
                        p[c] = value
                        buffers[p][c] = 0
    return important


def explicit_set(where, q, given):
    scored = []
    for norm, c in where:
        tau, grad = norm.weight[c].item(), norm.weight.grad[c].item()
        scored.append(
            {
                "abs_gradient": abs(grad),
                "abs_scale": abs(tau),
                "product": tau * grad,
                "abs_product": abs(tau * grad),
            }[given["metric"]]
        )
    if given["threshold"] == "global":
        best = sorted(range(len(where)), key=lambda i: -scored[i])[: int(len(where) * (1 - q))]
        return {where[i] for i in best}
    chosen = set()
    for norm in dict.fromkeys(norm for norm, _ in where):
        own = [i for i, (other, _) in enumerate(where) if other is norm]
        best = sorted(own, key=lambda i: -scored[i])[: max(1, int(len(own) * (1 - q)))]
        chosen |= {where[i] for i in best}
    return chosen


TWO_PHASES = [(1, 130), (1, 130), (2, 130)]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, TWO_PHASES),
        ({"metric": "abs_gradient"}, TWO_PHASES),
        ({"metric": "abs_scale"}, TWO_PHASES),
        ({"metric": "product"}, TWO_PHASES),
        ({"metric_update": "epoch"}, TWO_PHASES),
        ({"metric_update": "once"}, TWO_PHASES),
        ({"threshold": "layer"}, TWO_PHASES),
        ({"freeze": "grad_zero"}, TWO_PHASES),
        ({"freeze_scope": "filter"}, TWO_PHASES),
        ({"freeze_scope": "filter", "freeze": "grad_zero"}, TWO_PHASES),
        ({"tau_important": "penalize", "tau_redundant": "none"}, TWO_PHASES),
        ({"tau_important": "none", "tau_redundant": "reward"}, TWO_PHASES),
        ({"beta_important": "reward", "beta_redundant": "none"}, TWO_PHASES),
        ({"beta_important": "penalize", "beta_redundant": "reward"}, TWO_PHASES),
        ({"strategy": "phase1_only"}, [(1, 130)] * 3),
        ({"phase1_share": 0.5}, [(1, 130), (1, 65), (2, 130), (2, 65)]),
        ({"phase1_share": 1.0}, [(1, 130)] * 3),
        ({"phase1_share": 0.0}, [(2, 130)] * 3),
    ],
    ids=str,
)
def test_training_equals_the_explicit_loops(model, task, options, passes):
    assert task.num_train == 130
    by_hand, by_default = copy.deepcopy(model), copy.deepcopy(model)
    numbers = {key: value for key, value in RUN.items() if key != "epochs"}
    important = reference(by_hand, task, passes, **numbers, **options)
    history = train(model, task, **options)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5, msg=f"{name} {options}"
        )
    assert [record.num_images for record in history.epochs] == [images for _, images in passes]
    assert history.num_important == len(important)
    train(by_default, task)
    assert same(model, by_default) == (not options)  # or the option would not be tested


def test_slimming_is_the_l1_norm_of_all_scales_in_the_loss(model, task):
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = seeded()
    for _ in range(3):
        for images, target in task.train_batches(generator):
            optimizer.zero_grad()
            scales = torch.cat([by_hand.bn1.weight, by_hand.bn2.weight])
            (task.loss(by_hand(images), target) + 0.05 * scales.abs().sum()).backward()
            optimizer.step()
    history = train(model, task, strategy="slimming")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert {record.phase for record in history.epochs} == {"slimming"}


def test_lambda_zero_is_plain_training(model, task):
    plain = copy.deepcopy(model)
    train(model, task, lam=0.0, strategy="phase1_only")
    train(plain, task, lam=0.0, strategy="slimming")
    assert same(model, plain)


def test_only_the_named_norms_are_penalized(model, task):
    states = []
    for lam in (0.0, 5.0):
        trained = copy.deepcopy(model)
        arguments = {"generator": seeded(), **RUN, "epochs": 0.2, "lam": lam}  # one step
        sparse_train(trained, task, ["bn1"], **arguments, strategy="slimming")
        states.append(trained.state_dict())
    plain, penalized = states
    step = 0.1 * 5.0 * model.bn1.weight.sign()
    torch.testing.assert_close(penalized.pop("bn1.weight"), plain.pop("bn1.weight") - step)
    assert all(torch.equal(penalized[name], value) for name, value in plain.items())


# --- a real network --------------------------------------------------------------------------


def test_redundant_scales_go_to_zero_and_important_ones_do_not(task):
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    norms = [f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in range(3)]
    # 60 steps of phase 1 at lr lam / (1 - momentum) = .05 each could move a scale by 3; the mean
    # keeps the sets together, which gradients of single batches alone shuffle
    options = {"lam": 0.5, "q": 0.5, "epochs": 18, "ema": 0.95, "generator": seeded()}
    history = sparse_train(model, task, norms, **options)
    scales = torch.cat([model.get_submodule(name).weight.detach().abs() for name in norms])
    assert history.num_channels == len(scales) == 3 * (16 + 32 + 64)
    middles = [(low + high) / 2 for low, high in pairwise(history.bin_edges)]

    def mean(counts):
        return sum(map(math.prod, zip(middles, counts, strict=True))) / sum(counts)

    first, last = history.epochs[0], history.epochs[-1]
    assert 0.8 < mean(first.redundant) < mean(first.important) < 1.2
    assert mean(last.redundant) < 0.15 and mean(last.important) > 2
    assert last.near_zero == pytest.approx((scales < 0.01).float().mean().item())
    assert last.loss < first.loss
    # what |tau| prunes is what was frozen, but for a few
    kept = scales.topk(history.num_important).values
    assert (kept > 1).all() and (scales < 0.2).sum() > 0.95 * (len(scales) - len(kept))


def test_the_history_says_what_happened_and_is_json(model, task):
    seen = []
    history = train(model, task, epochs=4.5, on_epoch=lambda n, loss: seen.append((n, loss)))
    assert json.loads(json.dumps(dataclasses.asdict(history)))["num_channels"] == 5
    assert [r.phase for r in history.epochs] == ["decoupling"] * 3 + ["finetuning"] * 2
    assert [r.num_images for r in history.epochs] == [130, 130, 130, 130, 65]
    assert seen == [(r.epoch, r.loss) for r in history.epochs]
    assert history.num_important == 3
    assert len(history.bin_edges) == 51 and list(history.bin_edges) == sorted(history.bin_edges)
    for record in history.epochs:
        assert (sum(record.important), sum(record.redundant)) == (3, 2)
        assert record.seconds > 0 and math.isfinite(record.loss)
        assert record.churn in (0.0, 0.4, 0.8)  # channels change places two by two
    assert all(r.churn == 0 for r in history.epochs if r.phase == "finetuning")
    scales = torch.cat([model.bn1.weight, model.bn2.weight]).detach().abs().double()
    counts = torch.histogram(scales, torch.tensor(history.bin_edges, dtype=torch.float64)).hist
    last = history.epochs[-1]
    assert [a + b for a, b in zip(last.important, last.redundant, strict=True)] == counts.tolist()


def test_churn_counts_the_channels_that_changed_sets(model, task):
    options = {"metric": "abs_scale", "strategy": "phase1_only", "q": 0.6, "lr": 1e-6}
    with torch.no_grad():
        model.bn1.weight.copy_(tensor(1.0, 0.5, 0.4))
        model.bn2.weight.copy_(tensor(0.3, 0.9))
    still = train(copy.deepcopy(model), task, **options, epochs=2)
    assert [r.churn for r in still.epochs] == [0, 0]
    # rewarding N and penalizing E makes two channels of nearly one size change places
    swap = {"tau_important": "penalize", "tau_redundant": "reward", "momentum": 0.0}
    with torch.no_grad():
        model.bn1.weight.copy_(tensor(1.0, 0.5, 0.4999))
        model.bn2.weight.copy_(tensor(0.3, 0.2))
    numbers = {"lam": 60.0, "lr": 1e-6, "metric_update": "epoch", "epochs": 2}
    moved = train(model, task, **(options | swap | numbers))
    assert [r.churn for r in moved.epochs] == [0, 0.4]


# --- manners ---------------------------------------------------------------------------------


def test_training_is_deterministic_by_generator(model, task):
    again, other = copy.deepcopy(model), copy.deepcopy(model)
    first = train(model, task)
    torch.rand(7)  # the global generator must not matter
    second = train(again, task)
    train(other, task, generator=seeded(1))
    assert same(model, again) and not same(model, other)
    assert [r.loss for r in first.epochs] == [r.loss for r in second.epochs]


@pytest.mark.parametrize("freeze_scope", ["bn", "filter"])
def test_nothing_is_left_behind(model, task, freeze_scope):
    model.fc.weight.requires_grad_(False)
    weight, names = model.fc.weight.clone(), list(dict(model.named_parameters()))
    train(model, task, freeze_scope=freeze_scope)
    assert torch.equal(model.fc.weight, weight)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        name for name in names if name != "fc.weight"
    ]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("epochs", [0.25, 0.5, 1, 1.75, 3])
def test_fractions_of_epochs_train_on_that_share_of_the_images(model, task, epochs):
    history = train(model, task, epochs=epochs)
    images = sum(record.num_images for record in history.epochs)
    assert abs(images - epochs * task.num_train) <= 1
    first = sum(r.num_images for r in history.epochs if r.phase == "decoupling")
    assert abs(first - images * 2 / 3) <= 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lam": -1e-3}, r"`lam` \(=-0.001\)"),
        ({"lam": math.nan}, r"`lam` \(=nan\)"),
        ({"q": 0.0}, r"`q` \(=0.0\)"),
        ({"q": 1}, r"`q` \(=1\)"),
        ({"epochs": 0}, r"`epochs` \(=0\)"),
        ({"epochs": -1.0}, r"`epochs` \(=-1.0\)"),
        ({"epochs": 1e-6}, r"`epochs` \(=1e-06\) must cover"),
        ({"metric": "abs_products"}, r"`dsd.metric` .*Did you mean `abs_product`"),
        ({"ema": 1.0}, r"`dsd.ema` \(=1.0\)"),
    ],
)
def test_wrong_values_are_named_before_anything_is_trained(model, task, changed, message):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        train(model, task, **changed)
    assert same(model, before) and model.training


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (["bn3"], r"`norms` \(='bn3'\) .* no such module.*`bn2`"),
        (["conv1"], r"`norms` \(='conv1'\) .* is a Conv2d"),
        ([], r"`norms` \(=\[\]\)"),
        (["bn1", "bn1"], r"each batch norm once"),
    ],
)
def test_wrong_norms_are_named(model, task, norms, message):
    with pytest.raises(ValueError, match=message):
        sparse_train(model, task, norms, **RUN, generator=seeded())


def test_norms_that_cannot_be_trained_are_named(model, task):
    model.bn2.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`norms` \(='bn2'\) .* cannot be trained"):
        train(model, task)
    model.bn2 = nn.BatchNorm2d(2, affine=False)
    with pytest.raises(ValueError, match=r"`norms` \(='bn2'\) .* cannot be trained"):
        train(model, task)


def test_a_norm_that_the_model_does_not_use_is_named(model, task):
    model.spare = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match=r"`norms` \(=spare\) .* no gradient"):
        train(model, task)


@pytest.mark.parametrize("broken", ["weight", "rate"])
def test_a_loss_that_is_not_finite_is_an_error(model, task, broken):
    if broken == "weight":
        with torch.no_grad():
            model.fc.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"in epoch \d; a lower `lr`"):
        train(model, task, lr=1e20 if broken == "rate" else 0.1)


def test_ignored_options_are_warned_of(model, task):
    with pytest.warns(UserWarning, match="strategy=slimming.*tau_important"):
        train(model, task, strategy="slimming", tau_important="none", epochs=0.5)
    with pytest.warns(UserWarning, match="metric_update=once.* ema"):
        train(model, task, metric_update="once", ema=0.9, epochs=0.5)


def test_the_options_can_be_checked_without_training():
    dsd = SPARSE_TRAINING["dsd"]
    check_options("dsd", dsd, {"metric": "product", "ema": 0.9}, without=RUN_ARGUMENTS)
    assert options_of(dsd, without=RUN_ARGUMENTS) == {
        "strategy": "both",
        "phase1_share": 2 / 3,
        "metric": "abs_product",
        "metric_update": "iteration",
        "ema": 0.0,
        "threshold": "global",
        "tau_important": "reward",
        "tau_redundant": "penalize",
        "beta_important": "none",
        "beta_redundant": "penalize",
        "freeze": "exact",
        "freeze_scope": "bn",
    }
    for wrong in ({"lam": 1}, {"freeze": "exactly"}, {"phase1_share": 2}):
        with pytest.raises(ValueError, match=f"`dsd.{next(iter(wrong))}`"):
            check_options("dsd", dsd, wrong, without=RUN_ARGUMENTS)
