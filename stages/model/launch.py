"""Starts several processes on this machine, one for each GPU; they end together, with one message and one exit status.

torch.distributed.launcher, which torchrun uses, is not used here: it repeats to its processes a signal that the terminal has
already sent to them, kills them 30 seconds later whether or not their checkpoint is written, reports the process that it
happens to look at first instead of the one that failed first, and waits forever for processes that end by Ctrl-C.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeAlias

import torch

from stages.core.problem import Problem
from stages.model.distributed import TIMEOUT, explain_failure, named

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run: Ctrl-C, kill or a batch system, a terminal that was closed."""
SAME_SIGNAL_S = 2.0
"""Seconds within which a second signal is the first one once more: a terminal sends it to every process of a command, and
make, a shell or a batch system may repeat it to those that they have started."""
FAILED_GRACE_S = 3.0
"""Seconds that the other processes get after one has failed, to say whether they have the same problem. They cannot save
anything: a checkpoint needs all of them."""
INTERRUPTED_GRACE_S = 10.0
"""The same after one has ended because of a signal; they end at the same step, or are just loading a model."""
TRACEBACK_CHARACTERS = 20_000

Kind: TypeAlias = Literal["done", "interrupted", "problem", "lost", "bug", "killed"]


@dataclass(frozen=True)
class _Outcome:
    """How a process ended."""

    kind: Kind
    messages: tuple[str, ...] = ()
    """Of a Problem; of a bug, its traceback."""
    number: int = 0
    """The signal, of "interrupted" and "killed"."""
    error: OSError | None = None
    """Of a bug: the system's error, for which `python -m stages` may have a remedy."""


def ends_at_once(number: int, seconds: float) -> bool:
    """Whether a second signal means that the user does not want to wait for a checkpoint.

    A dropped connection sends SIGHUP more than once: from the kernel and from the shell.

    Args:
        number: The second signal.
        seconds: Time since the first one.
    """
    return number != signal.SIGHUP and seconds >= SAME_SIGNAL_S


def ignored_signals() -> set[int]:
    """Signals that must stay ignored: nohup ignores SIGHUP, so that a run survives its terminal."""
    return {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}


def launch(function: Callable[..., object], processes: int, *arguments: object) -> None:
    """Calls function(*arguments) in each of several processes of this machine, and waits until all have returned.

    The processes find their number in the environment, as under torchrun. A signal that reaches this process is passed on to
    them once; a second one, later than SAME_SIGNAL_S, kills them. They end at once if this process is killed.

    Args:
        function: A function of a module, importable in the processes.
        processes: How many to start.
        arguments: Picklable.

    Raises Problem if a process raises one, is killed, or loses its GPU or its memory; it names the process, unless all have
    the same problem. Raises KeyboardInterrupt(number of the signal) if a signal has ended them, and RuntimeError with the
    process's traceback if it has another error. The other processes are stopped within FAILED_GRACE_S.
    """
    # NVLink multicast is missing on some machines, and for the small gradients of an adapter it gains nothing.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    context = multiprocessing.get_context("spawn")
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False
    )
    run_id = uuid.uuid4().hex
    parent, _alive = context.Pipe(duplex=False)  # closed by the system when this process ends
    call = pickle.dumps((function, arguments))  # read, with the imports that this needs, where libraries are quiet
    group = _Group()
    try:
        with group.forwarding_signals():
            with _blocked_signals():  # until a process can handle them; its imports take seconds
                for rank in range(processes):
                    report, writer = context.Pipe(duplex=False)
                    environment = _environment(rank, processes, port=store.port, run_id=run_id)
                    process = context.Process(target=_run, args=(call, Path.cwd(), environment, writer, parent))
                    process.start()
                    writer.close()
                    group.members.append(_Member(process, report))
            group.forward()  # what came in the meantime
            group.wait()
    finally:
        group.kill()
    group.raise_failure()


def _environment(rank: int, processes: int, *, port: int, run_id: str) -> dict[str, str]:
    """The variables that torchrun sets. "Agent store": the process that starts the others has the store, not process 0."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _run(
    call: bytes,
    root: Path,
    environment: Mapping[str, str],
    report: Connection,
    parent: Connection,
) -> None:
    """Runs in each process."""
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        _raise_first_signal()
        os.chdir(root)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in stages/__main__.py, which is not imported here
        warnings.filterwarnings("ignore", category=FutureWarning)
        function, arguments = pickle.loads(call)
        function(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt as interrupt:
        number = signal_of(interrupt)
        _end(report, _Outcome("interrupted", number=number), 128 + number)
    except Exception as error:
        _end(report, _outcome_of(error), 1)
    report.send(_Outcome("done"))


def _end_with(parent: Connection) -> None:
    """Ends this process when the one that started it has ended: nobody holds the lock of the checkpoints any more."""
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _raise_first_signal() -> None:
    """The first signal raises KeyboardInterrupt with its number; it may come twice, from the terminal and from `launch`."""
    seen: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not seen:
            seen.append(number)
            raise KeyboardInterrupt(number)

    for number in set(SIGNALS) - ignored_signals():
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def signal_of(interrupt: KeyboardInterrupt) -> int:
    """The number of the signal that raised an interrupt; Python itself raises it for SIGINT, without a number."""
    return int(interrupt.args[0]) if interrupt.args else int(signal.SIGINT)


def _outcome_of(error: Exception) -> _Outcome:
    kind, messages = explain_failure(error)
    if kind == "bug":
        text = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
        return _Outcome(
            "bug", (text,), error=error if isinstance(error, OSError) and type(error).__module__ == "builtins" else None
        )
    return _Outcome(kind, messages)


def _end(report: Connection, outcome: _Outcome, status: int) -> None:
    """Ends this process without the clean-up of libraries, which may wait for the other processes."""
    report.send(outcome)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue
    os._exit(status)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Within the block, this thread gets no signals; nor do the processes that it starts, until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Member:
    """One of the processes."""

    def __init__(self, process: BaseProcess, report: Connection) -> None:
        self.process, self.report = process, report
        self.reports = True
        """Whether it may still send its outcome."""
        self.outcome: _Outcome | None = None
        self.running = True
        self.stopped = False
        """Whether it was killed here, because another one had ended."""

    def read(self) -> None:
        """Receives the outcome, which there is."""
        with suppress(EOFError, OSError):
            self.outcome = self.report.recv()
        self.reports = False

    def joined(self) -> None:
        """Called when the process has ended."""
        self.process.join()
        self.running = False
        if self.reports and self.report.poll():
            self.read()
        status = self.process.exitcode or 0
        if self.outcome is None or (self.outcome.kind == "done" and status):
            kind: Kind = "killed" if status < 0 else "problem"
            message = f"it ended with the exit status {status}, and said nothing else"
            self.outcome = _Outcome(kind, (message,), number=max(0, -status))


class _Group:
    """The processes that one launch has started."""

    def __init__(self) -> None:
        self.members: list[_Member] = []
        self.interrupted = 0
        """The first signal that reached this process; 0 if none did."""
        self._interrupted_at = 0.0
        self._told: set[int] = set()
        self._order: list[int] = []
        """The processes that have ended, in order."""

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Within the block, the first signal goes to all processes, and a second one kills them."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set signal handlers
            return

        def interrupt(number: int, _frame: FrameType | None) -> None:
            if not self.interrupted:
                self.interrupted, self._interrupted_at = number, time.monotonic()
                self.forward()
            elif ends_at_once(number, time.monotonic() - self._interrupted_at):
                self.kill()

        before = {number: signal.signal(number, interrupt) for number in set(SIGNALS) - ignored_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def forward(self) -> None:
        """Sends the signal, if there is one, to the processes that have not got it."""
        for member in self.members if self.interrupted else ():
            pid = member.process.pid
            if pid is not None and pid not in self._told and member.running:
                self._told.add(pid)
                with suppress(ProcessLookupError):  # a signal can come between the end of a process and the note of it
                    os.kill(pid, self.interrupted)

    def kill(self) -> None:
        """Kills the processes that still run."""
        for member in self.members:
            if member.running:
                member.stopped = True
                member.process.kill()

    def wait(self) -> None:
        """Waits until all processes have ended. Those that run on when another one has failed are killed."""
        limit: float | None = None
        while any(member.running for member in self.members):
            waited: list[Any] = [each.process.sentinel for each in self.members if each.running]
            waited += [each.report for each in self.members if each.reports]
            ready = wait(waited, None if limit is None else max(0.0, limit - time.monotonic()))
            for member in self.members:
                if member.reports and member.report in ready:
                    member.read()
                if member.running and member.process.sentinel in ready:
                    member.joined()
            for rank, member in enumerate(self.members):
                if member.outcome is None or rank in self._order:
                    continue
                self._order.append(rank)
                if member.outcome.kind != "done":
                    grace = INTERRUPTED_GRACE_S if member.outcome.kind == "interrupted" else FAILED_GRACE_S
                    limit = min(limit or float("inf"), time.monotonic() + grace)
            if limit is not None and time.monotonic() >= limit:
                self.kill()
                limit = None  # their ends are waited for: a process that hangs in a driver takes a while to die

    def raise_failure(self) -> None:
        """Raises what the process that failed first has raised. See `launch`."""
        outcomes = [member.outcome for member in self.members]
        if all(outcome is not None and outcome.kind == "done" for outcome in outcomes):
            return  # a signal may have come too late to end them
        ended = [(rank, outcomes[rank]) for rank in self._order if not self.members[rank].stopped]
        failed = [(rank, outcome) for rank, outcome in ended if outcome and outcome.kind not in ("done", "interrupted")]
        number = self.interrupted or next((each.number for _, each in ended if each and each.kind == "interrupted"), 0)
        if number:  # the processes may have lost each other then, but a checkpoint that was not written must be said
            failed = [(rank, outcome) for rank, outcome in failed if outcome.kind in ("problem", "bug")]
        if failed:
            # A process that lost the others, or that NCCL has aborted, is not the one that failed first.
            rank, outcome = min(failed, key=lambda each: _weight(each[1]))
            self._raise(rank, outcome, everywhere=all(each == outcome for each in outcomes))
        if number:
            raise KeyboardInterrupt(number)
        stopped = [rank for rank, member in enumerate(self.members) if member.stopped]
        if stopped:
            raise Problem(f"process {stopped[0]} of {len(self.members)} was stopped")

    def _raise(self, rank: int, outcome: _Outcome, *, everywhere: bool) -> None:
        processes = len(self.members)
        if outcome.kind == "bug":
            if outcome.error:
                raise outcome.error
            raise RuntimeError(f"process {rank} of {processes} failed:\n{outcome.messages[0]}")
        if outcome.kind == "killed":
            name = signal.Signals(outcome.number).name
            raise Problem(
                f"process {rank} of {processes} was killed ({name}), and the others were stopped. If the machine ran out of "
                "memory, lower the batch size; dvc repro resumes from what was finished"
            )
        raise Problem(*(outcome.messages if everywhere else named(outcome.messages, rank, processes)))


def _weight(outcome: _Outcome) -> int:
    """How likely a failure is the consequence of another one."""
    return 2 if outcome.kind == "lost" else 1 if outcome.number == signal.SIGABRT else 0
