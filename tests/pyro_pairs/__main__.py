"""Run every door on every pair, and write the page of what came: ``PYTHONPATH=.:tests python -m pyro_pairs``."""

from __future__ import annotations

import warnings
from pathlib import Path

import pyro

from pyro_pairs.doors import DOORS
from pyro_pairs.pairs import PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "pyro_pairs.md"
HEAD = """# Pyro's own pairs

The pairs of Pyro's examples, small (`tests/pyro_pairs/pairs.py`), at the doors of the library: this table is what
`PYTHONPATH=.:tests python -m pyro_pairs` found. A cell says "yes" where the door answers and its numbers pass the
checks of `tests/pyro_pairs/doors.py`: evidence and weights beside log p by other means, a loss that falls, an ELBO
below the evidence, ranks in their range. Otherwise it gives the error.
"""


def cell(name: str, door: str) -> str:
    """What a door says to a new pair."""
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            DOORS[door](PAIRS[name]())
        except (ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return "yes"


def page() -> str:
    """The page, in Markdown."""
    lines = [f"| pair | log p is known by | {' | '.join(DOORS)} |", "|---" * (len(DOORS) + 2) + "|"]
    cells = {(name, door): cell(name, door) for name in PAIRS for door in DOORS}
    for name, make in PAIRS.items():
        lines.append(f"| {name} | {make().known_by} | {' | '.join(cells[name, door] for door in DOORS)} |")
    works = sum(said == "yes" for said in cells.values())
    return f"{HEAD}\n{works} of {len(cells)} cells answer.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
