"""Callbacks: what is called along a training run, to log it, to look at the pair, or to stop it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inference.core.checks import check_count
from inference.core.display import described, settings
from inference.pair.run import Program

if TYPE_CHECKING:
    from inference.training.trainer import History

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A moment of a training run, as a callback sees it.

    Attributes:
        model: The model, as it is now.
        guide: The guide, as it is now.
        step: Steps taken so far.
        history: Losses and evaluations so far; its losses are read from the device every fifty steps or so.
        last_loss: The loss of the last step, in nats per data point, on its device: reading it waits for the device.
    """

    model: Program
    guide: Program
    step: int
    history: History
    last_loss: Tensor

    @property
    def loss(self) -> float:
        """The loss of the last step, in nats per data point."""
        return float(self.last_loss)


class Callback:
    """Base of callbacks: each method does nothing here, and a true return of it stops the run after the present step.

    The pair is in eval mode meanwhile. A callback may draw random numbers: the run goes on as it would have without. An
    error in it ends the run, which is then left as by any other error.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(settings(self))})"

    def on_step(self, moment: Moment) -> bool | None:
        """Called after each step."""

    def on_evaluate(self, moment: Moment) -> bool | None:
        """Called after each evaluation on the validation data, ``moment.history.validation[-1]``."""

    def on_checkpoint(self, moment: Moment) -> bool | None:
        """Called after each checkpoint has been written."""

    def on_end(self, moment: Moment) -> bool | None:
        """Called once after the last step, before the parameters of the best evaluation are restored."""


class Logging(Callback):
    """Messages of level INFO to the logger ``inference.training.callbacks``, or to one that is given.

    Args:
        every: Steps between messages on the loss.
        logger: Where to; ``logging.basicConfig(level="INFO")`` shows it.
    """

    def __init__(self, every: int = 100, *, logger: logging.Logger | None = None) -> None:
        check_count(every, "every")
        self.every, self.logger = every, _logger if logger is None else logger

    def on_step(self, moment: Moment) -> None:
        """The loss, every so many steps."""
        if moment.step % self.every == 0:
            self.logger.info("step %d: loss %.4f", moment.step, moment.loss)

    def on_evaluate(self, moment: Moment) -> None:
        """The validation loss."""
        self.logger.info("step %d: validation loss %.4f", *moment.history.validation[-1])

    def on_checkpoint(self, moment: Moment) -> None:
        """That a checkpoint was written."""
        self.logger.info("step %d: checkpoint written", moment.step)

    def on_end(self, moment: Moment) -> None:
        """That training has ended."""
        self.logger.info("step %d: the end", moment.step)


class TensorBoard(Callback):
    """Loss and validation loss as scalars of TensorBoard; needs ``elbozoo[tensorboard]``.

    Args:
        folder: Where to write, a folder for each run.
        every: Steps between scalars of the loss.

    Raises:
        ImportError: If tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int = 10) -> None:
        check_count(every, "every")
        from torch.utils.tensorboard import SummaryWriter

        self.every, self.writer = every, SummaryWriter(os.fspath(folder))

    def on_step(self, moment: Moment) -> None:
        """The loss, every so many steps."""
        if moment.step % self.every == 0:
            self.writer.add_scalar("loss", moment.loss, moment.step)

    def on_evaluate(self, moment: Moment) -> None:
        """The validation loss."""
        step, loss = moment.history.validation[-1]
        self.writer.add_scalar("validation loss", loss, step)

    def on_end(self, moment: Moment) -> None:  # noqa: ARG002
        """Write what is still held."""
        self.writer.flush()


class Snapshots(Callback):
    """Copies of the pair along training, to measure the gap as it changes.

    Args:
        every: Steps between copies.

    Attributes:
        pairs: Model and guide by step.
    """

    def __init__(self, every: int) -> None:
        check_count(every, "every")
        self.every, self.pairs = every, dict[int, tuple[Any, Any]]()

    def on_step(self, moment: Moment) -> None:
        """Copy model and guide, as one, every so many steps."""
        if moment.step % self.every == 0:
            self.pairs[moment.step] = copy.deepcopy((moment.model, moment.guide))


def check_callbacks(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Callbacks as a tuple.

    Raises:
        TypeError: If one is none.
    """
    if not isinstance(callbacks, Iterable) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise TypeError(f"expected callbacks as a list of inference.Callback instances, got {callbacks!r}")
    return tuple(callbacks)
