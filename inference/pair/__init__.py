"""A model/guide pair: the call of its two programs, their runs and draws, its densities, and its file."""

from inference.pair.module import Module
from inference.pair.pair_files import load_pair, save_pair

__all__ = ["Module", "load_pair", "save_pair"]
