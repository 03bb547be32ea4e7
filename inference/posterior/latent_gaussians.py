"""Gaussian posteriors of a guide for all data points, as matrices of means and standard deviations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.core.memory import at_once, joined
from inference.distributions.batched_gaussian import Gaussians
from inference.distributions.gaussian import as_full_normal, diagonal_moments
from inference.pair.call import Call
from inference.pair.handlers import Site
from inference.pair.rows import row_blocks

# Rows in one run of the pair by default.
_BLOCK = 4096


def latent_distributions(call: Call, *, block: int | None, progress: bool) -> Iterator[tuple[str, Any, Any]]:
    """For each block of data the name of the one latent site, its prior and the guide's posterior, in float64."""
    block = at_once(_BLOCK) if block is None else block
    check_count(block, "block")
    number = call.num_rows
    if number is None:
        raise TypeError(
            f"expected x to be a torch.Tensor of shape (N, D), got {type(next(iter(call.args), None)).__name__}"
        )
    if number == 0:
        raise ValueError("expected at least one data point, got none")
    call.check()
    call = call.double_by_rows()
    with refuse_batch_dependence(*call.programs):
        parts = row_blocks(call, block)
        bar = tqdm(range(len(parts)), disable=not progress or len(parts) == 1, desc="latents", unit="block")
        for i in bar:
            yield _latent_distributions(parts[i])


def _latent_distributions(call: Call) -> tuple[str, Any, Any]:
    draw = call.probe()
    if len(draw.latents) != 1:
        raise ValueError(f"expected a pair with one latent site, got {list(draw.latents)}")
    (name,) = draw.latents
    sites = draw.model_sites[name], draw.guide_sites[name]
    prior, posterior = map(_as_row, sites) if call.whole else sites
    for half, site in (("model", prior), ("guide", posterior)):
        _check_site(half, name, site, draw.layout.num_data)
    return name, prior.fn, posterior.fn


def _as_row(site: Site) -> Site:
    """A site without the plate over the data as one of a single data point, its plates as further coordinates."""
    fn = site.fn.to_event(len(site.fn.batch_shape))
    return site._replace(fn=fn.expand(torch.Size([1])))


def read_gaussians(call: Call, *, block: int | None, progress: bool) -> tuple[Gaussians, Tensor, Tensor]:
    """The guide's distributions, and the prior's means and standard deviations (N, K), in float64."""
    found = latent_distributions(call, block=block, progress=progress)
    parts = (_numbers(*distributions) for distributions in found)
    mean, factor, prior_mean, prior_sigma = joined(parts, None if call.whole else call.num_rows)
    return Gaussians(mean, factor), prior_mean, prior_sigma


def _numbers(name: str, prior: Any, distribution: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments = diagonal_moments(prior)
    if moments is None:
        raise TypeError(
            f"expected a prior with independent Gaussian coordinates at site {name!r}, got {distribution_name(prior)}"
        )
    mean, factor = _moments(name, distribution)
    numbers = mean, factor, moments[0].expand_as(mean), moments[1].expand_as(mean)
    return tuple(number.double() for number in numbers)  # type: ignore[return-value]


def _check_site(half: str, name: str, site: Site, num_data: int) -> None:
    if site.mask is not None or not bool((torch.as_tensor(site.scale) == 1).all()):
        raise ValueError(
            f"expected {half} site {name!r} under no mask, scale or subsampling, got mask {site.mask} and scale "
            f"{site.scale}"
        )
    if site.fn.batch_shape != (num_data,) or len(site.fn.event_shape) != 1:
        raise ValueError(
            f"expected {half} site {name!r} with batch ({num_data},) and event (K,), got {tuple(site.fn.batch_shape)} "
            f"and {tuple(site.fn.event_shape)}: is .to_event(1) missing?"
        )


def _moments(name: str, distribution: Any) -> tuple[Tensor, Tensor]:
    """Mean (N, K) and standard deviations (N, K) or Cholesky factors (N, K, K) of a Gaussian distribution."""
    diagonal = diagonal_moments(distribution)
    if diagonal is not None:
        return diagonal[0], diagonal[1].expand_as(diagonal[0])
    full = as_full_normal(distribution)
    if full is None:
        raise TypeError(f"expected a Gaussian guide at site {name!r}, got {distribution_name(distribution)}")
    return full.loc, full._unbroadcasted_scale_tril.expand(full.loc.shape + full.loc.shape[-1:])


def distribution_name(distribution: Any) -> str:
    """The class name of a distribution, with those of the distributions that it wraps."""
    inner = f" of {distribution_name(distribution.base_dist)}" if hasattr(distribution, "base_dist") else ""
    return type(distribution).__name__ + inner
