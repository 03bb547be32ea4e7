"""The posterior of one data point beside the guides that approximate it. It touches no global state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from inference.core.figures import colour, figure_of, legend_above, one_panel
from inference.core.protocols import SupportsPosterior
from inference.pair.run import Program
from inference.posterior.log_joint import LogJoint

_MASSES = (0.99, 0.9, 0.5)
_SHADES = ("#F0F0F0", "#D5D5D5", "#B5B5B5")
_POINTS, _DRAWS = 161, 1000
# A first look goes so many times as far as the guides' draws; the figure shows what holds all but so much of the mass.
_FAR, _OUTSIDE = 4.0, 1e-3


def posterior_figure(
    model: Program, guides: Mapping[str, SupportsPosterior], x: Tensor, *, ax: Axes | None = None
) -> Figure:
    """Posterior of one data point with two real latents, shaded, and contours of guides; each holds 50, 90 or 99 %.

    Warning:
        The posterior is looked for around the guides: a mode far from all of them is not in the figure.

    Args:
        model: Pyro model.
        guides: By name, with a distribution ``posterior(x)`` of the latent.
        x: One data point, (1, D).
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If there is no guide, more than one data point, or the latent has not two dimensions.
    """
    joint = LogJoint(model, x)
    if not guides or joint.num_data != 1 or joint.dim != 2:
        raise ValueError(
            "expected at least one guide, one data point and two latent dimensions, got "
            f"{len(guides)}, {joint.num_data} and {joint.dim}"
        )
    with torch.no_grad():
        found = {name: guide.posterior(x) for name, guide in guides.items()}
        draws = torch.cat([q.sample((_DRAWS,))[:, 0] for q in found.values()])
        densities = {"posterior": joint, **{name: q.log_prob for name, q in found.items()}}
        middle, reach = draws.mean(0), _FAR * (draws - draws.mean(0)).abs().amax(0)
        axes = [torch.linspace(float(m - r), float(m + r), _POINTS).to(x) for m, r in zip(middle, reach)]
        axes = _around(axes, [_log_mass(density, axes) for density in densities.values()])
        values = {name: _log_mass(density, axes) for name, density in densities.items()}
    return _draw(one_panel(ax, (4.8, 4.2)), axes, values)


def _log_mass(density: object, axes: list[Tensor]) -> Tensor:
    """Log of the mass at each point of a grid, (G, G), the second coordinate first."""
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)
    values = density(grid.reshape(-1, 1, 2)).reshape(grid.shape[:-1])  # type: ignore[operator]
    return values - values.logsumexp((0, 1))


def _around(axes: list[Tensor], masses: list[Tensor]) -> list[Tensor]:
    """A finer grid that holds nearly all mass of each density."""
    ends = []
    for along, axis in zip((0, 1), axes):
        marginals = [mass.exp().sum(along).cumsum(0) for mass in masses]
        first = min(int((m > _OUTSIDE / 2).nonzero()[0]) for m in marginals)
        last = max(int((m < 1 - _OUTSIDE / 2).sum()) for m in marginals)
        step = axis[1] - axis[0]
        ends.append((float(axis[first] - step), float(axis[min(last, len(axis) - 1)] + step)))
    return [torch.linspace(*end, _POINTS).to(axes[0]) for end in ends]


def _levels(mass: Tensor) -> list[float]:
    """Log masses above which the given shares lie, ascending."""
    ordered = mass.flatten().sort(descending=True)[0]
    total = ordered.exp().cumsum(0)
    return [float(ordered[min(int((total < share).sum()), len(ordered) - 1)]) for share in _MASSES]


def _draw(ax: Axes, axes: list[Tensor], values: Mapping[str, Tensor]) -> Figure:
    across, up = (axis.cpu().numpy() for axis in axes)
    (_, truth), *others = values.items()
    ax.contourf(across, up, truth.cpu().numpy(), levels=[*_levels(truth), float(truth.max()) + 1], colors=_SHADES)
    handles: dict[str, Artist] = {"posterior": Patch(color=_SHADES[1])}
    for i, (name, value) in enumerate(others):
        ax.contour(
            across,
            up,
            value.cpu().numpy(),
            levels=_levels(value),
            colors=[colour(i)],
            linewidths=1.2,
            linestyles="solid",
        )
        handles[name] = Line2D([], [], color=colour(i))
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    legend_above(ax, handles)
    return figure_of(ax)
