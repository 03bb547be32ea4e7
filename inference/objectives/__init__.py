"""Training objectives: each a pyro.infer.ELBO that gives a bound per data point, to be maximised."""

from inference.objectives.analytic import AnalyticBetaELBO, AnalyticELBO, AnalyticTargetRate
from inference.objectives.annealed_precision import AnnealedPrecision
from inference.objectives.base import Objective
from inference.objectives.bilbo import BILBO, FittedPrior, FloatingPrior
from inference.objectives.evidence_lower_bound import ELBO, AnalyticKLELBO, BetaELBO, FreeBitsELBO
from inference.objectives.importance_weighted import IWELBO, DReG, StickingTheLanding
from inference.objectives.mixed_importance_weighted import CIWAE, MIWAE, PIWAE
from inference.objectives.renyi import CUBO, VRBound, renyi_bound
from inference.objectives.schedules import CyclicalAnnealing, GeometricAnnealing, LinearAnnealing
from inference.objectives.target_rate import SampledTargetRate, TargetRate
from inference.objectives.wake_sleep import WakeSleep, WakeWake

__all__ = [
    "BILBO",
    "CIWAE",
    "CUBO",
    "ELBO",
    "IWELBO",
    "MIWAE",
    "PIWAE",
    "AnalyticBetaELBO",
    "AnalyticELBO",
    "AnalyticKLELBO",
    "AnalyticTargetRate",
    "AnnealedPrecision",
    "BetaELBO",
    "CyclicalAnnealing",
    "DReG",
    "FittedPrior",
    "FloatingPrior",
    "FreeBitsELBO",
    "GeometricAnnealing",
    "LinearAnnealing",
    "Objective",
    "SampledTargetRate",
    "StickingTheLanding",
    "TargetRate",
    "VRBound",
    "WakeSleep",
    "WakeWake",
    "renyi_bound",
]
