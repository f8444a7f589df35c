"""Gets data sets of a Hugging Face hub, each at one pinned commit; ingest reads them beside data/raw."""

import json
import re
from pathlib import Path

from stages.core.jsonl import write_json
from stages.core.output import Done, fresh_folder
from stages.core.params import Section, bad_param
from stages.core.problem import Problem

LIST = ".datasets.json"
"""DVC warns of an output that is an empty folder. ingest reads no hidden file."""
PATH = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
"""owner/name, as the hub allows it (huggingface_hub/utils/_validators.py)."""
MAX_NAME = 96


class HubDataset(Section):
    """One data set of a hub, or one split of it."""

    path: str
    """owner/name."""
    revision: str
    """The full commit hash, 40 hex digits."""
    name: str
    """The configuration, as in load_dataset(path, name); "": the only one, or the default."""
    split: str
    """The split; "": all."""


class Params(Section):
    """Which data sets."""

    datasets: list[HubDataset]
    """Downloaded into data/hub, and read by ingest as if they stood in data/raw. An empty list needs no network."""


def fetch_data(params: Params, *, hub: Path) -> Done:
    """Fills `hub` with <owner>--<name>[--<configuration>]/<split>/<file>, the files of each data set byte for byte.

    `datasets` finds out which files belong to which split, as load_dataset() would, and the files are taken as they are.
    Writing its rows instead would change them: JSON objects with different fields become structs with all of them, most
    of them null. The same commit always gives the same bytes.

    Downloads are kept next to `hub`, in .fetch-<owner>--<name>-<commit>: an interrupted run resumes there, and a later run
    of the same commit needs no network. They can be deleted at any time. `hub` also gets .datasets.json, the list itself.

    Raises Problem with everything that is wrong in the list, with one data set, or with its download.
    """
    problems = _find_problems(params.datasets)
    if problems:
        raise Problem(*problems)
    hub.parent.mkdir(parents=True, exist_ok=True)
    files = 0
    with fresh_folder(hub) as folder:
        for dataset in params.datasets:
            from stages.fetch_data.download import get_splits, link_file  # imports what an empty list does not need

            target = folder / dataset.path.replace("/", "--")
            if dataset.name:
                target = target.with_name(f"{target.name}--{dataset.name}")
            splits = get_splits(dataset.path, dataset.revision, dataset.name, split=dataset.split, parent=hub.parent)
            for split, split_files in splits.items():
                for name, file in split_files.items():
                    link_file(file, target / split / name)
                    files += 1
        listed = [dataset.model_dump() for dataset in params.datasets]
        write_json(folder / LIST, sorted(listed, key=lambda dataset: json.dumps(dataset, sort_keys=True)))
    size = sum(file.stat().st_size for file in hub.rglob("*") if file.is_file())
    return Done(f"{hub}: {len(params.datasets)} data sets, {files} files, {size / 1e6:,.0f} MB")


def _find_problems(datasets: list[HubDataset]) -> list[str]:
    problems = []
    splits: dict[tuple[str, str], list[HubDataset]] = {}
    for number, dataset in enumerate(datasets):
        where = f"fetch_data.datasets.{number}"
        if not PATH.fullmatch(dataset.path) or len(dataset.path) > MAX_NAME or dataset.path.endswith(".git"):
            problems.append(bad_param(f"{where}.path", f"{dataset.path!r} is not owner/name of a data set on the hub"))
        if not re.fullmatch(r"[0-9a-f]{40}", dataset.revision):
            problems.append(
                bad_param(
                    f"{where}.revision",
                    f"{dataset.revision!r} is not a full commit hash. A branch or a short hash may point to other data "
                    "later; write the 40 hex digits that the hub shows under the data set's history",
                )
            )
        if re.search(r"[/\\\0]", dataset.name) or len(dataset.name) > MAX_NAME:
            problems.append(bad_param(f"{where}.name", f"{dataset.name!r} is not the name of a configuration"))
        if not re.fullmatch(r"[\w.-]*", dataset.split) or len(dataset.split) > MAX_NAME:
            problems.append(
                bad_param(
                    f"{where}.split", f"{dataset.split!r} is not the name of a split; parts such as train[:10%] are not read"
                )
            )
        earlier = splits.setdefault((dataset.path, dataset.name), [])
        if any("" in (dataset.split, other.split) or dataset.split == other.split for other in earlier):
            problems.append(bad_param(where, f"{dataset.path} stands in the list already, with the same split"))
        earlier.append(dataset)
    return problems
