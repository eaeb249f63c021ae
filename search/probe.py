"""The actor that measures latencies."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
import ray
import torch
from torch import nn

from ..methods.layer_costs import layer_calls
from ..methods.layer_latency import LayerLatencies, measure_layers
from ..methods.measure import Latency, paired_latency, reference_latency_ms
from ..methods.surgery import PruningPlan, Recipe, layer_widths, prune
from .cache import Made, Shared
from .config import DEFAULT_PROBE, SearchConfig
from .digests import latency_basis
from .environment import fingerprint
from .keeper import shares
from .setup import make_model
from .shelf import address


class LatencyProbe:
    """Owns the devices that latency is measured on and answers one request at a time.

    Its models are fresh ones: no latency depends on what the weights are.

    Args:
        config: The run's config.
        num_classes: Outputs of the classifier.
        image_shape: (channels, height, width).
        plan: The model's channel groups.
        keeper: Name of the actor that remembers what was measured, also for other runs. (Ray warns
            of a handle here: a lost one would keep the probe from restarting.)
        names: The probes of the config that it is: those on its node, so that no two measure at
            the same time there.
    """

    def __init__(
        self,
        config: SearchConfig,
        num_classes: int,
        image_shape: Sequence[int],
        plan: PruningPlan,
        keeper: str,
        names: Sequence[str] = (DEFAULT_PROBE,),
    ) -> None:
        shared = shares(ray.get_actor(keeper))
        settings = {name: config.all_probes[name] for name in names}
        torch.set_num_threads(settings[names[0]].threads)
        self._dense = make_model(config, num_classes, trained=False).eval()
        self._plan = plan
        self._devices = {
            name: _Device(
                config.model_copy(update={"latency": latency}),
                self._dense,
                num_classes,
                image_shape,
                shared,
            )
            for name, latency in settings.items()
        }

    def references(self) -> dict[str, tuple[float, dict[str, Any]]]:
        """The dense model's latency in ms and the device's fingerprint, by probe."""
        return {name: device.reference() for name, device in self._devices.items()}

    def layers(self) -> LayerLatencies:
        """The dense model's layers, each measured alone at several widths, by the first probe."""
        return next(iter(self._devices.values())).layers()

    def measure(
        self, recipe: Recipe, references_ms: Mapping[str, float]
    ) -> tuple[dict[str, Latency], float]:
        """Latencies of the recipe's architecture and the seconds they took; known ones take few.

        Args:
            recipe: What is removed.
            references_ms: The dense model's latency, by probe; other probes do not measure.
        """
        start = time.perf_counter()
        model = prune(self._dense, self._plan, recipe)
        found = {
            name: self._devices[name].measure(model, recipe).at(reference_ms)
            for name, reference_ms in references_ms.items()
        }
        return found, time.perf_counter() - start


class _Device:
    """One probe's device, the dense model on it, and what is known of it.

    Args:
        config: The run's config, with the probe's settings as its `latency`.
        dense: The dense model, on the CPU.
        num_classes: Outputs of the classifier.
        image_shape: (channels, height, width).
        shared: What was measured before, also by other runs.
    """

    def __init__(
        self,
        config: SearchConfig,
        dense: nn.Module,
        num_classes: int,
        image_shape: Sequence[int],
        shared: Shared,
    ) -> None:
        self._latency = config.latency
        self._shared = shared
        self._device = torch.device(config.latency.device)
        self._dense = copy.deepcopy(dense).to(self._device)
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(config.latency.batch_size, *image_shape, generator=generator)
        self._example = example.to(self._device)
        self._fingerprint = fingerprint(self._device)
        self._basis = latency_basis(config, num_classes, image_shape, self._fingerprint)
        self._known: dict[str, Mapping[str, float]] = {}

    def reference(self) -> tuple[float, dict[str, Any]]:
        latency = self._latency

        def measure() -> Made:
            reference = reference_latency_ms(
                self._dense, self._example, threads=latency.threads, runs=latency.runs
            )
            return Made(info={"reference_ms": reference, "host": self._fingerprint["host"]})

        made, _ = self._shared({"kind": "reference", **self._basis}, measure)
        return made.info["reference_ms"], self._fingerprint | latency.model_dump()

    def layers(self) -> LayerLatencies:
        image = self._example[:1]
        return measure_layers(
            self._dense,
            layer_calls(self._dense, image),
            batch_size=self._latency.batch_size,
            threads=self._latency.threads,
        )

    def measure(self, model: nn.Module, recipe: Recipe) -> Latency:
        """Of the recipe's model, which is moved to this device, relative to the dense one."""
        key = {"kind": "latency", **self._basis} | {
            "dropped_blocks": list(recipe.dropped_blocks),
            "widths": layer_widths(model),
        }
        name = address(key)
        if name not in self._known:
            made, _ = self._shared(key, lambda: self._measure(model))
            self._known[name] = made.info
        return Latency(**{field: self._known[name][field] for field in _LATENCY})

    def _measure(self, model: nn.Module) -> Made:
        latency = paired_latency(
            model.to(self._device),
            self._dense,
            self._example,
            reference_ms=1.0,
            threads=self._latency.threads,
            runs=self._latency.runs,
        )
        return Made(info=dataclasses.asdict(latency) | {"host": self._fingerprint["host"]})


_LATENCY = tuple(field.name for field in dataclasses.fields(Latency))
