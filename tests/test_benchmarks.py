"""The parts of the benchmarks that would waste an hour, or count nothing, if they were wrong."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.texts import write_rows
from benchmarks.watch import Usage, Watch, size_of
from stages.core.params import read_yaml
from tests.tiny import PROJECT, load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/full_size.py")


def test_changed_parameters_exist_and_keep_their_comments(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(PROJECT / "params.yaml", path)
    lines = script.change_params(path, script.CHANGED | script.CHANGED_ON_CPU)
    assert "encode.max_length: 2048 (was 512)" in lines
    before, after = (each.read_text(encoding="utf-8").splitlines() for each in (PROJECT / "params.yaml", path))
    differing = [(was, now) for was, now in zip(before, after, strict=True) if was != now]
    assert len(differing) == len(lines)
    assert all(was.partition("#")[2] == now.partition("#")[2] for was, now in differing)
    assert read_yaml(path)["train"]["training_arguments"] == {"max_steps": 1}
    with pytest.raises(SystemExit, match=r"train.lerning_rate: params.yaml has no such parameter"):
        script.change_params(path, {"train.lerning_rate": 1e-4})


def test_rows_are_the_same_every_time_and_differ_from_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name, 300)
    lines = (tmp_path / "a").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(set(lines)) == 300


def test_size_counts_a_hard_link_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    assert size_of(tmp_path).apparent == 10_000
    assert size_of(tmp_path / "missing").allocated == 0


def test_watch_gives_memory_to_the_stage_that_uses_it(tmp_path: Path) -> None:
    """The launcher stands for dvc: it runs two stages after each other, through a shell as dvc does."""
    (tmp_path / "stages.py").write_text("import sys, time; x = bytearray(b'x' * int(sys.argv[-1])); time.sleep(1)")
    code = (
        f"import subprocess\nfor words in ('ingest 1000', 'generate --model m/base 100000000'):\n"
        f"    subprocess.run({shlex.quote(sys.executable)!r} + ' -m stages ' + words, shell=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    found: list[Usage] = []
    watch = Watch(process.pid, tmp_path, recorded=found.append)
    watch.start()
    process.wait()
    watch.stop(complete=False)
    assert [used.stage for used in found] == ["ingest", "generate base"]
    assert [used.complete for used in found] == [True, False]
    assert found[0].own < 100_000_000 < found[1].own <= found[1].mapped
    assert found[0].started < found[0].ended <= found[0].recorded <= found[1].started + 1 < time.time() + 1


def test_each_damage_changes_the_file_and_says_how(tmp_path: Path) -> None:
    faults = load_script("benchmarks/faults.py")
    chance, file, found = random.Random(0), tmp_path / "folder" / "file", set()
    file.parent.mkdir()
    for _ in range(50):
        file.write_bytes(b"abc")
        how = faults.damage(file, chance)
        left = file.read_bytes() if file.exists() else None
        assert left != b"abc"
        assert how.endswith(" folder/file")
        if how.startswith("flip"):
            assert left is not None
            assert sum((a ^ b).bit_count() for a, b in zip(left, b"abc", strict=True)) == 1
        found.add(how.split()[0])
    assert found == {"flip", "cut", "delete"}


def test_the_processes_of_a_session_are_found_until_they_end() -> None:
    faults = load_script("benchmarks/faults.py")
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    try:
        while len([*faults.members(shell.pid)]) < 2:
            time.sleep(0.01)
        assert {words.split()[0] for _, words in faults.members(shell.pid)} == {"sh", "sleep"}
        shell.kill()
        while len(left := [*faults.members(shell.pid)]) > 1:  # the shell is a zombie at the end
            time.sleep(0.01)
        assert left[0][1].split()[0] == "sleep"
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    while [*faults.members(shell.pid)]:
        time.sleep(0.01)
