"""The scores of both models by group of rows: by language and by source file."""

from typing import Any, NamedTuple

import numpy as np

from stages.score.intervals import mean_intervals
from stages.score.rows import Flags, Scores
from stages.score.systems import MODELS

SHOWN_FILES = 20
"""The source files with the most rows; the report does not show more."""
METRICS_BY_GROUP = ("exact_match", "rouge_l")


class Groups(NamedTuple):
    """The scores by group."""

    groups: dict[str, dict[str, Any]]
    """Group → {"rows": count, "<model>_<metric>": interval}. A grouping with only one group is left out."""
    files_left_out: int
    """Source files with fewer rows than the SHOWN_FILES."""


def score_groups(scores: Scores) -> Groups:
    """The scores by language, and by source file."""
    members: dict[str, Flags] = {}
    if 0 < scores.chinese.sum() < len(scores.chinese):
        names = ("Chinese", "other") if scores.chinese[0] else ("other", "Chinese")
        members = {name: scores.chinese == (name == "Chinese") for name in names}
    rows_by_file = np.bincount(scores.files, minlength=len(scores.file_names))
    shown = np.argsort(-rows_by_file, kind="stable")[:SHOWN_FILES].tolist() if len(rows_by_file) > 1 else []
    members |= {scores.file_names[file]: scores.files == file for file in shown}
    figures = {f"{model}_{metric}": scores.of(model, metric) for model in MODELS for metric in METRICS_BY_GROUP}
    columns = [np.where(rows, values, np.nan) for rows in members.values() for values in figures.values()]
    intervals = iter(mean_intervals(np.stack(columns, 1), "intervals of groups") if columns else [])
    return Groups(
        {
            name: {"rows": int(rows.sum()), **{figure: next(intervals) for figure in figures}}
            for name, rows in members.items()
        },
        max(0, len(rows_by_file) - SHOWN_FILES) if shown else 0,
    )
