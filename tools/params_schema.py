"""Writes params.schema.json from the typed parameters, for editors that check and complete params.yaml.

    python tools/params_schema.py

tests/test_params.py fails if the committed file is not what this writes.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import create_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.__main__ import quiet_libraries  # noqa: E402
from stages.core.params import Section, read_yaml  # noqa: E402

FILE = ROOT / "params.schema.json"


def schema() -> dict[str, Any]:
    """The JSON schema of params.yaml: one section a stage, every parameter required, no others allowed."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    sections: dict[str, Any] = {name: (importlib.import_module(f"stages.{name}.{name}").Params, ...) for name in stages}
    made = create_model("Loratory", __base__=Section, **sections).model_json_schema()
    made.pop("description", None)  # pydantic's base class
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | made | {"title": "params.yaml of Loratory"}


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    quiet_libraries()
    FILE.write_text(text(), encoding="utf-8", newline="\n")
