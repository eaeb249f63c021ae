"""Writes a front member as a folder that loads without the search, and proves it.

The folder holds `recipe.json`, `model.safetensors`, the further forms that were asked for,
`export.json` (what the proof measured), a model card and `load.py`. It appears when all of it is
proven, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..methods.exported import FORMAT, RECIPE, WEIGHTS, load_pruned, read_recipe, read_weights
from ..methods.shapes import changed_attributes
from ..methods.surgery import PruningPlan, Recipe
from .environment import environment
from .export_proof import Proof, Timing, Unproven, prove, proven
from .load_script import LOADER, load_script
from .model_card import CARD, model_card, wilson_interval
from .portable import ExportError, check_formats, write_forms
from .records import TrialResult, TrialStatus
from .store import atomic_write_bytes, read_json, write_json
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from ..methods.tasks import Task
    from .runs import Run

__all__ = [
    "EXPORT",
    "FORMAT",
    "RECIPE",
    "WEIGHTS",
    "ExportError",
    "export_member",
    "load_pruned",
    "read_export",
    "read_recipe",
]

EXPORT = "export.json"
MAX_IMAGES, MAX_PIXELS = 64, 2**21  # of the comparison


def export_member(
    run: Run, member: TrialResult, out: Path, formats: Sequence[str] = ("safetensors",)
) -> Path:
    """Writes one trial's pruned model to `out`, proves it in a fresh process, and tests it once.

    What the fresh process loads must give the outputs of the trial's model, in every form. Then
    the model is evaluated on the test split, as the dense one is.

    Args:
        run: The run.
        member: A member of its front.
        out: The new folder; recipe and safetensors are always in it.
        formats: Names in `portable.FORMATS`; `load.py` loads the first.

    Raises:
        ConfigError: If the trial's weights are not kept, `out` is in use, or a format is unknown
            or lacks its libraries.
        ExportError: If a form cannot be written, does not load or gives other outputs.
    """
    from .runs import check_writable

    formats = check_formats(formats)
    _check_kept(run, member)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"`--out` (={out}) must not exist yet or be empty. Choose another.")
    check_writable(out)
    source = _Source.of(run, member)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        recipe = source.document()
        atomic_write_bytes(folder / WEIGHTS, (run.folder / str(member.weights)).read_bytes())
        write_json(folder / RECIPE, recipe)
        proofs = _write_proven(source, formats, folder)
        recipe |= {"parity": proofs["safetensors"].difference} | source.tested(folder)
        write_json(folder / RECIPE, recipe)
        export = _export_facts(source, formats, proofs)
        write_json(folder / EXPORT, export)
        atomic_write_bytes(folder / CARD, model_card(recipe, export).encode())
        atomic_write_bytes(folder / LOADER, load_script(formats).encode())
        folder.replace(out)
    return out


def read_export(folder: str | Path) -> dict[str, Any]:
    """What `export.json` of an exported folder holds; empty where an older version wrote it.

    Raises:
        ConfigError: If it is damaged.
    """
    path = Path(folder) / EXPORT
    return dict(read_json(path)) if path.exists() else {}


@dataclass(frozen=True)
class _Source:
    """What an export is made of.

    Attributes:
        run: The run.
        member: The trial.
        task: The run's data, on the CPU.
        dense: The dense model, its weights as constructed.
        plan: Its channel groups.
        recipe: What the trial removed.
        pruned: The trial's model, in eval mode.
    """

    run: Run
    member: TrialResult
    task: Task
    dense: nn.Module
    plan: PruningPlan
    recipe: Recipe
    pruned: nn.Module

    @classmethod
    def of(cls, run: Run, member: TrialResult) -> _Source:
        """Builds the trial's model by surgery, not by what the export will hold."""
        from ..methods.surgery import apply
        from .setup import find_groups, load_images, make_model, make_task

        config = run.config
        task = make_task(config, load_images(config), "cpu")
        dense = make_model(config, task.num_classes, trained=False)
        recipe = Recipe.from_json((run.folder / str(member.recipe)).read_text(encoding="utf-8"))
        plan = find_groups(config, dense, task.example_input(2))
        pruned = apply(make_model(config, task.num_classes, trained=False), plan, recipe)
        weights = run.folder / str(member.weights)
        try:
            pruned.load_state_dict(read_weights(weights))
        except RuntimeError as error:
            raise ValueError(
                f"`{weights}` must hold the weights of {member.recipe}: {error}. Choose another "
                "--trial."
            ) from error
        return cls(run, member, task, dense, plan, recipe, pruned.eval())

    @property
    def images(self) -> Tensor:
        """Real images for the comparison, [B, C, H, W]; fewer of large ones."""
        _, height, width = self.task.data.image_shape
        return self.task.example_input(max(2, min(MAX_IMAGES, MAX_PIXELS // (height * width))))

    def document(self) -> dict[str, Any]:
        """The recipe of the export, without what is not measured yet."""
        config, task, data = self.run.config, self.task, self.task.data
        return {
            "format": FORMAT,
            "model": {
                "name": config.model.name,
                "kwargs": config.model.kwargs,
                "num_classes": task.num_classes,
            },
            "dropped_blocks": list(self.recipe.dropped_blocks),
            "attributes": changed_attributes(self.dense, self.pruned),
            "kept": {name: list(kept) for name, kept in self.recipe.kept.items()},
            "channels": self._channels(),
            "input": {
                "shape": list(data.image_shape),
                "mean": list(data.mean),
                "std": list(data.std),
            },
            "classes": list(data.classes),
            "metric": task.metric,
            "data": {
                "name": config.data.name,
                **{name: len(getattr(data, name)) for name in ("train", "val", "test")},
                "official_test": data.official_test,
            },
            "licence": config.model.licence,
            "search": config.name,
            "recover": config.recover.model_dump(mode="json"),
            "trial": _facts(self.member),
            "baseline": self.run.baseline,
        }

    def tested(self, folder: Path) -> dict[str, Any]:
        """Figures on the test split: of the model in the folder, and of the dense one."""
        from .dense import DENSE_WEIGHTS, load_dense

        found = {"test": self._test(load_pruned(folder, run_code=True))}  # as the config says
        stored = self.run.folder / DENSE_WEIGHTS
        if stored.is_file():
            load_dense(self.dense, stored)
            found["dense_test"] = self._test(self.dense)
        return found

    def _test(self, model: nn.Module) -> dict[str, Any]:
        figures: dict[str, Any] = dict(self.task.evaluate(model, "test"))
        count = len(self.task.data.test)
        figures["num_images"] = count
        if self.task.name == "classification":  # a share of independent images
            figures["interval_95"] = list(wilson_interval(figures["accuracy"], count))
        return figures

    def _channels(self) -> dict[str, dict[str, int]]:
        """Width of each group that is still there, before and after."""
        return {
            group.name: {
                "dense": group.num_channels,
                "kept": len(self.recipe.kept.get(group.name, range(group.num_channels))),
            }
            for group in self.plan.alive(self.recipe.dropped_blocks)
        }


def _write_proven(source: _Source, formats: tuple[str, ...], folder: Path) -> dict[str, Proof]:
    """Writes the further forms beside the weights and proves all of them."""
    latency = source.run.config.latency
    write_forms(source.pruned, formats, folder, source.images)
    every = tuple(dict.fromkeys(("safetensors", *formats)))
    export = Unproven(folder, every, source.pruned, source.images)
    how = Timing(batch_size=latency.batch_size, threads=latency.threads, runs=latency.runs)
    return proven(prove([export], how)[0])


def _export_facts(
    source: _Source, formats: Sequence[str], proofs: dict[str, Proof]
) -> dict[str, Any]:
    latency = source.run.config.latency
    return {
        "asked": list(formats),
        "forms": {name: dataclasses.asdict(proof) for name, proof in proofs.items()},
        "settings": {
            "device": "cpu",
            "batch_size": latency.batch_size,
            "threads": latency.threads,
            "runs": latency.runs,
            "images_compared": len(source.images),
        },
        "environment": environment(),
    }


def _check_kept(run: Run, member: TrialResult) -> None:
    """Refuses a trial whose recipe or weights are not there (any more)."""
    if member.recipe is None or member.weights is None:
        kept = ", ".join(r.trial_id for r in run.front_results() if r.weights) or "none"
        raise ConfigError(
            f"`--trial` (={member.trial_id}) must be a front member: only their weights are kept "
            f"({TrialStatus(member.status)} here). Choose one of {kept}."
        )
    lost = [p for p in (member.recipe, member.weights) if not (run.folder / p).is_file()]
    if lost:
        raise ConfigError(
            f"`RUN_DIR` (={run.place}) must hold {' and '.join(lost)}: the files of trial "
            f"{member.trial_id} are gone. `prune-search resume {run.place}` repairs the front."
        )


def _facts(member: TrialResult) -> dict[str, Any]:
    facts = dataclasses.asdict(member)
    return {k: v for k, v in facts.items() if k not in ("candidate", "recipe", "weights")} | {
        "candidate": json.loads(member.candidate)
    }
