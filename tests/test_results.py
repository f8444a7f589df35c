"""A result is kept until DVC has recorded it: the next run takes it up, whatever has killed DVC, and never a damaged one."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stages.__main__ as launcher
from stages.core import provenance, results
from stages.core.integrity import File, scan
from stages.core.output import Done, only_writer
from stages.core.problem import Problem
from stages.core.results import (
    MARK,
    dvc_hash,
    hash_files,
    keep,
    read_lock,
    remove_recorded,
    result_folder,
    results_root,
    take_up,
)
from stages.core.snapshot import Snapshot
from stages.ingest import ingest
from tests.test_main import INGEST, OUT, say, wait_for
from tests.tiny import PROJECT, Workspace

WORDS = INGEST[2::2]


@pytest.fixture
def here(workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """The workspace as under DVC, with a parameter of `ingest` that DVC has not seen and that changes no output."""
    monkeypatch.chdir(workspace.root)
    with workspace.edited("params.yaml", "dvc.lock", "reports/machine/files/ingest.json"):
        params = workspace.params()
        params["ingest"]["max_chars"] += 1
        workspace.write(params)
        yield workspace


def kept() -> list[Path]:
    return sorted(path.parent for path in results_root().glob(f"ingest-*/{MARK}"))


def contents() -> dict[str, str]:
    return {f"{output}/{name}": digest for output in OUT for name, digest in hash_files(Path(output)).items()}


class Ending:
    """A stage in the place of `ingest` that leaves its outputs as they are, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = self.cleaned = 0

        def stage(params: object, *, raw: Path, hub: Path, examples: Path, report: Path) -> Done:
            self.runs += 1
            return Done("made", self.clean_up)

        monkeypatch.setattr(ingest, "ingest", stage)

    def clean_up(self) -> None:
        self.cleaned += 1


def test_a_result_is_taken_up_with_its_bytes_and_without_the_stage(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = contents()
    assert launcher.main(list(INGEST)) == 0
    (folder,) = kept()
    summary = capsys.readouterr().out.rpartition(" (")[0]
    Path(OUT[0]).rename(tmp_path / "examples")  # as DVC deletes outputs
    Path(OUT[1]).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "call", None)
        assert launcher.main(list(INGEST)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ingest: takes up the result of an earlier run")
    assert second.startswith(summary)
    assert contents() == before
    assert kept() == [folder]  # until DVC has recorded it


def test_a_result_of_other_inputs_is_not_taken_up(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = Ending(monkeypatch)
    assert launcher.main(list(INGEST)) == 0
    params = here.params()
    params["ingest"]["max_chars"] += 1
    here.write(params)
    assert launcher.main(list(INGEST)) == 0
    assert (ending.runs, len(kept())) == (2, 2)


@pytest.mark.parametrize("place", [f"{OUT[0]}/train.jsonl", OUT[1], MARK])
def test_a_damaged_result_is_named_and_not_used(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    ending = Ending(monkeypatch)
    assert launcher.main(list(INGEST)) == 0
    file = kept()[0] / place
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert launcher.main(list(INGEST)) == 0
    assert f"is damaged ({place}) and is not used: this stage runs again" in capsys.readouterr().out
    assert ending.runs == 2


def test_a_result_is_removed_when_dvc_has_recorded_it(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    Ending(monkeypatch)
    assert launcher.main(list(INGEST)) == 0
    remove_recorded(Path())
    assert kept()  # dvc.lock names the same hashes, but of the parameters before: DVC would run the stage again
    lock = here.yaml.load(Path("dvc.lock"))
    lock["stages"]["ingest"]["params"]["params.yaml"]["ingest"] = here.params()["ingest"]
    here.yaml.dump(lock, Path("dvc.lock"))
    monkeypatch.chdir(PROJECT)  # another project folder that shares the checkpoints, as that of an experiment
    remove_recorded(here.root)
    assert kept()
    monkeypatch.chdir(here.root)
    remove_recorded(Path())
    assert not kept()


def test_a_forced_run_of_what_dvc_has_recorded_keeps_nothing(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.root)
    ending = Ending(monkeypatch)
    assert launcher.main(list(INGEST)) == 0
    assert (ending.runs, ending.cleaned, kept()) == (1, 1, [])


def test_the_hashes_are_those_of_dvc(workspace: Workspace) -> None:
    outs = [out for entry in read_lock(workspace.root).values() for out in entry["outs"]]
    assert any(out["md5"].endswith(".dir") for out in outs)
    for out in outs:
        assert dvc_hash(hash_files(workspace.root / out["path"])) == out["md5"], out["path"]


def test_what_changes_while_its_inputs_are_hashed_is_not_kept(here: Workspace) -> None:
    snapshot = Snapshot.take("ingest", WORDS, Path())
    os.utime("data/raw/zh.json", (1, 1))
    with pytest.raises(Problem, match="changed while 'ingest' ran: data/raw"):
        keep(snapshot, {}, OUT, Done("made"), dvc_lives=True)
    assert not kept()


def test_on_a_full_disk_nothing_is_kept_and_checkpoints_stay(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ending = Ending(monkeypatch)
    monkeypatch.setattr(results, "write_json", full)
    assert launcher.main(list(INGEST)) == 0
    assert "the result is not kept outside of the outputs (No space left on device)" in capsys.readouterr().out
    assert (ending.cleaned, kept(), [*results_root().glob("*")]) == (0, [], [])


def test_an_orphan_keeps_its_result_and_says_so(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = Ending(monkeypatch)
    monkeypatch.setattr(launcher, "started_by", iter([(1, 2), (1, 1), (1, 1)]).__next__)
    status, message = say(capsys, *INGEST)
    assert (status, ending.cleaned, len(kept())) == (1, 1, 1)
    assert "dvc ended before this stage; run dvc repro again: it takes up this result in seconds" in message


def test_a_run_that_dvc_did_not_start_keeps_nothing(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    Ending(monkeypatch)
    monkeypatch.delenv("DVC_ROOT")
    assert launcher.main(list(INGEST)) == 0
    assert not kept()


@pytest.mark.parametrize(
    ("setting", "dvc_lives", "links"), [("copy", True, False), ("hardlink", True, True), ("copy", False, True)]
)
def test_a_large_result_is_linked_only_if_dvc_does_not_copy_it_once_more(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, setting: str, dvc_lives: bool, links: bool
) -> None:
    monkeypatch.setattr(results, "SMALL", 0)
    monkeypatch.setattr(results, "_reflink", lambda _, target: target.touch())
    monkeypatch.setattr(results, "_dvc_makes_hard_links", lambda: setting == "hardlink")
    snapshot = Snapshot.take("ingest", WORDS, Path())
    assert keep(snapshot, {}, OUT, Done("made"), dvc_lives=dvc_lives)
    assert [(folder / OUT[1]).samefile(OUT[1]) for folder in kept()] == [True] * links
    if links:
        before = contents()
        Path(OUT[1]).unlink()
        assert take_up(snapshot, {}) == "made"
        assert contents() == before


@pytest.mark.parametrize("dvc_lives", [True, False])
def test_a_large_adapter_is_copied_whatever_dvc_does(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, dvc_lives: bool
) -> None:
    """Its checkpoints are removed, so nothing else would be left of hours if dvc is killed before it has recorded it."""
    monkeypatch.setattr(results, "SMALL", 0)
    monkeypatch.setattr(results, "_reflink", lambda _, target: target.touch())
    monkeypatch.setattr(results, "_dvc_makes_hard_links", lambda: True)
    snapshot = Snapshot.take("ingest", WORDS, Path())
    assert keep(snapshot, {}, OUT, Done("made", copy_large=True), dvc_lives=dvc_lives)
    (folder,) = kept()
    assert not (folder / OUT[1]).samefile(OUT[1])


def test_without_hard_links_a_large_result_is_not_kept_but_is_taken_up(
    here: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where .checkpoints is on another file system than the outputs."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(results, "_reflink", lambda _, target: target.touch())
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    snapshot = Snapshot.take("ingest", WORDS, Path())
    read = {path: scan(Path(path)) for path in snapshot.inputs}
    assert keep(snapshot, read, OUT, Done("made"), dvc_lives=True)
    monkeypatch.setattr(results, "SMALL", 0)
    before = contents()
    Path(OUT[1]).unlink()
    assert take_up(snapshot, read) == "made"
    assert contents() == before
    results.remove(kept()[0])
    assert not keep(snapshot, read, OUT, Done("made"), dvc_lives=False)
    assert not kept()
    assert "is not kept outside of the outputs (Invalid cross-device link)" in capsys.readouterr().out


def test_the_name_of_a_result_needs_no_hash_of_what_is_hashed(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights too large to be hashed are those that their folder's manifest names."""
    snapshot = Snapshot.take("ingest", WORDS, Path())
    read = {path: scan(Path(path)) for path in snapshot.inputs}
    other = read | {"data/raw": read["data/raw"] | {"zh.json": File(1, "0" * 32)}}
    unhashed = read | {"data/raw": read["data/raw"] | {"zh.json": File(1, "")}}
    assert result_folder(snapshot, unhashed) == result_folder(snapshot, read | {"data/raw": {"a": File(2, "")}})
    monkeypatch.setattr(provenance, "hash_path", None)
    assert result_folder(snapshot, read) != result_folder(snapshot, other)


def test_the_setting_of_links_is_read_from_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    for text, expected in (
        ("", False),
        ("[cache]\n type = reflink,hardlink\n", False),
        ("[cache]\n type = hardlink\n", True),
    ):
        (tmp_path / ".dvc" / "config").write_text(text)
        assert results._dvc_makes_hard_links() is expected


# One writer


HOLDER = """
import os, sys, time
from pathlib import Path
from stages.core.output import only_writer
with only_writer("merge", ["models/merged"], kept=True):
    if os.fork() == 0:  # a worker, which inherits the open file
        time.sleep(60)
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(60)
"""


def test_a_second_writer_of_the_same_output_is_refused_with_the_process_of_the_first(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = scratch / "up"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(up)], cwd=PROJECT, start_new_session=True)
    monkeypatch.chdir(PROJECT)
    try:
        wait_for(up)
        expected = (
            rf"process {holder.pid} is running merge and writes models/merged\. .* takes up .* kill {holder.pid}; then"
        )
        with pytest.raises(Problem, match=expected), only_writer("merge", ["models/merged"], kept=True):
            pass
        with only_writer("merge", ["models/other"], kept=True):
            pass
        holder.kill()
        holder.wait()
        with only_writer("merge", ["models/merged"], kept=False):  # though its worker lives
            owners = [path.read_text() for path in scratch.glob(".checkpoints/locks/*")]
        assert f"{os.getpid()} " in owners
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_the_mark_says_what_was_kept(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    Ending(monkeypatch)
    assert launcher.main(list(INGEST)) == 0
    mark = json.loads((kept()[0] / MARK).read_text())
    assert (mark["stage"], mark["summary"], mark["project"]) == ("ingest", "made", str(here.root))
    assert set(mark["hashes"]) == set(OUT)
