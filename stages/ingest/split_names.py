"""Which split a file, a folder or a list belongs to by its name."""

import re
from pathlib import PurePosixPath

NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names that `datasets` knows (datasets/data_files.py), without `eval`, which stands for validation or for test."""
PARTS = re.compile(r"[^-._ 0-9]+")
"""The parts of a name, which `datasets` separates in the same way."""


def split_named(name: str) -> str:
    """The split that has this name; "" if none has."""
    return NAMES.get(name.lower(), "")


def split_in_name(name: str) -> str:
    """The split that is a part of a name, as in data_test.json or test-00000-of-00001.parquet.

    It is "" if there is none, or more than one.
    """
    splits = {split for part in PARTS.findall(name) if (split := split_named(part))}
    return splits.pop() if len(splits) == 1 else ""


def split_of_path(path: PurePosixPath) -> str:
    """The split of a file: of the outermost folder that is named like a split, or else in the name of the file."""
    folders = (split_named(folder) for folder in path.parts[:-1])
    return next(filter(None, folders), "") or split_in_name(path.name.removesuffix(".gz").rpartition(".")[0])
