"""The base of every model and guide: an ``nn.Module`` with a unique name in Pyro's global parameter store.

Pyro's store is one dictionary for the whole process. A module that registers its parameters under a fixed name
therefore shares them, silently, with every later instance of the same class. :class:`Module` gives each instance
a name of its own, and hands its parameters to Pyro only when a Pyro handler is there to receive them.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pyro
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import nn
from torch.distributions import constraints

from inference.core.display import as_html, described, settings
from inference.pair.handlers import LocalParams

_serial = itertools.count(1)


def _returned(name: str, parameter: nn.Parameter, **_: Any) -> nn.Parameter:  # noqa: ARG001
    return parameter


class Module(nn.Module):
    """An ``nn.Module`` whose parameters live in Pyro under a name of this one instance.

    A call under a Pyro handler (``SVI``, ``trace``, ``NUTS`` ...) issues ``pyro.param("Class#serial.name", p)`` for
    every ``nn.Parameter`` that requires a gradient. Copies and reloaded modules get a serial of their own, so that
    any number of them train independently. Persistence is the ``state_dict``.

    Warning:
        Under stock ``SVI`` Pyro's store keeps the parameters of every pair that it trained, one entry for each tensor,
        for as long as the process lives. Functions of this library leave nothing there. The example clears the entries
        of one module.

    Attributes:
        store_name: ``"Class#serial"``, the prefix of this instance's parameters in Pyro's store.

    Example:
        >>> import torch
        >>> from guides import MeanField
        >>> from zoo import LinearVAE
        >>> pair, store = (LinearVAE(5, 2), MeanField(5, 2)), pyro.get_param_store()
        >>> svi = pyro.infer.SVI(*pair, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
        >>> _ = svi.step(torch.zeros(4, 5))
        >>> own = [name for name in store if name.startswith(f"{pair[0].store_name}.")]
        >>> for name in own:
        ...     del store[name]
        >>> len(own), any(name.startswith(pair[0].store_name) for name in store)
        (3, False)
    """

    def __init__(self) -> None:
        super().__init__()
        self.store_name = self._new_store_name()

    @classmethod
    def _new_store_name(cls) -> str:
        return f"{cls.__name__}#{next(_serial)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward``, first showing the parameters to Pyro where a handler is active."""
        self.issue_params()
        return super().__call__(*args, **kwargs)

    def issue_params(self) -> None:
        """Show the parameters to an active Pyro handler; does nothing where there is none."""
        if not am_i_wrapped() or LocalParams.active():
            return
        local = pyro.settings.get("module_local_params")
        store = pyro.get_param_store()
        for key, parameter in self.named_parameters():
            # functional_call and vmap swap in plain tensors, which are not parameters of any module.
            if not (isinstance(parameter, nn.Parameter) and parameter.requires_grad):
                continue
            name = f"{self.store_name}.{key}"
            if local:  # Pyro's own rule for modules in this mode: a param statement, but no store
                parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
                effectful(_returned, type="param")(name, parameter, constraint=constraints.real, name=name)
                continue
            if name in store and store[name] is not parameter:  # replaced since, by load_state_dict(assign=True) say
                del store[name]
            pyro.param(name, parameter)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the weak references that Pyro hangs on parameters: they can be neither copied nor pickled."""
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.store_name = self._new_store_name()

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them above the parts."""
        return described(self._settings())

    def _settings(self) -> dict[str, Any]:
        try:
            shown = self.config()
        except NotImplementedError:
            shown = settings(self)
        sizes = {name: getattr(self, name, None) for name in ("data_dim", "latent_dim")}
        shown = {
            name: type(getattr(self, name)).__name__ if value == "<model>" else value for name, value in shown.items()
        }
        return {name: size for name, size in sizes.items() if isinstance(size, int)} | shown

    def _repr_html_(self) -> str:
        numbers = {
            "parameters": sum(p.numel() for p in self.parameters()),
            "parts": [n for n, _ in self.named_children()],
        }
        return as_html(type(self).__name__, self._settings() | numbers)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values, from which the instance can be built again before its state is loaded.

        Raises:
            NotImplementedError: If the class declares none, or the instance holds what JSON cannot describe.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be rebuilt from a file alone: pass an instance of it to load_pair"
        )
