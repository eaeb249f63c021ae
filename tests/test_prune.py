"""From a candidate to its recipe: scores, every selection rule, sparse training."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from prunesearch.methods.measure import count_macs
from prunesearch.methods.surgery import apply, group_norms
from prunesearch.search import prune as module
from prunesearch.search.cache import Made
from prunesearch.search.config import ConfigError, SearchConfig, parse_config
from prunesearch.search.context import TrialContext, TrialSpec
from prunesearch.search.dense import prepare_dense
from prunesearch.search.prune import make_recipe, sparse_norms, start_of
from prunesearch.search.records import Candidate, TrialStatus
from prunesearch.search.setup import pose
from prunesearch.search.shelf import address
from prunesearch.search.trial import run_trial

BLOCK = "layer2.1"
SPARSE = Candidate("dsd", (BLOCK,), "global", k=0.6, dsd_lambda=0.5, dsd_q=0.4, dsd_epochs=2.0)


def config(**sections: Any) -> SearchConfig:
    data: dict[str, Any] = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "image_size": 8, "limit": 250, "batch_size": 32,
                 "calibration_size": 64},
        "baseline": {"epochs": 2, "lr": 0.05},
        "space": {"criteria": ["magnitude_l1", {"fgp": {"feature_point": "act"}}, "random",
                               {"dsd": {"metric_update": "once"}}],
                  "blocks": {"mode": "none"}},
        "recover": {"epochs": 0.5},
    }  # fmt: skip
    return parse_config(data | sections)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> TrialContext:
    problem = pose(config())
    folder: Path = tmp_path_factory.mktemp("run")
    baseline = prepare_dense(problem, folder, lambda message: None)
    return TrialContext(
        problem.config, problem.task, problem.model, problem.plan, baseline.accuracy, None
    )


@pytest.fixture
def context(dense) -> TrialContext:
    return dataclasses.replace(dense, scores={})


def recipe_of(context: TrialContext, candidate: Candidate, seed: int = 1) -> dict[str, Any]:
    recipe, _ = make_recipe(candidate, context, seed, start_of(candidate, context))
    return dict(recipe.kept)


def halved(context: TrialContext, criterion: str) -> Candidate:
    keep = tuple(sorted((group.name, 0.5) for group in context.plan.alive([BLOCK])))
    return Candidate(criterion, (BLOCK,), "ratio", keep)


# --- scores and rules ------------------------------------------------------------------------


def test_the_best_channels_are_kept_and_scored_once(context, monkeypatch):
    calls = []
    score = module.score_channels
    monkeypatch.setattr(
        module, "score_channels", lambda name, *a, **k: calls.append(k) or score(name, *a, **k)
    )
    kept = recipe_of(context, halved(context, "magnitude_l1"))
    norms = context.dense.layer1[0].conv1.weight.abs().flatten(1).sum(1)
    best = sorted(norms.argsort(descending=True)[:8].tolist())
    assert list(kept["layer1.0.conv1"]) == best
    assert all(not name.startswith(BLOCK) for name in kept)
    recipe_of(context, halved(context, "magnitude_l1"))
    recipe_of(context, halved(context, "fgp"))
    assert [call["options"] for call in calls] == [{}, {"feature_point": "act"}]


def test_random_scores_are_drawn_anew_for_each_trial_and_never_shared(context):
    refuse = dataclasses.replace(context, shared=lambda key, make: pytest.fail("shared"))
    first, again, other = (recipe_of(refuse, halved(context, "random"), s) for s in (1, 1, 2))
    assert first == again != other


def test_cumulative_keeps_fewer_channels_for_a_smaller_share(context):
    kept = [
        recipe_of(context, Candidate("magnitude_l1", (), "cumulative", k=k)) for k in (0.3, 0.7, 1)
    ]
    sizes = [sum(map(len, one.values())) for one in kept]
    assert sizes[0] < sizes[1] < sizes[2] == sum(g.num_channels for g in context.plan.groups)


def test_global_keeps_a_share_of_all_channels_and_not_the_same_of_each_group(context):
    kept = recipe_of(context, Candidate("fgp", (), "global", k=0.5))
    shares = {g.name: len(kept[g.name]) / g.num_channels for g in context.plan.groups}
    total = sum(g.num_channels for g in context.plan.groups)
    assert sum(map(len, kept.values())) == pytest.approx(total / 2, abs=len(kept))
    assert len(set(shares.values())) > 3


def test_macs_is_the_cumulative_rule_at_a_budget(context):
    candidate = Candidate("fgp", (BLOCK,), "macs", k=0.4)
    recipe, _ = make_recipe(candidate, context, 1)
    image = context.task.example_input()
    pruned = apply(copy.deepcopy(context.dense), context.plan, recipe)
    share = count_macs(pruned, image) / count_macs(context.dense, image)
    assert 0.35 < share <= 0.4


def test_a_retain_mode_keeps_thirty_percent_of_each_group_by_its_seed(context):
    def kept(rule: str, seed: int) -> dict[str, Any]:
        return recipe_of(context, Candidate("fgp", (), rule), seed)

    assert {len(c) for n, c in kept("peak30", 1).items() if n.startswith("layer1")} == {5}  # of 16
    assert kept("peak30", 1) == kept("peak30", 2)
    assert kept("rand30", 1) == kept("rand30", 1) != kept("rand30", 2)


# --- sparse training -------------------------------------------------------------------------


def test_a_mixed_candidate_trains_sparsely_drops_a_block_and_prunes_inside_blocks(context):
    outcome = run_trial(TrialSpec("t00000", SPARSE, SPARSE.to_json(), 1), context)
    row = outcome.result
    assert row.status is TrialStatus.COMPLETED, row.message
    assert row.dropped_blocks == [BLOCK] and row.score_s > 0
    assert row.latency_ms is None and row.accuracy is not None and row.macs > 0
    internal = group_norms(context.dense, context.plan)
    assert set(outcome.recipe.kept) == {n for n in internal if not n.startswith(BLOCK)}
    removed = 1 - sum(map(len, outcome.recipe.kept.values())) / sum(
        context.plan[name].num_channels for name in outcome.recipe.kept
    )
    assert removed == pytest.approx(0.4, abs=0.01)


def test_the_smallest_scales_of_the_sparse_trained_model_go(context):
    start = start_of(SPARSE, context)
    kept = recipe_of(context, SPARSE)
    kept_scales, removed_scales = [], []
    for group, (norm,) in group_norms(context.dense, context.plan).items():
        scale = start.model.get_submodule(norm).weight.detach().abs()
        assert not torch.equal(scale, context.dense.get_submodule(norm).weight.abs())
        if group in kept and len(kept[group]) > 1:  # one channel a group always stays
            mask = torch.zeros_like(scale, dtype=torch.bool)
            mask[list(kept[group])] = True
            kept_scales.append(scale[mask])
            removed_scales.append(scale[~mask])
    assert torch.cat(kept_scales).min() >= torch.cat(removed_scales).max()


def test_trials_that_ask_for_the_same_sparse_training_share_it(context):
    made: dict[str, Made] = {}
    keys = []

    def shared(key: Any, make: Any) -> tuple[Made, float]:
        keys.append(dict(key))
        name = address(key)
        if name not in made:
            made[name] = make()
            return made[name], 0.0
        return made[name], 1.5

    sharing = dataclasses.replace(context, shared=shared)
    other_blocks = dataclasses.replace(SPARSE, dropped_blocks=("layer1.1",))
    stronger = dataclasses.replace(SPARSE, dsd_lambda=0.9)
    first = run_trial(TrialSpec("t0", SPARSE, "{}", 1), sharing).result
    second = run_trial(TrialSpec("t1", other_blocks, "{}", 2), sharing).result
    run_trial(TrialSpec("t2", stronger, "{}", 3), sharing)
    assert len(keys) == 3 and len(made) == 2
    assert (first.wait_s, second.wait_s) == (0.0, 1.5)
    info = next(iter(made.values())).info
    assert (info["dsd_lambda"], info["dsd_q"], info["dsd_epochs"]) == (0.5, 0.4, 2.0)
    assert 0 <= info["accuracy"] <= 1 and len(info["history"]["epochs"]) >= 2
    assert keys[0]["options"] == {"metric_update": "once"}


def test_a_model_without_batch_norms_inside_blocks_is_refused_before_any_training():
    plain = {"model": {"name": "torchvision:alexnet"}, "data": {"name": "digits",
             "image_size": 64, "limit": 60}}  # fmt: skip
    with pytest.raises(ConfigError, match=r"`space.criteria` \(=dsd\) must have batch norms"):
        pose(config(**plain, space={"criteria": ["dsd"], "blocks": {"mode": "none"}}))


def test_the_norms_of_sparse_training_are_those_inside_blocks(context):
    assert sparse_norms(context.dense, context.plan) == [
        f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in (0, 1, 2)
    ]


# --- block by block --------------------------------------------------------------------------


def test_reconstruction_keeps_the_recipes_widths_and_the_exported_recipe_replays(context):
    settings = {"epochs": 0, "reconstruct": {"steps": 2, "epochs": 1, "num_vectors": 32}}
    blockwise = dataclasses.replace(
        context,
        config=config(
            recover=settings,
            space={"criteria": [{"blockwipg": {"num_images": 4}}], "blocks": {"mode": "none"}},
        ),
    )
    outcome = run_trial(TrialSpec("t0", halved(context, "blockwipg"), "{}", 1), blockwise)
    assert outcome.result.status is TrialStatus.COMPLETED, outcome.result.message
    widths = {name: len(kept) for name, kept in outcome.recipe.kept.items()}
    assert widths == {g.name: g.num_channels // 2 for g in context.plan.alive([BLOCK])}
    replayed = apply(copy.deepcopy(context.dense), context.plan, outcome.recipe)
    replayed.load_state_dict(outcome.state)  # the same shapes
    again = run_trial(TrialSpec("t0", halved(context, "blockwipg"), "{}", 1), blockwise)
    assert again.recipe == outcome.recipe
