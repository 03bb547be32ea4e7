r"""The toy model of "Fixing a Broken ELBO": 30 symbols, 30 codes, and all of rate, distortion and information exact.

Data: a class z* in {0, 1}, a Gaussian around the mean of the class, cut into 30 bins; x is the number of the bin, and
I(x; z*) = 0.5 nats. Model: with scalar positions s_j of the symbols and t_i of the codes,

.. math::
    e(z_i \mid x_j) \propto \exp[-(w^e_i s_j - b^e_i)^2], \quad
    d(x_j \mid z_i) \propto \exp[-(w^d_j t_i - b^d_j)^2], \quad m(z_i) \propto \exp \pi_i,

each normalised over what it draws: 60 parameters for the encoder, 60 for the decoder, 30 for the marginal.

The paper prints neither the means and deviations of the classes nor its scale of positions. The calibration here gives
I(x; z*) = 0.5 and the peaks of its Figure 2(i). Its formula for the decoder indexes w and b by the code; so read, no
code can have a distribution with two modes, which its figure shows, hence the reading above.

References:
    Alemi, Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018, arXiv 1711.00464, section 4 and
    appendix E.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from inference.core.checks import check_count
from inference.core.seeding import seeded
from zoo.benchmarks.categorical_channel import ChannelTerms, channel_terms, mutual_information_of

Loss = Callable[[ChannelTerms], Tensor]
NUM_SYMBOLS = 30
CLASS_PROBABILITIES = (0.7, 0.3)
CLASS_MEANS = (9.6, 19.0)
CLASS_SIGMAS = (2.24350, 3.47743)


def toy_data() -> Tensor:
    r"""Joint distribution of class and symbol, log p(z*, x), (2, 30) in float64: H(x) = 2.86291, I(x; z*) = 0.5 nats.

    Each class is a Gaussian cut into bins of unit width around 0, ..., 29 and renormalised.

    Example:
        >>> -(toy_data().logsumexp(0).exp() * toy_data().logsumexp(0)).sum()
        tensor(2.8629, dtype=torch.float64)
    """
    edges = torch.arange(NUM_SYMBOLS + 1, dtype=torch.float64) - 0.5
    means, sigmas, weights = (
        torch.tensor(values, dtype=torch.float64)[:, None]
        for values in (CLASS_MEANS, CLASS_SIGMAS, CLASS_PROBABILITIES)
    )
    standard = (edges - means) / sigmas
    # Probabilities of the upper tail lose their digits in 1 - cdf: turn the bins there round.
    low, high = standard[:, :-1], standard[:, 1:]
    upper = low > 0
    bins = torch.special.ndtr(torch.where(upper, -low, high)) - torch.special.ndtr(torch.where(upper, -high, low))
    return (weights * bins / bins.sum(-1, keepdim=True)).log()


class ToyChannel(nn.Module):
    """Toy channel: encoder, decoder and marginal of the stated form, several runs side by side.

    The parameters begin standard normal. Runs share no parameter, so that with Adam each trains as if it were alone.

    Args:
        runs: S, independent copies.
        num_symbols: Symbols, and codes.

    Attributes:
        encoder: w and b of the encoder, (2, S, Z).
        decoder: w and b of the decoder, (2, S, X).
        marginal: Logits of the marginal, (S, Z).
    """

    positions: Tensor

    def __init__(self, runs: int = 1, *, num_symbols: int = NUM_SYMBOLS) -> None:
        super().__init__()
        check_count(runs, "runs")
        check_count(num_symbols, "num_symbols", minimum=2)
        self.encoder, self.decoder = (
            nn.Parameter(torch.randn(2, runs, num_symbols, dtype=torch.float64)) for _ in range(2)
        )
        self.marginal = nn.Parameter(torch.randn(runs, num_symbols, dtype=torch.float64))
        # Positions 0, 1, ..., 29 themselves train badly.
        self.register_buffer("positions", torch.linspace(0, 1, num_symbols, dtype=torch.float64))

    def distributions(self) -> tuple[Tensor, Tensor, Tensor]:
        """log e(z | x) (S, X, Z), log d(x | z) (S, Z, X) and log m(z) (S, Z)."""
        return self._distribution(self.encoder), self._distribution(self.decoder), self.marginal.log_softmax(-1)

    def _distribution(self, parameters: Tensor) -> Tensor:
        """Log-probabilities (S, in, out) of the symbols drawn, given the positions of those that are given."""
        w, b = parameters.unsqueeze(-2)
        return (-(w * self.positions[:, None] - b).square()).log_softmax(-1)

    def terms(self, log_p: Tensor) -> ChannelTerms:
        """Entropy, distortion, rate and information of each run, (S,) in nats, for data log p(x) (X,)."""
        return channel_terms(log_p, *self.distributions())


def class_information(log_joint: Tensor, log_encoder: Tensor) -> Tensor:
    """Mutual information I(z; z*) of code and class, (...) in nats.

    Args:
        log_joint: log p(z*, x), (C, X), for example from :func:`toy_data`.
        log_encoder: log e(z | x), (..., X, Z).
    """
    return mutual_information_of((log_joint[:, :, None] + log_encoder.unsqueeze(-3)).logsumexp(-2))


def beta_loss(beta: float = 1.0) -> Loss:
    """Beta-VAE loss D + beta R; beta one is minus the ELBO.

    Warning:
        At beta one all rates up to H are tied for a decoder and a marginal that fit, so the rate creeps to zero: of 20
        runs of 15000 steps 18 ended below 0.01 nats, two at 0.011 and 0.016.

    Args:
        beta: Weight of the rate.
    """
    return lambda terms: terms.distortion + beta * terms.rate


def target_rate_loss(target: float, *, weight: float = 1.0) -> Loss:
    r"""Target-rate loss D + w \|sigma - R\|: the least distortion at the target rate sigma.

    Warning:
        At weight one, the paper's, this is the ELBO wherever R exceeds the target: it holds the rate at the target
        only if the rate of the ELBO's optimum is no larger. Below that, the weight must exceed -dD/dR at the target.

    Args:
        target: sigma in nats.
        weight: w.
    """
    return lambda terms: terms.distortion + weight * (target - terms.rate).abs()


def train_channel(
    log_p: Tensor,
    loss: Loss,
    *,
    runs: int = 1,
    steps: int = 15_000,
    learning_rate: float = 0.02,
    seed: int | None = None,
    progress: bool = True,
) -> ToyChannel:
    """Train channels on exact sums by Adam, the learning rate falling to zero along a cosine.

    Args:
        log_p: log p(x), (X,) in float64.
        loss: The loss of each run from its terms, such as :func:`beta_loss` and :func:`target_rate_loss`.
        runs: S, channels trained side by side from different starts.
        steps: Steps of Adam.
        learning_rate: Of the first step.
        seed: Seed of the starts; leaves the global random state as it was.
        progress: Show a progress bar.

    Raises:
        ValueError: If log_p is not the logarithm of a distribution.
    """
    check_count(steps, "steps")
    if log_p.dim() != 1 or not abs(float(log_p.logsumexp(0))) < 1e-9:
        raise ValueError(f"expected log p(x) of shape (X,) whose exponentials sum to one, got {log_p}")
    with seeded(seed):
        channel = ToyChannel(runs, num_symbols=len(log_p)).to(log_p)
    optimizer = torch.optim.Adam(channel.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), disable=not progress, desc="toy channel"):
        optimizer.zero_grad()
        loss(channel.terms(log_p)).sum().backward()
        optimizer.step()
        scheduler.step()
    return channel
