"""Several processes that work together, one for each GPU, started by stages/model/launch.py or by torchrun."""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import psutil  # accelerate brings it
import torch
from accelerate import PartialState

from stages.core.params import bad_param
from stages.core.problem import Problem

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: with train.fsdp they may load a large model one after the other."""

SAME_WAY = "all processes must compute in the same way; use the same GPUs, packages, code, parameters and data for them"
LOST = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|\b(tcp)?store\b|timed out waiting", re.IGNORECASE
)
"""In the message of a RuntimeError: the process could not reach another one, which has failed before or was killed."""
OWN_FAULT = re.compile("device-side assert|illegal memory access|misaligned address|invalid (argument|configuration|device)")
"""In the message of a CUDA error: not the GPU has failed, but a kernel."""

_notes: list[str] = []
"""Lines about how this process computes, since the last `require_same_notes`."""
_exchange: Any = None
"""The gloo process group over which the processes agree, so that no GPU has to be waited for; None in a single process."""


def world_size() -> int:
    """The number of processes that work together."""
    return _read_variable("WORLD_SIZE", default=1)


def rank() -> int:
    """The number of this process, from 0."""
    return _read_variable("RANK", default=0)


def is_main() -> bool:
    """Whether this process writes the outputs and prints."""
    return rank() == 0


def _read_variable(name: str, *, default: int) -> int:
    """One of the environment variables that torchrun and `launch` set.

    Raises Problem if it is set without TORCHELASTIC_RUN_ID: neither has started this process, and a process of another rank
    than 0 would write nothing. `python -m stages` says so earlier; this is for those who call a stage from Python.
    """
    if name not in os.environ:
        return default
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise Problem(
            f"the environment variable {name} is set, but torchrun did not start this process; run "
            "`unset RANK WORLD_SIZE LOCAL_RANK` and start again"
        )
    return int(os.environ[name])


def select_gpu() -> None:
    """Makes the GPU of this process the current CUDA device. Raises Problem if there is none for it."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and number >= gpus:
        raise Problem(f"this machine has {gpus} GPUs, none for process {number} of it; start one process for each GPU")
    if gpus:
        torch.cuda.set_device(number)


def init_processes(*, cpu: bool) -> None:
    """Initializes the process group, with gloo if `cpu`, and makes the GPU of this process the current CUDA device."""
    if world_size() > 1:
        _use_interface_to_other_machines()
        select_gpu()
        PartialState(cpu=cpu, timeout=TIMEOUT)
        init_exchange()


def init_exchange() -> None:
    """Lets the processes use `require_same`, `largest` and `smallest`. Called in all of them together."""
    global _exchange  # noqa: PLW0603  # a process has one
    if world_size() > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
        _exchange = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)


def _use_interface_to_other_machines() -> None:
    """Tells gloo which network reaches the other machines, if there are any and GLOO_SOCKET_IFNAME does not.

    By itself gloo takes the address of this machine's own name, which on many systems is 127.0.1.1.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) == world_size() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for target in (os.environ["MASTER_ADDR"], "192.0.2.1"):  # an address of no machine, which the default route leads to
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))  # chooses a route, and sends nothing
                own = probe.getsockname()[0]
        except OSError:
            continue
        names = [name for name, found in psutil.net_if_addrs().items() if own in {each.address for each in found}]
        if names and not own.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]
            return


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank; called in all of them together. In a single process, its own."""
    if _exchange is None:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=_exchange)
    return values


def largest(value: int) -> int:
    """The largest of the values of all processes; called in all of them together. Takes a fraction of a millisecond."""
    if _exchange is None:
        return value
    tensor = torch.tensor(value)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=_exchange)
    return int(tensor)


def smallest(value: int) -> int:
    """The smallest of the values of all processes; called in all of them together."""
    return -largest(-value)


def wait_for_all() -> None:
    """Returns when all processes have called it."""
    if _exchange is not None:
        torch.distributed.barrier(group=_exchange)


def note(line: str) -> None:
    """Keeps a line about how this process computes, for `require_same_notes`."""
    _notes.append(line)


def say_for_all(line: str) -> None:
    """As `note`, and process 0 prints the line: it must hold for all processes."""
    note(line)
    if is_main():
        with suppress(OSError):  # the terminal was closed
            print(line, flush=True)


def require_same_notes(*, took_part: bool = True) -> None:
    """Raises Problem in all processes if they have not noted the same lines. Called in all of them together.

    So a process that cannot use the fast way is not silently slower than the others, which would all wait for it.

    Args:
        took_part: Whether this process had anything to compute; otherwise it has no say.
    """
    lines = list(dict.fromkeys(_notes))
    _notes.clear()
    given = gather(lines if took_part else None)
    taking_part = [number for number, found in enumerate(given) if found is not None]
    differing = []
    for line in dict.fromkeys(line for number in taking_part for line in given[number]):
        having = [number for number in taking_part if line in given[number]]
        if len(having) < len(taking_part):
            differing.append(f"not the same in all processes, but only in {_processes(having)}: {line}")
    if differing:
        raise Problem(*differing, SAME_WAY)


def require_same(decisions: Mapping[str, object]) -> None:
    """Raises Problem in all processes, naming each value in which they differ. Called in all of them together.

    Args:
        decisions: What was decided or found, by its name in the message.
    """
    found = gather({name: str(value) for name, value in decisions.items()})
    differing = []
    for name in decisions:
        by_value: dict[str, list[int]] = {}
        for number, values in enumerate(found):
            by_value.setdefault(values[name], []).append(number)
        if len(by_value) > 1:
            each = "; ".join(f"{_processes(ranks)}: {value}" for value, ranks in by_value.items())
            differing.append(f"the processes differ in {name}: {each}")
    if differing:
        raise Problem(*differing, SAME_WAY)


def _processes(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def require_gpus(processes: int, name: str) -> None:
    """Raises Problem if this machine has GPUs, but fewer than `processes`; `name` is the parameter's, for the message."""
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise Problem(
            bad_param(name, f"wanted at most {torch.cuda.device_count()}, the GPUs of this machine; found {processes}")
        )


def named(messages: Sequence[str], number: int, processes: int) -> list[str]:
    """Messages that say which process they are of."""
    return [f"process {number} of {processes}: {message}" for message in messages]


def explain_failure(error: Exception) -> tuple[Literal["problem", "lost", "bug"], tuple[str, ...]]:
    """What kind of failure an error is, and the messages for it if it is not a bug.

    "lost" is the consequence of another process's failure.
    """
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, Problem):
        return "problem", error.messages
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "problem", (f"out of memory: {line or type(error).__name__}; lower the batch size, or use a larger machine",)
    if isinstance(error, torch.AcceleratorError) and not OWN_FAULT.search(str(error)):
        return "problem", (f"its GPU has failed: {line}; see nvidia-smi. dvc repro resumes from what was finished",)
    lost = isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and LOST.search(str(error)))
    if lost and world_size() > 1:  # one process by itself has none to lose
        return "lost", (
            f"it lost the other processes, one of which has failed or was killed ({line.partition('. ')[0]}); "
            "dvc repro resumes from what was finished",
        )
    return "bug", ()


@contextmanager
def failures_explained() -> Iterator[None]:
    """Within the block, a failure that is no bug is raised as a Problem, which names the process if there are several.

    For processes that torchrun has started. Those of `launch` report their failure to it, and it decides whose is said.
    """
    try:
        yield
    except Exception as error:
        kind, messages = explain_failure(error)
        if kind == "bug":
            raise
        raise Problem(*(named(messages, rank(), world_size()) if world_size() > 1 else messages)) from None
