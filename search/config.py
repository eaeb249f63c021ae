"""YAML or a mapping -> `SearchConfig`, checked once; every mistake is named with its position."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from ..methods.names import nearest
from ..methods.user_code import names_code
from .config_errors import RuleError, explain
from .metrics import METRICS, Constraint, check_constraints, check_objectives, check_probes
from .yaml_source import (
    ConfigError,
    Loc,
    Source,
    dotted,
    mapping_source,
    read_source,
    write_yaml,
)

__all__ = [
    "METRICS",
    "ConfigError",
    "Constraint",
    "SearchConfig",
    "check_names",
    "dump_config",
    "load_config",
    "parse_config",
]

DEFAULT_PROBE = ""  # what the probe of the section `latency` is called among the others


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read and check a configuration file.

    Args:
        path: YAML 1.2 file, UTF-8.
        overrides: `key.sub=value` assignments, applied in order; the value is YAML.

    Raises:
        ConfigError: With one line `file:line:column: ...` for every mistake.
    """
    return _build(read_source(path, overrides))


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> SearchConfig:
    """Check a configuration given as nested mappings, for the Python API.

    Args:
        data: The mappings.
        overrides: `key.sub=value` assignments, applied in order; the value is YAML.

    Raises:
        ConfigError: With one line for every mistake.
    """
    return _build(mapping_source(data, overrides))


def dump_config(config: SearchConfig) -> str:
    """The whole configuration, defaults included, as YAML that loads back equal."""
    stream = io.StringIO()
    write_yaml(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def check_names(
    config: SearchConfig, path: str | Path | None = None, overrides: Sequence[str] = ()
) -> None:
    """Check the names of the model, the data set and the criteria against what is installed.

    Apart from `load_config` because the registries import torch.

    Args:
        config: What `load_config(path, overrides)` returned.
        path: Its file, for positions; None if it came from `parse_config`.
        overrides: Its overrides.

    Raises:
        ConfigError: With one line for every unknown name or option.
    """
    from ..methods.criteria import known_methods, validate_options
    from ..methods.data import dataset_names
    from ..methods.models.build import model_names
    from ..methods.tasks import task_names

    source = Source("config") if path is None else read_source(path, overrides)
    mistakes = []
    if ":" not in config.model.name:
        mistakes += _unknown(source, ("model", "name"), config.model.name, model_names())
    name = config.data.name
    if ":" not in name and name not in dataset_names():
        wrong = name.replace("-", "_")
        mistakes += _unknown(source, ("data", "name"), wrong, dataset_names())
    if config.task is not None and ":" not in config.task.name:
        mistakes += _unknown(source, ("task",), config.task.name, task_names())
    for index, criterion in enumerate(config.space.criteria):
        loc = ("space", "criteria", index)
        if criterion.name not in known_methods():
            mistakes += _unknown(source, loc, criterion.name, known_methods())
            continue
        try:
            validate_options(criterion.name, criterion.options)
        except ValueError as error:
            mistakes.append(f"{source.where(loc)}: {error}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def ignored_settings(config: SearchConfig) -> list[str]:
    """What was set although it has no effect, a sentence each; of the config of a new run.

    A config that sets every field is a dump of another one and says nothing of what was meant.
    """
    search = config.search
    given = search.model_fields_set
    if given >= set(SamplerConfig.model_fields):
        return []
    ladder = "there is one fidelity (search.early_stop: false)"
    names: tuple[str, ...] = ("reduction_factor", "short_share")
    if config.recover.epochs == 0:
        ladder = "without fine-tuning there is one fidelity (recover.epochs: 0)"
        names += ("early_stop",) if search.early_stop else ()
    found = []
    if config.recover.epochs == 0 or not search.early_stop:
        found += [f"`search.{name}` is ignored: {ladder}" for name in names if name in given]
    if search.plateau_trials is None:
        found += [
            f"`search.{name}` is ignored: search.plateau_trials is not set"
            for name in ("plateau_gain", "plateau_after")
            if name in given
        ]
    return found


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Range(_Section):
    @model_validator(mode="after")
    def _in_order(self) -> _Range:
        low, high = getattr(self, "low", 0.0), getattr(self, "high", 1.0)
        if low > high:
            raise RuleError(
                f"be at most `high` (={high}): the range from low to high would be empty",
                "low",
                value=low,
                fix="Swap the two or set both alike.",
            )
        return self


class Criterion(_Section):
    """A channel criterion and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parse(cls, data: object) -> Criterion:
        """Read `name` or `{name: {option: value}}`."""
        if isinstance(data, str) and data:
            return cls(name=data)
        if isinstance(data, dict) and len(data) == 1:
            name, options = next(iter(data.items()))
            if isinstance(options, dict):
                return cls(name=str(name), options=options)
        raise RuleError(
            "be a name, or one name with a mapping of its options",
            fix="Write for example `- taylor` or `- fgp: {feature_point: act}`.",
        )

    def to_yaml(self) -> str | dict[str, dict[str, Any]]:
        """Inverse of `parse`."""
        return {self.name: self.options} if self.options else self.name


class TaskChoice(_Section):
    """A task and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parse(cls, data: object) -> TaskChoice:
        """Read `name` or `{name: {option: value}}`."""
        if isinstance(data, dict) and len(data) == 1:
            name, options = next(iter(data.items()))
        else:
            name, options = data, {}
        named = isinstance(name, str) and re.fullmatch(r"[^:\s]+(:[^:\s]+)?", name)
        if isinstance(options, dict) and named:
            return cls(name=str(name), options=options)
        raise RuleError(
            "be a name or package.module:callable, or one of them with a mapping of its options",
            fix="Write for example `{segmentation: {class_weights: balanced}}`, or leave it out.",
        )

    def to_yaml(self) -> str | dict[str, dict[str, Any]]:
        """Inverse of `parse`."""
        return {self.name: self.options} if self.options else self.name


def _parsed_constraint(data: object) -> Constraint:
    return data if isinstance(data, Constraint) else Constraint.parse(data)


def _parsed_criterion(data: object) -> Criterion:
    return data if isinstance(data, Criterion) else Criterion.parse(data)


def _parsed_task(data: object) -> TaskChoice | None:
    return data if data is None or isinstance(data, TaskChoice) else TaskChoice.parse(data)


def _task_in_yaml(task: TaskChoice | None) -> str | dict[str, dict[str, Any]] | None:
    return None if task is None else task.to_yaml()


def _size_in_yaml(size: int | tuple[int, int] | None) -> int | list[int] | None:
    return list(size) if isinstance(size, tuple) else size


def _checked_size(size: object) -> int | tuple[int, int] | None:
    """A side, [height, width], or null."""
    if size is None:
        return None
    sides = list(size) if isinstance(size, (list, tuple)) else [size]
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
    if len(whole) != len(sides) or len(sides) > 2 or sides == []:
        raise RuleError("be a whole number or [height, width]: it is pixels a side")
    for side in whole:
        if not 8 <= side <= 2**14:
            bound = "at least 8" if side < 8 else f"at most {2**14}"
            raise RuleError(f"be {bound}: it is pixels a side")
    return (whole[0], whole[-1]) if isinstance(size, (list, tuple)) else whole[0]


_ConstraintText = Annotated[Constraint, BeforeValidator(_parsed_constraint), PlainSerializer(str)]
_CriterionItem = Annotated[
    Criterion, BeforeValidator(_parsed_criterion), PlainSerializer(Criterion.to_yaml)
]
_TaskItem = Annotated[
    TaskChoice | None, PlainValidator(_parsed_task), PlainSerializer(_task_in_yaml)
]
_ImageSize = Annotated[
    int | tuple[int, int] | None, PlainValidator(_checked_size), PlainSerializer(_size_in_yaml)
]


class ModelConfig(_Section):
    """The network to prune."""

    name: str = Field(
        pattern=r"^[^:\s]+(:[^:\s]+)?$",
        description="a zoo name, torchvision:NAME, timm:NAME or package.module:callable",
        examples=["resnet20"],
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="the constructor's arguments")
    checkpoint: str | None = Field(
        default=None, min_length=1, description="a .safetensors or .pt file"
    )
    licence: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="the licence of these weights, for the model card of an export",
    )


class DataConfig(_Section):
    """The images and how they are split."""

    name: str = Field(min_length=1, description="a data set's name", examples=["digits"])
    root: str | None = Field(default=None, min_length=1, description="the folder of the files")
    image_size: _ImageSize = Field(default=None, description="pixels a side")
    batch_size: int = Field(default=128, ge=2, le=2**20, description="images in a training batch")
    split: Annotated[tuple[float, float, float], Field(strict=False)] = Field(
        default=(0.7, 0.15, 0.15), description="the shares of train, val and test"
    )
    limit: int | None = Field(default=None, ge=1, description="the most train + val images to use")
    calibration_size: int = Field(
        default=512, ge=1, description="training images that score channels"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="the seed of the split and the calibration images"
    )
    memory_gib: float = Field(
        default=4.0, gt=0, description="the most that images take in memory; more is streamed"
    )
    workers: int = Field(
        default=2, ge=0, le=256, description="processes that decode images that are streamed"
    )
    augment: bool = Field(
        default=True, description="whether training images are shifted and flipped"
    )

    @field_validator("split", mode="before")
    @classmethod
    def _three_shares(cls, split: object) -> object:
        shares = list(split) if isinstance(split, (list, tuple)) else []
        numbers = [s for s in shares if isinstance(s, (int, float)) and not isinstance(s, bool)]
        positive = len(numbers) == len(shares) == 3 and min(numbers) > 0
        if not positive or abs(sum(numbers) - 1) > 1e-6:
            total = f" (their sum is {sum(numbers):.6g})" if positive else ""
            raise RuleError(f"be three positive numbers that sum to 1{total}")
        return split


class BaselineConfig(_Section):
    """How the dense model is trained when there is no checkpoint."""

    epochs: int = Field(default=30, ge=0, le=10**6, description="passes over the training images")
    lr: float = Field(default=0.1, gt=0, description="the peak learning rate")
    weight_decay: float = Field(default=5e-4, ge=0, description="the weight decay of SGD")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="the momentum of SGD")


class BlocksConfig(_Section):
    """Which blocks the search may remove."""

    mode: Literal["mask", "ranked", "none"] = Field(
        default="mask", description="how blocks are searched"
    )
    order: Literal[
        "greedy", "oneshot", "exhaustive", "sequential", "random", "sr_init", "attribution"
    ] = Field(default="greedy", description="how blocks are ranked")
    score: Literal["accuracy", "loss"] = Field(
        default="accuracy", description="what a removal must not cost"
    )
    score_recalibrate_bn: bool = Field(
        default=False,
        description="whether batch norms are re-estimated before a removal is scored",
    )
    score_finetune_epochs: float = Field(
        default=0.0, ge=0, description="fine-tuning of each candidate removal before it is scored"
    )
    score_finetune_lr: float = Field(
        default=1e-3, gt=0, description="the peak learning rate of such fine-tuning"
    )
    finetune_from: Literal["original", "cumulative"] = Field(
        default="original", description="the weights that such fine-tuning starts from"
    )
    valid: Literal["paper", "residual"] = Field(
        default="paper", description="which blocks are removable"
    )
    max_drop: float = Field(
        default=0.5, ge=0, le=1, description="the largest fraction of blocks removed"
    )

    @model_validator(mode="after")
    def _scored_orders(self) -> BlocksConfig:
        recovers = self.score_finetune_epochs > 0 or self.score_recalibrate_bn
        if recovers and self.order not in ("greedy", "oneshot", "exhaustive"):
            raise RuleError(
                "be greedy, oneshot or exhaustive where score_finetune_epochs or "
                "score_recalibrate_bn is set: no other order scores removals",
                "order",
                value=self.order,
                fix="Set order: greedy, or delete the two.",
            )
        if self.finetune_from == "cumulative" and (
            self.order != "greedy" or self.score_finetune_epochs == 0
        ):
            raise RuleError(
                "be original where nothing is fine-tuned removal after removal",
                "finetune_from",
                value=self.finetune_from,
                fix="Set order: greedy and score_finetune_epochs above 0, or delete it.",
            )
        return self


class KeepConfig(_Range):
    """The fractions of channels kept by the rules `ratio` and `global`."""

    per: Literal["model", "stage", "group"] = Field(
        default="stage", description="what shares one fraction"
    )
    low: float = Field(
        default=0.3, gt=0, le=1, description="the smallest fraction of channels kept"
    )
    high: float = Field(
        default=1.0, gt=0, le=1, description="the largest fraction of channels kept"
    )
    step: float | None = Field(
        default=None, ge=1e-4, lt=1, description="the step between two fractions; null for any"
    )
    round_to: int = Field(default=1, ge=1, description="kept channels are a multiple of it")
    scope: Literal["internal", "all"] = Field(
        default="all", description="whether channels on a residual path are pruned too"
    )


class TopKConfig(_Range):
    """The fractions of a group's total score kept by the rule `cumulative`."""

    low: float = Field(
        default=0.2, gt=0, le=1, description="the smallest fraction of the score kept"
    )
    high: float = Field(
        default=0.95, gt=0, le=1, description="the largest fraction of the score kept"
    )


class MacsConfig(_Range):
    """The fractions of the dense model's MACs kept by the rule `macs`."""

    low: float = Field(default=0.2, gt=0, le=1, description="the smallest fraction of MACs kept")
    high: float = Field(default=0.9, gt=0, le=1, description="the largest fraction of MACs kept")


class DsdLambdaConfig(_Range):
    """The strengths of sparse training (criterion `dsd`), taken from a grid of `num` values.

    A grid, so that trials ask for the same sparse training and share it.
    """

    low: float = Field(default=1e-5, gt=0, description="the smallest strength")
    high: float = Field(default=1e-2, gt=0, description="the largest strength")
    log: bool = Field(default=True, description="whether the grid is even in the logarithm")
    num: int = Field(default=7, ge=1, le=1000, description="the number of values in the grid")

    @model_validator(mode="after")
    def _enough_values(self) -> DsdLambdaConfig:
        if self.num == 1 and self.low < self.high:
            raise RuleError(
                f"be at least 2 where `low` (={self.low:g}) is below `high` (={self.high:g})",
                "num",
                value=self.num,
                fix="Raise it, or set both ends alike.",
            )
        return self


class DsdQConfig(_Range):
    """The fractions of channels that sparse training drives to zero and pruning then removes."""

    low: float = Field(default=0.3, gt=0, lt=1, description="the smallest fraction removed")
    high: float = Field(default=0.7, gt=0, lt=1, description="the largest fraction removed")
    step: float = Field(default=0.1, gt=0, lt=1, description="the step between two fractions")

    @model_validator(mode="after")
    def _in_thousandths(self) -> DsdQConfig:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if not math.isclose(value * 1000, round(value * 1000), abs_tol=1e-6):
                raise RuleError(
                    "be a multiple of 0.001: trials share the sparse training of equal fractions",
                    name,
                    value=value,
                    fix=f"Write {max(0.001, round(value, 3)):g}.",
                )
        return self


SelectionRule = Literal[
    "ratio",
    "cumulative",
    "global",
    "macs",
    "peak30",
    "peak50_rand30",
    "bot50_rand30",
    "rand30",
]


class SpaceConfig(_Section):
    """What is searched."""

    criteria: Annotated[tuple[_CriterionItem, ...], Field(strict=False)] = Field(
        default=(Criterion(name="magnitude_l1"), Criterion(name="taylor"), Criterion(name="fgp")),
        description="how channels are scored",
    )
    blocks: BlocksConfig = Field(default_factory=BlocksConfig)
    keep: KeepConfig = Field(default_factory=KeepConfig)
    select: Annotated[tuple[SelectionRule, ...], Field(strict=False)] = Field(
        default=("ratio", "cumulative"), description="how scores become kept channels"
    )
    top_k: TopKConfig = Field(default_factory=TopKConfig)
    macs_keep: MacsConfig = Field(default_factory=MacsConfig)
    dsd_lambda: DsdLambdaConfig = Field(default_factory=DsdLambdaConfig)
    dsd_q: DsdQConfig = Field(default_factory=DsdQConfig)
    dsd_epochs: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1)
    ] = Field(default=(6.0,), description="passes of sparse training over the training images")

    @property
    def criterion_names(self) -> tuple[str, ...]:
        """The criteria's names, in the order of the file."""
        return tuple(criterion.name for criterion in self.criteria)

    @model_validator(mode="after")
    def _something_to_search(self) -> SpaceConfig:
        _refuse_twice(self.criterion_names, "criteria")
        _refuse_twice(self.select, "select")
        _refuse_twice([f"{epochs:g}" for epochs in self.dsd_epochs], "dsd_epochs")
        if not self.select:
            raise RuleError("name at least one rule: ratio or cumulative", "select")
        if not self.criteria and self.blocks.mode == "none":
            raise RuleError(
                "name a criterion where `space.blocks.mode` is none: nothing would be searched",
                "criteria",
                fix="Write for example `criteria: [magnitude_l1]`.",
            )
        return self


class SparseTrainingConfig(_Section):
    """How the criterion `dsd` trains; its strength and length are dimensions of the space."""

    lr: float = Field(default=0.01, gt=0, description="the learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="the momentum of SGD")
    weight_decay: float = Field(default=1e-4, ge=0, description="the weight decay of SGD")


class ReconstructConfig(_Section):
    """Pruning block by block, each taught to answer noise as the dense one does (BlockWIPG)."""

    steps: int = Field(
        default=0, ge=0, le=1000, description="in how many steps widths are reached; 0 is off"
    )
    epochs: int = Field(default=10, ge=0, description="passes over the noise, a block and step")
    lr: float = Field(default=0.003, gt=0, description="Adam's learning rate")
    num_vectors: int = Field(
        default=256, ge=2, le=2**20, description="noise images, a block and step"
    )
    labels: bool = Field(
        default=False, description="whether each block is also trained on labelled images"
    )
    ratio_target: Literal["channels", "params", "macs"] = Field(
        default="channels", description="what each step removes an equal share of"
    )


class RecoverConfig(_Section):
    """How a pruned model gets its accuracy back."""

    recalibrate_bn: bool = Field(default=True, description="whether batch norms are re-estimated")
    recalibration_images: int = Field(
        default=512, ge=2, description="the training images that batch norms are re-estimated on"
    )
    epochs: float = Field(
        default=1.0, ge=0, description="passes over the training images, also fractions"
    )
    lr: float = Field(default=0.01, gt=0, description="the peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="the momentum of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="the weight decay of SGD")
    milestones: (
        Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] | None
    ) = Field(
        default=None,
        description="the fractions of the training at which the rate falls; null for a cosine",
    )
    gamma: float = Field(
        default=0.1, gt=0, le=1, description="what the rate is multiplied by at a milestone"
    )
    distill: float = Field(
        default=0.0, ge=0, le=1, description="the weight of the dense model's outputs"
    )
    autocast: bool = Field(default=False, description="whether fine-tuning computes in bfloat16")
    reconstruct: ReconstructConfig = Field(default_factory=ReconstructConfig)


class SamplerConfig(_Section):
    """How the search proceeds."""

    sampler: Literal["surrogate", "tpe", "nsga2", "gp", "random"] = Field(
        default="surrogate", description="what proposes candidates"
    )
    trials: int = Field(
        default=40, ge=1, le=10**6, description="the number of trials, seed candidates included"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="the seed of everything random")
    seeds: bool = Field(default=True, description="whether known good candidates are tried first")
    sensitivity: bool = Field(
        default=True, description="whether single edits are measured first, for better seeds"
    )
    early_stop: bool | Literal["auto"] = Field(
        default="auto",
        description="whether only promising trials are fine-tuned to the end; auto: if it pays",
    )
    reduction_factor: int = Field(
        default=3, ge=2, description="of so many trials about one goes on to the next fidelity"
    )
    short_share: float = Field(
        default=0.25, gt=0, lt=1, description="the share of recover.epochs at fidelity 1"
    )
    time_limit_s: float | None = Field(
        default=None, gt=0, description="seconds until no trial starts"
    )
    plateau_trials: int | None = Field(
        default=None,
        ge=1,
        description="no trial starts once the front stood still while so many trials ended",
    )
    plateau_gain: float = Field(
        default=0.001,
        ge=0,
        description="the growth of the front's hypervolume, a fraction, that counts as none",
    )
    plateau_after: int = Field(
        default=0, ge=0, description="ended trials before those in which the front may stand still"
    )
    ask_timeout_s: float | None = Field(
        default=1.0,
        gt=0,
        description="seconds until a random candidate steps in for a slow sampler, where more "
        "than one trial runs at a time; null waits",
    )


class _Share(_Section):
    """CPU cores and GPUs that something takes of a node."""

    cpu: float = Field(default=1.0, gt=0, description="CPU cores a trial")
    gpu: float = Field(default=0.0, ge=0, description="GPUs a trial, also fractions")

    @field_validator("gpu")
    @classmethod
    def _whole_or_shared(cls, gpu: float) -> float:
        if gpu > 1 and gpu != int(gpu):
            raise RuleError(
                "be a whole number or below 1: Ray gives whole GPUs or a share of one",
                fix=f"Write {int(gpu)} or {int(gpu) + 1}.",
            )
        return gpu


class EvaluateConfig(_Share):
    """What a trial gets at fidelity 0, where nothing is trained."""


class ResourcesConfig(_Share):
    """What one trial gets from Ray."""

    evaluate: EvaluateConfig | None = Field(
        default=None,
        description="what a trial takes at fidelity 0 instead, where it trains nothing: "
        "{cpu: 1} leaves the GPUs to trials that train; null is the same as those",
    )
    max_concurrent: int | None = Field(default=None, ge=1, description="the most trials at a time")
    trial_timeout_s: float | None = Field(
        default=None, gt=0, description="seconds until a trial fails"
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="new attempts where a worker was killed or its node was lost",
    )
    wait_for_nodes_s: float = Field(
        default=0.0,
        ge=0,
        description="seconds to wait for nodes that a trial or a probe needs, at the start",
    )

    @model_validator(mode="after")
    def _less_to_evaluate(self) -> ResourcesConfig:
        if self.evaluate is not None and self.evaluate.gpu > self.gpu:
            raise RuleError(
                f"be at most `resources.gpu` (={self.gpu:g}): evaluating takes no more than "
                "training",
                "evaluate",
                "gpu",
                value=self.evaluate.gpu,
                fix="Lower it, or raise resources.gpu.",
            )
        return self

    def share(self, only_evaluates: bool) -> EvaluateConfig | ResourcesConfig:
        """What a trial takes; `search.context.only_evaluates` tells which kind it is."""
        return (self.evaluate if only_evaluates else None) or self


class LatencyConfig(_Section):
    """How latency is measured."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda)$", description="cpu or cuda")
    batch_size: int = Field(default=1, ge=1, le=2**16, description="images a forward pass")
    threads: int = Field(default=1, ge=1, description="CPU threads of the measured model")
    runs: int = Field(
        default=200, ge=10, le=10**6, description="timed pairs of pruned and dense runs"
    )


class ProbeConfig(LatencyConfig):
    """A further probe; its metrics are called `latency_ms@NAME` and `speedup@NAME`."""

    resource: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$",
        description="Ray's custom resource of the node that it measures on; latency_probe_NAME",
        examples=["latency_probe_edge"],
    )

    @field_validator("resource")
    @classmethod
    def _custom(cls, resource: str | None) -> str | None:
        if resource in ("CPU", "GPU", "memory", "object_store_memory"):
            raise RuleError(
                "be a custom resource: Ray gives this one to nodes by itself",
                fix="Name one of `ray start --resources`, or delete it.",
            )
        return resource

    @property
    def settings(self) -> LatencyConfig:
        """How it measures, wherever that is."""
        return LatencyConfig(**self.model_dump(exclude={"resource"}))


class CacheConfig(_Section):
    """What runs on this machine share: scores, rankings, sparse trainings, latencies, trials."""

    reuse: Literal["all", "dense", "none"] = Field(
        default="all",
        description="what is shared with other runs: all, only the dense model, or none",
    )
    max_gib: float = Field(
        default=20.0, gt=0, description="the most that is kept, the least recently used goes first"
    )


class AblateConfig(_Section):
    """What `prune-search ablate` holds fixed; a search does not read it."""

    seeds: int = Field(
        default=3, ge=1, le=1000, description="how many seeds; each trains its dense model"
    )
    k: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False, min_length=1)
    ] = Field(
        default=(0.35, 0.4), description="FGP's k: the shares of a group's score that are kept"
    )
    dsd_lambda: float = Field(default=5e-3, gt=0, description="the strength of sparse training")
    dsd_q: float = Field(
        default=0.5, gt=0, lt=1, description="the fraction of channels that DSD removes"
    )
    dsd_epochs: float = Field(default=9.0, gt=0, description="passes of sparse training")


class SearchConfig(_Section):
    """Everything a search needs. Only `model` and `data` have no default."""

    name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="the name of the run's folder: letters, digits, dot, dash and underscore",
        examples=["digits-resnet20"],
    )
    model: ModelConfig
    task: _TaskItem = Field(
        default=None,
        description="a task's name or package.module:callable; null for what the data are for",
    )
    data: DataConfig
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    space: SpaceConfig = Field(default_factory=SpaceConfig)
    sparse_training: SparseTrainingConfig = Field(default_factory=SparseTrainingConfig)
    recover: RecoverConfig = Field(default_factory=RecoverConfig)
    objectives: dict[str, Literal["maximize", "minimize"]] = Field(
        default={"accuracy": "maximize", "latency_ms": "minimize"},
        description="metric: direction, 1 to 4 of them",
    )
    constraints: Annotated[tuple[_ConstraintText, ...], Field(strict=False)] = Field(
        default=(), description="bounds such as accuracy_drop <= 0.05"
    )
    search: SamplerConfig = Field(default_factory=SamplerConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    latency: LatencyConfig = Field(default_factory=LatencyConfig)
    probes: dict[str, ProbeConfig] = Field(
        default_factory=dict,
        description="further probes by name, each on its node",
        examples=["{edge: {threads: 4}}"],
    )
    cache: CacheConfig = Field(default_factory=CacheConfig)
    trackers: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Field(strict=False)
    ] = Field(default=(), description="who hears of each trial, beside the ledger")
    ablate: AblateConfig = Field(default_factory=AblateConfig)

    @property
    def user_code(self) -> tuple[str, ...]:
        """The names `module:callable` in it: what it has imported and called."""
        task = "" if self.task is None else self.task.name
        return tuple(filter(names_code, (self.model.name, self.data.name, task)))

    @property
    def all_probes(self) -> dict[str, LatencyConfig]:
        """How each probe measures; the one of `latency` is called `DEFAULT_PROBE`."""
        named = {name: probe.settings for name, probe in self.probes.items()}
        return {DEFAULT_PROBE: self.latency, **named}

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("name") is not None:
            return data
        words = []
        for section in (data.get("data"), data.get("model")):
            word = section.get("name") if isinstance(section, Mapping) else None
            words.append(str(word or getattr(section, "name", "run")))
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-._")
        return {**data, "name": safe[:100] or "run"}

    @model_validator(mode="after")
    def _reconstructed_widths(self) -> SearchConfig:
        drawn = [rule for rule in self.space.select if "rand" in rule]
        if self.recover.reconstruct.steps > 0 and drawn:
            raise RuleError(
                f"not name {drawn[0]} where `recover.reconstruct.steps` is above 0: it chooses "
                "the channels anew, by their scores",
                "space",
                "select",
                value=drawn[0],
                fix="Delete the rule, or set recover.reconstruct.steps: 0.",
            )
        return self

    @model_validator(mode="after")
    def _known_probes(self) -> SearchConfig:
        check_probes(self.objectives, self.constraints, self.probes)
        return self

    @field_validator("probes", mode="before")
    @classmethod
    def _well_named(cls, probes: object) -> object:
        for name in probes if isinstance(probes, Mapping) else ():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", str(name)):
                raise RuleError(
                    "have a name of 1 to 31 lower-case letters, digits and underscores, a letter "
                    "first: metrics are named after it",
                    str(name),
                    fix="Rename it, for example to `edge`.",
                )
        return probes

    @field_validator("objectives", mode="before")
    @classmethod
    def _sensible_objectives(cls, objectives: object) -> object:
        return check_objectives(objectives)

    @field_validator("constraints", mode="after")
    @classmethod
    def _satisfiable(cls, constraints: tuple[Constraint, ...]) -> tuple[Constraint, ...]:
        return check_constraints(constraints)


def _refuse_twice(names: Sequence[str], field: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RuleError(
                f"name {name} once: it stands twice", field, index, fix="Delete one of the two."
            )


def _build(source: Source) -> SearchConfig:
    try:
        return SearchConfig.model_validate(source.data)
    except ValidationError as error:
        message = explain(error, SearchConfig, source)
    raise ConfigError(message)


def _unknown(source: Source, loc: Loc, name: str, known: Collection[str]) -> list[str]:
    if name in known:
        return []
    others = " (or torchvision:NAME, timm:NAME, module:callable)" if loc[0] == "model" else ""
    hint = nearest(name, known) or "Choose one of these."
    return [
        f"{source.where(loc)}: `{dotted(loc)}` (={name}) must be one of"
        f" {', '.join(sorted(known))}{others}. {hint}".rstrip()
    ]
