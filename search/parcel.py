"""What a submission sends: the config, the user's own model code and a small checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import SearchConfig
from .yaml_source import ConfigError

CONFIG = "config.yaml"
MAX_CHECKPOINT_MIB = 100
NUM_CLASSES = 10  # of the model that is built to see whether it can be; the data says later


@dataclass(frozen=True)
class Parcel:
    """The files that a run needs on a cluster, and nothing else of this machine.

    Attributes:
        files: Path in the job's folder -> local file.
        overrides: `key.sub=value` assignments to apply there.
        notes: What the user should know, a sentence each.
    """

    files: Mapping[str, Path]
    overrides: tuple[str, ...]
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Copies the files into `folder`."""
        for name, source in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def pack(path: Path, config: SearchConfig, overrides: Sequence[str]) -> Parcel:
    """Checks what of a config can be checked away from its data, and collects its files.

    The model is built once, which runs the user's code.

    Args:
        path: The config's file.
        config: What it says, with `overrides`.
        overrides: `key.sub=value` assignments.

    Raises:
        ConfigError: If the model cannot be built or a path means nothing on a cluster.
    """
    files: dict[str, Path] = {CONFIG: path}
    notes: list[str] = []
    _check_data_root(config)
    checkpoint, note = _checkpoint(config)
    _check_code(config)
    sent = list(overrides)
    if note:
        notes.append(note)
    if checkpoint is not None:
        name = f"checkpoint{checkpoint.suffix}"
        files[name] = checkpoint
        sent.append(f"model.checkpoint={json.dumps(name)}")
    modules = _user_modules(config)
    code = own_modules() if modules else {}
    files |= code
    for module in modules:
        if not {f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")} & set(code):
            notes.append(
                f"module {module} is not in this folder and not sent: it must be installed on the "
                "cluster"
            )
    return Parcel(files, tuple(sent), tuple(notes))


def own_modules() -> dict[str, Path]:
    """The imported modules that lie in the current folder: path that imports them -> file.

    Installed packages are left out, also those of an environment in the current folder.
    """
    here, environment = Path.cwd().resolve(), Path(sys.prefix).resolve()
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if not file or name.partition(".")[0] in ("__main__", "prunesearch"):
            continue
        path = Path(file).resolve()
        if path.suffix != ".py" or not path.is_relative_to(here):
            continue
        if path.is_relative_to(environment) or "site-packages" in path.parts:
            continue
        end = "/__init__.py" if path.name == "__init__.py" else ".py"
        found[name.replace(".", "/") + end] = path
    return found


def _user_modules(config: SearchConfig) -> list[str]:
    """The modules that the config names as `module:callable`."""
    return [name.partition(":")[0] for name in config.user_code]


def _check_data_root(config: SearchConfig) -> None:
    root = config.data.root
    if root is not None and not root.startswith(("/", "~/")):
        raise ConfigError(
            f"`data.root` (={root}) must be absolute or begin with ~/: the data is read on the "
            "cluster's head. Name the folder there."
        )


def _check_code(config: SearchConfig) -> None:
    from ..methods.data import find_dataset
    from ..methods.models.build import build_model
    from ..methods.tasks import find_task

    try:
        find_dataset(config.data.name)
        build_model(config.model.name, num_classes=NUM_CLASSES, kwargs=config.model.kwargs)
        if config.task is not None:
            find_task(config.task.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _checkpoint(config: SearchConfig) -> tuple[Path | None, str | None]:
    """The checkpoint to send, if one is to be sent, and what to say about it."""
    given = config.model.checkpoint
    if given is None:
        return None, None
    path = Path(given).expanduser()
    if not path.is_file():
        if path.is_absolute():
            return None, f"checkpoint {given} is not on this machine: it is read on the cluster"
        raise ConfigError(
            f"`model.checkpoint` (={given}) must be a file here or an absolute path on the "
            "cluster: there is no such file. Correct the path."
        )
    size_mib = path.stat().st_size / 2**20
    if size_mib <= MAX_CHECKPOINT_MIB:
        return path, None
    if path.is_absolute():
        return None, (
            f"checkpoint {given} is not sent ({size_mib:.0f} MiB, at most {MAX_CHECKPOINT_MIB}): "
            "it is read at that path on the cluster"
        )
    raise ConfigError(
        f"`model.checkpoint` (={given}) must be at most {MAX_CHECKPOINT_MIB} MiB to be sent: it "
        f"has {size_mib:.0f}. Copy it to the cluster and give its absolute path there."
    )
