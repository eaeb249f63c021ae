"""The fidelity ladder: who is promoted, worked by hand; and what it makes of a ledger."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import scipy.stats

from prunesearch.search.config import parse_config
from prunesearch.search.early_stop import (
    Ladder,
    fidelities,
    ladder_of,
    rank_correlations,
    settled,
)
from prunesearch.search.records import TrialResult, TrialStatus

TWO = {"accuracy": "maximize", "macs": "minimize"}
THREE = TWO | {"latency_ms": "minimize"}
STOPPED = TrialStatus.EARLY_STOPPED


def row(
    name: str, accuracy: float | list[float | None], macs: int = 1, **more: object
) -> TrialResult:
    known = accuracy if isinstance(accuracy, list) else [accuracy]
    made = {"status": STOPPED, "accuracy_by_fidelity": known, "fidelity": len(known) - 1}
    return TrialResult(name, macs=macs, accuracy=known[-1] if known else None, **(made | more))  # type: ignore[arg-type]


def filled(points: dict[str, tuple[float, int]], eta: int = 3, rungs=(0, 1, 2)) -> Ladder:
    ladder = Ladder(TWO, rungs, eta)
    for name, (accuracy, macs) in points.items():
        ladder.report(row(name, accuracy, macs))
    return ladder


def promoted(ladder: Ladder) -> list[tuple[str, int]]:
    return list(iter(ladder.promote, None))


# --- who is promoted -------------------------------------------------------------------------


def test_the_front_and_the_best_third_are_promoted_once():
    """Front: a, b. Rank 1: c. Rank 2: d, e, f, ... Of nine the best three: a, b and c."""
    points = {"a": (0.9, 10), "b": (0.8, 5), "c": (0.85, 20), "d": (0.84, 21), "e": (0.83, 22),
              "f": (0.82, 23), "g": (0.81, 24), "h": (0.7, 25), "i": (0.6, 26)}  # fmt: skip
    ladder = filled(points)
    assert ladder.num_promotable == 3
    assert promoted(ladder) == [("a", 1), ("b", 1), ("c", 1)]
    assert ladder.promote() is None and ladder.num_promotable == 0


def test_the_best_of_uniform_pruning_goes_on_whatever_its_rank():
    ladder = filled({"a": (0.9, 10), "b": (0.8, 5), "c": (0.85, 20)})
    uniform = {"candidate": '{"origin": "seed: uniform fgp"}'}
    ladder.report(row("behind", 0.1, 29, **uniform))
    ladder.report(row("best", 0.2, 29, **uniform))
    ladder.report(row("smaller", 0.1, 28, **uniform))
    assert ladder.num_promotable == 4
    assert promoted(ladder) == [("best", 1), ("smaller", 1), ("a", 1), ("b", 1)]
    ladder.report(row("best", [0.2, 0.3], 29, **uniform))
    assert promoted(ladder) == [("best", 2)]


def test_a_front_of_more_than_the_best_third_is_promoted_whole():
    points = {f"t{n}": (0.5 + n / 100, n) for n in range(9)}
    assert {name for name, _ in promoted(filled(points))} == set(points)


def test_the_first_reports_are_judged_when_they_come():
    ladder = Ladder(TWO, (0, 1, 2), 2)
    ladder.report(row("a", 0.5, 10))
    assert ladder.promote() == ("a", 1)  # alone: a front of one
    ladder.report(row("b", 0.4, 20))
    assert ladder.promote() is None  # dominated, and the best half is a
    ladder.report(row("c", 0.3, 30))
    assert ladder.promote() is None
    ladder.report(row("d", 0.2, 40))
    assert ladder.promote() == ("b", 1)  # the second best of four
    ladder.report(row("c2", 0.6, 5))
    assert ladder.promote() == ("c2", 1)  # a new front of one: nobody is called back


def test_costs_alone_do_not_say_who_goes_on():
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits"},
            "objectives": {"macs": "minimize", "num_params": "minimize"},
            "constraints": ["accuracy >= 0.8"]}  # fmt: skip
    rows = [row("t0", 0.1, 1, num_params=1)]
    rows += [row(f"t{n}", 0.1 + n / 10, 1 + n, num_params=1 + n) for n in range(1, 9)]
    rows.append(row("useless", 0.1, 20, num_params=20))
    names = {name for name, _ in promoted(ladder_of(parse_config(data), rows))}
    assert "t8" in names and "useless" not in names


def test_the_highest_rung_goes_first():
    ladder = filled({"a": (0.9, 10), "b": (0.8, 5)})
    assert ladder.promote() == ("a", 1)
    ladder.report(row("a", [0.9, 0.95], 10))
    assert [ladder.promote(), ladder.promote(), ladder.promote()] == [("a", 2), ("b", 1), None]


def test_a_rung_is_judged_by_the_accuracy_at_that_rung():
    ladder = Ladder(TWO, (0, 1, 2), 9)
    for name, known in (("a", [0.9, 0.1]), ("b", [0.1, 0.9])):
        ladder.report(row(name, known, 10))
    assert promoted(ladder) == [("b", 2)]
    ladder = Ladder({"loss": "minimize"}, (0, 2), 9)
    ladder.report(row("a", 0.8))
    ladder.report(row("b", 0.9))  # the ledger keeps no loss of the lower rungs
    assert promoted(ladder) == [("b", 2)]


def test_ties_are_broken_by_the_epsilon_net():
    """e, and behind it a, b, c, d in room for three: the best, then always the farthest."""
    points = {"a": (0.90, 100), "b": (0.89, 98), "c": (0.80, 60), "d": (0.70, 50), "e": (0.95, 10)}
    crowd = {f"z{n:02d}": (0.1, 200 + n) for n in range(7)}
    names = [name for name, _ in promoted(filled(points | crowd, eta=3))]
    assert names == ["e", "a", "d", "c"]


def test_of_equal_trials_the_first_by_name_is_on_the_front():
    for order in itertools.permutations("abc"):
        assert promoted(filled({name: (0.5, 10) for name in order}, eta=4)) == [("a", 1)]


def test_without_a_measured_objective_a_trial_is_never_promoted():
    ladder = Ladder(THREE, (0, 1, 2), 3)
    ladder.report(row("a", 0.9, 10))
    assert ladder.promote() is None


@pytest.mark.parametrize("seed", range(3))
def test_ranks_of_three_objectives_are_those_of_brute_force(seed):
    draw = random.Random(seed)
    rows = [
        row(f"t{n:02d}", draw.randrange(6) / 10, draw.randrange(6), latency_ms=draw.randrange(4))
        for n in range(40)
    ]
    ladder = Ladder(THREE, (0, 1), 3)
    for one in rows:
        ladder.report(one)
    left = {r.trial_id: (-r.accuracy, r.macs, r.latency_ms, r.trial_id) for r in rows}
    ranks: dict[str, int] = {}
    for rank in itertools.count():
        if not left:
            break
        front = [a for a in left if not any(_before(left[b], left[a]) for b in left)]
        ranks |= dict.fromkeys(front, rank)
        left = {name: cost for name, cost in left.items() if name not in front}
    rung = ladder._rungs[0]
    assert dict(zip(rung._names, rung._ranks.tolist(), strict=True)) == ranks


def _before(one: tuple, other: tuple) -> bool:
    no_worse = all(a <= b for a, b in zip(one[:3], other[:3], strict=True))
    return no_worse and (one[:3] != other[:3] or one[3] < other[3])


# --- the ledger ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_ladder_of_a_ledger_goes_on_as_the_live_one(seed):
    """Random trials climb, fail, or end; at every moment the rows tell the same ladder."""
    draw, rows = random.Random(seed), {}
    config = parse_config({"model": {"name": "resnet20"}, "data": {"name": "digits"},
                           "objectives": TWO})  # fmt: skip
    live = ladder_of(config)
    origins = ['{"origin": "surrogate"}', '{"origin": "seed: uniform fgp"}']
    for number in range(30):
        climber = live.promote() if draw.random() < 0.7 else None
        name, rung = climber or (f"t{number:02d}", 0)
        one = rows.get(name) or row(
            name, [], draw.randrange(9), fidelity=0, candidate=draw.choice(origins)
        )
        if climber is None and draw.random() < 0.2:
            status = draw.choice([TrialStatus.FAILED, TrialStatus.INFEASIBLE])
            known = [0.5] if status == TrialStatus.INFEASIBLE else []
            rows[name] = row(
                name, known, one.macs, status=status, fidelity=0, candidate=one.candidate
            )
        elif rung > 0 and draw.random() < 0.2:
            rows[name] = row(name, one.accuracy_by_fidelity, one.macs,
                             status=TrialStatus.FAILED, candidate=one.candidate)  # fmt: skip
        else:
            known = [*one.accuracy_by_fidelity, draw.randrange(9) / 10]
            status = TrialStatus.COMPLETED if rung == 2 else STOPPED
            rows[name] = row(name, known, one.macs, status=status, candidate=one.candidate)
            live.report(rows[name])
        shuffled = draw.sample(list(rows.values()), len(rows))
        twin = ladder_of(config, [*shuffled, _duplicate(shuffled[0])])
        expected = ladder_of(config, rows.values())
        assert promoted(twin) == promoted(expected)
        assert {r: g.promoted for r, g in ladder_of(config, shuffled)._rungs.items()} == {
            r: g.promoted for r, g in live._rungs.items()
        }
    assert promoted(ladder_of(config, rows.values())) == promoted(live)


def _duplicate(first: TrialResult) -> TrialResult:
    return row("t99", first.accuracy_by_fidelity, 0, status=TrialStatus.DUPLICATE)


@pytest.mark.parametrize(
    ("overrides", "num_train", "pays"),
    [
        (["recover.epochs=1"], 10_000, True),  # 30,000 against 8 x 1,512
        (["recover.epochs=0.4"], 10_000, False),
        (["recover.epochs=0.4", "recover.recalibrate_bn=false"], 10_000, True),  # 8 x 1,000
        (["recover.epochs=0"], 10_000, False),
        (["recover.epochs=0.4", "search.early_stop=true"], 10_000, True),
        (["recover.epochs=9", "search.early_stop=false"], 10_000, False),
    ],
)
def test_the_ladder_is_there_where_fine_tuning_costs_more(overrides, num_train, pays):
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
    config = settled(parse_config(data, overrides), num_train, 1000)
    assert config.search.early_stop is pays


def test_rungs_that_cannot_differ_are_one():
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
    assert fidelities(parse_config(data)) == (0, 1, 2)
    assert fidelities(parse_config(data, ["recover.epochs=0"])) == (2,)
    assert fidelities(parse_config(data, ["search.early_stop=false"])) == (2,)


# --- rank correlations -----------------------------------------------------------------------


def test_rank_correlations_are_spearmans_over_the_trials_that_reached_both():
    draw = np.random.default_rng(0)
    known = draw.integers(0, 6, (12, 3)) / 10  # with ties
    rows = [row(f"t{n}", line.tolist()) for n, line in enumerate(known)]
    rows += [row("short", [0.9]), row("gap", [0.2, None, 0.3]), row("none", [])]
    rows.append(row("copy", [0.0, 1.0, 0.0], status=TrialStatus.DUPLICATE))
    found = {(c.low, c.high): c for c in rank_correlations(rows)}
    assert {key: c.num_trials for key, c in found.items()} == {(0, 1): 12, (0, 2): 13, (1, 2): 12}
    for low, high in ((0, 1), (1, 2)):
        expected = scipy.stats.spearmanr(known[:, low], known[:, high]).statistic
        assert found[low, high].spearman == pytest.approx(expected)


def test_a_poor_correlation_warns_and_says_what_to_do():
    falling = [row(f"t{n}", [n / 10, n / 10, 1 - n / 10]) for n in range(8)]
    fine, first, second = rank_correlations(falling)
    assert fine.spearman == pytest.approx(1) and fine.warning is None
    assert "early_stop: false" in first.warning and "-1.00 over 8 trials" in first.warning
    assert "search.short_share" in second.warning
    assert all(c.warning is None for c in rank_correlations(falling[:7]))
    flat = rank_correlations([row(f"t{n}", [0.1, n / 10]) for n in range(9)])
    assert [(c.spearman, c.warning) for c in flat] == [(None, None)]
