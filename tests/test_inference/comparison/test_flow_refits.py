"""Refits of flows, whose objective has kinks, end where the gradient is small."""

import pytest
import torch

from guides import Flow
from inference import fit, refit
from zoo import DeepGaussianVAE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "latent_dim", "batch_size"), [(0, 2, None), (0, 2, 64), (1, 1, 64), (2, 2, 64), (3, 3, 64)]
)
def test_a_trained_flows_refit_is_stationary(seed, latent_dim, batch_size):
    pytest.importorskip("zuko")
    torch.manual_seed(seed)
    model, guide = DeepGaussianVAE(8, latent_dim).double(), Flow(8, latent_dim).double()
    x = torch.randn(512, 8).double()
    fit(model, guide, x, steps=300, batch_size=batch_size, seed=seed, progress=False)
    found = refit(model.requires_grad_(False), guide, x[:8], seed=0, progress=False)
    assert found.gradient_norm.max() < 1e-3
    assert (found.improvement > -5 * found.improvement_error).all()
