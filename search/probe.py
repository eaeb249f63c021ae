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
from .cache import Made
from .config import SearchConfig
from .digests import latency_basis
from .environment import fingerprint
from .keeper import shares
from .setup import make_model
from .shelf import address


class LatencyProbe:
    """Owns the device that latency is measured on and answers one request at a time.

    Its models are fresh ones: no latency depends on what the weights are.

    Args:
        config: The run's config.
        num_classes: Outputs of the classifier.
        image_shape: (channels, height, width).
        plan: The model's channel groups.
        keeper: Name of the actor that remembers what was measured, also for other runs. (Ray warns
            of a handle here: a lost one would keep the probe from restarting.)
    """

    def __init__(
        self,
        config: SearchConfig,
        num_classes: int,
        image_shape: Sequence[int],
        plan: PruningPlan,
        keeper: str,
    ) -> None:
        self._config = config
        self._shared = shares(ray.get_actor(keeper))
        torch.set_num_threads(config.latency.threads)
        self._device = torch.device(config.latency.device)
        self._dense = make_model(config, num_classes, trained=False).eval()
        self._on_device = copy.deepcopy(self._dense).to(self._device)
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(config.latency.batch_size, *image_shape, generator=generator)
        self._plan = plan
        self._example = example.to(self._device)
        self._fingerprint = fingerprint(self._device)
        self._basis = latency_basis(config, num_classes, image_shape, self._fingerprint)
        self._known: dict[str, Mapping[str, float]] = {}

    def reference(self) -> tuple[float, dict[str, Any]]:
        """The dense model's latency in ms, and this device's fingerprint."""
        latency = self._config.latency

        def measure() -> Made:
            reference = reference_latency_ms(
                self._on_device, self._example, threads=latency.threads, runs=latency.runs
            )
            return Made(info={"reference_ms": reference, "host": self._fingerprint["host"]})

        made, _ = self._shared({"kind": "reference", **self._basis}, measure)
        return made.info["reference_ms"], self._fingerprint | latency.model_dump()

    def layers(self) -> LayerLatencies:
        """The dense model's layers, each measured alone at several widths."""
        latency = self._config.latency
        image = self._example[:1]
        return measure_layers(
            self._on_device,
            layer_calls(self._on_device, image),
            batch_size=latency.batch_size,
            threads=latency.threads,
        )

    def measure(self, recipe: Recipe, reference_ms: float) -> tuple[Latency, float]:
        """Latency of the recipe's architecture and the seconds it took; known ones take few."""
        start = time.perf_counter()
        model = prune(self._dense, self._plan, recipe)
        key = {"kind": "latency", **self._basis} | {
            "dropped_blocks": list(recipe.dropped_blocks),
            "widths": layer_widths(model),
        }
        name = address(key)
        if name not in self._known:
            made, _ = self._shared(key, lambda: self._measure(model))
            self._known[name] = made.info
        found = {field: self._known[name][field] for field in Latency.__dataclass_fields__}
        return Latency(**found).at(reference_ms), time.perf_counter() - start

    def _measure(self, model: nn.Module) -> Made:
        latency = paired_latency(
            model.to(self._device),
            self._on_device,
            self._example,
            reference_ms=1.0,
            threads=self._config.latency.threads,
            runs=self._config.latency.runs,
        )
        return Made(info=dataclasses.asdict(latency) | {"host": self._fingerprint["host"]})
