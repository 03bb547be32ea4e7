"""Foundations that know no Pyro pair: checks, seeds, sources of data, ranks, files, protocols."""

from inference.core.estimates import Estimate, Interval
from inference.core.memory import memory_limit

__all__ = ["Estimate", "Interval", "memory_limit"]
