"""All classic models with data of their own."""

from __future__ import annotations

from inference.core.seeding import seeded
from zoo.classics.discrete import dirichlet_multinomial, gaussian_mixture, hidden_markov
from zoo.classics.hierarchies import eight_schools, funnel
from zoo.classics.reference import Classic
from zoo.classics.regressions import gaussian_process, horseshoe_regression, linear_regression, logistic_regression
from zoo.classics.series import state_space

_MAKERS = (
    eight_schools,
    linear_regression,
    gaussian_process,
    logistic_regression,
    gaussian_mixture,
    hidden_markov,
    state_space,
    dirichlet_multinomial,
    funnel,
    horseshoe_regression,
)


def classic_models(*, seed: int = 0) -> list[Classic]:
    """Classic models as plain Pyro programs, each with data, its evidence and posterior moments by independent means.

    Means are closed forms, grids over one or two numbers, the forward algorithm and the Kalman filter.

    Args:
        seed: Seed of the data, where they are generated; leaves the global random state as it was.

    Example:
        >>> schools = classic_models()[0]
        >>> round(schools.log_evidence, 4)
        -32.4188
    """
    with seeded(seed):
        return [make() for make in _MAKERS]
