"""Several processes: they agree, they end together with one message, and stray variables of torchrun are refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stages.__main__ as main_module
from stages.core.problem import Problem
from stages.model import distributed, launch
from stages.model.device import assert_on
from tests.tiny import PROJECT

TRIES = 20


# Who started this process


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        Problem, match=f"variable {name} is set, but torchrun did not start .*`unset RANK WORLD_SIZE LOCAL_RANK`"
    ):
        distributed.rank(), distributed.world_size()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    assert 2 in (distributed.rank(), distributed.world_size())


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("stage", ["fetch", "fetch_data", "ingest", "encode", "train", "merge", "generate", "score"])
def test_a_stray_variable_is_refused_in_every_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # as some clusters set it for every container
    assert main_module.main([stage]) == 1
    assert f"{stage}: the environment has {name}=1, as for one of several processes, but torchrun" in capsys.readouterr().err


def test_torchrun_starts_no_other_stage_than_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in main_module.SET_BY_TORCHRUN:
        monkeypatch.setenv(name, "1")
    assert main_module.main(["generate"]) == 1
    assert capsys.readouterr().err == "generate: torchrun can start train only; run generate without it\n"
    main_module.check_process_numbers("train")


def test_the_exit_status_says_which_signal_ended_the_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: tuple[int, ...] = ()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(*given)

    monkeypatch.setattr(main_module, "run", interrupted)
    statuses = [main_module.main(["train"])]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        given = (number,)
        statuses.append(main_module.main(["train"]))
    assert statuses == [130, 130, 143, 129]
    assert capsys.readouterr().err == "train: interrupted; nothing was recorded, dvc repro runs this stage again\n" * 4
    monkeypatch.setenv("RANK", "1")
    assert main_module.main(["train"]) == 129
    assert not capsys.readouterr().err, "one of several processes says it"


def test_a_model_on_another_gpu_than_the_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(*devices: str) -> SimpleNamespace:
        weights = [SimpleNamespace(device=torch.device(device)) for device in devices]
        return SimpleNamespace(parameters=lambda: iter(weights))

    assert_on(model("cuda:0", "cuda:0"), torch.device("cuda:0"))
    with pytest.raises(AssertionError, match="wanted cuda:1"):
        assert_on(model("cuda:1", "cuda:0"), torch.device("cuda:1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert_on(model("cuda:1"), torch.device("cuda:1"))
    with pytest.raises(AssertionError, match="cuda:0 in process 1"):
        assert_on(model("cuda:0"), torch.device("cuda:0"))
    with pytest.raises(AssertionError):  # what pick_device once gave to all processes
        assert_on(model("cuda:0"), torch.device("cuda"))


# What the processes run


def meet() -> None:
    """Exchanges something until the other process is gone."""
    distributed.init_exchange()
    while True:
        distributed.largest(1)


def interrupt_parent() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does
    time.sleep(60)


def hang_up_parent() -> None:
    os.kill(os.getppid(), signal.SIGHUP)
    meet()


def terminate_the_second() -> None:
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    meet()


def kill_the_second() -> None:
    distributed.init_exchange()
    for step in range(100):
        if distributed.rank() == 1 and step == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.largest(step)


def no_memory_in_the_second() -> None:
    distributed.init_exchange()
    if distributed.rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice")
    meet()


def same_problem() -> None:
    raise Problem("W_pack is not in the model", "nor is c_attn")


def bug_in_the_second() -> None:
    distributed.init_exchange()
    if distributed.rank() == 1:
        raise KeyError("a bug")
    meet()


def full_disk() -> None:
    Path("/dev/full").write_text("x")


def leave() -> None:
    sys.exit(3)


def deaf(path: str) -> None:
    """Hangs, as in a kernel that never ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, launch.SIGNALS)
    if distributed.rank() == 0:
        for _ in range(2):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.2)
    time.sleep(600)


def write_pid(folder: str) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def decide_differently() -> None:
    distributed.init_exchange()
    number = distributed.rank()
    distributed.require_same({"the dtype": "bfloat16", "compiled parts": ["rotary"]})
    distributed.note("the same line")
    distributed.require_same_notes()
    distributed.note(f"line {number}")
    distributed.require_same_notes(took_part=number == 0)
    try:
        distributed.require_same({"the dtype": "bfloat16", "the device": "cpu" if number else "cuda"})
    except Problem as problem:
        wrong = problem.messages[0]
    for line in ["first", "rows are padded"] if number else ["first"]:
        distributed.say_for_all(line)
    try:
        distributed.require_same_notes()
    except Problem as problem:
        raise Problem(wrong, *problem.messages) from None


def agree_on_steps() -> None:
    """TRIES short trainings, each interrupted at another moment in one process or both, once or twice."""
    from random import Random

    from transformers import TrainerControl

    from stages.train.signals import Interruption

    distributed.init_exchange()
    number = distributed.rank()
    for attempt in range(TRIES):
        draw = Random(f"{attempt} {number}")
        hit = attempt % 3 in (number, 2)  # process 0, process 1, both
        at, sent = draw.randrange(2, 10), Random(attempt).choice(sorted(set(launch.SIGNALS) - launch.ignored_signals()))
        interruption, control, step = Interruption(), TrainerControl(), 0
        with interruption.handled():
            while not control.should_training_stop:
                step += 1
                assert step <= 10
                time.sleep(draw.uniform(0, 0.002))
                if hit and step == at:
                    for _ in range(1 + attempt % 2):
                        os.kill(os.getpid(), sent)
                interruption.on_step_end(None, None, control)
        assert control.should_save
        ends = distributed.gather((step, interruption.requested))
        assert ends[0] == ends[1], f"attempt {attempt}: {ends}"
        assert ends[0][1] == sent
        distributed.wait_for_all()


# How they end


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (kill_the_second, r"^process 1 of 2 was killed \(SIGKILL\), and the others were stopped\. .*dvc repro resumes"),
        (
            no_memory_in_the_second,
            r"^process 1 of 2: out of memory: CUDA out of memory\. Tried to allocate 2\.00 GiB\.; lower",
        ),
        (same_problem, r"^W_pack is not in the model\nnor is c_attn$"),
        (leave, r"^it ended with the exit status 3, and said nothing else$"),
        (
            decide_differently,
            "^the processes differ in the device: process 0: cuda; process 1: cpu\n"
            "not the same in all processes, but only in process 1: rows are padded\n"
            "all processes must compute in the same way; use the same GPUs, packages, code, parameters and data for them$",
        ),
    ],
)
def test_one_message_says_what_ended_several_processes(
    capfd: pytest.CaptureFixture[str], function: Callable[[], None], message: str
) -> None:
    with pytest.raises(Problem, match=message):
        launch.launch(function, 2)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_a_bug_in_a_process_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"process 1 of 2 failed:\n(?s:.*)in bug_in_the_second(?s:.*)KeyError: 'a bug'"):
        launch.launch(bug_in_the_second, 2)


def test_an_error_of_the_system_keeps_its_number() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        launch.launch(full_disk, 1)
    assert main_module.find_remedy(caught.value, []) is not None


@pytest.mark.parametrize(
    ("function", "number"),
    [(interrupt_parent, signal.SIGINT), (hang_up_parent, signal.SIGHUP), (terminate_the_second, signal.SIGTERM)],
)
def test_a_signal_ends_all_processes_without_a_word(
    capfd: pytest.CaptureFixture[str], function: Callable[[], None], number: int
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored here, as nohup does with SIGHUP")
    handlers = {each: signal.getsignal(each) for each in launch.SIGNALS}
    with pytest.raises(KeyboardInterrupt) as caught:
        launch.launch(function, 2)
    assert launch.signal_of(caught.value) == number
    assert {each: signal.getsignal(each) for each in launch.SIGNALS} == handlers
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_a_second_signal_kills_processes_that_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "SAME_SIGNAL_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        launch.launch(deaf, 2, str(tmp_path))


def test_a_repeated_signal_is_no_second_one() -> None:
    assert not launch.ends_at_once(signal.SIGTERM, 0.5)
    assert launch.ends_at_once(signal.SIGTERM, 2.5)
    assert not launch.ends_at_once(signal.SIGHUP, 2.5), "a dropped connection sends it from the kernel and from the shell"


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    code = (
        "from stages.model.launch import launch; from tests.test_processes import write_pid\n"
        f"if __name__ == '__main__': launch(write_pid, 2, {str(tmp_path)!r})"
    )
    (tmp_path / "start.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, str(tmp_path / "start.py")], cwd=PROJECT, env=environment) as process:
        while len(pids := list(tmp_path.glob("*.pid"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    left = {int(path.stem) for path in pids}
    while left:  # it would wait for ten minutes
        time.sleep(0.01)
        for pid in list(left):
            with suppress(OSError):
                if "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
                    continue
            left.remove(pid)


def test_processes_agree_on_the_step_at_which_they_stop() -> None:
    launch.launch(agree_on_steps, 2)


# Failures by their kind


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Problem("a", "b"), "problem", "a"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "problem", "out of memory: CUDA out of memory. Tried; lower"),
        (MemoryError(), "problem", "out of memory: MemoryError; lower"),
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
            "problem",
            "its GPU has failed: CUDA error: un",
        ),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "bug", ""),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1"), "lost", "it lost the other"),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp"), "lost", "it lost the other processes"),
        (RuntimeError("shape '[2]' is invalid"), "bug", ""),
        (RuntimeError("cannot restore the state"), "bug", ""),
        (KeyError("x"), "bug", ""),
    ],
)
def test_a_failure_is_told_from_a_bug(error: Exception, kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "lost":
        assert distributed.explain_failure(error) == ("bug", ())  # a process by itself has none to lose
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found, messages = distributed.explain_failure(error)
    assert found == kind
    assert "".join(messages[:1]).startswith(words)


def test_under_torchrun_a_failure_names_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Problem, match=r"^out of memory"), distributed.failures_explained():
        raise torch.OutOfMemoryError("CUDA out of memory")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("TORCHELASTIC_RUN_ID", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(Problem, match=r"^process 3 of 4: out of memory"), distributed.failures_explained():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(KeyError), distributed.failures_explained():
        raise KeyError
