"""What would not end, or would take all memory, is one sentence: templates, replies of a judge, limits of the system."""

import contextlib
import http.server
import json
import resource
import shlex
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.core.problem import Problem
from stages.encode import encode as encode_module
from stages.encode import template as template_module
from stages.encode.template import ChatTemplate
from stages.score import judge as judge_module
from stages.score.judge import Judge
from tests.tiny import Workspace

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
)
USER = [{"role": "user", "content": "a"}]


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_RENDERING_S", 0.2)


def test_a_template_that_does_not_end_is_stopped(short_limit: None) -> None:
    with pytest.raises(
        Problem, match=r"params\.yaml: encode\.template: the template has run for 0\.2 s on one conversation"
    ):
        ChatTemplate(ENDLESS, {}).render(USER)
    assert ChatTemplate("{{ messages[0].content }}", {}).render(USER) == "a"
    time.sleep(0.3)  # the clock of the last rendering was stopped


@pytest.mark.parametrize(
    "source", ["{{ 'x' * 10**12 }}", "{{ 10**12 * 'x' }}", "{{ [1] * 10**12 }}", "{{ 9 ** 1000000000 }}"]
)
def test_a_template_that_makes_too_much_fails(source: str) -> None:
    with pytest.raises(template_module.jinja2.TemplateError, match=r"makes more than 10,000,000"):
        ChatTemplate(source, {}).render(USER)


def test_usual_products_are_as_before() -> None:
    source = "{{ 'ab' * 3 }} {{ 3 * 4 }} {{ 2 ** 10 }} {{ 1.5 * 2 }} {{ [1] * 2 }}"
    assert ChatTemplate(source, {}).render(USER) == "ababab 12 1024 3.0 [1, 1]"


def test_a_template_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(Problem, match=r"encode\.template: '.*t\.jinja': is a git-lfs pointer .*: git lfs pull"):
        encode_module._read_template(str(path))


class Handler(http.server.BaseHTTPRequestHandler):
    answer: Callable[["Handler"], None] = staticmethod(lambda _: None)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            type(self).answer(self)

    def log_message(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def endpoint(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(judge_module, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(judge_module, "TRIES", 2)
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def drip_body(handler: Handler) -> None:
    handler.begin()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def drip_header(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-A: ")
    while True:
        handler.wfile.write(b"a")
        handler.wfile.flush()
        time.sleep(0.02)


def drip_refusal(handler: Handler) -> None:
    handler.send_response(401)
    handler.end_headers()
    while True:
        handler.wfile.write(b"n")
        handler.wfile.flush()
        time.sleep(0.02)


def send(body: bytes) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.begin()
        handler.wfile.write(body)

    return answer


@pytest.mark.parametrize("answer", [drip_body, drip_header, drip_refusal])
def test_a_judge_that_drips_is_not_waited_for(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Handler], None]
) -> None:
    monkeypatch.setattr(judge_module, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(Handler, "answer", answer)
    with pytest.raises(
        Problem, match=r"score\.judge_url: http.*: no complete reply within 0\.3 s\. All verdicts so far are kept"
    ):
        Judge(endpoint, "m").compare("q", "r", base="a", fine_tuned="b")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"choices": [{"message": {"content": ' + b"[" * 200_000 + b"]" * 200_000 + b"}}]}",
        b" " * (judge_module.MAX_REPLY_BYTES + 5),
        b'{"choices": [{"message": {"content": ' + b"1" * 5000 + b"}}]}",
        b"\xff\xfe",
    ],
    ids=["deep", "deep content", "too long", "a long integer", "no text"],
)
def test_a_reply_that_no_parser_takes_is_one_message(endpoint: str, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(Handler, "answer", send(body))
    with pytest.raises(Problem, match="the reply is not a chat completion"):
        Judge(endpoint, "m").compare("q", "r", base="a", fine_tuned="b")


@pytest.mark.parametrize("kept", [b"", b'"C"', b"[" * 200_000, b"\xff"])
def test_a_damaged_verdict_is_asked_for_again(
    endpoint: str, scratch: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes
) -> None:
    monkeypatch.setattr(Handler, "answer", send(json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()))
    judge = Judge(endpoint, "m")
    assert judge.compare("q", "r", base="a", fine_tuned="b") == 0.5
    files = sorted((scratch / ".checkpoints" / "judge").iterdir())
    assert len(files) == 2
    files[0].write_bytes(kept)
    assert judge.compare("q", "r", base="a", fine_tuned="b") == 0.5
    assert json.loads(files[0].read_text()) == "A"


def test_a_limit_of_the_file_size_is_one_message(workspace: Workspace, tmp_path: Path, second_python: None) -> None:
    words = [
        "ingest",
        "--raw",
        "data/raw",
        "--hub",
        "data/hub",
        "--examples",
        str(tmp_path / "e"),
        "--report",
        str(tmp_path / "r"),
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    script = f"ulimit -f 2; exec python -m stages {' '.join(words)}"
    done = subprocess.run(
        ["bash", "-c", script.replace("exec python", f"exec {shlex.quote(sys.executable)}")],
        cwd=workspace.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the file would be larger than this process may write; raise the limit (ulimit -f unlimited)" in done.stderr
