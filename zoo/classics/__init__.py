"""Classic models of Bayesian statistics as plain Pyro programs, with their evidence by independent means."""

from zoo.classics.catalogue import classic_models
from zoo.classics.programs import ClassicModel
from zoo.classics.reference import Classic

__all__ = ["Classic", "ClassicModel", "classic_models"]
