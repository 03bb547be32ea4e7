"""The gap between evidence and ELBO, its decomposition, and the comparison of guides."""

from inference.comparison.arviz_groups import to_arviz
from inference.comparison.frames import frame
from inference.comparison.gap_decomposition import Gap, gap
from inference.comparison.guide_comparison import compare
from inference.comparison.paired_differences import differences, load_comparison, save_comparison
from inference.comparison.refitting import Refit, refit
from inference.comparison.tables import table

__all__ = [
    "Gap",
    "Refit",
    "compare",
    "differences",
    "frame",
    "gap",
    "load_comparison",
    "refit",
    "save_comparison",
    "table",
    "to_arviz",
]
