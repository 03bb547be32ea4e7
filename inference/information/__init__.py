"""Information theory of a pair: rate, distortion and mutual information, and their closed forms."""

from inference.information.bounds import information_bounds, tightest
from inference.information.curve import CurvePoint, lower_hull, phase, rate_distortion_curve
from inference.information.encoder_information import MutualInformation, mutual_information
from inference.information.entropies import ELBOEntropies, elbo_entropies
from inference.information.rates import RateDistortion, empirical_entropy, rate_distortion
from inference.information.reverse_water_filling import water_filling, water_filling_at_rate

__all__ = [
    "CurvePoint",
    "ELBOEntropies",
    "MutualInformation",
    "RateDistortion",
    "elbo_entropies",
    "empirical_entropy",
    "information_bounds",
    "lower_hull",
    "mutual_information",
    "phase",
    "rate_distortion",
    "rate_distortion_curve",
    "tightest",
    "water_filling",
    "water_filling_at_rate",
]
