"""Claims of "Fixing a Broken ELBO" on channels of finitely many symbols, where every term is an exact sum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from inference.information import water_filling
from zoo.benchmarks import (
    ChannelTerms,
    ToyChannel,
    beta_loss,
    channel_terms,
    class_information,
    divergence,
    generated,
    optimal_decoder,
    optimal_marginal,
    target_rate_loss,
    toy_data,
    train_channel,
)
from zoo.claims.claim import Measured, Settings, at_least, at_most, claim, close
from zoo.claims.lucas_linear import scaled_digits
from zoo.linear import spectrum

ALEMI = "Alemi et al. 2018"
_CHANNELS = 200  # drawn at random, of 12 symbols and 9 codes


def random_channels(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(x), and logarithms of encoders, decoders and marginals, from normal logits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (12,), (_CHANNELS, 12, 9), (_CHANNELS, 9, 12), (_CHANNELS, 9)
    logits = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    log_p, encoder, decoder, marginal = (part.log_softmax(-1) for part in logits)
    return log_p, encoder, decoder, marginal


@claim(ALEMI, "H - D and R bound the mutual information of data and code from below and above", universal=True)
def information_bounds(settings: Settings) -> Sequence[Measured]:
    log_p, encoder, decoder, marginal = random_channels(settings.seed)
    # Close to the best decoder and marginal the bounds are so narrow that an error of either would leave them.
    partners = zip(ideal_partners(log_p, encoder), (decoder, marginal), strict=True)
    near = ((best + 0.01 * other).log_softmax(-1) for best, other in partners)
    return [
        *sandwich(channel_terms(log_p, encoder, decoder, marginal)),
        *sandwich(channel_terms(log_p, encoder, *near), "near-optimal "),
    ]


def sandwich(terms: ChannelTerms, kind: str = "") -> list[Measured]:
    """The least distances of H - D, I and R, in this order, over channels."""
    below = terms.information - (terms.entropy - terms.distortion)
    return [
        at_least(f"least I less its lower bound, {_CHANNELS} {kind}channels, nats", float(below.min()), -1e-12),
        at_least("least upper bound less I, nats", float((terms.rate - terms.information).min()), -1e-12),
    ]


@claim(
    ALEMI,
    "Appendix C: the generative mutual information lies between E = E log e(z|x) / m(z) and G = E log d(x|z) / q(x)",
    universal=True,
)
def generative_bounds(settings: Settings) -> Sequence[Measured]:
    _, encoder, decoder, marginal = random_channels(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    q = torch.randn(_CHANNELS, 12, generator=generator, dtype=torch.float64).log_softmax(-1)
    # The model's joint distribution is that of a channel from codes to symbols: decoder and encoder change places.
    turned = [channel_terms(m, d, e, own) for m, d, e, own in zip(marginal, decoder, encoder, q, strict=True)]
    terms = ChannelTerms(*(torch.stack(parts) for parts in zip(*turned, strict=True)))
    ideal = channel_terms(marginal[0], decoder[0], *ideal_partners(marginal[0], decoder[0]))
    tight = float(ideal.rate - (ideal.entropy - ideal.distortion))
    return [*sandwich(terms), close("G - E with the model's own posterior and evidence, nats", tight, 0, 1e-10)]


def ideal_partners(log_p: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
    """The best decoder and marginal for an encoder."""
    return optimal_decoder(log_p, encoder), optimal_marginal(log_p, encoder)


@claim(ALEMI, "Appendix D: with the optimal decoder and marginal of an encoder both bounds are tight", universal=True)
def tight_bounds(settings: Settings) -> Sequence[Measured]:
    log_p, encoder, _, _ = random_channels(settings.seed)
    terms = channel_terms(log_p, encoder, *ideal_partners(log_p, encoder))
    width = (terms.rate - (terms.entropy - terms.distortion)).abs().max()
    return [close(f"largest R - (H - D), {_CHANNELS} channels, nats", float(width), 0, 1e-10)]


def hand_made() -> dict[str, Tensor]:
    """Encoders of the toy data: one that knows nothing, one that draws the class, one that copies the symbol."""
    joint = toy_data()
    log_p = joint.logsumexp(0)
    eye = torch.eye(len(log_p), dtype=log_p.dtype)
    return {"nothing": torch.zeros(len(log_p), 1).to(log_p), "class": (joint - log_p).mT, "symbol": eye.log()}


@claim(ALEMI, "Models of one ELBO may have any rate between 0 and H: the ELBO does not tell them apart")
def same_elbo(settings: Settings) -> Sequence[Measured]:
    log_p = toy_data().logsumexp(0)
    found = [channel_terms(log_p, e, *ideal_partners(log_p, e)) for e in hand_made().values()]
    totals = torch.stack([t.rate + t.distortion for t in found])
    rates = torch.stack([t.rate for t in found])
    return [
        at_most("spread of the ELBO of three encoders, nats", float(totals.max() - totals.min()), 1e-10),
        at_least("spread of their rates, in units of H", float((rates.max() - rates.min()) / found[0].entropy), 0.99),
    ]


@cache
def trained(kind: str, steps: int, seed: int) -> ToyChannel:
    """A toy channel trained by the ELBO, or at the target rate."""
    loss = beta_loss() if kind == "ELBO" else target_rate_loss(0.5, weight=2.0)
    channel = train_channel(toy_data().logsumexp(0), loss, runs=3, steps=steps, seed=seed, progress=False)
    return channel.requires_grad_(False)


def steps_of(settings: Settings) -> int:
    return 15_000 if settings.paper_scale else 6000


def toy_numbers(kind: str, settings: Settings) -> dict[str, Tensor]:
    """Rate, ELBO below its maximum, KL(p || g) and I(z; z*) of each run, (S,)."""
    joint = toy_data()
    log_p = joint.logsumexp(0)
    channel = trained(kind, steps_of(settings), settings.seed)
    terms, (encoder, decoder, marginal) = channel.terms(log_p), channel.distributions()
    short = terms.rate + terms.distortion - terms.entropy
    fit = divergence(log_p, generated(decoder, marginal))
    return {"rate": terms.rate, "short": short, "fit": fit, "class": class_information(joint, encoder)}


_ENTROPY = 2.86291  # of the toy data, in nats
_TOY = "the calibration of the toy data is ours: the paper prints I(x; z*) = .5 alone"


@claim(ALEMI, "Toy model: trained by the ELBO it ignores its code", paper_number=f"R = .0002 ({_TOY})")
def toy_elbo(settings: Settings) -> Sequence[Measured]:
    found = toy_numbers("ELBO", settings)
    return [
        at_most("largest R of three starts, in units of H", float(found["rate"].max()) / _ENTROPY, 0.01),
        at_most("largest R + D - H, nats", float(found["short"].max()), 0.002),
    ]


@claim(ALEMI, "Toy model: at a target rate of .5 it has that rate and fits as well", paper_number=f"R = .4999 ({_TOY})")
def toy_target(settings: Settings) -> Sequence[Measured]:
    found = toy_numbers("target", settings)
    away = (found["rate"] - 0.5).abs().max()
    return [
        close("largest |R - .5| of three starts, nats", float(away), 0, 0.003),
        at_most("largest R + D - H, nats", float(found["short"].max()), 0.02),
    ]


@claim(
    ALEMI,
    "Figure 2, toy model: both models generate the data's distribution, but only the code of the target rate has the "
    "classes",
)
def toy_figure(settings: Settings) -> Sequence[Measured]:
    plain, target = toy_numbers("ELBO", settings), toy_numbers("target", settings)
    return [
        at_most("KL(p || g), largest of both, nats", float(torch.cat([plain["fit"], target["fit"]]).max()), 0.01),
        at_most("I(z; z*) of the ELBO, largest, nats", float(plain["class"].max()), 0.02),
        at_least("I(z; z*) at the target rate, mean over starts, nats", float(target["class"].mean()), 0.15),
    ]


@claim(
    ALEMI, "The largest likelihood does not make a good code: at one ELBO, I(z; z*) is that of the best code or zero"
)
def likelihood_and_code(settings: Settings) -> Sequence[Measured]:
    joint = toy_data()
    log_p = joint.logsumexp(0)
    best = hand_made()["class"]
    terms = channel_terms(log_p, best, *ideal_partners(log_p, best))
    plain = toy_numbers("ELBO", settings)
    return [
        at_most("ELBO of the code by hand less that trained, nats", float(plain["short"].max()), 0.002),
        at_least("I(z; z*) of the code by hand, nats", float(class_information(joint, best)), 0.3),
        at_most("I(z; z*) of the code trained, nats", float(plain["class"].max()), 0.02),
        close("R + D - H of the code by hand, nats", float(terms.rate + terms.distortion - terms.entropy), 0, 1e-10),
    ]


@claim(ALEMI, "beta is minus the slope of the rate-distortion curve", universal=True)
def slope(settings: Settings) -> Sequence[Measured]:
    lam, found = spectrum(scaled_digits()).eigenvalues, []
    for beta in (0.4, 1.3, 4.1):
        low, high = (water_filling(lam, 0.05, 10, beta=beta * factor) for factor in (1 - 1e-4, 1 + 1e-4))
        fallen = -(high.distortion - low.distortion) / (high.rate - low.rate)
        found.append(close(f"-dD/dR at beta = {beta:g}", fallen, beta, 1e-3 * beta))
    return found
