"""The config's JSON Schema, for editors: completion, and mistakes while one types."""

from __future__ import annotations

from typing import Any

from .config import SearchConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


SIDE = {"type": "integer", "minimum": 8, "maximum": 2**14}
SIDES = {"type": "array", "items": SIDE, "minItems": 1, "maxItems": 2}


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file.

    It knows every key, type, bound and known name. What no schema can say, such as that two keys
    do not go together, is left to `prune-search check`.
    """
    schema = SearchConfig.model_json_schema()
    parts = schema["$defs"]
    parts["Criterion"] = _name_or_options(_criteria())
    schema["properties"]["task"]["anyOf"] = [{"type": "null"}, _name_or_options(_tasks())]
    parts["Constraint"] = {"type": "string", "examples": ["accuracy_drop <= 0.02"]}
    _suggest(parts["ModelConfig"]["properties"]["name"], _models())
    _suggest(parts["DataConfig"]["properties"]["name"], _datasets())
    parts["DataConfig"]["properties"]["image_size"]["anyOf"] = [{"type": "null"}, SIDE, SIDES]
    return {"$schema": DIALECT, **_without_titles(schema), "title": "prune-search config"}


def _criteria() -> list[str]:
    from ..methods.criteria import known_methods

    return sorted(known_methods())


def _tasks() -> list[str]:
    from ..methods.tasks import TASKS

    return sorted(TASKS)


def _models() -> list[str]:
    from ..methods.models import MODELS

    return sorted(MODELS)


def _datasets() -> list[str]:
    from ..methods.data import DATASETS

    return sorted(DATASETS)


def _name_or_options(names: list[str]) -> dict[str, Any]:
    """`name`, or `{name: {option: value}}`."""
    options = {
        "type": "object",
        "properties": {name: {"type": "object"} for name in names},
        "additionalProperties": {"type": "object"},
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"enum": names}, {"type": "string"}, options]}


def _suggest(field: dict[str, Any], names: list[str]) -> None:
    """Names that an editor offers; others may be right too."""
    rule = {key: field.pop(key) for key in ("type", "minLength") if key in field}
    field["anyOf"] = [{"enum": names}, rule]


def _without_titles(part: Any, *, names: bool = False) -> Any:
    """Without the titles that pydantic makes of the keys: they say nothing more.

    Args:
        part: Of the schema.
        names: Whether its keys are names of the config's, among which `title` might be.
    """
    if isinstance(part, list):
        return [_without_titles(one) for one in part]
    if not isinstance(part, dict):
        return part
    return {
        key: _without_titles(value, names=key in ("properties", "$defs"))
        for key, value in part.items()
        if names or key != "title"
    }
