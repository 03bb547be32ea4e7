r"""Classifier two-sample tests (C2ST): can a classifier distinguish a guide's draws from the posterior's?

.. math:: \text{accuracy} \to \tfrac12 \iff \text{both sets of samples have one distribution}
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.calibration.simulation import Simulation
from inference.core.checks import check_count, check_finite


class C2ST(NamedTuple):
    """Result of classifier two-sample tests (C2ST), each entry () or one per data point.

    Attributes:
        accuracy: Share of held-out samples that are classified correctly: 1/2 where the classifier finds no difference.
        standard_error: Of the accuracy, with the dependence of the folds.
        p_value: One-sided, of an accuracy so far above 1/2, by the normal approximation with that dependence: rather
            too large than too small.
    """

    accuracy: Tensor
    standard_error: Tensor
    p_value: Tensor


def default_classifier(dim: int, seed: int = 0) -> Any:
    """A network with two hidden layers of ten units per coordinate, at most 100, on standardised coordinates.

    Args:
        dim: Coordinates, P.
        seed: Of its initial weights.
    """
    from sklearn.neural_network import MLPClassifier  # here, as it takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    width = min(10 * dim, 100)
    network = MLPClassifier((width, width), max_iter=200, early_stopping=True, n_iter_no_change=20, random_state=seed)
    return make_pipeline(StandardScaler(), network)


def c2st(first: Tensor, second: Tensor, *, classifier: Any = None, num_folds: int = 5, seed: int | None = None) -> C2ST:
    r"""Classifier two-sample test (C2ST) by cross-validation.

    .. math:: \hat t = \frac{1}{2 n} \sum_i 1[f_{-i}(v_i) = l_i]

    with label l_i of sample v_i and a classifier f_{-i} fitted without the fold that i is in.

    Warning:
        An accuracy of 1/2 means that this classifier finds no difference, not that there is none. The samples must be
        independent of each other: thin a Markov chain. Classifiers of different folds share training data, so that
        their answers are not independent: the binomial variance is multiplied by 1 + F / (F - 1) for F folds (Nadeau,
        Bengio). For logistic regression that is rather more than needed: 2.25 where 1.7 was measured for five folds.

    References:
        Nadeau, Bengio, "Inference for the Generalization Error", 2003, Machine Learning 52.
        Lopez-Paz, Oquab, "Revisiting Classifier Two-Sample Tests", 2017, arXiv 1610.06545.

    Args:
        first: Samples of one distribution, (n, P).
        second: Samples of the other, (n, P): as many, so that guessing has accuracy 1/2.
        classifier: Any scikit-learn classifier; None takes :func:`default_classifier`.
        num_folds: Folds.
        seed: Seed of the folds and of the default classifier.

    Returns:
        Accuracy, standard error and p-value, () each.

    Raises:
        ValueError: If the samples are not of one shape (n, P), not finite, or fewer than two per fold.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> apart = c2st(torch.zeros(100, 1), torch.ones(100, 1), classifier=LogisticRegression())
        >>> float(apart.accuracy)
        1.0
    """
    check_count(num_folds, "num_folds", minimum=2)
    for name, samples in (("first", first), ("second", second)):
        if samples.dim() != 2 or samples.shape != first.shape or len(samples) < 2 * num_folds:
            raise ValueError(
                f"expected two sets of samples of one shape (n, P) with n of at least {2 * num_folds}, got "
                f"{tuple(first.shape)} and {tuple(second.shape)}"
            )
        check_finite(samples, name)
    right = _held_out(first, second, classifier, num_folds, _fresh(seed))
    accuracy, num = float(right.mean()), len(right)
    dependence = math.sqrt(1 + num_folds / (num_folds - 1))
    error = dependence * math.sqrt(accuracy * (1 - accuracy) / num)
    p_value = float(scipy.stats.norm.sf((accuracy - 0.5) * 2 * math.sqrt(num) / dependence))
    return C2ST(*(torch.tensor(v, dtype=torch.float64) for v in (accuracy, error, p_value)))


def c2st_joint(simulation: Simulation, *, classifier: Any = None, num_folds: int = 5, seed: int | None = None) -> C2ST:
    """Classifier two-sample test (C2ST) between (x, z) of the model and (x, z) with z drawn by the guide.

    Half of the simulated data keep their truth, the others get the guide's first draw, so that all samples are
    independent. Sees correlations, and guides that ignore the data.

    Args:
        simulation: From :func:`inference.simulate`; one draw per data point is enough.
        classifier: See :func:`c2st`.
        num_folds: See :func:`c2st`.
        seed: See :func:`c2st`.

    Raises:
        ValueError: See :func:`c2st`.
    """
    half = len(simulation.truth) // 2
    truth, drawn = slice(None, half), slice(half, 2 * half)
    first = torch.cat([simulation.data[truth], simulation.truth[truth]], -1)
    second = torch.cat([simulation.data[drawn], simulation.draws[0, drawn]], -1)
    return c2st(first, second, classifier=classifier, num_folds=num_folds, seed=seed)


def c2st_per_datum(
    draws: Tensor,
    reference: Tensor,
    *,
    classifier: Any = None,
    num_folds: int = 5,
    seed: int | None = None,
    progress: bool = True,
) -> C2ST:
    """Classifier two-sample test (C2ST) for each data point by itself.

    Args:
        draws: The guide's, (S, N, K), such as ``predictive(model, guide, x, num_samples=S)["z"]``.
        reference: The posterior's, exact or thinned from a long Markov chain, (S, N, K).
        classifier: See :func:`c2st`.
        num_folds: See :func:`c2st`.
        seed: See :func:`c2st`.
        progress: Whether to show a progress bar.

    Returns:
        Accuracy, standard error and p-value, (N,) each; with N tests at level alpha, alpha N are to be expected below.

    Raises:
        ValueError: If the two are not of one shape (S, N, K); see :func:`c2st`.
    """
    if draws.dim() != 3 or draws.shape != reference.shape:
        raise ValueError(
            f"expected draws and reference of one shape (S, N, K), got {tuple(draws.shape)} and "
            f"{tuple(reference.shape)}"
        )
    results = [
        c2st(draws[:, n], reference[:, n], classifier=classifier, num_folds=num_folds, seed=seed)
        for n in tqdm(range(draws.shape[1]), desc="c2st", disable=not progress)
    ]
    return C2ST(*(torch.stack(column) for column in zip(*results)))


def _fresh(seed: int | None) -> int:
    """A seed for scikit-learn: the given one, or one drawn from torch's random state."""
    return int(torch.randint(2**31, ())) if seed is None else seed


def _held_out(first: Tensor, second: Tensor, classifier: Any, num_folds: int, seed: int) -> np.ndarray:
    """Which samples, (2 n,), are classified correctly by classifiers that were not fitted to them."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    features = torch.cat([first, second]).detach().double().cpu().numpy()
    labels = np.repeat([0, 1], len(first))
    model = default_classifier(features.shape[1], seed) if classifier is None else classifier
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A classifier that has not converged is as good a test, only a weaker one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return cross_val_predict(model, features, labels, cv=folds) == labels
