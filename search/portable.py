"""Writes an exported model in forms that run without this project: `.pt2` and ONNX.

Both take any batch size. export_proof.py loads what was written in a fresh process.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..methods.exported import WEIGHTS
from .yaml_source import ConfigError

if TYPE_CHECKING:
    import onnx

FILES = {"safetensors": WEIGHTS, "pt2": "model.pt2", "onnx": "model.onnx"}
FORMATS = tuple(FILES)
OPSET = 18  # what the exporter's own operators are written in: nothing has to be converted
ONNX_PARTS = ("onnx", "onnxscript", "onnxruntime")
MAX_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit, less the graph


class ExportError(RuntimeError):
    """A form could not be written, or is not the model that it was made of."""


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once.

    Raises:
        ConfigError: If there is one that is not known, or whose libraries are missing.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(
                f"`--format` (={name}) must be one of {', '.join(FORMATS)}. Choose one."
            )
    missing = [part for part in ONNX_PARTS if importlib.util.find_spec(part) is None]
    if "onnx" in formats and missing:
        raise ConfigError(
            f"`--format` (=onnx) must have {', '.join(missing)}, not installed here. Run "
            "`pip install 'prune-search[onnx]'`, or choose pt2."
        )
    return tuple(dict.fromkeys(formats)) or ("safetensors",)


def write_forms(model: nn.Module, formats: Iterable[str], folder: Path, images: Tensor) -> None:
    """Writes the model as `FILES[form]` for each form but safetensors.

    Args:
        model: In eval mode, on the CPU; its parameters stop to require gradients.
        formats: Names in `FORMATS`.
        folder: Where to.
        images: At least two, [B, C, H, W]. Only their shape is used: no image is in the files.

    Raises:
        ExportError: If the model cannot be traced or translated.
    """
    asked = [name for name in FORMATS if name in set(formats) - {"safetensors"}]
    if not asked:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about their own code
        program = _trace(model, torch.zeros_like(images[:2]))
        for name in asked:
            try:
                _WRITERS[name](program, folder / FILES[name])
            except Exception as error:  # whatever a foreign exporter raises
                raise ExportError(_no_form(name, error)) from error


def _trace(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        program = torch.export.export(
            model.requires_grad_(False), (example,), dynamic_shapes=shapes
        )
    except Exception as error:  # whatever a foreign model raises while it is traced
        raise ExportError(_no_form("pt2 and onnx", error)) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
    program.example_inputs = None  # would be stored as a pickle
    return program


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    import onnx

    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    if num_bytes > MAX_ONNX_BYTES:
        raise ValueError(f"an ONNX file holds at most 2 GiB, the weights are {num_bytes:,} bytes")
    single = len(program.graph_signature.user_outputs) == 1
    translated = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["output"] if single else None,
        opset_version=OPSET,
        verbose=False,
    )
    assert translated is not None
    model = translated.model_proto
    _name_batch(model.graph)
    for part in (model.graph, *model.graph.node):
        del part.metadata_props[:]  # the trace: names, and folders of this machine
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _name_batch(graph: onnx.GraphProto) -> None:
    """Calls the free dimension `batch`, which the tracer gives a name of its own."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"


def _no_form(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"the model cannot be written as {name}: {type(error).__name__}: {reason[:300]}. "
        "Use --format safetensors."
    )


_WRITERS = {"pt2": _write_pt2, "onnx": _write_onnx}
