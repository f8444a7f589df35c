"""The source `hub`: one commit of a Hugging Face repository."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as http
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
    XetDownloadError,
)
from huggingface_hub.utils import disable_progress_bars

from stages.core.disk import Write, say_space, space_problems
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import ProgressBar
from stages.fetch.checks import find_problems, is_weights, select_files, select_small_files
from stages.fetch.files import ModelFiles, open_download
from stages.fetch.prepare import plan_for, prepare, read_headers
from stages.fetch.quantization import find_quantization
from stages.fetch.quantized_tensors import Headers
from stages.fetch.remote_code import find_code, read_object
from stages.fetch.safetensors_files import TensorInfo

NETWORK_ERRORS = (
    HfHubHTTPError,
    FileMetadataError,
    LocalEntryNotFoundError,
    XetDownloadError,
    http.HTTPError,
    ConnectionError,
    TimeoutError,
)
HEADER_REQUESTS = 8
"""Threads that ask for the headers of weights."""


@contextmanager
def model_on_hub(repository: str, commit: str, *, trust_remote_code: bool, parent: Path) -> Iterator[ModelFiles]:
    """Downloads the needed files into `parent`/.fetch-<commit>, compares them with the hub's checksums, and yields them.

    The list of files and config.json are checked before any weights are requested. The folder is kept when anything
    fails: the next run resumes the download there. The hub's own cache is not used, so there is no second copy.

    Raises Problem with everything that is wrong with the model, or what went wrong with the download.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise Problem(
            bad_param(
                "fetch.revision",
                f"{commit!r} is not a full commit hash. A branch or a short hash may point to another model later; write "
                "the 40 hex digits that the hub shows under the model's history",
            )
        )
    with open_download(parent / f".fetch-{commit}") as download:
        with _explained_errors(repository, commit, kept_in=download):
            names = _check_then_download(repository, commit, trust_remote_code=trust_remote_code, folder=download)
        yield prepare(download, names, download=download, trust_remote_code=trust_remote_code)


def _check_then_download(repository: str, commit: str, *, trust_remote_code: bool, folder: Path) -> list[str]:
    """Downloads the model into `folder` if nothing is wrong with its file list and its config.json. Returns its files."""
    sizes = _list_files(repository, commit)
    # A folder of its own: checksums are computed for all files of a folder, and the other one may hold 15 GB already.
    small = folder / "checked-first"
    names = select_files(sizes, code=False)
    _download(repository, commit, names=select_small_files(names), folder=small, show_progress=False)
    names = select_files(sizes, code=trust_remote_code and find_code(sizes, folder=small).needed)
    total = sum(sizes[name] for name in names)
    downloaded = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    headers: Headers = {}
    quantization = find_quantization(read_object(small / "config.json"))
    if quantization and quantization.supported:
        weights = {name: sizes[name] for name in names if is_weights(name)}
        headers = _read_headers(repository, commit, weights=weights, folder=folder)
    plan = plan_for(small, headers)
    problems = find_problems(
        repository, sizes, folder=small, trust_remote_code=trust_remote_code, headers=plan.headers if plan else None
    )
    dequantized = plan is not None and bool(plan.weights)
    writes = [Write(folder.parent, total - downloaded, cached=0 if dequantized else total)]
    if plan and dequantized:  # the download is kept until the stage has succeeded
        size = total + plan.size - plan.stored_size
        writes.append(Write(folder.parent, size, cached=size))
    say_space("fetch", *writes)
    problems += space_problems(f"downloading {repository}{' and dequantizing it' if dequantized else ''}", *writes)
    if problems:
        raise Problem(*problems)
    print(f"fetch: downloading {repository}: {len(names)} files, {total / 1e6:,.0f} MB", flush=True)
    _download(repository, commit, names=names, folder=folder, show_progress=sys.stderr.isatty())
    problems = find_problems(
        repository, names, folder=folder, trust_remote_code=trust_remote_code, headers=read_headers(folder, names)
    )
    if problems:
        raise Problem(*problems)
    return names


def _read_headers(repository: str, commit: str, *, weights: Mapping[str, int], folder: Path) -> Headers:
    """The headers of the weights, by a request for the first bytes of each file that is not in `folder` yet.

    None if one is not safetensors, which is said when it is downloaded.
    """

    def read(name: str) -> dict[str, TensorInfo]:
        if (folder / name).is_file() and (folder / name).stat().st_size == weights[name]:
            local = read_headers(folder, [name])
            if local:  # a damaged file is removed by `_download`, which compares checksums
                return dict(local[name])
        found = HfApi().parse_safetensors_file_metadata(repository, name, revision=commit)
        return {each: TensorInfo(t.dtype, tuple(t.shape), *t.data_offsets) for each, t in found.tensors.items()}

    try:
        with ThreadPoolExecutor(HEADER_REQUESTS) as pool:
            return dict(zip(weights, pool.map(read, weights), strict=True))
    except SafetensorsParsingError:
        return {}


def _list_files(repository: str, commit: str) -> dict[str, int]:
    """Path → bytes of every file of the commit."""
    info = HfApi().model_info(repository, revision=commit, files_metadata=True)
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def _download(repository: str, commit: str, *, names: Sequence[str], folder: Path, show_progress: bool) -> None:
    """Downloads what is missing of these files, and compares all of `folder` with the hub's checksums.

    A file that differs is removed. Raises Problem if there is one.
    """
    if not names:
        return
    disable_progress_bars()  # the hub's own
    bar = _DownloadBar if show_progress else None
    snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=list(names), tqdm_class=bar)
    verified = HfApi().verify_repo_checksums(repository, revision=commit, local_dir=folder)
    differing = [mismatch["path"] for mismatch in verified.mismatches if mismatch["path"] in names]
    missing = [name for name in verified.missing_paths if name in names]
    for name in differing:
        (folder / name).unlink()
    problems = []
    if differing:
        problems.append(
            f"{repository}: {', '.join(differing)}: the hub's checksum does not match; removed. Run dvc repro again to "
            "download what was removed; if it happens twice, a proxy or mirror changes the files"
        )
    if missing:
        problems.append(f"{repository}: {', '.join(missing)}: not downloaded; run dvc repro again")
    if problems:
        raise Problem(*problems)


class _DownloadBar(ProgressBar):
    """The bar for snapshot_download, which names a unit only where it counts bytes."""

    def __init__(self, desc: str, total: int | None = None, unit: str = "files", **settings: Any) -> None:
        super().__init__(desc, total, unit, **settings)


@contextmanager
def _explained_errors(repository: str, commit: str, *, kept_in: Path) -> Iterator[None]:
    """Turns what huggingface_hub raises into a Problem that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise Problem(bad_param("fetch.model_name_or_path", f"not owner/name: {error}")) from None
    except GatedRepoError:
        raise Problem(f"{repository}: gated; accept its terms on the hub, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise Problem(f"{repository}: the hub has no such model, or it is private; then run: hf auth login") from None
    except RevisionNotFoundError:
        raise Problem(bad_param("fetch.revision", f"{repository} has no commit {commit} on the hub")) from None
    except NETWORK_ERRORS as error:
        raise Problem(
            f"{repository}: the download was interrupted: {' '.join(str(error).split())[:300]}. What was downloaded is kept "
            f"in {kept_in}; run dvc repro again to resume"
        ) from None
