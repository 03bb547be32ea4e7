"""A comparison as one HTML file that needs nothing else: its table and its figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from inference import plots
from inference.core.storage import atomic_path

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .85rem; }}
img {{ max-width: 100%; }}
figure {{ margin: 2rem 0; }}
figcaption {{ color: #555; }}
</style></head>
<body>
<h1>{title}</h1>
<pre>{table}</pre>
{figures}
</body>
</html>
"""

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
    page = _PAGE.format(title=html.escape(title), table=html.escape(table), figures=figures)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _embed(caption: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
