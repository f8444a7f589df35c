"""The files of one commit of a data set: found by `datasets`, downloaded with the hub's checksums, and kept."""

import json
import os
import posixpath
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.core.disk import Write, say_space, space_problems
from stages.core.jsonl import read_json, write_json
from stages.core.output import fresh_file, sha256_of
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import progress

READABLE = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".txt", ".txt.gz")
"""The files that ingest reads; a test compares this with the list in stages/ingest/raw_files.py."""
ATTEMPTS = 3
REFUSED = (401, 403)
"""HTTP statuses that another attempt does not change."""
WAIT_S = 5.0
"""Seconds before the second attempt at a download, twice as many before the third."""

Splits = dict[str, dict[str, Path]]
"""Split to the files that belong to it, by their name within it."""


def get_splits(path: str, commit: str, name: str, *, split: str, parent: Path) -> Splits:
    """The files of a data set's configuration, or of one split of it, all of them complete on this disk.

    They are in `parent`/.fetch-<owner>--<name>-<commit>. What is there already, and has the recorded hash, is not asked for
    again. Raises Problem if the data set cannot be found, cannot be read by ingest, or cannot be downloaded completely.
    """
    folder = parent / f".fetch-{path.replace('/', '--')}-{commit}"
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            listed = folder / "splits" / f"{name or '(default)'}{split and f' {split}'}.json"
            if not _check_kept(folder / "files", listed):
                splits = _download(path, commit, name, split=split, folder=folder)
                with fresh_file(listed) as file:
                    write_json(file, splits)
            return _named({split: list(files) for split, files in read_json(listed).items()}, folder / "files")
    except Timeout:
        raise Problem(f"{folder}: another fetch_data uses this download folder; wait until it ends, or stop it") from None


def link_file(source: Path, target: Path) -> None:
    """Gives a file a second name, which takes no disk space; copies where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_kept(folder: Path, listed: Path) -> bool:
    """Whether all files of a list are in the folder with the hashes that it states. Removes those with another."""
    if not listed.exists():
        return False
    complete = True
    for files in read_json(listed).values():
        for name, sha256 in files.items():
            file = folder / name
            if not file.is_file() or sha256_of(file) != sha256:
                file.unlink(missing_ok=True)
                complete = False
    return complete


def _named(splits: Mapping[str, list[str]], folder: Path) -> Splits:
    """The files by their path below the folder that holds all files of their split."""
    named = {}
    for split, files in splits.items():
        above = posixpath.commonpath([posixpath.dirname(file) for file in files])
        named[split] = {posixpath.relpath(file, above or "."): folder / file for file in files}
    return named


def _download(path: str, commit: str, name: str, *, split: str, folder: Path) -> dict[str, dict[str, str]]:
    """Downloads what is missing. Returns split to file to sha256."""
    cache = folder.with_name(".fetch-cache").resolve()
    _keep_libraries_in(cache)
    from huggingface_hub import logging
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.set_verbosity_error()  # it warns of a card without metadata
    with _explained_errors(path, commit, kept_in=folder):
        sizes = _retried(path, lambda: _list_files(path, commit))
        splits = _retried(path, lambda: _find_splits(path, commit, name, cache=cache))
    if split and split not in splits:
        raise Problem(bad_param("fetch_data.datasets", f"{path} has no split {split!r}; it has {', '.join(splits)}"))
    splits = {split: splits[split]} if split else splits
    files = sorted({file for split in splits.values() for file in split})
    _check(path, files, sizes, folder=folder)
    total = sum(sizes.get(file, 0) for file in files)
    print(f"fetch_data: downloading {path}: {len(files)} files, {total / 1e6:,.0f} MB", flush=True)
    with _explained_errors(path, commit, kept_in=folder):
        _retried(path, lambda: _get_files(path, commit, files, folder=folder / "files"))
    shown = progress(files, "hash", total=len(files), unit="files")
    hashes = {file: sha256_of(folder / "files" / file) for file in shown}
    return {split: {file: hashes[file] for file in names} for split, names in splits.items()}


def _keep_libraries_in(cache: Path) -> None:
    """Keeps the libraries' own caches out of the home folder. They read these variables when they are imported."""
    os.environ |= {
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_XET_CACHE": str(cache / "xet"),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }


def _token() -> str | bool:
    """The token of the environment; False keeps the libraries from looking for another one.

    Raises Problem, without the token, if it cannot be sent: the libraries' own errors would show it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise Problem("the variable HF_TOKEN holds characters that no token has; set it again")
    return token or False


def _list_files(path: str, commit: str) -> dict[str, int]:
    """Path → bytes of every file of the commit."""
    from huggingface_hub import HfApi

    info = HfApi(token=_token()).dataset_info(path, revision=commit, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    script = f"{path.partition('/')[2]}.py"
    if script in sizes:
        raise Problem(
            f"{path}: made by a script, {script}, which `datasets` does not run any more. The hub may have converted it: "
            f"write the commit of its branch refs/convert/parquet"
        )
    return sizes


def _find_splits(path: str, commit: str, name: str, *, cache: Path) -> dict[str, list[str]]:
    """Split to files, as `datasets` finds them by the data set's card and the names of its files."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(
            f"hf://datasets/{path}",  # never a local folder of this name
            name or None,
            revision=commit,
            token=_token(),
            cache_dir=str(cache / "datasets"),
        )
    except _network_errors():  # some of them are of the two kinds below, too
        raise
    except FileNotFoundError as error:
        if "LocalEntryNotFoundError" in str(error):  # what `datasets` makes of an answer that is no file
            raise ConnectionError(str(error).partition("LocalEntryNotFoundError: ")[2]) from None
        raise Problem(f"{path}: `datasets` finds no data in it: {_one_line(error)}") from None
    except ValueError as error:
        if "onfig" in str(error):  # which lists the configurations
            raise Problem(bad_param("fetch_data.datasets", f"name {name!r} of {path}: {_one_line(error)}")) from None
        raise Problem(f"{path}: `datasets` cannot read it: {_one_line(error)}") from None
    start = f"hf://datasets/{path}@{commit}/"
    found = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    elsewhere = [file for files in found.values() for file in files if not file.startswith(start)]
    if elsewhere:
        raise Problem(f"{path}: its data is not in the repository, but at {elsewhere[0]}; put the files into data/raw")
    return {split: [file.removeprefix(start) for file in files] for split, files in found.items()}


def _check(path: str, files: list[str], sizes: Mapping[str, int], *, folder: Path) -> None:
    """Raises Problem with what would make the download useless."""
    problems = []
    unreadable = [file for file in files if not file.endswith(READABLE)]
    if unreadable:
        problems.append(
            f"{path}: {unreadable[0]}{f' and {len(unreadable) - 1} more' if unreadable[1:] else ''}: ingest reads "
            f"{', '.join(READABLE)}. The hub may have converted it: write the commit of its branch refs/convert/parquet, or "
            "convert the files and put them into data/raw"
        )
    total = sum(sizes.get(file, 0) for file in files)
    rest = total - sum(file.stat().st_size for file in (folder / "files").rglob("*") if file.is_file())
    # DVC first copies the output into its cache, and then replaces it by a copy, which is no hard link to the download.
    download = Write(folder.parent, rest, cached=2 * total)
    say_space("fetch_data", download)
    problems += space_problems(f"downloading {path}", download)
    if problems:
        raise Problem(*problems)


def _get_files(path: str, commit: str, files: list[str], *, folder: Path) -> None:
    """Downloads what is missing of these files, and compares them with the hub's checksums. Removes a file that differs."""
    from huggingface_hub import HfApi, snapshot_download

    where = {"repo_type": "dataset", "revision": commit, "local_dir": folder, "token": _token()}
    snapshot_download(path, allow_patterns=files, **where)
    verified = HfApi().verify_repo_checksums(path, **where)
    differing = [mismatch["path"] for mismatch in verified.mismatches if mismatch["path"] in files]
    for file in differing:
        (folder / file).unlink()
    missing = [file for file in files if not (folder / file).is_file()]
    if differing:
        raise Problem(
            f"{path}: {', '.join(differing)}: the hub's checksum does not match; removed. Run dvc repro again to download "
            "what was removed; if it happens twice, a proxy or mirror changes the files"
        )
    if missing:
        raise Problem(f"{path}: {', '.join(missing)}: not downloaded; run dvc repro again")


def _network_errors() -> tuple[type[Exception], ...]:
    import httpx2
    from huggingface_hub import errors

    return (
        errors.HfHubHTTPError,
        errors.FileMetadataError,
        errors.LocalEntryNotFoundError,
        errors.XetDownloadError,
        httpx2.HTTPError,
        json.JSONDecodeError,  # the page of a proxy
        ConnectionError,
        TimeoutError,
    )


def _retried(path: str, attempt: Any) -> Any:
    """What `attempt` returns, after up to ATTEMPTS tries where the network fails."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    for number in range(1, ATTEMPTS):
        try:
            return attempt()
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except _network_errors() as error:
            if _status(error) in REFUSED:
                raise
            wait = WAIT_S * number
            print(f"fetch_data: {path}: {_one_line(error)}; again in {wait:g} s ({number + 1} of {ATTEMPTS})", flush=True)
            time.sleep(wait)
    return attempt()


@contextmanager
def _explained_errors(path: str, commit: str, *, kept_in: Path) -> Iterator[None]:
    """Turns what the libraries raise into a Problem that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise Problem(f"{path}: gated; accept its terms on the hub, and put a token into the variable HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise Problem(
            f"{path}: the hub has no such data set, or it is private; then put a token into the variable HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise Problem(bad_param("fetch_data.datasets", f"{path} has no commit {commit} on the hub")) from None
    except _network_errors() as error:
        if _status(error) in REFUSED:
            raise Problem(
                f"{path}: the hub refuses access: {_one_line(error)}. Put the token of an account that may read it into the "
                "variable HF_TOKEN, or correct the one that is there"
            ) from None
        raise Problem(
            f"{path}: the download was interrupted: {_one_line(error)}. What was downloaded is kept in {kept_in}; run dvc "
            "repro again to resume"
        ) from None


def _status(error: Exception) -> int | None:
    """The HTTP status of the hub's answer; None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    token = os.environ.get("HF_TOKEN", "").strip()  # an answer may repeat it
    return (text.replace(token, "***") if token else text)[:300]
