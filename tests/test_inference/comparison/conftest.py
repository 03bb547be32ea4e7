"""Comparisons that several tests read."""

import numpy as np
import pytest
import torch
from compared_guides import (
    HELD_OUT_LOG_DET,
    data,
    make_model,
    mean_field,
    measure,
    nonlinear_guide,
    nonlinear_model,
    train_linear,
)

from guides import Exact, TiedMeanField


@pytest.fixture(scope="module")
def case():
    """A model, three guides, training and held-out data, and their comparison."""
    model = make_model()
    guides = {"exact": Exact(model), "tied": TiedMeanField(model), "untrained": mean_field()}
    x, y = data(model, 30, 1), 1 + data(model, 12, 2)
    tree = measure(model, guides, x, held_out=y, log_det=0.5, held_out_log_det=HELD_OUT_LOG_DET, seed=7)
    return model, guides, {"train": x, "held_out": y}, tree


@pytest.fixture
def tree(case):
    return case[3]


# --- seeds -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeded_tree():
    model = make_model()
    x = data(model, 30, 1)
    factories = {"linear": train_linear(model, x), "tied": lambda _: TiedMeanField(model)}
    return measure(model, factories, x, seeds=[3, 1, 2], seed=0), model, x


# --- a model without closed form -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pooled():
    random = np.random.RandomState(0)
    z = random.standard_normal(12)
    x = np.stack([np.tanh(2 * z), z**2], -1) + 0.5 * random.standard_normal((12, 2))
    guides = {"wide": nonlinear_guide(0.5, 1.0), "wider": nonlinear_guide(0.0, 1.5)}
    x = torch.from_numpy(x)
    return guides, x, measure(nonlinear_model, guides, x, num_samples=4000, seed=1)
