"""The table of the pairs of Pyro's examples by the doors of the library: which cells answer, and with what numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from pyro_pairs.doors import DOORS, REFUSED
from pyro_pairs.pairs import PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "pyro_pairs.md"

# Doors, and pairs at each, that answer in a second or two.
QUICK = {
    "fit": {"conditional VAE", "semi-supervised VAE, labelled", "scANVI, labelled"},
    "compare": {
        "conditional VAE",
        "semi-supervised VAE, labelled",
        "CEVAE",
        "deep Markov model",
        "scANVI, unlabelled",
        "eight schools",
        "hidden Markov model",
        "sparse gamma DEF",
        "AIR",
    },
    "sbc": {"VAE", "CEVAE"},
}
CELLS = [
    pytest.param(name, door, id=f"{name}, {door}", marks=() if name in QUICK.get(door, ()) else pytest.mark.slow)
    for name in PAIRS
    for door in DOORS
]


@pytest.mark.parametrize(("name", "door"), CELLS)
def test_a_cell_answers_or_is_refused_for_a_reason(name: str, door: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*several samples side by side")
        pair = PAIRS[name]()
        if (name, door) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name, door]):
                DOORS[door](pair)
        else:
            DOORS[door](pair)


def test_most_cells_answer() -> None:
    assert len(REFUSED) < 0.15 * len(CELLS)


def test_the_page_has_a_row_for_each_pair_and_a_column_for_each_door():
    lines = PAGE.read_text().splitlines()
    assert f"| pair | log p is known by | {' | '.join(DOORS)} |" in lines
    assert [line.split(" | ")[0][2:] for line in lines if line.startswith("| ")][1:] == list(PAIRS)
