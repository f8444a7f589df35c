"""Runs of `train` on the tokens of the test workspace, with some parameters changed."""

from pathlib import Path
from typing import Any

from stages.train.train import Params, train
from tests.tiny import ProjectFolder


def params(workspace: ProjectFolder, **given: Any) -> Params:
    return Params(**dict(workspace.params()["train"]) | given)


INPUTS = ("data/tokens/train.arrow", "data/tokens/validation.arrow", "models/base")


def paths(workspace: ProjectFolder, out: Path, base: Path | str = INPUTS[2]) -> dict[str, Path]:
    return {
        "train_tokens": workspace.root / INPUTS[0],
        "validation_tokens": workspace.root / INPUTS[1],
        "base": workspace.root / base,
        "adapter": out / "adapter",
        "report": out / "report.json",
        "curves": out / "loss",
        "machine": out / "machine" / "x.json",
    }


def run(workspace: ProjectFolder, out: Path, base: Path | str = INPUTS[2], **given: Any) -> Path:
    train(params(workspace, **given), **paths(workspace, out, base)).clean_up()
    return out
