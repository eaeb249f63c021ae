"""How runs show themselves in a notebook: their tables and pictures, as in a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType

from .plot import save_figure
from .tables import front_table, status_of, status_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .runs import Run

WIDTH = 150  # characters a line: a table that is too narrow breaks its numbers
PRE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    'font-family:ui-monospace,Menlo,Consolas,monospace">{code}</pre>'
)


class Picture:
    """A drawn figure that a notebook shows.

    Attributes:
        figure: Matplotlib's, to be changed as one likes.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def save(self, path: str | Path) -> Path:
        """Writes it; the path's ending says the format: png, svg or pdf.

        Raises:
            ConfigError: If the format is unknown.
        """
        return save_figure(self.figure, Path(path))

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.figure.savefig(picture, format="png")
        return picture.getvalue()


def run_tables(run: Run) -> RenderableType:
    """How far a run is, and its front."""
    status = status_table(status_of(run))
    return Group(status, front_table(run)) if run.baseline else status


def as_html(shown: RenderableType) -> str:
    """What a terminal shows, as one HTML element; texts in it are escaped."""
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(file=io.StringIO(), record=True, width=WIDTH, **options)
    console.print(shown)
    return console.export_html(inline_styles=True, code_format=PRE)
