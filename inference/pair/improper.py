"""Latents without a density on the support that they declare: masked or improper ones, and angles as real numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import Delta, ImproperUniform, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent, VonMises, constraints
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

if TYPE_CHECKING:
    from inference.pair.handlers import Site

_DRAWS, _FAR, _COORDINATES = 16, 1e4, 8
# A density that falls off has a mass of order one far out, in units of its mass inside.
_TOO_MUCH = math.log(100.0)


def layers(fn: Any) -> Iterator[Any]:
    """A distribution and those that it wraps, from the outside in."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def wraps(fn: Any, kind: type) -> bool:
    """Whether a distribution, or one that it wraps, is of a kind."""
    while fn is not None:
        if isinstance(fn, kind):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass."""
    return wraps(fn, Delta)


def is_masked_out(fn: Any) -> bool:
    """Whether a distribution is masked everywhere, by ``.mask(False)``."""
    return any(isinstance(layer, MaskedDistribution) and layer._mask is False for layer in layers(fn))


def on_circle(fn: Any) -> bool:
    """Whether a distribution is one of angles, in [-pi, pi), though it declares the real line."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, VonMises)


def support_of(fn: Any) -> Constraint:
    """The support over which a distribution integrates to one: an interval for angles, else what it declares.

    Raises:
        NotImplementedError: If it declares none, or is a mixture of components on supports that may differ.
    """
    if on_circle(fn):
        return constraints.independent(constraints.interval(-math.pi, math.pi), len(fn.event_shape))
    return _of_components(fn.support)


def _of_components(support: Constraint) -> Constraint:
    """A support with that of the components in place of a mixture's, for which no coordinates are known."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_of_components(support.base_constraint), support.reinterpreted_batch_ndims)
    if not isinstance(support, MixtureSameFamilyConstraint):
        return support
    common = support.base_constraint
    if any(isinstance(bound, Tensor) and bound.dim() for bound in _bounds(common)):
        raise NotImplementedError
    return common


def _bounds(support: Constraint) -> Iterator[Any]:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    yield from vars(support).values()


def latent_mask(fn: Any, mask: bool | Tensor | None) -> Tensor | None:
    """The mask of a site's value, by ``poutine.mask`` or by its distribution; None where nothing is masked."""
    found = [(mask, len(fn.event_shape))]
    found += [(part._mask, len(part.event_shape)) for part in layers(fn) if isinstance(part, MaskedDistribution)]
    masks = [_of_value(mask, event) for mask, event in found if mask is not None and mask is not True]
    if not masks:
        return None
    every = masks[0]
    for mask in masks[1:]:
        every = every & mask
    return None if bool(every.all()) else every


def _of_value(mask: bool | Tensor, event: int) -> Tensor:
    mask = torch.as_tensor(mask)
    return mask.reshape(mask.shape + (1,) * event)


def refuse_mask(name: str, site: Site) -> None:
    """Refuse a masked latent: its density is one on the whole line.

    Raises:
        ValueError: With the site's name.
    """
    if latent_mask(site.fn, site.mask) is not None:
        raise ValueError(f"expected no mask on latent site {name!r}, got one")


def check_latent(name: str, model: Site, guide: Site) -> None:
    """Check that both halves of a pair give a latent a density with respect to one measure.

    Raises:
        ValueError: If the latent is masked in one half alone, improper, or an angle in one half and a real number in
            the other; the message names it.
    """
    refuse_improper(name, model.fn)
    if not _same_mask(model, guide):
        raise ValueError(f"expected latent site {name!r} under the same mask in model and guide, got another")
    check_angles(name, model.fn, guide.fn, on_circle(model.fn), on_circle(guide.fn))


def _same_mask(model: Site, guide: Site) -> bool:
    masked_fn = wraps(model.fn, MaskedDistribution) or wraps(guide.fn, MaskedDistribution)
    if model.mask is guide.mask and not masked_fn:  # the common case, in which no tensor is read
        return True
    p, q = (latent_mask(site.fn, site.mask) for site in (model, guide))
    return p is q if p is None or q is None else not bool((p != q).any())


def check_angles(name: str, model: Any, guide: Any, model_is_angle: bool, guide_is_angle: bool) -> None:
    """Refuse a latent that is an angle in one half of a pair and a real number in the other.

    Raises:
        ValueError: With the site's name.
    """
    if model_is_angle != guide_is_angle and is_real(guide if model_is_angle else model):
        angle, line = ("model", "guide") if model_is_angle else ("guide", "model")
        raise ValueError(
            f"expected latent site {name!r} on one support in model and guide, got "
            f"{type(model if model_is_angle else guide).__name__} in the {angle}, which does not fall off on the real "
            f"line as angles do not, and {type(guide if model_is_angle else model).__name__}, which does, in the {line}"
        )


def refuse_improper(name: str, fn: Any) -> None:
    """Refuse a prior that is improper by declaration.

    Raises:
        ValueError: With the site's name.
    """
    if wraps(fn, ImproperUniform):
        raise ValueError(f"expected a proper distribution at latent site {name!r}, got ImproperUniform")


def is_real(fn: Any) -> bool:
    """Whether a distribution declares the real line in all its coordinates."""
    try:
        support = fn.support
    except NotImplementedError:
        return False
    while hasattr(support, "base_constraint"):  # of several coordinates, or of a mixture
        support = support.base_constraint
    return support is constraints.real


@torch.no_grad()
def is_periodic(fn: Any) -> bool:
    """Whether a density on the real line does not fall off along some coordinate, by trial far outside its draws.

    Draws a few values; the caller keeps the random state. A proper density has at most the mass one far out, however
    heavy its tails. Of many coordinates some are tried.
    """
    if not is_real(fn):
        return False
    draws = fn.sample((_DRAWS,))
    event = len(fn.event_shape)
    inside = fn.log_prob(draws).amax(0)
    span = (draws.amax(0) - draws.amin(0)).flatten(draws.dim() - 1 - event) if event else draws.amax(0) - draws.amin(0)
    numel = span.shape[-1] if event else 1
    chosen = range(0, numel, -(-numel // _COORDINATES))
    try:
        return any(_does_not_fall(fn, draws, span[..., k] if event else span, k, inside) for k in chosen)
    except ValueError:  # by validation: it has no density so far out
        return False


def _does_not_fall(fn: Any, draws: Tensor, span: Tensor, k: int, inside: Tensor) -> bool:
    """Whether the density stays up where coordinate k is shifted far out, by whole turns and by any angle."""
    event, few = len(fn.event_shape), draws[: _DRAWS // 2]
    shift = 2 * math.pi * (_FAR * span / (2 * math.pi)).ceil()
    steps = torch.linspace(1, 2, len(few), dtype=draws.dtype, device=draws.device)
    steps[::2] = 1.0
    moved = shift * steps.reshape(-1, *(1,) * shift.dim())
    if event:
        unit = torch.zeros(fn.event_shape, dtype=draws.dtype, device=draws.device).flatten()
        unit[k] = 1.0
        moved = moved.reshape(moved.shape + (1,) * event) * unit.reshape(fn.event_shape)
    outside = fn.log_prob(few + moved).amax(0)
    mass = outside - inside + (shift / span).log()
    return bool((mass > _TOO_MUCH).double().mean() > 0.5)
