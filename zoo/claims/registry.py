"""All claims, in the order of the papers and of their sections."""

from __future__ import annotations

from types import ModuleType

from zoo.claims import (
    alemi_exact,
    alemi_trained,
    fyffe_codes,
    fyffe_elbo,
    lucas_deep,
    lucas_linear,
    reizinger_limit,
    reizinger_sources,
)
from zoo.claims.claim import Claim

_MODULES = (
    lucas_linear,
    lucas_deep,
    alemi_exact,
    alemi_trained,
    reizinger_limit,
    reizinger_sources,
    fyffe_elbo,
    fyffe_codes,
)


def all_claims() -> list[Claim]:
    """Every claim, each with a name of its own.

    Example:
        >>> [claim.name for claim in all_claims()][:2]
        ['lucas-collapsed-column', 'lucas-no-further-maxima']
    """
    return [one for module in _MODULES for one in _claims_of(module)]


def chosen_claims(word: str | None) -> list[Claim]:
    """The claims whose name, paper or sentence has this word in it; all where there is none.

    Args:
        word: Part of a name, a paper or a sentence, in any case.

    Raises:
        ValueError: If no claim has it.
    """
    claims = all_claims()
    if word is None:
        return claims
    found = [one for one in claims if word.lower() in f"{one.name} {one.paper} {one.sentence}".lower()]
    if not found:
        names = ", ".join(one.name for one in claims)
        raise ValueError(f"expected part of a claim's name, paper or sentence, got {word!r}; the names are {names}")
    return found


def _claims_of(module: ModuleType) -> list[Claim]:
    return [value for value in vars(module).values() if isinstance(value, Claim)]
