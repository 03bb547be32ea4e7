"""One vocabulary over all entry points: a keyword means one thing, has one default, and is there where it has a use."""

import inspect

import pytest

import guides
import inference
import zoo

# What each shared keyword must default to, wherever it stands.
DEFAULTS = {
    "seed": None,
    "plate": None,
    "progress": True,
    "level": 0.95,
    "chunk": None,
    "block": None,
    "whole": False,
    "missing": False,
}
# In the zoo a seed is the name of what is made, a data set or a mixing: the same seed makes the same one.
MADE_BY_SEED = {"seed": 0}
# Spellings of the same ideas that no entry point may have.
RETIRED = {"batch_size", "tol", "confidence", "n_samples", "num_draws", "broadcastable", "random_state", "verbose"}
# Entry points that take a model and a guide but have no use for one of the keywords, and why.
WITHOUT = {
    "seed": {
        "check_pair": "returns no draws",
        "elbo_entropies": "draws nothing",
        "eubo": "draws nothing",
        "latent_kl": "draws nothing",
        "posterior_means": "draws nothing",
        "save_pair": "draws nothing",
        "load_pair": "draws nothing",
    },
    "plate": {
        "gradient_noise": "the objective has it",
        "card": "measures pairs of the zoo's form",
        "elbo_entropies": "asks posterior(x), runs no plate",
        "self_consistency": "asks posterior(x), runs no plate",
        "save_pair": "runs nothing",
        "load_pair": "runs nothing",
    },
    "whole": {
        "to_arviz": "sees by itself which latents are global",
        "reconstruct": "asks decode(z) for rows",
        "self_consistency": "asks posterior(x), runs no plate",
        "elbo_entropies": "asks posterior(x), runs no plate",
        "gradient_noise": "the objective has it",
        "save_pair": "runs nothing",
        "load_pair": "runs nothing",
    },
    "missing": {
        "self_consistency": "simulates its data",
        "elbo_entropies": "closed forms of the zoo's models",
        "gradient_noise": "runs the objective as it is",
        "card": "measures pairs of the zoo's form",
        "save_pair": "runs nothing",
        "load_pair": "runs nothing",
    },
    "progress": {
        "check_pair": "a few runs",
        "elbo_entropies": "one run",
        "eubo": "one run",
        "posterior_error": "two runs",
        "predictive": "one run",
        "reconstruct": "one run",
        "save_pair": "one file",
        "load_pair": "one file",
    },
}
# A mini-batch of training is no block of rows.
MAY_KEEP = {("fit", "batch_size")}

FUNCTIONS = {
    name: getattr(package, name)
    for package in (inference, guides, zoo)
    for name in package.__all__
    if inspect.isfunction(getattr(package, name))
}
OF_PAIRS = [name for name, f in FUNCTIONS.items() if {"model", "guide"} <= set(inspect.signature(f).parameters)]


def wrong_defaults(function):
    """Shared keywords whose default is another than the rule's, with what it is."""
    makes = function.__module__.startswith("zoo.") and not function.__name__.startswith("train_")
    rules = DEFAULTS | (MADE_BY_SEED if makes else {})
    parameters = inspect.signature(function).parameters
    found = {k: parameters[k].default for k in rules if k in parameters}
    return {k: default for k, default in found.items() if default not in (rules[k], inspect.Parameter.empty)}


def retired_names(name, function):
    """Parameters by a spelling that is no longer used."""
    return {p for p in inspect.signature(function).parameters if p in RETIRED and (name, p) not in MAY_KEEP}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shared_keywords_have_one_default(name):
    assert wrong_defaults(FUNCTIONS[name]) == {}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_entry_point_has_a_retired_spelling(name):
    assert retired_names(name, FUNCTIONS[name]) == set()


@pytest.mark.parametrize("keyword", WITHOUT)
@pytest.mark.parametrize("name", OF_PAIRS)
def test_entry_points_of_pairs_have_the_shared_keywords(name, keyword):
    has = keyword in inspect.signature(FUNCTIONS[name]).parameters
    assert has != (name in WITHOUT[keyword]), f"{name}: {keyword}"


def test_shared_keywords_are_keyword_only():
    for name, function in FUNCTIONS.items():
        for keyword, parameter in inspect.signature(function).parameters.items():
            if keyword in DEFAULTS:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}({keyword}=)"


def test_the_checks_find_what_they_should():
    def other(*, seed=0, progress=True, batch_size=3):
        """A signature with a default and a name that differ."""

    assert wrong_defaults(other) == {"seed": 0}
    assert retired_names("other", other) == {"batch_size"}
