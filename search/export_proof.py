"""Proves exports: a fresh process loads each form, compares its outputs and times it.

The fresh process has nothing but the files: what it cannot load, a user cannot load either. One
process proves any number of exports.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..methods.exported import load_pruned
from ..methods.measure import BURST, burst, timing, warm_up
from .portable import FILES, OPSET, ExportError

# Of the largest output. The same kernels round alike; another engine sums in another order.
TOLERANCES = {"safetensors": 1e-5, "pt2": 1e-5, "onnx": 1e-4}

Loaded = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Proof:
    """What a fresh process found of one form.

    Attributes:
        file: Its name in the export.
        num_bytes: Of the file.
        sha256: Of the file.
        runtime: What ran it, with its version.
        difference: Largest absolute difference to the trial's model, over all images.
        largest_output: Largest absolute output of the trial's model.
        allowed: Largest difference that is accepted.
        latency_ms: Median latency of the form; None of safetensors, which is the eager model.
        eager_ms: That of the eager model in the same process, a few runs of each in turns.
        speedup: Median of the paired ratios eager / form.
        opset: ONNX operator set; None of other forms.
    """

    file: str
    num_bytes: int
    sha256: str
    runtime: str
    difference: float
    largest_output: float
    allowed: float
    latency_ms: float | None = None
    eager_ms: float | None = None
    speedup: float | None = None
    opset: int | None = None


@dataclass(frozen=True)
class Unproven:
    """An export that is written and not proven.

    Attributes:
        folder: Its files, safetensors and recipe among them.
        formats: The forms to prove.
        model: What it was made of, in eval mode, on the CPU.
        images: Real ones, [B, C, H, W], at least two.
    """

    folder: Path
    formats: tuple[str, ...]
    model: nn.Module
    images: Tensor


@dataclass(frozen=True)
class Timing:
    """How the fresh process times: images in a batch, torch or runtime threads, timed runs."""

    batch_size: int = 1
    threads: int = 1
    runs: int = 200


Outcome = Proof | str  # or why there is none


def prove(exports: Sequence[Unproven], how: Timing) -> list[dict[str, Outcome]]:
    """Loads every form of every export in one fresh process, compares and times it.

    Args:
        exports: What to prove.
        how: How to time.

    Returns:
        For each export its forms' proofs; instead of one the reason why it failed.

    Raises:
        ExportError: If the process itself fails.
    """
    with tempfile.TemporaryDirectory(prefix="prune-search-") as scratch:
        task, answer = Path(scratch) / "task.json", Path(scratch) / "answer.json"
        given = [_give(one, Path(scratch) / f"{i}.safetensors") for i, one in enumerate(exports)]
        text = {"exports": given, "timing": dataclasses.asdict(how), "paths": sys.path}
        task.write_text(json.dumps(text), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(task), str(answer)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ExportError(
                f"the process that proves the export ended with code {done.returncode}: {reason}."
            )
        found = json.loads(answer.read_text(encoding="utf-8"))
    return [
        {name: one if isinstance(one, str) else Proof(**one) for name, one in forms.items()}
        for forms in found
    ]


def proven(outcomes: Mapping[str, Outcome]) -> dict[str, Proof]:
    """The proofs of one export.

    Raises:
        ExportError: If a form has none.
    """
    proofs = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            raise ExportError(f"the {name} export is refused: {outcome}. Nothing was written.")
        proofs[name] = outcome
    return proofs


def _give(export: Unproven, path: Path) -> dict[str, Any]:
    """Writes images and expected outputs for the fresh process; what it is told about them."""
    tensors = {"images": export.images.contiguous()}
    with torch.inference_mode():
        for batch, images in enumerate(_batches(export.images)):
            for leaf, tensor in enumerate(_leaves(export.model(images))):
                tensors[f"{batch}.{leaf}"] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(tensors, path)
    return {"folder": str(export.folder), "formats": export.formats, "given": str(path)}


def _batches(images: Tensor) -> tuple[Tensor, Tensor]:
    """One image and all the others: two batch sizes, of which no form was traced with either."""
    return images[:1], images[1:]


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


# --- in the fresh process --------------------------------------------------------------------


def _main(task: Path, answer: Path) -> None:
    asked = json.loads(task.read_text(encoding="utf-8"))
    sys.path += [path for path in asked["paths"] if path not in sys.path]  # a user's own model
    how = Timing(**asked["timing"])
    torch.set_num_threads(how.threads)
    found = [_prove_export(one, how) for one in asked["exports"]]
    answer.write_text(json.dumps(found), encoding="utf-8")


def _prove_export(asked: Mapping[str, Any], how: Timing) -> dict[str, Any]:
    folder, given = Path(asked["folder"]), load_file(asked["given"])
    found: dict[str, Any] = {}
    for name in asked["formats"]:
        try:
            eager = load_pruned(folder, run_code=True)  # the parent has run the same code
            found[name] = dataclasses.asdict(_prove(name, folder, given, eager, how))
        except ExportError as error:
            found[name] = str(error)
        except Exception as error:  # whatever a foreign loader raises is the answer
            reason = (str(error).strip().splitlines() or [""])[0]
            found[name] = f"it does not load: {type(error).__name__}: {reason}"[:500]
    return found


def _prove(
    name: str, folder: Path, given: Mapping[str, Tensor], eager: nn.Module, how: Timing
) -> Proof:
    loaded, runtime = _load(name, folder, eager, how.threads)
    difference, largest = _compare(loaded, given)
    allowed = TOLERANCES[name] * largest
    if not difference <= allowed:
        raise ExportError(
            f"its outputs differ by {difference:.2e} from the trial's model, more than "
            f"{allowed:.2e} ({TOLERANCES[name]:g} of the largest output)"
        )
    content = (folder / FILES[name]).read_bytes()
    proof = Proof(
        file=FILES[name],
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        runtime=runtime,
        difference=difference,
        largest_output=largest,
        allowed=allowed,
        opset=OPSET if name == "onnx" else None,
    )
    if name == "safetensors":
        return proof
    images = given["images"]
    example = images[torch.arange(how.batch_size) % len(images)]
    return dataclasses.replace(proof, **_times(loaded, eager, example, how))


def _load(name: str, folder: Path, eager: nn.Module, threads: int) -> tuple[Loaded, str]:
    torch_version = f"torch {torch.__version__}"
    if name == "safetensors":
        return eager, torch_version
    if name == "pt2":
        return torch.export.load(folder / FILES[name]).module(), torch_version
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(
        str(folder / FILES[name]), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(a) for a in session.run(None, {"images": images.numpy()})]

    return run, f"onnxruntime {onnxruntime.__version__}"


def _compare(loaded: Loaded, given: Mapping[str, Tensor]) -> tuple[float, float]:
    """Largest absolute difference of the outputs, and the largest absolute expected output."""
    nothing = torch.zeros((), dtype=torch.float64)
    apart, sizes = [nothing], [nothing]
    with torch.inference_mode():
        for batch, images in enumerate(_batches(given["images"])):
            expected = list(_expected(given, batch))
            outputs = _leaves(loaded(images))
            shapes = [list(t.shape) for t in outputs], [list(t.shape) for t in expected]
            if shapes[0] != shapes[1]:
                raise ExportError(
                    f"it returns tensors of {shapes[0]} for {len(images)} images, the trial's "
                    f"model of {shapes[1]}"
                )
            for mine, theirs in zip(outputs, expected, strict=True):
                if theirs.numel():
                    apart.append((mine.double() - theirs.double()).abs().max())
                    sizes.append(theirs.double().abs().max())
    return float(torch.stack(apart).max()), float(torch.stack(sizes).max())  # NaN stays NaN


def _expected(given: Mapping[str, Tensor], batch: int) -> Iterator[Tensor]:
    leaf = 0
    while f"{batch}.{leaf}" in given:
        yield given[f"{batch}.{leaf}"]
        leaf += 1


def _times(loaded: Loaded, eager: nn.Module, example: Tensor, how: Timing) -> dict[str, Any]:
    """Median milliseconds of both, and of their ratio; the order alternates."""
    with timing(how.threads, eager):
        mine, others = _clock(loaded, example), _clock(eager, example)
        warm_up(mine)
        warm_up(others)
        pairs = []
        for turn in range(max(3, how.runs // BURST)):
            runs = (mine, others) if turn % 2 else (others, mine)
            seconds = {run: burst(run) for run in runs}
            pairs.append((seconds[mine], seconds[others]))
    return {
        "latency_ms": 1000 * statistics.median(a for a, _ in pairs) / BURST,
        "eager_ms": 1000 * statistics.median(b for _, b in pairs) / BURST,
        "speedup": statistics.median(b / a for a, b in pairs),
    }


def _clock(run: Loaded, example: Tensor) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run(example)
        return time.perf_counter() - start

    return timed


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
