"""The front against brute force and Optuna; choosing a member; the picture."""

import itertools
import math
from pathlib import Path

import numpy as np
import optuna  # noqa: TID251
import pytest

from prunesearch.search.front import (
    Front,
    choose,
    front_hypervolume,
    front_of,
    hypervolume,
    non_dominated,
    reference_point,
)
from prunesearch.search.plot import plot_front
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.yaml_source import ConfigError

OBJECTIVES = {"accuracy": "maximize", "latency_ms": "minimize"}
BASELINE = {"accuracy": 0.9, "latency_ms": 2.0, "loss": 0.1, "macs": 1e6, "speedup": 1.0}


def trial(name: str, accuracy: float | None, latency_ms: float | None, **changes: object):
    made = {"accuracy": accuracy, "latency_ms": latency_ms, "status": TrialStatus.COMPLETED}
    if accuracy is not None:
        made["accuracy_drop"] = 0.9 - accuracy
    return TrialResult(name, **(made | changes))  # type: ignore[arg-type]


TRIALS = [
    trial("a", 0.90, 2.0),
    trial("b", 0.85, 1.0),
    trial("c", 0.85, 1.5),  # dominated by b
    trial("d", 0.50, 0.5),
    trial("e", 0.99, 0.1, status=TrialStatus.INFEASIBLE),
    trial("f", 0.99, None),
    trial("g", None, None, status=TrialStatus.FAILED),
    trial("h", 0.85, 1.0, status=TrialStatus.DUPLICATE),
]


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_non_dominated_equals_the_definition(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    for _ in range(20):
        points = rng.integers(0, 4, (25, num_objectives)).astype(float)  # many equal points
        points[3, 0] = np.nan
        maximize = rng.integers(0, 2, num_objectives).astype(bool)
        signed = np.where(maximize, -points, points)
        expected = [
            not np.isnan(p).any()
            and not any((q <= p).all() and (q < p).any() for q in signed)
            and not any((q == p).all() for q in signed[:index])
            for index, p in enumerate(signed)
        ]
        assert non_dominated(points, list(maximize)).tolist() == expected


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_hypervolume_equals_counting_cells(num_objectives: int) -> None:
    """On an integer grid the volume is the number of unit cells that some point dominates."""
    rng = np.random.default_rng(num_objectives)
    size = 5
    for _ in range(10):
        points = rng.integers(0, size + 2, (12, num_objectives))  # some beyond the reference
        maximize = rng.integers(0, 2, num_objectives).astype(bool)
        signed = np.where(maximize, -points, points)
        reference = np.full(num_objectives, size)
        cells = itertools.product(range(size), repeat=num_objectives)
        expected = sum(any((p <= cell).all() for p in points) for cell in cells)
        got = hypervolume(signed, np.where(maximize, -reference, reference), list(maximize))
        assert got == expected


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_hypervolume_equals_optuna(num_objectives: int) -> None:
    points = np.random.default_rng(0).random((40, num_objectives))
    reference = np.full(num_objectives, 1.1)
    expected = optuna._hypervolume.compute_hypervolume(points, reference)
    assert hypervolume(points, reference, [False] * num_objectives) == pytest.approx(expected)
    assert hypervolume(-points, -reference, [True] * num_objectives) == pytest.approx(expected)


def test_hypervolume_by_hand() -> None:
    # two boxes of 1 x 2 and 2 x 1 that share 1 x 1
    assert hypervolume([[0, 1], [1, 0]], [2, 2], [False, False]) == 3
    assert hypervolume([], [2, 2], [False, False]) == 0
    assert hypervolume([[2, 0], [np.nan, 0]], [2, 2], [False, False]) == 0


def test_front_holds_completed_measured_trials_fastest_first() -> None:
    assert [r.trial_id for r in front_of(TRIALS, OBJECTIVES)] == ["d", "b", "a"]
    assert [r.trial_id for r in front_of(TRIALS, {"latency_ms": "minimize"})] == ["d"]
    assert front_of([], OBJECTIVES) == []
    by_accuracy = {"latency_ms": "minimize", "accuracy": "maximize"}
    assert [r.trial_id for r in front_of(TRIALS, by_accuracy)] == ["a", "b", "d"]


THREE = OBJECTIVES | {"macs": "minimize"}


@pytest.mark.parametrize("objectives", [{"latency_ms": "minimize"}, OBJECTIVES, THREE])
@pytest.mark.parametrize("seed", range(5))
def test_a_growing_front_equals_the_front_of_all(objectives: dict[str, str], seed: int) -> None:
    """On a coarse grid, so that many points are equal, and in any order of arrival."""
    rng = np.random.default_rng(seed)
    trials = [
        trial(f"t{n:05d}", accuracy / 10, latency / 2, macs=float(macs) * 1e5)
        for n, (accuracy, latency, macs) in enumerate(rng.integers(1, 10, (60, 3)))
    ]
    trials[3].latency_ms = None
    trials[5].latency_ms = math.nan
    trials[7].status = TrialStatus.INFEASIBLE
    front = Front(objectives, reference_point(BASELINE, objectives))
    arrived: list[TrialResult] = []
    for index in rng.permutation(len(trials)):
        before = front.members
        arrived.append(trials[index])
        changed = front.add(trials[index])
        ordered = sorted(arrived, key=lambda r: r.trial_id)
        assert front.members == front_of(ordered, objectives)
        assert changed == (front.members != before)
        expected = front_hypervolume(arrived, BASELINE, objectives)
        assert front.hypervolume == pytest.approx(expected, abs=1e-9 * BASELINE["macs"])
    assert front.hypervolume > 0


def test_reference_point_and_hypervolume_of_trials() -> None:
    objectives = dict.fromkeys(["accuracy", "latency_ms", "loss", "speedup", "accuracy_drop"], "")
    assert reference_point(BASELINE, objectives) == pytest.approx(
        (0, 2.2, math.log(10), 1 / 1.1, 0.9)
    )
    expected = 0.5 * (2.2 - 0.5) + 0.35 * (2.2 - 1.0) + 0.05 * (2.2 - 2.0)
    assert front_hypervolume(TRIALS, BASELINE, OBJECTIVES) == pytest.approx(expected)
    assert front_hypervolume([], BASELINE, OBJECTIVES) == 0


def test_choose_takes_the_best_that_satisfies() -> None:
    assert choose(TRIALS, minimize="latency_ms").trial_id == "d"
    assert choose(TRIALS, minimize="latency_ms", where=["accuracy_drop<=0.06"]).trial_id == "b"
    assert choose(TRIALS, maximize="accuracy", where=["latency_ms < 2"]).trial_id == "b"
    tie = [trial("x", 0.7, 1.0), trial("y", 0.8, 1.0)]
    assert choose(tie, minimize="latency_ms").trial_id == "y"


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"minimize": "latency_ms", "where": ["accuracy_drop <= -0.1"]}, ["trial a", "= 0"]),
        (
            {"minimize": "latency_ms", "where": ["accuracy >= .8", "latency_ms < .9"]},
            ["none of 4 satisfies", "trial b", "accuracy = 0.85, latency_ms = 1"],
        ),
        ({"minimize": "latency"}, ["`metric` (=latency)", "Did you mean `latency_ms`?"]),
        ({"minimize": "macs"}, ["`macs` must have been measured", "none of 8"]),
        ({"minimize": "latency_ms", "where": ["acc < 1"]}, ["`where` (=acc < 1)", "accuracy"]),
        ({"minimize": "latency_ms", "where": ["accuracy"]}, ["`metric <= number`"]),
        ({}, ["exactly one"]),
        ({"minimize": "macs", "maximize": "accuracy"}, ["exactly one"]),
    ],
)
def test_choose_says_what_is_wrong(arguments: dict, pieces: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(TRIALS, **arguments)
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)


def test_picture(tmp_path: Path) -> None:
    uniform = '{"origin": "seed: uniform fgp"}'
    trials = [*TRIALS, trial("r", 0.6, 1.2, criterion="random"), trial("u", 0.7, 0.7)]
    trials[-1].candidate = uniform
    svg = plot_front(trials, BASELINE, tmp_path / "front.svg", title="a title")
    assert svg.read_bytes().startswith(b"<?xml")
    png = plot_front(trials, BASELINE, tmp_path / "front.png")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    plot_front([], {}, tmp_path / "empty.png", x="macs", y="accuracy_drop")
    for wrong in ({"x": "latency"}, {"y": "macss"}):
        with pytest.raises(ConfigError, match="Did you mean"):
            plot_front(trials, BASELINE, tmp_path / "x.png", **wrong)
    with pytest.raises(ConfigError, match=r"`plot` \(=gif\) must be one of png, svg, pdf"):
        plot_front(trials, BASELINE, tmp_path / "x.gif")
