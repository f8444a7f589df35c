"""The source `folder`: a model on this machine."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stages.core.disk import Write, say_space, space_problems
from stages.core.output import sha256_of
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.fetch.checks import find_problems, select_files
from stages.fetch.files import ModelFiles
from stages.fetch.prepare import prepare, read_headers
from stages.fetch.remote_code import find_code

DVC_CACHE_FILE = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")
"""Where the files of another project's output are, with DVC's cache.type symlink."""


@contextmanager
def model_in_folder(source: Path, revision: str, *, trust_remote_code: bool, parent: Path) -> Iterator[ModelFiles]:
    """Checks a local folder and yields its files, which will be copied.

    Args:
        source: The folder.
        revision: Its hash, see `_hash_folder`. It depends on trust_remote_code, which decides about *.py where they are
            needed: the other checks come first, so that the hash in the message is the final one.
        trust_remote_code: Whether *.py are taken, if they are needed.
        parent: The folder that will hold the copy.

    Raises Problem with everything that is wrong, before anything is copied.
    """
    if not source.is_dir():
        raise Problem(bad_param("fetch.model_name_or_path", f"{source}: no such folder"))
    listed = [file.name for file in source.iterdir() if file.is_file()]
    code = find_code(listed, folder=source)
    names = select_files(listed, code=code.needed and trust_remote_code)
    headers = read_headers(source, names)
    problems = _link_problems(source, names)
    problems += find_problems(str(source), listed, folder=source, trust_remote_code=trust_remote_code, headers=headers)
    model = prepare(source, names, download=None, trust_remote_code=trust_remote_code)
    copy = Write(parent, model.output_size, cached=model.output_size)
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
    yield model


def _link_problems(source: Path, names: Sequence[str]) -> list[str]:
    """A message for each symlink that leads nowhere, or out of the folder: that is how a model of others would take a file
    of yours into the outputs, and to wherever they are pushed.

    The hub's own cache is made of such links, as snapshots/<commit>/<file> → blobs/<hash>, and DVC's may be.
    """
    problems = []
    root = source.resolve()
    roots = [root, *([(root.parents[1] / "blobs").resolve()] if root.parent.name == "snapshots" else [])]
    dangling = [file.name for file in source.iterdir() if file.is_symlink() and not file.exists()]
    for name in select_files(dangling, code=False):
        problems.append(f"{source}: {name}: is a symlink to {(source / name).readlink()}, which does not exist")
    for name in names:
        target = (source / name).resolve()
        if not any(target.is_relative_to(each) for each in roots) and not DVC_CACHE_FILE.fullmatch(str(target)):
            problems.append(
                f"{source}: {name}: is a symlink to {target}, outside the folder; if that file belongs to the model, put it "
                "in the place of the link"
            )
    return problems


def _hash_folder(folder: Path, names: Sequence[str]) -> str:
    """The sha256 of the lines "<sha256>  <name>", one for each file, as sha256sum prints them."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in progress(names, "hash", total=len(names), unit="files")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
