"""Identifiability of latents: IMA contrast, predicted gap, mean correlation coefficient (MCC), self-consistency."""

from inference.identifiability.consistency import SelfConsistency, self_consistency
from inference.identifiability.gap_prediction import predicted_gap
from inference.identifiability.ima_contrasts import (
    column_contrast,
    conformal_contrast,
    ima_contrast,
    ima_contrast_of_inverse,
    ima_penalty,
    local_ima_contrast,
    local_ima_contrast_of_inverse,
)
from inference.identifiability.mean_correlation import MCC, amari_distance, mcc, rank_mcc

__all__ = [
    "MCC",
    "SelfConsistency",
    "amari_distance",
    "column_contrast",
    "conformal_contrast",
    "ima_contrast",
    "ima_contrast_of_inverse",
    "ima_penalty",
    "local_ima_contrast",
    "local_ima_contrast_of_inverse",
    "mcc",
    "predicted_gap",
    "rank_mcc",
    "self_consistency",
]
