"""An optional judge: a model behind an OpenAI-compatible endpoint compares the answers of base and fine-tuned model.

Each pair is judged twice, in both orders, because judges prefer one position (Zheng et al. 2023). An answer wins only if
both verdicts agree. Verdicts are cached by the content of the request, so that no request is sent twice. A reply without a
verdict is no tie: its row is left out and counted, and too many of them stop the stage.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stages.core.jsonl import read_json, write_json
from stages.core.output import fresh_file
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.score.intervals import Interval, mean_interval
from stages.score.predictions import PredictedRow
from stages.score.thinking import split_thinking

T = TypeVar("T")

TRIES, FIRST_WAIT_S, TIMEOUT_S = 5, 1.0, 120
"""Tries for each request, the wait before the second, which doubles, and the time in which a whole reply must be there."""
MAX_REPLY_BYTES = 10**7
"""A hundred times what MAX_TOKENS can be."""
VERDICTS = ("A", "B", "TIE")
KEY = "JUDGE_API_KEY"
"""The environment variable with the API key of the endpoint, if it needs one."""
MAX_TOKENS = 4096
"""Room for the thinking of a judge that thinks before its one word."""
MAX_UNREADABLE_SHARE = 0.1
"""The stage fails if a larger share of the judged rows has a reply without a verdict."""
VERDICT = re.compile(
    r"(?:the\s+)?(?:final\s+)?(?:better\s+)?(?:verdict|answer|assistant|response)?\s*(?:is)?\W*\b(A|B|TIE)\b", re.IGNORECASE
)
# Cached verdicts are found by the hash of this text: after an edit every pair is judged again.
QUESTION = """Two assistants answered the same request. Say which answer is better: right first, then helpful, then short.

[Request]
{question}

[A right answer, for comparison]
{reference}

[Answer A]
{a}

[Answer B]
{b}

Reply with one word: A, B, or TIE."""


class JudgeResult(NamedTuple):
    """What a judge found over all rows that it was shown."""

    model: str
    rows: int
    win_rate: Interval
    """Share of rows in which the fine-tuned model's answer is better; a tie counts as half."""
    unreadable: int
    """Rows without a verdict, which the win rate leaves out."""


def judge_rows(rows: Sequence[PredictedRow], *, url: str, model: str) -> JudgeResult:
    """Compares the two models' answers to each row, of which there is at least one.

    Raises Problem if the endpoint does not answer, or if it gives no verdict on too many rows.
    """
    judge = Judge(url, model)
    verdicts = [
        judge.compare(row.question, row.reference.answer, base=row.base.split.answer, fine_tuned=row.merged.split.answer)
        for row in progress(rows, "judge", total=len(rows))
    ]
    unreadable = verdicts.count(None)
    win_rate = mean_interval(verdicts)
    if unreadable > MAX_UNREADABLE_SHARE * len(rows) or win_rate is None:
        raise Problem(
            bad_param(
                "score.judge_model",
                f"{model!r} gave no verdict on {unreadable} of {len(rows)} rows, wanted at most "
                f"{MAX_UNREADABLE_SHARE:.0%}; the first such reply is {judge.unreadable_reply[:100]!r}, wanted A, B or TIE. "
                "Name a model that follows the question",
            )
        )
    return JudgeResult(model, len(rows), win_rate, unreadable)


class Judge:
    """A model behind an endpoint. Its verdicts are cached in `.checkpoints/judge` in the folder DVC_ROOT."""

    def __init__(self, url: str, model: str) -> None:
        """`url` is the root of the endpoint, as http://localhost:8000/v1."""
        self.url, self.model = url.rstrip("/"), model
        self.cache = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / "judge"
        self.unreadable_reply = ""
        """The first reply without a verdict."""
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}

    def compare(self, question: str, reference: str, *, base: str, fine_tuned: str) -> float | None:
        """1 if `fine_tuned` is better in both orders, 0 if `base` is, else 0.5; None if a reply has no verdict.

        Raises Problem if the endpoint fails.
        """
        if base == fine_tuned:
            return 0.5
        results = []
        for a, b, fine_tuned_is in ((base, fine_tuned, "B"), (fine_tuned, base, "A")):
            verdict = self._ask(QUESTION.format(question=question, reference=reference, a=a, b=b))
            if verdict is None:
                return None
            results.append(0.5 if verdict == "TIE" else float(verdict == fine_tuned_is))
        return results[0] if results[0] == results[1] else 0.5

    def _ask(self, text: str) -> str | None:
        """The verdict on one question: A, B or TIE, from the cache if it was asked before; None if the reply has none."""
        messages = [{"role": "user", "content": text}]
        name = hashlib.sha256(json.dumps([self.url, self.model, messages], sort_keys=True).encode()).hexdigest()
        path = self.cache / f"{name}.json"
        with suppress(OSError, ValueError):  # a damaged one is asked for again
            if (kept := read_json(path)) in VERDICTS:
                return str(kept)
        reply = self._post({"model": self.model, "messages": messages})
        verdict = _verdict(reply)
        if verdict is None:  # not cached: another setting of the endpoint may give one
            self.unreadable_reply = self.unreadable_reply or reply
            return None
        with fresh_file(path) as file:
            write_json(file, verdict)
        return verdict

    def _accept(self, refusal: str) -> bool:
        """Changes the settings that a refusal names, as that of models that think; False if there is nothing to change."""
        if "max_completion_tokens" in refusal and "max_tokens" in self._settings:
            self._settings["max_completion_tokens"] = self._settings.pop("max_tokens")
        elif "temperature" in refusal and "temperature" in self._settings:
            del self._settings["temperature"]
        else:
            return False
        return True

    def _post(self, body: dict[str, Any]) -> str:
        """The text of the endpoint's reply. Retries while the endpoint is busy or cannot be reached."""
        for attempt in range(1, TRIES + 1):
            request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body | self._settings).encode())
            request.add_header("Content-Type", "application/json")
            if os.environ.get(KEY):
                request.add_header("Authorization", f"Bearer {os.environ[KEY]}")
            try:
                status, text = _within(TIMEOUT_S, partial(_read_reply, request))
                if status is None:
                    return str(json.loads(text)["choices"][0]["message"]["content"] or "")  # null: it only thought
                refusal = text.decode(errors="replace")
                if status == 400 and self._accept(refusal):
                    continue
                reason, retry = f"status {status}: {refusal[:200]}", status == 429 or status >= 500
            except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
                reason, retry = str(getattr(error, "reason", error)), not isinstance(error, http.client.InvalidURL)
            except (ValueError, LookupError, TypeError, RecursionError):
                reason, retry = "the reply is not a chat completion", False
            if not retry or attempt == TRIES:
                break
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        raise Problem(
            bad_param(
                "score.judge_url",
                f"{self.url}: {reason}. All verdicts so far are kept. Correct the URL, or the API key in the environment "
                f"variable {KEY}, and run dvc repro again; '' turns the judge off",
            )
        )


def _read_reply(request: urllib.request.Request) -> tuple[int | None, bytes]:
    """The body of the reply, and its status if that is an error. Raises OSError and http.client.HTTPException."""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            body: bytes = reply.read(MAX_REPLY_BYTES + 1)
    except urllib.error.HTTPError as error:
        return error.code, error.read(2000)
    if len(body) > MAX_REPLY_BYTES:
        raise ValueError
    return None, body


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What `function` returns or raises; TimeoutError if it takes longer.

    The timeout of a socket begins anew with each byte: an endpoint that drips bytes would be read for days. So the reply is
    read in a thread that is left behind; it does not keep the process alive.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no complete reply within {seconds:g} s")
    return results[0]


def _verdict(reply: str) -> str | None:
    """A, B or TIE, as the first or the last line behind the thinking says; None if neither does."""
    lines = [line.strip(" *#_`\"'[]().") for line in split_thinking(reply).answer.splitlines()]
    lines = [line for line in lines if line]
    for line in lines[:1] + lines[-1:]:
        match = VERDICT.match(line)
        rest = line[match.end() :].lstrip(" *") if match else ""
        if match and (not rest or rest[0] in ":.,;-–—([" or rest.startswith("is ")):
            return match[1].upper()
    return None
