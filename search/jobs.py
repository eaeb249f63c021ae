"""A search as a Ray job: submitted to a cluster's job server, followed, and asked about.

Nothing is kept on this machine. A run is found by its name, in the metadata of the cluster's jobs;
its folder lies on the cluster's head.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .job_server import JobsError, connect, failures, last_line, refuse_token, talking
from .jobs_node import DEFAULT_RESULTS, MODULE, RUN, Answer, unseal
from .parcel import Parcel
from .yaml_source import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # as `name` in a config
LABEL = "prune_search"  # the metadata key that marks our jobs: run or ask
SILENCE_S = 60.0  # a log without a line for so long is asked for anew: the line may be dead
GIVE_UP_S = 1800.0
READY_WITHIN_S = 180.0
NOT_READY = "No available agent"  # of a head that has just started, in Ray's words
STOP_WAIT_S = 3600  # else Ray kills a stopped job after 3 s, in the middle of its trials
EXIT_CODES = {0: 0, 1: 1, 2: 2, 130: 130, 143: 130}  # 143: SIGTERM before the first trial
INTERRUPTED = 130


@dataclass(frozen=True)
class SubmittedRun:
    """A run on a cluster, which may not be submitted yet.

    Attributes:
        client: The connection to the job server.
        address: The job server.
        name: The run's name.
        results: The folder of runs on the head.
        job: The latest job that drives or drove it; None where the cluster knows of none.
    """

    client: Any
    address: str
    name: str
    results: str
    job: Any

    @property
    def active(self) -> bool:
        """Whether a job drives the run or is about to."""
        return self.job is not None and not self.job.status.is_terminal()

    @property
    def place(self) -> str:
        """Its run folder, in words."""
        place = f"{self.results.rstrip('/')}/{self.name}"
        return place if "://" in place else f"{place} on the head"

    def submit(self, parcel: Parcel, *command: str) -> str:
        """Sends the files and starts `prune-search COMMAND` on the head.

        Without a demand for resources Ray starts a job on the head, where its process also sees
        the GPUs; with one, anywhere.

        Returns:
            The job's name.

        Raises:
            ConfigError: If a job drives the run already.
            JobsError: If the cluster does not take it.
        """
        if self.active:
            raise ConfigError(
                f"`name` (={self.name}) must not be in use: job {self.job.submission_id} is "
                f"{self.job.status.value}. Follow it with `prune-search follow {self.name} "
                f"--address {self.address}`, or take another name with --set name=NAME."
            )
        with tempfile.TemporaryDirectory(prefix="prune-search-") as folder:
            parcel.write(Path(folder))
            return self._start("run", command, {"working_dir": folder})

    def ask(self, *command: str) -> Answer:
        """Runs `prune-search COMMAND` on the head and returns what it did.

        Raises:
            JobsError: If there is no answer.
        """
        job = self._start("ask", command, {})
        with talking(self.address):
            while not (info := self.client.get_job_info(job)).status.is_terminal():
                time.sleep(1)
            log = self.client.get_job_logs(job)
        try:
            return unseal(log)
        except ValueError as error:
            raise JobsError(
                f"job {job} did not do what it was asked ({error}): {reason_of(info, log)}"
            ) from error

    def stop(self) -> str:
        """Asks the run to end as the first Ctrl-C does; the second time at once.

        Returns:
            What was done, in a sentence.
        """
        answer = self.ask("stop", RUN, "--json")
        if answer.code == 0:
            return (
                f"{self.name} was asked to stop: running trials end first; once more ends them too"
            )
        if not self.active:
            raise ConfigError(answer.err.strip().removeprefix("prune-search: "))
        with talking(self.address):
            self.client.stop_job(self.job.submission_id)
        return f"job {self.job.submission_id} was asked to stop before its search began"

    def _start(self, kind: str, command: tuple[str, ...], runtime_env: dict[str, Any]) -> str:
        parts = ["python", "-P", "-m", MODULE, kind, self.results, self.name, *command]
        env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
        job = f"prune-search-{kind}-{self.name}-{secrets.token_hex(4)}"
        deadline = time.monotonic() + READY_WITHIN_S
        with talking(self.address):
            while True:
                try:
                    self.client.submit_job(
                        submission_id=job,
                        entrypoint=f"exec {shlex.join(parts)}",  # no shell between Ray and it
                        runtime_env=runtime_env | {"env_vars": env_vars},
                        metadata={LABEL: kind, "run": self.name, "results": self.results},
                    )
                    return job
                except RuntimeError as error:
                    if NOT_READY not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(2)


def find_run(name: str, address: str, results: str | None) -> SubmittedRun:
    """The run of a name on the cluster at `address`, whether or not it exists.

    Args:
        name: The run's name.
        address: The job server, `http://HEAD:8265`.
        results: The folder of runs on the head; None for the one it was submitted with, else
            `DEFAULT_RESULTS`.

    Raises:
        ConfigError: If no job server answers there, or it refuses this machine's token.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(
            f"`RUN` (={name}) must be a run's name, not a path: with --address the run lies on "
            "the cluster. Give the `name` of its config."
        )
    check_results(results)
    client = connect(address)
    with talking(address):
        jobs = [job for job in client.list_jobs() if job.submission_id and job.metadata]
    mine = [j for j in jobs if (j.metadata.get(LABEL), j.metadata.get("run")) == ("run", name)]
    job = max(mine, key=lambda job: job.start_time or 0, default=None)
    known = DEFAULT_RESULTS if job is None else job.metadata["results"]
    return SubmittedRun(client, address.rstrip("/"), name, results or known, job)


def check_results(results: str | None) -> None:
    """Refuses a folder that would depend on where a job happens to start."""
    if results is not None and re.match(r"~?/|\w[\w+.-]+://", results) is None:
        raise ConfigError(
            f"`--results` (={results}) must be absolute, begin with ~/ or be a URI: it is a "
            f"folder of the cluster's head. Write for example {DEFAULT_RESULTS}."
        )


def follow(
    run: SubmittedRun, job: str, write: Callable[[str], None], say: Callable[[str], None]
) -> Any:
    """Passes a job's log on until the job has ended; each character once.

    A lost connection is made again, after waiting half as long as nobody has answered, and the log
    goes on where it broke off: Ray sends a log from its beginning to whoever asks.

    Args:
        run: The run.
        job: Its job.
        write: Takes the log, piece by piece.
        say: Takes a sentence when the connection is lost.

    Returns:
        Ray's details of the ended job.

    Raises:
        JobsError: If the cluster no longer knows the job, or is silent for half an hour.
        ConfigError: If it refuses this machine's token.
    """
    log, told = _Log(write), -1.0
    while True:
        try:
            info = run.client.get_job_info(job)
            log.heard = time.monotonic()
            if info.status.is_terminal():
                log.again()(run.client.get_job_logs(job))  # the last lines too
                return info
            asyncio.run(_tail(run.client, job, log.again()))
            time.sleep(1)
        except failures() as error:
            _refuse_for_good(error, run, job)
            silent_s = time.monotonic() - log.heard
            if silent_s > GIVE_UP_S:
                raise JobsError(
                    f"{run.address} has not answered for {silent_s / 60:.0f} minutes: "
                    f"{last_line(error)}"
                ) from error
            if told != log.heard:
                told = log.heard
                say(f"the connection is lost ({last_line(error)}); trying to get it back")
            time.sleep(min(30.0, max(1.0, silent_s / 2)))


def exit_code(info: Any) -> int:
    """The exit code of the command that an ended job ran."""
    status = info.status.value
    if status == "SUCCEEDED":
        return 0
    return INTERRUPTED if status == "STOPPED" else EXIT_CODES.get(info.driver_exit_code, 1)


def reason_of(info: Any, log: str = "") -> str:
    """Why a job failed, for people."""
    message = info.message or log or "no reason given"
    if info.driver_exit_code == 127 or ("No module named" in message and MODULE[:11] in message):
        return (
            "prune-search must be installed on the cluster's head and nodes, in the environment "
            "whose `python` comes first there"
        )
    return " / ".join(line.strip() for line in message.strip().splitlines()[-3:])


class _Log:
    """Writes each character of a log once, however often the log is sent.

    Attributes:
        heard: When the cluster last answered, on the monotonic clock.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.heard = time.monotonic()
        self._write = write
        self._length = 0

    def again(self) -> Callable[[str], None]:
        """Takes the pieces of the log from its beginning."""
        position = 0

        def take(text: str) -> None:
            nonlocal position
            self.heard = time.monotonic()
            new = text[max(0, self._length - position) :]
            position += len(text)
            if new:
                self._length += len(new)
                self._write(new)

        return take


async def _tail(client: Any, job: str, take: Callable[[str], None]) -> None:
    """Reads a log until it ends or is silent."""
    pieces = client.tail_job_logs(job)

    async def following() -> str | None:
        return await anext(pieces, None)

    try:
        while (piece := await asyncio.wait_for(following(), SILENCE_S)) is not None:
            take(piece)
    except TimeoutError:
        return
    finally:
        await pieces.aclose()


def _refuse_for_good(error: Exception, run: SubmittedRun, job: str) -> None:
    """Raises what another attempt would not change."""
    refuse_token(error, run.address)
    if "status code 404" in str(error):
        raise JobsError(
            f"{run.address} no longer knows job {job}: the cluster was started anew. What was "
            f"finished lies in {run.place}; `prune-search submit "
            f"CONFIG.yaml --resume --address {run.address}` goes on with it"
        ) from error
