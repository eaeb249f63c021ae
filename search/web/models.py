"""What the REST API takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

RunName = Annotated[
    str,
    Path(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="The run's folder.",
        examples=["digits-resnet20"],
    ),
]
TrialId = Annotated[
    str,
    Path(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$",
        description="The trial's name.",
        examples=["t00012"],
    ),
]
State = Literal["starting", "running", "finished", "interrupted", "failed", "unreadable"]
Status = Literal["completed", "failed", "infeasible", "early_stopped", "duplicate"]
Control = Literal["random", "uniform"]


class Model(BaseModel):
    """Base of all: unknown keys of a request are refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(Model):
    """Why a request was refused (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(
        description="what is wrong and how to mend it",
        examples=["`run` (=digits) must be a run of this folder: there is none of that name."],
    )


class Health(Model):
    """That the service is there."""

    status: Literal["ok"] = "ok"
    version: str = Field(examples=["0.1.0"])
    asks_token: bool = Field(description="whether it has a token")
    runs_code: bool = Field(description="whether a config may name module:callable")
    job_server: str | None = Field(description="the Ray cluster that searches are sent to")


class Failure(Model):
    """One cause of failed trials."""

    message: str
    count: int
    trial_id: str = Field(description="one of them")


class VolumeStep(Model):
    """The front's hypervolume from one trial on."""

    trials: int = Field(description="how many trials had ended")
    seconds: float = Field(description="since the first trial began")
    hypervolume: float


class RunSummary(Model):
    """How far a run is."""

    name: str = Field(examples=["digits-resnet20"])
    state: State
    message: str = Field(default="", description="why it failed or cannot be read")
    model: str = ""
    data: str = ""
    trials: int = Field(default=0, description="how many were asked for")
    finished: int = Field(default=0, description="how many are in the ledger")
    by_status: dict[str, int] = Field(default_factory=dict)
    front: list[str] = Field(default_factory=list, description="the members in the objectives")
    hypervolume: float | None = None
    objectives: dict[str, str] = Field(default_factory=dict)
    started_at: float | None = Field(default=None, description="seconds since 1970, UTC")
    updated_at: float | None = Field(default=None, description="of the last trial that ended")
    seconds_left: float | None = Field(default=None, description="about, while it runs")
    driver: str = Field(default="", description="the process that drives it")


class RunList(Model):
    """The runs of the results folder."""

    folder: str
    runs: list[RunSummary]


class RunDetail(RunSummary):
    """A run with its config, dense model and history."""

    metrics: list[str] = Field(default_factory=list, description="those that trials have")
    directions: dict[str, str] = Field(default_factory=dict)
    baseline: dict[str, float] = Field(
        default_factory=dict, description="the dense model's value of each metric"
    )
    failures: list[Failure] = Field(default_factory=list)
    volumes: list[VolumeStep] = Field(default_factory=list)
    times: dict[str, float] = Field(default_factory=dict, description="seconds by part")
    environment: dict[str, Any] = Field(default_factory=dict)
    config: str = Field(default="", description="the resolved config, YAML")


class TrialRow(Model):
    """A trial in a table."""

    trial_id: str
    status: Status
    criterion: str | None
    control: Control | None = Field(description="whether it is a control, and which")
    fidelity: int
    blocks_dropped: int
    finished_s: float | None = Field(description="seconds since the first trial began")
    message: str
    metrics: dict[str, float]


class TrialPage(Model):
    """Some of a run's trials."""

    total: int = Field(description="how many there are")
    offset: int
    trials: list[TrialRow]


class TrialDetail(TrialRow):
    """All that is known of a trial."""

    candidate: dict[str, Any]
    dropped_blocks: list[str]
    widths: dict[str, int]
    dense_widths: dict[str, int] = Field(
        description="the most channels that any trial of the run kept in a layer"
    )
    accuracy_by_fidelity: list[float | None]
    columns: dict[str, Any] = Field(description="the other columns of the ledger")
    exportable: bool = Field(description="whether its weights are kept")


class Front(Model):
    """The non-dominated trials in two metrics, the best in `x` first."""

    x: str
    y: str
    hypervolume: float | None
    baseline: dict[str, float]
    members: list[TrialRow]


class ComparedRun(Front):
    """One run of a comparison."""

    name: str
    finished: int
    covers: float | None = Field(
        description="the share of the other front that this front dominates or equals"
    )


class Comparison(Model):
    """Two fronts in the same two metrics, with one reference point."""

    x: str
    y: str
    metrics: list[str] = Field(description="those that both runs have")
    runs: list[ComparedRun]


class CheckRequest(Model):
    """A config to be checked."""

    config: str = Field(
        min_length=1,
        max_length=200_000,
        description="YAML",
        examples=["model: {name: resnet20}\ndata: {name: digits}\n"],
    )
    set: list[Annotated[str, Field(max_length=500)]] = Field(
        default_factory=list,
        max_length=100,
        description="`key.sub=value` assignments on top",
        examples=[["search.trials=20"]],
    )


class Check(Model):
    """A config that may be started, and what `prune-search check` says of it."""

    check_id: str = Field(description="what starts it")
    name: str = Field(description="the run's name")
    trials: int
    report: dict[str, Any] = Field(description="as `prune-search check --json`")
    config: str = Field(description="the resolved config, YAML")


class StartRequest(Model):
    """Which checked config to start."""

    check_id: str = Field(min_length=1, max_length=64, description="from a check")


class ExtendRequest(Model):
    """How many trials to add."""

    trials: int = Field(ge=1, le=100_000, examples=[20])


class ExportRequest(Model):
    """In which format."""

    format: Literal["safetensors", "pt2", "onnx"] = "safetensors"


class Export(Model):
    """A member that was written, proven and tested."""

    export_id: str
    run: str
    trial_id: str
    summary: dict[str, Any] = Field(description="as `prune-search export --json`")
    files: dict[str, int] = Field(description="size of each file in bytes")
    url: str = Field(description="where to download it as one zip archive")


class Login(Model):
    """The token, for a browser's cookie."""

    token: str = Field(min_length=1, max_length=500)


class Done(Model):
    """What was done."""

    detail: str


class Log(Model):
    """What a search that was started here has said so far."""

    text: str
