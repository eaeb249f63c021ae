"""A run as one self-contained HTML file: `report_data` (plain values) and `write_report`."""

from __future__ import annotations

from .data import report_data
from .page import render, write_report

__all__ = ["render", "report_data", "write_report"]
