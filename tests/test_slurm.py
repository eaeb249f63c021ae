"""The Slurm scripts: checked, and run with stand-ins for Slurm's own commands."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
from ray.util import get_node_ip_address
from shell import run_script, shellcheck, stand_ins

from prunesearch.search.runs import Run

CLUSTERS = Path(__file__).parents[1] / "clusters"
SLURM = ["slurm-exclusive.sbatch", "slurm-shared.sbatch"]

SRUN = """\
# one task a node, all of them on this machine
echo $$ >"$HOME/srun.pid"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node setsid "$@" &
  tasks+=($!)
done
trap 'kill "${tasks[@]}" 2>/dev/null' TERM
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
done
"""


def slurm_job(folder: Path, job_id: int, *, venv: Path, srun: str = SRUN) -> dict[str, str]:
    """What Slurm gives a job of two nodes, and stand-ins for its commands."""
    commands = folder / f"slurm-{job_id}"
    scancel = '[[ $2 == "$SLURM_JOB_ID.0" ]] && kill -s "${1#*=}" "$(cat "$HOME/srun.pid")"'
    scontrol = 'printf "node%s\\n" 0 1'
    stand_ins(commands, {"srun": srun, "scancel": scancel, "scontrol": scontrol})
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(folder),
        "HEAD_IP": get_node_ip_address(),
        "PRUNE_SEARCH_VENV": str(venv),
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_MEM_PER_CPU": "2048",
    }


def fake_venv(folder: Path, scripts: Mapping[str, str] | None = None) -> Path:
    python = f'exec {sys.executable} "$@"'
    stand_ins(folder / "venv" / "bin", {"python": python, **(scripts or {})})
    return folder / "venv"


def token_is_gone(folder: Path) -> bool:
    return not list(folder.glob(".prune-search-job-*"))


@pytest.mark.parametrize("name", SLURM)
def test_script_is_clean(name: str) -> None:
    shellcheck(CLUSTERS / name)


@pytest.mark.parametrize("name", SLURM)
def test_script_runs_in_a_job_only(name: str, tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "", "HOME": str(tmp_path)}
    done = run_script(CLUSTERS / name, "config.yaml", "out", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"sbatch clusters/{name} CONFIG.yaml RUN_DIR" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", SLURM)
def test_token_mode_comes_before_ray(name: str) -> None:
    text = (CLUSTERS / name).read_text()
    export = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token"
    assert 0 < text.index(export) < text.index("\nsrun ")


# --- shared nodes -------------------------------------------------------------------------------


def ports(folder: Path, *job_ids: int) -> Iterator[int]:
    """The port of Ray in each job, in which Ray does not start."""
    venv = fake_venv(folder)
    for job_id in job_ids:
        env = slurm_job(folder, job_id, venv=venv, srun="exit 1")
        done = run_script(CLUSTERS / "slurm-shared.sbatch", "config.yaml", "out", env=env)
        assert done.returncode == 1
        assert "Ray did not start" in done.stderr
        said = re.search(rf"^Ray of job {job_id}: (\S+):(\d+)$", done.stdout, re.MULTILINE)
        assert said and said[1] == env["HEAD_IP"]
        assert token_is_gone(folder)
        yield int(said[2])


def test_shared_jobs_have_ports_of_their_own(tmp_path: Path) -> None:
    found = list(ports(tmp_path, 700, 701, 702, 1899))
    assert all(20_000 <= port < 32_000 for port in found)
    assert all(abs(a - b) >= 10 for i, a in enumerate(found) for b in found[:i])


def test_shared_job_leaves_a_port_that_is_taken(tmp_path: Path) -> None:
    (port,) = ports(tmp_path / "free", 900)
    with socket.create_server((get_node_ip_address(), port + 1)):  # the second of its two
        assert list(ports(tmp_path / "taken", 900)) == [port + 10]


def test_shared_job_searches_on_two_nodes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Real Rays, a real search; only Slurm's own commands are stand-ins."""
    config = SMALL.replace("trials: 6", "trials: 2, sensitivity: false").replace(
        "macs:", "latency_ms:"
    )
    (tmp_path / "small.yaml").write_text(config)
    job_id, out = os.getpid(), tmp_path / "out"
    env = slurm_job(tmp_path, job_id, venv=Path(sys.prefix))
    script = CLUSTERS / "slurm-shared.sbatch"
    done = run_script(script, tmp_path / "small.yaml", out, env=env)
    assert done.returncode == 0, done.stdout + done.stderr

    run = Run(out)
    assert run.finished and len(run.results()) == 2
    assert all(result.latency_ms for result in run.front_results())
    assert token_is_gone(tmp_path)
    assert not list(Path("/tmp").glob(f"ps-{job_id}-*"))
    assert not processes_of(job_id)


def processes_of(job_id: int) -> list[str]:
    return [
        process.parent.name
        for process in Path("/proc").glob("[0-9]*/environ")
        if f"\0SLURM_JOB_ID={job_id}\0".encode() in read_if_there(process)
    ]


def read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended, or somebody else's
        return b""


# --- whole nodes --------------------------------------------------------------------------------

RECORD = """\
printf '%s\\n' "$@" > "$HOME/$SLURM_NODEID.said"
echo "mode $RAY_AUTH_MODE, token $(stat -c %a "$RAY_AUTH_TOKEN_PATH")"
"""


@pytest.mark.parametrize("again", [False, True])
def test_exclusive_job_starts_ray_on_each_node(again: bool, tmp_path: Path) -> None:
    """Ray's own command is a stand-in here: it would end every Ray of this machine."""
    out = tmp_path / "out"
    if again:
        out.mkdir()
        (out / "baseline.json").touch()
    venv = fake_venv(tmp_path, {"ray": RECORD, "prune-search": 'echo "prune-search $*"'})
    env = slurm_job(tmp_path, os.getpid(), venv=venv)
    done = run_script(CLUSTERS / "slurm-exclusive.sbatch", "config.yaml", out, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mode token, token 600\n") == 2
    assert done.stdout.endswith(f"prune-search status {out}\n")
    assert token_is_gone(tmp_path)
    assert not list(Path("/tmp").glob(f"ps-{os.getpid()}-*"))

    address = f"{env['HEAD_IP']}:6379"
    search = ["resume", str(out)] if again else ["run", "config.yaml", "--out", str(out)]
    for node, cpus, resources in ((0, 0, {"latency_probe": 1}), (1, 1, {})):
        given, options, command = symmetric_run(tmp_path / f"{node}.said")
        assert given == ["symmetric-run", "--address", address, "--min-nodes", "2"]
        assert (options["num_cpus"], json.loads(options["resources"])) == (cpus, resources)
        assert options["dashboard_host"] in {"127.0.0.1", "::1"}
        assert command == ["prune-search", *search, "--address", address]


def symmetric_run(said: Path) -> tuple[list[str], dict[str, Any], list[str]]:
    """What is for the command itself, the options for `ray start`, and the program to run."""
    words = said.read_text().splitlines()
    at = words.index("--")
    options = curate_and_validate_ray_start_args(words[1:at])
    parsed = start.make_context("start", list(options)).params
    return words[: at - len(options)], parsed, words[at + 1 :]
