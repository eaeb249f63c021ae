"""The space: conditional dimensions, canonical candidates, seeds inside the bounds."""

import itertools
import json
from typing import Any

import optuna
import pytest
import torch
from helpers import ranked
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import PruningPlan
from prunesearch.search.config import SpaceConfig, parse_config
from prunesearch.search.records import Candidate
from prunesearch.search.seeds import make_seeds
from prunesearch.search.space import (
    Space,
    effective_widths,
    kept_channels,
    lambda_grid,
    snap,
)

ORDER = ("layer2.1", "layer1.2", "layer3.1", "layer1.1", "layer3.2", "layer2.2")
STAGES = ("keep:stage1", "keep:stage2", "keep:stage3")


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))


def config(**space: Any) -> SpaceConfig:
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "space": space}
    return parse_config(data).space


@pytest.fixture
def make(plan):
    def space(**options: Any) -> Space:
        return Space(config(**options), plan, ranked(ORDER))

    return space


def samples(space: Space, count: int, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found = []
    for _ in range(count):
        trial = study.ask()
        found.append(space.suggest(trial))
        study.tell(trial, 0.0)
    return found


def ratio(keep: float = 0.5, dropped: tuple[str, ...] = (), **other: Any) -> dict[str, Any]:
    blocks = {f"drop:{block}": block in dropped for block in ORDER}
    return blocks | {"criterion": "fgp", "select": "ratio"} | dict.fromkeys(STAGES, keep) | other


# --- dimensions ------------------------------------------------------------------------------


def test_keep_exists_only_under_ratio_and_top_k_only_under_cumulative(make):
    rules = set()
    for params in samples(make(), 30):
        rules.add(params["select"])
        channels = {name for name in params if not name.startswith("drop:")}
        extra = set(STAGES) if params["select"] == "ratio" else {"top_k"}
        assert channels == {"criterion", "select"} | extra
        assert sum(name.startswith("drop:") for name in params) == len(ORDER)
    assert rules == {"ratio", "cumulative"}


@pytest.mark.parametrize(("per", "count"), [("model", 1), ("stage", 3), ("group", 12)])
def test_keep_is_shared_by_model_stage_or_group(make, per, count):
    space = make(keep={"per": per}, select=["ratio"])
    (params,) = samples(space, 1)
    assert sum(name.startswith("keep") for name in params) == count


def test_distributions_are_those_that_apply_and_refuse_what_is_outside(make):
    space = make(keep={"low": 0.4, "high": 0.9})
    found = space.distributions(ratio(0.5))
    assert found["keep:stage2"] == FloatDistribution(0.4, 0.9)
    assert found["drop:layer2.1"] == CategoricalDistribution((False, True))
    assert "top_k" not in found
    with pytest.raises(ValueError, match=r"`keep:stage1` \(=0.95\) must lie in"):
        space.distributions(ratio(0.95))
    with pytest.raises(KeyError, match="top_k"):
        space.distributions(ratio() | {"select": "cumulative"})
    for params in samples(space, 10):
        assert space.distributions(params).keys() == params.keys()


def test_without_criteria_or_groups_no_channel_dimension_exists(make, plan):
    for space in (make(criteria=[]), Space(config(), PruningPlan((), {}), ranked(ORDER))):
        (params,) = samples(space, 1)
        assert params.keys() == {f"drop:{block}" for block in ORDER}
        assert space.candidate(params).criterion is None
        assert "channel" not in space.size_hint


# --- blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_drop", "most"), [(0, 0), (0.34, 2), (0.5, 3), (1, 6)])
def test_a_mask_over_the_limit_drops_the_best_ranked_blocks(make, max_drop, most):
    space = make(blocks={"max_drop": max_drop})
    assert space.max_blocks == most
    everything = space.candidate(ratio(dropped=ORDER))
    assert everything.dropped_blocks == tuple(sorted(ORDER[:most]))
    some = space.candidate(ratio(dropped=ORDER[3:5]))
    assert some.dropped_blocks == tuple(sorted(ORDER[3:5][:most]))


def test_a_limit_that_is_a_whole_number_of_blocks_is_not_lost_to_rounding(plan):
    order = tuple(f"b{i}" for i in range(10))
    spaces = [Space(config(blocks={"max_drop": n / 10}), plan, ranked(order)) for n in range(11)]
    assert [space.max_blocks for space in spaces] == list(range(11))


def test_ranked_mode_drops_a_prefix_of_the_order(make):
    space = make(blocks={"mode": "ranked"})
    params = {k: v for k, v in ratio().items() if not k.startswith("drop:")} | {"num_blocks": 2}
    assert space.distributions(params)["num_blocks"] == IntDistribution(0, 3)
    assert space.candidate(params).dropped_blocks == tuple(sorted(ORDER[:2]))
    found = {len(space.candidate(p).dropped_blocks) for p in samples(space, 30)}
    assert found == {0, 1, 2, 3}


def test_mode_none_drops_nothing(make):
    space = make(blocks={"mode": "none"})
    assert all(not space.candidate(p).dropped_blocks for p in samples(space, 5))
    assert "block" not in space.size_hint


# --- canonical candidates --------------------------------------------------------------------


def test_equal_widths_are_equal_candidates(make):
    space = make()
    near, same, other = (space.candidate(ratio(keep)) for keep in (0.5, 0.4999, 0.4))
    assert near == same and near.key == same.key
    assert other != near and other.key != near.key
    assert dict(near.keep)["layer3.0.conv1"] == 0.5 and dict(near.keep)["conv1"] == 0.5


def test_a_group_inside_a_dropped_block_does_not_count(make):
    space = make(keep={"per": "group"})
    base = {k: v for k, v in ratio(dropped=("layer2.1",)).items() if k not in STAGES}
    base |= {f"keep:{group.name}": 0.5 for group in space.plan.groups}
    one = space.candidate(base)
    two = space.candidate(base | {"keep:layer2.1.conv1": 0.9})
    assert one == two and "layer2.1.conv1" not in dict(one.keep)
    assert space.candidate(base | {"keep:layer2.2.conv1": 0.9}) != one


def test_everything_kept_has_no_criterion(make):
    space = make()
    assert space.candidate(ratio(1.0)) == Candidate()
    assert space.candidate(ratio(0.999, dropped=("layer1.1",))) == Candidate(
        dropped_blocks=("layer1.1",)
    )


def test_the_keep_fractions_are_those_of_whole_channels_and_are_a_fixed_point(make):
    space = make(keep={"per": "group", "round_to": 8})
    for params in samples(space, 20):
        candidate = space.candidate(params)
        if candidate.select != "ratio":
            continue
        for name, keep in candidate.keep:
            group = space.plan[name]
            assert keep * group.num_channels % 8 == 0
            assert kept_channels(group, keep, 8) == keep * group.num_channels
        again = params | {f"keep:{name}": keep for name, keep in candidate.keep}
        assert space.candidate(again) == candidate
    assert effective_widths(space.plan.groups, 0.3, 8)["layer3.0.conv1"] == 24


def test_cumulative_candidates_hold_k_alone(make):
    params = ratio() | {"select": "cumulative", "top_k": 0.123456}
    candidate = make().candidate({k: v for k, v in params.items() if k not in STAGES})
    assert candidate == Candidate("fgp", (), "cumulative", k=0.123)


def test_a_candidate_survives_json_and_its_key_is_its_content(make):
    import json

    for params in samples(make(), 10):
        candidate = make().candidate(params)
        back = Candidate.from_mapping(json.loads(candidate.to_json()) | {"origin": "tpe"})
        assert back == candidate and back.key == candidate.key


# --- seeds -----------------------------------------------------------------------------------


def test_seeds_are_dense_then_the_ladders_and_the_ranked_path_in_turn(make):
    space = make(criteria=["fgp", "taylor"], keep={"low": 0.3})
    seeds = make_seeds(space, 100)
    assert [s.origin for s in seeds[:4]] == [
        "seed: dense", "seed: uniform fgp", "seed: uniform taylor", "seed: ranked blocks",
    ]  # fmt: skip
    candidates = [space.candidate(seed.params) for seed in seeds]
    assert candidates[0] == Candidate()
    assert len(candidates) == 1 + 2 * 5 + 3 and len(set(candidates)) == len(candidates)
    path = [c.dropped_blocks for c in candidates if c.dropped_blocks]
    assert path == [tuple(sorted(ORDER[:n])) for n in (2, 1, 3)]
    ladder = [dict(c.keep)["layer3.0.conv1"] for c in candidates if c.criterion == "fgp"]
    assert ladder == [48 / 64, 29 / 64, 58 / 64, 39 / 64, 20 / 64]
    assert make_seeds(space, 3) == seeds[:3] and make_seeds(space, 0) == []


@pytest.mark.parametrize("mode", ["mask", "ranked", "none"])
@pytest.mark.parametrize("per", ["model", "stage", "group"])
def test_every_seed_lies_within_the_bounds(make, mode, per):
    for low, high, rule in itertools.product((0.1, 0.5), (0.8, 1.0), (["ratio"], ["cumulative"])):
        space = make(
            blocks={"mode": mode}, keep={"per": per, "low": low, "high": high}, select=rule
        )
        for seed in make_seeds(space, 50):
            space.distributions(seed.params)
            assert all(low <= v <= high for k, v in seed.params.items() if k.startswith("keep"))


def test_coarse_widths_make_no_duplicate_seeds(make):
    space = make(keep={"round_to": 16})
    candidates = [space.candidate(seed.params) for seed in make_seeds(space, 100)]
    assert len(set(candidates)) == len(candidates)


def test_a_space_of_blocks_alone_has_seeds_too(make):
    seeds = make_seeds(make(criteria=[]), 10)
    assert [seed.origin for seed in seeds] == ["seed: dense", *["seed: ranked blocks"] * 3]


# --- sparse training and the other rules -----------------------------------------------------


def test_lambda_q_and_epochs_exist_only_with_dsd_and_nothing_else_then(make):
    space = make(criteria=["taylor", "dsd"], select=["ratio", "global", "macs", "peak30"])
    seen = set()
    for params in samples(space, 60):
        channels = {name for name in params if not name.startswith("drop:")} - {"criterion"}
        if params["criterion"] == "dsd":
            assert channels == {"dsd_lambda", "dsd_q", "dsd_epochs"}
            continue
        extra = {"ratio": set(STAGES), "global": {"keep:global"}, "macs": {"macs_keep"}}
        assert channels == {"select"} | extra.get(params["select"], set())
        seen.add(params["select"])
    assert seen == {"ratio", "global", "macs", "peak30"}


def test_a_sparse_candidate_prunes_globally_at_q_with_blocks_dropped_too(make):
    space = make(criteria=["dsd"], dsd_q={"low": 0.3, "high": 0.7, "step": 0.2})
    params = {f"drop:{block}": block == "layer2.1" for block in ORDER}
    params |= {"criterion": "dsd", "dsd_lambda": 2.9e-4, "dsd_q": 0.5, "dsd_epochs": 6.0}
    candidate = space.candidate(params)
    assert candidate == Candidate(
        "dsd", ("layer2.1",), "global", k=0.5,
        dsd_lambda=pytest.approx(10**-3.5), dsd_q=0.5, dsd_epochs=6.0,
    )  # fmt: skip
    assert Candidate.from_mapping(json.loads(candidate.to_json())) == candidate


def test_lambda_snaps_to_a_grid_so_that_trials_share_their_sparse_training(make):
    space = make(criteria=["dsd"], dsd_lambda={"low": 1e-4, "high": 1e-2, "num": 3})
    assert lambda_grid(space.config.dsd_lambda) == pytest.approx([1e-4, 1e-3, 1e-2])
    found = {space.candidate(params).dsd_lambda for params in samples(space, 40)}
    assert found == set(lambda_grid(space.config.dsd_lambda))
    linear = config(dsd_lambda={"low": 0.1, "high": 0.3, "log": False, "num": 3}).dsd_lambda
    assert lambda_grid(linear) == pytest.approx([0.1, 0.2, 0.3])
    assert snap(linear, 0.24) == pytest.approx(0.2)
    assert lambda_grid(config(dsd_lambda={"low": 1e-3, "high": 1e-3, "num": 1}).dsd_lambda) == [
        1e-3
    ]


def test_q_never_exceeds_its_range_when_the_step_does_not_divide_it(make):
    space = make(criteria=["dsd"], dsd_q={"low": 0.3, "high": 0.65, "step": 0.2})
    assert {params["dsd_q"] for params in samples(space, 40)} == {0.3, 0.5}


def test_seeds_of_every_criterion_and_rule_lie_in_the_space(make):
    for rules in (["global"], ["macs"], ["peak30", "rand30"], ["cumulative"], ["ratio"]):
        space = make(criteria=["taylor", "dsd"], select=rules)
        seeds = make_seeds(space, 100)
        assert {space.candidate(seed.params).criterion for seed in seeds} >= {"dsd"}
        for seed in seeds:
            space.distributions(seed.params)


def test_a_ledger_without_sparse_training_still_reads(make):
    old = {"criterion": "fgp", "dropped_blocks": [], "select": "cumulative", "keep": {}, "k": 0.5}
    assert Candidate.from_mapping(old) == Candidate("fgp", (), "cumulative", k=0.5)


def test_only_equal_fractions_are_called_uniform_and_only_the_dense_model_dense(make):
    origins = {
        seed.origin
        for seed in make_seeds(make(criteria=["taylor", "dsd"], select=["ratio", "macs"]), 100)
    }
    assert {"seed: dense", "seed: uniform taylor", "seed: dsd ladder"} <= origins
    assert "seed: uniform dsd" not in origins
    for options in ({"criteria": ["dsd"]}, {"select": ["macs"]}, {"select": ["rand30"]}):
        origins = {seed.origin for seed in make_seeds(make(**options), 100)}
        assert "seed: dense" not in origins and "seed: least pruned" in origins
        assert not any("uniform" in origin for origin in origins)


def test_a_rule_that_removes_nothing_is_the_candidate_without_a_criterion(make):
    space = make(criteria=["taylor", "dsd"], select=["global", "macs"])
    blocks = {f"drop:{block}": False for block in ORDER}
    for rule, name in (("global", "keep:global"), ("macs", "macs_keep")):
        params = blocks | {"criterion": "taylor", "select": rule, name: 1.0}
        assert space.candidate(params) == Candidate()


def test_nothing_is_pruned_where_every_group_is_dropped_with_its_block(plan):
    inner = tuple(g for g in plan.groups if g.name.startswith("layer1.1."))
    space = Space(
        config(criteria=["taylor", "dsd"], blocks={"max_drop": 1.0}),
        PruningPlan(inner, {}),
        ranked(["layer1.1"]),
    )
    for params in samples(space, 20):
        if params["drop:layer1.1"]:
            assert space.candidate(params) == Candidate(dropped_blocks=("layer1.1",))
