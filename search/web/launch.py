"""Searches that the service starts and asks: each a command of its own process.

So a search outlives the service, and neither its memory nor its mistakes are the service's.
"""

from __future__ import annotations

import collections
import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SearchConfig, dump_config, load_config
from ..locks import in_use
from ..runs import check_new_folder
from ..stopping import stop as stop_driver
from ..yaml_source import ConfigError
from .commands import COMMAND, Commands, environment, message_of
from .problems import ProblemError
from .settings import Settings

OPTIONS = [sys.executable, "-P", "-m", "prunesearch.search.web.options"]
FOLDER = ".serve"  # in the results folder: logs, configs and exports of the service
CHECK_WITHIN_S, ASK_WITHIN_S, EXPORT_WITHIN_S = 300, 120, 1800
MOST_CHECKS, MOST_EXPORTS = 50, 20
STOPPED = 143  # as a shell says it of a process that SIGTERM has ended
ENDING_S = 15.0  # from the end of a search to that of its process
LOG_BYTES = 64 * 1024


@dataclass(frozen=True)
class Checked:
    """A config that `prune-search check` has accepted.

    Attributes:
        check_id: Names it.
        config: What it says.
        text: As it was given.
        assignments: `key.sub=value` on top.
        report: What the command said.
    """

    check_id: str
    config: SearchConfig
    text: str
    assignments: tuple[str, ...]
    report: dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """An exported member.

    Attributes:
        export_id: Names it.
        folder: Where it is.
        summary: What the command said.
    """

    export_id: str
    folder: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """A search that was started here.

    Attributes:
        code: Its exit code; None while it runs.
        message: Its last message.
        is_ending: Whether it was asked to stop.
    """

    code: int | None
    message: str
    is_ending: bool = False


class Launcher:
    """Checks, starts, stops and exports."""

    def __init__(self, settings: Settings) -> None:
        """Starts nothing."""
        self._settings = settings
        self._checks: collections.OrderedDict[str, Checked] = collections.OrderedDict()
        self._exports: collections.OrderedDict[str, Exported] = collections.OrderedDict()
        self._searches: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()  # whatever they end with, it is no failure
        self._commands = Commands()
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._options: dict[str, dict[str, str]] | None = None

    # --- a new search -------------------------------------------------------------------------

    def check(self, text: str, assignments: Sequence[str]) -> Checked:
        """Runs `prune-search check` on a config.

        Raises:
            ConfigError: If it is wrong; positions are those of `config.yaml`.
            ProblemError: If it would run code that may not run, or its name is taken.
        """
        with tempfile.TemporaryDirectory(prefix="prune-search-check-") as scratch:
            path = Path(scratch) / "config.yaml"
            path.write_text(text, encoding="utf-8")
            sets = [f"--set={one}" for one in assignments]
            try:
                config = load_config(path, assignments)
                self._check_code(config)
                self._check_free(config.name)
                answer = self._commands.ask(
                    "check", str(path), *sets, "--json", within_s=CHECK_WITHIN_S
                )
            except ConfigError as error:
                raise ConfigError(str(error).replace(str(path), "config.yaml")) from None
        report = json.loads(answer)
        checked = Checked(secrets.token_hex(8), config, text, tuple(assignments), report)
        with self._lock:
            self._checks[checked.check_id] = checked
            if len(self._checks) > MOST_CHECKS:
                self._checks.popitem(last=False)
        return checked

    def start(self, check_id: str) -> str:
        """Starts the search of a checked config; returns its name.

        Raises:
            ProblemError: If there is no such check, or no room for another search.
        """
        checked = self._checks.get(check_id)
        if checked is None:
            raise ProblemError(
                404,
                f"`check_id` (={check_id}) must be that of a check of this service: there is "
                "none. Check the config again.",
            )
        name = checked.config.name
        with self._lock:
            self._check_free(name)
            self._check_room()
            path = self._keep(name, checked.text)
            sets = [f"--set={one}" for one in checked.assignments]
            if self._settings.job_server is None:
                folder = str(self._settings.results / name)
                self._begin(name, "run", str(path), "--out", folder, *sets)
            else:
                self._begin(name, "submit", str(path), *sets, *self._at_server())
        return name

    # --- a run that is there --------------------------------------------------------------------

    def go_on(self, folder: Path, config: SearchConfig, *, more: int | None = None) -> None:
        """Resumes a run, or adds `more` trials to it.

        Raises:
            ProblemError: If it is running, its code may not run, or there is no room.
        """
        name = folder.name
        self._check_code(config)
        with self._lock:
            self._check_idle(name)
            self._check_room()
            if self._settings.job_server is None:
                words = ["resume"] if more is None else ["extend", f"--trials={more}"]
                self._begin(name, *words, str(folder))
                return
            words = ["--resume"] if more is None else [f"--extend={more}"]
            path = self._keep(name, dump_config(config))
            self._begin(
                name, "submit", str(path), f"--set=name={name}", *words, *self._at_server()
            )

    def stop(self, folder: Path) -> str:
        """Asks a search to end as Ctrl-C does; says what was done.

        Raises:
            ProblemError: If nothing runs.
        """
        name = folder.name
        try:
            stop_driver(folder, name)
        except ConfigError as error:
            said = self._stop_elsewhere(name, error)
            self._stopped.add(name)
            return said
        self._stopped.add(name)
        return f"{name} was asked to stop: running trials end first; once more ends them too."

    def export(self, folder: Path, config: SearchConfig, trial: str, form: str) -> Exported:
        """Writes a front member as `prune-search export` does.

        Raises:
            ConfigError: If the trial cannot be exported.
            ProblemError: If its code may not run.
        """
        self._check_code(config)
        export_id = secrets.token_hex(8)
        out = self._own("exports", export_id) / f"{folder.name}-{trial}"
        words = ["export", str(folder), f"--trial={trial}", f"--format={form}", f"--out={out}"]
        try:
            answer = self._commands.ask(*words, "--json", within_s=EXPORT_WITHIN_S)
        except Exception:
            shutil.rmtree(out.parent, ignore_errors=True)
            raise
        summary = json.loads(answer) | {"folder": out.name}
        exported = Exported(export_id, out, summary)
        with self._lock:
            self._exports[export_id] = exported
            if len(self._exports) > MOST_EXPORTS:
                _, old = self._exports.popitem(last=False)
                shutil.rmtree(old.folder.parent, ignore_errors=True)
        return exported

    def exported(self, export_id: str) -> Exported:
        """An export that was made here.

        Raises:
            ProblemError: If there is none.
        """
        found = self._exports.get(export_id)
        if found is None:
            raise ProblemError(
                404,
                f"`export_id` (={export_id}) must be that of an export: only the last "
                f"{MOST_EXPORTS} are kept. Export again.",
            )
        return found

    # --- what was started -----------------------------------------------------------------------

    def launches(self) -> dict[str, Launch]:
        """The searches that were started here: name -> how it is going."""
        found = {}
        for name, process in list(self._searches.items()):
            code = process.poll()
            if code is not None and name in self._stopped:
                code = STOPPED
            message = "" if code in (None, 0) else self._last_words(name)
            found[name] = Launch(code, message, name in self._stopped)
        return found

    def log(self, name: str) -> str:
        """The end of what a search that was started here has said.

        Raises:
            ProblemError: If none of that name was.
        """
        path = self._log(name)
        if not path.is_file() or path.is_symlink():
            raise ProblemError(
                404,
                f"`run` (={name}) must have been started by this service: it has no log. Look "
                "where it was started.",
            )
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read().decode("utf-8", "replace")

    def options(self) -> dict[str, dict[str, str]]:
        """What a config may name: kind -> name -> a line.

        Raises:
            ProblemError: If that cannot be found out.
        """
        with self._asking:
            if self._options is None:
                self._options = json.loads(
                    self._commands.ask(within_s=ASK_WITHIN_S, command=OPTIONS)
                )
            return self._options

    def end(self) -> None:
        """Ends checks and exports in progress; searches go on."""
        self._commands.end()

    def close(self) -> None:
        """Deletes the exports."""
        for exported in self._exports.values():
            shutil.rmtree(exported.folder.parent, ignore_errors=True)

    # --- helpers --------------------------------------------------------------------------------

    def _begin(self, name: str, *words: str) -> None:
        self._own("logs")
        self._stopped.discard(name)
        with self._log(name).open("ab") as log:
            self._searches[name] = subprocess.Popen(
                [*COMMAND, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the service's Ctrl-C is not the search's
                env=environment(),
            )

    def _stop_elsewhere(self, name: str, error: ConfigError) -> str:
        """Stops what has no driver on this machine: a job, or a search that is just starting."""
        if self._settings.job_server is not None:
            self._commands.ask("stop", name, *self._at_server(), "--json", within_s=ASK_WITHIN_S)
            return f"{name} was asked to stop."
        process = self._searches.get(name)
        if process is None or process.poll() is not None:
            raise ProblemError(409, str(error)) from None
        process.send_signal(signal.SIGTERM)
        return f"{name} was stopped before its search began."

    def _check_code(self, config: SearchConfig) -> None:
        named = config.user_code
        if named and not self._settings.allow_code:
            raise ProblemError(
                403,
                f"`config` (it names {named[0]}) must not run code: this service was started "
                "without --allow-code. Start the search with `prune-search run`, or restart the "
                "service.",
            )

    def _check_free(self, name: str) -> None:
        self._check_idle(name)
        try:
            check_new_folder(self._settings.results / name)
        except ConfigError:
            raise ProblemError(
                409,
                f"`name` (={name}) must not be in use: there is such a run. Choose another name, "
                "or resume or extend that run.",
            ) from None

    def _check_idle(self, name: str) -> None:
        process = self._searches.get(name)
        if process is None:
            return
        if not in_use(self._settings.results / name):  # it may be just ending: Ray takes a while
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=ENDING_S)
        if process.poll() is None:
            raise ProblemError(409, f"`run` (={name}) must not be running: it is. Stop it first.")

    def _check_room(self) -> None:
        running = [name for name, p in self._searches.items() if p.poll() is None]
        most = self._settings.max_searches
        if self._settings.job_server is None and len(running) >= most:
            raise ProblemError(
                409,
                f"`searches` must be at most {most} at a time on this machine (--max-searches): "
                f"{', '.join(running)} is running. Wait for it or stop it.",
            )

    def _at_server(self) -> list[str]:
        server, results = self._settings.job_server, self._settings.results
        return [f"--address={server}", f"--results={results}"]

    def _keep(self, name: str, text: str) -> Path:
        path = self._own("configs") / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def _log(self, name: str) -> Path:
        return self._settings.results / FOLDER / "logs" / f"{name}.log"

    def _own(self, *parts: str) -> Path:
        folder = self._settings.results.joinpath(FOLDER, *parts)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _last_words(self, name: str) -> str:
        with contextlib.suppress(ProblemError):
            return message_of(self.log(name))
        return ""
