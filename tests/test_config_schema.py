"""The JSON Schema of a config: it takes what the config takes, and refuses plain mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from prunesearch.search import ConfigError, cli, parse_config
from prunesearch.search.config_schema import config_schema

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
MORE: list[dict[str, Any]] = [
    {},
    {"task": "classification"},
    {"task": None, "data": {"name": "digits", "image_size": [16, 24]}},
    {"model": {"name": "torchvision:resnet18", "checkpoint": None}},
    {"space": {"criteria": [{"fgp": {"feature_point": "act"}}, "taylor"]}},
    {"search": {"early_stop": "auto"}, "constraints": ["accuracy_drop <= 0.1"]},
    {"probes": {"edge": {"threads": 2}}, "resources": {"evaluate": {"cpu": 2}, "gpu": 1}},
]
WRONG: list[dict[str, Any]] = [
    {"sampler": "tpe"},
    {"search": {"sampler": "grid"}},
    {"search": {"trials": 0}},
    {"data": {"name": "digits", "image_size": 4}},
    {"space": {"criteria": "fgp"}},
    {"space": {"criteria": [{"fgp": 3}]}},
    {"objectives": {"accuracy": "up"}},
    {"resources": {"evaluate": {"cores": 2}}},
]


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(validator: Any, path: Path) -> None:
    validator.validate(YAML(typ="safe").load(path))


@pytest.mark.parametrize("change", MORE, ids=str)
def test_what_the_config_takes_is_valid(validator: Any, change: dict[str, Any]) -> None:
    parse_config(MINIMAL | change)
    validator.validate(MINIMAL | change)


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_plain_mistakes_are_refused_by_both(validator: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(MINIMAL | change)
    assert not validator.is_valid(MINIMAL | change)


def test_names_are_offered_and_keys_described(validator: Any) -> None:
    parts = validator.schema["$defs"]
    assert "resnet20" in parts["ModelConfig"]["properties"]["name"]["anyOf"][0]["enum"]
    assert parts["SamplerConfig"]["properties"]["trials"]["description"]


def test_the_command_prints_it(validator: Any) -> None:
    done = CliRunner().invoke(cli.app, ["schema"])
    assert done.exit_code == 0 and json.loads(done.stdout) == validator.schema
