"""The ledger of a run: one Parquet part a finished trial, fixed schema, every write atomic."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import stat
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from .records import FULL_FIDELITY, TrialResult, TrialStatus
from .yaml_source import ConfigError

if TYPE_CHECKING:
    import pandas as pd

FRONT = "front.parquet"  # in the run folder
BLOCKS = "blocks.json"  # there too: the removable blocks, ranked
FIXED = "fixed.json"  # what trials mean, and the space
RUNGS = "rungs"  # the folder in the run folder, of trials that wait at a fidelity
SCHEMA_VERSION = 4  # 2: accuracy_by_fidelity; 3: latency_ms_by_probe, speedup_by_probe; 4: metrics
_ATTEMPTS = 20  # to list and read the parts while another process compacts them
_SAFE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"  # a name that cannot lead out of its folder
_DAMAGED = (  # what reading a file that is none of ours, or cut short, or changed, may raise
    *(pa.ArrowException, OSError, ValueError, TypeError, KeyError),
    *(AttributeError, ArithmeticError, RecursionError),
)
_VERSION_KEY = b"prune_search.schema_version"
_TIME = pa.timestamp("us", tz="UTC")
_BY_NAME = pa.map_(pa.string(), pa.float64())
_METRICS = [
    "accuracy",
    "accuracy_before_finetune",
    "accuracy_drop",
]
_LATENCIES = [
    "latency_ms",
    "latency_ms_p10",
    "latency_ms_p90",
    "speedup",
]
_BY_PROBE = ["latency_ms_by_probe", "speedup_by_probe"]
_MAPS = ["metrics", *_BY_PROBE]
_TIMES = ["score_s", "prune_s", "finetune_s", "measure_s", "wait_s"]

T = TypeVar("T")

SCHEMA = pa.schema(
    [
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("on_front", pa.bool_(), nullable=False),
        pa.field("criterion", pa.string()),
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("dropped_blocks", pa.list_(pa.string()), nullable=False),
        pa.field("widths", pa.map_(pa.string(), pa.int32()), nullable=False),
        *(pa.field(name, pa.float64()) for name in _METRICS),
        pa.field("accuracy_by_fidelity", pa.list_(pa.float64()), nullable=False),
        pa.field("loss", pa.float64()),
        pa.field("metrics", _BY_NAME, nullable=False),
        *(pa.field(name, pa.float64()) for name in _LATENCIES),
        *(pa.field(name, _BY_NAME, nullable=False) for name in _BY_PROBE),
        pa.field("macs", pa.int64()),
        pa.field("num_params", pa.int64()),
        pa.field("peak_memory_mib", pa.float64()),
        pa.field("fidelity", pa.int32(), nullable=False),
        pa.field("epochs", pa.float64(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in _TIMES),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("host", pa.string(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("started_at", _TIME),
        pa.field("finished_at", _TIME),
        pa.field("recipe", pa.string()),
        pa.field("weights", pa.string()),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""The columns of `TrialResult`, in its order; results/README.md describes them."""


class LedgerError(RuntimeError):
    """The run folder cannot be written; `resume` goes on when it can."""


class Store:
    """The results of one run folder. One process writes; any number may read meanwhile."""

    def __init__(self, run_dir: str | Path) -> None:
        """Open `run_dir`; nothing is created before the first write."""
        self.run_dir = Path(run_dir)
        self.trials_dir = self.run_dir / "trials"

    def write_trial(self, result: TrialResult) -> Path:
        """Store one trial durably; a later write of the same trial replaces it.

        Metrics that are not finite are stored as null.

        Raises:
            ValueError: If `trial_id` is not a safe file name.
        """
        if not re.fullmatch(_SAFE, result.trial_id):
            raise ValueError(
                f"`trial_id` (={result.trial_id!r}) must be letters, digits, dot, dash and"
                " underscore: it names a file. Choose another."
            )
        path = self.trials_dir / f"{result.trial_id}.parquet"
        atomic_write_bytes(path, _encode([result]))
        return path

    def read(self) -> list[TrialResult]:
        """All trials, each once, sorted by `trial_id`.

        Of two rows of one trial a completed one wins, then the one of higher fidelity, then one
        that does not wait, then the one that finished later, then the one written later. A part
        that cannot be read is renamed to `_corrupt-...` and reported with a warning.
        """
        return _merge(self._load())

    def table(self) -> pa.Table:
        """What `read` returns, as an Arrow table with `SCHEMA`."""
        return to_table(self.read())

    def frame(self) -> pd.DataFrame:
        """What `read` returns, as pandas; counts are nullable integers, maps are dicts."""
        import pandas as pd

        counts = {pa.int64(): pd.Int64Dtype()}
        table = self.table()
        frame: pd.DataFrame = table.to_pandas(types_mapper=counts.get, maps_as_pydicts="strict")
        return frame

    def compact(
        self, on_front: Collection[str] | None = None, *, new_only: bool = False
    ) -> Path | None:
        """Join all parts into one file; None if there is none.

        A crash at any point loses nothing: the parts go after the new file is on disk, and
        `read` takes each trial once.

        Args:
            on_front: Trials of the front, to set the column; by default it stays as it is.
            new_only: Leave earlier compactions alone, so that the cost does not grow.
        """
        parts = self._load(new_only)
        rows = _merge(parts)
        if not rows:
            return None
        if on_front is not None:
            rows = [dataclasses.replace(row, on_front=row.trial_id in on_front) for row in rows]
        numbers = [_number(path) for path in self.trials_dir.glob("compact-*.parquet")]
        path = self.trials_dir / f"compact-{max(numbers, default=0) + 1}.parquet"
        atomic_write_bytes(path, _encode(rows))
        for old in parts:
            old.unlink(missing_ok=True)
        return path

    def write_front(self, results: Iterable[TrialResult]) -> Path:
        """Write `front.parquet`: the same columns, `on_front` set."""
        rows = [dataclasses.replace(result, on_front=True) for result in results]
        path = self.run_dir / FRONT
        atomic_write_bytes(path, _encode(rows))
        return path

    def _load(self, new_only: bool = False) -> dict[Path, list[TrialResult]]:
        """Rows by file, in the order of writing; again if a compaction removes one meanwhile."""
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return self._load_once(new_only)
        return self._load_once(new_only)

    def _load_once(self, new_only: bool) -> dict[Path, list[TrialResult]]:
        paths = [path for path in self.trials_dir.glob("*.parquet") if path.name[0] not in "_."]
        paths = [path for path in paths if not (new_only and _number(path))]
        parts = {}
        for path in sorted(paths, key=lambda path: (path.lstat().st_mtime_ns, _number(path))):
            try:
                if not _is_file(path):
                    raise ValueError("it is no file")  # a pipe would be waited for
                parts[path] = _sound_rows(path)
            except _DAMAGED as error:
                if isinstance(error, (_NewerSchemaError, FileNotFoundError)):
                    raise
                if isinstance(error, OSError) and error.errno:  # a sound file, as far as we know
                    raise ConfigError(
                        f"`{path}` must be readable: {error.strerror}. Correct its permissions."
                    ) from error
                _set_aside(path, error)
        return parts


def read_results(path: str | Path) -> list[TrialResult]:
    """The rows of one Parquet file of a run, such as `front.parquet`, in its order."""
    return _decode(Path(path))


def to_table(results: Sequence[TrialResult]) -> pa.Table:
    """`results` as an Arrow table with `SCHEMA`."""
    return pa.Table.from_pylist([_to_row(result) for result in results], schema=SCHEMA)


def replaces(row: TrialResult, other: TrialResult) -> bool:
    """Whether `row` is kept, and not `other`: a row of the same trial that was written before."""
    return _newness(row) >= _newness(other)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, even after a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"_{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sweep_unfinished(folder: str | Path) -> None:
    """Deletes what writers left that were killed; nobody else may be writing in `folder`."""
    for path in Path(folder).rglob("_*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically."""
    atomic_write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: If it cannot be read or is not JSON, naming the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_refuse_constant)
    except OSError as error:
        raise ConfigError(
            f"`{path}` must be readable: {error.strerror}. Correct it or restore it from a copy."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"`{path}` must be JSON: {error}. Delete it or restore it from a copy."
        ) from None


def read_as(path: str | Path, kind: type[T]) -> T:
    """Read a JSON file as a `kind`: a dataclass, or a type such as `dict[str, float]`.

    Raises:
        ConfigError: If the file holds anything else, naming the place.
    """
    data = read_json(path)
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(
            f"`{path}` must hold what prune-search wrote: {place}: {first['msg']}. Delete it or "
            "restore it from a copy."
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class _NewerSchemaError(ConfigError):
    """A sound file of a later version of this project."""


def _encode(results: Sequence[TrialResult]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(results), sink, compression="zstd", write_page_checksum=True)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _decode(path: Path) -> list[TrialResult]:
    return [_from_row(row) for row in _plain_rows(path)]


def _sound_rows(path: Path) -> list[TrialResult]:
    """The rows of one file that can be read; a copy of the file keeps the others."""
    rows, broken = [], []
    for row in _plain_rows(path):
        try:
            rows.append(_from_row(row))
        except _DAMAGED as error:
            broken.append(error)
    if broken and not rows:
        raise broken[0]
    if broken:
        aside = path.with_name(f"_corrupt-{path.stem}.rows")
        with contextlib.suppress(OSError):  # a folder that we may only read
            if not aside.exists():
                shutil.copyfile(path, aside)
        warnings.warn(
            f"{len(broken)} of {len(rows) + len(broken)} rows of {path} cannot be read and are "
            f"left out: {_first_line(broken[0])}. They stay in {aside.name}.",
            stacklevel=6,
        )
    return rows


def _plain_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one file; columns that it does not have are left out."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    with contextlib.closing(file):
        version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY, b"1")
        if int(version) > SCHEMA_VERSION:
            raise _NewerSchemaError(
                f"`schema_version` (={version.decode()}) of {path} must be at most"
                f" {SCHEMA_VERSION}: a newer prune-search wrote it. Upgrade prune-search."
            )
        known = [name for name in file.schema_arrow.names if name in SCHEMA.names]
        table = file.read(columns=known)
    wanted = pa.schema([SCHEMA.field(name) for name in table.column_names])
    if table.schema.types != wanted.types:
        table = table.cast(wanted)
    for place, field in enumerate(table.schema):
        if field.type == _TIME:  # pyarrow would import pandas to make a datetime of it
            table = table.set_column(place, field.name, table[place].cast(pa.int64()))
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    return rows


def _to_row(result: TrialResult) -> dict[str, Any]:
    row = {name: getattr(result, name) for name in SCHEMA.names}
    row["status"] = str(result.status)
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row[name] = None if SCHEMA.field(name).nullable else 0.0
    for name in _MAPS:
        row[name] = {k: v for k, v in row[name].items() if v is not None and math.isfinite(v)}
    for name in ("started_at", "finished_at"):
        if row[name] is not None:
            row[name] = datetime.fromtimestamp(row[name], UTC)
    return row


def _from_row(row: dict[str, Any]) -> TrialResult:
    values = {name: value for name, value in row.items() if _is_known(value)}
    values["status"] = TrialStatus(values["status"])
    for name in ("started_at", "finished_at"):
        if name in values:
            values[name] /= 1e6
    result = TrialResult(**values)
    _check(result)
    return result


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _check(row: TrialResult) -> None:
    """Refuses a row that names files outside its run folder, or that no writer wrote."""
    if not re.fullmatch(_SAFE, row.trial_id):
        raise ValueError(f"trial_id {row.trial_id!r} is no name of a file")
    for folder, path in (("recipes", row.recipe), ("weights", row.weights)):
        if path is not None and not re.fullmatch(f"{folder}/{_SAFE}", path):
            raise ValueError(f"{path!r} is no file in {folder}/")
    if not isinstance(json.loads(row.candidate), dict):
        raise ValueError("the candidate is no JSON object")
    for moment in (row.started_at, row.finished_at):
        if moment is not None:
            datetime.fromtimestamp(moment, UTC)  # fails where it is none
    reached = max(row.fidelity, len(row.accuracy_by_fidelity) - 1)
    if row.fidelity < 0 or reached > FULL_FIDELITY:
        raise ValueError(f"there is no fidelity {reached}")


def _merge(parts: Mapping[Path, list[TrialResult]]) -> list[TrialResult]:
    rows: dict[str, TrialResult] = {}
    for row in chain.from_iterable(parts.values()):
        if row.trial_id not in rows or replaces(row, rows[row.trial_id]):
            rows[row.trial_id] = row
    return [rows[trial_id] for trial_id in sorted(rows)]


def _newness(row: TrialResult) -> tuple[bool, int, bool, float]:
    """Of two rows of one trial the greater is kept: a completed one is never lost.

    One that waits comes before one that has ended, whatever the clocks of two machines say.
    """
    ended = row.status is not TrialStatus.EARLY_STOPPED
    return row.status is TrialStatus.COMPLETED, row.fidelity, ended, row.finished_at or 0.0


def _number(path: Path) -> int:
    match = re.fullmatch(r"compact-(\d+)\.parquet", path.name)
    return int(match[1]) if match else 0


def _is_file(path: Path) -> bool:
    """As `Path.is_file`, but one that a compaction has just removed is a FileNotFoundError."""
    mode = path.lstat().st_mode
    return path.is_file() if stat.S_ISLNK(mode) else stat.S_ISREG(mode)


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(f"_corrupt-{path.stem}.{os.urandom(4).hex()}")
    try:
        os.replace(path, aside)
        fate = f"It is set aside as {aside.name}."
    except OSError as reason:
        fate = f"It could not be set aside ({reason.strerror})."
    warnings.warn(
        f"{path} is not readable Parquet and is left out: {_first_line(error)}. {fate}",
        stacklevel=5,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
