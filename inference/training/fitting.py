"""Stochastic variational inference (SVI): training of any pair by any torch optimiser."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from inference.core.checks import as_device, check_arguments, check_count
from inference.core.files import locked
from inference.core.ranks import ranks
from inference.core.seeding import seeded
from inference.core.sources import Column, as_arguments, opened
from inference.core.standardisation import far_from_unit
from inference.numerics.graphs import Level, check_capture
from inference.objectives.base import Objective, check_objective
from inference.objectives.evidence_lower_bound import ELBO
from inference.pair.call import Call
from inference.pair.handlers import local_params
from inference.pair.run import Program, modules_of, refuse_swapped
from inference.training.batches import Batches, InMemory, Loaded, Supply, as_loader, laid_out, moved
from inference.training.callbacks import Callback, check_callbacks
from inference.training.checkpoint import Checkpoint
from inference.training.makers import optimizer_maker, scheduler_maker
from inference.training.mixed_precision import Precision, check_precision
from inference.training.trainer import History, Trainer

_logger = logging.getLogger(__name__)


def adam(parameters: Sequence[Tensor]) -> Optimizer:
    """Adam with learning rate 1e-3, the default optimiser: all parameters in one operation where there is one."""
    try:
        return torch.optim.Adam(parameters, lr=1e-3, fused=True)
    except RuntimeError:  # for these parameters or on this device there is none
        return torch.optim.Adam(parameters, lr=1e-3)


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *args: Any,
    steps: int,
    objective: pyro.infer.ELBO | None = None,
    optimizer: Callable[[list[Tensor]], Optimizer] = adam,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    batch_size: int | None = None,
    plate: str | None = None,
    whole: bool = False,
    missing: bool = False,
    seed: int | None = None,
    device: str | torch.device | None = None,
    validation: Any = None,
    evaluate_every: int = 100,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    callbacks: Sequence[Callback] = (),
    capture: Level = "auto",
    precision: Precision = "full",
    progress: bool = True,
) -> History:
    """Stochastic variational inference (SVI): train a pair in place.

    The steps minimise the objective's loss per data point. With a seed the run is repeatable bit for bit on one machine
    and leaves the global random state as it was; an interrupted run that is called again with the same arguments and
    ``checkpoint`` goes on from the last checkpoint to the same bits. The pair is left in eval mode. Where an error or
    an interrupt ends the run, it is left in the state of a whole step with finite parameters: of the last that was read
    from the device, with a checkpoint of the last one (or last bunch, see ``capture``), with ``validation`` of the best
    evaluation. The history is then the error's attribute ``history``, and the state is saved.

    Args:
        model: Pyro model, a module or a function.
        guide: Pyro guide, a module or a function.
        data: (N, ...) tensor, or a tuple of the pair's positional arguments, the first with N rows: tensors, and
            dictionaries of tensors, of N rows are rows of data; all others go with every mini-batch as they are. NumPy
            arrays, memory-mapped ones among them, and data frames serve as tensors and are not copied. Or a
            ``DataLoader``, whose batches are the arguments of a step, or an ``IterableDataset`` with ``batch_size``.
        *args: The pair's further arguments, in place of a tuple: ``fit(model, guide, x, y, steps=...)``.
        steps: Number of optimiser steps.
        objective: What to minimise: any ``pyro.infer.ELBO`` with a differentiable loss; :class:`ELBO` by default.
        optimizer: Makes a torch optimiser from the list of parameters; LBFGS is called with the full batch.
        scheduler: Makes a learning-rate schedule from the optimiser; it advances once a step.
        batch_size: Data points per step, without replacement within an epoch; None takes them all in every step, or
            those of a ``DataLoader``'s batch.
        plate: Name of the plate over the data, ``"data"`` if None or the objective's.
        whole: Take all data as one data point, whatever the plates: for latents that all data share.
        missing: NaN in the data stands for a missing value that the model itself masks.
        seed: Seed of the noise and of the order of the data.
        device: Where to train; the pair is moved there and stays there. None trains on the pair's own device, "auto" on
            a GPU where there is one.
        validation: Held-out data, like ``data``; of a ``DataLoader`` all rows in their order.
        evaluate_every: Steps between evaluations on the validation data.
        patience: Evaluations without improvement after which to stop.
        checkpoint: File to write now and then, and to resume from where it exists. It belongs to the run with this
            pair, objective, optimiser, schedule, data and seed; another one is refused. With it each step costs a copy
            of the parameters and of the optimiser's state.
        checkpoint_every: Steps between checkpoints; the last step is always written.
        callbacks: Called after each step, evaluation and checkpoint and at the end; one that returns true stops the
            run, which then counts as stopped early. See :class:`inference.Callback`.
        capture: How steps run. ``"off"``: by the pair's own Python. ``"graph"``: each form of batch is recorded once as
            a graph of tensor operations and replayed without Python, to the same bits. What else Python does must be
            the same in every step: where a step changes it, reads numbers from tensors or makes shapes of values, the
            pair's own Python goes on. The graph is compared with it on the same noise at growing intervals, and before
            anything is evaluated, saved or returned; where they differ, a warning says so, and the steps since the last
            comparison are taken again without it. With Adam, fused as by default, a replay takes four steps where none
            but the last is looked at, updates included; an interrupt is then left in the state of the last bunch, and
            parameters have no gradients. ``"compile"``: the graph compiled by inductor, with any Adam four steps as
            one, which takes minutes and needs a C++ compiler; it agrees with the pair's own Python within rounding, so
            that a resumed run goes on to other bits. ``"auto"``: a graph where some hundred steps are to come. Which
            way steps run, and why, is logged. Python's state that no attribute, closure or global shows, as the time of
            day, is seen by the comparisons alone; a pair that holds an iterator is not recorded.
        precision: ``"bfloat16"``: linear and convolutional layers of a float32 pair compute in bfloat16, which is
            faster where a device multiplies such matrices by itself; draws, densities, parameters and the validation
            stay in float32. ``"full"``: all stays so.
        progress: Show a progress bar.

    Returns:
        The losses and times. With ``validation`` the pair holds the parameters of the best evaluation.

    Raises:
        TypeError: If an argument is of the wrong type; before anything runs.
        ValueError: If data are not finite or do not fit the pair, if the model observes nothing, if LBFGS is given
            mini-batches, if the device is not there, or if the checkpoint is damaged, belongs to another run or a
            longer one, or is being written by another run; if one is wanted of an ``IterableDataset``, which cannot be
            resumed.
        OSError: If the checkpoint cannot be written; before anything runs where that can be known.
        FloatingPointError: If the loss or a parameter becomes NaN or infinite; the message names the steps.
    """
    data = one_by_one(data, args)
    optimizer, scheduler = optimizer_maker(optimizer), scheduler_maker(scheduler)
    callbacks = check_callbacks(callbacks)
    check_capture(capture)
    check_precision(precision)
    if objective is not None:
        check_objective(objective)
    for name, value in (("steps", steps), ("evaluate_every", evaluate_every), ("checkpoint_every", checkpoint_every)):
        check_count(value, name)
    if patience is not None:
        check_count(patience, "patience")
        if validation is None:
            raise ValueError("expected validation data for patience, got none")
    device = None if device is None else as_device(device)
    loader = as_loader(data, batch_size)
    if loader is not None:
        _check_loader(loader, whole, checkpoint, seed)
    data = None if loader is not None else _as_batch(data, device)
    validation = None if validation is None else _as_batch(validation, device)
    programs = (model, guide)
    for module in modules_of(*programs):
        if device is not None:
            module.to(device)
    for batch in (data, validation):
        if batch is not None:
            check_arguments(programs, batch, {}, missing=missing)
    objective, group = ELBO() if objective is None else objective, ranks()
    checkpoint = checkpoint if group.first else None
    with locked(checkpoint), seeded(group.agreed(seed)), local_params(), laid_out(objective, plate, whole):
        order_seed = int(torch.randint(2**31, ()))
        call = Call(model, guide, plate=getattr(objective, "plate", plate), whole=whole)
        supply: Supply
        if loader is None:
            supply = _in_memory(replace(call, args=data), batch_size, validated=validation is not None)
        else:
            supply = _loaded(call, Loaded(loader, order_seed, device or _device_of(*programs), missing))
        if not isinstance(objective, Objective):  # ours check the pair themselves
            refuse_swapped(model, guide, supply.first)
        for module in modules_of(*programs):
            is_trained = any(parameter.requires_grad for parameter in module.parameters())
            if is_trained and (said := far_from_unit(module, supply.first[0])):
                _logger.warning("%s: call standardise_by(x_train) on model and guide first", said)
        trainer = Trainer(model, guide, supply, validation, objective, seed, order_seed=order_seed, precision=precision)
        trainer.callbacks, trainer.level = callbacks, capture
        trainer.prepare(optimizer, scheduler, evaluate_every)
        trainer.share()
        file = None if checkpoint is None else Checkpoint(trainer, checkpoint)
        trainer.resume(file, steps, patience)
        return trainer.run(steps, patience, file, checkpoint_every, progress)


def one_by_one(data: Any, args: tuple[Any, ...]) -> Any:
    """The data as they came, or all of them in one tuple.

    Raises:
        TypeError: If what holds all arguments already is followed by others.
    """
    if args and isinstance(data, tuple | DataLoader):
        raise TypeError(
            "expected the pair's arguments in one tuple or one by one, as in fit(model, guide, x, y, steps=...), got a "
            f"{type(data).__name__} and {len(args)} more"
        )
    return (data, *args) if args else data


def _as_batch(data: Any, device: str | torch.device | None) -> tuple[Any, ...]:
    batch, _ = as_arguments(opened(data if isinstance(data, tuple) else (data,)), {})
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor | Column)), None)
    if first is None:
        kinds = [type(part).__name__ for part in batch]
        raise TypeError(f"expected data as a tensor or a tuple with tensors, got {kinds}")
    if len(first.shape) == 0 or len(first) == 0:
        raise ValueError(f"expected data of N >= 1 rows in the first tensor, got shape {tuple(first.shape)}")
    return moved(batch, device)


def _check_loader(loader: DataLoader[Any], whole: bool, checkpoint: Any, seed: int | None) -> None:
    """Refuse what batches of a loader cannot do.

    Raises:
        ValueError: If all data are to be one data point, or a run of data that come but once is to be resumed.
    """
    if whole:
        raise ValueError("expected data in memory for whole=True, all data as one data point, got a DataLoader")
    if checkpoint is not None and isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"expected data that can be had again for a checkpoint, got {type(loader.dataset).__name__}, an "
            "IterableDataset, whose place nobody knows: an interrupted run could not go on to the same numbers"
        )
    if checkpoint is not None and seed is None:
        raise ValueError("expected a seed for a checkpoint of a DataLoader's run, whose order it gives, got none")


def _in_memory(call: Call, batch_size: int | None, *, validated: bool) -> InMemory:
    num_data = 1 if call.whole else call.num_rows or 1
    batch_size = _check_batch_size(batch_size, num_data)
    return InMemory(call.args, batch_size, Batches.of(call, partly=batch_size < num_data or validated))


def _loaded(call: Call, supply: Loaded) -> Loaded:
    check_arguments(call.programs, supply.first, {}, missing=supply.missing)
    supply.layout = Batches.of(replace(call, args=supply.first), partly=True, device=supply.device)
    return supply


def _device_of(*programs: Program) -> torch.device | None:
    """Where a pair's parameters are; None where it has none."""
    return next((p.device for module in modules_of(*programs) for p in module.parameters()), None)


def _check_batch_size(batch_size: int | None, num_data: int) -> int:
    if batch_size is None:
        return num_data
    check_count(batch_size, "batch_size")
    return min(batch_size, num_data)
