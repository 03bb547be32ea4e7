"""The support of a latent, as a constraint and as what a file can hold of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from inference.distributions.transformed import coordinate_support, is_unbounded, vector_support

Bounds = Sequence[float | None]


def read_support(support: Constraint | Bounds) -> Constraint:
    """A support of vectors from a constraint on vectors or on each coordinate, or from two bounds.

    Bounds that are one number for all coordinates become that number, so that the support follows its guide to any
    device; those that differ stay tensors where they are.

    Args:
        support: The constraint, or (lower, upper) of which one or both may be None.

    Raises:
        TypeError: If it is neither.
        ValueError: See :func:`inference.distributions.transformed.vector_support`.
    """
    if isinstance(support, list | tuple) and len(support) == 2:
        return vector_support(_between(*support))
    vector = vector_support(support)  # type: ignore[arg-type]
    bounds = _bounds(vector)
    return vector if bounds is None else vector_support(_between(*bounds))


def describe_support(support: Constraint) -> dict[str, Any]:
    """The constructor argument ``support`` as a JSON value; nothing where it is all vectors.

    Raises:
        NotImplementedError: If the support is not given by one lower and one upper bound.
    """
    if is_unbounded(support):
        return {}
    bounds = _bounds(support)
    if bounds is None:
        raise NotImplementedError(f"a guide on {support} cannot be rebuilt from a file alone")
    return {"support": list(bounds)}


def _between(lower: float | None, upper: float | None) -> Constraint:
    if lower is None:
        return constraints.real if upper is None else constraints.less_than(upper)
    return constraints.greater_than(lower) if upper is None else constraints.interval(lower, upper)


def _bounds(support: Constraint) -> tuple[float | None, float | None] | None:
    """Lower and upper bound where both are the same for every coordinate, else None."""
    one = coordinate_support(support)
    if not isinstance(one, _BOUNDED):
        return None
    bounds = [_number(getattr(one, name, None)) for name in ("lower_bound", "upper_bound")]
    return None if any(isinstance(bound, Tensor) for bound in bounds) else (bounds[0], bounds[1])


_BOUNDED = (
    constraints.interval,
    constraints.half_open_interval,
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
)


def _number(bound: Any) -> Any:
    if not isinstance(bound, Tensor):
        return bound
    return bound.flatten()[0].item() if bool((bound == bound.flatten()[0]).all()) else bound
