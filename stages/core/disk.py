"""Disk space: what a stage will write and what is free, said before a long stage; what does not fit is refused.

A quota is not seen here. A stage that meets one ends with a message of its own (`find_remedy` in stages/__main__.py).
"""

import math
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stages.core.jsonl import read_json
from stages.core.params import read_stage
from stages.core.problem import Problem

SAID_FROM = 10**9
"""Bytes from which a line says what will be written."""
PARITY_TOKENS = 64 * 2048
"""Tokens whose hidden states `merge` keeps while it compares models, if the rows are not known: 64 rows of 2,048 labels."""
WIDEST = 8192
"""The hidden size, if the model's config does not name it; that of a Llama with 70 B parameters."""
UNKNOWN = 1 << 62
"""Free bytes of a file system that does not report its size."""
LINK_TYPES = "hardlink,symlink"
"""The value of DVC's cache.type with which it copies nothing, on any local file system."""


class Write(NamedTuple):
    """What a stage writes to one place."""

    path: Path
    size: int
    """Bytes, without those that are there already."""
    cached: int = 0
    """Bytes that DVC puts into its cache when the stage has ended."""
    replaced: int = 0
    """Bytes of an earlier output, which DVC deletes before the stage. Without links its blocks are free then."""


class _Place(NamedTuple):
    """A path on a file system, and what is written to it."""

    path: Path
    size: int
    note: str = ""
    freed: int = 0


class _FileSystem(NamedTuple):
    """What is written to one file system, and what is free there."""

    places: list[_Place]
    needed: int
    free: int

    def list_places(self, word: str) -> str:
        """`16.1 GB to models/merged and 16.1 GB to .dvc/cache (DVC's copy)`, with `word` for "to"."""
        return " and ".join(f"{size_text(each.size)} {word} {_shown(each.path)}{each.note}" for each in self.places)


def check_space(stage: str, what: str, *writes: Write) -> None:
    """Says what a stage will write and what is free, from 1 GB on. Raises Problem, with the figures, if it does not fit.

    Args:
        stage: The stage's name, in front of the line.
        what: What the space is for, in the message: "downloading owner/name".
        writes: What is written.
    """
    say_space(stage, *writes)
    problems = space_problems(what, *writes)
    if problems:
        raise Problem(*problems)


def say_space(stage: str, *writes: Write) -> None:
    """Prints what a stage will write and what is free, if it is 1 GB or more."""
    systems, _ = _by_file_system(writes)
    if sum(each.needed for each in systems) >= SAID_FROM:
        parts = [f"{each.list_places('to')}; {_free_text(each.free)} are free" for each in systems]
        print(f"{stage}: will write {'; '.join(parts)}", flush=True)


def space_problems(what: str, *writes: Write) -> list[str]:
    """One message for each file system that has too little space; `what` as in `check_space`."""
    systems, copied = _by_file_system(writes)
    remedy = "free some space (python -m stages disk names what can be deleted) or use a larger disk"
    if copied:
        remedy += f"; or set dvc config cache.type {LINK_TYPES}: DVC then makes no copy (the README says what it risks)"
    return [
        f"too little disk space for {what}: {each.list_places('for')} are needed, {_free_text(each.free)} are free; {remedy}"
        for each in systems
        if each.needed > each.free
    ]


def merged_model(base: Path, merged: Path, *, tokens: int | None = None) -> Write:
    """What `merge` writes: a model as large as its base, and the hidden states of some tokens, in 4 bytes per number.

    Args:
        base: The base model's folder.
        merged: The merged model's folder.
        tokens: How many; None if it is not known yet.
    """
    size = sum(file.stat().st_size for file in base.iterdir())  # symlinks too, with cache.type symlink
    hidden = 4 * (PARITY_TOKENS if tokens is None else tokens) * _hidden_size(base)
    hidden = min(size, hidden) if tokens is None else hidden
    return Write(merged, size + hidden, cached=size, replaced=folder_size(merged))


def _hidden_size(base: Path) -> int:
    """From config.json, in which the language model of a wrapper has a config of its own."""
    path = base / "config.json"
    config = read_json(path) if path.exists() else {}
    parts = [config, config.get("text_config") or {}]
    sizes = [part[key] for part in parts for key in ("hidden_size", "n_embd", "d_model") if isinstance(part.get(key), int)]
    return sizes[0] if sizes else WIDEST


def merge_problems(base: Path) -> list[str]:
    """One message if the disk has too little space for `merge`, which follows `train`; none otherwise."""
    first = read_stage("merge", Path())["outs"][0]
    merged = Path(next(iter(first)) if isinstance(first, dict) else first)
    return space_problems("merge, which follows this training", merged_model(base, merged))


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, without those that are symlinks; 0 if there is none."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a training that runs removes its old checkpoints
                status = (Path(path) / name).lstat()
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def size_text(size: float) -> str:
    """A number of bytes to read: "16.1 GB"; below 1 GB "1 MB", rounded up."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{math.ceil(size / 1e6):,} MB"


def free_space(path: Path) -> int:
    """Bytes that are free on the file system of a path, which need not exist; UNKNOWN if it does not say."""
    usage = shutil.disk_usage(_existing(path))
    return usage.free if usage.total else UNKNOWN  # some FUSE mounts answer with zeros


def cache_folder() -> tuple[Path, list[str]]:
    """DVC's cache of this project, and its cache.type: the kinds of links that it tries, in order."""
    from dvc.config import Config

    settings = Config(".dvc")["cache"]
    return Path(settings.get("dir") or ".dvc/cache"), list(settings.get("type") or ("reflink", "copy"))


def copying_cache(output: Path) -> Path | None:
    """DVC's cache folder if DVC copies an output into it; None if it links it, or if there is no DVC.

    DVC's own test makes two small files and links them, as DVC does after the stage: it tries reflinks always, and hard
    links if cache.type begins with them. With symlinks it copies the output first, and deletes it afterwards.
    """
    if not Path(".dvc").is_dir():
        return None
    try:
        from dvc.fs import generic, localfs
    except ImportError:  # DVC is installed elsewhere
        return None
    folder, kinds = cache_folder()
    tried = ["reflink", "hardlink"] if kinds[0] == "hardlink" else ["reflink"]
    objects = (folder / "files" / "md5").absolute()
    place = _existing(output.parent) / output.name  # DVC makes the file beside it, and would make folders for that
    return None if generic.test_links(tried, localfs, str(objects), localfs, str(place)) else folder


def _by_file_system(writes: Sequence[Write]) -> tuple[list[_FileSystem], bool]:
    """What is written to each file system, and whether DVC copies an output."""
    devices: dict[int, list[_Place]] = {}
    copied = False
    for write in writes:
        cache = copying_cache(write.path) if write.cached and "DVC_ROOT" in os.environ else None  # DVC started this stage
        places = [_Place(write.path, write.size, freed=write.replaced if cache else 0)]
        if cache:
            copied = True
            places.append(_Place(cache, write.cached, " (DVC's copy)"))
        for place in places:
            devices.setdefault(_existing(place.path).stat().st_dev, []).append(place)
    systems = [
        _FileSystem(
            places,
            needed=sum(place.size for place in places),
            free=free_space(places[0].path) + sum(place.freed for place in places),
        )
        for places in devices.values()
    ]
    return systems, copied


def _shown(path: Path) -> Path:
    """A path below the current folder without what is above it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _free_text(size: int) -> str:
    if size >= UNKNOWN:
        return "an unknown number of GB"
    return size_text(size) if size >= 1e9 else f"{size // 10**6:,} MB"


def _existing(path: Path) -> Path:
    """The path, or the folder nearest to it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
