"""Calibration of a guide on simulated data: SBC, TARP, C2ST."""
