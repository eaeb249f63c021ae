"""Each launch file by the schema or tool that reads it, the pages' commands by their parsers."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from packaging.version import Version
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli
from ray.scripts.scripts import start
from shell import run_script, shellcheck, stand_ins

from prunesearch.search.cli import app
from prunesearch.search.config import load_config

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
PAGES = sorted(CLUSTERS.glob("*.md"))
LAUNCHER = ["aws.yaml", "gcp.yaml", "on-premises.yaml"]
KUBERAY = ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"]
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
PROBE = {"latency_probe": 1}


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTERS / name).read_text()))


def ray_start(words: list[str]) -> dict[str, Any]:
    """The options of `ray start`, as Ray reads them; refused where there is no such option."""
    options = start.make_context("start", list(words)).params
    assert options["dashboard_host"] in LOOPBACK
    return options


# --- Ray's VM launcher --------------------------------------------------------------------------


def launched(command: str) -> dict[str, Any]:
    """The options of the `ray start` in a start command, which must set the token mode."""
    words = shlex.split(command)
    at = words.index("start")
    assert words[at - 1].endswith("/bin/ray")
    assert words[at - 2] == "RAY_AUTH_MODE=token"
    return ray_start(words[at + 1 :])


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_file_is_what_rays_launcher_wants(name: str) -> None:
    config = prepare_config(read(name))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config({**config, "idle_minutes": 5})


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_file_brings_token_and_package_to_each_node(name: str) -> None:
    config = prepare_config(read(name))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token", "~/dist": "dist"}
    for setup in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token" in setup
        assert any("pip install" in line and "~/dist/prune_search-*.whl" in line for line in setup)
    head = launched(config["head_start_ray_commands"][-1])
    worker = launched(config["worker_start_ray_commands"][-1])
    assert head["head"] and head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_cloud_file_measures_on_the_head_alone(name: str) -> None:
    types = prepare_config(read(name))["available_node_types"]
    assert set(types) == {"cpu_head", "gpu_head", "cpu_worker", "gpu_worker"}
    for key, node in types.items():
        if key.endswith("_head"):
            assert node["resources"].items() >= {"CPU": 0, **PROBE}.items()
            assert node["max_workers"] == 0  # a head only
        else:
            assert "latency_probe" not in node["resources"]
            assert node["max_workers"] > 0


def test_on_premises_file_measures_on_the_head_alone() -> None:
    config = read("on-premises.yaml")
    head = launched(config["head_start_ray_commands"][-1])
    assert (head["num_cpus"], json.loads(head["resources"])) == (0, PROBE)
    assert launched(config["worker_start_ray_commands"][-1])["resources"] == "{}"


# --- KubeRay ------------------------------------------------------------------------------------

# the fields of KubeRay 1.6's custom resources: what it does not know it drops in silence
JOB_FIELDS = set(
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint "
    "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata "
    "preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes "
    "submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished".split()
)
CLUSTER_FIELDS = set(
    "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs".split()
)
HEAD_FIELDS = set(
    "enableIngress headService labels rayStartParams resources serviceType template".split()
)
WORKER_FIELDS = set(
    "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams "
    "replicas resources scaleStrategy suspend template".split()
)


def documents(name: str) -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load_all((CLUSTERS / name).read_text())
    return {document["kind"]: document for document in loaded}


def cluster_spec(name: str) -> dict[str, Any]:
    found = documents(name)
    if "RayJob" in found:
        return dict(found["RayJob"]["spec"]["rayClusterSpec"])
    return dict(found["RayCluster"]["spec"])


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_is_what_rays_autoscaler_wants(name: str) -> None:
    resource = {"metadata": {"name": "x", "namespace": "default"}, "spec": cluster_spec(name)}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    head = types.pop("headgroup")["resources"]
    assert (head["CPU"], head["latency_probe"]) == (0, 1)
    assert {key: node["resources"].get("GPU") for key, node in types.items()} == {
        "cpu-workers": None,
        "gpu-workers": 1,
    }
    assert not any("latency_probe" in node["resources"] for node in types.values())


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_has_only_fields_that_kuberay_knows(name: str) -> None:
    spec = cluster_spec(name)
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    assert all(set(group) <= WORKER_FIELDS for group in spec["workerGroupSpecs"])
    assert {document["apiVersion"] for document in documents(name).values()} == {"ray.io/v1", "v1"}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_holds_valid_pods_volumes_and_config_maps(name: str) -> None:
    found = [each for each in documents(name).values() if each["apiVersion"] == "v1"]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        for group in groups(name)
    ]
    for document in found + pods:
        kubernetes_validate.validate(document, "1.28", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pods[0], "spek": {}}, "1.28", strict=True)
    volumes = {each["metadata"]["name"] for each in found}
    for volume in pods[0]["spec"]["volumes"]:
        source = volume.get("persistentVolumeClaim", {}).get("claimName")
        assert (source or volume["configMap"]["name"]) in volumes


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_starts_no_ray_without_a_token(name: str) -> None:
    assert cluster_spec(name)["authOptions"] == {
        "mode": "token",
        "secretName": "prune-search-token",
    }
    for group in groups(name):
        for container in group["template"]["spec"]["containers"]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
    assert cluster_spec(name)["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_names_the_ray_of_the_image(name: str) -> None:
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-py311$", dockerfile(), re.MULTILINE)
    assert base and base[1] == cluster_spec(name)["rayVersion"]
    assert Version(base[1]) >= Version("2.54")


def dockerfile() -> str:
    return (CLUSTERS / "Dockerfile").read_text()


def test_image_installs_the_wheel_with_its_versions() -> None:
    assert "-c /tmp/dist/constraints.txt /tmp/dist/prune_search-*.whl" in dockerfile()


def test_job_runs_a_valid_search_and_resumes_it(tmp_path: Path) -> None:
    found = documents("kuberay-rayjob.yaml")
    job, data = found["RayJob"]["spec"], found["ConfigMap"]["data"]
    assert set(job) <= JOB_FIELDS
    assert job["submissionMode"] == "K8sJobMode"
    (tmp_path / "search.yaml").write_text(data["search.yaml"])
    assert load_config(tmp_path / "search.yaml").name == "digits-resnet20"

    assert job["entrypoint"] == "sh /search/start.sh"
    script = tmp_path / "start.sh"
    script.write_text(data["start.sh"].replace("/results", str(tmp_path)))
    shellcheck(script)
    stand_ins(tmp_path / "bin", {"prune-search": 'echo "$@"'})
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    first = run_script("sh", script, env=path)
    assert first.stdout == f"run /search/search.yaml --out {tmp_path}/run --address auto\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "baseline.json").touch()
    assert run_script("sh", script, env=path).stdout.startswith(f"resume {tmp_path}/run ")


# --- the pages ----------------------------------------------------------------------------------


def code_lines(page: Path) -> list[str]:
    return re.findall(r"^ {4,}(\S.*)$", page.read_text(), re.MULTILINE)


def programs(line: str) -> Iterator[list[str]]:
    """The calls of `ray` and `prune-search` in a line of shell, those inside quotes too."""
    words = shlex.split(line, comments=True)
    for at, word in enumerate(words):
        before = words[at - 1] if at else ";"
        begins = before.endswith(";") or before in {"&&", "--", "run"} or "=" in before
        if word in {"ray", "prune-search"} and begins:
            ends = (i for i, w in enumerate(words) if i > at and w in {"&&", "|", ">", "<"})
            yield words[at : next(ends, len(words))]
        elif re.match(r"(ray|prune-search) ", word):
            yield from programs(word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_gives_commands_that_exist(page: Path) -> None:
    ours = typer.main.get_command(app)
    for line in code_lines(page):
        for program, name, *args in programs(line):
            group: Any = ray_cli if program == "ray" else ours
            command = group.get_command(group.make_context(program, [name]), name)
            assert command is not None, line
            options = command.make_context(name, list(args)).params
            assert options.get("dashboard_host", "127.0.0.1") in LOOPBACK
        for path in re.findall(r"\b(?:clusters|examples)/[\w./-]*", line):
            assert (ROOT / path).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_links_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert links or page.name == "one-machine.md"
    for link in links:
        assert link.startswith("https://") or (CLUSTERS / link).is_file(), link


def test_overview_names_every_file() -> None:
    linked = set(re.findall(r"\]\(([^)]+)\)", (CLUSTERS / "README.md").read_text()))
    assert {path.name for path in CLUSTERS.iterdir()} - {"README.md"} <= linked


def test_every_start_of_ray_is_with_a_token() -> None:
    for page in PAGES:
        for line in code_lines(page):
            assert "ray start" not in line or "RAY_AUTH_MODE=token ray start" in line, line


def test_no_file_holds_a_secret() -> None:
    secret = re.compile(r"[0-9a-f]{32}|AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*KEY|stringData|kind: Secret")
    for path in CLUSTERS.iterdir():
        assert not secret.search(path.read_text()), path.name
