"""The scores of both models by group of rows: by language and by source file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.score.intervals import mean_interval
from stages.score.metrics import RowScores, is_chinese
from stages.score.predictions import PredictedRow
from stages.score.systems import MODELS

SHOWN_FILES = 20
"""The source files with the most rows; the report does not show more."""
METRICS_BY_GROUP = ("exact_match", "rouge_l")


def score_groups(rows: Sequence[PredictedRow], scores: Mapping[str, Sequence[RowScores]]) -> dict[str, dict[str, Any]]:
    """Group → {"rows": count, "<model>_<metric>": interval}. A grouping with only one group is left out."""
    languages = _group("Chinese" if is_chinese(row.question + row.reference.answer) else "other" for row in rows)
    files = _group(row.source.rpartition(":")[0] for row in rows)
    files = dict(sorted(files.items(), key=lambda item: -len(item[1]))[:SHOWN_FILES])
    return {
        name: {
            "rows": len(numbers),
            **{
                f"{model}_{metric}": mean_interval(scores[model][number][metric] for number in numbers)
                for model in MODELS
                for metric in METRICS_BY_GROUP
            },
        }
        for name, numbers in (languages | files).items()
    }


def _group(names: Iterable[str]) -> dict[str, list[int]]:
    """The row numbers of each name; empty if all rows have the same name."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name, []).append(number)
    return groups if len(groups) > 1 else {}
