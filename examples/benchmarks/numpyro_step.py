"""Training by NumPyro: all steps in one compiled ``lax.scan``, on the networks of ``svi_step.py``.

NumPyro and JAX are imported only where they are asked for; where they are not installed, the row is left out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable

import numpy as np
import torch


def has_numpyro() -> bool:
    """Whether NumPyro can be imported."""
    return importlib.util.find_spec("numpyro") is not None


def by_numpyro(
    shape: tuple[int, tuple[int, ...], int],
    x: torch.Tensor,
    size: int,
    draw: Callable[[], Iterable[torch.Tensor]],
    rate: float,
) -> Callable[[], None]:
    """A function that takes a step of a VAE's SVI on each of some mini-batches, compiled at its first call.

    Args:
        shape: D, hidden widths of the encoder, K.
        x: Data, (N, D).
        size: Rows of a mini-batch.
        draw: Draws the rows of the mini-batches of a call, as many each time.
        rate: Learning rate of Adam.
    """
    if torch.get_num_threads() == 1:  # read when JAX starts
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    import numpyro
    import numpyro.distributions as dist
    from jax.example_libraries import stax
    from numpyro.infer import SVI, Trace_ELBO

    data_dim, hidden, latent_dim = shape

    def network(out_dim: int, widths: tuple[int, ...]):
        layers = [layer for width in widths for layer in (stax.Dense(width), stax.elementwise(jax.nn.silu))]
        return stax.serial(*layers, stax.Dense(out_dim))

    def model(batch):
        decode = numpyro.module("decoder", network(data_dim, hidden[::-1]), (size, latent_dim))
        sigma = jax.numpy.exp(numpyro.param("log_sigma", jax.numpy.zeros(1)))
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Normal(jax.numpy.zeros((size, latent_dim)), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(decode(z), sigma).to_event(1), obs=batch)

    def guide(batch):
        encode = numpyro.module("encoder", network(2 * latent_dim, hidden), (size, data_dim))
        with numpyro.plate("data", size):
            mean, log_sigma = jax.numpy.split(encode(batch), 2, -1)
            numpyro.sample("z", dist.Normal(mean, jax.numpy.exp(log_sigma)).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(rate), Trace_ELBO())
    data = jax.numpy.asarray(x.cpu().numpy())
    trained = [jax.jit(svi.init)(jax.random.PRNGKey(0), data[:size])]

    @jax.jit
    def scanned(state, rows):
        return jax.lax.scan(lambda now, batch: svi.update(now, data[batch]), state, rows)

    def run() -> None:
        rows = torch.stack([*draw()]).numpy()
        trained[0], losses = scanned(trained[0], rows)
        if not np.isfinite(np.asarray(losses)).all():
            raise FloatingPointError("expected finite losses of NumPyro's SVI")

    return run
