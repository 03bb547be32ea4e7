"""Foundations: the call of a pair, its runs and draws, checks, seeds, files."""

from inference.core.estimates import Estimate, Interval
from inference.core.memory import memory_limit
from inference.core.module import Module
from inference.core.pair_files import load_pair, save_pair

__all__ = ["Estimate", "Interval", "Module", "load_pair", "memory_limit", "save_pair"]
