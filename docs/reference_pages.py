"""Pages made from the code: the config's keys and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MADE = "<!-- made by docs/reference_pages.py -->"


def write_pages(folder: Path) -> None:
    """Writes config.md and command-line.md; a page that is as it was keeps its time."""
    for name, text in (("config", config_page()), ("command-line", command_page())):
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- the config -------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of a config with its default, rule and meaning, a table a section."""
    from prunesearch.search.config_schema import config_schema

    schema = config_schema()
    lines = [
        MADE,
        "# Config",
        "",
        "YAML, or the same keys as a mapping in Python. Only `model.name` and `data.name` are "
        "required; an unknown key is an error. `prune-search schema` prints all of this as a JSON "
        "Schema, which editors take for completion:",
        "",
        "    prune-search schema > prune-search.schema.json",
        "",
        "and, as the first line of a config,",
        "",
        "    # yaml-language-server: $schema=prune-search.schema.json",
        "",
    ]
    for place, part in _sections(schema, schema, ""):
        title = f"`{place}`" if place else "Top level"
        lines += [f"## {title}", "", part.get("description", ""), ""]
        lines += ["| key | default | rule | meaning |", "|---|---|---|---|"]
        for name, field in part["properties"].items():
            row = (
                f"`{name}`",
                _default(field),
                _rule(schema, field),
                field.get("description", ""),
            )
            lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |")
        lines.append("")
    return "\n".join(lines)


def _sections(
    schema: Mapping[str, Any], part: Mapping[str, Any], place: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield place, part
    for name, field in part["properties"].items():
        inner = _section(schema, field)
        if inner is not None:
            yield from _sections(schema, inner, f"{place}.{name}".lstrip("."))


def _section(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a field holds, also `section or null` and names to sections."""
    inner = field.get("additionalProperties")
    choices = [field, *field.get("anyOf", ()), *([inner] if isinstance(inner, dict) else ())]
    for choice in choices:
        part = schema["$defs"].get(choice.get("$ref", "").rpartition("/")[2], {})
        if "properties" in part:
            return dict(part)
    return None


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field or isinstance(field["default"], dict) and field["default"]:
        return ""
    default = field["default"]
    if isinstance(default, list):
        default = [_short(item) for item in default]
    return f"`{json.dumps(default)}`"


def _short(item: Any) -> Any:
    return item["name"] if isinstance(item, dict) and "name" in item else item


def _rule(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """Type, bounds and choices in words."""
    if _section(schema, field) is not None:
        return "section"
    if "anyOf" in field:
        words = [_rule(schema, choice) for choice in field["anyOf"]]
        return " or ".join(dict.fromkeys(word for word in words if word))
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "$ref" in field:
        return _rule(schema, schema["$defs"][field["$ref"].rpartition("/")[2]])
    if field.get("type") == "array":
        return f"list of {_rule(schema, field.get('items', {})) or 'values'}"
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in field
    ]
    return " ".join([field.get("type", field.get("const", "")), ", ".join(bounds)]).strip()


# --- the command line -------------------------------------------------------------------------


def command_page() -> str:
    """Every command with its arguments and options."""
    lines = [
        MADE,
        "# Command line",
        "",
        "Exit codes: 0 done, 1 the search failed, 2 wrong input (one message, no traceback), 130 "
        "interrupted (everything that was finished is stored). `NO_COLOR=1` prints without "
        "colours; `prune-search --install-completion` completes names in the shell.",
        "",
    ]
    for name, command in commands():
        usage = " ".join(_metavar(p) for p in command.params if p.param_type_name == "argument")
        lines += [f"## {name}", "", f"    prune-search {name} {usage}".rstrip(), ""]
        lines += [command.help or "", ""]
        rows = [_option(p) for p in command.params if p.param_type_name == "option"]
        if rows:
            lines += ["| option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def commands() -> Iterator[tuple[str, Any]]:
    """The commands by their words, groups' own ones included."""
    import typer

    from prunesearch.search.cli import app

    def walk(group: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, command in sorted(group.commands.items()):
            if hasattr(command, "commands"):
                yield from walk(command, (*words, name))
            else:
                yield " ".join((*words, name)), command

    yield from walk(typer.main.get_command(app), ())


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name.strip('[]')}]"


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    meaning = " ".join((option.help or "").split()).replace("|", "\\|")
    return f"| {names} | {meaning} |"
