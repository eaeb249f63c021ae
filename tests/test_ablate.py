"""The ablation tables: their figures, their rows, and one small fan-out on a real Ray."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from prunesearch.methods.data import load_data
from prunesearch.search.ablate import run as ablate_run
from prunesearch.search.ablate.blocks import GREEDY, OPTIMUM, greedy_against_optimum
from prunesearch.search.ablate.cells import cells
from prunesearch.search.ablate.jobs import first_classes
from prunesearch.search.ablate.report import markdown
from prunesearch.search.ablate.run import (
    ABLATIONS,
    DEFAULT_CONFIG,
    NothingCompletedError,
    ablate,
    find_study,
)
from prunesearch.search.ablate.study import TUNED, Facts, Row, Study
from prunesearch.search.cluster import connect
from prunesearch.search.config import ConfigError, SearchConfig, check_names, parse_config
from prunesearch.search.progress import Progress
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.setup import find_groups, make_model, pose
from prunesearch.search.store import Store

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "resnet20"},
    "data": {
        "name": "digits",
        "image_size": 8,
        "batch_size": 64,
        "limit": 300,
        "calibration_size": 32,
    },
    "baseline": {"epochs": 1, "lr": 0.05},
    "recover": {"epochs": 0.2, "lr": 0.02},
}
STUDIES = [study for tables in ABLATIONS.values() for study in tables.values()]
SEEDS = 2


# --- the papers' figures ---------------------------------------------------------------------

PRINTED = {
    # study, label, group's beginning -> the paper's figures in the order of its columns
    ("dsd 5", "Slimming", ""): (86.95, 91.97),
    ("dsd 5", "decoupled sparsity", ""): (69.59, 93.99),
    ("dsd 5", "decoupled sparsity and fine-tuning", ""): (91.2, 94.54),
    ("dsd 6", "Slimming", ""): (0.0, 66.7),
    ("dsd 6", "decoupled sparsity", ""): (48.1, 68.4),
    ("dsd 6", "decoupled sparsity and fine-tuning", ""): (56.7, 69.5),
    ("dsd 7", "EP", ""): (0.56, 79.59),
    ("dsd 7", "ER", ""): (50.2, 81.74),
    ("dsd 7", "NR", ""): (0.45, 80.57),
    ("dsd 7", "NP+EP", ""): (86.95, 91.97),
    ("dsd 7", "NP", ""): (40.35, 80.9),
    ("dsd 7", "ER+NP", ""): (91.2, 93.61),
    ("dsd 8", "EP", ""): (0.0, 0.05),
    ("dsd 8", "ER", ""): (0.0, 0.06),
    ("dsd 8", "NR", ""): (0.0, 0.03),
    ("dsd 8", "NP+EP", ""): (0.0, 66.7),
    ("dsd 8", "NP", ""): (29.0, 68.3),
    ("dsd 8", "ER+NP", ""): (56.7, 69.5),
    ("dsd 9", "|grad tau|", ""): (11.25, 92.05),
    ("dsd 9", "|tau|", ""): (38.01, 93.3),
    ("dsd 9", "grad tau x tau", ""): (16.9, 92.71),
    ("dsd 9", "|grad tau x tau|", ""): (46.63, 94.11),
    ("dsd 10", "|grad tau|", ""): (0.0, 67.2),
    ("dsd 10", "|tau|", ""): (0.0, 66.8),
    ("dsd 10", "grad tau x tau", ""): (0.1, 68.3),
    ("dsd 10", "|grad tau x tau|", ""): (56.7, 69.5),
    ("dsd 11", "/", ""): (24.55, 93.73),
    ("dsd 11", "ER+NP", ""): (0.0, 93.84),
    ("dsd 11", "EP", ""): (16.77, 93.4),
    ("dsd 11", "ER", ""): (92.47, 93.25),
    ("dsd 11", "NR", ""): (13.06, 93.32),
    ("dsd 11", "NP+EP", ""): (74.72, 93.67),
    ("dsd 11", "NP", ""): (46.63, 94.11),
    ("dsd 12", "/", ""): (0.0, 64.5),
    ("dsd 12", "ER+NP", ""): (0.0, 68.9),
    ("dsd 12", "EP", ""): (0.0, 68.5),
    ("dsd 12", "ER", ""): (0.0, 66.7),
    ("dsd 12", "NR", ""): (0.0, 0.0),
    ("dsd 12", "NP+EP", ""): (0.0, 68.7),
    ("dsd 12", "NP", ""): (56.7, 69.5),
    ("fgp 1", "Unpruned", ""): (93.92, 74.10, 314.03, 17.7),
    ("fgp 1", "Slimming", "at 26.5 %"): (92.91, 73.36, 162.90, 5.4),
    ("fgp 1", "HRank", "at 26.5 %"): (91.23, 72.31, 73.62, 1.23),
    ("fgp 1", "FGP", "at 23.6 %"): (92.68, 72.52, 74.16, 1.47),
    ("fgp 1", "FGP", "at 26.5 %"): (93.49, 72.82, 83.15, 1.73),
    ("fgp 3", "features only", "at the same MACs"): (93.08, 97.52),
    ("fgp 3", "gradients only", "at the same MACs"): (92.79, 94.21),
    ("fgp 3", "FGP", "at the same MACs"): (93.49, 83.15),
    ("fgp fig4", "Peak k", ""): (92.60,),
    ("blockwipg 2a", "Vanilla", ""): (76.13,),
    ("blockwipg 2a", "Random", "20 %"): (75.20,),
    ("blockwipg 2a", "Magnitude", "20 %"): (76.08,),
    ("blockwipg 2a", "SynFlow", "20 %"): (76.10,),
    ("blockwipg 2a", "BlockWIPG", "20 %"): (76.05,),
    ("blockwipg 2a", "Random", "36 %"): (74.90,),
    ("blockwipg 2a", "Magnitude", "36 %"): (75.09,),
    ("blockwipg 2a", "SynFlow", "36 %"): (75.12,),
    ("blockwipg 2a", "BlockWIPG", "36 %"): (75.38,),
    ("blockwipg 3", "I_m", "10 %"): (46.70,),
    ("blockwipg 3", "I_n", "10 %"): (43.65,),
    ("blockwipg 3", "I_p", "10 %"): (42.42,),
    ("blockwipg 3", "I_m", "20 %"): (46.65,),
    ("blockwipg 3", "I_n", "20 %"): (43.55,),
    ("blockwipg 3", "I_p", "20 %"): (42.33,),
}


@pytest.mark.parametrize(("name", "label", "group"), PRINTED)
def test_figures_are_the_papers(name: str, label: str, group: str) -> None:
    study = find_study(*name.split())
    found = [
        tuple(row.paper.values())
        for row in study.rows(parse_config(TINY), Facts(10, 6, 8))
        if row.label == label and row.group.startswith(group)
    ]
    assert found == [PRINTED[name, label, group]]


# --- rows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> SearchConfig:
    return parse_config(TINY)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name.replace(" ", "-"))
def test_every_row_is_a_valid_trial(study: Study, config: SearchConfig) -> None:
    rows = study.jobs(config, Facts(num_classes=10, num_blocks=6, num_layers=8))
    ids = [trial_id for row in rows for trial_id in row.trial_ids(1)]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", trial_id) for trial_id in ids)
    assert sum(row.label == TUNED for row in rows) == sum(row.work == "dense" for row in rows)
    assert study.method in {row.series or row.label for row in rows}
    assert any(row.control and row.label != TUNED for row in rows) or study.table == "2a"
    own = study.config(config)
    plans = {}
    for row in rows:
        found = row.config(own, seed=1)
        assert found.search.seed == 1 and not found.constraints
        check_names(found)
        scope = found.space.keep.scope
        if scope not in plans:
            example = pose(config).task.example_input(2)
            plans[scope] = find_groups(found, make_model(found, 10), example)
        if row.criterion is None:
            continue
        candidate = row.candidate(plans[scope], found.ablate)
        assert candidate.criterion in found.space.criterion_names
        if candidate.select == "ratio":
            assert dict(candidate.keep).keys() == {g.name for g in plans[scope].groups}
        elif not str(candidate.select).endswith("30"):
            assert candidate.k is not None and 0 < candidate.k < 1
        assert (candidate.dsd_lambda is not None) == (candidate.criterion == "dsd")


def test_a_row_keeps_the_users_options_and_overrides_them(config: SearchConfig) -> None:
    data = config.model_dump(mode="json")
    data["space"]["criteria"] = [{"fgp": {"presence": "label", "criterion": "both"}}]
    rows = find_study("fgp", "3").rows(parse_config(data), Facts(10))
    row = next(row for row in rows if row.options.get("criterion") == "feature_only")
    (criterion,) = row.config(parse_config(data), 0).space.criteria
    assert criterion.options == {"presence": "label", "criterion": "feature_only"}


def test_controls_of_a_curve_have_the_macs_of_the_method(config: SearchConfig) -> None:
    rows = find_study("fgp", "fig3a").rows(config, Facts(10))
    assert {row.match for row in rows if row.control} == {"fgp"}
    row = next(row for row in rows if row.control)
    assert row.config(config, 0).space.criterion_names == (row.criterion, "fgp")


def test_class_subsets_are_trained_alone() -> None:
    data = first_classes(load_data("digits", image_size=8), 3)
    assert data.classes == ("0", "1", "2")
    for split in (data.train, data.val, data.test):
        assert set(split.labels.tolist()) == {0, 1, 2} and len(split.images) == len(split.labels)
    rows = find_study("fgp", "fig3b").rows(parse_config(TINY), Facts(10))
    assert [row.num_classes for row in rows if row.work == "dense"] == [2, 3, 5, 7, None]
    rows = find_study("fgp", "fig3b").rows(parse_config(TINY), Facts(100))
    counts = [row.x for row in rows if row.work == "dense"]
    assert counts == [5, 10, 15, 20, 30, 50, 75, 100]  # the paper's


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="`PAPER` .=dsq. must be a known name.*Did you mean"):
        find_study("dsq", "5")
    with pytest.raises(ConfigError, match="`TABLE` .=fig3. must be .*fig3a"):
        find_study("fgp", "fig3")
    with pytest.raises(ConfigError, match="`TABLE` .=None. must be"):
        find_study("dsd", None)
    assert find_study("layers", None).paper == "layers"
    parse_config(DEFAULT_CONFIG)


# --- one fan-out -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for the module, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNE_SEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        with connect(None):
            yield


class _Interrupts(Progress):
    """Stands for Ctrl-C once so many jobs are done."""

    def __init__(self, after: int) -> None:
        super().__init__(None)
        self._start = f"{after} of "

    def say(self, message: str) -> None:
        if message.startswith(self._start):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(
    cluster: None, config: SearchConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[TrialResult]]:
    """A folder of fgp fig4 that ended after three jobs, and what was stored by then."""
    out = tmp_path_factory.mktemp("ablate") / "fig4"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ablate_run, "LINE_EVERY_S", 0.0)
        ablate("fgp", "fig4", config, out, SEEDS, progress=_Interrupts(3))
    return out, Store(out).read()


@pytest.fixture(scope="module")
def finished(
    interrupted: tuple[Path, list[TrialResult]], config: SearchConfig
) -> tuple[Path, str, str]:
    """The same folder, finished: its path, its report, and what was said."""
    out, _ = interrupted
    said = io.StringIO()
    text = ablate("fgp", "fig4", config, out, SEEDS, progress=Progress(Console(file=said)))
    return out, text, said.getvalue()


def test_an_interrupted_ablation_goes_on(
    interrupted: tuple[Path, list[TrialResult]], finished: tuple[Path, str, str]
) -> None:
    before, (out, _, said) = interrupted[1], finished
    assert len(before) == 3
    now = {result.trial_id: result for result in Store(out).read()}
    total = SEEDS * 8  # dense, fine-tuned alike, five modes, one control
    assert len(now) == total and all(r.status == "completed" for r in now.values())
    assert [now[result.trial_id] for result in before] == before  # not run again
    assert f"{total - 3} jobs to run" in said and f"{total - 3} of {total - 3} jobs" in said


def test_only_what_is_missing_runs_again(
    finished: tuple[Path, str, str], config: SearchConfig
) -> None:
    out, text, _ = finished
    lost, *rest = Store(out).read()
    for part in (out / "trials").glob("*.parquet"):
        part.unlink()
    for result in rest:
        Store(out).write_trial(result)
    said = io.StringIO()
    again = ablate("fgp", "fig4", config, out, SEEDS, progress=Progress(Console(file=said)))
    assert "1 job to run" in said.getvalue()
    found = {result.trial_id: result for result in Store(out).read()}
    assert found[lost.trial_id].accuracy == lost.accuracy  # the same seed, the same number
    assert again == text
    said = io.StringIO()
    ablate("fgp", "fig4", config, out, SEEDS, progress=Progress(Console(file=said)))
    assert said.getvalue() == ""  # nothing to run: read and reported


def test_the_report_has_the_parquets_numbers(finished: tuple[Path, str, str]) -> None:
    out, text, _ = finished
    assert Path(f"{out}.md").read_text() == text
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    frame = pd.read_parquet(f"{out}.parquet")
    frame["label"] = frame.candidate.map(lambda candidate: json.loads(candidate)["label"])
    assert len(frame) == SEEDS * 8
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    dense = frame[frame.label == "Unpruned"].set_index("seed")
    for label, group in frame.groupby("label"):
        shown = rows[f"{label} (ours)"] if f"{label} (ours)" in rows else rows[str(label)]
        values = 100 * group.accuracy
        assert f"{values.mean():.2f}" in shown and f"{values.max():.2f}" in shown
        kept = 100 * group.set_index("seed").macs / dense.macs
        assert f"| {kept.mean():.2f}" in shown
        assert shown.endswith(f" | {SEEDS} |")
    assert "| 92.6 |" in rows["Peak k"]
    for word in ("digits", "8 px", "2 seeds", "validation split", "torch 2", "cores"):
        assert word in text
    assert f"Re-run it: `prune-search ablate fgp fig4 --config {out}/ablation.yaml" in text


def test_another_config_or_study_is_refused(
    finished: tuple[Path, str, str], config: SearchConfig, tmp_path: Path
) -> None:
    out = finished[0]
    other = parse_config(TINY | {"recover": {"epochs": 0.3}})
    with pytest.raises(ConfigError, match="must hold results of this config"):
        ablate("fgp", "fig4", other, out, SEEDS)
    with pytest.raises(ConfigError, match="must hold the results of fgp 3"):
        ablate("fgp", "3", config, out, SEEDS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be empty, or hold an unfinished ablation"):
        ablate("fgp", "fig4", config, tmp_path, SEEDS)


def test_failures_are_rows_and_are_tried_again(cluster: None, tmp_path: Path) -> None:
    """Class 11 does not exist: FGP's rows fail in the workers, the others do not."""
    config = parse_config(TINY | {"space": {"criteria": [{"fgp": {"classes": [11]}}]}})
    out = tmp_path / "fails"
    text = ablate("fgp", "fig4", config, out, 1)
    found = {result.trial_id: result for result in Store(out).read()}
    failed = {key for key, result in found.items() if result.status is TrialStatus.FAILED}
    assert len(found) == 8 and len(failed) == 5
    assert all("`fgp.classes`" in found[key].message for key in failed)
    assert "| 0, 1 failed |" in text and "5 trials failed." in text
    said = io.StringIO()
    ablate("fgp", "fig4", config, out, 1, progress=Progress(Console(file=said)))
    assert "5 jobs to run" in said.getvalue()


def test_an_ablation_of_which_nothing_is_left_fails_and_says_where_the_causes_are(
    cluster: None, tmp_path: Path
) -> None:
    config = parse_config(TINY | {"recover": {"epochs": 0.2, "lr": 1.0e30}})
    with pytest.raises(NothingCompletedError, match="no job was completed"):
        ablate("fgp", "fig4", config, tmp_path / "nothing", 1)
    assert "failed" in (tmp_path / "nothing.md").read_text()


def test_curves_by_blocks(cluster: None, config: SearchConfig, tmp_path: Path) -> None:
    """A job of a curve stores one trial for each number of removed blocks."""
    text = ablate("blocks", "fig2", config, tmp_path / "fig2", 1)
    results = Store(tmp_path / "fig2").read()
    assert len(results) == 2 + 9 * 6
    for result in results:
        point = json.loads(result.candidate).get("point")
        assert len(result.dropped_blocks) == (point or 0)
    last = {r.accuracy for r in results if len(r.dropped_blocks) == 6}
    assert len(last) == 1  # without all blocks there is one model, whatever the order
    assert "| removed blocks | 1 | 2 | 3 | 4 | 5 | 6 |" in text
    assert re.search(r"Seed 0: greedy removes the very blocks of the optimum at \d of 6", text)


# --- what a report says ----------------------------------------------------------------------


def _report(values: dict[str, tuple[float, ...]], paper: dict[str, float]) -> str:
    """A report on rows of these accuracies (%) by seed, with the paper's figures."""
    rows = [Row("dense", "dense", work="dense")]
    for label in values:
        printed = {"top-1": paper[label]} if label in paper else {}
        rows.append(Row(label, label, criterion=label, paper=printed, control=not printed))
    study = Study(
        "p", "1", "t", "s", lambda c, f: tuple(rows), method="a", compare={"accuracy": "top-1"}
    )
    seeds = len(next(iter(values.values())))
    results = [
        TrialResult(f"{label}-s{seed}", TrialStatus.COMPLETED, accuracy=value / 100, macs=50)
        for label, by_seed in [("dense", (90.0,) * seeds), *values.items()]
        for seed, value in enumerate(by_seed)
    ]
    environment = {"cpu": "C", "cores": 2, "python": "3", "libraries": {"torch": "2"}}
    return markdown(
        study,
        parse_config(TINY),
        rows,
        results,
        environment=environment,
        command="c",
        seeds=seeds,
    )


def test_the_verdict_compares_orders_and_ranges() -> None:
    text = _report(
        {"a": (80.0, 82.0), "b": (70.0, 81.0), "c": (60.0, 61.0)},
        {"a": 92.0, "b": 93.0, "c": 91.0},
    )
    assert "our order is a 81.00 > b 75.50 > c 60.50" in text
    assert "the paper's is b > a > c; 2 of 3 pairs are in the same order" in text
    assert "Kendall's tau +0.33" in text
    assert "2 of 3 pairs differ by more than the seeds' range" in text  # a and b overlap
    assert "a is number 1 of 3, clearly above c, not told apart from b" in text
    assert "random" not in text
    assert "| a | 92 |  | 81.00 (80.00 to 82.00) |" in text.replace("none", "")


def test_random_does_not_win_unnoticed() -> None:
    wins = _report({"a": (80.0, 81.0), "random": (90.0, 91.0)}, {"a": 92.0})
    assert "the random control wins (random)" in wins and "clearly below random" in wins
    middle = _report(
        {"a": (80.0, 81.0), "random": (70.0, 71.0), "c": (60.0, 61.0)}, {"a": 92.0, "c": 91.0}
    )
    assert "random is better than c" in middle and "random control wins" not in middle


def test_one_seed_has_no_range() -> None:
    text = _report({"a": (80.0,), "b": (70.0,)}, {"a": 92.0, "b": 93.0})
    assert "with one seed there is no range" in text and "(Kendall's tau -1.00)" in text


def test_greedy_is_held_against_the_optimum() -> None:
    def result(label: str, point: int, blocks: list[str], score: float) -> TrialResult:
        given = {"label": label, "point": point, "calibration": score}
        return TrialResult(
            f"{label[:3]}{point}",
            TrialStatus.COMPLETED,
            candidate=json.dumps(given),
            dropped_blocks=blocks,
        )

    found = [
        result(OPTIMUM, 1, ["b"], 0.9),
        result(GREEDY, 1, ["b"], 0.9),
        result(OPTIMUM, 2, ["a", "c"], 0.8),
        result(GREEDY, 2, ["a", "b"], 0.8),
        result(OPTIMUM, 3, ["a", "b", "c"], 0.7),
        result(GREEDY, 3, ["c", "b", "a"], 0.6),
    ]
    assert greedy_against_optimum(found) == [
        "Seed 0: greedy removes the very blocks of the optimum at 2 of 3 sizes, and has its "
        "calibration accuracy at 2."
    ]


def test_cells_hold_macs_against_the_dense_model_of_their_classes() -> None:
    rows = [
        Row("dense", "d", work="dense"),
        Row("dense-c2", "d", work="dense", num_classes=2),
        Row("x", "x", num_classes=2),
    ]
    results = [
        TrialResult("dense-s0", TrialStatus.COMPLETED, macs=100),
        TrialResult("dense-c2-s0", TrialStatus.COMPLETED, macs=80),
        TrialResult("x-s0", TrialStatus.COMPLETED, macs=20),
    ]
    (cell,) = (cell for cell in cells(rows, results, 1) if cell.row.key == "x")
    assert cell.values("macs") == {0: 25.0}
