"""fetch_data: data sets of a hub (a local server) at one commit, byte for byte, by the real `datasets`."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.params import parse_section
from stages.core.problem import Problem
from stages.fetch_data.download import READABLE
from stages.fetch_data.fetch_data import Params, fetch_data
from stages.ingest.raw_files import SUFFIXES
from tests.hub_server import COMMIT, HubHandler, served

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(4)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Hub(ThreadingHTTPServer):
    """Serves one data set at one commit, as the hub does; can fail, interrupt a download or change a file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"README.md": b"# A data set\n"}
        self.interrupted: str | None = None
        self.changed: str | None = None
        self.failures = 0
        self.status, self.status_of_files = 0, False
        self.requests: list[str] = []
        self.tokens: set[str] = set()

    def downloads(self, name: str) -> int:
        return self.requests.count(f"GET /datasets/owner/tiny/resolve/{COMMIT}/{name}")

    def etag(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name, "size": len(data), "blobId": self.etag(name)} for name, data in self.files.items()]
        return {"id": "owner/tiny", "sha": COMMIT, "private": False, "downloads": 0, "tags": [], "siblings": siblings}

    def tree(self, below: str, *, recursive: bool) -> list[dict[str, Any]]:
        start = f"{below}/" if below else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, data in self.files.items():
            if not name.startswith(start):
                continue
            folder, _, rest = name.removeprefix(start).partition("/")
            if rest:
                entries[start + folder] = {"type": "directory", "path": start + folder, "size": 0, "oid": "0" * 40}
            if not rest or recursive:
                entries[name] = {"type": "file", "path": name, "size": len(data), "oid": self.etag(name)}
        return list(entries.values())


class Handler(HubHandler):
    server: Hub

    def answer(self, *, body: bool) -> None:
        path, _, query = self.path.partition("?")
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization") or "")
        file = re.fullmatch(rf"/datasets/owner/tiny/resolve/{COMMIT}/(.+)", path)
        tree = re.fullmatch(rf"/api/datasets/owner/tiny/tree/{COMMIT}/?(.*)", path)
        if self.server.status and ("/resolve/" in path) == self.server.status_of_files:
            self.send(self.server.status, f"<html>{self.headers.get('Authorization')}</html>".encode(), body)
        elif self.server.failures and "/revision/" in path:
            self.server.failures -= 1
            self.send(500, b"{}", body)
        elif path in (f"/api/datasets/owner/tiny/revision/{COMMIT}", "/api/datasets/owner/tiny"):
            self.send(200, json.dumps(self.server.info()).encode(), body)
        elif path == f"/api/datasets/owner/tiny/paths-info/{COMMIT}":
            self.send(200, json.dumps(self.server.tree("", recursive=True)).encode(), body)
        elif tree and (found := self.server.tree(tree[1], recursive="recursive=true" in query.lower())):
            self.send(200, json.dumps(found).encode(), body)
        elif file and file[1] in self.server.files:
            self.send_file(file[1], body)
        elif path.startswith("/api/datasets/owner/tiny/revision/"):
            self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/datasets/owner/gated/"):
            self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        else:
            missing_file = "/owner/tiny/" in path
            self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound" if missing_file else "RepoNotFound"})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served(Hub()) as server:
        yield server


SCRIPT = """
import json, os, sys, time
from pathlib import Path
from stages.fetch_data import download
from stages.fetch_data.fetch_data import Params, fetch_data
from stages.core.problem import Problem
download.WAIT_S = 0
time.sleep = lambda _: None  # the libraries would wait longer
{before}
try:
    print(fetch_data(Params(datasets=json.loads(sys.argv[1])), hub=Path(sys.argv[2])).summary)
except Problem as problem:
    sys.exit(str(problem))
print(*sorted(name for name in sys.modules if name in ("datasets", "huggingface_hub")))
"""


def entry(**given: str) -> dict[str, str]:
    return {"path": "owner/tiny", "revision": COMMIT, "name": "", "split": ""} | given


def fetch(
    hub: Hub, tmp_path: Path, *entries: dict[str, str], endpoint: str = "", before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the libraries read their variables when they are imported."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    dropped = ("HF_HOME", "HF_TOKEN", "HF_HUB_CACHE", "XDG_CACHE_HOME")
    env = {key: value for key, value in os.environ.items() if key not in dropped} | {
        "HF_ENDPOINT": endpoint or f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": str(home),
        **environment,
    }
    command = [sys.executable, "-c", SCRIPT.format(before=before)]
    command += [json.dumps(entries or [entry()]), str(tmp_path / "data" / "hub")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    assert not list(home.rglob("*"))
    return done


def fetched(hub: Hub, tmp_path: Path, *entries: dict[str, str], **given: str) -> dict[str, bytes]:
    done = fetch(hub, tmp_path, *entries, **given)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return read(tmp_path / "data" / "hub")


def read(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".datasets.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(hub: Hub, tmp_path: Path, *entries: dict[str, str], **given: str) -> str:
    done = fetch(hub, tmp_path, *entries, **given)
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "data" / "hub").exists()
    return done.stderr.strip()


def test_the_files_of_each_split_are_taken_byte_for_byte(hub: Hub, tmp_path: Path) -> None:
    train = [parquet(ROWS[:2]), parquet(ROWS[2:])]
    hub.files |= {
        "data/train-00000-of-00002.parquet": train[0],
        "data/train-00001-of-00002.parquet": train[1],
        "data/test-00000-of-00001.parquet": parquet(ROWS[:1]),
        "picture.png": b"x",
    }
    assert fetched(hub, tmp_path) == {
        "owner--tiny/test/test-00000-of-00001.parquet": hub.files["data/test-00000-of-00001.parquet"],
        "owner--tiny/train/train-00000-of-00002.parquet": train[0],
        "owner--tiny/train/train-00001-of-00002.parquet": train[1],
    }
    assert hub.downloads("picture.png") == 0
    assert hub.tokens == {""}


def test_objects_with_different_fields_keep_them(hub: Hub, tmp_path: Path) -> None:
    """The rows of load_dataset() would have the fields of all of them."""
    data = lines({"tools": [{"a": 1}]}, {"tools": [{"b": "x"}]})
    hub.files["train.jsonl"] = data
    assert fetched(hub, tmp_path) == {"owner--tiny/train/train.jsonl": data}


def test_the_card_names_configurations_and_splits(hub: Hub, tmp_path: Path) -> None:
    card = """---
configs:
- config_name: zh
  data_files: [{split: train_sft, path: zh/a.jsonl}, {split: test_sft, path: zh/b.jsonl.gz}]
- config_name: en
  data_files: [{split: train, path: "en/*.jsonl"}]
---
"""
    zipped = gzip.compress(lines(ROWS[3]), mtime=0)
    hub.files |= {"README.md": card.encode(), "zh/a.jsonl": lines(ROWS[0]), "zh/b.jsonl.gz": zipped}
    hub.files |= {"en/x.jsonl": lines(ROWS[1]), "en/y.jsonl": lines(ROWS[2])}
    assert fetched(hub, tmp_path, entry(name="zh"), entry(name="en")) == {
        "owner--tiny--en/train/x.jsonl": lines(ROWS[1]),
        "owner--tiny--en/train/y.jsonl": lines(ROWS[2]),
        "owner--tiny--zh/test_sft/b.jsonl.gz": zipped,
        "owner--tiny--zh/train_sft/a.jsonl": lines(ROWS[0]),
    }
    assert list(fetched(hub, tmp_path, entry(name="zh", split="test_sft"))) == ["owner--tiny--zh/test_sft/b.jsonl.gz"]
    (tmp_path / "data" / "hub").rename(tmp_path / "old")
    message = refused(hub, tmp_path, entry(name="zh", split="dev"))
    assert message == "params.yaml: fetch_data.datasets: owner/tiny has no split 'dev'; it has train_sft, test_sft"
    message = refused(hub, tmp_path, entry(name="fr"))
    assert message.startswith("params.yaml: fetch_data.datasets: name 'fr' of owner/tiny: BuilderConfig 'fr' not found")
    assert "['zh', 'en']" in message
    assert "name '' of owner/tiny: Config name is missing" in refused(hub, tmp_path)


def test_a_second_run_needs_no_network_and_a_damaged_copy_is_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    hub.files["train.jsonl"] = lines(*ROWS)
    first = fetched(hub, tmp_path)
    done = fetch(hub, tmp_path, endpoint="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""  # neither library was imported
    assert read(tmp_path / "data" / "hub") == first
    (kept,) = tmp_path.glob("data/.fetch-owner--tiny-*/files/train.jsonl")
    kept.unlink()
    kept.write_bytes(b"damaged")
    assert fetched(hub, tmp_path) == first


def test_a_failing_server_is_asked_again_and_a_line_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.files["train.jsonl"] = lines(*ROWS)
    hub.failures = 1
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"fetch_data: owner/tiny: .*500.*; again in 0 s \(2 of 3\)", done.stdout)


def test_an_interrupted_download_leaves_nothing_and_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"train.jsonl": lines(*ROWS), "test.jsonl": lines(*ROWS)}
    hub.interrupted = "train.jsonl"
    message = refused(hub, tmp_path, before="download.ATTEMPTS = 1")
    assert "owner/tiny: the download was interrupted: " in message
    hub.interrupted = None
    before = hub.downloads("test.jsonl")
    assert fetched(hub, tmp_path)["owner--tiny/train/train.jsonl"] == lines(*ROWS)
    assert hub.downloads("test.jsonl") == before == 1


def test_a_changed_file_is_removed_and_named(hub: Hub, tmp_path: Path) -> None:
    hub.files["train.jsonl"] = lines(*ROWS)
    hub.changed = "train.jsonl"
    assert "owner/tiny: train.jsonl: the hub's checksum does not match; removed" in refused(hub, tmp_path)
    hub.changed = None
    assert fetched(hub, tmp_path)["owner--tiny/train/train.jsonl"] == lines(*ROWS)


def test_scripts_other_formats_and_empty_repositories_are_refused(hub: Hub, tmp_path: Path) -> None:
    assert "`datasets` finds no data in it" in refused(hub, tmp_path)
    hub.files["train.jsonl.zst"] = b"x"
    message = refused(hub, tmp_path)
    assert "owner/tiny: train.jsonl.zst: ingest reads .json, .jsonl" in message
    assert "refs/convert/parquet" in message
    assert hub.downloads("train.jsonl.zst") == 0
    hub.files["tiny.py"] = b"import os"
    message = refused(hub, tmp_path)
    assert "owner/tiny: made by a script, tiny.py, which `datasets` does not run any more" in message
    assert hub.downloads("tiny.py") == 0


def test_the_token_is_that_of_the_environment_and_is_not_shown(hub: Hub, tmp_path: Path) -> None:
    hub.files["train.jsonl"] = lines(*ROWS)
    done = fetch(hub, tmp_path, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_a_missing_data_set_a_missing_commit_a_gated_one_and_no_server_are_one_message(hub: Hub, tmp_path: Path) -> None:
    assert "owner/none: the hub has no such data set, or it is private" in refused(hub, tmp_path, entry(path="owner/none"))
    message = refused(hub, tmp_path, entry(revision="f" * 40))
    assert message == f"params.yaml: fetch_data.datasets: owner/tiny has no commit {'f' * 40} on the hub"
    assert "gated; accept its terms on the hub, and put a token into" in refused(hub, tmp_path, entry(path="owner/gated"))
    assert "the download was interrupted" in refused(hub, tmp_path, endpoint="http://127.0.0.1:9")


def test_an_empty_list_makes_an_empty_folder_without_network_or_libraries(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT.format(before=""), "[]", str(tmp_path / "hub")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [f"{tmp_path / 'hub'}: 0 data sets, 0 files, 0 MB", ""]
    assert [(file.name, file.read_text()) for file in (tmp_path / "hub").iterdir()] == [(".datasets.json", "[]\n")]
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_everything_wrong_with_the_list_is_said_at_once(tmp_path: Path) -> None:
    wrong = [entry(path="tiny"), entry(revision="main"), entry(), entry(split="train"), entry(name="zh"), entry(name="../x")]
    wrong += [
        entry(path=path) for path in ("owner/..", "../..", "öwner/x", "owner/a--b", "owner/x.git", f"owner/{'x' * 99}")
    ]
    wrong += [entry(name="x", split="train[:10%]")]
    with pytest.raises(Problem) as caught:
        fetch_data(Params(datasets=wrong), hub=tmp_path / "hub")  # type: ignore[arg-type]
    assert [message.split(": ")[1] for message in caught.value.messages] == [
        "fetch_data.datasets.0.path",
        "fetch_data.datasets.1.revision",
        "fetch_data.datasets.2",
        "fetch_data.datasets.3",
        "fetch_data.datasets.5.name",
        *(f"fetch_data.datasets.{number}.path" for number in range(6, 12)),
        "fetch_data.datasets.12.split",
    ]
    assert "40 hex digits" in caught.value.messages[1]
    with pytest.raises(Problem) as caught:
        parse_section("fetch_data", Params, {"datasets": [{"path": "owner/tiny", "revision": COMMIT, "name": ""}]})
    assert "fetch_data.datasets.0.split: missing" in str(caught.value)


def test_ingest_reads_every_file_that_fetch_data_takes() -> None:
    assert sorted(READABLE) == sorted(SUFFIXES)


@pytest.mark.parametrize(
    ("status", "of_files", "message"),
    [
        (401, False, "owner/tiny: the hub refuses access: "),
        (403, False, "owner/tiny: the hub refuses access: "),
        (500, False, "owner/tiny: the download was interrupted: "),
        (500, True, "owner/tiny: the download was interrupted: "),
        (200, False, "owner/tiny: the download was interrupted: "),  # the page of a proxy
    ],
)
def test_any_answer_is_one_message_without_the_token(
    hub: Hub, tmp_path: Path, status: int, of_files: bool, message: str
) -> None:
    hub.files["train.jsonl"] = lines(*ROWS)
    hub.status, hub.status_of_files = status, of_files
    done = fetch(hub, tmp_path, HF_TOKEN="hf_secret")
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert "hf_secret" not in done.stdout + done.stderr
    assert done.stdout.count("again in") == (0 if message.endswith("access: ") else 2)


@pytest.mark.parametrize("token", ["hf_sécret", "hf_sec\nret", "hf_secret\n"])
def test_a_token_with_white_space_is_stripped_and_another_one_is_not_shown(hub: Hub, tmp_path: Path, token: str) -> None:
    hub.files["train.jsonl"] = lines(*ROWS)
    done = fetch(hub, tmp_path, HF_TOKEN=token)
    if token == "hf_secret\n":
        assert (done.returncode, hub.tokens) == (0, {"Bearer hf_secret"})
    else:
        assert done.stderr == "the variable HF_TOKEN holds characters that no token has; set it again\n"


def test_one_split_downloads_no_other(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"train.jsonl": lines(*ROWS), "test.jsonl": lines(ROWS[0])}
    assert list(fetched(hub, tmp_path, entry(split="test"))) == ["owner--tiny/test/test.jsonl"]
    assert hub.downloads("train.jsonl") == 0
    assert list(fetched(hub, tmp_path)) == ["owner--tiny/test/test.jsonl", "owner--tiny/train/train.jsonl"]
    (tmp_path / "data" / "hub").rename(tmp_path / "old")
    downloads = hub.downloads("train.jsonl")
    assert "has no split 'dev'; it has train, test" in refused(hub, tmp_path, entry(split="dev"))
    assert hub.downloads("train.jsonl") == downloads
