"""A comparison as one HTML file that needs nothing else: its table and its figures."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from inference import plots
from inference.core.display import embedded, html_page
from inference.core.files import atomic_path

_FIGURES: dict[str, Callable[[xr.DataTree], Figure]] = {
    "Gap between evidence and ELBO": plots.gap_figure,
    "ELBO less evidence of each row": plots.elbo_against_evidence,
    "Pareto k-hat of the importance weights": plots.pareto_k_shares,
}


def write_report(path: Path, title: str, table: str, tree: xr.DataTree) -> Path:
    """Write the report atomically; returns its path.

    Args:
        path: File to replace.
        title: Its heading.
        table: The comparison as text.
        tree: The comparison, from :func:`inference.compare`.
    """
    figures = "\n".join(_embed(caption, draw(tree)) for caption, draw in _FIGURES.items())
    page = html_page(title, f"<pre>{html.escape(table)}</pre>\n{figures}")
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _embed(caption: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return embedded(caption, buffer.getvalue())
