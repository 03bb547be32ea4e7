"""What the examples share: their command line, figures, tables, schedules and closing line."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from tqdm.auto import tqdm

from inference import ELBO, AnnealedPrecision, GeometricAnnealing, History, fit, fit_many, load_pair, save_pair
from inference.core.checks import as_device
from inference.core.files import atomic_path
from inference.diagnostics import collapsed, latent_kl
from inference.plots import save_figure
from zoo.command_line.parser import INTERRUPTED, HelpFormatter

Pair = tuple[nn.Module, nn.Module]
_RESUME = "take the results that an earlier call with the same settings left in the folder"


# ---------------------------------------------------------------------------------------------------- command line


def chosen_device(name: str) -> str:
    """The device of that name; "auto" is CUDA where there is one."""
    try:
        return str(as_device(name))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def only_cpu(reason: str) -> Callable[[str], str]:
    """The device of a script that runs on the CPU alone, which refuses another one with its reason."""

    def chosen(name: str) -> str:
        if name not in ("auto", "cpu"):
            raise argparse.ArgumentTypeError(f"expected cpu, got {name!r}: {reason}")
        return "cpu"

    return chosen


def example_parser(
    description: str | None, name: str, *, seed: str, cpu_only: str | None = None, resume: str = _RESUME
) -> argparse.ArgumentParser:
    """A parser with the options that all examples have: ``--out``, ``--device``, ``--seed`` and ``--resume``.

    Args:
        description: The script's docstring.
        name: Of the progress bar, and of the folder below ``out/`` to write to, unless ``--out`` says otherwise.
        seed: What ``--seed`` is the seed of.
        cpu_only: Why the script runs on the CPU alone; None where it runs on any device.
        resume: What ``--resume`` does, where it is not to take the results of :func:`kept`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    device = "auto is CUDA where there is one" if cpu_only is None else f"auto or cpu: {cpu_only}"
    kind = chosen_device if cpu_only is None else only_cpu(cpu_only)
    parser.add_argument("--out", type=Path, default=Path("out") / name, help="folder to write to")
    parser.add_argument("--device", type=kind, default="auto", help=device)
    parser.add_argument("--seed", type=int, default=0, help=f"of {seed}")
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.set_defaults(name=name, bar=None)
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


def run_as_command(main: Callable[[], Any]) -> None:
    """Run an example; an interruption ends it with a sentence and the exit code that shells give to it."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the results that are in the folder", file=sys.stderr)
        sys.exit(INTERRUPTED)


# ---------------------------------------------------------------------------------------------------------- results

# What may differ between two calls whose results are the same.
_IRRELEVANT = {"out", "resume", "started", "device", "smoke", "name", "bar"}


def expect(args: argparse.Namespace, results: int) -> None:
    """Show one bar over that many results, which :func:`kept` moves on."""
    args.bar = tqdm(total=results, desc=args.name, unit="result")


def kept(args: argparse.Namespace, name: str, compute: Callable[[], Any]) -> Any:
    """A result of numbers in lists and dictionaries: written to the folder as it comes, and taken from there to resume.

    Args:
        args: The script's options, with ``resume``.
        name: Of the result, and in :func:`file_name` of its file.
        compute: Makes the result.
    """
    if args.bar is not None:
        args.bar.set_postfix_str(name)
    result = _stored_or_new(args, file_name(name), compute)
    if args.bar is not None:
        args.bar.update()
        if args.bar.n >= args.bar.total:
            args.bar.close()
    return result


def file_name(name: str) -> str:
    """The name with ``_`` in place of what is no letter, digit or dot."""
    return re.sub(r"[^\w.]", "_", name)


def _stored_or_new(args: argparse.Namespace, name: str, compute: Callable[[], Any]) -> Any:
    settings = {key: str(value) for key, value in sorted(vars(args).items()) if key not in _IRRELEVANT}
    path = args.out / "rows" / f"{name}.json"
    if args.resume and path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] == settings:
            return stored["result"]
    torch.manual_seed(args.seed)  # a result is the same, whichever others were taken from the folder
    written = json.dumps({"settings": settings, "result": compute()})
    with atomic_path(path) as temporary:
        temporary.write_text(written)
    return json.loads(written)["result"]  # as a later call finds it


def kept_of_pairs(
    args: argparse.Namespace, train: Callable[[], Sequence[Pair]], measures: Mapping[str, Callable[..., Any]]
) -> list[Any]:
    """Results of pairs that are trained at once, unless the folder has all of them; see :func:`kept`.

    Args:
        args: The script's options, with ``resume``.
        train: Makes the pairs, trained.
        measures: Of each pair in turn: the name of its result, and what makes it from model and guide.
    """
    pairs = cache(train)

    def measured(i: int, measure: Callable[..., Any]) -> Any:
        pair = pairs()[i]
        torch.manual_seed(args.seed + i)  # whether or not this is the first one, which has them trained
        return measure(*pair)

    return [kept(args, name, partial(measured, i, one)) for i, (name, one) in enumerate(measures.items())]


def kept_pairs(args: argparse.Namespace, pairs: Mapping[str, Pair], train: Callable[[], Any]) -> list[Pair]:
    """Pairs in their places, trained at once, or with the weights that an earlier call left; see :func:`kept`.

    Args:
        args: The script's options, with ``resume``.
        pairs: By name.
        train: Trains all of them in place.
    """
    paths = {name: args.out / "rows" / f"{file_name(name)}.safetensors" for name in pairs}

    def trained() -> list[Pair]:
        train()
        return list(pairs.values())

    kept_of_pairs(args, trained, {name: partial(save_pair, path) for name, path in paths.items()})
    return [load_pair(paths[name], *pair) for name, pair in pairs.items()]


def kept_pair(args: argparse.Namespace, name: str, pair: Pair, train: Callable[[], Any]) -> Pair:
    """One of :func:`kept_pairs`, trained by itself."""
    (found,) = kept_pairs(args, {name: pair}, train)
    return found


def say(text: str = "") -> None:
    """Print a line above the bar."""
    tqdm.write(text)


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
    """Train by Adam with a learning rate that falls to zero as a cosine; further options are those of ``fit``.

    Of the bars there is the script's own alone, unless the options have ``progress``.
    """
    return fit(model, guide, x, **_adam_and_cosine(steps, rate), **{"progress": False, **options})


def train_many(
    pairs: Sequence[Pair], data: Tensor | Sequence[Tensor], *, steps: int, rate: float, **options: Any
) -> History:
    """Train pairs at once, each as :func:`train` one by itself; further options are those of ``fit_many``."""
    return fit_many(pairs, data, **_adam_and_cosine(steps, rate), **{"progress": False, **options})


def _adam_and_cosine(steps: int, rate: float) -> dict[str, Any]:
    return {"steps": steps, "optimizer": partial(Adam, lr=rate), "scheduler": cosine_decay(steps)}


def pair_under_seed(seed: int, make: Callable[[], Pair], device: str) -> Pair:
    """A pair that begins where its own seed has it begin, on the device."""
    torch.manual_seed(seed)
    model, guide = make()
    return model.to(device), guide.to(device)


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
    history = train_many(
        pairs,
        [data.train.to(args.device) for data in datasets],
        steps=args.steps,
        rate=args.rate,
        objective=AnnealedPrecision(ELBO(), precision),
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
        kl.append(latent_kl(model, guide, batch, progress=False))
        for _ in range(draws):
            residual = batch - model.decode(guide.posterior(batch).rsample())
            squares += residual.square().sum().item() / draws
    return torch.cat(kl), squares
