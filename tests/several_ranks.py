"""Runs a function on several ranks, processes that talk by gloo, and returns what each returns."""

import multiprocessing
import os
import pickle
import queue
import time
import traceback

import torch


def _rank(function, rank, size, folder, args, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        results.put(pickle.dumps((rank, function(*args), None)))  # as bytes: shared memory goes with its process
    except BaseException as error:
        results.put(pickle.dumps((rank, f"{type(error).__name__}: {error}", traceback.format_exc())))
    finally:
        torch.distributed.destroy_process_group()


def start(function, size, folder, *args):
    """The processes, and the queue of what they return."""
    os.makedirs(folder, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inference", "guides", "zoo"])
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(function, r, size, folder, args, results)) for r in range(size)]
    for process in processes:
        process.start()
    return processes, results


def collect(processes, results, number, patience=120.0):
    """What so many of the ranks returned, by rank; an error as its text."""
    found, end = {}, time.monotonic() + patience
    while len(found) < number:
        try:
            rank, value, trace = pickle.loads(results.get(timeout=1.0))
        except queue.Empty:
            assert time.monotonic() < end, f"ranks {sorted(found)} of {len(processes)} answered in {patience} s"
            continue
        found[rank] = (value, trace)
    for process in processes:
        process.join(patience)
    return found


def on_ranks(function, size, folder, *args):
    """What a function returns on each of some ranks, in their order.

    Raises:
        AssertionError: If it raises on one, with the trace.
    """
    found = collect(*start(function, size, folder, *args), size)
    assert not any(trace for _, trace in found.values()), "\n".join(str(trace) for _, trace in found.values())
    return [found[rank][0] for rank in range(size)]


def errors_on_ranks(function, size, folder, *args):
    """The errors that a function raises on each of some ranks, as texts."""
    found = collect(*start(function, size, folder, *args), size)
    assert all(trace for _, trace in found.values()), found
    return [found[rank][0] for rank in range(size)]
