"""The connection to Ray: starting or joining a cluster, and running plain jobs on it."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else Ray packages the folder
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # hide GPUs from CPU workers
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1024")  # the driver asks for what fits
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")  # its snapshots are of no use to us
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "86400")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.node import Node

from .auth import MODE, TOKEN_PATH, prepare_token, private_folder, wants_token, warn_if_open
from .config import DEFAULT_PROBE, ConfigError, ResourcesConfig, SearchConfig
from .watchdog import watchdog

# Ray prints the death of a worker on standard output, where results go; the trial's row tells it.
ray_worker.print_to_stdstream = lambda data, ignore_prefix: None

SLOW_START = "timed out during startup"  # Ray's words
PROBE = "latency_probe"  # the custom resource of the node whose device is measured


def probe_resources(config: SearchConfig) -> dict[str, str]:
    """The custom resource of the node that each probe measures on, by the probe's name."""
    named = {name: probe.resource or f"{PROBE}_{name}" for name, probe in config.probes.items()}
    return {DEFAULT_PROBE: PROBE, **named}


def check_local(config: SearchConfig) -> None:
    """Refuses resources that this machine does not have.

    Raises:
        ConfigError: If a trial or the probe can never run here.
    """
    import torch

    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    probes = {f"probes.{n}" if n else "latency": p for n, p in config.all_probes.items()}
    for key, asked, have in (
        ("resources.cpu", config.resources.cpu, cores),
        ("resources.gpu", config.resources.gpu, gpus),
        *((f"{key}.threads", latency.threads, cores) for key, latency in probes.items()),
    ):
        if asked > have:
            raise ConfigError(
                f"`{key}` (={asked:g}) must be at most {have}: this machine has no more. Lower it."
            )
    for key, latency in probes.items():
        if latency.device == "cuda" and not gpus:
            raise ConfigError(
                f"`{key}.device` (=cuda) must be a device of this machine: torch sees no GPU. Set "
                f"{key}.device: cpu."
            )


@contextmanager
def connect(address: str | None, resources: Collection[str] = (PROBE,)) -> Iterator[None]:
    """Starts a local Ray, or connects to the cluster at `address`; disconnects at the end.

    A local Ray asks for a token and listens on the loopback interface only.

    Args:
        address: None or `local` for a Ray of one's own; `auto` or `HOST:PORT` for the cluster
            that this machine is a node of. A Ray that this process is connected to already is
            used and left running.
        resources: Custom resources of a Ray of one's own: all probes measure on this machine.

    Raises:
        ConfigError: If no cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"`--address` (={address}) must be joined from inside the cluster: Ray Tune's hooks "
            "cannot run through a Ray client. Run the command on a node with --address auto."
        )
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    local = address in (None, "local")
    if local:
        prepare_token()
        options |= {"address": "local", "include_dashboard": False}
        options |= {"resources": dict.fromkeys(resources, 1)}
        options |= {"_temp_dir": str(private_folder())}
    else:
        options |= {"address": address}
    try:
        with _on_loopback() if local else nullcontext(), _lean() if local else nullcontext():
            _init(options)
    except ConfigError:
        raise
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"`--address` (={address}) must be a running Ray cluster: {error}. Start one with "
            "`ray start --head --resources '{\"latency_probe\": 1}'`, or leave --address out. "
            f"One that asks for a token needs {MODE}=token here, and the token in {TOKEN_PATH}."
        ) from error
    try:
        if not (local and wants_token()):
            warn_if_open(ray.get_runtime_context().gcs_address)
        yield
    finally:
        ray.shutdown()


@contextmanager
def connecting(
    address: str | None, resources: Collection[str] = (PROBE,)
) -> Iterator[Callable[[], None]]:
    """As `connect`, in the background: Ray's start is mostly waiting.

    Yields:
        A function that returns when Ray is there, or raises what `connect` raises.
    """
    there, over = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def hold() -> None:  # a local Ray ends with the thread that started it
        try:
            with connect(address, resources):
                there.set()
                over.wait()
        except BaseException as error:
            failures.append(error)
            there.set()

    thread = threading.Thread(target=hold, name="ray")

    def wait() -> None:
        there.wait()
        if failures:
            raise failures[0]
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)  # Ray's start has put its own crash handler there

    with _ended_by_sigterm():
        try:
            thread.start()
            yield wait
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts inside listens on 127.0.0.1 only, as on a Mac."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _lean() -> Iterator[None]:
    """A Ray that starts inside leaves out what a search on one machine has no use for.

    The autoscaler's monitor, the log monitor and the dashboard's server are Python processes of
    their own: half of the time that Ray takes to start.
    """

    def start_nothing(node: Node, **options: object) -> None:
        node._webui_url = None

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, start_nothing)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ray would see to it in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _init(options: Mapping[str, Any]) -> None:
    """Starts or joins Ray; on a machine that is too busy just then, a second time."""
    for attempt in (1, 2):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises no class of its own here
            if SLOW_START not in str(error):
                raise
            ray.shutdown()
            if attempt == 2:
                raise ConfigError(
                    f"Ray must start within its time, and did not, twice: {error} Wait until this "
                    "machine has less to do, or name a running cluster with --address; "
                    "`prune-search doctor` tries it alone."
                ) from error


def worker_package() -> str:
    """The folder that a Ray worker imports `prunesearch.methods` from."""

    def where() -> str:
        from prunesearch import methods

        return str(methods.__path__[0])

    return str(ray.get(ray.remote(where).options(num_cpus=0).remote()))


@dataclasses.dataclass(frozen=True)
class Result:
    """Stands, among a job's arguments, for the value of the job called `key`."""

    key: str


def share(value: Any) -> Any:
    """A job that passes a value on, so that the other jobs share one copy of it."""
    return value


Job = tuple[Callable[..., Any], tuple[Any, ...]]


def fan_out(
    jobs: Mapping[str, Job], *, resources: ResourcesConfig
) -> Iterator[tuple[str, Any | Exception]]:
    """Runs functions on the connected Ray, each as soon as there is room and its inputs exist.

    Args:
        jobs: Name to a module-level function and its arguments. An argument `Result(key)` is
            replaced by the value of that earlier job.
        resources: What each job takes; `max_retries` counts new attempts after a worker died.

    Yields:
        Each job's name and value as it ends, in the order of their ends; an exception where it
        failed, or where a job that it needs did.
    """
    call = ray.remote(_call).options(
        num_cpus=resources.cpu,
        num_gpus=resources.gpu,
        max_retries=resources.max_retries,
        retry_exceptions=False,
    )
    _check_fits(resources)
    limit_s = resources.trial_timeout_s
    references: dict[str, Any] = {}
    names: dict[Any, str] = {}
    waiting = list(jobs)
    limit = resources.max_concurrent or 2**31

    def submit() -> None:
        while waiting and len(names) < limit:
            name = waiting.pop(0)
            function, arguments = jobs[name]
            threads = max(1, int(resources.cpu))
            given = [references[a.key] if isinstance(a, Result) else a for a in arguments]
            references[name] = call.remote(threads, limit_s, function, *given)
            names[references[name]] = name

    try:
        submit()
        while names:
            done, _ = ray.wait(list(names), num_returns=1)
            name = names.pop(done[0])
            try:
                value = ray.get(done[0])
            except ray.exceptions.RayError as error:
                value = _cause(error)
            submit()
            yield name, value
    finally:
        for reference in names:
            ray.cancel(reference, force=True)


def _call(
    threads: int, limit_s: float | None, function: Callable[..., Any], *arguments: Any
) -> Any:
    import torch

    torch.set_num_threads(threads)
    with watchdog(limit_s):
        return function(*arguments)


def _check_fits(resources: ResourcesConfig) -> None:
    """Ray waits for ever for a node that is large enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(
        node.get("CPU", 0) >= resources.cpu and node.get("GPU", 0) >= resources.gpu
        for node in nodes
    ):
        return
    most = max(node.get("CPU", 0) for node in nodes)
    raise ConfigError(
        f"`resources` (cpu={resources.cpu:g}, gpu={resources.gpu:g}) must fit on a node of the "
        f"cluster: the largest has {most:g} CPUs. Lower resources.cpu or resources.gpu."
    )


def _cause(error: Exception) -> Exception:
    """What the job itself raised, where it did."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error
