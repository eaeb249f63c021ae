"""Nodes of a Ray cluster in network namespaces of this machine: each has an address of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
SUBNET = "10.213.77"
PORT = 6379
END_S = 30


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is missing"
    name = f"ps{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return "this machine does not permit network namespaces"
    _ip("netns", "delete", name)
    return None


class Network:
    """A head and worker nodes; the head's namespace holds the bridge between them.

    Args:
        folder: For logs and Ray's own files.
        num_nodes: The head included.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder = folder
        self._names = [f"ps{os.getpid()}n{i}" for i in range(num_nodes)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text("0123456789abcdef" * 4)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_initial_delay_ms": "0",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }

    def __enter__(self) -> Network:
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        head = self._names[0]
        _ip("-n", head, "link", "add", "bridge", "type", "bridge")
        _ip("-n", head, "address", "add", f"{self.address(0)}/24", "dev", "bridge")
        _ip("-n", head, "link", "set", "bridge", "up")
        for i, name in enumerate(self._names[1:], start=1):
            _ip(
                "-n", head, "link", "add", f"port{i}", "type", "veth", "peer", "eth", "netns", name
            )
            _ip("-n", head, "link", "set", f"port{i}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(i)}/24", "dev", "eth")
            _ip("-n", name, "link", "set", "eth", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for i in reversed(list(self._processes)):
            self.stop(i)
        for name in self._names:
            _ip("netns", "delete", name)

    def address(self, i: int) -> str:
        """The address of node `i`."""
        return f"{SUBNET}.{i + 1}"

    def inside(self, i: int, *command: str | Path) -> list[str]:
        """A command as it is run on node `i`."""
        return ["ip", "netns", "exec", self._names[i], *map(str, command)]

    def start(self, i: int, *options: str) -> None:
        """Starts Ray on node `i`; the head is 0."""
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if i:
            where = [f"--address={self.address(0)}:{PORT}"]
        elif len(str(self._folder)) < 40:  # a socket's path has at most 107 characters
            where.append(f"--temp-dir={self._folder}/ray")
        with (self._folder / f"node{i}.log").open("ab") as log:
            self._processes[i] = subprocess.Popen(
                self.inside(
                    i, BIN / "ray", "start", *where, f"--node-ip-address={self.address(i)}",
                    "--block", "--disable-usage-stats", *options,
                ),
                stdout=log,
                stderr=log,
                env=self.environment,
            )  # fmt: skip

    def wait_for(self, num_nodes: int) -> None:
        """Waits until so many nodes are alive."""
        code = (
            "import time, ray\n"
            f"ray.init('{self.address(0)}:{PORT}', log_to_driver=False, logging_level='ERROR')\n"
            f"while sum(node['Alive'] for node in ray.nodes()) != {num_nodes}: time.sleep(0.3)"
        )
        deadline = time.monotonic() + 120
        while True:  # Ray itself may not be there yet
            done = subprocess.run(
                self.inside(0, sys.executable, "-c", code),
                capture_output=True, text=True, env=self.environment, timeout=120, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{num_nodes} nodes did not come: {done.stderr[-2000:]}")
            time.sleep(1)

    def cut_off(self, i: int) -> None:
        """Unplugs node `i`."""
        _ip("-n", self._names[0], "link", "set", f"port{i}", "down")

    def plug_in(self, i: int) -> None:
        """Plugs it in again."""
        _ip("-n", self._names[0], "link", "set", f"port{i}", "up")

    def wait_until_gone(self, i: int) -> None:
        """Waits until Ray on node `i` has ended of its own accord."""
        self._processes.pop(i).wait(timeout=120)

    def stop(self, i: int) -> None:
        """Ends Ray on node `i`."""
        process = self._processes.pop(i)
        process.terminate()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
