"""Claims of Lucas et al. 2019, "Don't Blame the ELBO!" (arXiv 1911.02469), on digits and on synthetic data."""

import math
import statistics

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from guides import FullRank, Linear, MeanField, mlp
from inference import AnalyticELBO, AnalyticKLELBO, collapsed, fit, latent_kl
from zoo import PPCA, DeepGaussianVAE, FixedNoise, LearntNoise, LinearVAE, Scaled, digits, digits_logit, linear_gaussian

MAXIMUM = 17.4519  # pPCA with ten latents on digits / 16


@torch.no_grad()
def analytic_elbo(model, guide, x):
    return AnalyticELBO().per_datum(model, guide, x).mean().item()


def train(model, guide, x, steps, rate, batch_size=None, seed=0):
    fit(
        model,
        guide,
        x,
        steps=steps,
        objective=AnalyticKLELBO(),
        optimizer=lambda p: Adam(p, lr=rate),
        scheduler=lambda o: ExponentialLR(o, 0.01 ** (1 / steps)),
        batch_size=batch_size,
        seed=seed,
        progress=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "lowest"), [(None, 17.40), (512, 17.35)], ids=["full batch", "mini-batches"])
def test_a_learnt_sigma_reaches_the_maximum_of_the_evidence(batch_size, lowest):
    x = digits(test_size=0, transform=Scaled(16.0)).train
    model, guide = LinearVAE(64, 10).double(), Linear(64, 10).double()
    train(model, guide, x, 5000, 0.05, batch_size)
    assert lowest < analytic_elbo(model, guide, x) < MAXIMUM + 1e-4
    assert model.sigma.item() ** 2 == pytest.approx(0.022751, rel=0.02)


@pytest.mark.slow
def test_the_linear_vae_finds_the_principal_components_themselves():
    spectrum = torch.tensor([15.4, 8.7, 4.1, 2.05, 1.0])
    x = linear_gaussian(4000, 10, 5, sigma=0.5, spectrum=spectrum).train
    model, guide = LinearVAE(10, 5, sigma=math.sqrt(10)).double(), Linear(10, 5).double()
    fit(
        model,
        guide,
        x,
        steps=4000,
        objective=AnalyticELBO(),
        optimizer=lambda p: Adam(p, lr=0.03),
        scheduler=lambda o: ExponentialLR(o, 0.01 ** (1 / 4000)),
        progress=False,
    )
    values, axes = torch.linalg.eigh(torch.cov(x.mT, correction=0))
    cosines = (axes[:, -5:].mT @ nn.functional.normalize(model.W.detach(), dim=0)).abs()
    assert cosines.amax(0).min() > 0.999
    gram = model.W.detach().mT @ model.W.detach()
    assert (gram - gram.diag().diag()).abs().max() < 0.01
    lam = values[-5:][cosines.argmax(0)]
    ratio = guide.log_sigma.detach().exp().square() * lam / model.sigma.item() ** 2
    torch.testing.assert_close(ratio, torch.ones(5).double(), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "guide_class", [Linear, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (MeanField, FullRank))]
)
def test_no_encoder_lifts_a_linear_decoder_above_the_ppca_maximum(guide_class):
    x = digits(test_size=0, transform=Scaled(16.0)).train
    torch.manual_seed(0)
    model, guide = LinearVAE(64, 10).double().standardise_by(x), guide_class(64, 10).double().standardise_by(x)
    train(model, guide, x, 1500, 0.01, 256)
    assert analytic_elbo(model, guide, x) < model.log_evidence(x).mean() < MAXIMUM + 1e-4


@pytest.mark.slow
def test_the_deep_model_depends_on_its_start_unlike_the_linear_one():
    x = digits_logit(test_size=0, dtype=torch.float32).train
    x = x - x.mean(0)

    def deep(sigma2, learn, seed):
        """ELBO on the training data and share of collapsed latents; 64-256-128-20, mirrored, ReLU."""
        torch.manual_seed(seed)
        noise = (LearntNoise if learn else FixedNoise)(math.sqrt(sigma2))
        model = DeepGaussianVAE(64, 20, network=mlp(20, 64, (128, 256), nn.ReLU), noise=noise)
        guide = MeanField(64, 20, encoder=mlp(64, 40, (256, 128), nn.ReLU))
        steps = 300 * math.ceil(len(x) / 128)
        fit(
            model,
            guide,
            x,
            steps=steps,
            objective=AnalyticKLELBO(),
            optimizer=lambda p: Adam(p, lr=1e-3),
            scheduler=lambda o: LambdaLR(o, lambda step: min(1.0, 2 * (1 - step / steps))),
            batch_size=128,
            seed=seed,
            progress=False,
        )
        with torch.no_grad():
            elbos = [AnalyticKLELBO().per_datum(model, guide, x).mean() for _ in range(10)]
        share = collapsed(latent_kl(model, guide, x), epsilon=0.1).double().mean().item()
        return torch.stack(elbos).mean().item(), share

    def medians(sigma2, learn):
        return [statistics.median(column) for column in zip(*(deep(sigma2, learn, seed) for seed in range(3)))]

    far, near, fixed_far, fixed_near = medians(30, True), medians(3, True), medians(30, False), medians(1, False)
    print(f"learnt from 30 {far}, from 3 {near}; fixed 30 {fixed_far}, fixed 1 {fixed_near}")
    assert near[0] - far[0] > 8
    assert far[1] >= 0.85
    assert near[1] <= 0.75
    assert fixed_far[1] == 1.0
    assert fixed_near[1] <= 0.45

    x = x.double()
    best = PPCA.from_data(x, 20).log_evidence(x).mean().item()
    linear = []
    for sigma2 in (30, 3):
        torch.manual_seed(0)
        model, guide = LinearVAE(64, 20, sigma=math.sqrt(sigma2)).double(), Linear(64, 20).double()
        fit(
            model,
            guide,
            x,
            steps=6000,
            objective=AnalyticELBO(),
            optimizer=lambda p: Adam(p, lr=0.03),
            scheduler=lambda o: ExponentialLR(o, 0.01 ** (1 / 6000)),
            progress=False,
        )
        linear.append(analytic_elbo(model, guide, x))
    print(f"linear from 30 {linear[0]}, from 3 {linear[1]}, maximum {best}")
    assert abs(linear[0] - linear[1]) < 0.05
    assert max(linear) < best + 1e-6
