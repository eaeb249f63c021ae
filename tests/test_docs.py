"""What the documentation says is so: commands, options, keys, links and code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import Invoke, command
from ruamel.yaml import YAML

from prunesearch.search import parse_config
from prunesearch.search.config_schema import config_schema

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = ("_build", "reference/config.md", "reference/command-line.md")
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("clusters/*.md")]
    if not any(made in path.as_posix() for made in MADE)
)
TUTORIAL = (DOCS / "tutorial.md").read_text(encoding="utf-8")
WORDS = r"prune-search((?: [a-z][a-z-]*)+)([^`\n]*)"


def pages() -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def made_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every command, by its words."""
    found = {}
    for name, one in made_pages().commands():
        found[name] = {opt for param in one.params for opt in [*param.opts, *param.secondary_opts]}
    return found


def commands_in(text: str) -> Iterator[tuple[str, str]]:
    """Words and the rest of each command line; of a line in code, not of a sentence."""
    code = "\n".join(re.findall(r"^(?:    ).*$|`[^`\n]+`", text, re.MULTILINE))
    for block in ("bash", "sh", "shell"):
        code += "\n".join(blocks(text, block))
    for words, rest in re.findall(WORDS, code):
        yield words.strip(), rest.split("  ")[0].split("#")[0]


@pages()
def test_commands_and_their_options_exist(page: Path, options: dict[str, set[str]]) -> None:
    groups = {name.rpartition(" ")[0] for name in options} - {""}
    for words, rest in commands_in(page.read_text(encoding="utf-8")):
        parts = words.split()
        name = " ".join(parts[:2]) if parts[0] in groups else parts[0]
        assert name in options or name in groups, f"{page.name}: prune-search {words}"
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest):
            assert option in options.get(name, {option}) | {"--help"}, f"{name} {option}"


@pages()
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = (page.parent / target) if target else page
        made = any(path.as_posix().endswith(name) for name in MADE)
        assert made or path.exists(), f"{page.name}: {link}"
        if anchor and path.suffix == ".md" and not made:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


@pages()
def test_code_is_right(page: Path) -> None:
    """YAML is a config, or the part of one; Python compiles, and what it imports is there."""
    text = page.read_text(encoding="utf-8")
    least: dict[str, Any] = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
    for block in blocks(text, "yaml"):
        data = YAML(typ="safe").load(block)
        if isinstance(data, dict) and data.keys() <= config_schema()["properties"].keys():
            parse_config(least | data)
    for block in blocks(text, "python"):
        compile(block, page.name, "exec")
        imports = re.findall(r"^(?:from|import) .+$", block, re.MULTILINE)
        exec("\n".join(line for line in imports if "prunesearch" in line), {})


def test_the_readme_knows_every_key() -> None:
    """Each is in its table, and nothing else is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Config") : text.index("## Your own model")]
    schema = config_schema()
    sections = [place for place, _ in made_pages()._sections(schema, schema, "")]
    keys = {
        f"{place}.{name}".lstrip(".")
        for place, part in made_pages()._sections(schema, schema, "")
        for name in part["properties"]
    } - {*sections}
    documented: set[str] = set()
    for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE):
        names = re.findall(r"`([a-z][\w.*]*|\.\w+)`", cell)
        parent = names[0].rpartition(".")[0]
        documented |= {f"{parent}{name}" if name.startswith(".") else name for name in names}
    wild = {name.removesuffix("*") for name in documented if name.endswith("*")}
    missing = {
        key
        for key in keys - documented
        if not any(key.startswith(start) for start in wild)
        and not any(key.startswith(f"{name}.") for name in documented)
    }
    assert not missing
    assert {n for n in documented if "*" not in n} <= keys | {*sections}


def test_the_tutorial_works(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its steps, with fewer trials and epochs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.yaml").write_text(blocks(TUTORIAL, "yaml")[0], encoding="utf-8")
    less = ["--set", "search.trials=2", "--set", "baseline.epochs=1", "--set", "data.limit=400"]
    lines = re.findall(r"^    uv run prune-search (.+)$", TUTORIAL, re.MULTILINE)
    assert [line.split()[0] for line in lines] == [
        "check", "run", "resume", "front", "status", "export",
    ]  # fmt: skip
    for line in lines:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        words = [
            "accuracy_drop<=1" if word.startswith("accuracy_drop") else word for word in words
        ]
        if words[0] == "run":
            assert command(*words, *less).returncode == 0
        else:
            code, _, err = invoke(*words, *(less if words[0] == "check" else []))
            assert code == 0, err
    code = "\n".join(blocks(TUTORIAL, "python")) + "\nassert not model.training and picture\n"
    exec(code, {})


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", tmp_path / "trees"]
    done = subprocess.run(
        [*map(str, build), str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "html" / "reference" / "config.html").read_text(encoding="utf-8")
    assert "ask_timeout_s" in html
    assert "allow-space-change" in (tmp_path / "html/reference/command-line.html").read_text()
