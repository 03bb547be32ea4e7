r"""Discrete latents of finite support, summed out of a pair's densities by Pyro's own contraction.

.. math:: \log p(x_n, z) = \log \sum_c p(x_n, z, c)

A site that the guide leaves out is summed in the model; one that the guide enumerates has a draw of the other latents
for each of its values. Sums go over the factors of each data point alone, and along a ``pyro.markov`` chain from step
to step, so that their cost is that of message passing.

References:
    Obermeyer, Bingham, Jankowiak, Pradhan, Chiu, Rush, Goodman, "Tensor Variable Elimination for Plated Factor
    Graphs", 2019, arXiv 1902.03210.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from opt_einsum import get_symbol
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.pair.log_einsum import ExactLogRing

if TYPE_CHECKING:
    from inference.pair.draw import Layout
    from inference.pair.handlers import Site


def is_summable(site: Site) -> bool:
    """Whether a site is discrete with a support that can be listed."""
    return bool(site.fn.has_enumerate_support)


@dataclass(frozen=True)
class Enumeration:
    """Which discrete sites of a run get all their values side by side, each in a dimension of its own.

    Attributes:
        names: The sites.
        first_dim: The first free dimension, negative; None goes on where the run before left off.
        given: Sites of the run before, where values come from it.
    """

    names: frozenset[str]
    first_dim: int | None
    given: Mapping[str, Site] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Enumerate in the runs inside."""
        with _Enumerate(self.first_dim), _Marks(self.names):
            yield


class _Enumerate(EnumMessenger):
    """Pyro's, which reads ``value.data``, refused under ``vmap``: here only the value's shape is read."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], TorchDistributionMixin) or msg["value"] is None:
            return
        value = msg["value"]
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        dims = msg["infer"].setdefault("_dim_to_id", {})
        dims.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {d: i for d, i in dims.items() if len(shape) >= -d and shape[d] > 1}


class _Marks(Messenger):
    """Marks the sites to be enumerated, and no others."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, msg: Any) -> None:
        kept = {name: value for name, value in msg["infer"].items() if name not in ("enumerate", "num_samples")}
        msg["infer"] = kept | {"_dim_to_id": {}} | ({"enumerate": "parallel"} if msg["name"] in self._names else {})


Factors = Iterable[tuple["Site", Tensor]]


def summed_out(layout: Layout, num_samples: int, factors: Factors) -> Tensor:
    """Log of the sum of a product of factors over every enumerated value, (S, N) in nats.

    Args:
        layout: Of the pair.
        num_samples: S.
        factors: Sites with a log factor of each, of the site's batch, enumerated dimensions to the left of all others.

    Raises:
        ValueError: If the places of two plates that do not contain each other depend on one another.
    """
    graph = _Graph(layout, num_samples, factors)
    with _refused():
        found = contract_to_tensor(graph.tree, graph.sums, graph.data, ring=ExactLogRing(dim_to_size=graph.sizes))
    return graph.per_datum(found)


def expected(layout: Layout, num_samples: int, factors: Factors, weights: Factors) -> Tensor:
    """Expectation of a log product of factors over the sites that a guide enumerates, (S, N) in nats.

    What the model alone enumerates is summed out first, inside the logarithm.

    Args:
        layout: Of the pair.
        num_samples: S.
        factors: As :func:`summed_out`.
        weights: The guide's enumerated sites, with the log-probability of each.

    Raises:
        ValueError: As :func:`summed_out`.
    """
    graph, guide = _Graph(layout, num_samples, factors), _Graph(layout, num_samples, weights)
    with _refused():
        parts = contract_tensor_tree(graph.tree, graph.sums - guide.sums, ring=ExactLogRing(dim_to_size=graph.sizes))
    total = torch.zeros(())
    for plates, terms in parts.items():
        log_probs = [q for here, found in guide.tree.items() if here <= plates for q in found]
        total = total + sum(graph.per_datum(_average(term, log_probs, guide.sums)) for term in terms)
    return total


def _average(term: Tensor, log_probs: list[Tensor], sums: set[str]) -> Tensor:
    """Sum of a packed term times its probability over the symbols of the guide's sites; 0 log 0 is zero."""
    if not log_probs:
        return term
    term, *log_probs = packed.broadcast_all(term, *log_probs)
    dims = _letters(term)
    weight = torch.stack(log_probs).sum(0).exp()
    product = weight * torch.where(weight > 0, term, 0.0)
    summed = [i for i, name in enumerate(dims) if name in sums]
    found: Any = product.sum(summed) if summed else product
    found._pyro_dims = "".join(name for name in dims if name not in sums)
    return found


def _letters(term: Any) -> str:
    """The letter of each dimension of a packed factor."""
    return term._pyro_dims


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"expected discrete sites that can be summed out of each data point, got: {error}") from error


class _Graph:
    """Log factors with a letter for each plate and each enumerated site, as Pyro's contraction takes them.

    Attributes:
        tree: Factors by the plates that they stand in; plates of size one have no letter.
        sums: Letters of the enumerated sites.
        data: Letters of samples and data.
        sizes: Size of each plate.
    """

    def __init__(self, layout: Layout, num_samples: int, factors: Factors) -> None:
        self._layout, self._num_samples = layout, num_samples
        self._plates = {dim: get_symbol(i) for i, dim in enumerate(range(-layout.depth - 1, 0))}
        self.tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        self.sums: set[str] = set()
        self.sizes: dict[str, int] = {}
        for site, factor in factors:
            self._add(site, factor)
        around = {self._plates[dim] for dim in (-layout.depth - 1, layout.dim)}
        self.data = frozenset(around & self.sizes.keys())

    def _add(self, site: Site, factor: Tensor) -> None:
        depth = self._layout.depth + 1
        batch = factor.shape[-depth:] if factor.dim() > depth else factor.shape
        here = {self._plates[i - len(batch)]: size for i, size in enumerate(batch) if size > 1}
        letters = {dim: get_symbol(depth + number) for dim, number in site.enumerated.items()}
        terms = self.tree.setdefault(frozenset(here), [])
        terms.append(packed.pack(factor, self._plates | letters))
        self.sizes |= here
        self.sums |= set(_letters(terms[-1])) - here.keys()

    def per_datum(self, term: Tensor) -> Tensor:
        """A packed factor without enumerated sites as (S, N)."""
        dims = {name: dim for dim, name in self._plates.items()}
        return self._layout.per_datum(packed.unpack(term, dims), self._num_samples)
