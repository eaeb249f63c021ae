"""The surrogate: regression against scikit-learn, expected improvement against brute force."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ranked
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.search.config import parse_config
from prunesearch.search.front import hypervolume
from prunesearch.search.metrics import Constraint
from prunesearch.search.records import Candidate
from prunesearch.search.space import Space
from prunesearch.search.surrogate import proposer as proposer_module
from prunesearch.search.surrogate.acquisition import expected_improvement, normal_samples
from prunesearch.search.surrogate.features import Encoder
from prunesearch.search.surrogate.gp import JITTER, GaussianProcess
from prunesearch.search.surrogate.proposer import Observation, SurrogateProposer
from prunesearch.search.surrogate.variation import Variation

ORDER = ("layer2.1", "layer1.2", "layer3.1", "layer1.1")


def make_space(**changes) -> Space:
    settings = {"criteria": ["magnitude_l1", "taylor", "dsd"], "keep": {"per": "stage"}} | changes
    config = parse_config(
        {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "space": settings}
    )
    plan = plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))
    return Space(config.space, plan, ranked(ORDER))


# --- regression ------------------------------------------------------------------------------


def test_the_posterior_equals_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x, new = rng.random((30, 4)), rng.random((7, 4))
    y = np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]
    gp = GaussianProcess(x, y, [slice(0, 4)])
    linear, matern, noise, length = (float(v) for v in gp.hyperparameters.values)
    scale = math.exp(length) * 4**0.25  # distances are divided by the root of the kind's size
    kernel = (
        ConstantKernel(math.exp(linear) / 4) * DotProduct(2.0)  # 1 + x.x / 4 = (4 + x.x) / 4
        + ConstantKernel(math.exp(matern)) * Matern(scale, nu=2.5)
        + WhiteKernel(math.exp(noise) + JITTER)
    )
    reference = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0)
    reference.fit(x - 0.5, (y - y.mean()) / y.std())
    mean, deviation = reference.predict(new - 0.5, return_std=True)
    deviation = np.sqrt(deviation**2 - math.exp(noise) - JITTER)  # ours is that of the value
    ours = gp.predict(new)
    np.testing.assert_allclose(ours[0], mean * y.std() + y.mean(), atol=1e-6)
    np.testing.assert_allclose(ours[1], deviation * y.std(), atol=1e-6)


def test_fitting_finds_the_kind_that_matters():
    rng = np.random.default_rng(1)
    x = rng.random((60, 6))
    y = np.sin(8 * x[:, 0]) * np.cos(6 * x[:, 1])
    gp = GaussianProcess(x, y, [slice(0, 2), slice(2, 6)])
    new = rng.random((200, 6))
    real = np.sin(8 * new[:, 0]) * np.cos(6 * new[:, 1])
    before = np.abs(gp.predict(new)[0] - real).mean()
    fitted = gp.fit_hyperparameters()
    assert fitted.values[3] < fitted.values[4]  # the lengthscale of what matters is shorter
    assert np.abs(gp.predict(new)[0] - real).mean() < 0.7 * before


def test_equal_targets_do_not_break_the_regression():
    gp = GaussianProcess(np.eye(4), np.ones(4), [slice(0, 4)])
    gp.fit_hyperparameters()
    assert gp.predict(np.eye(4))[0] == pytest.approx(np.ones(4))


# --- expected improvement --------------------------------------------------------------------


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_expected_improvement_is_the_mean_growth_of_the_volume(num_objectives):
    rng = np.random.default_rng(num_objectives)
    front = rng.random((6, num_objectives))
    samples = rng.random((8, 5, num_objectives)) * 1.3 - 0.2
    reference = np.ones(num_objectives)
    less = [False] * num_objectives
    volume = hypervolume(front, reference, less)
    brute = [
        np.mean([hypervolume([*front, s], reference, less) - volume for s in samples[:, i]])
        for i in range(5)
    ]
    np.testing.assert_allclose(expected_improvement(samples, front, reference), brute, atol=1e-12)


def test_without_a_front_the_whole_box_counts():
    samples = np.array([[[0.5, 0.5]]])
    gain = expected_improvement(samples, np.empty((0, 2)), np.ones(2))
    assert gain == pytest.approx([0.25])


def test_normal_samples_are_standard_normal_and_repeatable():
    samples = normal_samples(3, seed=5, count=512)
    assert np.abs(samples.mean(0)).max() < 0.05 and np.abs(samples.std(0) - 1).max() < 0.05
    np.testing.assert_array_equal(samples, normal_samples(3, seed=5, count=512))


# --- candidates ------------------------------------------------------------------------------


def test_what_lies_in_a_dropped_block_has_no_width():
    space = make_space()
    encoder = Encoder(space)
    keep = tuple((g.name, 0.5) for g in space.plan.groups)
    whole, cut = encoder.encode(
        [
            ({}, Candidate("taylor", (), "ratio", keep)),
            ({}, Candidate("taylor", ("layer1.1",), "ratio", keep)),
        ]
    )
    blocks, widths, *_ = encoder.kinds(whole.size)
    assert whole[blocks].sum() - cut[blocks].sum() == 1
    assert set(whole[widths]) == {0.5} and sorted(set(cut[widths])) == [0.0, 0.5]
    assert encoder.encode([({}, Candidate())])[0][widths].tolist() == [1.0] * len(
        space.plan.groups
    )


@pytest.mark.parametrize("select", [["ratio"], ["ratio", "cumulative", "global", "macs"]])
def test_variation_stays_in_the_space(select):
    space = make_space(select=select)
    variation = Variation(space, np.random.default_rng(0))
    one, other = variation.random(), variation.random()
    seen = set()
    for turn in range(200):
        draw = [variation.random, partial(variation.mutate, one)]
        child = [*draw, partial(variation.cross, one, other)][turn % 3]()
        assert child.keys() == space.distributions(child).keys()
        seen.add(space.candidate(child))
        one, other = (child, one) if turn % 5 == 0 else (one, other)
    assert len(seen) > 100


def test_a_discrete_dimension_keeps_its_steps():
    space = make_space(criteria=["taylor"], select=["ratio"], keep={"low": 0.4, "step": 0.3})
    variation = Variation(space, np.random.default_rng(0))
    params = variation.random()
    for _ in range(50):
        params = variation.mutate(params)
        values = {round(v, 9) for name, v in params.items() if name.startswith("keep")}
        assert values <= {0.4, 0.7, 1.0}


# --- proposing -------------------------------------------------------------------------------


def problem(candidate: Candidate, space: Space) -> dict[str, float]:
    alive = {group.name for group in space.plan.alive(candidate.dropped_blocks)}
    keep = dict(candidate.keep)
    size = sum(keep.get(g.name, 1.0) for g in space.plan.groups if g.name in alive) / 13
    harm = {"taylor": 1.0, "magnitude_l1": 1.4}.get(candidate.criterion or "", 0.0)
    accuracy = 0.95 - 0.4 * harm * (1 - size) ** 2 - 0.05 * len(candidate.dropped_blocks)
    return {"accuracy": accuracy, "macs": 0.05 + size, "accuracy_drop": 0.95 - accuracy}


def search(space: Space, count: int, seed: int, constraints=(), blind=False):
    objectives = {"accuracy": "maximize", "macs": "minimize"}
    proposer = SurrogateProposer(space, objectives, constraints, {"accuracy": 0.0, "macs": 1.2})
    found: list[Observation] = []
    for number in range(count):
        taken = {o.candidate for o in found}
        known = [] if blind else found
        params = proposer.propose(known, [], taken, seed * 1000 + number)
        candidate = space.candidate(params)
        found.append(Observation(params, candidate, problem(candidate, space)))
    return found


def test_it_beats_chance_and_proposes_nothing_twice():
    space = make_space(criteria=["magnitude_l1", "taylor"], select=["ratio"])
    volume = {}
    for blind in (False, True):
        found = search(space, 24, seed=0, blind=blind)
        assert len({o.candidate for o in found}) == 24
        points = [[o.metrics["accuracy"], o.metrics["macs"]] for o in found]
        volume[blind] = hypervolume(points, (0.0, 1.2), [True, False])
    assert volume[False] > volume[True] * 1.02


def test_trials_that_stopped_early_teach_too():
    """Of 40 trials 8 went to the end; what the others had before training tells the best."""
    space = make_space(criteria=["magnitude_l1", "taylor"], select=["ratio"])
    proposer = SurrogateProposer(
        space, {"accuracy": "maximize", "macs": "minimize"}, (), {"accuracy": 0.0, "macs": 1.2}
    )
    all_ = search(space, 40, seed=3, blind=True)
    early = [o.metrics["accuracy"] - 0.3 for o in all_]
    stopped = {"macs": 0.0}
    told = [
        Observation(
            o.params,
            o.candidate,
            o.metrics if n % 5 == 0 else {m: o.metrics[m] for m in stopped},
            early[n],
        )
        for n, o in enumerate(all_)
    ]
    real = np.array([o.metrics["accuracy"] for o in all_])
    error = {}
    for ladder, known in ((True, told), (False, told[::5])):
        models = proposer._models(known)
        features = models.features([o.point for o in all_])
        predicted = models.by_metric["accuracy"].samples(features, None)[0]
        error[ladder] = np.abs(predicted - real).mean()
    assert error[True] < 0.6 * error[False]
    assert proposer.propose(told, [], {o.candidate for o in told}, 1)


def test_what_training_does_not_change_is_not_modelled_by_it():
    space = make_space(criteria=["taylor"], select=["ratio"])
    proposer = SurrogateProposer(
        space, {"accuracy": "maximize", "macs": "minimize"}, (), {"accuracy": 0.0, "macs": 1.2}
    )
    found = search(space, 20, seed=5, blind=True)
    told = [
        dataclasses.replace(
            o,
            early=0.1 + 0.8 * (n % 3) / 2,
            metrics=o.metrics if n % 2 else {"macs": o.metrics["macs"]},
        )
        for n, o in enumerate(found)
    ]
    models = proposer._models(told)
    assert models.by_metric["accuracy"].reads_early and not models.by_metric["macs"].reads_early


def test_a_long_search_does_not_fit_with_each_trial(monkeypatch):
    """Beyond the window that the models read, hyperparameters come from the first trials."""
    space = make_space(criteria=["taylor"], select=["ratio"])
    found = search(space, 44, seed=6, blind=True)
    monkeypatch.setattr(proposer_module, "MOST", 20)
    proposer = SurrogateProposer(
        space, {"accuracy": "maximize", "macs": "minimize"}, (), {"accuracy": 0.0, "macs": 1.2}
    )
    fits = []
    fit = GaussianProcess.fit_hyperparameters
    monkeypatch.setattr(
        GaussianProcess, "fit_hyperparameters", lambda gp: fits.append(gp) or fit(gp)
    )
    sizes = []
    for count in range(21, 45):
        models = proposer._models(proposer._latest(found[:count]), found[:20])
        sizes.append(len(models.by_metric["macs"].gp._y))
        proposer.propose(found[:count], [], {o.candidate for o in found}, count)
    assert max(sizes) < 44  # not all are read
    assert len(fits) == 2  # one for each metric


def test_three_objectives_and_a_constraint_that_cannot_be_met_still_propose():
    """Gains are numbers even where no candidate is likely to hold the bound."""
    space = make_space(criteria=["taylor"], select=["ratio"])
    constraint = Constraint.parse("accuracy >= 0.999")
    proposer = SurrogateProposer(
        space,
        {"accuracy": "maximize", "macs": "minimize", "num_params": "minimize"},
        (constraint,),
        {"accuracy": 0.0, "macs": 1.2, "num_params": 1.2},
    )
    found = [
        dataclasses.replace(o, metrics=o.metrics | {"num_params": o.metrics["macs"] ** 2})
        for o in search(space, 10, seed=4, blind=True)
    ]
    params = proposer.propose(found, [], {o.candidate for o in found}, 1)
    assert space.admits(params)


def test_hints_are_features():
    space = make_space(criteria=["taylor"], select=["ratio"])
    encoder = Encoder(space, lambda params, candidate: (0.25, len(candidate.dropped_blocks) / 4))
    row = encoder.encode([({}, Candidate(dropped_blocks=("layer1.1",)))])[0]
    assert row[encoder.kinds(row.size)[-1]].tolist() == [0.25, 0.25]


def test_it_looks_where_the_constraints_hold():
    space = make_space(criteria=["magnitude_l1", "taylor"], select=["ratio"])
    constraints = parse_config(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "constraints": ["accuracy_drop <= 0.05"],
        }
    ).constraints
    share = {}
    for given in ((), constraints):
        late = search(space, 24, seed=1, constraints=given)[10:]
        share[bool(given)] = sum(o.metrics["accuracy_drop"] <= 0.05 for o in late) / len(late)
    assert share[True] > share[False]


def test_a_running_candidate_is_not_proposed_again_nor_its_neighbour_preferred():
    space = make_space(criteria=["taylor"], select=["ratio"])
    found = search(space, 12, seed=2)
    proposer = SurrogateProposer(
        space, {"accuracy": "maximize", "macs": "minimize"}, (), {"accuracy": 0.0, "macs": 1.2}
    )
    taken = {o.candidate for o in found}
    first = proposer.propose(found, [], taken, 7)
    candidate = space.candidate(first)
    second = proposer.propose(found, [(first, candidate)], taken | {candidate}, 7)
    assert space.candidate(second) != candidate
