"""Encodes chunks of rows on all cores. The results and their order do not depend on the number of processes."""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from stages.core.problem import Problem
from stages.encode.chunks import Chunk, ChunkTask, encode_chunk
from stages.encode.rows import RowMaker

MIN_ROWS = 2000
"""With fewer rows, starting worker processes takes longer than it saves."""
OBJECTS_BEFORE_COLLECTION = 100_000
"""New objects after which a worker process looks for unreachable ones; Python's default is 700."""
TASKS_AHEAD = 4
"""Chunks for each process that may be in progress while the oldest result is awaited: this limits the memory."""


def encode_chunks(maker: RowMaker, tasks: Iterator[ChunkTask], *, rows: int) -> Generator[Chunk, None, None]:
    """Encodes the tasks and yields their results in order.

    Args:
        maker: Makes token rows; each worker process gets a copy of it.
        tasks: The chunks of rows. They are read as needed.
        rows: The number of rows in all tasks.

    Raises:
        Problem: If a worker process is killed.
        FastTokenizerMismatch: If fastokens and the tokenizer give different tokens.
    """
    processes = len(os.sched_getaffinity(0))
    if processes == 1 or rows < MIN_ROWS:
        yield from (encode_chunk(maker, task) for task in tasks)
        return
    try:
        with _start_workers(maker, processes) as pool:
            waiting = deque(pool.submit(_encode_in_worker, task) for task in islice(tasks, TASKS_AHEAD * processes))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_encode_in_worker, task) for task in islice(tasks, 1))
    except BrokenProcessPool:
        raise Problem(
            "a worker process was killed, probably because memory ran out; free some memory and run dvc repro again, or "
            "use fewer cores: taskset -c 0 dvc repro"
        ) from None


def _start_workers(maker: RowMaker, processes: int) -> ProcessPoolExecutor:
    # Each worker tokenizes in a single thread, since there is one worker per core and threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    # Without the freeze, the garbage collector writes to every object and so copies the shared memory into each worker.
    gc.collect()
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(processes, mp_context=fork, initializer=_keep_maker, initargs=(maker,))


# A task reaches a worker by pickle, which a tokenizer does not survive. So the worker keeps the RowMaker that it inherited
# by the fork. The main process never sets this name.
_worker_maker: RowMaker


def _keep_maker(maker: RowMaker) -> None:
    global _worker_maker  # noqa: PLW0603
    # A chunk of rows is many small objects that live until its end; to look through them again and again frees nothing.
    gc.set_threshold(OBJECTS_BEFORE_COLLECTION)
    _worker_maker = maker


def _encode_in_worker(task: ChunkTask) -> Chunk:
    return encode_chunk(_worker_maker, task)
