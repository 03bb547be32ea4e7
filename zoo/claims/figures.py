"""Figures of claims, drawn from what their runs computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import pad

from inference.core.figures import colour, legend_above, one_panel, panels
from inference.core.seeding import random_state
from inference.plots import traversal_figure
from zoo.benchmarks import OptimalDecoder
from zoo.claims.alemi_trained import BETAS, binary_digits, steps_of, trained_pair
from zoo.claims.claim import Settings
from zoo.claims.fyffe_codes import codes
from zoo.claims.lucas_linear import elbo_of, mean_of, scaled_digits
from zoo.claims.reizinger_limit import limits
from zoo.linear import PPCA, LinearVAE

_SIZE, _SHOWN = (5.6, 3.6), 10


def latent_dims(settings: Settings) -> Figure:
    """log p and the best ELBO against K, with sigma^2 learnt, and fixed at its optimum for K = 50."""
    x, dims = scaled_digits(), range(40, 62, 2)
    sigma = float(PPCA.from_data(x, 50).sigma.detach())
    ax = one_panel(None, _SIZE)
    for place, (name, fixed) in enumerate({"learnt": None, "of K = 50": sigma}.items()):
        log_p = [mean_of(PPCA.from_data(x, k, sigma=fixed), x) for k in dims]
        elbo = [elbo_of(LinearVAE.optimum(x, k, sigma=fixed), x) for k in dims]
        ax.plot(dims, log_p, color=colour(place), linewidth=3, alpha=0.4, label=f"log p, sigma^2 {name}")
        ax.plot(dims, elbo, ".", color=colour(place), label=f"best ELBO, sigma^2 {name}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return labelled(ax, "latent dimension K", "nats per data point")


def from_encoding_to_decoding(settings: Settings) -> Figure:
    """Data, and the reconstructions and samples of a model for each beta."""
    x = binary_digits()[:_SHOWN]
    figure, axes = panels(None, 1 + len(BETAS), 2, (8, 3.6))
    show_images(axes[0], x, "data")
    axes[1].set_axis_off()
    for row, beta in enumerate(BETAS, start=1):
        model, guide = trained_pair("---", beta, steps_of(settings), settings.seed)
        with torch.no_grad(), random_state(0):
            reconstructed = model.decode(guide.posterior(x).rsample())  # type: ignore[operator]
            sampled = model.decode(model.prior().sample((_SHOWN,)))
        show_images(axes[2 * row], reconstructed, f"beta = {beta:g}: reconstructions")
        show_images(axes[2 * row + 1], sampled, f"beta = {beta:g}: samples")
    return figure


def show_images(ax: Axes, flat: Tensor, title: str) -> None:
    """Images of 8 x 8 pixels side by side."""
    apart = pad(flat.unflatten(1, (8, 8)), (1, 1), value=0.5)
    ax.imshow(apart.transpose(0, 1).flatten(1).numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_axis_off()


def vanishing_noise(mixing: str, settings: Settings) -> Figure:
    """The gaps of the best Gaussians against gamma^2, and C_IMA."""
    found, contrast = limits(mixing, settings)
    ax = one_panel(None, _SIZE)
    curves = {
        "independent coordinates": [one.gap for one in found.values()],
        "against the noiseless log p": [one.noiseless for one in found.values()],
        "full covariance": [one.full_gap for one in found.values()],
    }
    precisions = [10.0**exponent for exponent in found]
    for place, ((name, values), style) in enumerate(zip(curves.items(), ("o-", "s-", "^--"), strict=True)):
        ax.plot(precisions, values, style, color=colour(place), markersize=4, label=name)
    ax.axhline(contrast, color="black", linestyle=":", label="C_IMA")
    ax.set_xscale("log")
    return labelled(ax, "gamma^2", "log p - ELBO* (nats)")


def optimal_decoder(settings: Settings) -> Figure:
    """What the optimal decoder of an encoder of digits gives along either code."""
    posterior, x = codes()
    reach = posterior.mean.abs().amax(0)
    return traversal_figure(OptimalDecoder(posterior, x), torch.zeros(2).to(x), reach=reach, number=11, image=(8, 8))


def labelled(ax: Axes, x_label: str, y_label: str) -> Figure:
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.grid(alpha=0.3)
    legend_above(ax)
    assert isinstance(ax.figure, Figure)
    return ax.figure


FIGURES: Mapping[str, Callable[[Settings], Figure]] = {
    "lucas-against-latent-dim": latent_dims,
    "alemi-reconstructions": from_encoding_to_decoding,
    "reizinger-gap-to-contrast": partial(vanishing_noise, "triangular"),
    "reizinger-control": partial(vanishing_noise, "turned"),
    "fyffe-smooth-decoder": optimal_decoder,
}
