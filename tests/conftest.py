"""Fixtures: ``model``, ``pair``, ``make_model`` and ``make_pair`` run a test on all of the registry."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a display
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side: threads of torch would only fight

import pyro
import pytest
import torch
from registry import MODELS, PAIRS, build_pair


@pytest.fixture(params=list(MODELS))
def make_model(request):
    """A function that makes a new model; the test runs once for each in the registry."""
    return MODELS[request.param]


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(params=PAIRS, ids="-".join)
def make_pair(request):
    """A function that makes a new (model, guide); the test runs once for each in the registry."""
    return lambda: build_pair(*request.param)


@pytest.fixture
def pair(make_pair):
    return make_pair()


# Torch shows some warnings once a process, and warnings are errors here: let no test depend on which one came first.
torch.set_warn_always(True)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from one seed, whatever ran before it, and leaves the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _own_param_store():
    """An empty parameter store for every test: tests of users' pairs register fixed names such as "decoder" in it."""
    with pyro.get_param_store().scope():
        yield


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
