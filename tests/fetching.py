"""What the tests of fetch have in common: calls of the stage that succeed or are refused, and a hub with one model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stages.core.problem import Problem
from stages.fetch.fetch import Params, fetch
from tests.hub_server import COMMIT, HubHandler


def params(**given: Any) -> Params:
    return Params(**{"source": "folder", "model_name_or_path": "x", "revision": "", "trust_remote_code": False} | given)


def run(tmp_path: Path, **given: Any) -> Path:
    fetch(params(**given), base=tmp_path / "base", tokenizer=tmp_path / "tokenizer").clean_up()
    return tmp_path / "base"


def refused(tmp_path: Path, **given: Any) -> str:
    with pytest.raises(Problem) as caught:
        run(tmp_path, **given)
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "tokenizer").exists()
    assert not list(tmp_path.glob("*.partial"))
    return str(caught.value)


OWN_CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
"""In config.json: a model type that Transformers has no class for, and the model's own classes."""


def edit_config(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def set_free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]


class Hub(ThreadingHTTPServer):
    """Serves one model at one commit, as the hub does; can interrupt a download or change a file. Records requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        self.interrupted: str | None = None
        self.changed: str | None = None
        self.requests: list[str] = []
        self.ranges_of: dict[str, list[str]] = {}

    def edit_config(self, **values: Any) -> None:
        self.files["config.json"] = json.dumps(json.loads(self.files["config.json"]) | values).encode()

    def downloads(self, name: str) -> int:
        """How often a file was requested."""
        return self.requests.count(f"GET /owner/tiny/resolve/{COMMIT}/{name}")

    def ranges(self, name: str) -> list[str]:
        """The ranges of bytes with which a file was requested."""
        return self.ranges_of.get(name, [])

    def lfs(self, name: str) -> bool:
        return name.endswith(".safetensors")

    def etag(self, name: str) -> str:
        data = self.files[name]
        return (
            hashlib.sha256(data).hexdigest()
            if self.lfs(name)
            else hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        )

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": self.etag(name)}
            if self.lfs(name):
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": self.etag(name), "size": len(data), "pointerSize": 134}}
            siblings.append(entry)
        return {"id": "owner/tiny", "sha": COMMIT, "private": False, "downloads": 0, "tags": [], "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": self.etag(name)}
            if self.lfs(name):
                entry |= {"oid": "0" * 40, "lfs": {"oid": self.etag(name), "size": len(data), "pointerSize": 134}}
            entries.append(entry)
        return entries


class Handler(HubHandler):
    server: Hub

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        file = re.fullmatch(rf"/owner/tiny/resolve/{COMMIT}/(.+)", path)
        if path in (f"/api/models/owner/tiny/revision/{COMMIT}", "/api/models/owner/tiny"):
            self.send(200, json.dumps(self.server.info()).encode(), body)
        elif path == f"/api/models/owner/tiny/tree/{COMMIT}":
            self.send(200, json.dumps(self.server.tree()).encode(), body)
        elif file and file[1] in self.server.files:
            if body:
                self.server.ranges_of.setdefault(file[1], []).append(self.headers.get("Range") or "all")
            self.send_file(file[1], body)
        elif path.startswith("/api/models/owner/tiny/revision/"):
            self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"})


SCRIPT = """
import os, shutil, sys
from pathlib import Path
from stages.fetch.fetch import Params, fetch
from stages.core.problem import Problem
{before}
try:
    params = Params(
        source="hub", model_name_or_path=sys.argv[1], revision=sys.argv[2], trust_remote_code=sys.argv[4] == "True"
    )
    fetch(params, base=Path(sys.argv[3]) / "base", tokenizer=Path(sys.argv[3]) / "tokenizer").clean_up()
except Problem as problem:
    sys.exit(str(problem))
"""


def from_hub(
    hub: Hub,
    tmp_path: Path,
    name: str = "owner/tiny",
    *,
    commit: str = COMMIT,
    endpoint: str | None = None,
    trust_remote_code: bool = False,
    before: str = "",
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.

    `before` is code that runs before the stage.
    """
    env = os.environ | {
        "HF_ENDPOINT": endpoint or f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", SCRIPT.format(before=before), name, commit, str(tmp_path), str(trust_remote_code)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def refused_by_hub(hub: Hub, tmp_path: Path, **given: Any) -> str:
    done = from_hub(hub, tmp_path, **given)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "base").exists()
    return done.stderr
