"""Sparse training: pushes the batch-norm scales of the channels to be removed towards zero.

A method is called as `f(model, task, norms, *, <run arguments>, **options)`, trains the model in
place and returns a `SparseHistory`. What is neither a run argument nor positional is an option.
"""

from __future__ import annotations

from collections.abc import Callable

from .dsd import RUN_ARGUMENTS, sparse_train
from .history import EpochRecord, SparseHistory

__all__ = ["RUN_ARGUMENTS", "SPARSE_TRAINING", "EpochRecord", "SparseHistory", "sparse_train"]

SPARSE_TRAINING: dict[str, Callable[..., SparseHistory]] = {"dsd": sparse_train}
