"""Run folders on object stores: nothing is lost between the working copy and the store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import PRUNE_SEARCH, SMALL, Invoke, write_config
from s3 import CREDENTIALS, S3, s3_server

from prunesearch.search import ConfigError, Run, locks, storage, uploads
from prunesearch.search.locks import Owner, StorageError
from prunesearch.search.mirror import Mirror, folder_of
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.remote import Remote, UnreachableError, checked, is_safe
from prunesearch.search.runs import check_new_folder
from prunesearch.search.storage import driving, opened
from prunesearch.search.store import Store
from prunesearch.search.uploads import Uploads

Machine = Callable[[str], None]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with s3_server() as server:
            yield server


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder that is not there yet, on each kind of store."""
    if request.param == "file":
        return f"file://{tmp_path}/store/run"
    server: S3 = request.getfixturevalue("s3")
    return server.uri(f"runs/{tmp_path.name}")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Goes on with the working copies of another machine."""

    def use(name: str) -> None:
        monkeypatch.setenv("PRUNE_SEARCH_CACHE", str(tmp_path / name))

    use("first")
    return use


def row(number: int, **changes: object) -> TrialResult:
    made = TrialResult(
        trial_id=f"t{number:05d}", status=TrialStatus.COMPLETED, criterion="fgp", candidate="{}"
    )
    made.finished_at = 1000.0 + number
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def kept(folder: Path, number: int) -> TrialResult:
    """A row whose recipe and weights are kept, and these files."""
    files = f"recipes/t{number:05d}.json", f"weights/t{number:05d}.safetensors"
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}, {number}")
    return row(number, recipe=files[0], weights=files[1])


def dangling(folder: Path) -> list[str]:
    """Files that rows name and that are not there."""
    rows = [*Store(folder).read()]
    named = [name for one in rows for name in (one.recipe, one.weights) if name]
    return [name for name in named if not (folder / name).exists()]


def files(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}


# --- the URI ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "s3://AKIA:topsecret@bucket/run",
        "s3://AKIA:top/secret@bucket/run",
        "s3://AKIA@bucket/run",
        "s3://bucket/run?access_key=AKIA&secret_key=topsecret",
        "s3://bucket/run?endpoint_override=http://AKIA:topsecret@host",
        "abfs://account:topsecret@container/run",
        "gs://token:topsecret@bucket/run",
        "gs://bucket/run?access_token=topsecret",
    ],
)
def test_credentials_are_refused_and_not_repeated(wrong: str) -> None:
    with pytest.raises(ConfigError, match="credentials") as refused:
        checked(wrong)
    assert not re.search("topsecret|secret@|AKIA", str(refused.value))


@pytest.mark.parametrize(
    "wrong",
    ["s3://bucket/../x", "s3://bucket/a/%2E%2e/x", "s3://bucket/./x", "s3://bucket/a//x"],
)
def test_a_way_out_of_the_bucket_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="must not hold `.`"):
        checked(wrong)


@pytest.mark.parametrize("wrong", ["ftp://host/x", "hf://x/y", "s3://bucket/x#y", "s3://[x/y"])
def test_other_uris_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="s3, gs, gcs, abfs"):
        checked(wrong)


def test_uris_of_all_stores() -> None:
    for sound in (
        "s3://bucket/a/b?region=eu-central-1",
        "gs://anonymous@bucket/a",
        "abfss://container@account.dfs.core.windows.net/a",
        "file:///home/me@work/run",
    ):
        assert checked(sound) == sound
    assert checked("s3://bucket/a/?scheme=http") == "s3://bucket/a?scheme=http"
    with pytest.raises(ConfigError, match="must name a folder"):
        folder_of("s3://bucket")
    with pytest.raises(ConfigError, match="must be a string"):
        folder_of(Path("s3://bucket/run"))
    assert folder_of("results/run") == Path("results/run")


def test_names_that_leave_the_folder_are_not_ours() -> None:
    for name in ("../x", "trials/../../x", "/etc/x", "a//b", ".lock", "_x.tmp", "a\\..\\b", ""):
        assert not is_safe(name)
    assert is_safe("shared/scores-0a1b/entry.json") and is_safe("trials/_corrupt-t1.0a")


# --- the mirror ------------------------------------------------------------------------------


def test_what_one_machine_pushes_another_pulls(uri: str, machine: Machine, tmp_path: Path) -> None:
    here = Mirror(uri)
    with here.alone():
        store = Store(here.folder)
    store.write_trial(kept(here.folder, 0))
    (here.folder / "config.yaml").write_text(SMALL)
    (here.folder / ".lock").write_text("mine")
    (here.folder / "_config.yaml.0a.tmp").write_text("half")
    (here.folder / "shared" / ".aside").mkdir(parents=True)
    (here.folder / "shared" / ".aside" / "x").write_text("half")
    here.push()
    expected = {"config.yaml", *(f"{n}/t00000.{e}" for n, e in KINDS)}
    assert here.remote.files().keys() == expected and not here.waiting()

    machine("second")
    there = Mirror(uri)
    assert there.folder != here.folder
    with there.alone():
        there.pull(weights=False)
    assert files(there.folder).keys() == expected - {"weights/t00000.safetensors"}
    there.fetch(["weights/t00000.safetensors", "../../x", "weights/none"])
    assert files(there.folder) == {name: files(here.folder)[name] for name in expected}

    store.write_trial(row(0, message="later"))
    store.compact()
    shutil.rmtree(here.folder / "weights")
    here.push()
    if uri.startswith("file"):  # the clock of the store may be ahead
        os.utime(tmp_path / "store" / "run" / "trials" / "compact-1.parquet", (4e9, 4e9))
    there.pull()
    assert [one.message for one in Store(there.folder).read()] == ["later"]
    assert not list((there.folder / "weights").iterdir())
    Store(there.folder).write_trial(row(0, message="latest"))
    assert [one.message for one in Store(there.folder).read()] == ["latest"]


KINDS = (("trials", "parquet"), ("recipes", "json"), ("weights", "safetensors"))


def test_nothing_is_transferred_twice(uri: str, machine: Machine) -> None:
    here = Mirror(uri)
    with here.alone():
        Store(here.folder).write_trial(kept(here.folder, 0))
    here.push()
    before = here.remote.files(), {p: p.stat().st_mtime_ns for p in here.folder.rglob("*.*")}
    for mirror in (here, Mirror(uri)):
        written: list[str] = []
        mirror.remote.write = mirror.remote.read = written.append  # type: ignore
        mirror.push()
        mirror.pull()
        assert not written
    assert before == (
        here.remote.files(), {p: p.stat().st_mtime_ns for p in here.folder.rglob("*.*")}
    )  # fmt: skip


def test_rows_that_were_not_uploaded_are_kept(uri: str, machine: Machine) -> None:
    """The first machine dies with rows of its own; the second one goes on from the store."""
    first = Mirror(uri)
    with first.alone():
        store = Store(first.folder)
    store.write_trial(row(0))
    store.compact()
    first.push()
    store.write_trial(kept(first.folder, 1))
    store.write_trial(row(2, message="first machine"))
    store.compact()  # compact-2, which the second machine will write too

    machine("second")
    second = Mirror(uri)
    second.pull()
    other = Store(second.folder)
    other.write_trial(row(3))
    other.write_trial(row(2, message="second machine", finished_at=5000.0))
    other.compact()
    second.push()

    machine("first")
    first = Mirror(uri)
    first.pull()
    rows = {one.trial_id: one for one in store.read()}
    assert sorted(rows) == ["t00000", "t00001", "t00002", "t00003"]
    assert rows["t00002"].message == "second machine"
    store.compact()
    first.push()
    second.pull()
    assert [one.trial_id for one in other.read()] == sorted(rows) and not dangling(second.folder)


def test_a_push_cut_short_anywhere_leaves_no_row_without_its_files(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member leaves the front, another one comes: rows and files appear and go in order."""
    monkeypatch.setattr("prunesearch.search.mirror.NUM_THREADS", 1)
    steps = 0
    while True:
        uri = f"file://{tmp_path}/store{steps}/run"
        mirror = Mirror(uri)
        with mirror.alone():
            store = Store(mirror.folder)
        member = kept(mirror.folder, 0)
        store.write_trial(member)
        store.write_front([member])
        mirror.push()

        newer = kept(mirror.folder, 1)
        store.write_trial(newer)
        store.write_front([newer])
        store.write_trial(row(0))
        for name in (member.recipe, member.weights):
            (mirror.folder / str(name)).unlink()
        store.compact()
        left = steps
        remote, at = mirror.remote, tmp_path / f"store{steps}" / "run"
        for method in ("write", "delete"):
            real = getattr(remote, method)

            def fail(*arguments: object, real: Callable[..., object] = real) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise UnreachableError("cut short")
                return real(*arguments)

            monkeypatch.setattr(remote, method, fail)
        try:
            mirror.push()
            break
        except UnreachableError:
            assert not dangling(at)
            assert "t00000" in {one.trial_id for one in Store(at).read()}
        left = 1000
        mirror.push()
        assert not dangling(at)
        assert [one.recipe for one in Store(at).read()] == [None, newer.recipe]
        steps += 1
    assert steps >= 7  # a recipe, weights, two ledger files come; a part, a recipe, weights go
    assert files(at).keys() == files(mirror.folder).keys()


def test_a_row_that_changes_during_a_push_waits_for_the_next(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(f"file://{tmp_path}/store/run")
    with mirror.alone():
        store = Store(mirror.folder)
    member = kept(mirror.folder, 0)
    store.write_trial(member)
    mirror.push()
    store.write_trial(kept(mirror.folder, 1))
    real = mirror.remote.write

    def write(name: str, data: bytes) -> object:
        """While the new member's files are uploaded, the old one leaves the front."""
        if name == "recipes/t00001.json":
            store.write_trial(row(0))
            for file in (member.recipe, member.weights):
                (mirror.folder / str(file)).unlink()
            store.compact()
        return real(name, data)

    monkeypatch.setattr(mirror.remote, "write", write)
    at = tmp_path / "store" / "run"
    mirror.push()
    assert not dangling(at) and len(Store(at).read()) == 1
    mirror.push()
    assert not dangling(at) and files(at).keys() == files(mirror.folder).keys()


def test_a_run_that_was_deleted_from_the_store_is_not_deleted_here(
    uri: str, machine: Machine
) -> None:
    mirror = Mirror(uri)
    with mirror.alone():
        Store(mirror.folder).write_trial(row(0))
    (mirror.folder / "config.yaml").write_text(SMALL)
    mirror.push()
    for name in mirror.remote.files():
        mirror.remote.delete(name)
    with pytest.raises(ConfigError, match=f"deleted there.*{mirror.folder}"):
        Run(uri)
    assert Run(mirror.folder).results()


def test_foreign_files_are_left_alone(uri: str, machine: Machine) -> None:
    mirror = Mirror(uri)
    mirror.remote.write("config.yaml", SMALL.encode())
    for name in ("_x", ".hidden/x", "a b"):
        mirror.remote.write(name, b"foreign")
    assert files(opened(uri)).keys() == {"config.yaml"}
    mirror.pull()
    mirror.push()
    assert all(mirror.remote.read(name) == b"foreign" for name in ("_x", ".hidden/x", "a b"))


# --- the driver ------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SETTLE_S", 0.01)
    monkeypatch.setattr(locks, "POLL_S", 0.01)
    monkeypatch.setattr(uploads, "RETRY_S", 0.01)
    monkeypatch.setattr(uploads, "RETRY_MAX_S", 0.05)


def await_file(remote: Remote, name: str) -> None:
    deadline = time.monotonic() + 60
    while remote.stamp(name) is None:
        assert time.monotonic() < deadline, f"{name} was not uploaded"
        time.sleep(0.02)


@pytest.mark.usefixtures("quick")
def test_two_drivers_are_refused_and_a_dead_one_is_followed(uri: str, machine: Machine) -> None:
    with driving(uri, pytest.fail, new=True):
        assert Owner.parse(Remote(uri).read(".lock")) is not None
        for other in ("first", "second"):  # by the file lock, by the object
            machine(other)
            with pytest.raises(ConfigError, match=f"must not be in use.*process {os.getpid()} on"):
                with driving(uri, lambda line: None, new=False):
                    pytest.fail("two drivers")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    owner = Owner(int(dead.stdout), Owner.here().host, "2026-01-01")
    Remote(uri).write(".lock", owner.signature)
    said: list[str] = []
    with driving(uri, said.append, new=False):
        pass
    assert len(said) == 1 and f"process {owner.pid}" in said[0]
    with pytest.raises(FileNotFoundError):
        Remote(uri).read(".lock")


@pytest.mark.usefixtures("quick")
def test_a_driver_elsewhere_is_waited_for_until_it_is_silent_for_long(
    uri: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Owner(1, "another-machine", "2026-01-01")
    Remote(uri).write(".lock", elsewhere.signature)
    monkeypatch.setattr(locks, "SILENT_S", 2.0)  # a store tells whole seconds
    said: list[str] = []
    with driving(uri, said.append, new=False):
        pass
    assert "waiting" in said[0] and "taken over" in said[-1] and "another-machine" in said[-1]

    def beat(line: str) -> None:
        Remote(uri).write(".lock", Owner(2, "another-machine", "2026-01-02").signature)

    Remote(uri).write(".lock", elsewhere.signature)
    with pytest.raises(ConfigError, match="another-machine"), driving(uri, beat, new=False):
        pytest.fail("two drivers")


@pytest.mark.usefixtures("quick")
def test_who_loses_the_run_uploads_nothing_more(
    uri: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    remote, lost = Remote(uri), threading.Event()
    with pytest.raises(StorageError, match="another-machine"):
        with driving(uri, pytest.fail, new=True) as session:
            folder = folder_of(uri)
            (folder / "config.yaml").write_text(SMALL)
            session.changed()
            await_file(remote, "config.yaml")
            session.then(lambda reason: lost.set())
            while not lost.wait(0.5):  # the last one to sign has it
                remote.write(".lock", Owner(1, "another-machine", "2026-01-01").signature)
            Store(folder).write_trial(row(0))
            session.changed()
    assert remote.files().keys() == {"config.yaml"} and Store(folder).read()


@pytest.mark.usefixtures("quick")
def test_a_store_that_is_away_stops_nothing(s3: S3, machine: Machine, tmp_path: Path) -> None:
    uri, said = s3.uri(f"runs/{tmp_path.name}"), []
    with driving(uri, said.append, new=True) as session:
        folder = folder_of(uri)
        (folder / "config.yaml").write_text(SMALL)
        s3.gate.shut()
        try:
            Store(folder).write_trial(row(0))
            session.changed()
            deadline = time.monotonic() + 60
            while not said:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            s3.gate.open()
    assert "cannot be uploaded" in said[0] and str(folder) in said[0]
    assert "uploads go on" in said[-1] and len(said) == 2
    assert "trials/t00000.parquet" in Remote(uri).files()


@pytest.mark.usefixtures("quick")
def test_a_store_that_stays_away_fails_the_run_and_loses_nothing(
    s3: S3, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", 0.0)
    uri, said = s3.uri(f"runs/{tmp_path.name}"), []
    folder = folder_of(uri)
    try:
        with pytest.raises(StorageError) as raised, driving(uri, said.append, new=True):
            s3.gate.shut()
            Store(folder).write_trial(row(0))
            for name in ("config.yaml", "baseline.json"):
                (folder / name).write_text("{}")
    finally:
        s3.gate.open()
    told = str(raised.value)
    assert f"Nothing is lost: all is in {folder}" in told and "prune-search resume 's3" in told
    assert not Remote(uri).files()
    with pytest.raises(ConfigError, match="prune-search resume 's3"):
        check_new_folder(uri)
    Remote(uri).delete(".lock")  # it names this process, which lives
    with driving(uri, said.append, new=False):
        pass
    assert len(Run(uri).results()) == 1 and not Mirror(uri).waiting()


@pytest.mark.usefixtures("quick")
def test_uploads_that_fail_do_not_hide_why_a_run_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_STOPPED_S", 0.0)
    said: list[str] = []

    def push() -> None:
        raise UnreachableError("no answer.")

    with pytest.raises(KeyboardInterrupt), Uploads(push, "s3://b/run", tmp_path, said.append):
        raise KeyboardInterrupt
    assert said[0].startswith("warning: results cannot be uploaded") and len(said) == 2
    assert f"Nothing is lost: all is in {tmp_path}" in said[1]


# --- the command line ------------------------------------------------------------------------


def test_wrong_stores_exit_2_with_one_message(
    s3: S3, machine: Machine, invoke: Invoke, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    with_key = s3.uri("run").replace("//", "//AKIA:topsecret@")
    for wrong, pieces in (
        (s3.uri("run", bucket="nowhere"), ["bucket that exists", "nowhere"]),
        (s3.uri("../x"), ["must not hold `.`"]),
        (with_key, ["must not hold credentials", "AWS_SECRET_ACCESS_KEY"]),
        ("s3:/bucket/run", ["://"]),
    ):
        for arguments in (["run", config, "--out", wrong, "--dry-run"], ["status", wrong]):
            code, out, err = invoke(*arguments)
            assert code == 2 and not out and "Traceback" not in err, err
            assert all(piece in err for piece in pieces) and len(err.splitlines()) == 1, err
            assert "topsecret" not in err
    code, _, err = invoke("resume", s3.uri("no-run"))
    assert code == 2 and "no config.yaml" in err
    s3.gate.shut()
    try:
        code, _, err = invoke("run", config, "--out", s3.uri("run"))
    finally:
        s3.gate.open()
    assert code == 2 and "must be reachable" in err and len(err.splitlines()) == 1


def test_reading_commands_and_a_folder_in_use(
    s3: S3, machine: Machine, invoke: Invoke, tmp_path: Path
) -> None:
    base = f"lists/{tmp_path.name}"
    uri = s3.uri(f"{base}/one")
    Remote(uri).write("config.yaml", SMALL.encode())
    Remote(s3.uri(f"{base}/two")).write("config.yaml", SMALL.encode())
    Remote(s3.uri(f"{base}/none")).write("notes.txt", b"")
    code, out, _ = invoke("list", s3.uri(base), "--json")
    assert code == 0
    assert [one["run"] for one in json.loads(out)] == [uri, s3.uri(f"{base}/two")]
    code, out, _ = invoke("status", uri, "--json")
    assert code == 0 and json.loads(out)["finished"] == 0
    Remote(uri).write("baseline.json", b"{}")
    code, _, err = invoke("run", write_config(tmp_path), "--out", uri)
    assert code == 2 and f"prune-search resume '{uri}'" in err
    code, _, err = invoke("front", uri, "--plot", s3.uri("front.png"))
    assert code == 2 and "not a URI" in err


def test_a_killed_search_goes_on_elsewhere_while_the_store_is_away_for_a_while(
    s3: S3, machine: Machine, invoke: Invoke, tmp_path: Path
) -> None:
    """Every trial exactly once, and a second driver is refused meanwhile."""
    uri = s3.uri(f"runs/{tmp_path.name}")
    remote, config = Remote(uri), write_config(tmp_path, SMALL.replace("trials: 6", "trials: 10"))
    first = start("run", config, "--out", uri)
    await_rows(first, remote, 2)
    machine("second")
    with pytest.raises(ConfigError, match=f"process {first.pid} on"):
        with driving(uri, lambda line: None, new=False):
            pytest.fail("two drivers")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    machine("reader")
    before = {one.trial_id: one for one in Run(uri).results()}
    assert 2 <= len(before) < 10
    named = {name for one in before.values() for name in (one.recipe, one.weights) if name}
    assert named and named <= remote.files().keys()

    machine("second")
    said, copy = tmp_path / "stderr", Store(folder_of(uri))
    second = start("resume", uri, stderr=said)
    await_rows(second, remote, len(before) + 1)
    s3.gate.shut()
    try:
        known = len(copy.read())
        await_true(second, lambda: "cannot be uploaded" in said.read_text())
        await_true(second, lambda: len(copy.read()) > known)
    finally:
        s3.gate.open()
    out, _ = second.communicate(timeout=300)
    err = said.read_text()
    assert second.returncode == 0, err
    for sentence in ("taken over", f"process {first.pid}", "uploads go on"):
        assert sentence in err, err
    assert "Traceback" not in err and "prune-search export 's3" in out

    machine("reader")
    run = Run(uri)
    after = {one.trial_id: one for one in run.results()}
    assert sorted(after) == [f"t{n:05d}" for n in range(10)]
    for name, one in before.items():
        if one.status is not TrialStatus.EARLY_STOPPED:  # it may have been promoted since
            assert after[name].finished_at == one.finished_at
    rows = [*(run.folder / "trials").iterdir()]
    assert [path.name for path in rows if not path.name.startswith("compact-")] == []
    assert run.finished and not list(run.folder.rglob("*.safetensors"))

    code, printed, _ = invoke("front", uri, "--json")
    members = [one["trial_id"] for one in json.loads(printed)["front"]]
    assert code == 0 and members == [one.trial_id for one in run.front_results()]
    exported = tmp_path / "exported"
    code, _, err = invoke("export", uri, "--trial", members[0], "--out", "s3://bucket/x")
    assert code == 2 and "not a URI" in err
    code, _, err = invoke("export", uri, "--trial", members[0], "--out", exported)
    assert code == 0 and (exported / "model.safetensors").exists(), err
    names = remote.files()
    weights = {name for name in names if name.startswith("weights/t")}
    assert weights == {f"weights/{member}.safetensors" for member in members}
    with pytest.raises(FileNotFoundError):
        remote.read(".lock")


def start(*arguments: str | Path, stderr: Path | None = None) -> subprocess.Popen[str]:
    with (stderr or Path(os.devnull)).open("w") as file:
        return subprocess.Popen(
            [*PRUNE_SEARCH, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
            env=os.environ | {"NO_COLOR": "1"},
        )


def await_rows(process: subprocess.Popen[str], remote: Remote, count: int) -> None:
    await_true(
        process, lambda: sum(name.startswith("trials/t") for name in remote.files()) >= count
    )


def await_true(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        if process.poll() is not None:
            pytest.fail(f"the run ended too early: {process.communicate()}")
        assert time.monotonic() < deadline
        time.sleep(0.05)
