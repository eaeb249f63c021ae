"""What a search needs of a cluster: probes' nodes, room, nodes that join late, a head's GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune
from ray.cluster_utils import Cluster

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import Recipe
from prunesearch.search import ConfigError, parse_config
from prunesearch.search.bench.noop import NoOp
from prunesearch.search.config import DEFAULT_PROBE, SearchConfig
from prunesearch.search.coordinator import Coordinator
from prunesearch.search.dense import Baseline, prepare_dense
from prunesearch.search.driver import run_trials
from prunesearch.search.fleet import Fleet
from prunesearch.search.nodes import ProbeActor, Room, await_nodes, find_room, place_probes
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.setup import pose, trial_device
from prunesearch.search.space import Space
from prunesearch.search.worker import _asks

BASELINE = Baseline(0.9, 0.3, 1000, 100, 1.0, "trained", 1, 0.0, latency_ms=2.0)


def config(**sections: Any) -> SearchConfig:
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits", "image_size": 8}}
    return parse_config(data | sections)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A raylet; a second one joins when it is waited for."""
    head = {"num_cpus": 2, "resources": {"shared": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_what_never_fits_is_said_after_the_wait(cluster: Cluster) -> None:
    said: list[str] = []
    greedy = config(resources={"gpu": 1, "wait_for_nodes_s": 0.5})
    with pytest.raises(ConfigError, match="`resources` .cpu=1.0, gpu=1.0. must fit.*0 GPUs"):
        await_nodes(greedy, said.append)
    assert said == ["waiting up to 0.5 s for nodes: a trial does not fit on the cluster"]
    with pytest.raises(ConfigError, match="`latency.device` .=cuda. must have a share of a GPU"):
        await_nodes(config(latency={"device": "cuda"}), pytest.fail)


def test_probes_measure_on_the_nodes_that_they_name(cluster: Cluster, tmp_path: Path) -> None:
    probes = {"a": {"runs": 10, "resource": "shared"}, "edge": {"runs": 10}}
    sections: dict[str, Any] = {"probes": probes, "latency": {"runs": 10}}
    with pytest.raises(ConfigError) as caught:
        await_nodes(config(**sections), pytest.fail)
    first, second = str(caught.value).splitlines()
    assert first.startswith("`latency` must be measured on a node with the resource latency_probe")
    assert second.startswith("`probes.edge.resource` (=latency_probe_edge) must be a resource of")
    assert "`ray start --address=HEAD:6379 --resources='{\"latency_probe_edge\": 1}'`" in second

    patient = config(**sections, resources={"wait_for_nodes_s": 120, "max_concurrent": 7})
    said: list[str] = []
    waiter = threading.Thread(target=await_nodes, args=(patient, said.append))
    waiter.start()
    cluster.add_node(num_cpus=0, resources={"latency_probe": 1, "latency_probe_edge": 1})
    waiter.join(120)
    assert said == [
        "waiting up to 120 s for nodes: none has the resource latency_probe",
        "waiting up to 120 s for nodes: none has the resource latency_probe_edge",
    ]
    groups = ray.util.placement_group_table().values()
    assert groups and all(group["state"] == "REMOVED" for group in groups), "nothing is held"

    places = place_probes(patient)
    own = {"latency_probe": 1, "latency_probe_edge": 1}
    assert places == [
        ProbeActor((DEFAULT_PROBE, "edge"), {"num_cpus": 0, "num_gpus": 0.0, "resources": own}),
        ProbeActor(("a",), {"num_cpus": 0, "num_gpus": 0.0, "resources": {"shared": 1}}),
    ], "one actor for all probes of a node: they measure one after the other"
    assert find_room(patient, places) == Room(7, 0, 7), "what does not fit yet waits in Ray"
    assert find_room(config(**sections), places) == Room(2, 0, 2)
    card = {"card": {"device": "cuda", "resource": "shared"}}
    with pytest.raises(ConfigError, match="`probes.card.device` .=cuda. must have a share"):
        place_probes(config(probes=card))

    fleet = Fleet(pose(patient), tmp_path, pytest.fail)
    measured = fleet.measure_references()
    assert set(measured) == {DEFAULT_PROBE, "a", "edge"}
    where = [
        ray.get(probe.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
        for probe in fleet._probes
    ]
    assert len(set(where)) == 2
    references = {name: latency_ms for name, (latency_ms, _) in measured.items()}
    parts = [
        (probe, {name: references[name] for name in place.probes})
        for probe, place in zip(fleet._probes, places, strict=True)
    ]
    found, busy_s = _asks(parts)(Recipe())
    assert set(found) == set(references) and busy_s > 0
    for name, latency in found.items():
        assert latency.latency_ms == pytest.approx(references[name] / latency.speedup)
    assert _asks(parts)(Recipe())[0] == found, "an architecture is measured once"


def test_trials_spread_over_nodes_that_join_while_they_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    settings = config(
        search={"sampler": "random", "trials": 999, "time_limit_s": 150, "early_stop": False},
    )
    plan = plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))
    space = Space(settings.space, plan, ((),))
    coordinator = Coordinator(settings, space, BASELINE, tmp_path, lambda result: None)
    least, most = 0, 0  # at a time: before the node joins, and ever

    def tick(running: int) -> None:
        nonlocal least, most
        most = max(most, running)
        if not least and len(coordinator.results) >= 4:
            least = most
            cluster.add_node(num_cpus=2)
        if most == 4:
            coordinator.stop("seen")

    trainable = tune.with_parameters(NoOp, sleep_s=(0.5, 0.5))
    run_trials(coordinator, trainable, partial(find_room, settings, []), tick, pytest.fail)
    coordinator.close()
    assert (least, coordinator.stopped) == (2, "seen")
    statuses = {str(result.status) for result in coordinator.results.values()}
    assert statuses <= {"completed", "duplicate"}


def test_trials_that_only_evaluate_stay_on_nodes_without_a_gpu(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The GPUs are logical ones: what is asked here is only where Ray puts whom."""
    cpu_nodes = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU", 0) >= 2}
    cluster.add_node(num_cpus=2, num_gpus=2)
    settings = config(
        search={"sampler": "random", "trials": 24, "early_stop": True},
        resources={"gpu": 1, "evaluate": {"cpu": 2}, "max_concurrent": 4},
    )
    room = find_room(settings, [])
    assert set(room.evaluators) == cpu_nodes and room.train == 2
    plan = plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))
    space = Space(settings.space, plan, ((),))
    coordinator = Coordinator(settings, space, BASELINE, tmp_path, lambda result: None)

    class Where(NoOp):  # in here, so that Ray sends its code along
        """Says where it is, and climbs the ladder."""

        def step(self) -> dict[str, Any]:
            found = super().step()
            row = TrialResult.from_json(found["row"])
            fidelity = self._spec["fidelity"]
            row.fidelity, row.accuracy_by_fidelity = fidelity, [row.accuracy] * (fidelity + 1)
            if fidelity < 2:
                row.status = TrialStatus.EARLY_STOPPED
            has_gpu = bool(ray.get_runtime_context().get_assigned_resources().get("GPU"))
            row.host = ray.get_runtime_context().get_node_id()
            row.device = f"fidelity {fidelity} {'with' if has_gpu else 'without'} a GPU"
            return found | {"row": row.to_json()}

    trainable = tune.with_parameters(Where)
    run_trials(coordinator, trainable, partial(find_room, settings, []), _ignore, pytest.fail)
    coordinator.close()
    rows = coordinator.results.values()
    ended = [row for row in rows if row.status is TrialStatus.COMPLETED]
    assert ended and all(row.device == "fidelity 2 with a GPU" for row in ended)
    waiting = [row for row in rows if row.device.startswith("fidelity 0")]
    assert waiting and all(row.device == "fidelity 0 without a GPU" for row in waiting)
    assert {row.host for row in waiting} <= cpu_nodes
    assert {row.host for row in ended}.isdisjoint(cpu_nodes)


def _ignore(running: int) -> None:
    """Nothing is shown."""


@pytest.mark.parametrize(
    ("room", "admitted"),
    [
        (Room(2, 0, 2), {(0, 0): (True, True), (1, 0): (True, True), (1, 1): (False, False)}),
        (Room(1, 3, 4), {(1, 0): (False, True), (0, 3): (True, False), (1, 3): (False, False)}),
        (Room(2, 4, 3), {(2, 0): (False, True), (0, 2): (True, True), (1, 2): (False, False)}),
    ],
)
def test_room_of_each_kind(room: Room, admitted: dict[tuple[int, int], tuple[bool, bool]]) -> None:
    assert {running: room.admits(*running) for running in admitted} == admitted


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_dense_model_trains_on_the_cpu_of_a_head_without_a_gpu(tmp_path: Path) -> None:
    on_gpus = config(
        data={"name": "digits", "image_size": 8, "limit": 120, "batch_size": 32},
        baseline={"epochs": 1},
        resources={"gpu": 1},
        cache={"reuse": "none"},
    )
    problem, said = pose(on_gpus), list[str]()
    assert problem.task.device.type == "cpu"
    prepare_dense(problem, tmp_path, said.append)
    assert said[0].endswith("1 epochs, on the CPU: torch sees no GPU on this machine")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        trial_device(on_gpus)  # a worker's
