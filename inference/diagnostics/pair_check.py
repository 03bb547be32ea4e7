"""What a pair can be used for: each rule is tried on it, and what it breaks is named with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from inference.core.batch_dependence import refuse_batch_dependence
from inference.core.checks import check_log_weights
from inference.core.display import as_html
from inference.core.protocols import SupportsLocal, SupportsLogEvidence
from inference.core.seeding import random_state
from inference.core.standardisation import far_from_unit
from inference.objectives.evidence_lower_bound import ELBO
from inference.pair.call import Call
from inference.pair.handlers import local_params
from inference.pair.rows import with_known_rows
from inference.pair.run import Program, modules_of
from inference.pair.simulated import observed_arguments
from inference.posterior.log_joint import LogJoint


class Door(NamedTuple):
    """One use of a pair.

    Attributes:
        name: The rule that it needs.
        serves: What is open to pairs that keep the rule.
        problem: What is broken, in a sentence; empty where the door is open.
        remedy: How to mend it; empty where the problem says so itself.
        optional: Whether it is an offer of some pairs rather than a rule for all.
    """

    name: str
    serves: str
    problem: str
    remedy: str
    optional: bool


@dataclass(frozen=True, kw_only=True)
class PairCheck:
    """What a pair can be used for, see :func:`check_pair`.

    Attributes:
        doors: Every use, in the order of the rules.
    """

    doors: tuple[Door, ...]

    @property
    def ok(self) -> bool:
        """Whether the pair keeps all rules."""
        return not self.problems

    @property
    def problems(self) -> dict[str, str]:
        """What is broken, by the name of the rule; what only some pairs offer is none."""
        return {door.name: door.problem for door in self.doors if door.problem and not door.optional}

    def __str__(self) -> str:
        """One line a door, and below it what is broken and the remedy."""
        lines = []
        for door in self.doors:
            lines.append(f"{'no ' if door.problem else 'yes'}  {door.name}: {door.serves}")
            lines += [f"     {text}" for text in (door.problem, door.remedy and f"Remedy: {door.remedy}") if text]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import pandas as pd

        return as_html(
            "What the pair can be used for", pd.DataFrame(self.doors, columns=Door._fields).set_index("name")
        )


def check_pair(
    model: Program,
    guide: Program,
    *args: Any,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    **kwargs: Any,
) -> PairCheck:
    """Find out what a pair can be used for, which rule it breaks and how to mend it.

    Runs the pair a few times, on all data that it is given: some ten rows suffice. Nothing is trained, and random state
    and parameter store stay as they are. A rule that is kept on these data may be broken on others.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        *args: Arguments of both, the data first.
        plate: Name of the plate over the data, ``"data"`` if None.
        whole: See :func:`inference.iter_log_weights`.
        missing: See :func:`inference.iter_log_weights`.
        **kwargs: Keyword arguments of both.

    Example:
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> print(check_pair(LinearVAE(5, 2), MeanField(5, 3), torch.randn(8, 5)).problems["pair"])
        expected a value of event shape (2,) at the model's site 'z', got the guide's of shape (8, 3)
    """
    call, doors, shut = Call(model, guide, args, kwargs, plate, whole=whole, missing=missing), list[Door](), ""
    for name, serves, needed, trial in _TRIALS:
        problem = shut or _problem(trial, call)
        doors.append(Door(name, serves, problem, _remedy(problem), name in _OFFERS))
        if needed and problem and not shut:
            shut = f"not tried, see {name!r}"
    return PairCheck(doors=tuple(doors))


def _problem(trial: Callable[[Call], None], call: Call) -> str:
    """What a trial says is broken, on one line."""
    try:
        with random_state(0), pyro.get_param_store().scope():
            trial(call)
    except Exception as error:
        text = " ".join(str(error).split())
        ours = isinstance(error, ValueError | TypeError | FloatingPointError)
        return text if ours and text else f"{type(error).__name__}: {text}"
    return ""


# --- the trials: each raises what is broken -------------------------------------------------------------------------


def _arguments(call: Call) -> None:
    call.check()


def _units(call: Call) -> None:
    x = call.args[0] if call.args else None
    for module in modules_of(*call.programs):
        if said := far_from_unit(module, x):
            raise ValueError(said)


def _after_training(call: Call) -> None:
    with refuse_batch_dependence(*call.programs), torch.no_grad():
        call.run()


def _pair(call: Call) -> None:
    call.probe()


def _repeatable(call: Call) -> None:
    call.probe().check_determined()


def _training(call: Call) -> None:
    assert call.guide is not None
    objective = ELBO(plate=call.plate)
    objective.whole = call.whole
    with local_params() as handler, _ran() as ran:
        loss = objective.differentiable_loss(call.model, call.guide, *call.args, **call.kwargs)
    every = [*handler.seen, *(p for module in modules_of(*call.programs) for p in module.parameters())]
    parameters = list({id(p): p for p in every if p.requires_grad}.values())
    if not parameters:
        raise ValueError("expected a pair with at least one trainable parameter, got none")
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    names = {
        id(p): f"{type(m).__name__}.{n}" for m in [*ran, *modules_of(*call.programs)] for n, p in m.named_parameters()
    }
    idle = [names.get(id(p), "a parameter") for p, gradient in zip(parameters, found, strict=True) if gradient is None]
    if idle:
        raise ValueError(f"expected the loss to depend on every trainable parameter, got none for {idle}")
    known = {id(p) for p in parameters}
    lost = sorted({names[id(p)] for m in ran for p in m.parameters() if p.requires_grad and id(p) not in known})
    if lost:
        raise ValueError(f"expected every network that runs to be trained, got {lost} outside of the pair's parameters")


@contextmanager
def _ran() -> Iterator[list[nn.Module]]:
    """The modules that run in a block."""
    modules: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: modules.append(module))
    try:
        yield modules
    finally:
        handle.remove()


@torch.no_grad()
def _weights(call: Call) -> None:
    if narrow := call.probe_density().narrow:
        raise ValueError(f"expected a guide with a density on all of the latent's support, got one of less at {narrow}")
    weights = call.run(16).log_weights
    check_log_weights(weights)
    if bool(torch.isinf(weights).any()):
        bad = int(torch.isinf(weights).any(0).nonzero()[0])
        raise ValueError(f"expected the guide to draw where the model has mass, got log p = -inf at data point {bad}")


def _log_joint(call: Call) -> None:
    log_joint = LogJoint.of(call)
    value = log_joint(log_joint.sample_prior(1))
    if not bool(torch.isfinite(value).all()):
        raise ValueError("expected a finite log joint density at latents of the prior, got one that is not")


def _rows(call: Call) -> None:
    if not call.whole:
        with_known_rows(call, call.probe())


def _simulated(call: Call) -> None:
    observed_arguments(call.probe().model_sites, [*call.args, *call.kwargs.values()], missing=call.missing)


def _freed(call: Call) -> None:
    if not isinstance(call.guide, SupportsLocal | AutoGuide):  # the parameters of an AutoGuide are freed together
        kind = type(call.guide).__name__
        raise TypeError(f"expected a guide with local(x) or an AutoGuide, got {kind}: gap gives the total alone")


def _closed_form(call: Call) -> None:
    if not isinstance(call.model, SupportsLogEvidence):
        raise TypeError(f"expected a model with log_evidence(x), got {type(call.model).__name__}: it is estimated")


def _modules(call: Call) -> None:
    others = [p for p in call.programs if not isinstance(p, nn.Module)]
    if others:
        raise TypeError(f"expected two modules, got {[getattr(p, '__name__', type(p).__name__) for p in others]}")


# Name, what is open then, whether all that follows needs it, and the trial.
_TRIALS: tuple[tuple[str, str, bool, Callable[[Call], None]], ...] = (
    ("data", "everything", True, _arguments),
    ("pair", "everything", True, _pair),
    ("units", "training at the usual learning rates", False, _units),
    ("eval mode", "log_weights, evidence, gap, compare", False, _after_training),
    ("repeatable", "log_weights, evidence, gap, compare", False, _repeatable),
    ("training", "fit, fit_best, every objective", False, _training),
    ("density", "log_weights, elbo, iwae, pareto_k, compare, evidence by importance", False, _weights),
    ("log joint", "evidence by quadrature, annealing, adaptive and Laplace; posterior draws", False, _log_joint),
    ("rows", "evidence in blocks and with a tolerance, refit, gap", False, _rows),
    ("simulation", "simulate, sbc, coverage, tarp, bdmc", False, _simulated),
    ("free guide", "the split of gap into approximation and amortisation", False, _freed),
    ("closed form", "evidence(method='exact')", False, _closed_form),
    ("modules", "save_pair, load_pair, float64 copies for evidence", False, _modules),
)

_OFFERS = ("free guide", "closed form", "modules")

# What a problem's text says, and the remedy; the first that is found counts.
_REMEDIES = (
    ("not tried", "mend that first"),
    ("torch's own", "take distributions from pyro.distributions, not from torch.distributions"),
    (
        "density of some of the",
        "pass every tensor with one row a data point as an argument, and use no batch statistics; an AutoGuide keeps "
        "the rows that it was made with, an amortised guide does not",
    ),
    (
        "Shape mismatch inside plate|size of tensor",
        "keep data points first, as in z.unsqueeze(-1) * weight, and end distributions of vectors in .to_event(1)",
    ),
    ("expected data at site", "observe data in the distribution's support: another distribution, or other units"),
    ("Expected parameter", "make it valid, as a scale by .exp() or softplus, and look for NaN"),
    ("a name of its own", "give each pyro.sample a name of its own, also in a loop"),
    (
        "in its distribution's support|within the support|all of the latent",
        "give the guide the latent's support: MeanField(D, K, support=model.prior().support)",
    ),
    ("swapped", "call check_pair(model, guide, x): the model first"),
    ("observes data", "give the model an observed site: pyro.sample('x', ..., obs=x)"),
    ("with a latent site", "sample a latent in the model, or take the likelihood itself: nothing is to be inferred"),
    ("sample the model's latent sites", "sample the same names, and no others, in model and guide"),
    (
        "inside one vectorised plate",
        "put all sample sites into one `with pyro.plate('data', len(x))`, or name it by plate=",
    ),
    ("one dimension and size in model and guide", "let both plates be pyro.plate('data', len(x), dim=-1)"),
    ("event shape", "make latent dimensions agree, and end distributions of vectors in .to_event(1)"),
    ("dtype", "convert once: model.double(), guide.double() and x.double(), or x.float()"),
    ("finite", "remove or impute rows with missing values, or look for a logarithm or division that overflows"),
    ("which it has no use for", "pass one tensor, or give model and guide a second argument"),
    ("train mode", "model.eval(), guide.eval()"),
    ("not frozen", "call freeze(x_train) after training"),
    ("near the unit of", "model.standardise_by(x_train), guide.standardise_by(x_train)"),
    ("outside of pyro.sample", "draw all noise by pyro.sample, and hide no random site by poutine.block"),
    ("a Delta", "take a guide with a density, such as AutoNormal or guides.MeanField"),
    ("to carry no scale", "leave poutine.scale to training, or weight rows by repeating them"),
    ("same mask", "mask the latent alike in model and guide, or not at all"),
    ("on one support", "give the guide the latent's support: MeanField(D, K, support=model.prior().support)"),
    ("where the model has mass", "give the guide the latent's support: MeanField(D, K, support=...)"),
    ("reparameterised", "take an objective without pathwise gradients, such as WakeWake"),
    ("at least one trainable", "make the networks modules of the pair, or name tensors by pyro.param"),
    ("depend on every trainable", "look for detach(), for no_grad, or for a layer that is not used"),
    ("every network that runs", "make it an attribute of the pair's module, or call pyro.module(name, network)"),
    ("observed value to be an argument", "observe the argument itself, obs=x, and transform it before the call"),
    ("with local", "take a guide of this library, or give yours a method local(x)"),
    ("two modules", "write model and guide as nn.Module with forward"),
)


def _remedy(problem: str) -> str:
    """How to mend a problem; empty where there is none, or nothing to add."""
    return next((remedy for text, remedy in _REMEDIES if problem and re.search(text, problem)), "")
