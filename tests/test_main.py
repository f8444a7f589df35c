"""The launcher: one clear message, a status, nothing half-written, and no result recorded for an input that changed."""

import errno
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import stages.__main__ as launcher
from stages.core import progress as progress_module
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.core.snapshot import Snapshot
from stages.ingest import ingest
from tests.tiny import PROJECT, Workspace

OUT = ("data/examples", "reports/ingest.json")
INGEST = ("ingest", "--raw", "data/raw", "--hub", "data/hub", "--examples", OUT[0], "--report", OUT[1])


@pytest.fixture
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(workspace.root)
    return workspace


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = launcher.main(list(arguments))
    return status, capsys.readouterr().err


def test_usage_and_unknown_stage(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys)[0] == 2
    status, said = say(capsys, "trian", "--raw", "a")
    assert status == 1
    assert "no stage 'trian' in dvc.yaml; the stages are fetch, fetch_data, ingest" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--raw", "data/raw"), "wanted the paths --raw, --hub, --examples, --report; found --raw; see its cmd in dvc.yaml"),
        (
            (*INGEST[1:], "--more", "x"),
            "wanted the paths --raw, --hub, --examples, --report; found --raw, --hub, --examples, --report, --more",
        ),
        (("data/raw",), "wanted --name path for each path, once, found 'data/raw'"),
        (("--raw", "a", "--raw", "b"), "wanted --name path for each path, once, found '--raw a --raw b'"),
        (("--raw",), "wanted --name path for each path, once, found '--raw'"),
        (
            ("--raw", "data/raw", "--hub", "data/hub", "--examples", "", "--report", OUT[1]),
            "wanted --name path for each path, once, found '--raw data/raw --hub data/hub --examples  --report "
            "reports/ingest.json'",
        ),
    ],
)
def test_the_named_paths_are_checked(
    here: Workspace, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, said = say(capsys, "ingest", *words)
    assert status == 1
    assert f"ingest: {message}" in said


@pytest.mark.parametrize("name", ["check", "verify"])
def test_check_and_verify_take_no_options(here: Workspace, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert say(capsys, name, "--all") == (2, f"{name}: takes no options, found '--all'\n")


@pytest.mark.parametrize("command", [("check",), INGEST], ids=["check", "ingest"])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dvc.yaml", ""),
        ("dvc.yaml", "- 1"),
        ("dvc.yaml", "stages: 1"),
        ("dvc.yaml", "stages: {ingest: 1}"),
        ("params.yaml", "12"),
        ("params.yaml", "[[1]]"),
        ("params.yaml", "a: 2020-99-99"),
        ("params.yaml", "a: !!bool x"),
        ("params.yaml", "a: " + "[" * 3000),
    ],
)
def test_a_broken_file_of_the_pipeline_is_one_message(
    here: Workspace, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], file: str, text: str
) -> None:
    with here.edited(file):
        (here.root / file).write_text(text)
        status, said = say(capsys, *command)
    assert status == 1
    assert said.count("\n") == 1
    assert file in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--raw", "data/raw", "--hub", "data/hub", "--examples", "params.yaml/x", "--report", OUT[1]),
            "params.yaml/x.partial: a part of this path is a file",
        ),
        ((*INGEST[1:-1], "reports"), "reports: a file is needed here"),
        ((*INGEST[1:], "--provenance", "reports"), "reports: a file is needed here"),
        ((*INGEST[1:], "--provenance", "params.yaml/x/y"), "params.yaml/x/y.partial: a part of this path is a file"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_message(
    here: Workspace, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, said = say(capsys, "ingest", *words)
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith(f"ingest: {message}")


def test_an_input_that_is_not_there_is_one_message(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["encode", "--examples", "nothere", "--prompts", "data/prompts.json", "--tokenizer", "models/tokenizer"]
    words += ["--tokens", "data/tokens", "--report", "reports/encode.json", "--masks", "reports/masks.html"]
    words += ["--lengths", "reports/lengths.csv"]
    status, said = say(capsys, *words)
    assert (status, said) == (1, "encode: nothere/train.jsonl: not found; check the path\n")
    words[2] = "data/examples"
    (here.root / "data/examples").rename(here.root / "elsewhere")
    try:
        status, said = say(capsys, *words)
    finally:
        (here.root / "elsewhere").rename(here.root / "data/examples")
    assert (status, said) == (1, "encode: data/examples: not found; dvc repro makes it, if it is not a file of yours\n")


def test_check_names_every_bad_parameter_of_every_stage(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, "check") == (0, "")
    with here.edited("params.yaml"):
        params = here.params()
        params["train"]["lr"] = 1
        params["score"]["judge_rows"] = 0
        params["evaluate"] = {}
        here.write(params)
        status, said = say(capsys, "check")
    assert status == 1
    assert "params.yaml: evaluate: no stage has this name" in said
    assert "params.yaml: train.lr: unknown parameter" in said
    assert "params.yaml: score.judge_rows: Input should be greater than 0; found 0" in said


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")]
)
def test_what_the_system_refuses_is_one_message(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "said by the system", "data/examples/train.jsonl")

    before = (here.root / OUT[0] / "train.jsonl").read_bytes()
    monkeypatch.setattr(ingest, "write_line", refuse)
    status, said = say(capsys, *INGEST)
    assert status == 1
    assert said.startswith("ingest: data/examples/train.jsonl: ")
    assert words in said
    assert (here.root / OUT[0] / "train.jsonl").read_bytes() == before
    assert not list(here.root.rglob("*.partial"))


def test_ctrl_c_is_no_traceback(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest, "_files", interrupt)
    assert say(capsys, *INGEST)[0] == 130


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at inline_container.cc:626] . PytorchStreamWriter failed writing file data/3: file write failed"
        ),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 208064 vs 207952"),
        ValueError(
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
        ),
    ],
    ids=["torch", "torch at the end of a file", "safetensors"],
)
def test_a_full_disk_that_a_library_words_in_its_own_way_is_the_same_message(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(ingest, "write_line", refuse)
    status, said = say(capsys, *INGEST)
    assert (status, "the disk is full" in said) == (1, True)


def test_a_defect_keeps_its_traceback(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ingest, "write_line", fail)
    with pytest.raises(ZeroDivisionError):
        launcher.main(list(INGEST))


@pytest.mark.parametrize(
    "file", ["params.yaml", "stages/encode/mask.py", "stages/templates/chatml.jinja", "data/examples/test.jsonl"]
)
def test_an_edit_during_the_run_is_seen(here: Workspace, file: str) -> None:
    snapshot = Snapshot.take("encode", ("data/examples", "models/tokenizer", "data/tokens"), Path())
    snapshot.check()
    with here.edited(file):
        text = Path(file).read_text(encoding="utf-8")
        Path(file).write_text(text.replace("max_length: 512", "max_length: 99") + "\n", encoding="utf-8")
        with pytest.raises(Problem, match="changed while 'encode' ran: ") as caught:
            snapshot.check()
    assert (file if file != "params.yaml" else "params.yaml (encode)") in str(caught.value) or "data/examples" in str(
        caught.value
    )


def test_a_matrix_stage_watches_its_own_model(here: Workspace) -> None:
    tokens = ("data/tokens/test.arrow", "data/tokens/prompts.arrow", "data/tokens/text.arrow")
    outs = tuple(f"data/predictions/merged{kind}.jsonl" for kind in ("", ".prompts", ".text"))
    taken = Snapshot.take("generate", ("models/merged", *tokens, *outs), Path())
    assert {"models/merged", *tokens} == set(taken.data)
    assert all(taken.data.values())


def test_the_snapshot_comes_before_the_stage_is_imported() -> None:
    source = (PROJECT / "stages" / "__main__.py").read_text(encoding="utf-8")
    assert source.index("Snapshot.take(") < source.index("importlib.import_module(f")
    imports = [line for line in source.splitlines() if line.strip().startswith(("import ", "from "))]
    assert imports
    assert not [line for line in imports if "torch" in line or "transformers" in line]


def test_an_output_appears_only_when_whole(tmp_path: Path) -> None:
    out = tmp_path / "models" / "adapter"
    with fresh_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    with pytest.raises(RuntimeError), fresh_folder(out) as folder:  # noqa: PT012
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [file.name for file in out.iterdir()] == ["a"]
    (tmp_path / "models" / "adapter.partial").mkdir()  # as a killed run leaves it
    with fresh_folder(out) as folder:
        (folder / "c").write_text("3")
    assert [file.name for file in out.iterdir()] == ["c"]
    with pytest.raises(RuntimeError), fresh_file(tmp_path / "r.json") as file:  # noqa: PT012
        file.write_text("half")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


def test_a_stage_runs_in_a_process_of_its_own(here: Workspace, tmp_path: Path) -> None:
    out, report = tmp_path / "examples", tmp_path / "report.json"
    done = here.run("ingest", "--raw", "data/raw", "--hub", "data/hub", "--examples", str(out), "--report", str(report))
    assert (done.returncode, done.stderr) == (0, "")
    assert "64 rows read, 60 kept" in done.stdout
    for file in (here.root / "data" / "examples").iterdir():
        assert (tmp_path / "examples" / file.name).read_bytes() == file.read_bytes()


# The order at the end of a stage


class _Ending:
    """A stage in the place of `ingest` that notes when its clean-up is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, during: Callable[[], None]) -> None:
        self.events: list[str] = []

        def stage(params: object, *, raw: Path, hub: Path, examples: Path, report: Path) -> Done:
            during()
            self.events.append("outputs")
            return Done("made", lambda: self.events.append("cleaned up"))

        monkeypatch.setattr(ingest, "ingest", stage)
        write = launcher.write_provenance

        def write_provenance(*given: object) -> None:
            write(*given)  # type: ignore[arg-type]
            self.events.append("provenance")

        monkeypatch.setattr(launcher, "write_provenance", write_provenance)


PROVENANCE = ("--provenance", "reports/provenance/ingest.json")


def test_checkpoints_are_removed_after_all_else_is_safe(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = _Ending(monkeypatch, during=lambda: None)
    assert launcher.main([*INGEST, *PROVENANCE]) == 0
    assert ending.events == ["outputs", "provenance", "cleaned up"]
    assert re.fullmatch(r"ingest: made \(\d\.\d s\)\n", capsys.readouterr().out)
    (here.root / PROVENANCE[1]).unlink()


def test_checkpoints_stay_if_an_input_changed_during_the_run(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = _Ending(monkeypatch, during=lambda: os.utime("data/raw/zh.json", (0, 0)))
    status, message = say(capsys, *INGEST)
    assert (status, ending.events) == (1, ["outputs"])
    assert "changed while 'ingest' ran: data/raw" in message


def test_the_last_act_is_to_compare_the_inputs(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is edited while checkpoints are removed, or while Python ends, is noticed too."""
    ending = _Ending(monkeypatch, during=lambda: None)

    def shut_down() -> None:
        ending.events.append("shut down")
        os.utime("data/raw/zh.json", (2, 2))  # another time than in other tests

    assert launcher.main([*INGEST], shut_down=shut_down) == 1
    assert ending.events == ["outputs", "cleaned up", "shut down"]
    assert "changed while 'ingest' ran: data/raw" in capsys.readouterr().err
    os.utime("data/raw/zh.json")


def test_a_stage_ends_as_a_process_right_after_that(here: Workspace, tmp_path: Path) -> None:
    """With its output flushed and Python's exit functions called, though the interpreter does not end by itself."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\natexit.register(lambda: print('exit function'))\n"
        "class Late:\n    def __del__(self): os.write(1, b'the interpreter has ended\\n')\nsys.late = Late()\n"
    )
    words = [
        "--raw",
        "data/raw",
        "--hub",
        "data/hub",
        "--examples",
        str(tmp_path / "e"),
        "--report",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "stages", "ingest", *words],
        cwd=here.root,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("ingest: 64 rows read")
    assert second == "exit function"


def test_checkpoints_stay_if_the_disk_is_full_at_the_last_file(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = _Ending(monkeypatch, during=lambda: None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", PROVENANCE[1])

    monkeypatch.setattr(launcher, "write_provenance", full)
    status, message = say(capsys, *INGEST, *PROVENANCE)
    assert (status, ending.events) == (1, ["outputs"])
    assert "the disk is full" in message


def test_checkpoints_stay_if_dvc_was_killed_during_the_run(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage outlives it, but nobody records its result, which could not be kept elsewhere either."""
    monkeypatch.setenv("DVC_ROOT", str(here.root))
    monkeypatch.setattr(launcher.results, "keep", lambda *_, **__: False)
    ending = _Ending(monkeypatch, during=lambda: monkeypatch.setattr(os, "getppid", lambda: 1))
    status, message = say(capsys, *INGEST)
    assert (status, ending.events) == (1, ["outputs"])
    assert "dvc ended before this stage; run dvc repro again" in message


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_the_death_of_dvc_is_seen_through_the_shell_in_which_it_runs_a_stage(tmp_path: Path, shell: str) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__main__.py").write_text(
        f"import sys, time\nsys.path.insert(0, {str(PROJECT)!r})\nsys.modules.pop('stages', None)\n"
        "import importlib.util as util\n"
        f"spec = util.spec_from_file_location('launcher', {str(PROJECT / 'stages' / '__main__.py')!r})\n"
        "launcher = util.module_from_spec(spec)\nspec.loader.exec_module(launcher)\n"
        "before = launcher.started_by()\nopen('up', 'w').close()\n"
        "for _ in range(200):\n    time.sleep(0.05)\n    if launcher.started_by() != before:\n        break\n"
        "open('seen', 'w').write(str(launcher.started_by() != before))\n"
    )
    command = f"import subprocess; subprocess.run([{shell!r}, '-c', {shlex.quote(sys.executable) + ' -m stages'!r}])"
    dvc = subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path)
    wait_for(tmp_path / "up")
    dvc.kill()
    dvc.wait()
    wait_for(tmp_path / "seen")
    time.sleep(0.1)
    assert (tmp_path / "seen").read_text() == "True"


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_the_parameters_are_those_of_the_snapshot(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stage(params: ingest.Params, *, raw: Path, hub: Path, examples: Path, report: Path) -> Done:
        seen.append(params.max_chars)
        return Done("made")

    monkeypatch.setattr(ingest, "ingest", stage)
    take = Snapshot.take.__func__  # type: ignore[attr-defined]

    def edit_after(kind: type[Snapshot], *given: object) -> Snapshot:
        snapshot: Snapshot = take(kind, *given)
        params = here.params()
        params["ingest"]["max_chars"] = 7
        here.write(params)
        return snapshot

    before = here.params()["ingest"]["max_chars"]
    with here.edited("params.yaml"):
        monkeypatch.setattr(Snapshot, "take", classmethod(edit_after))
        status, message = say(capsys, *INGEST)
    assert seen == [before]
    assert status == 1
    assert "params.yaml (ingest)" in message


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7325, "2 h 2 min")]
)
def test_a_duration_is_what_a_person_reads(seconds: float, text: str) -> None:
    assert launcher.duration(seconds) == text


def test_progress_in_a_log_is_whole_lines_and_none_for_a_short_loop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress(range(3), "test")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_module, "LOG_INTERVAL_S", 0.0)
    assert list(progress(range(3), "test", 3)) == [0, 1, 2]
    lines = capsys.readouterr().err
    assert lines.endswith("\n")
    assert "\r" not in lines
    assert re.match(r"test: 3 of 3 rows \(100 %\), .* rows/s, 00:00 left$", lines.splitlines()[-1])
    assert list(progress(range(3), "test")) == [0, 1, 2]
    assert re.match(r"test: 3 rows, .* rows/s$", capsys.readouterr().err.splitlines()[-1])
