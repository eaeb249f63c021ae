"""The contract of every criterion."""

import pytest
import torch
from criterion_nets import LAYERS, NUM_CLASSES, make_model, make_task
from torch import nn
from torch.nn import functional as F

from prunesearch.methods.criteria import (
    COMPARABLE,
    CRITERIA,
    NEEDS,
    describe,
    known_methods,
    validate_options,
)
from prunesearch.methods.criteria import score_channels as score_by_default
from prunesearch.methods.options import options_of
from prunesearch.methods.tasks.no_data import NoData

torch.set_num_threads(1)

SEEDED = {"random", "blockwipg"}  # the others draw nothing
QUICK = {"blockwipg": {"num_images": 4, "n_perturbations": 3}, "synflow": {"rounds": 10}}


def score_channels(name, model, task, layers, *, seed=0, options=None):
    """As the original, with fewer repetitions."""
    options = {**QUICK.get(name, {}), **(options or {})}
    return score_by_default(name, model, task, layers, seed=seed, options=options)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def task():
    return make_task()


@pytest.fixture(params=CRITERIA)
def name(request):
    return request.param


def test_scores_have_the_shape_and_range_of_the_contract(name, model, task):
    scores = score_channels(name, model, task, LAYERS, seed=0, options={})
    assert list(scores) == LAYERS
    for layer, width in zip(LAYERS, [4, 4, 4, 6, 5, 3], strict=True):
        assert scores[layer].shape == (width,)
        assert scores[layer].dtype == torch.float32 and scores[layer].device.type == "cpu"
        assert scores[layer].isfinite().all() and (scores[layer] >= 0).all()
        assert not scores[layer].requires_grad
    told_apart = [layer for layer in LAYERS if scores[layer].unique().numel() > 1]
    # the rank of a map is a whole number, and 1 for the numbers that linear layers give
    assert "block.conv1" in told_apart if name == "hrank" else told_apart == LAYERS


def test_scores_are_decided_by_the_seed_alone(name, model, task):
    first = score_channels(name, model, task, LAYERS, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = score_channels(name, model, task, LAYERS, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    assert all(torch.equal(first[layer], second[layer]) for layer in LAYERS)
    other = score_channels(name, model, task, LAYERS, seed=4)
    same = all(torch.equal(first[layer], other[layer]) for layer in LAYERS)
    assert same == (name not in SEEDED)


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
    if NEEDS[name] == "nothing":
        pytest.skip("reads no data, so there is no wrong image")
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
    if name in ("random", "synflow"):
        pytest.skip("one order of all channels that are scored together")
    alone = score_channels(name, model, task, ["block.conv2"], seed=0)
    torch.testing.assert_close(alone["block.conv2"], together["block.conv2"])


def test_a_layer_that_does_not_run_scores_zero_unless_weights_alone_are_read(name, model, task):
    scores = score_channels(name, model, task, ["spare", "stem"], seed=0)["spare"]
    assert scores.shape == (2,)
    runs = NEEDS[name] != "nothing" or name in ("synflow", "blockwipg")
    assert runs == bool((scores == 0).all())


def test_what_needs_no_data_runs_without_and_scores_the_same(name, model, task):
    no_data = NoData((3, 6, 6), num_classes=3)
    if NEEDS[name] != "nothing":
        with pytest.raises(ValueError, match="`data`"):
            score_channels(name, model, no_data, LAYERS, seed=0)
        return
    expected = score_channels(name, model, task, LAYERS, seed=0)
    scores = score_channels(name, model, no_data, LAYERS, seed=0)
    assert all(torch.equal(scores[layer], expected[layer]) for layer in LAYERS)


def test_what_needs_no_labels_never_uses_them(name, model, task):
    expected = score_channels(name, model, task, LAYERS, seed=0)
    task.batches = [(images, (labels + 1) % 3) for images, labels in task.batches]
    scores = score_channels(name, model, task, LAYERS, seed=0)
    same = all(torch.equal(scores[layer], expected[layer]) for layer in LAYERS)
    assert same == (NEEDS[name] != "labels")


def test_a_model_in_double_precision_scores_alike(name, model, task):
    expected = score_channels(name, model, task, LAYERS, seed=0)
    task.batches = [(images.double(), labels) for images, labels in task.batches]
    task.dtype = torch.float64
    scores = score_channels(name, model.double(), task, LAYERS, seed=0)
    for layer in LAYERS:
        assert scores[layer].dtype == torch.float32
        torch.testing.assert_close(scores[layer], expected[layer], rtol=1e-3, atol=1e-6)


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


def test_every_criterion_is_described_and_says_what_it_needs(name):
    line = describe(name)
    assert line.endswith((".", ").")) or ":" in line
    assert "\n" not in line and 20 < len(line) < 100
    assert NEEDS[name] in ("nothing", "images", "labels")
    defaults = options_of(CRITERIA[name], without=("generator",))
    validate_options(name, defaults)
    assert NEEDS.keys() == CRITERIA.keys()


def test_sparse_training_is_known_beside_the_criteria_but_scores_nothing(model, task):
    assert set(known_methods()) == CRITERIA.keys() | {"dsd"}
    assert set(known_methods()) >= COMPARABLE
    assert 20 < len(describe("dsd")) < 100
    validate_options("dsd", {"strategy": "slimming"})
    with pytest.raises(ValueError, match=r"`dsd.strategy` \(=slim\) .* `slimming`"):
        validate_options("dsd", {"strategy": "slim"})
    with pytest.raises(ValueError, match=r"`dsd.lam` \(=0.1\) must be an option"):
        validate_options("dsd", {"lam": 0.1})  # not an option: a dimension of the search
    with pytest.raises(ValueError, match=r"`criterion` \(=dsd\) must be a known name"):
        score_channels("dsd", model, task, LAYERS)


def test_errors_name_the_field_the_value_and_the_nearest(model, task):
    with pytest.raises(ValueError, match=r"`criterion` \(=tailor\) .* mean `taylor`\?"):
        score_channels("tailor", model, task, LAYERS, seed=0)
    with pytest.raises(ValueError, match=r"`fgp.clas_agg` \(=sum\) .* mean `class_agg`\?"):
        validate_options("fgp", {"clas_agg": "sum"})
    with pytest.raises(ValueError, match=r"`fgp.class_agg` \(=max\) must be .* sum, min, mean"):
        validate_options("fgp", {"class_agg": "max"})
    with pytest.raises(ValueError, match=r"`taylor.classes` \(=1\) must be an option"):
        validate_options("taylor", {"classes": 1})
    for field, value in [("synflow.keep", 0), ("synflow.rounds", 0.5), ("hrank.num_batches", 0)]:
        criterion, option = field.split(".")
        with pytest.raises(ValueError, match=rf"`{field}` .* must be a .*number from"):
            validate_options(criterion, {option: value})
    for classes in ([], "01", 1, [0, True], [0.0]):
        with pytest.raises(ValueError, match=r"`fgp.classes` .* must be a list of class indices"):
            validate_options("fgp", {"classes": classes})
    with pytest.raises(ValueError, match=r"from 0 to 2: 3 is not one"):
        score_channels("fgp", model, task, LAYERS, options={"classes": [0, 3]})
    with pytest.raises(ValueError, match=r"`layers` \(='block.conv9'\) .*`block.conv"):
        score_channels("random", model, task, ["block.conv9"])
    with pytest.raises(ValueError, match="it is a BatchNorm2d"):
        score_channels("random", model, task, ["norm"])


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


@pytest.mark.parametrize("name", ["fgp", "hessian", "blockwipg"])
def test_a_layer_that_mixes_images_is_refused(name, task):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, NUM_CLASSES, 3)

        def forward(self, x):
            both = self.conv(torch.cat([x, x.flip(3)])).mean((2, 3))
            return both[: len(x)] + both[len(x) :]

    with pytest.raises(ValueError, match="must keep the images of a batch apart"):
        score_by_default(name, Mixer(), task, ["conv"], seed=0)
