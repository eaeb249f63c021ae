"""Wrong input is named with its position, key, value, rule and fix; right input round-trips."""

import subprocess
import sys
from pathlib import Path

import pytest

from prunesearch.search.config import (
    ConfigError,
    Constraint,
    SearchConfig,
    check_names,
    dump_config,
    ignored_settings,
    load_config,
    parse_config,
)

MINIMAL = "model: {name: resnet20}\ndata: {name: digits}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


# text after the two minimal lines, line:column, pieces of the message
WRONG = [
    ("trails: 3", "3:1", ["`trails` (=3)", "known key"]),
    ("trials: 3", "3:1", ["`trials`", "Did you mean `search.trials`?"]),
    ("space: {kep: 3}", "3:9", ["`space.kep` (=3)", "Did you mean `keep`?"]),
    ("space:\n  keep:\n    lowest: 1", "5:5", ["`space.keep.lowest`", "per, low, high"]),
    ("space: {keep: {low: 2}}", "3:21", ["`space.keep.low` (=2) must be at most 1:", "0.3"]),
    ("space: {keep: {low: 0}}", "3:21", ["`space.keep.low` (=0) must be greater than 0"]),
    ("space: {keep: {low: .9, high: .5}}", "3:21", ["(=0.9)", "at most `high` (=0.5)", "Swap"]),
    ("space: {keep: {high: .2}}", "3:15", ["`space.keep.low` (=0.3)", "`high` (=0.2)"]),
    ("space: {keep: {round_to: 8.5}}", "3:26", ["`space.keep.round_to` (=8.5)", "whole number"]),
    ("space: {top_k: {low: .5, high: .4}}", "3:22", ["`space.top_k.low` (=0.5)"]),
    ("space: {criteria: [fgp, fgp]}", "3:25", ["`space.criteria[1]` (=fgp)", "once"]),
    ("space: {criteria: [{fgp: 3}]}", "3:20", ["`space.criteria[0]` (={fgp: 3})", "- fgp: {"]),
    ("space: {criteria: fgp}", "3:19", ["`space.criteria` (=fgp) must be a list"]),
    ("space: {criteria: [], blocks: {mode: none}}", "3:19", ["nothing would be searched"]),
    ("space: {select: []}", "3:17", ["`space.select` (=[])", "at least one rule"]),
    ("space: {select: [ration]}", "3:18", ["`space.select[0]`", "Did you mean `ratio`?"]),
    ("space: {blocks: {mode: masks}}", "3:24", ["mask, ranked, none", "Did you mean `mask`?"]),
    ("space: {blocks: {max_drop: 1.5}}", "3:28", ["`space.blocks.max_drop` (=1.5)", "at most 1"]),
    ("space:", "3:1", ["`space` (=null) must be a section"]),
    ("baseline: 3", "3:11", ["`baseline` (=3) must be a section"]),
    ("baseline: {epochs: yes}", "3:20", ["`baseline.epochs` (=yes) must be a whole number"]),
    ("recover: {lr: .nan}", "3:15", ["`recover.lr` (=nan) must be a finite number"]),
    ("recover: {recalibrate_bn: no}", "3:27", ["(=no) must be true or false"]),
    ("recover: {distill: 2}", "3:20", ["`recover.distill` (=2) must be at most 1"]),
    ("objectives: {acuracy: maximize}", "3:23", ["Did you mean `accuracy`?", "latency_ms"]),
    ("objectives: {macs: maximize}", "3:20", ["`objectives.macs` (=maximize) must be minimize"]),
    ("objectives: {}", "3:13", ["`objectives` (={})", "1 to 4"]),
    ("objectives: [accuracy]", "3:13", ["`objectives` (=[accuracy])"]),
    ("objectives: {speedup: maximize, latency_ms: minimize}", "3:13", ["not name both"]),
    ("constraints: ['accuracy_drop = 3']", "3:15", ["`constraints[0]`", "`metric <= number`"]),
    ("constraints: ['macs < x']", "3:15", ["(=macs < x)", "`metric <= number`"]),
    ("constraints: ['mac < 1e6']", "3:15", ["must bound one of", "Did you mean `macs`?"]),
    ("constraints: [accuracy > .9, accuracy < .5]", "3:30", ["not contradict `accuracy > 0.9`"]),
    ("search: {trials: true}", "3:18", ["`search.trials` (=true) must be a whole number"]),
    ("search: {trials: 0}", "3:18", ["`search.trials` (=0) must be at least 1"]),
    ("search: {sampler: tpee}", "3:19", ["Did you mean `tpe`?"]),
    ("search: {seed: -1}", "3:16", ["`search.seed` (=-1) must be at least 0"]),
    ("search: {time_limit_s: 0}", "3:24", ["must be greater than 0"]),
    ("resources: {max_concurrent: 0}", "3:29", ["`resources.max_concurrent` (=0)"]),
    ("latency: {device: gpu}", "3:19", ["`latency.device` (=gpu)", "cpu or cuda"]),
    ("latency: {runs: 1}", "3:17", ["`latency.runs` (=1) must be at least 10"]),
    ("name: ../elsewhere", "3:7", ["`name` (=../elsewhere)", "letters, digits"]),
    ("name: 3", "3:7", ["`name` (=3) must be text"]),
    ("name: a\nname: b", "4:1", ["`name` must be given once"]),
    ("search:\n\ttrials: 3", "4:1", ["tab", "spaces"]),
    ("search: [1", "4:1", ["valid YAML"]),
    ("search: !!python/object:os.system x", "3:9", ["tag", "not allowed"]),
    ("name: \x07", "3:7", ["U+0007"]),
    ("---\nname: b", "3:1", ["one document"]),
]


@pytest.mark.parametrize(("text", "position", "pieces"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_input_is_named(tmp_path: Path, text: str, position: str, pieces: list[str]) -> None:
    message = error_of(tmp_path, MINIMAL + text + "\n")
    assert message.startswith(f"{tmp_path / 'c.yaml'}:{position}: "), message
    assert all(piece in message for piece in pieces), message
    assert "pydantic" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", ["must not be empty", "model: {name: resnet20}"]),
        ("- 1", [":1:1: ", "must be a mapping"]),
        ("data: {name: digits}", ["`model` must be given", "`model: {name: resnet20}`"]),
        ("model: {name: a}\ndata:\n  root: x", [":2:1: `data.name` must be given", "digits"]),
        ("model: {name: 'a b'}\ndata: {name: digits}", [":1:15: `model.name` (=a b)"]),
        ("model: {name: a}\ndata: {name: d, split: [.5, .5]}", [":2:24: ", "three positive"]),
        ("model: {name: a}\ndata: {name: d, split: [.5, .3, .3]}", ["their sum is 1.1"]),
        ("model: {name: a}\ndata: {name: d, batch_size: 1}", ["must be at least 2"]),
    ],
)
def test_wrong_model_or_data_is_named(tmp_path: Path, text: str, pieces: list[str]) -> None:
    message = error_of(tmp_path, text)
    assert all(piece in message for piece in pieces), message


def test_all_mistakes_are_reported_at_once_in_order(tmp_path: Path) -> None:
    text = MINIMAL + "search: {trials: 0}\nrecover: {lr: -1}\nfoo: 1\n"
    lines = error_of(tmp_path, text, ("latency.runs=1",)).splitlines()
    places = [line.split("c.yaml:")[1].split(": ")[0] for line in lines[:3]]
    assert places == ["3:18", "4:15", "5:1"]
    assert lines[3].startswith("--set latency.runs=1: `latency.runs` (=1) must be at least 10")


def test_unreadable_files(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    for path, piece in [
        (tmp_path / "d.yaml", "Did you mean `c.yaml`?"),
        (tmp_path, "folder"),
        (binary, "UTF-8"),
    ]:
        with pytest.raises(ConfigError, match="must") as caught:
            load_config(path)
        assert piece in str(caught.value) and str(path) in str(caught.value)


def test_overrides_are_yaml_and_replace_what_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "space: {keep: {low: .4}}\n")
    config = load_config(
        path,
        ("search.trials=7", "recover.lr=1e-3", "space.criteria=[random, fgp: {map_norm: none}]")
        + ("model.kwargs.shortcut=A", "space.keep={high: .9}", "data.root="),
    )
    assert (config.search.trials, config.recover.lr) == (7, 1e-3)
    assert config.space.criterion_names == ("random", "fgp")
    assert config.space.criteria[1].options == {"map_norm": "none"}
    assert config.model.kwargs == {"shortcut": "A"}
    assert (config.space.keep.low, config.space.keep.high) == (0.3, 0.9)
    assert config.data.root is None


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("search.trials", ["form key.sub=value"]),
        ("search..trials=3", ["form key.sub=value"]),
        ("search.trails=3", ["`search.trails` (=3)", "Did you mean `trials`?"]),
        ("name.x=3", ["`name` (=n) must be a section"]),
        ("space.criteria=[a", ["valid YAML"]),
        ("space.keep.low=5", ["`space.keep.low` (=5) must be at most 1"]),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, pieces: list[str]) -> None:
    message = error_of(tmp_path, MINIMAL + "name: n\nspace: {keep: {low: .4}}\n", (override,))
    assert message.startswith(f"--set {override}: "), message
    assert all(piece in message for piece in pieces), message


def test_defaults_and_name() -> None:
    config = parse_config({"model": {"name": "my.pkg:net"}, "data": {"name": "digits"}})
    assert config.name == "digits-my.pkg-net"
    assert config.objectives == {"accuracy": "maximize", "latency_ms": "minimize"}
    with pytest.raises(ConfigError, match=r"^config: `search.trials` \(=0\)"):
        parse_config({"model": {"name": "a"}, "data": {"name": "b"}, "search": {"trials": 0}})


def test_dump_loads_back_equal(tmp_path: Path) -> None:
    text = (
        MINIMAL
        + """
name: '1e-3'
baseline: {lr: 1e-7, weight_decay: 5e-4}
space: {criteria: [taylor, fgp: {feature_point: act, classes: [1, 2]}]}
objectives: {macs: minimize, accuracy: maximize, loss: minimize}
constraints: [accuracy_drop<=0.05, macs < 1e6]
"""
    )
    config = load_config(write(tmp_path, text))
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config and isinstance(again, SearchConfig)
    assert list(again.objectives) == ["macs", "accuracy", "loss"]
    assert [str(c) for c in again.constraints] == ["accuracy_drop <= 0.05", "macs < 1000000.0"]


def test_constraint_violation() -> None:
    assert Constraint.parse("accuracy_drop <= 0.05").violation(0.05) == 0
    assert Constraint.parse("accuracy_drop < 0.05").violation(0.05) > 0
    assert Constraint.parse("accuracy>=.9").violation(0.8) == pytest.approx(0.1)
    assert Constraint.parse("accuracy > .9").violation(0.95) < 0


def test_parsing_imports_no_heavy_library() -> None:
    code = (
        "import sys, prunesearch.search.config as c;"
        "c.parse_config({'model': {'name': 'a'}, 'data': {'name': 'b'}});"
        "print(sorted({'torch', 'ray', 'optuna', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_check_names_knows_what_is_installed(tmp_path: Path) -> None:
    text = """
model: {name: resnet21}
data: {name: digit}
space:
  criteria:
    - tayler
    - fgp: {feature_pont: act}
"""
    path = write(tmp_path, text)
    overrides = ("data.name=digitz",)
    with pytest.raises(ConfigError) as caught:
        check_names(load_config(path, overrides), path, overrides)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}:2:15: `model.name` (=resnet21) must be one of")
    assert "Did you mean `resnet" in lines[0]
    assert lines[1].startswith("--set data.name=digitz: `data.name` (=digitz)")
    assert (
        lines[2].startswith(f"{path}:6:7: `space.criteria[0]` (=tayler)")
        and "`taylor`" in lines[2]
    )
    assert lines[3].startswith(f"{path}:7:7: ") and "feature_point" in lines[3]
    good = {"model": {"name": "my.module:net"}, "data": {"name": "fashion-mnist"}}
    check_names(parse_config(good))
    with pytest.raises(ConfigError, match=r"^config: `data.name` \(=x\)"):
        check_names(parse_config(good | {"data": {"name": "x"}}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", []),
        ("recover: {epochs: 0}", []),
        ("recover: {epochs: 0}\nsearch: {early_stop: false}", []),
        ("search: {reduction_factor: 3, plateau_trials: 4, plateau_gain: 0.1}", []),
        ("recover: {epochs: 0}\nsearch: {early_stop: true}", ["early_stop"]),
        ("recover: {epochs: 0}\nsearch: {short_share: 0.25}", ["short_share"]),
        ("search: {early_stop: false, reduction_factor: 4}", ["reduction_factor"]),
        ("search: {plateau_gain: 0.001}", ["plateau_gain"]),
    ],
)
def test_a_setting_without_effect_is_named(tmp_path: Path, text: str, said: list[str]) -> None:
    config = load_config(write(tmp_path, MINIMAL + text))
    lines = ignored_settings(config)
    assert len(lines) == len(said)
    for line, name in zip(lines, said, strict=True):
        assert line.startswith(f"`search.{name}` is ignored: ")
    assert ignored_settings(load_config(write(tmp_path, dump_config(config)))) == []
