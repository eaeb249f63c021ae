"""Pydantic's errors in this project's words: position, key, value, rule, reason, fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..methods.names import nearest
from .yaml_source import Loc, Source, dotted, show

_RULES = {
    "greater_than": "be greater than {gt:.12g}",
    "greater_than_equal": "be at least {ge:.12g}",
    "less_than": "be less than {lt:.12g}",
    "less_than_equal": "be at most {le:.12g}",
    "string_too_short": "not be empty",
    "too_short": "hold at least {min_length} item",
    "string_too_long": "have at most {max_length} characters",
    "string_pattern_mismatch": "have the right form",
    "finite_number": "be a finite number",
    "literal_error": "be one of {choices}",
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "model": "a section with keys",
    "tuple": "a list",
}


class RuleError(ValueError):
    """A rule broken by the user, raised in a validator."""

    def __init__(self, rule: str, *at: str | int, value: object = None, fix: str = "") -> None:
        """Say what is wrong.

        Args:
            rule: What the value must do, with the reason: `be positive: it is a size`.
            *at: Where the wrong value is, below the validator's own place.
            value: The wrong value, where it is a default that the user did not write.
            fix: What to do; by default the field's own default or example is named.
        """
        super().__init__(rule)
        self.at = at
        self.value = value
        self.fix = fix


def explain(error: ValidationError, root: type[BaseModel], source: Source) -> str:
    """All mistakes, one line each, in the order of the file.

    Args:
        error: What validating `source.data` against `root` raised.
        root: The model of the whole configuration.
        source: Where the data came from.
    """
    lines = {_line(dict(mistake), root, source) for mistake in error.errors()}
    return "\n".join(sorted(lines, key=_by_position))


def _by_position(line: str) -> tuple[int, int, int, str]:
    place = re.match(r".*?:(\d+):(\d+): ", line)
    return (0, int(place[1]), int(place[2]), line) if place else (1, 0, 0, line)


def _line(mistake: dict[str, Any], root: type[BaseModel], source: Source) -> str:
    kind, loc, value = mistake["type"], tuple(mistake["loc"]), mistake["input"]
    context = mistake.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{source.where(loc, key=True)}: {_unknown_key(root, loc, value)}".rstrip()
    if kind == "missing":
        return (
            f"{source.where(loc[:-1], key=True)}: `{dotted(loc)}` must be given: it has no"
            f" default. Add for example `{loc[-1]}: {_example(root, loc)}`."
        )
    broken = context.get("error")
    if isinstance(broken, RuleError):
        loc = (*loc, *broken.at)
        written = source.value(loc)
        value = broken.value if written is None else written
        rule, fix = str(broken), broken.fix or _fix(_field(root, loc))
    else:
        info = _field(root, loc)
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        rule = rule_of(kind, {**context, "choices": ", ".join(choices)})
        rule += f": it is {info.description}" if info and info.description else ""
        fix = f"{nearest(str(value), choices)} {_fix(info)}".strip()
    return f"{source.where(loc)}: `{dotted(loc)}` (={show(value)}) must {rule}. {fix}".rstrip()


def rule_of(kind: str, context: Mapping[str, Any]) -> str:
    """What a value must do, for one kind of pydantic's errors."""
    if kind in _RULES:
        return _RULES[kind].format(**context)
    return f"be {_TYPES.get(kind.partition('_')[0], 'valid')}"


def _fix(info: FieldInfo | None) -> str:
    if info is None:
        return "Correct it."
    if info.examples:
        return f"Write for example {info.examples[0]}."
    if info.is_required():
        return "Write its keys below it, indented."
    default = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        return "Indent its keys below it, or delete it to get the defaults."
    if isinstance(default, tuple):
        return (
            f"The default is [{', '.join(getattr(item, 'name', str(item)) for item in default)}]."
        )
    return f"The default is {show(default)}."


def _unknown_key(root: type[BaseModel], loc: Loc, value: object) -> str:
    """Message for a key that does not exist: its likely spelling, or where it belongs."""
    known, key = _section_at(root, loc[:-1]).model_fields, str(loc[-1])
    homes = [
        dotted((*place, key)) for place, model in _sections(root) if key in model.model_fields
    ]
    hint = f"Did you mean `{homes[0]}`?" if homes else nearest(key, known) or "Delete it."
    section = f"`{dotted(loc[:-1])}`" if loc[:-1] else "the top level"
    return (
        f"`{dotted(loc)}` (={show(value)}) must be a known key:"
        f" {section} has {', '.join(known)}. {hint}"
    )


def _example(root: type[BaseModel], loc: Loc) -> str:
    """What to write for the required key at `loc`."""
    info = _field(root, loc)
    if info is not None and info.examples:
        return str(info.examples[0])
    inner = dict(_sections(root))[loc].model_fields
    keys = [f"{name}: {field.examples[0]}" for name, field in inner.items() if field.examples]
    return f"{{{', '.join(keys)}}}"


def _field(root: type[BaseModel], loc: Loc) -> FieldInfo | None:
    """The field at `loc`; what is inside a list or a mapping belongs to its field."""
    kind: object = root
    info = None
    for part in loc:
        if (inner := _named(kind)) is not None:
            kind = inner
        elif _is_section(kind) and part in kind.model_fields:
            info = kind.model_fields[str(part)]
            kind = _held(info)
        else:
            return info
    return info


def _section_at(root: type[BaseModel], loc: Loc) -> type[BaseModel]:
    """The section at `loc`, also one of several that the user has named."""
    kind: object = root
    for part in loc:
        kind = _named(kind) or (_is_section(kind) and _held(kind.model_fields[str(part)]))
    assert _is_section(kind)
    return kind


def _held(info: FieldInfo) -> object:
    """What a field holds where it holds anything: of `section or null` the section."""
    kinds = [kind for kind in get_args(info.annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and _is_section(kinds[0]) else info.annotation


def _named(kind: object) -> type[BaseModel] | None:
    """The section in a mapping of names to sections."""
    inner = get_args(kind)[1:] if get_origin(kind) is dict else ()
    return inner[0] if inner and _is_section(inner[0]) else None


def _sections(model: type[BaseModel], loc: Loc = ()) -> Iterator[tuple[Loc, type[BaseModel]]]:
    yield loc, model
    for name, info in model.model_fields.items():
        if _is_section(kind := _held(info)):
            yield from _sections(kind, (*loc, name))


def _is_section(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
