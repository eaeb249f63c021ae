"""A task owns what training and scoring need to know about data: batches, loss, metrics."""

from __future__ import annotations

from .classification import ClassificationTask

__all__ = ["ClassificationTask"]
