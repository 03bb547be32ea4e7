"""The card of a trained pair: what it is, what is known of its evidence and gap, and by which independent checks."""

from __future__ import annotations

import html
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

import scipy
import torch
from torch import Tensor, nn

from inference import (
    Adaptive,
    Annealed,
    Evidence,
    coverage,
    evidence,
    gap,
    latent_kl,
    log_weights,
    pareto_k,
    rate_distortion,
    sbc,
    simulate,
)
from inference.core.checks import check_count
from inference.core.estimates import Interval, log_mean_exp, normal_quantile
from inference.diagnostics import collapsed
from inference.marginal_likelihood.base.result import take_rows
from zoo.data import Dataset

# Above this k-hat an importance-weighted estimate is not reliable (Vehtari et al. 2015).
_HEAVY = 0.7
_LEVEL = 0.95
_COVERED = 0.9
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")
_PACKAGES = ("torch", "pyro-ppl", "numpy")


@dataclass(frozen=True, kw_only=True, repr=False)
class Card:
    """What is known of a trained pair on some rows of data; means over the rows, in nats per data point.

    Attributes:
        name: How the pair is called.
        model: The model's class and sizes.
        guide: The guide's.
        num_parameters: Weights of both.
        data: The data set and its preprocessing.
        dataset: Its name for :func:`zoo.named_dataset`, empty where it has none.
        num_data: Rows measured, N.
        num_split: Rows whose gap is split.
        command: What made the pair, empty where that is not known.
        seed: Seed of everything measured here.
        versions: Of Python and the packages.
        elbo: With a 95 % interval for the Monte Carlo error, as all intervals here.
        iwae: Importance-weighted ELBO of ``num_samples`` samples.
        num_samples: Samples per data point of ELBO and IWAE.
        evidence: Mean log p(x), with the interval of its guarantee.
        method: How it was found.
        guarantee: Number of rows by kind of guarantee, see :class:`inference.Evidence`.
        check: Mean log p(x) by another method; None where there is none.
        check_method: That method.
        gap: Evidence less ELBO over the rows that were split, and its parts.
        approximation: What the family leaves; None where the guide cannot be refitted.
        amortisation: What the refit wins.
        pareto_k: Median k-hat of the importance weights; None where they have no tail, or too few to tell.
        heavy: Share of rows with a k-hat above 0.7, whose weights are not to be trusted.
        latent_dim: K; None where the pair has no such number.
        collapsed: Latents that the guide leaves at the prior; None for guides whose divergence has no closed form.
        rate: KL divergence of guide from prior.
        distortion: Minus the expected log-likelihood.
        coverage: Lowest share of simulated truths inside the central 90 % interval of a latent, with binomial limits
            that hold for all latents together; None where the model was not simulated.
    """

    name: str
    model: str
    guide: str
    num_parameters: int
    data: str
    dataset: str
    num_data: int
    num_split: int
    command: str
    seed: int
    versions: dict[str, str]
    elbo: Interval
    iwae: Interval
    num_samples: int
    evidence: Interval
    method: str
    guarantee: dict[str, int]
    check: Interval | None
    check_method: str
    gap: Interval
    approximation: Interval | None
    amortisation: Interval | None
    pareto_k: float | None
    heavy: float
    latent_dim: int | None
    collapsed: int | None
    rate: Interval
    distortion: Interval
    coverage: Interval | None

    @property
    def agrees(self) -> bool:
        """Whether the intervals of evidence and check meet; true where there is no check."""
        return self.check is None or max(self.evidence.lower, self.check.lower) <= min(
            self.evidence.upper, self.check.upper
        )

    def rows(self) -> list[tuple[str, str]]:
        """Heading and text of each entry, in reading order."""
        guarantee = ", ".join(f"{kind} for {count} rows" for kind, count in self.guarantee.items())
        latents = "" if self.latent_dim is None else f" of {self.latent_dim}"
        checked = "none" if self.check is None else f"{_text(self.check)} by {self.check_method}"
        shape = "unknown" if self.pareto_k is None else f"{self.pareto_k:.2f}"
        found = [
            ("pair", self.name),
            ("model", self.model),
            ("guide", self.guide),
            ("parameters", str(self.num_parameters)),
            ("data", f"{self.data}; {self.num_data} row{'s' * (self.num_data != 1)} measured"),
            ("ELBO", _text(self.elbo)),
            (f"IWAE, {self.num_samples} samples", _text(self.iwae)),
            ("log p(x)", f"{_text(self.evidence)} by {self.method} ({guarantee})"),
            ("independent check", checked if self.agrees else f"{checked}: DISAGREES"),
            (f"gap, {self.num_split} rows", _text(self.gap)),
            ("  approximation", _text(self.approximation)),
            ("  amortisation", _text(self.amortisation)),
            ("Pareto k-hat", f"median {shape}, {100 * self.heavy:.0f} % above {_HEAVY}"),
            ("collapsed latents", "unknown" if self.collapsed is None else f"{self.collapsed}{latents}"),
            ("rate", _text(self.rate)),
            ("distortion", _text(self.distortion)),
            ("least coverage of 90 %", _text(self.coverage)),
            ("command", self.command or "unknown"),
            ("seed of the measurements", str(self.seed)),
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items())),
        ]
        return found

    def __str__(self) -> str:
        """A line for each entry; nats per data point."""
        rows = self.rows()
        width = max(len(head) for head, _ in rows) + 2
        return "\n".join(f"{head:{width}s}{text}" for head, text in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(head)}</th><td style='text-align:left'>"
            f"{html.escape(text)}</td></tr>"
            for head, text in self.rows()
        )
        return f"<table>{cells}</table>"

    def to_json(self) -> str:
        """The card as JSON; an end that does not exist and a number that is not known are null."""
        return strict_json(asdict(self) | _intervals(self))

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If it is no JSON, or not of a card.
        """
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected a card as JSON, got a text that is none: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(tree, dict) or set(tree) != names:
            came = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(f"expected a card with the entries {sorted(names)}, got {came}")
        return cls(**{name: _read(value) for name, value in tree.items()})


_ENDS = {"value": math.nan, "lower": -math.inf, "upper": math.inf, "standard_error": math.nan}


def _intervals(card: Card) -> dict[str, Any]:
    return {name: value._asdict() for name, value in vars(card).items() if isinstance(value, Interval)}


def strict_json(tree: Any) -> str:
    """A tree as JSON that every reader understands: infinite and unknown numbers are null."""
    return json.dumps(_finite(tree), indent=2, allow_nan=False)


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _read(node: Any) -> Any:
    if isinstance(node, dict) and set(node) == set(_ENDS):
        return Interval(**{end: _ENDS[end] if node[end] is None else float(node[end]) for end in _ENDS})
    return node


def _text(part: Interval | None) -> str:
    if part is None:
        return "unknown"
    if part.lower == part.upper:
        return f"{part.value:.4f}"
    if math.isinf(part.upper):
        return f">= {part.lower:.4f}"
    return f"{part.value:.4f} [{part.lower:.4f}, {part.upper:.4f}]"


def card(
    model: nn.Module,
    guide: nn.Module,
    data: Dataset | Tensor | Sequence[Tensor],
    *,
    name: str = "unnamed",
    dataset: str = "",
    command: str = "",
    rows: int = 64,
    split: int = 16,
    num_samples: int = 1000,
    simulated: int = 1000,
    method: str | Any = "auto",
    check: str | Any | tuple[str, float] | None = "auto",
    whole: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Card:
    """Measure a trained pair: ELBO, evidence with a check by another method, gap and its parts, and the guide's health.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        data: A data set, of which the first held-out rows are measured (the training rows where none are held out);
            data, (N, D); or all arguments of the pair, which are taken as they are.
        name: What the card calls the pair, of letters, digits and ``_.-/``.
        dataset: Name of the data for :func:`zoo.named_dataset`, for the card.
        command: What made the pair, for the card.
        rows: Rows measured, at most.
        split: Rows whose gap is split into approximation and amortisation gap, at most.
        num_samples: Samples per data point of ELBO, IWAE and k-hat.
        simulated: Data simulated to count the coverage of the guide; 0 leaves it.
        method: How to find the evidence, see :func:`inference.evidence`.
        check: The method that checks it; ``"auto"`` takes one of another kind: an adaptive mixture beside a closed
            form, a limit or quadrature, annealing beside anything else. A pair such as ``("a grid", -3.2)`` is the mean
            log p(x) by other means; None leaves it.
        whole: Take all data as one data point, see :func:`inference.iter_log_weights`.
        seed: Seed of everything.
        progress: Show progress bars.

    Raises:
        TypeError: If data or pair are of the wrong type.
        ValueError: If data are not finite or do not fit the pair, or a setting is out of range.

    Example:
        >>> import torch
        >>> from guides import Exact
        >>> from zoo import PPCA
        >>> model = PPCA(3, 2).double()
        >>> x = torch.zeros(4, 3, dtype=torch.float64)
        >>> found = card(model, Exact(model), x, check=None, simulated=0, progress=False)
        >>> abs(found.evidence.value - found.elbo.value) < 1e-9
        True
    """
    check_name(name)
    for setting, least in (("rows", 1), ("split", 1), ("num_samples", 2), ("simulated", 0)):
        check_count(locals()[setting], setting, least)
    x, described = _rows_of(data, rows)
    options: dict[str, Any] = {"seed": seed, "progress": progress, "whole": whole}
    known = evidence(model, *x, guide=None if method == "exact" else guide, method=method, **options)
    checked, check_method = _checked(model, guide, x, known, check, options)
    weights = log_weights(model, guide, *x, num_samples=num_samples, **options).double()
    num_data = weights.shape[1]
    first = take_rows(known, torch.arange(min(split, num_data)))
    parts = gap(model, guide, *(x if whole else [part[:split] for part in x]), known=first, **options).mean
    plane = rate_distortion(model, guide, *x, **options)
    shapes = pareto_k(weights).value
    second_part = next((part for key, part in parts.items() if key not in ("gap", "approximation")), None)
    return Card(
        name=name,
        model=describe(model),
        guide=describe(guide),
        num_parameters=sum(p.numel() for half in (model, guide) for p in half.parameters()),
        data=described,
        dataset=dataset,
        num_data=num_data,
        num_split=min(split, num_data),
        command=command,
        seed=seed,
        versions={"Python": platform.python_version()} | {package: version(package) for package in _PACKAGES},
        elbo=_mean(weights.mean(0), weights.std(0) / math.sqrt(num_samples)),
        iwae=_mean(log_mean_exp(weights), (weights - log_mean_exp(weights)).exp().std(0) / math.sqrt(num_samples)),
        num_samples=num_samples,
        evidence=known.mean,
        method=known.method,
        guarantee=dict(Counter(known.guarantee)),
        check=checked,
        check_method=check_method,
        gap=parts["gap"],
        approximation=parts.get("approximation"),
        amortisation=second_part,
        pareto_k=float(shapes.median()) if bool(shapes.median().isfinite()) else None,
        heavy=float((shapes > _HEAVY).double().mean()),
        latent_dim=getattr(model, "latent_dim", None),
        collapsed=None if whole else _collapsed(model, guide, x),
        rate=plane.rate,
        distortion=plane.distortion,
        coverage=None if whole else _least_coverage(model, guide, x, simulated, seed, progress),
    )


def check_name(name: str) -> None:
    """Check the name of a pair, which is a place below a folder.

    Raises:
        ValueError: If it is not of letters, digits and ``_.-/``, or leads out of the folder.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"expected a pair's name of letters, digits and _.-/, got {name!r}")


def describe(module: Any) -> str:
    """A module's class, and the settings that it would be built from where it tells them."""
    try:
        settings = module.config()
    except (AttributeError, NotImplementedError):
        settings = {}
    settings = {key: value for key, value in settings.items() if value != "<model>"}
    plain = {key: value for key, value in settings.items() if isinstance(value, int | float | list | bool | str)}
    return f"{type(module).__name__}({', '.join(f'{key}={value}' for key, value in plain.items())})"


def _rows_of(data: Dataset | Tensor | Sequence[Tensor], rows: int) -> tuple[tuple[Tensor, ...], str]:
    if isinstance(data, str) or not isinstance(data, Dataset | Sequence | Tensor):
        raise TypeError(
            "expected data as a tensor (N, D), a data set such as zoo.named_dataset gives, or a list of the pair's "
            f"arguments, got {type(data).__name__}"
        )
    if isinstance(data, Tensor):
        return (data[:rows],), "a tensor"
    if isinstance(data, Sequence):
        return tuple(data), "tensors of shape " + " and ".join(str(tuple(part.shape)) for part in data)
    kind = "held-out" if len(data.test) else "training"
    return (measured_rows(data, rows),), f"{data.name}, {data.transform}, {kind} rows"


def measured_rows(data: Dataset, rows: int) -> Tensor:
    """The rows of a data set on which pairs are measured: held-out ones where there are any."""
    return (data.test if len(data.test) else data.train)[:rows]


def _checked(
    model: nn.Module, guide: nn.Module, x: tuple[Tensor, ...], known: Evidence, check: Any, options: dict[str, Any]
) -> tuple[Interval | None, str]:
    """log p(x) by other means, and their name."""
    if check is None:
        return None, ""
    if isinstance(check, tuple):
        means, value = check
        return Interval(value, value, value, 0.0), means
    method = _check_method(known) if check == "auto" else check
    other = evidence(model, *x, guide=guide, method=method, **options | {"seed": options["seed"] + 1})
    return other.mean, other.method


def _check_method(known: Evidence) -> Any:
    """A method of another kind than the one that made the evidence."""
    return Adaptive() if set(known.guarantee) <= {"exact", "numerical"} else Annealed()


def _mean(value: Tensor, error: Tensor) -> Interval:
    mean, spread = float(value.mean()), float(error.square().sum().sqrt()) / len(value)
    width = normal_quantile(_LEVEL) * spread
    return Interval(mean, mean - width, mean + width, spread)


def _collapsed(model: nn.Module, guide: nn.Module, x: tuple[Tensor, ...]) -> int | None:
    try:
        return int(collapsed(latent_kl(model, guide, *x, progress=False)).sum())
    except (TypeError, ValueError):  # not a Gaussian guide of one latent
        return None


def _least_coverage(
    model: nn.Module, guide: nn.Module, x: tuple[Tensor, ...], simulated: int, seed: int, progress: bool
) -> Interval | None:
    """Of the latent whose central 90 % interval holds the truth least often."""
    if not simulated:
        return None
    try:
        ranks = sbc(simulate(model, guide, *x, num_simulations=simulated, seed=seed, progress=progress), seed=seed)
    except (TypeError, ValueError):  # the model cannot be simulated at such data
        return None
    shares = coverage(ranks, (_COVERED,), level=1 - (1 - _LEVEL) / len(ranks.names))
    least = int(shares.value[0].argmin())
    value, lower, upper = (float(part[0, least]) for part in (shares.value, shares.lower, shares.upper))
    return Interval(value, lower, upper, float(scipy.stats.binom.std(simulated, value)) / simulated)
