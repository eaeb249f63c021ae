"""The text of an export's `load.py`: a few lines for each form, without the search."""

from __future__ import annotations

from collections.abc import Sequence

LOADER = "load.py"

_HEAD = '''\
"""Loads this model. Images: float32 [batch, channels, height, width], normalised as README.md says."""

from pathlib import Path

FOLDER = Path(__file__).parent
'''  # noqa: E501

_FORMS = {
    "safetensors": '''

def load_safetensors(model=None, run_code=False):
    """A torch module. Needs torch, safetensors and prunesearch.methods."""
    from prunesearch.methods.exported import load_pruned

    return load_pruned(FOLDER, model=model, run_code=run_code)
''',
    "pt2": '''

def load_pt2():
    """A torch module. Needs torch. Like a program, load it only from whom you trust."""
    import torch

    return torch.export.load(FOLDER / "model.pt2").module()
''',
    "onnx": '''

def load_onnx():
    """A function from images (NumPy) to outputs (NumPy). Needs onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    return lambda images: session.run(None, {"images": images})[0]
''',
}


def load_script(formats: Sequence[str]) -> str:
    """Python code that loads the forms; `load()` loads the first one.

    Args:
        formats: Names in `portable.FORMATS`, at least one.
    """
    return _HEAD + "".join(_FORMS[name] for name in formats) + f"\n\nload = load_{formats[0]}\n"
