"""One member of a front, asked for in four ways; two fronts beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import Invoke
from made_runs import ROWS, row, rows_run

from prunesearch.search import ConfigError, Run
from prunesearch.search.choose import Wish, parse_phrase
from prunesearch.search.front import choose, knee_sums

PHRASES = {
    "fastest": Wish(minimize="latency_ms"),
    "Fastest within 1 %": Wish(minimize="latency_ms", where=("accuracy_drop <= 0.01",)),
    "fastest within 0.5%": Wish(minimize="latency_ms", where=("accuracy_drop <= 0.005",)),
    "most  accurate under 3 ms": Wish(maximize="accuracy", where=("latency_ms < 3",)),
    "most accurate at least 2x": Wish(maximize="accuracy", where=("speedup >= 2",)),
    "fastest on edge at least 90 %": Wish(minimize="latency_ms@edge", where=("accuracy >= 0.9",)),
    "smallest under 3 ms on edge and at least 1.5 x on edge": Wish(
        minimize="num_params", where=("latency_ms@edge < 3", "speedup@edge >= 1.5")
    ),
    "fewest MACs under 2 MiB": Wish(minimize="macs", where=("peak_memory_mib < 2",)),
    "least memory under 2M MACs and under 300 k parameters": Wish(
        minimize="peak_memory_mib", where=("macs < 2000000", "num_params < 300000")
    ),
    "knee under 1.5 G macs": Wish(knee=True, where=("macs < 1500000000",)),
    " knee ": Wish(knee=True),
}


@pytest.mark.parametrize("text", PHRASES)
def test_a_phrase_means(text: str) -> None:
    assert parse_phrase(text) == PHRASES[text]


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "nothing"),
        ("quickest", "quickest"),
        ("fastest within 1", "within 1"),
        ("fastest within -1 %", "within -1 %"),
        ("fastest and", "and"),
        ("fastest within 1 % or under 3 ms", "within 1 % or under 3 ms"),
        ("fastest within 1 % and ", "within 1 % and"),
        ("fastestwithin 1 %", "fastestwithin 1 %"),
        ("most accurate on edge", "most accurate on edge"),
        ("under 3 ms", "under 3 ms"),
        ("fastest under 3 MACs; import os", "under 3 MACs; import os"),
    ],
)
def test_what_is_no_phrase_is_refused_with_the_grammar(text: str, piece: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_phrase(text)
    message = str(caught.value)
    assert f"'{piece}' is not understood" in message, message
    assert "BEST is fastest, most accurate" in message and "'fastest within 1 %'" in message


@pytest.mark.parametrize(
    ("given", "piece"),
    [
        ({"minimize": "macs", "maximize": "accuracy"}, "must not be combined"),
        ({"knee": True, "phrase": "knee"}, "must not be combined"),
        ({"where": ["macs < 1"]}, "`--where` (=macs < 1) must stand beside"),
    ],
)
def test_one_wish_at_a_time(given: dict, piece: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Wish.of(**given)
    assert piece in str(caught.value)


def test_bounds_of_a_phrase_and_of_where_both_hold() -> None:
    wish = Wish.of(phrase="fastest within 1 %", where=["macs < 5"])
    assert wish is not None and wish.where == ("accuracy_drop <= 0.01", "macs < 5")
    assert Wish.of() is None


def test_the_knee_is_furthest_from_the_line_through_the_extremes() -> None:
    """By hand: on the front 1/x the point (1, 1) bulges most between (1/4, 4) and (4, 1/4)."""
    xs = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    points = np.stack([xs, 1 / xs], axis=1)
    assert int(knee_sums(points, [False, False]).argmin()) == 2
    assert int(knee_sums(points * [-1, 1000], [True, False]).argmin()) == 2  # scale and sign
    (dx, dy), (x, y) = points[-1] - points[0], (points - points[0]).T
    assert int(np.abs(dx * y - dy * x).argmax()) == 2
    one = knee_sums([[3.0, 7.0]], [False, True])
    assert one.tolist() == [0.0]


def test_choose_at_the_knee() -> None:
    objectives = {"accuracy": "maximize", "latency_ms": "minimize"}
    members = [one for one in ROWS if one.trial_id in ("t00000", "t00001", "t00002", "t00003")]
    assert choose(members, knee=objectives).trial_id == "t00002"
    bound = ["accuracy_drop <= 0.01"]
    assert choose(members, where=bound, knee=objectives).trial_id == "t00001"
    with pytest.raises(ConfigError, match="exactly one of"):
        choose(members, minimize="macs", knee=objectives)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return rows_run(tmp_path / "one")


def test_a_run_is_asked_in_words(run: Run) -> None:
    assert run.choose(phrase="fastest within 1 %").trial_id == "t00001"
    assert run.choose(phrase="most accurate under 2 ms").trial_id == "t00002"
    assert run.choose(knee=True).trial_id == "t00002"
    assert run.choose(minimize="latency_ms").trial_id == "t00003"
    with pytest.raises(ConfigError, match="closest is trial t00003 with latency_ms = 1.2"):
        run.choose(phrase="most accurate under 1 ms")
    with pytest.raises(ConfigError, match="exactly one of"):
        run.choose()
    with pytest.raises(ConfigError, match="latency_ms@edge"):
        run.choose(phrase="fastest on edge")


def test_front_prints_the_one_that_is_asked_for(invoke: Invoke, run: Run) -> None:
    code, out, err = invoke("front", run.folder, "--choose", "fastest within 1 %", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [member["trial_id"] for member in found["front"]] == ["t00001"]
    assert found["baseline"]["latency_ms"] == 4.0
    code, out, _ = invoke("front", run.folder, "--knee", "--where", "latency_ms<2")
    assert code == 0 and "t00002" in out and "dense" in out and "t00001" not in out
    code, out, _ = invoke("front", run.folder, "--json")
    assert code == 0 and len(json.loads(out)["front"]) == 4


def test_knee_in_other_axes(invoke: Invoke, run: Run) -> None:
    code, out, err = invoke("front", run.folder, "--knee", "--x", "macs", "--json")
    assert code == 0, err
    assert json.loads(out)["front"][0]["trial_id"] == "t00002"


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--choose", "best"], "--choose"),
        (["--min", "speed"], "Did you mean `speedup`?"),
        (["--min", "macs", "--knee"], "must not be combined"),
        (["--where", "macs<1"], "must stand beside"),
        (["B"], "--diff"),
        (["--diff"], "two runs"),
        (["B", "--diff", "--knee"], "must not be combined"),
    ],
)
def test_wrong_wishes_exit_2(arguments: list[str], piece: str, invoke: Invoke, run: Run) -> None:
    code, _, err = invoke("front", run.folder, *arguments)
    assert code == 2 and piece in err.replace("\n", " ") and "Traceback" not in err


# --- two fronts ------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Run:
    """Faster than `one` in the middle, and with another dense model."""
    rows = [row("t00000", 0.94, 2.0), row("t00007", 0.930, 1.5), row("t00009", 0.4, 1.3)]
    changes = {"latency_ms": 5.0, "accuracy": 0.96}
    return rows_run(tmp_path / "two", rows, "data.seed=1", **changes)


def test_two_fronts_from_one_corner(run: Run, other: Run, invoke: Invoke) -> None:
    code, out, err = invoke("front", "--diff", run.folder, other.folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["reference_point"] == {"accuracy": 0.0, "latency_ms": pytest.approx(5.5)}
    # by hand: boxes from the corner (0, 5.5), left to right
    one = 0.5 * (5.5 - 1.2) + 0.43 * (5.5 - 1.5) + 0.015 * (5.5 - 2.5) + 0.005 * (5.5 - 4.0)
    two = 0.4 * (5.5 - 1.3) + 0.53 * (5.5 - 1.5) + 0.01 * (5.5 - 2.0)
    both = one + 0.01 * (2.5 - 2.0)
    volumes = found["hypervolume"]
    assert [volumes[k] for k in ("a", "b", "both")] == pytest.approx([one, two, both])
    # of the other's three, t00007 is equal to one of ours and t00009 is dominated
    assert found["coverage"] == {"of_b_by_a": pytest.approx(2 / 3), "of_a_by_b": 0.25}
    above = {(m["run"], m["trial_id"]): m["dominated_by"] for m in found["members"]}
    assert above == {
        ("a", "t00003"): [], ("b", "t00009"): ["t00003"], ("a", "t00002"): [],
        ("b", "t00007"): [], ("b", "t00000"): [], ("a", "t00001"): [], ("a", "t00000"): [],
    }  # fmt: skip
    assert list(above) == sorted(above, key=lambda key: next(
        m["latency_ms"] for m in found["members"] if (m["run"], m["trial_id"]) == key
    ))  # fmt: skip
    assert any("data.seed differs: 0 and 1" in note for note in found["notes"])
    assert any("0.9500 and 0.9600" in note for note in found["notes"])


def test_two_fronts_for_people(run: Run, other: Run, invoke: Invoke) -> None:
    code, out, err = invoke("front", run.folder, other.folder, "--diff")
    assert code == 0, err
    assert "67%" in out and "25%" in out and "note: data.seed differs" in out
    line = next(line for line in out.splitlines() if "t00009" in line)
    assert "t00003" in line


def test_a_run_beside_itself_is_covered_whole(run: Run, invoke: Invoke) -> None:
    code, out, _ = invoke("front", "--diff", run.folder, run.folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["coverage"] == {"of_b_by_a": 1.0, "of_a_by_b": 1.0}
    assert not any(member["dominated_by"] for member in found["members"])
    assert len(set(found["hypervolume"].values())) == 1 and found["notes"] == []


def test_fronts_in_different_metrics_need_axes(run: Run, invoke: Invoke, tmp_path: Path) -> None:
    other = rows_run(tmp_path / "macs", ROWS, "objectives={accuracy: maximize, macs: minimize}")
    code, _, err = invoke("front", "--diff", run.folder, other.folder)
    assert code == 2 and "--x and --y" in err.replace("\n", " ")
    code, out, err = invoke(
        "front", "--diff", run.folder, other.folder, "--x", "macs", "--y", "accuracy", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["objectives"] == {"accuracy": "maximize", "macs": "minimize"}
