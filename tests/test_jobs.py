"""A search submitted to a real Ray head with token authentication, over a line that breaks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from helpers import PRUNE_SEARCH, SMALL, forget_user_code
from safetensors.torch import save_file
from web import serving

from prunesearch.methods.models.resnet_cifar import resnet20
from prunesearch.search import Run, cli, jobs_node, load_pruned
from prunesearch.search.job_server import connect
from prunesearch.search.jobs import _Log
from prunesearch.search.jobs_node import Answer, seal, unseal
from prunesearch.search.web.client import Client

TOKEN = "0123456789abcdef" * 4
STARTS_WITHIN_S = 240.0
# of a call in Ray
RAYS_OWN = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
MODEL = (
    "from my_sent_layers import NUM_CLASSES\n"
    "from prunesearch.methods.models.resnet_cifar import resnet20\n"
    "def make(num_classes=NUM_CLASSES):\n    return resnet20(num_classes=num_classes)\n"
)
CONFIG = SMALL.replace(
    "{name: resnet20}", "{name: 'my_sent_model:make', checkpoint: dense.safetensors}"
)


@dataclass(frozen=True)
class Done:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str


# --- without a cluster -----------------------------------------------------------------------


def test_an_answer_survives_a_log_and_a_damaged_one_is_refused() -> None:
    answer = Answer(0, "ünï\ncode", "warned", "0.1.0", {"exported/model.bin": bytes(range(256))})
    line = seal(answer)
    assert "\n" not in line
    assert unseal(f"Running entrypoint\nprune-search-answer \n{line}\nbye\n") == answer
    with pytest.raises(ValueError, match="damaged"):
        unseal(line.replace("0.1.0", "0.2.0"))
    with pytest.raises(ValueError, match="no answer"):
        unseal("python: not found\n")


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "", "a\\..\\b"])
def test_an_answer_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="a file named"):
        unseal(seal(Answer(0, "", "", "0.1.0", {name: b"x"})))


def test_a_log_that_is_sent_anew_is_written_once() -> None:
    written: list[str] = []
    log = _Log(written.append)
    log.again()("one\ntw")
    take = log.again()
    for piece in ("one", "\ntwo\nth", "ree\n"):
        take(piece)
    log.again()("one\ntwo\nthree\n")
    assert written == ["one\ntw", "o\nth", "ree\n"]


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["submit", "small.yaml", "--address", "head:8265"], ["--address", "http://HEAD:8265"]),
        (["submit", "small.yaml", "--address", "auto"], ["--address", "http://HEAD:8265"]),
        (["status", "some/run", "--address", "http://127.0.0.1:9"], ["RUN", "name, not a path"]),
        (["status", "run", "--results", "/results"], ["--results", "--address"]),
        (["front", "run", "--address", "http://127.0.0.1:9"], ["--address", "tunnel"]),
        (
            ["submit", "small.yaml", "--address", "http://127.0.0.1:9", "--results", "here"],
            ["--results", "absolute"],
        ),
        (
            [
                "submit",
                "small.yaml",
                "--address",
                "http://127.0.0.1:9",
                "--set",
                "search.trials=0",
            ],
            ["search.trials"],
        ),
        (
            ["submit", "small.yaml", "--address", "http://127.0.0.1:9", "--resume", "--trials=9"],
            ["--resume", "--trials"],
        ),
    ],
)
def test_wrong_input_exits_2_before_anything_is_sent(
    arguments: list[str], pieces: list[str], tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    done = prune_search(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for piece in pieces:
        assert piece in done.stderr, done.stderr


# --- on a real cluster -----------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A Ray head with its job server."""

    address: str
    port: int
    results: Path


@dataclass(frozen=True)
class Submitted:
    """A search that was followed to its end."""

    head: Head
    folder: Path
    name: str
    code: int
    out: str
    err: str
    job: str

    @property
    def run(self) -> Run:
        return Run(self.head.results / self.name)

    def ask(self, command: str, *arguments: str | Path) -> Done:
        return prune_search(
            command, self.name, "--address", self.head.address, *arguments, cwd=self.folder
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    gcs, dashboard, agent, agent_grpc, env_agent, client, metrics = free_ports(7)
    scratch = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie in it
    bin_dir = Path(sys.executable).parent
    command = [
        str(bin_dir / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={env_agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0",
        "--num-cpus=2", "--num-gpus=0", '--resources={"latency_probe": 1}',
        "--object-store-memory=200000000", f"--temp-dir={scratch}", "--disable-usage-stats",
    ]  # fmt: skip
    env = os.environ | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on 127.0.0.1 only
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    address = f"http://127.0.0.1:{dashboard}"
    log = tmp_path_factory.mktemp("head") / "ray.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=env, start_new_session=True
        )
    try:
        wait_until(lambda: answers(address, process, log), STARTS_WITHIN_S)
        yield Head(address, dashboard, tmp_path_factory.mktemp("results"))
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def submitted(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A search with a model of the user's own; the line is cut while its log is followed."""
    folder = user_folder(tmp_path_factory.mktemp("user"))
    (line,) = free_ports(1)
    command = [
        *PRUNE_SEARCH, "submit", "small.yaml", "--address", f"http://127.0.0.1:{line}",
        "--results", str(head.results), "--set", "name=first",
    ]  # fmt: skip
    with (
        Proxy(line, head.port) as proxy,
        subprocess.Popen(
            command, cwd=folder, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None and process.stderr is not None
            errors, reader = read_all(process.stderr)
            lines = []
            for text in process.stdout:
                lines.append(text)
                if text.startswith("space:"):
                    break
            else:
                reader.join(60)
                pytest.fail("".join([*lines, *errors]))
            proxy.cut()
            wait_until(lambda: "connection is lost" in "".join(errors), 120)
            proxy.open()
            lines += process.stdout
            code = process.wait(400)
            reader.join(60)
        finally:
            process.kill()
    (job,) = [job.submission_id for job in client_of(head).list_jobs() if job.submission_id]
    return Submitted(head, folder, "first", code, "".join(lines), "".join(errors), job)


def test_the_log_is_followed_across_a_cut_line(submitted: Submitted) -> None:
    assert submitted.code == 0, submitted.out + submitted.err
    assert submitted.out == client_of(submitted.head).get_job_logs(submitted.job)
    assert "Pareto front of first" in submitted.out
    assert "prune-search front first --address" in submitted.err
    assert "answers without a token" not in submitted.err
    assert submitted.run.finished and len(submitted.run.results()) == 6


def test_only_what_the_model_needs_was_sent(submitted: Submitted) -> None:
    sent = submitted.head.results / ".sent" / "first"
    names = {path.name for path in sent.iterdir()} - {"__pycache__"}
    assert names == {
        "config.yaml",
        "my_sent_model.py",
        "my_sent_layers.py",
        "checkpoint.safetensors",
    }
    assert submitted.run.config.model.checkpoint == str(sent / "checkpoint.safetensors")


def test_status_and_front_of_a_submitted_run(submitted: Submitted) -> None:
    done = submitted.ask("status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["finished"], status["run"]) == (6, str(submitted.run.folder))
    assert status["job"] == {"id": submitted.job, "status": "SUCCEEDED"}
    done = submitted.ask("front", "--plot", "front.png", "--x", "macs")
    assert done.returncode == 0, done.stderr
    assert "Pareto front of first" in done.stdout and "dense" in done.stdout
    for member in submitted.run.front_results():
        assert member.trial_id in done.stdout
    assert (submitted.folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote front.png" in done.stderr and "/" not in done.stderr


def test_export_brings_the_folder_back(
    submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "exported"
    done = submitted.ask("export", "--min", "macs", "--where", "accuracy_drop<=1", "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    cheapest = min(submitted.run.front_results(), key=lambda member: member.macs or 0)
    assert json.loads((out / "recipe.json").read_text())["trial"]["trial_id"] == cheapest.trial_id
    monkeypatch.syspath_prepend(submitted.folder)
    with torch.inference_mode():
        assert load_pruned(out, run_code=True)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    again = submitted.ask("export", "--min", "macs", "--out", out)
    assert again.returncode == 2 and "--out" in again.stderr
    wrong = submitted.ask("export", "--trial", "t99999", "--out", tmp_path / "other")
    assert wrong.returncode == 2 and "`--trial` (=t99999)" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_a_large_export_is_refused_with_the_way_out(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_node, "MAX_MIB", 0)
    folder = submitted.run.folder
    command = ["export", "{run}", "--min", "macs", "--out", "{files}/exported"]
    answer = jobs_node._ask(str(folder), folder.parent / ".sent" / "first", command)
    assert answer.code == 2 and answer.files == {} and "object storage" in answer.err


def test_another_token_is_one_clear_error(submitted: Submitted) -> None:
    done = prune_search(
        "status", "first", "--address", submitted.head.address, token="another", cwd=Path.cwd()
    )
    assert done.returncode == 2
    assert "must be given the cluster's token: this machine's is another one" in done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr


@RAYS_OWN
def test_a_name_that_is_taken_is_refused_on_the_head(submitted: Submitted) -> None:
    done = submit(submitted.head, submitted.folder, "first", "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert (document["status"], document["exit_code"]) == ("FAILED", 2)
    assert "must not exist yet or be empty" in done.stderr


@RAYS_OWN
def test_stop_leaves_a_run_that_resumes_and_rays_own_stop_is_as_gentle(
    head: Head, tmp_path: Path
) -> None:
    folder, out = user_folder(tmp_path), head.results / "second"
    done = submit(head, folder, "second", "--trials", "500", "--no-follow", "--json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["job"]
    wait_until(lambda: len(parts(out)) >= 1, STARTS_WITHIN_S)
    busy = submit(head, folder, "second", "--no-follow")
    assert busy.returncode == 2 and f"job {job} is RUNNING" in busy.stderr

    command = [*PRUNE_SEARCH, "follow", "second", "--address", head.address]
    with subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background
    ) as following:  # fmt: skip
        assert following.stdout is not None and following.stdout.readline()
        following.send_signal(signal.SIGINT)
        _, said = following.communicate(timeout=60)
    assert following.returncode == 130 and "the search goes on" in said
    assert "prune-search follow second" in said and "prune-search stop second" in said
    assert client_of(head).get_job_status(job).value == "RUNNING"

    asked = prune_search("stop", "second", "--address", head.address, cwd=folder)
    assert asked.returncode == 0 and "running trials end first" in asked.stderr
    followed = prune_search("follow", "second", "--address", head.address, cwd=folder)
    assert followed.returncode == 130, followed.stdout + followed.stderr
    assert "no more trials start: interrupted" in followed.stdout
    assert "prune-search resume" in followed.stdout
    before = {result.trial_id for result in Run(out).results()}
    assert before and not Run(out).finished

    done = submit(head, folder, "second", "--resume", "--no-follow", "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)["job"]
    wait_until(lambda: len(Run(out).results()) > len(before), STARTS_WITHIN_S)
    client = client_of(head)
    client.stop_job(resumed)
    wait_until(lambda: client.get_job_status(resumed).is_terminal(), STARTS_WITHIN_S)
    assert client.get_job_status(resumed).value == "STOPPED"
    assert "no more trials start: interrupted" in client.get_job_logs(resumed)
    assert before < {result.trial_id for result in Run(out).results()}


@RAYS_OWN
def test_the_service_starts_and_stops_searches_as_jobs(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serving(head.results, job_server=head.address) as served:
        client = Client(served.url)
        check = client.check(SMALL, ["name=third", "search.trials=500"])
        assert client.start(check["check_id"])["name"] == "third"
        wait_until(
            lambda: any(run["name"] == "third" and run["finished"] for run in client.runs()),
            STARTS_WITHIN_S,
        )
        assert client.run("third")["state"] == "running"
        assert client.stop("third").startswith("third was asked to stop")
        wait_until(lambda: client.run("third")["state"] == "interrupted", STARTS_WITHIN_S)
        launches = served.app.service.launcher.launches
        wait_until(lambda: launches()["third"].code is not None, STARTS_WITHIN_S)
        assert "no more trials start" in client.log("third")
    (job,) = [j for j in client_of(head).list_jobs() if "third" in (j.submission_id or "")]
    assert job.status.is_terminal()


# --- helpers ---------------------------------------------------------------------------------


class Proxy:
    """A line to a port of this machine that can be cut and mended."""

    def __init__(self, port: int, target: int) -> None:
        self._port, self._target = port, target
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Proxy:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port), reuse_port=False)
        with self._lock:
            self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._sockets = []

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._sockets += [here, there]
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def user_folder(folder: Path) -> Path:
    (folder / "my_sent_model.py").write_text(MODEL)
    (folder / "my_sent_layers.py").write_text("NUM_CLASSES = 10\n")
    (folder / "diary.txt").write_text("private")
    (folder / "small.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    save_file(resnet20(num_classes=10).state_dict(), folder / "dense.safetensors")
    return folder


def environment(token: str = TOKEN) -> dict[str, str]:
    return os.environ | {"RAY_AUTH_TOKEN": token, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def prune_search(*arguments: str | Path, cwd: Path, token: str = TOKEN) -> Done:
    """Runs the command line in this process: libraries take seconds to import."""
    forget_user_code()
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setenv("RAY_AUTH_TOKEN", token)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["prune-search", *map(str, arguments)])
        patch.setattr(sys, "path", [*sys.path])
        cli.main()
    forget_user_code()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def submit(head: Head, folder: Path, name: str, *options: str) -> Done:
    return prune_search(
        "submit", "small.yaml", "--address", head.address, "--results", head.results,
        "--set", f"name={name}", *options, cwd=folder,
    )  # fmt: skip


def client_of(head: Head) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        return connect(head.address)


def parts(run: Path) -> list[Path]:
    return list(run.glob("trials/t*.parquet"))


def answers(address: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    request = urllib.request.Request(
        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def read_all(stream: IO[str]) -> tuple[list[str], threading.Thread]:
    """The lines of a stream as they come, and the thread that reads them."""
    lines: list[str] = []

    def read() -> None:
        for line in stream:
            lines.append(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return lines, thread


def wait_until(there: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not there():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)
