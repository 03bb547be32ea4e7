r"""Bounds on the mutual information of data and latent that need only the guide's density, tighter than H - D and R."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_count
from inference.core.estimates import check_level
from inference.core.memory import at_once, joined
from inference.core.ranks import ranks
from inference.core.seeding import seeded
from inference.core.sources import opened
from inference.information.encoder_information import MutualInformation, information_report, refuse_whole
from inference.information.rates import RateDistortion, rate_distortion
from inference.pair.call import Call
from inference.pair.draw import Layout
from inference.pair.handlers import isolated, masked_log_prob
from inference.pair.rows import RowBlocks, row_blocks
from inference.pair.run import Program

# Latents scored side by side by default.
_CHUNK = 64

# Rows in one run of the pair by default.
_BLOCK = 4096


@torch.no_grad()
def information_bounds(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 2,
    chunk: int | None = None,
    block: int | None = None,
    seed: int | None = None,
    level: float = 0.95,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> MutualInformation:
    r"""Bounds on the mutual information of data and latent: InfoNCE and the leave-one-out bound, for any guide.

    .. math::
        E \log \frac{q(z_n \mid x_n)}{\frac1N \sum_m q(z_n \mid x_m)} \le I_q(x; z) \le
        E \log \frac{q(z_n \mid x_n)}{\frac1{N-1} \sum_{m \ne n} q(z_n \mid x_m)}

    The left is InfoNCE with the guide itself as critic, and the information for the empirical distribution of the data;
    the right leaves the own component out. For Gaussian guides and priors :func:`inference.mutual_information` computes
    the same bounds with less noise; here the guide may be a flow, have several latent sites, and the prior be any.

    Warning:
        N data points show at most log N nats, see :func:`inference.mutual_information`. The cost is S N^2 densities,
        the memory that of the latents, O(N K). The guide must be able to score latents that it did not draw, for every
        data point.

    References:
        Poole, Ozair, van den Oord, Alemi, Tucker, "On Variational Bounds of Mutual Information", 2019,
        arXiv 1905.06922.

    Args:
        model: Pyro model; gives the rate, from which ``aggregate_kl`` follows.
        guide: Pyro guide of the same signature, without plates inside the one over the data.
        *args: Arguments of both.
        num_samples: S, draws per data point, at least 2.
        chunk: Latents scored side by side, each under a block of data points; None chooses.
        block: Rows in one run of the pair; None chooses.
        seed: Seed of the draws; leaves the global random state as it was.
        level: Confidence level of the intervals.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: Refused: all data as one data point have no information that tells data points apart.
        missing: See :func:`inference.iter_log_weights`.
        progress: Show a progress bar over the draws.
        **kwargs: Keyword arguments of both.

    Returns:
        The same as :func:`inference.mutual_information`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is not finite or has the wrong shape, model and guide are not a valid pair, or a site
            stands in a plate inside the one over the data.
    """
    check_count(num_samples, "num_samples", minimum=2)
    chunk = at_once(_CHUNK) if chunk is None else chunk
    check_count(chunk, "chunk")
    check_level(level)
    block = at_once(_BLOCK) if block is None else block
    check_count(block, "block")
    refuse_whole(whole)
    call = Call(model, guide, opened(args), kwargs, plate, missing=missing)
    call.check()
    with refuse_batch_dependence(model, guide):
        blocks = row_blocks(call, block)
        first = blocks[0].probe_density()
    first.refuse_masks()
    if first.layout.depth != 1:
        raise ValueError(f"expected a pair with the data plate alone, got plates {first.layout.depth} dimensions deep")
    with seeded(ranks().agreed(seed)):
        options: dict[str, Any] = {"num_samples": 2, "plate": plate, "missing": missing, "progress": False}
        rates = rate_distortion(model, guide, *args, **options, **kwargs).rates
        rounds = tqdm(range(num_samples), disable=not progress, desc="information bounds", unit="draw")
        found = [_ratios(blocks, chunk) for _ in rounds]
    own, others = (torch.stack(terms) for terms in zip(*found, strict=True))
    return information_report(own, others, rates.value, level)


def tightest(bounds: MutualInformation, terms: RateDistortion, entropy: float) -> tuple[float, float]:
    """The tighter of each side: the larger of H - D and InfoNCE, the smaller of R and the leave-one-out bound.

    Where noise sets a lower bound above an upper one, all that the bounds span.

    Args:
        bounds: From :func:`information_bounds` or :func:`inference.mutual_information`.
        terms: From :func:`inference.rate_distortion`, same pair and data.
        entropy: H of the distribution of the data in nats per data point.
    """
    lower, upper = terms.sandwich(entropy)
    centre = float(bounds.per_datum.mean())
    lowest, highest = centre - bounds.bias_bound, centre + bounds.bias_bound
    if max(lower, lowest) > min(upper, highest):
        return min(lower, lowest, upper), max(upper, highest, lower)
    return max(lower, lowest), min(upper, highest)


def _ratios(blocks: RowBlocks, chunk: int) -> tuple[Tensor, Tensor]:
    """One draw per data point: its log ratios to the mixture with and without its own component, (N,) each."""
    latents = joined((part.run().guide_values for part in blocks), blocks.number)
    num_data = len(next(iter(latents.values())))
    own, others = list[Tensor](), list[Tensor]()
    for i, part in enumerate(blocks):
        ours, rest = _scores(part, range(num_data)[blocks.place(i)], latents, chunk)
        own.append(ours)
        others = [torch.logaddexp(others[0], rest)] if others else [rest]
    return _log_ratios(torch.cat(own), others[0])


def _log_ratios(own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    num_data, with_own = len(own), torch.logaddexp(others, own)
    return own - with_own + math.log(num_data), own - others + math.log(max(num_data - 1, 1))


def _scores(call: Call, components: range, latents: Mapping[str, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """log q(z_n | x_n) of the rows of a call, (rows,), and log sum q(z_m | x_n) over the others of them, (N,)."""
    layout, own, others = call.probe().layout, list[Tensor](), list[Tensor]()
    for start in range(0, len(next(iter(latents.values()))), chunk):
        log_q = _cross(call, layout, {name: z[start : start + chunk] for name, z in latents.items()})
        shift = start - components.start
        diagonal = log_q.diagonal(shift)  # latents of the call's own rows, if there are some in this chunk
        own.append(diagonal.clone())
        diagonal.fill_(-math.inf)
        others.append(log_q.logsumexp(-1))
    return torch.cat(own), torch.cat(others)


def _cross(call: Call, layout: Layout, latents: Mapping[str, Tensor]) -> Tensor:
    """log q(z_m | x_n) of the drawn latents m under the data points n of a call, (latents, rows) in float64."""
    rows = layout.num_data
    values = {name: z.unsqueeze(1).expand(-1, rows, *z.shape[1:]) for name, z in latents.items()}
    (size,) = {len(value) for value in values.values()}
    guide = call.guide
    assert guide is not None
    manner = call.manners(size).guide
    with isolated():
        run = manner.run(call, guide, values, size)
    terms = [layout.per_datum(masked_log_prob(site), size) for site in run.drawn.values()]
    return torch.stack(terms).sum(0).double()
