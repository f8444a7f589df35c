"""Disk space: what a stage writes is said and checked before it runs, and one command names what killed runs have left."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.fs import generic
from filelock import FileLock

import stages.__main__ as launcher
from stages.commands import disk as command
from stages.core import disk
from stages.core.disk import Write, check_space, folder_size, merge_problems, merged_model, space_problems
from stages.core.output import fresh_file, fresh_folder
from stages.core.problem import Problem
from stages.generate import generate as generate_module
from stages.merge import merge as merge_module
from stages.train import train as train_module
from stages.train.arguments import KEPT_CHECKPOINTS
from stages.train.checks import check_disk
from tests.test_pipeline import SPEC
from tests.tiny import PROJECT, Workspace

GB = 10**9


def set_free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with DVC, which started this stage, on a file system that has hard links and no reflinks."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    has_links(monkeypatch, "hardlink", "symlink")
    return tmp_path


def has_links(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    monkeypatch.setattr(generic, "test_links", lambda tried, *_: [kind for kind in tried if kind in kinds])


# Before a stage


def test_what_is_written_is_said_from_1_gb_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    set_free_space(monkeypatch, 72_300 * 10**6)
    check_space("merge", "the merged model", Write(Path("models/merged"), 16_100 * 10**6))
    assert capsys.readouterr().out == "merge: will write 16.1 GB to models/merged; 72.3 GB are free\n"
    check_space("merge", "the merged model", Write(Path("models/merged"), GB - 1))
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_refused_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    set_free_space(monkeypatch, 1999)
    with pytest.raises(Problem) as caught:
        check_space("fetch", "copying x", Write(Path("models"), 2000))
    assert str(caught.value) == (
        "too little disk space for copying x: 1 MB for models are needed, 0 MB are free; free some space (python -m stages "
        "disk names what can be deleted) or use a larger disk"
    )
    set_free_space(monkeypatch, 2000)
    check_space("fetch", "copying x", Write(Path("models"), 2000))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("kinds", "config", "copies"),
    [
        (("hardlink", "symlink"), "", True),  # the default is reflink,copy
        (("reflink", "hardlink", "symlink"), "", False),
        (("hardlink", "symlink"), "hardlink,symlink", False),
        (("hardlink", "symlink"), "symlink", True),  # first a copy, and then a symlink to it
        (("reflink", "hardlink", "symlink"), "copy", False),  # DVC clones into its cache whatever cache.type says
    ],
)
def test_the_copy_that_dvc_makes_is_counted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kinds: tuple[str, ...],
    config: str,
    copies: bool,
) -> None:
    has_links(monkeypatch, *kinds)
    if config:
        Path(".dvc/config").write_text(f"[cache]\n    type = {config}\n")
    set_free_space(monkeypatch, 30 * GB)
    disk.say_space("merge", Write(Path("models/merged"), 17 * GB, cached=16 * GB))
    copied = " and 16.0 GB to .dvc/cache (DVC's copy)" if copies else ""
    assert capsys.readouterr().out == f"merge: will write 17.0 GB to models/merged{copied}; 30.0 GB are free\n"
    problems = space_problems("the merged model", Write(Path("models/merged"), 17 * GB, cached=16 * GB))
    assert len(problems) == copies
    assert all("or set dvc config cache.type hardlink,symlink" in problem.replace("; or", " or") for problem in problems)


def test_trying_links_makes_no_folder_for_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    monkeypatch.chdir(tmp_path)
    disk.copying_cache(Path("models/merged"))
    assert [path.name for path in tmp_path.iterdir()] == [".dvc"]


@pytest.mark.usefixtures("project")
def test_a_stage_that_dvc_did_not_start_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT")
    set_free_space(monkeypatch, 20 * GB)
    assert not space_problems("the merged model", Write(Path("models/merged"), 16 * GB, cached=16 * GB))


@pytest.mark.usefixtures("project")
def test_a_cache_on_another_disk_is_compared_with_that_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == Path().stat().st_dev:
        pytest.skip("one file system")
    Path(".dvc/config").write_text(f"[cache]\n    dir = {other}\n")
    free = {other.stat().st_dev: 10 * GB, Path().stat().st_dev: 20 * GB}
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: shutil._ntuple_diskusage(20 * GB, 0, free[Path(path).stat().st_dev]),  # type: ignore[attr-defined]
    )
    write = Write(Path("models/merged"), 16 * GB, cached=16 * GB)
    disk.say_space("merge", write)
    assert capsys.readouterr().out == (
        "merge: will write 16.0 GB to models/merged; 20.0 GB are free; 16.0 GB to /dev/shm (DVC's copy); 10.0 GB are free\n"
    )
    (problem,) = space_problems("the merged model", write)
    assert "16.0 GB for /dev/shm (DVC's copy) are needed, 10.0 GB are free" in problem


@pytest.mark.usefixtures("project")
def test_a_file_system_that_does_not_report_its_size_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    check_space("merge", "the merged model", Write(Path("models/merged"), 16 * GB))
    assert capsys.readouterr().out == "merge: will write 16.0 GB to models/merged; an unknown number of GB are free\n"


@pytest.mark.usefixtures("project")
def test_an_earlier_model_that_dvc_deletes_first_counts_as_free_where_nothing_shares_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("base", "merged"):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_bytes(bytes(1000))
    write = merged_model(Path("base"), Path("merged"))
    assert write == Write(Path("merged"), 2000, cached=1000, replaced=1000)
    set_free_space(monkeypatch, 2000)
    assert not space_problems("merge", write)
    set_free_space(monkeypatch, 1999)
    assert space_problems("merge", write)
    has_links(monkeypatch, "reflink")
    assert space_problems("merge", write)
    set_free_space(monkeypatch, 2000)
    assert not space_problems("merge", write)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("config", "size"),
    [({"hidden_size": 64}, 64), ({"text_config": {"hidden_size": 32}}, 32), ({"n_embd": 16}, 16), ({}, 8192)],
)
def test_merge_needs_space_for_the_hidden_states_of_its_tokens(config: dict[str, Any], size: int) -> None:
    Path("base").mkdir()
    Path("base", "model.safetensors").write_bytes(bytes(1000))
    Path("base", "config.json").write_text(json.dumps(config))
    model = folder_size(Path("base"))
    assert merged_model(Path("base"), Path("merged"), tokens=100).size == model + 4 * 100 * size
    assert merged_model(Path("base"), Path("merged")).size == 2 * model, "of a small model"


def test_the_links_of_this_disk_are_tried_with_dvcs_own_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[cache]\n    type = hardlink\n")
    monkeypatch.chdir(tmp_path)
    assert disk.copying_cache(Path("models/merged")) is None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config"]


@pytest.fixture
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """The workspace, after whose stages nothing is left over."""
    monkeypatch.chdir(workspace.root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for cached in (command._stages, command._stale_stages, command._current_checkpoints):
        cached.cache_clear()
    yield workspace
    shutil.rmtree(".checkpoints", ignore_errors=True)


def launch(name: str, model: str = "") -> int:
    """Runs a stage with the command line of dvc.yaml, in this process."""
    return launcher.main(SPEC[name]["cmd"].replace("${item.model}", model).split()[3:])


def unreachable(*_: Any, **__: Any) -> None:
    raise AssertionError


def test_train_is_refused_before_the_model_is_loaded_if_merge_cannot_fit(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = folder_size(Path("models/base"))
    set_free_space(monkeypatch, 2 * size)
    assert not merge_problems(Path("models/base"))
    set_free_space(monkeypatch, 2 * size - 1)
    monkeypatch.setattr(train_module, "load_quantized", unreachable)
    assert launch("train") == 1
    assert "train: too little disk space for merge, which follows this training: " in capsys.readouterr().err


def test_train_is_refused_if_its_checkpoints_do_not_fit(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_module, "fit_memory", unreachable)
    set_free_space(monkeypatch, 2 * folder_size(Path("models/base")))
    adapter = Path("models/adapter/adapter_model.safetensors").stat().st_size
    assert adapter * 3 * (KEPT_CHECKPOINTS + 1) > 2 * folder_size(Path("models/base"))
    assert launch("train") == 1
    message = capsys.readouterr().err
    assert "train: too little disk space for the training: " in message
    assert "for .checkpoints and 1 MB for models/adapter are needed" in message


def test_the_checkpoints_of_an_8_bit_optimizer_are_half_as_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_free_space(monkeypatch, 100 * GB)
    monkeypatch.chdir(tmp_path)
    for optim, size in (("adamw_torch", "3.6 GB"), ("paged_adamw_8bit", "1.8 GB")):
        check_disk(10**8, optim=optim, checkpoints=Path(".checkpoints/train-0"), adapter=Path("models/adapter"))
        said = f"train: will write {size} to .checkpoints and 400 MB to models/adapter; 100.0 GB are free\n"
        assert capsys.readouterr().out == said


def test_merge_is_refused_before_a_model_is_loaded(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_free_space(monkeypatch, 1000)
    monkeypatch.setattr(merge_module, "load_quantized", unreachable)
    assert launch("merge") == 1
    assert "merge: too little disk space for the merged model: 1 MB for models/merged" in capsys.readouterr().err


# The command


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    for cached in (command._stages, command._stale_stages, command._current_checkpoints):
        cached.cache_clear()
    capsys.readouterr()
    assert launcher.main(["disk", *options]) == 0
    return capsys.readouterr().out


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def age(folder: Path, days: float) -> None:
    """Makes a folder as old as that, with all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (time.time() - 86400 * days,) * 2)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The checkpoint folders of a training and of two generations that were interrupted, by name."""
    monkeypatch.setattr(train_module, "_train_here", interrupt)
    monkeypatch.setattr(generate_module, "answer_share", interrupt)
    assert {launch("train"), launch("generate", "base"), launch("generate", "merged")} == {130}
    folders = {path.name.rpartition("-")[0]: path for path in Path(".checkpoints").glob("*-*") if path.is_dir()}
    assert sorted(folders) == ["generate-base", "generate-merged", "train"]
    for folder in folders.values():
        (folder / "kept").write_bytes(bytes(10))
    return folders


def test_checkpoints_that_the_next_run_resumes_from_are_named_and_stay(
    interrupted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = listed(capsys)
    for name, folder in interrupted.items():
        assert f"the next run of {name.partition('-')[0]} resumes from it" in line_of(text, str(folder))
    assert "--remove" not in text
    listed(capsys, "--remove")
    assert all((folder / "kept").exists() for folder in interrupted.values())


def test_checkpoints_of_other_parameters_are_removed_after_7_days(
    here: Workspace, interrupted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted["train"]
    for each in interrupted.values():
        age(each, 8)
    with here.edited("params.yaml"):
        params = here.params()
        params["train"]["seed"] += 1
        here.write(params)
        age(folder, 6.9)  # of an experiment with other parameters, which may have been killed
        text = listed(capsys)
        assert f"resumes from it; kept until it is 7 days old; to delete it now: rm -r {folder}" in line_of(
            text, str(folder)
        )
        assert "--remove" not in text
        listed(capsys, "--remove")
        assert folder.exists()
        age(folder, 7.1)
        text = listed(capsys)
        assert "only a run with those again resumes from it" in line_of(text, str(folder))
        assert "kept: stages before generate are out of date" in line_of(text, str(interrupted["generate-base"]))
        assert "disk: 1 MB can be deleted with: python -m stages disk --remove" in text
        text = listed(capsys, "--remove")
    assert f"disk: removed {folder}, 1 MB\n" in text
    assert [folder.exists() for folder in interrupted.values()].count(False) == 1
    assert not folder.exists()


@pytest.mark.usefixtures("interrupted")
def test_files_that_vanish_while_they_are_listed_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command._found
    monkeypatch.setattr(command, "_found", lambda *given: [*found(*given), Path("models/gone"), Path("gone/gone")])
    walk = os.walk
    monkeypatch.setattr(
        os,
        "walk",
        lambda *given, **named: ((top, folders, [*names, "gone"]) for top, folders, names in walk(*given, **named)),
    )
    text = listed(capsys)
    assert "gone" not in text
    assert text.count("resumes from it") == 3


@pytest.mark.usefixtures("here")
def test_a_folder_without_permission_is_one_line_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [Path("models/.fetch-a"), Path("models/.fetch-b"), Path("models/.fetch-c")]
    size, rmtree = command._size, shutil.rmtree

    def refuse(path: Path) -> None:
        if path == folders[denied]:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(command, "_size", lambda path: refuse(path) or size(path))
    monkeypatch.setattr(shutil, "rmtree", lambda path, *given, **named: refuse(path) or rmtree(path, *given, **named))
    for folder in folders:
        folder.mkdir()
    try:
        denied = 0
        text = listed(capsys)
        assert f"disk: {folders[0]}: you may not read it; left out\n" in text
        assert "no parameter names it any more" in line_of(text, str(folders[1]))
        monkeypatch.setattr(command, "_size", size)
        text = listed(capsys, "--remove")
        assert f"disk: {folders[0]}: cannot be deleted: Permission denied; delete it yourself\n" in text
        assert [folder.exists() for folder in folders] == [True, False, False]
    finally:
        rmtree(folders[0])


@pytest.mark.usefixtures("here")
def test_listing_makes_no_lock_and_needs_no_right_to_make_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(".checkpoints/train-0123456789abcdef")
    folder.mkdir(parents=True)
    listed(capsys)
    assert [*folder.parent.iterdir()] == [folder]

    def refuse(_: FileLock) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "less than 2 hours old; kept: you may not write there" in line_of(listed(capsys), str(folder))


def test_nothing_is_removed_that_a_process_uses(
    here: Workspace, interrupted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(".checkpoints/train-0123456789abcdef")
    other.mkdir()
    other.with_suffix(".pid").write_text("1234")
    with FileLock(other.with_suffix(".lock")):
        assert "process 1234 uses it" in line_of(listed(capsys), str(other))
        age(other, 8)
        listed(capsys, "--remove")
        assert other.exists()
    listed(capsys, "--remove")
    assert not other.exists()


def test_nothing_outside_the_project_is_removed(here: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    Path(".checkpoints").mkdir(exist_ok=True)
    link = Path(".checkpoints/train-0123456789abcdef")
    link.symlink_to(tmp_path / "elsewhere")
    os.utime(link, (0, 0), follow_symlinks=False)
    assert "outside the project, so delete it yourself" in line_of(listed(capsys), str(link))
    listed(capsys, "--remove")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere").exists()


def test_downloads_that_no_parameter_names_are_removed(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    commit = "a" * 40
    folders = [Path(f"models/.fetch-{commit}"), Path("models/.fetch-demo==1.0"), Path(f"data/.fetch-own--er-{commit}")]
    for folder in folders:
        folder.mkdir()
        (folder / "lock").touch()
    try:
        with here.edited("params.yaml"):
            params = here.params()
            params["fetch"] |= {"source": "hub", "model_name_or_path": "owner/model", "revision": commit}
            here.write(params)
            text = listed(capsys)
            assert "the next run of fetch resumes from it" in line_of(text, str(folders[0]))
            assert all("no parameter names it any more" in line_of(text, str(folder)) for folder in folders[1:])
            with FileLock(f"{folders[1]}.lock"), FileLock(folders[2] / "lock"):
                assert all("a process uses it" in line_of(listed(capsys), str(folder)) for folder in folders[1:])
                listed(capsys, "--remove")
                assert all(folder.exists() for folder in folders)
            listed(capsys, "--remove")
            assert [folder.exists() for folder in folders] == [True, False, False]
            params["fetch_data"]["datasets"] = [{"path": "own/er", "revision": commit, "name": "", "split": ""}]
            here.write(params)
            folders[2].mkdir()
            listed(capsys, "--remove")
            assert "it can be deleted" in line_of(listed(capsys), str(folders[2]))
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("writing", [fresh_folder, fresh_file])
def test_the_output_of_a_killed_run_is_removed_and_that_of_a_live_one_is_not(
    here: Workspace, capsys: pytest.CaptureFixture[str], writing: Callable[[Path], Any]
) -> None:
    output, name = Path("reports/machine/train.json"), "reports/machine/train.json.partial"
    with writing(output) as partial:
        if writing is fresh_file:
            partial.touch()
        assert "a process writes in reports/machine" in line_of(listed(capsys), name)
        listed(capsys, "--remove")
        assert partial.exists()
    if output.is_dir():
        output.rmdir()
    else:
        output.unlink()
    for left in ("models/merged.partial", name):
        Path(left).mkdir()
        assert "left by a run that was killed" in line_of(listed(capsys), left)
        assert f"disk: removed {left}, 0 MB\n" in listed(capsys, "--remove")
        assert not Path(left).exists()


@pytest.mark.usefixtures("here")
def test_other_files_of_such_a_name_are_not_removed(capsys: pytest.CaptureFixture[str]) -> None:
    own = [Path("data/my.jsonl.partial"), Path("data/raw.partial"), Path("reports.partial")]
    for path in own:
        path.touch()
    try:
        assert ".partial" not in listed(capsys)
        listed(capsys, "--remove")
        assert all(path.exists() for path in own)
    finally:
        for path in own:
            path.unlink(missing_ok=True)


def test_the_cache_that_no_output_uses_is_named_with_its_command(
    here: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "dvc gc" not in line_of(listed(capsys), ".dvc/cache")
    unused = Path(".dvc/cache/files/md5/00/unused")
    unused.parent.mkdir(exist_ok=True)
    unused.write_bytes(bytes(2_000_000))
    try:
        assert "2 MB belong to nothing in dvc.lock and *.dvc files: dvc gc -w deletes them" in line_of(
            listed(capsys), ".dvc/cache"
        )
        Path("data/own.jsonl.dvc").write_text("outs:\n- md5: 00unused\n  size: 2000000\n  path: own.jsonl\n")
        assert "dvc gc" not in line_of(listed(capsys), ".dvc/cache")
    finally:
        unused.unlink()
        Path("data/own.jsonl.dvc").unlink(missing_ok=True)


@pytest.mark.parametrize("lock", ["", "schema: '2.0'\nstages:\n  fetch:\n    cmd: [", "stages:\n  fetch:\n"])
def test_a_lock_file_that_dvc_has_not_written_whole_counts_as_none(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lock: str
) -> None:
    monkeypatch.setattr(command, "LISTED_FROM", 1)
    with here.edited("dvc.lock"):
        Path("dvc.lock").write_text(lock)
        assert "belong to nothing in dvc.lock" in line_of(listed(capsys), ".dvc/cache")


@pytest.mark.usefixtures("here")
def test_a_cache_that_is_not_there_is_not_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "cache_folder", lambda: (Path("no/cache"), ["copy"]))
    assert "no/cache" not in listed(capsys)


def test_a_copy_of_the_project_that_dvc_left_is_named(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(".dvc/tmp/exps/tmp1")
    copy.mkdir(parents=True)
    (copy / "dvc.yaml").touch()
    assert f"if no experiment is running: rm -r {copy}" in line_of(listed(capsys), str(copy))
    shutil.rmtree(copy)


def test_disk_takes_one_option(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["disk", "--all"]) == 2
    assert capsys.readouterr().err == "disk: takes --remove or no option, found '--all'\n"


def test_no_stage_imports_the_command() -> None:
    for file in (PROJECT / "stages").rglob("*.py"):
        assert "import stages.commands" not in file.read_text(encoding="utf-8")
        assert "from stages.commands" not in file.read_text(encoding="utf-8")
