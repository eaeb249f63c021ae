"""Reads a YAML 1.2 mapping and remembers where each value was written."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from ..methods.names import nearest

Loc = tuple[str | int, ...]
MAX_DEPTH = 20  # sections in sections
MAX_VALUES = 10_000  # aliases of aliases make a small file a large one
INT64 = 2**63
_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s@]*:[^\s@]+@", re.IGNORECASE)


class ConfigError(ValueError):
    """The user's input is wrong; `str(error)` is the whole message, one line a mistake."""


@dataclass
class Source:
    """Plain data with the position of every key and value.

    Attributes:
        label: What to call the source in messages: the file's name or `config`.
        data: Dicts, lists, texts, numbers, booleans and None only.
    """

    label: str
    data: dict[str, Any] = field(default_factory=dict)
    _keys: dict[Loc, str] = field(default_factory=dict)
    _values: dict[Loc, str] = field(default_factory=dict)

    def where(self, loc: Loc, *, key: bool = False) -> str:
        """Position of the value (or, with `key`, of the key) at `loc` or of what encloses it."""
        positions = self._keys if key else self._values
        for size in range(len(loc), 0, -1):
            if loc[:size] in positions:
                return positions[loc[:size]]
        return self.label

    def value(self, loc: Loc) -> Any:
        """What was written at `loc`; None if nothing was."""
        node: Any = self.data
        for part in loc:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return None
        return node

    def override(self, assignment: str) -> None:
        """Apply one `key.sub=value`; the value is parsed as YAML.

        Raises:
            ConfigError: If it is not of that form, or `key` holds no section.
        """
        label = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        parts = tuple(part.strip() for part in key.split("."))
        if not equals or not all(parts):
            raise ConfigError(
                f"{label}: `--set` (={assignment}) must have the form key.sub=value."
                " Write for example --set search.trials=20."
            )
        if len(parts) > MAX_DEPTH:
            raise ConfigError(f"{label[:60]}: `--set` must name a key: no section is so deep.")
        node = self.data
        for depth, part in enumerate(parts[:-1], start=1):
            if node.get(part) is None:
                node[part] = {}
                self._keys[parts[:depth]] = self._values[parts[:depth]] = label
            node = node[part]
            if not isinstance(node, dict):
                raise ConfigError(
                    f"{label}: `{'.'.join(parts[:depth])}` (={show(node)}) must be a section:"
                    f" it has no key {parts[depth]}. Set the whole value instead."
                )
        value = _parse(text, label, position=lambda line, column: label)
        node[parts[-1]] = _plain(value, parts, Source(f"--set {key}"), f"--set {key}")
        for positions in (self._keys, self._values):
            for loc in [loc for loc in positions if loc[: len(parts)] == parts]:
                del positions[loc]
            positions[parts] = label


def read_source(path: str | Path, overrides: Sequence[str] = ()) -> Source:
    """Read the YAML file at `path` and apply `overrides`.

    Raises:
        ConfigError: If the file cannot be read or is not one YAML mapping.
    """
    source = Source(str(path))
    data = _parse(_read_text(Path(path)), str(path), lambda line, col: f"{path}:{line}:{col}")
    if data is None:
        raise ConfigError(
            f"{path}: the file must not be empty. Write at least:"
            " model: {name: resnet20} and data: {name: digits}."
        )
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{path}:1:1: the file (={show(data)}) must be a mapping of keys to values."
            " Begin with a line such as `model: {name: resnet20}`."
        )
    source.data = _plain(data, (), source, str(path))
    _apply(source, overrides)
    return source


def mapping_source(
    data: Mapping[str, Any], overrides: Sequence[str] = (), label: str = "config"
) -> Source:
    """Wrap a mapping of the Python API, which has no positions, and apply `overrides`."""
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{label}: the configuration (={show(data)}) must be a mapping of keys to values."
            " Use load_config to read a file."
        )
    source = Source(label, _plain(data, (), Source(label), label))
    _apply(source, overrides)
    return source


def write_yaml(data: Mapping[str, Any], stream: Any) -> None:
    """Write `data` as YAML 1.2 that `read_source` reads back equal."""
    yaml = YAML(typ="rt")
    yaml.width = 99
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml.dump(data, stream)


def show(value: object) -> str:
    """`value` as one short line, in YAML's words."""
    text = _flow(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str) -> str:
    """`text` with everything spelled out that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_flow, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return " ".join(str(value).split()) or "''"


def _apply(source: Source, overrides: Sequence[str]) -> None:
    mistakes = []
    for assignment in overrides:
        try:
            source.override(assignment)
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"{path}: the file must exist: there is none of that name."
            f" {nearest(path.name, siblings)} Check the path.".replace("  ", " ")
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: the path must be a YAML file: it is a folder. Name the file in it."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: the file must be UTF-8 text: byte {error.start} is not."
            " Save it again as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: the file must be readable: {error.strerror}. Check its permissions."
        ) from None


def _parse(text: str, label: str, position: Any) -> Any:
    """Parse one YAML document; `position(line, column)` names a place, counted from 1."""
    try:
        return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = position(mark.line + 1, mark.column + 1) if mark else label
        raise ConfigError(f"{place}: {_yaml_rule(error, text, mark)}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        code = error.character if isinstance(error.character, int) else ord(error.character[0])
        raise ConfigError(
            f"{position(line, column)}: the text must hold printable characters only:"
            f" here is U+{code:04X}. Delete it."
        ) from None
    except Exception as error:  # the parser has bugs of its own on odd input
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{label}: the text must be valid YAML: {reason}. Correct it.") from None


def _yaml_rule(error: MarkedYAMLError, text: str, mark: Any) -> str:
    problem = " ".join((error.problem or "the text cannot be parsed").split())
    if isinstance(error, DuplicateKeyError):
        found = re.search(r'found duplicate key "(.*?)"', problem)
        key = found.group(1) if found else "key"
        return (
            f"`{key}` must be given once: it stands twice in one section. Delete one of the two."
        )
    if "'\\t'" in problem or "tab" in problem:
        return "indentation must use spaces: here is a tab. Replace each tab by two spaces."
    if "another document" in problem:
        return "the file must hold one document: here a second begins. Delete the `---` line."
    return (
        f"the text must be valid YAML: {problem}. Check brackets, quotes, colons and indentation."
    )


def _plain(node: Any, loc: Loc, source: Source, label: str, above: tuple[int, ...] = ()) -> Any:
    """Copy `node` into plain Python types and record the positions of its parts."""
    if id(node) in above:
        raise ConfigError(
            f"{source.where(loc)}: `{dotted(loc)}` must not contain itself:"
            " the alias points to what encloses it. Write the value out."
        )
    if len(loc) > MAX_DEPTH or len(source._values) > MAX_VALUES:
        raise ConfigError(
            f"{source.where(loc)}: the configuration must be at most {MAX_DEPTH} levels deep and"
            f" {MAX_VALUES} values long, aliases written out. Correct it."
        )
    _refuse_tag(node, loc, source)
    if isinstance(node, Mapping):
        plain: dict[str, Any] = {}
        for key, value in node.items():
            at = (*loc, str(key))
            if str(key) in plain:
                raise ConfigError(
                    f"{source.where(at)}: `{dotted(at)}` must be given once: it stands twice in"
                    " one section, with and without quotes. Delete one of the two."
                )
            _record(node, key, at, source, label)
            plain[str(key)] = _plain(value, at, source, label, (*above, id(node)))
        return plain
    if isinstance(node, (list, tuple)):
        for index in range(len(node)):
            _record(node, index, (*loc, index), source, label)
        return [
            _plain(value, (*loc, index), source, label, (*above, id(node)))
            for index, value in enumerate(node)
        ]
    value = _scalar(node)
    if isinstance(value, int) and not -INT64 <= value < INT64:
        raise ConfigError(
            f"{source.where(loc)}: `{dotted(loc)}` must fit in 64 bits: the number is larger."
            " Correct it."
        )
    if isinstance(value, str) and _PASSWORD.search(value):
        raise ConfigError(
            f"{source.where(loc)}: `{dotted(loc)}` must not hold a password: the configuration is"
            " copied into the run folder. Leave `user:password@` out, and give it in the way"
            " of the service: an environment variable, a file in your home."
        )
    return value


def _refuse_tag(node: Any, loc: Loc, source: Source) -> None:
    """A tag asks for an object of another type; none is made, whatever it is."""
    tag = str(getattr(getattr(node, "tag", None), "value", None) or "")
    if tag or isinstance(node, (bytes, Set)):
        shown = show(node.value) if isinstance(node, TaggedScalar) else "..."
        raise ConfigError(
            f"{source.where(loc)}: `{dotted(loc)}` (={shown}) must be plain YAML:"
            f" the tag {tag or 'here'} is not allowed. Delete the tag."
        )


def _scalar(node: Any) -> Any:
    if isinstance(node, (datetime.date, datetime.datetime, os.PathLike)):
        return str(node)  # YAML reads an unquoted 2024-01-01 as a date; a name is meant
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return bool(node) if type(node).__name__ == "ScalarBoolean" else node


def _record(node: Any, key: Any, loc: Loc, source: Source, label: str) -> None:
    """Note where the key and value at `loc` stand; merged keys keep their section's place."""
    try:
        if isinstance(node, CommentedMap):
            key_mark, value_mark = node.lc.key(key), node.lc.value(key)
        elif isinstance(node, CommentedSeq):
            key_mark = value_mark = node.lc.item(key)
        else:
            return
    except (KeyError, TypeError, AttributeError):
        return
    source._keys[loc] = f"{label}:{key_mark[0] + 1}:{key_mark[1] + 1}"
    if node[key] is None:
        value_mark = key_mark  # an empty value has no place of its own
    source._values[loc] = f"{label}:{value_mark[0] + 1}:{value_mark[1] + 1}"


def dotted(loc: Loc) -> str:
    """`("space", "criteria", 0)` as `space.criteria[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")
