"""Does the ELBO cause posterior collapse? The tables of "Don't Blame the ELBO!" (Lucas et al., 2019), measured.

Trains a deep Gaussian VAE and the linear VAE from several noise variances sigma^2, kept fixed or learnt, over several
seeds, and prints the ELBO, the ELBO after sigma^2 alone is set to its optimum, the final sigma^2, the share of
collapsed latents and the KL term. The data's eigenvalues above sigma^2 predict how many latents live: of the linear
VAE exactly, of the deep one as far as its correlation with the measured number goes.

    python examples/posterior_collapse.py
    python examples/posterior_collapse.py --data path/to/mnist.npz --paper-scale --device cuda
    python examples/posterior_collapse.py --data path/to/faces.npy --channels 32 32 64 64 --kinds deep --device cuda
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from _common import (
    decay_in_second_half,
    example_parser,
    expect,
    finish,
    kept,
    kept_of_pairs,
    means_with_errors,
    measure_collapse,
    pair_under_seed,
    parse_with_presets,
    run_as_command,
    save,
    say,
    table_line,
)
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from guides import ConvEncoder, Linear, MeanField, mlp
from inference import AnalyticELBO, AnalyticKLELBO, Annealed, converged_bracket, elbo, fit, fit_many, iwae, log_weights
from inference.diagnostics import predicted_alive
from inference.plots import alive_figure, collapse_curve_figure
from zoo import ConvDecoder, DeepGaussianVAE, FixedNoise, LearntNoise, LinearVAE, Logit, digits_logit, load_data, mnist
from zoo.linear import spectrum
from zoo.linear.estimation import Spectrum

WIDTHS = (20, 20, 18, 18, 16, 16, 16)
TITLES = ("ELBO", "tuned ELBO", "final s2", "% collapsed", "KL", "predicted live", "measured live")
HEAD = f"{'run':24s}" + "".join(f"{title:>{width}s}" for title, width in zip(TITLES, WIDTHS, strict=True))
ENDS = ("ELBO", "IWAE", "log p from", "to*", "gap from", "to*")
SMOKE = {"epochs": 1, "seeds": 2, "rows": 100, "fixed": [1.0], "learnt": [3.0], "steps": 2}


def parse(argv):
    parser = example_parser(__doc__, "posterior_collapse", seed="the first run")
    parser.add_argument("--data", default="digits", help="digits, a file or folder of MNIST, or images: see --channels")
    text = "of convolutional networks, where --data is a .npy or .npz of images, bytes (N, H, W, 3) or (N, 3, H, W)"
    parser.add_argument("--channels", type=int, nargs="+", help=text)
    parser.add_argument("--paper-scale", action="store_true", help="784-1024-512-200, as in the paper's MNIST runs")
    parser.add_argument("--fixed", type=float, nargs="*", default=[30, 10, 3, 1, 0.1], help="values of fixed sigma^2")
    parser.add_argument("--learnt", type=float, nargs="*", default=[30, 10, 3, 1], help="starts of learnt sigma^2")
    parser.add_argument("--epochs", type=int, default=300, help="of Adam, for the deep VAE")
    parser.add_argument("--batch", type=int, default=128, help="data of a step of Adam")
    parser.add_argument("--rows", type=int, help="training rows; where None, all of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, of consecutive seeds")
    parser.add_argument("--kinds", nargs="+", default=["deep", "linear"], choices=["deep", "linear"], help="models")
    text = (
        "nats below which a latent is collapsed, if for 99%% of the data; the paper's is 0.01, less than noise leaves"
    )
    parser.add_argument("--epsilon", type=float, default=0.1, help=text)
    parser.add_argument("--evidence", type=int, default=0, help="held-out data on which deep VAEs' log p is bracketed")
    parser.add_argument("--temperatures", type=int, default=300, help="of that annealing")
    parser.add_argument("--steps", type=int, default=60, help="of LBFGS, for the linear VAE; 300 for MNIST")
    return parse_with_presets(parser, argv, smoke=SMOKE)


def spectrum_of(x, args):
    """The spectrum; without its axes, which only the linear VAE needs, where images have more pixels than there are."""
    if "linear" in args.kinds or len(x) >= x.shape[1]:
        return spectrum(x)
    return Spectrum(x.mean(0), torch.linalg.eigvalsh(x @ x.mT / len(x)).flip(0), x.new_empty(x.shape[1], 0))


class Data(NamedTuple):
    """Name, training rows, rows to bracket log p on, all shifted by the mean, which changes no density; their shape."""

    name: str
    x: Tensor
    held_out: Tensor
    shape: tuple[int, ...]


def read(args):
    if args.channels:
        return read_images(args)
    held_out = {} if args.evidence else {"test_size": 0}
    data = digits_logit(**held_out) if args.data == "digits" else mnist(args.data, transform=Logit(256))
    return centred(data, data.train, data.test, data.image_shape, args)


def read_images(args):
    """Images of the user's; where the file has no test set, the last ones are held out."""
    data = load_data(args.data, transform=Logit(256), dtype=torch.float32)
    if data.image_shape is None:
        raise ValueError(f"expected images (N, H, W, 3) or (N, 3, H, W) in {args.data}, got rows of {data.data_dim}")
    x, shape = channels_first(data.train, data.image_shape)
    if len(data.test) or not args.evidence:
        return centred(data, x, channels_first(data.test, data.image_shape)[0], shape, args)
    return centred(data, x[: -args.evidence], x[-args.evidence :], shape, args)


def channels_first(flat, shape):
    """Flattened images (N, 3 H W), and the shape of one: colours that came last come first."""
    if len(shape) == 3 and shape[0] not in (1, 3):
        flat, shape = flat.unflatten(1, shape).movedim(-1, 1).flatten(1), (shape[2], *shape[:2])
    return flat, shape


def centred(data, train, test, shape, args):
    x = train[: args.rows].float()
    return Data(data.name, x - x.mean(0), test[: args.evidence].float() - x.mean(0), shape)


def build(kind, sigma2, learn, shape, args):
    """A pair of the paper: a mirrored ReLU network with one sigma, or the linear VAE with its linear guide."""
    latent_dim, hidden = (200, (1024, 512)) if args.paper_scale else (20, (256, 128))
    data_dim, sigma = math.prod(shape), math.sqrt(sigma2)
    if kind == "linear":
        model = LinearVAE(data_dim, latent_dim, sigma=sigma, learn_sigma=learn)
        return model.double(), Linear(data_dim, latent_dim).double()
    noise = LearntNoise if learn else FixedNoise
    if args.channels:
        decoder, encoder = (
            ConvDecoder(latent_dim, shape, args.channels),
            ConvEncoder(shape, 2 * latent_dim, args.channels),
        )
    else:
        decoder = mlp(latent_dim, data_dim, hidden[::-1], nn.ReLU)
        encoder = mlp(data_dim, 2 * latent_dim, hidden, nn.ReLU)
    model = DeepGaussianVAE(data_dim, latent_dim, network=decoder, noise=noise(sigma))
    return model, MeanField(data_dim, latent_dim, encoder=encoder)


def train(mode, sigma2, seeds, data, args):
    """A deep pair for each seed, at once by Adam with a learning rate that falls to zero over the second half."""
    make = partial(build, "deep", sigma2, mode == "learnt", data.shape, args)
    pairs = [pair_under_seed(seed, make, args.device) for seed in seeds]
    x, steps = data.x.to(args.device), args.epochs * math.ceil(len(data.x) / args.batch)
    options = {
        "steps": steps,
        "objective": AnalyticKLELBO(),
        "scheduler": decay_in_second_half(steps),
        "batch_size": args.batch,
        "seed": seeds[0],
        "progress": False,
    }
    if len(pairs) == 1:
        fit(*pairs[0], x, **options)
    else:
        fit_many(pairs, x, **options)
    return pairs


def groups_of(seeds, args):
    """Seeds whose deep pairs are trained at once: all, or each by itself where large networks take longer at once."""
    return [[seed] for seed in seeds] if args.paper_scale or args.channels else [seeds]


def train_linear(model, guide, eigen, args):
    """LBFGS, without noise: the ELBO of a linear VAE knows of the data their covariance, which 2 D points have, too."""
    lengths = (len(eigen.eigenvalues) * eigen.eigenvalues.clamp(min=0)).sqrt()
    half = lengths[:, None] * eigen.eigenvectors.mT
    optimizer = partial(torch.optim.LBFGS, max_iter=20, history_size=30, line_search_fn="strong_wolfe")
    points = torch.cat([half, -half])
    options = {"optimizer": optimizer, "device": args.device, "progress": False}
    fit(model, guide, points, steps=args.steps, objective=AnalyticELBO(), **options)


def run_linear(mode, sigma2, seed, data, eigen, args):
    """Train a linear pair: what :func:`measure` gives."""
    make = partial(build, "linear", sigma2, mode == "learnt", data.shape, args)
    model, guide = pair_under_seed(seed, make, args.device)
    train_linear(model, guide, eigen, args)
    return measure(model, guide, seed=seed, data=data, eigen=eigen, args=args)


def measure(model, guide, *, seed, data, eigen, args):
    """Of a trained pair the numbers of TITLES, the KL of each latent, (N, K), and what :func:`bracket` gives."""
    numbers, kl = measure_collapse(model, guide, data.x.to(model.sigma.dtype), args.epsilon)
    _, _, final_sigma2, share, _ = numbers
    latent_dim = kl.shape[1]
    predicted = predicted_alive(eigen.eigenvalues, final_sigma2, latent_dim)
    some = kl[:: max(1, len(kl) // 2000)]  # enough for the curve
    deep = isinstance(model, DeepGaussianVAE)
    ends = bracket(model, guide, data.held_out, seed, args) if deep and len(data.held_out) else []
    return [*numbers, predicted, round(latent_dim * (1 - share / 100))], some.tolist(), ends


def bracket(model, guide, rows, seed, args):
    """ELBO, IWAE and both ends of log p on some data, (4, N): importance weights, and annealing there and back."""
    model, guide, rows = model.double(), guide.double(), rows.double()
    with torch.no_grad():
        weights = log_weights(model, guide, rows, num_samples=1000, chunk=100, seed=seed, progress=False)
    options = {"method": Annealed(args.temperatures, 8), "num_steps": args.temperatures, "seed": seed}
    ends = converged_bracket(model, rows, guide=guide, progress=False, **options)
    parts = elbo(weights).value, iwae(weights).value, ends.raw_lower, ends.upper_if_converged
    return [part.tolist() for part in parts]


def run_seeds(name, kind, mode, sigma2, data, eigen, args):
    """A line of the table: TITLES for each seed, the KL of each latent of the last one, the brackets of all seeds."""
    seeds, known = list(range(args.seed, args.seed + args.seeds)), {"data": data, "eigen": eigen, "args": args}
    file, found = f"{kind}_{mode}_{sigma2:g}", []
    if kind == "deep":
        for group in groups_of(seeds, args):
            measures = {f"{file}_{seed}": partial(measure, seed=seed, **known) for seed in group}
            found += kept_of_pairs(args, partial(train, mode, sigma2, group, data, args), measures)
    else:
        found = [kept(args, f"{file}_{s}", partial(run_linear, mode, sigma2, s, **known)) for s in seeds]
    results, kls, ends = zip(*found, strict=True)
    values = torch.tensor(results, dtype=torch.float64)
    cells = zip(means_with_errors(values), WIDTHS, strict=True)
    say(f"{name:24s}" + "".join(f"{cell:>{width}s}" for cell, width in cells))
    return values, torch.tensor(kls[-1]), torch.tensor(ends, dtype=torch.float64)


def agreement(kind, points):
    """How far the predicted number of live latents is the measured one, from (runs, 2)."""
    equal, n = int((points[:, 0] == points[:, 1]).sum()), len(points)
    text = f"{kind}: as many latents live as predicted in {equal} of {n} runs"
    if bool((points == points[0]).all(0).any()):
        return f"{text}; no correlation, one number does not vary"
    pearson, spearman = (f(*points.T.numpy()).statistic for f in (pearsonr, spearmanr))
    return f"{text}; correlation {pearson:.3f} (Pearson), {spearman:.3f} (Spearman), n = {n}"


def ends_of(values):
    """ELBO and both ends of log p of each data point, (3, N); the lower is that of two whose mean is larger."""
    bound, *lower, upper = values.mean(0)
    return torch.stack([bound, max(lower, key=lambda end: float(end.mean())), upper])


def show_brackets(brackets):
    """A line for each run: means over the data and seeds of ELBO and IWAE, and the ends of log p and of the gap."""
    print("\n" + table_line("on data not trained on", ENDS))
    for name, values in brackets.items():
        (bound, lower, upper), weighted = ends_of(values).mean(1).tolist(), float(values[:, 1].mean())
        numbers = bound, weighted, lower, upper, lower - bound, upper - bound
        print(table_line(name, [f"{number:.2f}" for number in numbers]))
    print("* if the chains have converged")


def model_or_gap(brackets):
    """How much of the difference in ELBO between the best and the worst start of a learnt sigma^2 is log p's."""
    learnt = {name: ends_of(values) for name, values in brackets.items() if "learnt" in name}
    if len(learnt) < 2:
        return
    best, worst = (pick(learnt, key=lambda name: float(learnt[name][0].mean())) for pick in (max, min))
    won, model = learnt[best][0] - learnt[worst][0], learnt[best][1] - learnt[worst][2]
    print(f"from the better to the worse start, {best} and {worst}, the ELBO falls by {shown(won)} nats and", end=" ")
    print(f"log p, if the chains have converged, by at least {shown(model)}:", end=" ")
    loss = float((won - model).mean())
    if loss <= 0:
        print(f"none of it is the gap, which is at least {abs(loss):.2f} nats wider at the better start")
    else:
        print(f"at most {loss:.2f} nats of it are the gap's")


def shown(values):
    """A mean over data with its standard error."""
    return f"{float(values.mean()):.2f} ({float(values.std()) / math.sqrt(len(values)):.2f})"


def main(argv=None):
    args = parse(argv)
    data = read(args)
    eigen = spectrum_of(data.x.double(), args)
    print(f"{data.name}: {tuple(data.x.shape)}, K = {200 if args.paper_scale else 20}")
    print(f"mean (s.e.) over {args.seeds} seeds, nats per data point of the training set", end="")
    print(f"; collapsed: below {args.epsilon:g} nats for 99 % of the data\n{HEAD}")
    starts = [("fixed", sigma2) for sigma2 in args.fixed] + [("learnt", sigma2) for sigma2 in args.learnt]
    rows, points, brackets = {}, {}, {}
    expect(args, len(args.kinds) * len(starts) * args.seeds)
    for kind in args.kinds:
        curves = {}
        for mode, sigma2 in starts:
            name = f"{kind}, {mode} {sigma2:g}"
            rows[name], curves[name], ends = run_seeds(name, kind, mode, sigma2, data, eigen, args)
            if ends.numel():
                brackets[name] = ends
        points[kind] = torch.cat([rows[name][:, 5:] for name in curves])
        save(collapse_curve_figure(curves, marked=args.epsilon), args, f"collapse_{kind}.png")
    print("\n" + "\n".join(agreement(kind, found) for kind, found in points.items()))
    if brackets:
        show_brackets(brackets)
        model_or_gap(brackets)
    save(alive_figure(points), args, "alive.png")
    finish(args)
    return rows


if __name__ == "__main__":
    run_as_command(main)
