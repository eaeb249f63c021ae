"""`report_data` as one HTML file that loads nothing: styles, scripts and Plotly are in it.

What others wrote (names, messages, the config) reaches the page in two ways only: escaped, or as
JSON that the scripts write as text. A content security policy in the file admits its own scripts
and styles by their hashes, and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..remote import Remote, is_uri, join
from ..runs import Run, check_writable
from ..store import atomic_write_bytes
from .data import report_data

REPORT = "report.html"
SCRIPTS = (
    "common.js", "front.js", "network.js", "charts.js", "tables.js", "sections.js", "report.js",
)  # fmt: skip
_POLICY = (
    "default-src 'none'; img-src data:; style-src {styles}; script-src {scripts}; "
    "base-uri 'none'; form-action 'none'"
)


def write_report(run: Run, out: Path | None = None, *, trial: str | None = None) -> str:
    """Writes the report of a run and returns where it is.

    Args:
        run: The run, in any state.
        out: The file; `report.html` in the run folder (or on its object store) if None.
        trial: The trial that is shown first; a front member if None.

    Raises:
        ConfigError: If there is no such trial, or the file cannot be written.
    """
    if out is not None:
        check_writable(out)
    page = render(report_data(run, trial=trial)).encode()
    if out is None and is_uri(run.place):
        Remote(run.place).write(REPORT, page)
        return join(run.place, REPORT)
    path = out or run.folder / REPORT
    atomic_write_bytes(path, page)
    return str(path)


def render(data: Mapping[str, Any]) -> str:
    """The page of what `report_data` gives."""
    style, plotly = asset("report.css"), plotly_source()
    script = "\n".join(asset(name) for name in SCRIPTS)
    policy = _POLICY.format(styles=_hashes(style), scripts=_hashes(plotly, script))
    run, state = data["run"], data["state"]
    subject = f"{run['model']} on {run['data']}"
    return Template(asset("template.html")).substitute(
        policy=html.escape(policy),
        title=html.escape(f"{run['name']} · prune-search"),
        name=html.escape(run["name"]),
        subject=html.escape(subject),
        place=html.escape(run["place"]),
        quoted_place=html.escape(shlex.quote(run["place"])),
        state=html.escape(state["name"]),
        state_label=html.escape(state["label"]),
        progress=html.escape(f"{state['finished']:,} of {state['trials']:,} trials"),
        made_at=html.escape(data["made_at"]),
        made_on=html.escape(data["made_at"][:16].replace("T", " ") + " UTC"),
        version=html.escape(data["version"]),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in data["notes"]),
        config=html.escape(data["config"]),
        style=style,
        placeholders=placeholders(plotly),
        data=as_json(data),
        plotly=plotly,
        script=script,
    )


def as_json(data: Any) -> str:
    """JSON for a script element: nothing in it can end the element or begin another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def asset(name: str) -> str:
    """The text of a file in `assets/`: `report.css`, `template.html` or one of `SCRIPTS`."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def plotly_source() -> str:
    """Plotly's script, from the installed package."""
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    if "</script" in source or "<!--" in source:
        raise AssertionError("Plotly's script must not end the element that it stands in.")
    return source.replace("\r\n", "\n")


def placeholders(plotly: str) -> str:
    """Empty elements that keep Plotly from adding style elements of its maps to the page.

    A strict policy would refuse them, with an error in the console; the page draws no map.
    """
    ids = re.findall(r'getElementById\("([0-9a-f]{40,})"\)', plotly)
    return "".join(f'<template id="{name}"></template>' for name in dict.fromkeys(ids))


def _hashes(*sources: str) -> str:
    """Content security policy sources that admit exactly these inline elements."""
    digests = (hashlib.sha256(source.encode()).digest() for source in sources)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
