"""Fixtures of the bounds."""

import pytest
import torch
from bounded_pairs import MAKE_GUIDE, NUM_DATA, make_model

# --- pairs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def x(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model(n=NUM_DATA)


@pytest.fixture(scope="module")
def guides(model, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return {name: make(model, x).requires_grad_(False) for name, make in MAKE_GUIDE.items()}
