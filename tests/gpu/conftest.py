"""Set-up for the tests that need a GPU: `make test-gpu` runs them, without tests/conftest.py, which hides the GPU."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=tempfile.mkdtemp(prefix="loratory-modules-"))

# The variables above must be set before Transformers is imported.
import torch

from stages.model.device import pick_device
from stages.train.memory import use_expandable_segments
from tests.gpu.project import Project

use_expandable_segments()  # as train does in a process of its own, before the GPU is used

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            # PyTorch's C++ code attributes its warnings to our lines.
            item.add_marker(pytest.mark.filterwarnings("default:::stages", "default:::tests"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and is run by make test-gpu"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return pick_device()


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which checkpoints stand too."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path
