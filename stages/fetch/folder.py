"""The source `folder`: a model on this machine."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stages.core.disk import Write, say_space, space_problems
from stages.core.output import sha256_of
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.fetch.checks import find_problems, select_files
from stages.fetch.files import ModelFiles, total_size


@contextmanager
def model_in_folder(source: Path, revision: str, *, trust_remote_code: bool, parent: Path) -> Iterator[ModelFiles]:
    """Checks a local folder and yields its files, which will be copied.

    Args:
        source: The folder.
        revision: Its hash, see `_hash_folder`. It depends on trust_remote_code, which decides about *.py: the other
            checks come first, so that the hash in the message is the final one.
        trust_remote_code: Whether *.py are taken.
        parent: The folder that will hold the copy.

    Raises Problem with everything that is wrong, before anything is copied.
    """
    if not source.is_dir():
        raise Problem(bad_param("fetch.model_name_or_path", f"{source}: no such folder"))
    listed = [file.name for file in source.iterdir() if file.is_file()]
    names = select_files(listed, trust_remote_code=trust_remote_code)
    problems = find_problems(str(source), listed, folder=source, trust_remote_code=trust_remote_code)
    size = total_size(source, names)
    copy = Write(parent, size, cached=size)
    say_space("fetch", copy)
    problems += space_problems(f"copying {source}", copy)
    if problems:
        raise Problem(*problems)
    found = _hash_folder(source, names)
    if found != revision:
        raise Problem(
            bad_param(
                "fetch.revision",
                f"is {revision!r}, but the hash of {source} is {found}; if this is the model that you want, set "
                "fetch.revision to that hash",
            )
        )
    yield ModelFiles(source, names, download=None)


def _hash_folder(folder: Path, names: Sequence[str]) -> str:
    """The sha256 of the lines "<sha256>  <name>", one for each file, as sha256sum prints them."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in progress(names, "hash", total=len(names), unit="files")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
