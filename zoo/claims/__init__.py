"""The claims of four papers, what is run for each, and the verdict that follows from the numbers."""

from zoo.claims.claim import VERDICTS, Claim, Measured, Settings
from zoo.claims.page import as_html, markdown, verdict_counts
from zoo.claims.registry import all_claims, chosen_claims
from zoo.claims.running import Row, run_claims

__all__ = [
    "VERDICTS",
    "Claim",
    "Measured",
    "Row",
    "Settings",
    "all_claims",
    "as_html",
    "chosen_claims",
    "markdown",
    "run_claims",
    "verdict_counts",
]
