r"""Posterior collapse, and the two parts of the rate: mutual information, and the divergence from the prior.

.. math:: E_n KL(q(z \mid x_n) \,\|\, p(z)) = I_q(x; z) + KL(q(z) \,\|\, p(z)), \quad q(z) = E_x q(z \mid x)

Everything here is for one latent site with a Gaussian guide, on a bounded support too, and a prior with independent
coordinates, and is computed in float64 from the two distributions alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inference.core.checks import check_count, check_finite, check_positive
from inference.core.deprecation import renamed_keywords
from inference.core.memory import joined
from inference.core.sources import opened
from inference.distributions.gaussian import coordinate_kl
from inference.pair.call import Call
from inference.pair.run import Program
from inference.posterior.latent_gaussians import latent_distributions, read_gaussians


@torch.no_grad()
@renamed_keywords(batch_size="block")
def latent_kl(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    block: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Tensor:
    r"""KL divergence of the guide from the prior per data point and latent coordinate.

    .. math:: KL(q(z_k \mid x_n) \,\|\, p(z_k))
        = \tfrac12 \left[\frac{v_{nk} + (m_{nk} - \mu_k)^2}{s_k^2} - 1 - \log \frac{v_{nk}}{s_k^2}\right]

    for a Gaussian prior; for others, and on bounded supports, see
    :func:`inference.distributions.gaussian.coordinate_kl`.

    Warning:
        Of a full-rank guide these are the divergences of its marginals: they do not add up to the divergence of the
        joint distribution, from which they lack the correlations.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.

    Args:
        model: Pyro model with one latent site, of event (K,), a priori with independent coordinates.
        guide: Pyro guide with a Gaussian distribution there, or one transformed to a support.
        x: Data, (N, D), the first argument of both.
        *args: Further arguments of both.
        block: Rows in one run of the pair; None chooses.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`; N is then one.
        missing: See :func:`inference.iter_log_weights`.
        progress: Show a progress bar where there are several blocks.
        **kwargs: Keyword arguments of both.

    Returns:
        (N, K), in nats and float64.

    Raises:
        TypeError: If one of the two distributions is of another kind, or the data are of the wrong type.
        ValueError: If the pair has several latents, or a mask, scale or subsampling at the one, the data are not finite
            or have the wrong shape, or the prior is bounded and the guide is not.

    Example:
        >>> from guides import Linear
        >>> from zoo import LinearVAE
        >>> latent_kl(LinearVAE(5, 2), Linear(5, 2), torch.zeros(4, 5)).sum().item()
        0.0
    """
    call = Call(model, guide, opened((x, *args)), kwargs, plate, whole=whole, missing=missing)
    distributions = latent_distributions(call, block=block, progress=progress)
    number = None if whole else call.num_rows
    return joined((coordinate_kl(posterior, prior).double() for _, prior, posterior in distributions), number)


@torch.no_grad()
@renamed_keywords(batch_size="block")
def posterior_means(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    block: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Posterior means of the guide per data point, as :func:`active_units` takes them.

    Args:
        model: As for :func:`latent_kl`, with a Gaussian prior.
        guide: As for :func:`latent_kl`, on all vectors.
        x: Data, (N, D), the first argument of both.
        *args: Further arguments of both.
        block: Rows in one run of the pair; None chooses.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`; N is then one.
        missing: See :func:`inference.iter_log_weights`.
        progress: Show a progress bar where there are several blocks.
        **kwargs: Keyword arguments of both.

    Returns:
        (N, K), float64.

    Raises:
        TypeError: See :func:`latent_kl`.
        ValueError: See :func:`latent_kl`.
    """
    call = Call(model, guide, opened((x, *args)), kwargs, plate, whole=whole, missing=missing)
    return read_gaussians(call, block=block, progress=progress)[0].mean


def collapsed(kl: Tensor, epsilon: float = 0.01, delta: float = 0.01) -> Tensor:
    r"""Collapsed latents: those whose posterior is close to the prior for nearly all data points.

    .. math:: \Pr_x[KL(q(z_k \mid x) \,\|\, p(z_k)) < \epsilon] \ge 1 - \delta

    Warning:
        Where the noise of the model is close to an eigenvalue of the data, the answer depends on epsilon: look at
        :func:`collapse_curve`.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469, section 5.

    Args:
        kl: (N, K) in nats, from :func:`latent_kl`.
        epsilon: Divergence in nats below which the latent of a data point counts as equal to the prior.
        delta: Share of the data that may exceed epsilon.

    Returns:
        (K,) bool.

    Raises:
        TypeError: If ``kl`` is not a floating tensor.
        ValueError: If ``kl`` is not (N, K) or not finite, epsilon is negative, or delta is not between 0 and 1.

    Example:
        >>> collapsed(torch.tensor([[0.5, 0.001], [2.0, 0.002]]))
        tensor([False,  True])
    """
    _check_epsilons(torch.tensor([epsilon]))
    return _collapse_points(kl, delta) < epsilon


def collapse_curve(kl: Tensor, epsilons: Tensor, delta: float = 0.01) -> Tensor:
    """Collapse curve: the share of collapsed latents for each of several epsilon.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469, section 5.

    Args:
        kl: (N, K) in nats, from :func:`latent_kl`.
        epsilons: (E,), in nats.
        delta: See :func:`collapsed`.

    Returns:
        (E,), between 0 and 1, float64.

    Raises:
        TypeError: See :func:`collapsed`.
        ValueError: See :func:`collapsed`.
    """
    _check_epsilons(epsilons)
    points = _collapse_points(kl, delta)
    return (points < epsilons.to(points).unsqueeze(-1)).double().mean(-1)


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Active units: latents whose posterior means have a variance over the data above a threshold.

    .. math:: \operatorname{Var}_n E_q[z_k \mid x_n] > \theta

    Warning:
        The threshold is in the square of the latent's own units, a fixed one only for a prior of unit variance.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv 1509.00519, section 5.2.

    Args:
        means: (N, K), from :func:`posterior_means`.
        threshold: Least variance.

    Returns:
        (K,) bool.

    Raises:
        TypeError: If ``means`` is not a floating tensor.
        ValueError: If ``means`` is not (N, K) or not finite, or the threshold is negative.
    """
    _check_matrix(means, "means")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"expected a finite threshold of at least 0, got {threshold}")
    return means.detach().double().var(0, correction=0) > threshold


def predicted_alive(eigenvalues: Tensor, sigma2: float, latent_dim: int) -> int:
    """Number of latents that a linear VAE keeps at its optimum: those whose eigenvalue exceeds the noise variance.

    Warning:
        Exact for the linear VAE of fixed noise at its global optimum; for any other decoder no more than a reference.
        Under a rate weighted by beta the threshold is beta times ``sigma2``.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.

    Args:
        eigenvalues: Of the data's covariance (divided by N), (D,), in any order.
        sigma2: Variance of the noise, in the same units.
        latent_dim: K.

    Raises:
        TypeError: If ``eigenvalues`` is not a floating tensor or K is not an integer.
        ValueError: If ``eigenvalues`` is not (D,) or not finite, or K or ``sigma2`` is not positive.

    Example:
        >>> predicted_alive(torch.tensor([4.0, 2.0, 0.5]), 1.0, 3)
        2
    """
    return int((predicted_kl(eigenvalues, sigma2, latent_dim) > 0).sum())


def predicted_kl(eigenvalues: Tensor, sigma2: float, latent_dim: int) -> Tensor:
    r"""KL divergence per latent of a linear VAE at its optimum, averaged over the data, the largest first.

    .. math:: KL_k = \tfrac12 \log \max(\lambda_k / \sigma^2, 1)

    Warning:
        See :func:`predicted_alive`.

    References:
        Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, arXiv 1911.02469.

    Args:
        eigenvalues: See :func:`predicted_alive`.
        sigma2: See :func:`predicted_alive`.
        latent_dim: K.

    Returns:
        (K,), in nats and float64.

    Raises:
        TypeError: See :func:`predicted_alive`.
        ValueError: See :func:`predicted_alive`.
    """
    _check_tensor(eigenvalues, "eigenvalues", "(D,)", 1)
    check_count(latent_dim, "latent_dim")
    check_positive(sigma2, "sigma2")
    largest = eigenvalues.detach().double().sort(descending=True)[0][:latent_dim]
    kl = 0.5 * (largest / sigma2).clamp(min=1.0).log()
    return torch.nn.functional.pad(kl, (0, latent_dim - len(kl)))


def _collapse_points(kl: Tensor, delta: float) -> Tensor:
    """Per latent the epsilon above which it is collapsed: its largest divergence but for the share delta of data."""
    _check_matrix(kl, "kl")
    if not 0 <= delta <= 1:
        raise ValueError(f"expected delta between 0 and 1, got {delta}")
    exceptions = math.floor(delta * len(kl) + 1e-9)  # 0.07 * 100 is more than 7, 0.29 * 100 is less than 29
    if exceptions >= len(kl):
        return kl.new_full(kl.shape[1:], -math.inf)
    return kl.detach().topk(exceptions + 1, 0)[0][-1]


def _check_epsilons(epsilons: Any) -> None:
    _check_tensor(epsilons, "epsilons", "(E,)", 1)
    if bool((epsilons < 0).any()):
        raise ValueError(f"expected epsilon of at least 0, got {float(epsilons.min())}")


def _check_matrix(value: Any, name: str) -> None:
    _check_tensor(value, name, "(N, K)", 2)


def _check_tensor(value: Any, name: str, shape: str, dim: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"expected {name} to be a floating tensor of shape {shape}, got {got}")
    if value.dim() != dim or 0 in value.shape:
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(value.shape)}")
    check_finite(value, name)
