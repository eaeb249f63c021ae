"""Malformed configs and overrides: exit code 2, one message, no traceback, no code run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults.commands import invoke
from faults.payload import CANARY, run_code

BASE = "model: {name: resnet20}\ndata: {name: digits}\n"
TOUCH = f"touch {CANARY}"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)

# --- text that is no config: what the file holds, and what the message must say ----------------

FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "must not be empty"),
    "only a comment": ("# nothing\n", "must not be empty"),
    "a list": ("- 1\n- 2\n", "must be a mapping"),
    "a number": ("42", "must be a mapping"),
    "two documents": (BASE + "---\n" + BASE, "one document"),
    "not UTF-8": (b"name: \xff\xfe", "UTF-8"),
    "UTF-16": (BASE.encode("utf-16"), "UTF-8"),
    "a null byte": ("name: a\0b\n", "printable"),
    "a tab": ("model:\n\tname: resnet20\n", "spaces"),
    "an open bracket": ("model: {name: resnet20\n", "valid YAML"),
    "an open quote": ("name: 'abc\n", "valid YAML"),
    "a key twice": (BASE + "name: a\nname: b\n", "given once"),
    "a key twice, quoted": (
        "model: {name: resnet20, kwargs: {1: 2, '1': 3}}\ndata: {name: digits}\n",
        "given once",
    ),
    "an unknown alias": (BASE + "name: *nobody\n", "valid YAML"),
    "an alias to itself": ("model: &m\n  name: resnet20\n  kwargs: *m\n", "mapping"),
    "aliases of aliases": (LAUGHS, "at most"),
    "merged number": (BASE + "search: {<<: 3}\n", "valid YAML"),
    "deep brackets": ("name: " + "[" * 1000, "valid YAML"),
    "deep mappings": (
        "model: {name: resnet20, kwargs: " + "{a: " * 40 + "1" + "}" * 41,
        "levels deep",
    ),
    "a binary file": (bytes(range(256)), "UTF-8"),
    "a pickle": (b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.", "must be a mapping"),
    # --- tags: none makes an object
    "a called tag": (BASE + f"name: !!python/object/apply:os.system ['{TOUCH}']\n", "tag"),
    "a named tag": (BASE + "name: !!python/name:os.system ''\n", "tag"),
    "a tagged mapping": ("model: !!python/object:os.x {name: resnet20}\n", "tag"),
    "a tagged list": (BASE + "constraints: !mine [a]\n", "tag"),
    "a binary tag": (BASE + "name: !!binary aGVsbG8=\n", "tag"),
    "a set": (BASE + "space: {criteria: !!set {fgp}}\n", "tag"),
    # --- numbers
    "a huge hexadecimal": (BASE + f"search: {{trials: 0x{'f' * 5000}}}\n", "64 bits"),
    "a huge decimal": (BASE + f"search: {{trials: 1{'0' * 6000}}}\n", "valid YAML"),
    "a number of 65 bits": (BASE + f"search: {{trials: {2**64}}}\n", "64 bits"),
    "a trillion trials": (BASE + "search: {trials: 1000000000000}\n", "at most 1000000"),
    "a batch for no memory": (BASE + "latency: {batch_size: 1000000000}\n", "at most 65536"),
    "infinity": (BASE + "baseline: {lr: .inf}\n", "finite"),
    "not a number": (BASE + "baseline: {lr: .nan}\n", "baseline.lr"),
    "an overflow": (BASE + "baseline: {lr: 1.0e999}\n", "finite"),
    "negative trials": (BASE + "search: {trials: -1}\n", "at least 1"),
    "true trials": (BASE + "search: {trials: true}\n", "whole number"),
    "a tiny step": (BASE + "space: {keep: {step: 1.0e-300}}\n", "at least 0.0001"),
    "a large image": (
        "model: {name: resnet20}\ndata: {name: digits, image_size: 99999}\n",
        "16384",
    ),
    "an image for no memory": (
        "model: {name: resnet20}\ndata: {name: digits, image_size: 16384}\n",
        "fit in memory",
    ),
    # --- names that could leave their folder, or run something
    "a name with a path": (BASE + "name: ../../evil\n", "must have the right form"),
    "a name from the root": (BASE + "name: /etc/evil\n", "must have the right form"),
    "a name of dots": (BASE + "name: ..\n", "must have the right form"),
    "a name with a null": (BASE + 'name: "a\\0b"\n', "must have the right form"),
    "a name of two lines": (BASE + 'name: "a\\nb"\n', "must have the right form"),
    "a long name": (BASE + f"name: {'a' * 300}\n", "must have the right form"),
    "half a character": (BASE + 'name: "\\ud800"\n', "must be"),
    "a terminal's command": (BASE + 'name: "\\e]0;owned\\a"\n', r"\x1b]0;owned\x07"),
    "a data set's path": ("model: {name: resnet20}\ndata: {name: ../digits}\n", "digits"),
    "a criterion's path": (BASE + "space: {criteria: [../../fgp]}\n", "must be one of"),
    "a shell command": (
        f"model: {{name: 'os:system', kwargs: {{command: '{TOUCH}'}}}}\ndata: {{name: digits}}\n",
        "standard library",
    ),
    "a process": (
        f"model: {{name: 'subprocess:run', kwargs: {{args: '{TOUCH}', shell: true}}}}\n"
        "data: {name: digits}\n",
        "standard library",
    ),
    "a built-in": (
        f"model: {{name: 'builtins:exec', kwargs: {{source: '{TOUCH}'}}}}\n"
        "data: {name: digits}\n",
        "standard library",
    ),
    "three parts": ("model: {name: 'a:b:c'}\ndata: {name: digits}\n", "must have the right form"),
    "no such module": ("model: {name: 'nowhere:x'}\ndata: {name: digits}\n", "no module nowhere"),
    "a relative module": ("model: {name: '..x:y'}\ndata: {name: digits}\n", "model.name"),
    # --- secrets, which the run folder would keep
    "a password with a slash": (BASE + "name: 's3://me:hun/ter2@x'\n", "must not hold a password"),
    "a password in a path": (
        "model: {name: resnet20}\ndata: {name: digits, root: 's3://me:hunter2@bucket/x'}\n",
        "must not hold a password",
    ),
    "a password in an argument": (
        "model: {name: resnet20, kwargs: {url: 'https://me:hunter2@host'}}\n"
        "data: {name: digits}\n",
        "must not hold a password",
    ),
    # --- other types than are meant
    "shares of words": (
        "model: {name: resnet20}\ndata: {name: digits, split: [a, b, c]}\n",
        "three positive numbers",
    ),
    "shares of three": (
        "model: {name: resnet20}\ndata: {name: digits, split: [1, 1, 1]}\n",
        "sum to 1",
    ),
    "two criteria in one": (BASE + "space: {criteria: [{fgp: {}, taylor: {}}]}\n", "be a name"),
    "a criterion in a list": (BASE + "space: {criteria: [[fgp]]}\n", "be a name"),
    "no criterion's name": (BASE + "space: {criteria: [null]}\n", "be a name"),
    "a bound that is no number": (BASE + "constraints: ['accuracy <= nan']\n", "metric <= number"),
    "objectives in a list": (BASE + "objectives: [accuracy]\n", "maximize or minimize"),
    "arguments in a text": (
        "model: {name: resnet20, kwargs: shortcut}\ndata: {name: digits}\n",
        "mapping",
    ),
}

SETS = {
    "nothing": ("", "form key.sub=value"),
    "no key": ("=1", "form key.sub=value"),
    "no value": ("search.trials", "form key.sub=value"),
    "an empty part": ("search..trials=1", "form key.sub=value"),
    "an open bracket": ("search.trials=[", "valid YAML"),
    "a called tag": (f"name=!!python/object/apply:os.system ['{TOUCH}']", "tag"),
    "a huge number": (f"search.trials=0x{'f' * 5000}", "64 bits"),
    "five hundred levels": (".".join("a" * 500) + "=1", "so deep"),
    "an alias to itself": ("space.criteria=&a [*a]", "contain itself"),
    "a password": ("data.root=s3://me:hunter2@bucket", "must not hold a password"),
    "a shell command": ("model.name=os:system", "standard library"),
    "a path": ("name=../../x", "must have the right form"),
    "a key below a value": ("model.name.x=1", "must be a section"),
    "two documents": ("name=a\n---\nb", "one document"),
    "a null byte": ("name=a\x00b", "printable"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_there_are_enough() -> None:
    assert len(FILES) + len(SETS) >= 60


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_config_is_one_message(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    for command in (["check", path], ["run", path, "--out", "out", "--dry-run"]):
        ended = invoke(*command)
        assert ended.code == 2, ended
        assert message in ended.err and "hunter2" not in ended.err, ended.err
        assert not run_code() and not Path("out").exists()


@pytest.mark.parametrize("name", SETS)
def test_a_malformed_override_is_one_message(name: str, tmp_path: Path) -> None:
    override, message = SETS[name]
    (tmp_path / "config.yaml").write_text(BASE)
    ended = invoke("check", "config.yaml", "--set", override)
    assert ended.code == 2, ended
    assert message in ended.err and "hunter2" not in ended.err, ended.err
    assert not run_code()


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("loop.yaml", "folder.yaml", "none.yaml", os.devnull):
        ended = invoke("check", name)
        assert ended.code == 2 and name in ended.err, ended


def test_a_module_that_quits_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "quitter.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "config.yaml").write_text(BASE)
    ended = invoke("check", "config.yaml", "--set", "model.name=quitter:make")
    assert ended.code == 2 and "SystemExit" in ended.err, ended
