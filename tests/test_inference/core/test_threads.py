"""Threads and processes: what runs at once gives what it gives alone."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import MeanField
from inference import Importance, evidence, fit, log_weights
from zoo import LinearVAE

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).double()


def pair(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LinearVAE(5, 2).double(), MeanField(5, 2, hidden=(8,)).double()


def train(seed, halves):
    return fit(*halves, X, steps=20, seed=seed, progress=False).loss


def estimate(seed, halves):
    return evidence(halves[0], X, guide=halves[1], method=Importance(20), seed=seed, progress=False).value.tolist()


def weigh(seed, halves):
    return log_weights(*halves, X, num_samples=5, seed=seed).tolist()


@pytest.mark.parametrize("second", [train, estimate, weigh])
def test_two_threads_give_what_each_gives_alone(second):
    works = [train, second]
    alone = [work(i, pair(i)) for i, work in enumerate(works)]
    halves, state = [pair(i) for i in range(2)], torch.get_rng_state()
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(work, i, copy) for i, (work, copy) in enumerate(zip(works, halves, strict=True))]
            assert [done.result() for done in both] == alone
        halves = [pair(i) for i in range(2)]
    assert torch.equal(torch.get_rng_state(), state)


def put(queue):
    queue.put(train(0, pair(0)))


class Waiting(torch.nn.Module):
    """Stands still within its plate, when that is said."""

    def __init__(self, inside, go_on):
        super().__init__()
        self.inside, self.go_on = inside, go_on

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            self.inside.set()
            assert self.go_on.wait(60)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_a_thread_runs_a_pair_runs_its_own():
    inside, go_on, halves = threading.Event(), threading.Event(), pair(0)
    busy = threading.Thread(target=log_weights, args=(Waiting(inside, go_on), pair(1)[1], X), kwargs={"num_samples": 2})
    busy.start()
    assert inside.wait(60)
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = int(len(weigh(0, halves)) != 5)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    go_on.set()
    busy.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_a_child_process_gives_what_its_parent_gives(kind):
    context, want = multiprocessing.get_context(kind), train(0, pair(0))
    queue, busy = context.Queue(), threading.Thread(target=train, args=(1, pair(1)))
    busy.start()
    child = context.Process(target=put, args=(queue,))
    child.start()
    assert queue.get(timeout=120) == want
    child.join()
    busy.join()
