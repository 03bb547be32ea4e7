"""Whether one distribution of a latent has a density wherever another has: by draws, and by trial at the ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from inference.pair.improper import support_of

_DRAWS, _FAR, _WIDE = 16, 30.0, 1e9


@torch.no_grad()
def reaches(fn: Any, other: Any) -> bool:
    """Whether a distribution's support holds that of another of one latent; draws a few values.

    Tried where the other is drawn and at the ends of its support. True where a support is not declared.
    """
    try:
        own, whole = support_of(fn), support_of(other)
        values = torch.cat([other.sample(torch.Size([_DRAWS])), *_ends(other)])
        inside = whole.check(values)
        return bool((own.check(values) | ~inside).all())
    except (NotImplementedError, RuntimeError, ValueError):  # nothing is known, or the two have different shapes
        return True


def _ends(fn: Any) -> list[Tensor]:
    """Values at the ends of a distribution's support, with one sample on the left; none where it has no coordinates."""
    try:
        transform = biject_to(support_of(fn))
        raw = transform.inv(fn.sample(torch.Size([1])))
        return [transform(torch.full_like(raw, end)) for end in (-_WIDE, -_FAR, _FAR, _WIDE)]
    except NotImplementedError:
        return []
