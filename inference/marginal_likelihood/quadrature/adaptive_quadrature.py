r"""Adaptive quadrature of the evidence, for latents of one, two or three dimensions.

.. math:: \log p(x_n) = \log \int e^{\log p(x_n, T(u)) + \log |\det T'(u)|} \, du
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.checks import check_count
from inference.marginal_likelihood.base.method import Method, Problem
from inference.marginal_likelihood.base.result import NUMERICAL, Evidence, take_rows
from inference.marginal_likelihood.quadrature.check import contradicts, importance_estimate, saturated, where_sound
from inference.marginal_likelihood.quadrature.features import LOOSE, with_features
from inference.marginal_likelihood.quadrature.integrator import Integral, NestedIntegrator
from inference.marginal_likelihood.quadrature.slices import Density, Slices
from inference.posterior.misfit import search_unexplained
from inference.posterior.modes import Modes, prior_scale, search_modes

_MAX_DIM = 3
_LEAST_GRID = 5

# The tolerance on a line, at most: it costs hardly more than the search for peaks, and shows narrow dips.
_ON_A_LINE = 1e-7

# The least tolerance that the pair of rules can distinguish from rounding.
_LEAST_TOLERANCE = 1e-11

# The part of a loose tolerance that the rules' estimates have to keep within, and the part of any that is stated at
# least: about kinks, and edges of thin rings, the difference of two rules is now and then a third of the error of the
# better. Where it is small, it is far above the error.
_AIMED, _STATED = 0.25, 0.9

# The least error that is stated, in nats and relative to the value: rounding in the log joint density itself.
_FLOOR = 1e-12
_ROUNDING = 2e-15


class _Found(NamedTuple):
    """What refinements keep, lest further draws of the check overlook what the first ones contradict.

    Attributes:
        modes: Those of all data.
        hidden: Data that may have more or have mass where coordinates are rounded, (N,).
        check: The independent estimate of their evidence.
        location: Origin of the prior's unit, (N, d).
        scale: The prior's unit, (N, d).
    """

    modes: Modes
    hidden: Tensor
    check: Evidence
    location: Tensor
    scale: Tensor

    def rows(self, index: Tensor) -> _Found:
        modes, check = self.modes.rows(index), take_rows(self.check, index)
        return _Found(modes, self.hidden[index], check, self.location[index], self.scale[index])


@dataclass(frozen=True)
class Quadrature(Method):
    r"""Adaptive quadrature of the joint density over the latents of one to three dimensions.

    The modes are sought by Newton's method: from the best points of a grid, from draws of the prior, from draws of the
    guide where there is one, from both sides of the modes so found, and then from shifted grids and further draws until
    a look finds nothing new. The integral is taken one coordinate inside the other, from the direction in which the
    best mode is widest to that in which it is narrowest. In each, cells grow from the peaks, which are sought anew on
    every slice until a denser grid shows no more of them, and followed from line to line where they narrow, until the
    tail is negligible, and are halved until a Gauss-Kronrod pair agrees, and neighbours about their common edge. So
    thin curved ridges cost little more than round modes: only the innermost integral meets their width. An even grid
    over the posterior leads cells to isolated holes and hills that no node would meet: there the density departs from
    the polynomial of its neighbours. In three dimensions it has up to 120^3 points, and is left out at tolerances from
    1e-3 on, where it would see no more than the nodes. Independent draws from the prior and about the modes then check
    the value by importance sampling.

    Warning:
        The guarantee is ``"numerical"``: an error estimate, given the modes found from these starts. A mode that none
        leads to, such as a needle at 40 prior standard deviations, is not in the value nor in its error, unless the
        check meets it; so may be a peak whose surroundings, as far as the density rises towards it, hold less than a
        thousandth of the prior, and a hole or a hill in a wide posterior that neither a node nor the grid meets: one
        that changes the density, by a millionth of it, over less than a tenth of the posterior's standard deviation in
        two dimensions or an eighth in three, or that has another beside it. A Gaussian bump of a
        hundredth is wider. A guide that covers it leads to it. Where the data are far less likely at the best mode than
        what the model makes there, 2^18 further draws look for such a peak.

        Only the lower end of the importance estimate, ``"probabilistic"`` and without an upper one, is left to a data
        point that remains unexplained though its posterior is as wide as the prior, that the check contradicts, that
        would need more than ``max_cells`` cells, on which ever denser grids show
        ever more peaks, whose integral is not finite, or that has mass where the coordinates of a bounded support are
        rounded to its end (to one within 1e-16; Beta and Dirichlet distributions are exact there). Likelihoods that
        confine three dimensions to a thin closed surface are such. The latents are float64 throughout, and
        :func:`inference.evidence` converts modules with their data; a function that rounds to float32 inside is limited
        by that, which the error estimate does not include.

    References:
        Piessens, de Doncker-Kapenga, Ueberhuber, Kahaner, "QUADPACK", 1983.

    Args:
        grid: Points per dimension, within 8 standard deviations of the prior, of the grid on which modes are sought;
            also on every slice. In three dimensions three quarters as many at tolerances from 1e-3 on.
        num_draws: Draws from the prior that the search for modes starts from too; as many from the guide.
        tolerance: Relative error of the evidence p(x) that is stated, at least nine tenths of it; in one dimension it
            is 1e-7 at most. What the rules estimate of themselves is a quarter of it, or 1e-7 where that is more.
        max_cells: Cells of the innermost integral per data point at most, of 15 evaluations each; 11 at a tolerance of
            4e-3 and above.
        num_checks: Draws from the prior, and as many about the modes, of the importance estimate that checks the value.

    Example:
        >>> from inference import evidence
        >>> from zoo import PPCA
        >>> model, x = PPCA(5, 2).double(), torch.zeros(4, 5).double()
        >>> result = evidence(model, x, method="quadrature", seed=0, progress=False)
        >>> torch.allclose(result.value, model.log_evidence(x), atol=1e-9)
        True
    """

    grid: int = 33
    num_draws: int = 16
    num_checks: int = 512
    tolerance: float = 1e-7
    max_cells: int = 1_000_000
    name: ClassVar[str] = "quadrature"

    def __post_init__(self) -> None:
        check_count(self.grid, "grid", _LEAST_GRID)
        check_count(self.num_draws, "num_draws")
        check_count(self.num_checks, "num_checks", 2)
        check_count(self.max_cells, "max_cells")
        if not _LEAST_TOLERANCE <= self.tolerance < 1:
            raise ValueError(f"expected tolerance between {_LEAST_TOLERANCE} and 1, got {self.tolerance}")

    def estimate(self, problem: Problem) -> Evidence:
        """The evidence of all data of the problem, (N,).

        Raises:
            ValueError: If the latents have more than three dimensions, or no argument of the model has a row for each
                data point.
        """
        return self.attempt(problem)[0]

    @torch.no_grad()
    def attempt(self, problem: Problem) -> tuple[Evidence, Tensor]:
        """The evidence of all data, and which ran out of cells while nothing else speaks against them, (N,) each.

        Raises:
            ValueError: See :meth:`estimate`.
        """
        log_joint = problem.log_joint
        if log_joint.dim > _MAX_DIM:
            raise ValueError(f"expected at most {_MAX_DIM} latent dimensions for quadrature, got {log_joint.dim}")
        modes, hidden, check, location, scale = problem.keep(self.name, lambda: self._found(problem))
        found, sound, exhausted = self._integrated(problem, Density.around(log_joint, modes, location, scale))
        sound &= ~hidden & ~contradicts(check, found.value, found.upper - found.value)
        result = where_sound(sound, found, check)
        return replace(result, evaluations=log_joint.evaluations / log_joint.num_data), exhausted & ~hidden

    def refined(self) -> Quadrature:
        """With four times the cells, for data that ran out of them, and a tenth of the tolerance."""
        return replace(self, max_cells=4 * self.max_cells, tolerance=max(0.1 * self.tolerance, _LEAST_TOLERANCE))

    def _found(self, problem: Problem) -> _Found:
        log_joint = problem.log_joint
        location, scale = prior_scale(log_joint)
        draws = [log_joint.sample_prior(self.num_draws).to(location)]
        if problem.call.guide is not None:
            draws.append(log_joint.sample_guide(problem.call.guide, self.num_draws)[0].to(location))
        coarse = log_joint.dim == _MAX_DIM and self.tolerance >= LOOSE
        grid = max(_LEAST_GRID, 3 * self.grid // 4) if coarse else self.grid
        modes = search_modes(log_joint, draws, location, scale, grid=grid)
        modes, odd = search_unexplained(log_joint, modes, location, scale)
        check = importance_estimate(log_joint, modes, location, scale, self.num_checks, problem.level)
        return _Found(modes, odd | saturated(log_joint, modes), check, location, scale)

    def _integrated(self, problem: Problem, density: Density) -> tuple[Evidence, Tensor, Tensor]:
        """The evidence of all data, where nothing speaks against it, and which have used up their cells, (N,) each."""
        num_data = len(density.origin)
        tolerance = self.tolerance if problem.log_joint.dim > 1 else min(self.tolerance, _ON_A_LINE)
        density = with_features(density, tolerance)
        datum = torch.arange(num_data, device=density.origin.device)
        whole = Slices(density, datum, density.origin.new_zeros(num_data, 0), self.grid)
        with tqdm(disable=not problem.progress, desc="quadrature", unit="cell") as bar:
            aim = min(tolerance, max(_AIMED * tolerance, _ON_A_LINE))
            integrator = NestedIntegrator(num_data, aim, self.max_cells, bar, like=density.origin)
            value, error = integrator.integrate(whole)
        stated = torch.maximum(error, _STATED * tolerance * value)
        found = self._evidence(density, Integral(value, stated), problem.level)
        sound = ~integrator.exhausted & ~integrator.unsettled & found.lower.isfinite() & found.upper.isfinite()
        return found, sound, integrator.exhausted

    def _evidence(self, density: Density, integral: Integral, level: float) -> Evidence:
        value = density.shift + integral.value.log() + torch.linalg.slogdet(density.frame).logabsdet
        part = integral.error / integral.value
        floor = _FLOOR + _ROUNDING * density.shift.abs()
        return Evidence(
            value=value,
            lower=value - torch.maximum(floor, -torch.log1p(-part.clamp(max=1))),
            upper=value + torch.maximum(floor, torch.log1p(part)),
            standard_error=torch.zeros_like(value),
            guarantee=(NUMERICAL,) * len(value),
            level=level,
            method=self.name,
        )
