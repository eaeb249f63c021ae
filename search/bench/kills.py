"""A search whose processes are killed at random, beside one that is left in peace.

Each kill is SIGKILL for one of the run's processes on this machine: the driver, a trial's worker,
the latency probe, the keeper, or the raylet or an agent of it (the node). A driver that is gone is
started again with `resume`, as a user would. At the end the ledgers of the two searches are
compared.
"""

from __future__ import annotations

import collections
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError, SearchConfig, dump_config, parse_config
from ..environment import environment
from ..metrics import METRICS
from ..progress import Progress
from ..runs import Run
from .common import markdown_row
from .session import ENDING, TARGETS, Session

MEASURED = tuple(name for name in METRICS if name not in ("latency_ms", "speedup"))


@dataclass
class Kills:
    """What happened.

    Attributes:
        counts: Kills by target.
        sessions: How often a driver was started.
        orphans: Processes that outlived their driver by a minute.
        seconds: From the first start to the end of the search.
        hypervolumes: Of the front, as a user would have seen it after each kill, and at the end.
    """

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    sessions: int = 0
    orphans: int = 0
    seconds: float = 0.0
    hypervolumes: list[float] = field(default_factory=list)


def bench_kills(
    config: SearchConfig,
    out: Path,
    progress: Progress,
    *,
    kills: int,
    seed: int = 0,
    pause_s: float | None = None,
) -> dict[str, Any]:
    """Runs the search twice, once with kills; returns the counts and how the ledgers compare.

    Args:
        config: The search; its trials are tried again as often as they are killed.
        out: Folder of the two runs; it must not exist yet.
        progress: Where to report.
        kills: How many; fewer where the search is over before.
        seed: Of the moments and the targets.
        pause_s: Mean seconds between two kills; by default half of what the search in peace
            needed until its first trial: some hit a driver that starts, and some a search.

    Raises:
        ConfigError: If the folder is in use.
        RuntimeError: If a driver ends in another way than by a kill.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"`--out` (={out}) must not exist yet or be empty. Choose another.")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.yaml"
    path.write_text(dump_config(_stubborn(config)))
    progress.say("the search in peace")
    started = time.time()
    Session(path, out / "peace").finish()
    peace_s = time.time() - started
    first = min(row.finished_at or started for row in Run(out / "peace").results())
    pause_s = pause_s or (first - started) / 2
    progress.say(f"the same with {kills} kills, one in about {pause_s:.0f} s")
    report = _disturb(path, out / "kills", kills, random.Random(seed), pause_s, progress)
    compared = compare(Run(out / "peace"), Run(out / "kills"))
    return {
        "kills": {name: report.counts[name] for name in TARGETS},
        "sessions": report.sessions,
        "orphans": report.orphans,
        "pause_s": pause_s,
        "peace_s": peace_s,
        "kills_s": report.seconds,
        "never_fell": report.hypervolumes == sorted(report.hypervolumes),
        **compared,
        "environment": environment(),
    }


def compare(peace: Run, disturbed: Run) -> dict[str, Any]:
    """How the ledger of a disturbed run differs from that of one in peace."""
    before, after = (_essence(run) for run in (peace, disturbed))
    completed = [name for name, row in before.items() if row["status"] == "completed"]
    return {
        "trials": len(before),
        "completed": len(completed),
        "lost": sum(name not in after for name in before),
        "more": sum(name not in before for name in after),
        "different": sum(name in after and after[name] != before[name] for name in before),
    }


def kills_markdown(result: Mapping[str, Any], command: str) -> str:
    """The result as a Markdown page."""
    machine, kills = result["environment"], result["kills"]
    rows = [
        ("kills", ", ".join(f"{count} {name}" for name, count in kills.items())),
        ("mean seconds between two", f"{result['pause_s']:.0f}"),
        ("times a driver was started", str(result["sessions"])),
        ("processes that outlived their driver by a minute", str(result["orphans"])),
        ("trials", f"{result['trials']}, of them {result['completed']} completed"),
        ("lost", str(result["lost"])),
        ("more than planned", str(result["more"])),
        ("other results than in peace", str(result["different"])),
        ("the front's hypervolume never fell", "yes" if result["never_fell"] else "NO"),
        ("seconds", f"{result['kills_s']:.0f} (in peace {result['peace_s']:.0f})"),
    ]
    lines = [
        f"# {sum(kills.values())} kills over one search",
        "",
        "SIGKILL for one of the run's processes at random moments; a driver that is gone is "
        "started again with `resume`. Compared with the same search in peace: status, candidate "
        "and every metric of each trial except latency, which is measured anew.",
        "",
        f"`{command}` on {machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}.",
        "",
        markdown_row(("", "")),
        markdown_row(("---", "---")),
        *(markdown_row(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


# --- killing ---------------------------------------------------------------------------------


def _disturb(
    config: Path,
    folder: Path,
    kills: int,
    rng: random.Random,
    pause_s: float,
    progress: Progress,
) -> Kills:
    report, started = Kills(), time.monotonic()
    session: Session | None = None
    while sum(report.counts.values()) < kills:
        session = session or _begin(config, folder, report)
        time.sleep(rng.expovariate(1 / pause_s))
        if session.over:
            progress.say("the search is over: raise search.trials for more kills")
            break
        target = session.kill(rng)
        report.counts[target] += 1
        done = sum(report.counts.values())
        progress.say(f"  kill {done}: {target}, {_look(folder, report)} trials finished")
        if target in ENDING:
            report.orphans += session.wait_for_the_end()
            session = None
    (session or _begin(config, folder, report)).finish()
    _look(folder, report)
    report.seconds = time.monotonic() - started
    return report


def _begin(config: Path, folder: Path, report: Kills) -> Session:
    report.sessions += 1
    return Session(config, folder)


def _look(folder: Path, report: Kills) -> int:
    """Notes the front's hypervolume as a user sees it now; returns the number of trials."""
    if not (folder / "config.yaml").exists():
        return 0
    run = Run(folder)
    volume = run.hypervolume()
    if volume is not None:
        report.hypervolumes.append(volume)
    return len(run.results())


# --- comparing -------------------------------------------------------------------------------


def _stubborn(config: SearchConfig) -> SearchConfig:
    """A killed trial is tried again however often; nothing comes from other runs."""
    changes = ["resources.max_retries=1000", "cache.reuse=dense"]
    return parse_config(config.model_dump(mode="json"), changes)


def _essence(run: Run) -> dict[str, dict[str, Any]]:
    """What a run found out, by trial; latencies and seconds differ from run to run."""
    return {
        row.trial_id: {
            "status": str(row.status),
            "candidate": json.loads(row.candidate),
            **{name: row.metric(name) for name in MEASURED},
        }
        for row in run.results()
    }
