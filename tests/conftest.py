"""Set-up for all tests: offline, quiet, this environment's python first, and one run of the tiny pipeline to share."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    CUDA_VISIBLE_DEVICES="",  # the same tests everywhere
    DVC_NO_ANALYTICS="true",
    HF_HUB_OFFLINE="1",
    HF_MODULES_CACHE=tempfile.mkdtemp(prefix="loratory-modules-"),
    OMP_NUM_THREADS="1",  # threads only wait for each other in models as small as these
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
)

# The variables above must be set before Transformers and DVC are imported.
from tests import preloaded
from tests.tiny import Workspace, make_model, make_sentencepiece_tokenizer, make_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="session")
def sentencepiece_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same vocabulary as a slow tokenizer with its own code, and as a fast one."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    for fast in (False, True):
        make_sentencepiece_tokenizer(folder / str(fast), fast=fast)
    return folder / "False", folder / "True"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workspace:
    """The project's copy, with its eight stages run once by DVC."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"), tiny_model)
    stages = ["fetch", "fetch_data", "ingest", "encode", "train", "merge", "generate@base", "generate@merged", "score"]
    with preloaded.python(tmp_path_factory.mktemp("first"), hash_seed=1):
        ran = workspace.repro()
    assert sorted(ran) == sorted(stages)
    return workspace


@pytest.fixture(scope="session")
def second_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DVC's stages run with another order of sets than in the first run."""
    with preloaded.python(tmp_path_factory.mktemp("second"), hash_seed=77):
        yield


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which checkpoints stand too."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path
