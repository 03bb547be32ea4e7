"""What the examples share: their command line, figures, tables, schedules and closing line."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from inference import ELBO, AnnealedPrecision, GeometricAnnealing, History, fit, fit_many
from inference.core.checks import as_device
from inference.core.files import atomic_path
from inference.diagnostics import collapsed, latent_kl
from inference.plots import save_figure
from zoo.command_line.parser import HelpFormatter

Pair = tuple[nn.Module, nn.Module]


# ---------------------------------------------------------------------------------------------------- command line


def chosen_device(name: str) -> str:
    """The device of that name; "auto" is CUDA where there is one."""
    try:
        return str(as_device(name))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def example_parser(
    description: str | None, name: str, *, device: bool = False, seed: str | None = None, resume: bool = False
) -> argparse.ArgumentParser:
    """A parser with the shared options.

    Args:
        description: The script's docstring.
        name: Folder below ``out/`` to write to, unless ``--out`` says otherwise.
        device: Whether the script has a ``--device``.
        seed: What ``--seed`` is the seed of; None for a script without.
        resume: Whether the script keeps its results by :func:`kept` and so has a ``--resume``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out") / name, help="folder to write to")
    if device:
        parser.add_argument("--device", type=chosen_device, default="auto", help="auto is CUDA where there is one")
    if seed is not None:
        parser.add_argument("--seed", type=int, default=0, help=f"of {seed}")
    if resume:
        text = "take the results that an earlier call with the same settings left in the folder"
        parser.add_argument("--resume", action="store_true", help=text)
    return parser


def parse_with_presets(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **presets: Mapping[str, Any]
) -> argparse.Namespace:
    """Parse, where a flag for each preset, such as ``--smoke``, replaces the defaults of several options at once.

    What the command line states itself is kept. ``started`` of the result is the time for :func:`finish`.
    """
    for name, defaults in presets.items():
        text = ", ".join(f"{_flag(option)} {_shown(value)}".rstrip() for option, value in defaults.items())
        parser.add_argument(_flag(name), action="store_true", help=f"unless stated otherwise: {text}")
    args = parser.parse_args(argv)
    for name, defaults in presets.items():
        if unknown := set(defaults) - set(vars(args)):
            raise ValueError(f"expected a preset of the script's own options, got {sorted(unknown)}")
        if getattr(args, name):
            parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.started = time.perf_counter()
    return args


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return ""
    return " ".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)


# What may differ between two calls whose results are the same.
_IRRELEVANT = {"out", "resume", "started", "device", "smoke"}


def kept(args: argparse.Namespace, name: str, compute: Callable[[], Any]) -> Any:
    """A result of numbers in lists and dictionaries: written to the folder as it comes, and taken from there to resume.

    Args:
        args: The script's options, with ``resume``.
        name: Of the result, a file name without ending.
        compute: Makes the result.
    """
    settings = {key: str(value) for key, value in sorted(vars(args).items()) if key not in _IRRELEVANT}
    path = args.out / "rows" / f"{name}.json"
    if args.resume and path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] == settings:
            return stored["result"]
    result = compute()
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "result": result}))
    return result


def finish(args: argparse.Namespace) -> None:
    """Print the closing line."""
    print(f"wrote {args.out}/ in {time.perf_counter() - args.started:.0f} s")


# --------------------------------------------------------------------------------------------- tables and figures


def table_line(name: str, cells: Iterable[str], *, first: int = 24, width: int = 13) -> str:
    """A line of a table: a name on the left, and cells that end at the right of their columns."""
    return f"{name:{first}s}" + "".join(f"{cell:>{width}s}" for cell in cells)


def means_with_errors(values: Tensor) -> list[str]:
    """Means and standard errors over seeds, (seeds, columns), as text; of one seed no error is known."""
    if len(values) == 1:
        return [f"{m:.2f}" for m in values[0]]
    error = values.std(0) / math.sqrt(len(values))
    return [f"{m:.2f} ({e:.2f})" for m, e in zip(values.mean(0), error, strict=True)]


def panels(
    rows: int, columns: int, *, size: tuple[float, float], sharex: bool = False, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of a size in inches, and its axes in reading order."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, axes.ravel()


def save(figure: Figure, args: argparse.Namespace, name: str) -> Path:
    """Write a figure into the script's folder and return its path."""
    path = args.out / name
    save_figure(figure, path)
    return path


# -------------------------------------------------------------------------------------------------------- training


def cosine_decay(steps: int) -> Callable[[torch.optim.Optimizer], CosineAnnealingLR]:
    """A learning rate that falls to zero as a cosine."""
    return partial(CosineAnnealingLR, T_max=steps)


def decay_in_second_half(steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """A learning rate that stays for half of the steps and falls linearly to zero over the others."""
    return partial(LambdaLR, lr_lambda=lambda step: min(1.0, 2 * (1 - step / steps)))


def train(model: nn.Module, guide: nn.Module, x: Tensor, *, steps: int, rate: float, **options: Any) -> History:
    """Train by Adam with a learning rate that falls to zero as a cosine; further options are those of ``fit``."""
    return fit(
        model,
        guide,
        x,
        steps=steps,
        optimizer=partial(Adam, lr=rate),
        scheduler=cosine_decay(steps),
        **options,
    )


def add_near_deterministic_options(parser: argparse.ArgumentParser, *, steps: int, rate: float) -> None:
    """The options of :func:`train_near_deterministic` and of its data."""
    parser.add_argument("--rows", type=int, default=20_000, help="data, of which a fifth is held out")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--batch", type=int, default=64, help="data of a training step")
    parser.add_argument("--rate", type=float, default=rate, help="learning rate of Adam, falling to zero as a cosine")


def train_near_deterministic(
    make_pair: Callable[[], Pair],
    datasets: Sequence[Any],
    gamma2: float,
    args: argparse.Namespace,
    *,
    first_gamma2: float = 10.0,
) -> tuple[list[Pair], float]:
    """A pair for each data set, trained at once, at a precision that rises over the first 60 % of the steps.

    Returns:
        The pairs, and the seconds.
    """
    torch.manual_seed(args.seed)
    made = [make_pair() for _ in datasets]
    pairs = [(model.to(args.device), guide.to(args.device)) for model, guide in made]
    precision = GeometricAnnealing(max(1, args.steps * 3 // 5), first_gamma2, gamma2)
    history = fit_many(
        pairs,
        [data.train.to(args.device) for data in datasets],
        steps=args.steps,
        objective=AnnealedPrecision(ELBO(), precision),
        optimizer=partial(Adam, lr=args.rate),
        scheduler=cosine_decay(args.steps),
        batch_size=args.batch,
        seed=args.seed,
    )
    return pairs, history.seconds


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure_collapse(
    model: Any, guide: Any, x: Tensor, epsilon: float
) -> tuple[tuple[float, float, float, float, float], Tensor]:
    """How much of a Gaussian VAE has collapsed, on the data x.

    Returns:
        ELBO, ELBO after sigma^2 alone is set to its optimum, sigma^2, percentage of collapsed latents and KL term, in
        nats per data point; and the KL of each latent, (N, K).
    """
    x = x.to(next(guide.parameters()).device)
    kl, squares = _kl_and_squares(model, guide, x)
    best, rate = squares / x.numel(), kl.sum(1).mean().item()
    sigma2 = model.sigma.square().item()
    elbo, tuned = (
        -rate - 0.5 * x.shape[1] * (math.log(2 * math.pi * var) + best / var)  # of the noise variance var
        for var in (sigma2, best)
    )
    share = 100 * collapsed(kl, epsilon=epsilon).double().mean().item()
    return (elbo, tuned, sigma2, share, rate), kl


def _kl_and_squares(model: Any, guide: Any, x: Tensor, *, draws: int = 10) -> tuple[Tensor, float]:
    """The KL of each latent, (N, K), and the sum of squared residuals, a mean over draws from the posterior."""
    squares, kl = 0.0, []
    for batch in x.split(2000):
        kl.append(latent_kl(model, guide, batch))
        for _ in range(draws):
            residual = batch - model.decode(guide.posterior(batch).rsample())
            squares += residual.square().sum().item() / draws
    return torch.cat(kl), squares
