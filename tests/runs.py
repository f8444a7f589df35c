"""Trainings on the tokens of the test workspace, with some parameters changed."""

from pathlib import Path
from typing import Any

from stages.train import Params, train
from tests.tiny import Workspace


def params(workspace: Workspace, **given: Any) -> Params:
    return Params(**dict(workspace.params()["train"]) | given)


INPUTS = ("data/tokens/train.arrow", "data/tokens/validation.arrow", "models/base")
LOSS = "stages/losses/cross_entropy.py"


def run(workspace: Workspace, out: Path, base: Path | str = INPUTS[2], **given: Any) -> Path:
    inputs = [workspace.root / path for path in (*INPUTS[:2], base, given.get("loss", LOSS))]
    train(
        params(workspace, **given), *inputs, out / "adapter", out / "report.json", out / "loss", out / "machine" / "x.json"
    )
    return out
