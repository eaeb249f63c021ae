"""What may not change while a run goes on: small real problems, and no Ray."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL

from prunesearch.search import ConfigError, parse_config
from prunesearch.search.changes import remember, settle_changes
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.sampler import Sampler
from prunesearch.search.seeds import default_seeds
from prunesearch.search.setup import Problem, make_space, pose
from prunesearch.search.store import BLOCKS, FIXED
from prunesearch.search.yaml_source import read_source


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return read_source(path).data


def posed(data: dict[str, Any], *overrides: str) -> Problem:
    return pose(parse_config(data, overrides))


@pytest.fixture
def begun(data: dict[str, Any], tmp_path: Path) -> Path:
    remember(tmp_path, posed(data))
    return tmp_path


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("search.trials=99", "search.sampler=tpe"),
        ("resources.max_concurrent=8", "resources.cpu=2"),
        ("cache.reuse=none", "name=another"),
    ],
)
def test_what_says_how_a_run_proceeds_may_change(
    begun: Path, data: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    assert settle_changes(begun, posed(data, *overrides), allow_space_change=False) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("recover.epochs=2", "recover.epochs: 0.5 -> 2.0"),
        ("data.seed=1", "data.seed: 0 -> 1"),
        ("model.name=resnet32", "model.name: resnet20 -> resnet32"),
        ("latency.batch_size=8", "latency.batch_size: 1 -> 8"),
        ("objectives={accuracy: maximize, num_params: minimize}", "objectives.macs: minimize -> "),
    ],
)
def test_what_trials_mean_may_not(
    begun: Path, data: dict[str, Any], override: str, line: str
) -> None:
    before = (begun / FIXED).read_text()
    for allowed in (False, True):
        with pytest.raises(ConfigError, match="must go on as it began") as error:
            settle_changes(begun, posed(data, override), allow_space_change=allowed)
        assert f"\n  {line}" in str(error.value)
    assert (begun / FIXED).read_text() == before


def test_another_space_is_refused_with_the_difference_or_accepted(
    begun: Path, data: dict[str, Any]
) -> None:
    other = posed(data, "space.keep.low=0.5", "space.blocks.valid=residual")
    with pytest.raises(ConfigError, match="--allow-space-change") as error:
        settle_changes(begun, other, allow_space_change=False)
    assert "\n  keep.low: 0.3 -> 0.5" in str(error.value)
    assert "blocks.valid: paper -> residual" in str(error.value)
    assert "removable_blocks: [" in str(error.value)
    (begun / BLOCKS).write_text("{}")
    lines = settle_changes(begun, other, allow_space_change=True)
    assert "keep.low: 0.3 -> 0.5" in lines
    assert not (begun / BLOCKS).exists()  # it ranks the blocks of the old space
    assert settle_changes(begun, other, allow_space_change=False) == []


def test_a_folder_of_an_earlier_version_is_taken_as_it_is(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """One without the file, and one that does not know every key of today."""
    assert settle_changes(tmp_path, posed(data), allow_space_change=False) == []
    stored = json.loads((tmp_path / FIXED).read_text())
    del stored["meaning"]["recover"]["autocast"], stored["space"]["macs_keep"]
    (tmp_path / FIXED).write_text(json.dumps(stored))
    assert settle_changes(tmp_path, posed(data), allow_space_change=False) == []


def test_files_may_lie_elsewhere(begun: Path, data: dict[str, Any]) -> None:
    problem = posed(data)
    section = problem.config.data.model_copy(update={"root": "/on/another/machine"})
    moved = problem.config.model_copy(update={"data": section})
    elsewhere = dataclasses.replace(problem, config=moved)
    assert settle_changes(begun, elsewhere, allow_space_change=False) == []


def test_the_sampler_learns_only_from_trials_that_fit(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """Trials of the old space that the new one does not hold stay known, and teach nothing."""
    old, new = posed(data), posed(data, "space.keep.low=0.6")
    asked = []
    space = make_space(old, tmp_path, print)
    sampler = Sampler(space, old.config, default_seeds(space, old.config), DENSE)
    for number in range(12):
        proposal = sampler.ask(number)
        row = TrialResult(f"t{number:05d}", TrialStatus.COMPLETED, accuracy=0.5, macs=1000)
        sampler.tell(number, row)
        asked.append((proposal, row))
    narrow = make_space(new, tmp_path, print)
    fit = [p for p, _ in asked if narrow.means(p.params, p.candidate)]
    assert all(space.means(p.params, p.candidate) for p, _ in asked)
    assert 0 < len(fit) < len(asked)
    again = Sampler(narrow, new.config, (), DENSE)
    for proposal, row in asked:
        again.restore(proposal, row)
    for number in range(12, 18):
        proposal = again.ask(number)
        assert narrow.means(proposal.params, proposal.candidate)
        assert proposal.candidate not in [p.candidate for p, _ in asked]


DENSE = {"accuracy": 0.9, "macs": 2000.0}
