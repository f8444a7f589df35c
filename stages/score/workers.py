"""Runs a function over many tasks on all cores. The results and their order do not depend on the number of processes."""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from stages.core.problem import Problem

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

MAX_PROCESSES = 16
"""A process takes up to 400 MB, most of it for jieba's dictionary and for a part of the training prompts."""
TASKS_AHEAD = 2
"""Tasks for each process that may be in progress while the oldest result is awaited: this limits the memory."""


def run_tasks(function: Callable[[S, T], R], tasks: Iterable[T], *, shared: S, alone: bool) -> Generator[R, None, None]:
    """Yields function(shared, task) for each task, in order.

    Args:
        function: A function of a module, so that its name can be passed to another process.
        tasks: Read as needed.
        shared: What all tasks need. The processes inherit it, so it may be large.
        alone: Work in this process, since there is too little to do for others.

    Raises Problem if a worker process is killed.
    """
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    tasks = iter(tasks)
    if processes == 1 or alone:
        yield from (function(shared, task) for task in tasks)
        return
    gc.collect()
    gc.freeze()  # the garbage collector would write to every object, and so copy the shared memory into each process
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=fork, initializer=_keep, initargs=(function, shared))
    try:
        waiting = deque(pool.submit(_run, task) for task in islice(tasks, TASKS_AHEAD * processes))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_run, task) for task in islice(tasks, 1))
    except BrokenProcessPool:
        raise Problem(
            "a worker process was killed, probably because memory ran out; free some memory and run dvc repro again, or "
            "use one core, without worker processes: taskset -c 0 dvc repro"
        ) from None
    finally:
        gc.unfreeze()
        pool.shutdown(cancel_futures=True)


# What a worker process inherited; the main process never sets these names.
_function: Callable[[Any, Any], Any]
_shared: Any


def _keep(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _function, _shared
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once, and without a traceback
    _function, _shared = function, shared


def _run(task: Any) -> Any:
    return _function(_shared, task)
