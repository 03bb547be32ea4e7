"""A folder of trained pairs: each one a file of weights and a card, under a name with slashes."""

from __future__ import annotations

import difflib
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from inference import load_pair, save_pair
from inference.core.storage import atomic_path
from zoo.data import load_data
from zoo.pretrained.cards import Card, check_name

_OURS = Path(__file__).parent / "weights"
_WEIGHTS, CARD = "pair.safetensors", "card.json"
_DATA = (".npy", ".npz", ".csv")


class Pretrained(NamedTuple):
    """A trained pair.

    Attributes:
        model: Pyro model, in eval mode on the CPU.
        guide: Pyro guide, likewise.
        card: What is known of it.
    """

    model: nn.Module
    guide: nn.Module
    card: Card


def pairs(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the trained pairs of a folder, in order; None lists those that come with the zoo.

    Raises:
        FileNotFoundError: If there is no such folder.

    Example:
        >>> "linear_vae/digits" in pairs()
        True
    """
    home = _folder(folder)
    return sorted(path.parent.relative_to(home).as_posix() for path in home.rglob(CARD))


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Any:
    """A trained pair with its card, a :class:`Pretrained`.

    Args:
        name: One of :func:`pairs`.
        folder: Where it was saved; None looks among those that come with the zoo.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no such pair, or its files are damaged.

    Example:
        >>> model, guide, card = load("linear_vae/digits")
        >>> card.evidence.value >= card.elbo.value
        True
    """
    if not isinstance(name, str) or Path(name).suffix in _DATA:
        warnings.warn(
            "zoo.load reads trained pairs now; data are read by zoo.load_data", DeprecationWarning, stacklevel=2
        )
        return load_data(name)
    card = load_card(name, folder)
    model, guide = load_pair(_place(name, folder) / _WEIGHTS)
    return Pretrained(model.eval(), guide.eval(), card)


def load_card(name: str, folder: str | os.PathLike[str] | None = None) -> Card:
    """The card of a trained pair alone, without its weights.

    Args:
        name: See :func:`load`.
        folder: See :func:`load`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no such pair, or its card is damaged.
    """
    path = _place(name, folder) / CARD
    if not path.is_file():
        raise ValueError(_unknown(name, pairs(folder)) or f"expected a pair with {CARD} at {path.parent}, found none")
    try:
        return Card.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _unknown(name: str, names: list[str]) -> str:
    """That a name is none of those known, and the one that is closest; empty where none is known."""
    close = difflib.get_close_matches(name, names, 1)
    hint = f": did you mean {close[0]}?" if close else ""
    return f"expected one of the pairs {', '.join(names)}, got {name!r}{hint}" if names else ""


def save(folder: str | os.PathLike[str], model: nn.Module, guide: nn.Module, card: Card) -> Path:
    """Add a trained pair and its card to a folder, under the card's name; what has that name is replaced.

    Returns:
        The folder of the pair.

    Raises:
        TypeError: If a half is not an ``nn.Module``.
        ValueError: If the name is not of letters, digits and ``_.-/``.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    home = _place(card.name, folder)
    save_pair(home / _WEIGHTS, model, guide)
    with atomic_path(home / CARD) as path:
        path.write_text(card.to_json() + "\n")
    return home


def _folder(folder: str | os.PathLike[str] | None) -> Path:
    home = _OURS if folder is None else Path(folder)
    if not home.is_dir():
        raise FileNotFoundError(f"expected a folder of trained pairs at {home}, found none")
    return home


def _place(name: str, folder: str | os.PathLike[str] | None) -> Path:
    check_name(name)
    return _folder(folder) / name
