"""Calibration of a guide on simulated data: simulation-based calibration (SBC), TARP, classifier tests (C2ST)."""

from inference.calibration.classifier_two_sample import C2ST, c2st, c2st_joint, c2st_per_datum
from inference.calibration.random_points import TARP, tarp
from inference.calibration.simulation import Simulation
from inference.calibration.simulation_based_calibration import SBC, Coverage, coverage, sbc
from inference.calibration.simulator import simulate

__all__ = [
    "C2ST",
    "SBC",
    "TARP",
    "Coverage",
    "Simulation",
    "c2st",
    "c2st_joint",
    "c2st_per_datum",
    "coverage",
    "sbc",
    "simulate",
    "tarp",
]
