"""Training of pairs: one run, restarts, and many pairs at once."""

from inference.training.callbacks import Callback, Logging, Moment, Snapshots, TensorBoard
from inference.training.fitting import fit
from inference.training.restarts import Restarts, fit_best
from inference.training.trainer import History
from inference.training.vectorised import fit_many

__all__ = [
    "Callback",
    "History",
    "Logging",
    "Moment",
    "Restarts",
    "Snapshots",
    "TensorBoard",
    "fit",
    "fit_best",
    "fit_many",
]
