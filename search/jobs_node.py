"""What a submitted command does on the cluster's head; there it needs prune-search and no more.

    python -P -m prunesearch.search.jobs_node run RESULTS NAME ARGUMENT...
    python -P -m prunesearch.search.jobs_node ask RESULTS NAME ARGUMENT...

`run` keeps the files that were sent with the job and becomes `prune-search ARGUMENT...`. `ask`
runs that command and prints what it said and wrote as one line, which `unseal` reads. In arguments
`{run}` stands for the run folder and `{files}` for a folder whose files are part of the answer.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath

MODULE = "prunesearch.search.jobs_node"
RUN, FILES = "{run}", "{files}"
DEFAULT_RESULTS = "~/prune-search-results"
SENT = ".sent"  # beside the runs: the config, user code and checkpoint of each of them
MARK = "prune-search-answer"
MAX_MIB = 256  # it passes through a log file and the dashboard's memory
EXIT_WRONG_INPUT = 2


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command did on the head.

    Attributes:
        code: Its exit code.
        out: What it printed.
        err: Its messages.
        version: The head's version of prune-search.
        files: What it wrote to `{files}`: relative path -> content.
    """

    code: int
    out: str
    err: str
    version: str
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def seal(answer: Answer) -> str:
    """The answer as one line of ASCII with a checksum."""
    files = {name: base64.b64encode(data).decode() for name, data in answer.files.items()}
    text = json.dumps(dataclasses.asdict(answer) | {"files": files})
    return f"{MARK} {hashlib.sha256(text.encode()).hexdigest()} {text}"


def unseal(log: str) -> Answer:
    """The answer in a job's log.

    Raises:
        ValueError: If there is none, it is damaged, or a file's name leaves its folder.
    """
    lines = [line for line in log.splitlines() if line.startswith(f"{MARK} ")]
    if not lines:
        raise ValueError("there is no answer")
    _, digest, text = lines[-1].split(" ", 2)
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError("the answer is damaged")
    data = json.loads(text)
    for name in data["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
            raise ValueError(f"the answer holds a file named {name!r}")
    files = {name: base64.b64decode(content) for name, content in data["files"].items()}
    return Answer(data["code"], data["out"], data["err"], data["version"], files)


def main() -> None:
    """Entry point on the head."""
    action, results, name, *arguments = sys.argv[1:]
    run, sent = _places(results, name)
    if action == "ask":
        print(f"\n{seal(_ask(run, sent, arguments))}", flush=True)
        return
    try:
        _keep(run, sent, new=arguments[0] == "run")
        os.chdir(sent)
    except OSError as error:
        print(
            f"prune-search: `--results` (={results}) must be writable on the cluster's head: "
            f"{error}. Choose another."
        )
        sys.exit(EXIT_WRONG_INPUT)
    command = _command(arguments, run, sent)
    os.execv(command[0], command)


def _places(results: str, name: str) -> tuple[str, Path]:
    """The run, and the folder of what was sent for it."""
    if "://" in results:  # an object store holds runs only
        return f"{results.rstrip('/')}/{name}", Path(DEFAULT_RESULTS).expanduser() / SENT / name
    folder = Path(results).expanduser()
    return str(folder / name), folder / SENT / name


def _keep(run: str, sent: Path, *, new: bool) -> None:
    """Copies the job's working folder, which Ray deletes, to where resume and export need it."""
    if new and _is_taken(run):
        sent.mkdir(parents=True, exist_ok=True)  # the command will refuse: nothing is replaced
        return
    shutil.rmtree(sent, ignore_errors=True)
    shutil.copytree(Path.cwd(), sent)


def _is_taken(run: str) -> bool:
    from .runs import check_new_folder
    from .yaml_source import ConfigError

    try:
        check_new_folder(run if "://" in run else Path(run))
    except ConfigError:
        return True
    return False


def _ask(run: str, sent: Path, arguments: Sequence[str]) -> Answer:
    with tempfile.TemporaryDirectory(prefix="prune-search-") as scratch:
        done = subprocess.run(
            _command(arguments, run, Path(scratch)),
            cwd=sent if sent.is_dir() else None,  # a user's model is imported from there
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        paths = [path for path in sorted(Path(scratch).rglob("*")) if path.is_file()]
        size_mib = sum(path.stat().st_size for path in paths) / 2**20
        if size_mib > MAX_MIB:
            return Answer(EXIT_WRONG_INPUT, "", _too_large(size_mib, run), _version())
        files = {str(path.relative_to(scratch)): path.read_bytes() for path in paths}
    return Answer(done.returncode, done.stdout, done.stderr, _version(), files)


def _command(arguments: Sequence[str], run: str, files: Path) -> list[str]:
    filled = [_filled(part, run, files) for part in arguments]
    return [sys.executable, "-P", "-m", "prunesearch.search.cli", *filled]


def _filled(part: str, run: str, files: Path) -> str:
    if part == RUN:
        return run
    return f"{files}{part.removeprefix(FILES)}" if part.startswith(f"{FILES}/") else part


def _too_large(size_mib: float, run: str) -> str:
    return (
        f"prune-search: what comes back (={size_mib:.0f} MiB) must be at most {MAX_MIB} MiB: it "
        "passes through the job's log. Keep the run on object storage (--results s3://...) and "
        f"export it from there, or run `prune-search export {run} --out DIR` on the head and copy "
        "DIR.\n"
    )


def _version() -> str:
    return version("prune-search")


if __name__ == "__main__":
    main()
