"""How often do the intervals of `gap` and `compare` hold the truth?

`gap` on small nonlinear models of one and two latents with mean-field, full-rank and mixture guides, trained or not:
log p by a grid, the ELBO by Gauss-Hermite quadrature, and the family's best by a search from many starts on it.
`compare` on a linear Gaussian model that hides its closed form, with a good, a bad, a very bad and a repeated guide.

Each finished problem is a line of the output file; run again, it goes on with the next.

    python examples/benchmarks/gap_coverage.py --out out/gap_coverage
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.stats
import torch

from guides import FullRank, MeanField, Mixture
from inference import ELBO, LogJoint, compare, differences, fit, gap
from inference.distributions.gaussian import as_full_normal
from inference.numerics.lbfgs import minimise
from zoo import DeepGaussianVAE, FixedNoise

GUIDES = {"MeanField": MeanField, "FullRank": FullRank, "Mixture": Mixture}
LEVEL, DATA_DIM, NUM_DATA, NODES, STARTS = 0.95, 3, 4, {1: 48, 2: 20}, 24
PAIRS = {"good": (0.0, 1.0), "bad": (1.0, 1.0), "very bad": (4.0, 0.5)}  # shift in posterior sigmas per |x|, and scale
NOISE = 0.5


# ------------------------------------------------------------------------------------------- ELBO and evidence, exactly


class Quadrature:
    """Log p and the ELBO of mixtures of Gaussians for each data point of a model of K = 1 or 2 latents."""

    def __init__(self, model, x, finer=1.0):
        self.log_joint, self.k = LogJoint(model, x), model.latent_dim
        nodes, weights = np.polynomial.hermite_e.hermegauss(round(finer * NODES[self.k]))
        grid = torch.tensor(np.array(np.meshgrid(*[nodes] * self.k)).reshape(self.k, -1).T)
        self.nodes = grid.unsqueeze(1)  # (Q, 1, K)
        product = np.array(np.meshgrid(*[weights / weights.sum()] * self.k)).reshape(self.k, -1).prod(0)
        self.weights = torch.tensor(product).unsqueeze(1)

    def log_evidence(self):
        """By a grid of 0.004 in one dimension, 0.02 in two, over 8 prior standard deviations."""
        line = torch.linspace(-8, 8, 4001 if self.k == 1 else 801, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(*[line] * self.k, indexing="ij"), -1).reshape(-1, 1, self.k)
        parts = [self.log_joint(part.expand(-1, NUM_DATA, -1)).logsumexp(0) for part in grid.split(40_000)]
        return torch.stack(parts).logsumexp(0) + self.k * (line[1] - line[0]).log()

    def elbo(self, log_weights, loc, factor, rows):
        """Of mixtures: (M, C), (M, C, K) and lower triangular (M, C, K, K), of data points (M,): (M,)."""
        total = 0.0
        for c in range(loc.shape[1]):
            z = loc[:, c] + torch.einsum("mij,qmj->qmi", factor[:, c], self.nodes.expand(-1, len(loc), -1))
            log_q = torch.stack(
                [log_weights[:, j] + self._normal(z, loc[:, j], factor[:, j]) for j in range(loc.shape[1])]
            )
            terms = self.log_joint.rows(rows)(z) - log_q.logsumexp(0)
            total = total + log_weights[:, c].exp() * (self.weights * terms).sum(0)
        return total

    def _normal(self, z, loc, factor):
        white = torch.linalg.solve_triangular(factor, (z - loc).permute(1, 2, 0), upper=False)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(1).T - log_det - 0.5 * self.k * math.log(2 * math.pi)


def read(name, parameters, k):
    """Log weights, means and factors of mixtures from free parameters (M, P)."""
    c = 2 if name == "Mixture" else 1
    logits, rest = parameters[:, :c], parameters[:, c:].reshape(len(parameters), c, -1)
    loc, log_sigma, below = rest[..., :k], rest[..., k : 2 * k], rest[..., 2 * k :]
    factor = torch.diag_embed(log_sigma.exp())
    if name == "FullRank" and k == 2:
        factor = factor + torch.nn.functional.pad(below.unsqueeze(-1), (0, 1, 1, 0))
    return logits.log_softmax(-1), loc, factor


def best_elbo(name, quadrature, finer, truth, generator):
    """The highest ELBO of a family for each data point, (N,), by L-BFGS from many starts.

    Points at which a finer quadrature finds another ELBO are dropped: they exploit the gaps between the nodes. So are
    those above log p, (N,), as no ELBO is: they exploit rounding, as of a factor of 1e150.
    """
    k, c = quadrature.k, 2 if name == "Mixture" else 1
    size = c + c * (2 * k + (name == "FullRank" and k == 2))
    start = 1.5 * torch.randn(STARTS * NUM_DATA, size, generator=generator, dtype=torch.float64)
    rows = torch.arange(NUM_DATA).repeat(STARTS)

    def evaluate(point, index):
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            value = -quadrature.elbo(*read(name, point, k), rows[index])
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach().nan_to_num(nan=math.inf), gradient

    found = minimise(evaluate, start, max_steps=150, tolerance=1e-5, least_gain=1e-8)
    checked = finer.elbo(*read(name, found.point, k), rows)
    right = ((checked + found.value).abs() < 1e-3) & (checked <= truth[rows] + 1e-6)
    return torch.where(right, checked, -math.inf).reshape(STARTS, NUM_DATA).amax(0)


def own_elbo(quadrature, q):
    """The ELBO of a guide's posterior, (N,)."""
    rows = torch.arange(NUM_DATA)
    if hasattr(q, "locs"):
        return quadrature.elbo(q.log_weights, q.locs, torch.diag_embed(q.sigmas), rows)
    full = as_full_normal(q)
    factor = torch.linalg.cholesky(full.covariance_matrix)
    return quadrature.elbo(torch.zeros(NUM_DATA, 1).double(), full.mean.unsqueeze(1), factor.unsqueeze(1), rows)


# ------------------------------------------------------------------------------------------------------------ the gap


def gap_problem(k, name, trained, seed):
    """Violations of the intervals of a gap's parts on one random nonlinear model."""
    torch.manual_seed(seed)
    model = DeepGaussianVAE(DATA_DIM, k, hidden=(8,), noise=FixedNoise(NOISE)).double().requires_grad_(False)
    for p in model.network.parameters():
        p.mul_(3.0)
    guide = GUIDES[name](DATA_DIM, k, hidden=(16,)).double()
    if trained:
        fit(model, guide, model(n=500), steps=300, objective=ELBO(), batch_size=100, seed=seed, progress=False)
    x = model(n=NUM_DATA)
    got = gap(model, guide, x, seed=seed, progress=False)
    with torch.no_grad():
        quadrature = Quadrature(model, x)
        truth, own = quadrature.log_evidence(), own_elbo(quadrature, guide.posterior(x))
        finer = Quadrature(model, x, 1.6)
        best = best_elbo(name, quadrature, finer, truth, torch.Generator().manual_seed(seed))
    total, approximation, amortisation = truth - own, truth - best, best - own
    width, slack = scipy.stats.t.ppf((1 + LEVEL) / 2, 7), 1e-5
    return {
        "total": outside((total < got.total_lower - slack) | (total > got.total_upper + slack)),
        "approximation": outside(approximation > got.approximation_upper + slack),
        "amortisation": outside(amortisation < got.amortisation_lower - slack),
        "negative": outside(got.approximation + width * got.approximation_error < -slack),
        "short": outside(best - (truth - got.approximation) > 0.01 + width * got.approximation_error),
        "shortfall": float((best - truth + got.approximation).max()),
        "evidence_off": float((got.evidence.value - truth).abs().max()),
        "not_stationary": outside(~got.converged),
    }


def outside(flags):
    """How many."""
    return int(flags.sum())


# -------------------------------------------------------------------------------------------------------- compare


def hidden_model(x):
    """A linear Gaussian model whose closed form the tools do not see."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, 0])


def hidden_guide(shift, scale):
    """Its posterior, moved in proportion to |x| and scaled."""
    var = 1 / (1 + 1 / NOISE**2)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = x[:, 0] * var / NOISE**2 + shift * var**0.5 * x[:, 0].abs()
            pyro.sample("z", dist.Normal(mean, scale * var**0.5))

    return guide


def compare_problem(seed, num_data):
    """Violations of the intervals of log p, of its mean, and of the differences of the ELBOs."""
    generator = torch.Generator().manual_seed(seed)
    sigma = math.sqrt(1 + NOISE**2)
    x = sigma * torch.randn(num_data, 1, generator=generator, dtype=torch.float64)
    guides = {name: hidden_guide(*pair) for name, pair in PAIRS.items()}
    tree = compare(hidden_model, guides | {"again": guides["good"]}, x, seed=seed, progress=False)
    data = tree["train"].to_dataset().isel(seed=0)
    truth, first = dist.Normal(0.0, sigma).log_prob(x[:, 0]).numpy(), data.isel(guide=0)
    slack, found = 1e-9, differences(tree).isel(split=0, seed=0)
    result = {
        "data": int(((truth < first["evidence_lower"] - slack) | (truth > first["evidence_upper"] + slack)).sum()),
        "mean": int(not first["mean_evidence_lower"] - slack <= truth.mean() <= first["mean_evidence_upper"] + slack),
        "open": int(np.isinf(first["evidence_upper"]).sum()),
    }
    for name in ("bad", "very bad"):
        shift, scale = PAIRS[name]
        expected = -0.5 * (scale**2 + shift**2 * sigma**2 - 1) + math.log(scale)  # minus the mean KL divergence
        one = found.sel(guide=name)
        width = scipy.stats.t.ppf((1 + LEVEL) / 2, num_data - 1) * float(one["standard_error"])
        result[name] = int(abs(float(one["difference"]) - expected) > width)
    return result | {"again": int(not math.isnan(float(found.sel(guide="again")["p_value"])))}


# ------------------------------------------------------------------------------------------------------- the protocol


def problems(args):
    """Name and function of each problem."""
    for seed in range(args.seed, args.seed + args.repeats):
        for k in args.latents:
            for name in args.guides:
                for trained in (False, True):
                    yield (
                        ["gap", k, name, trained, seed],
                        lambda k=k, n=name, t=trained, s=seed: gap_problem(k, n, t, s),
                    )
    for seed in range(args.seed, args.seed + args.comparisons):
        yield ["compare", 100, seed], lambda s=seed: compare_problem(s, 100)
    for seed in range(args.seed, args.seed + args.large):
        yield ["compare", args.large_rows, seed], lambda s=seed: compare_problem(s, args.large_rows)


def report(lines):
    """A table of the violations of each kind against the 99.9 % limit of a binomial count at the nominal rate."""
    groups = {}
    for key, result in lines:
        label = f"gap, {key[2]}" if key[0] == "gap" else f"compare, N = {key[1]}"
        groups.setdefault(label, []).append((key, result))
    print(f"\n{'':24s}{'interval':16s}{'misses':>8s}{'of':>7s}{'nominal':>9s}{'limit':>7s}")
    for label, members in groups.items():
        for name in members[0][1]:
            values = [result[name] for _, result in members]
            each = NUM_DATA if label.startswith("gap") else members[0][0][1] if name in ("data", "open") else 1
            if name in ("shortfall", "evidence_off"):
                print(f"{label:24s}{name:16s}{max(values):8.1e}   at most")
            else:
                rate = {"approximation": 0.025, "amortisation": 0.025, "negative": 0.025}.get(name, 0.05)
                count = each * len(members)
                text = f"{sum(values):8d}{count:7d}"
                if name not in ("open", "again", "short", "not_stationary"):
                    text += f"{rate:9.3f}{int(scipy.stats.binom.ppf(0.999, count, rate)):7d}"
                print(f"{label:24s}{name:16s}{text}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gap_coverage"), help="folder of the finished problems")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem of each kind")
    parser.add_argument("--repeats", type=int, default=5, help="models for each kind of gap")
    parser.add_argument("--latents", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="K of the models")
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES), help="families")
    parser.add_argument("--comparisons", type=int, default=100, help="comparisons on 100 data points")
    parser.add_argument("--large", type=int, default=20, help="comparisons on many data points")
    parser.add_argument("--large-rows", type=int, default=4000, help="how many")
    parser.add_argument("--smoke", action="store_true", help="the cheapest of each kind")
    args = parser.parse_args(argv)
    if args.smoke:
        args.latents, args.guides = [1], ["MeanField"]
        args.repeats, args.comparisons, args.large, args.large_rows = 1, 1, 1, 200
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"seed_{args.seed}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {json.dumps(key): result for key, result in done}
    wanted = list(problems(args))
    with path.open("a") as file:
        for key, solve in wanted:
            if json.dumps(key) not in known:
                known[json.dumps(key)] = solve()
                file.write(json.dumps([key, known[json.dumps(key)]]) + "\n")
                file.flush()
                print(key, known[json.dumps(key)], flush=True)
    lines = [(key, known[json.dumps(key)]) for key, _ in wanted]
    report(lines)
    return lines


if __name__ == "__main__":
    main()
