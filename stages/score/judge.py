"""An optional judge: a model behind an OpenAI-compatible endpoint compares the answers of base and fine-tuned model.

Each pair is judged twice, in both orders, because judges prefer one position (Zheng et al. 2023). An answer wins only if
both verdicts agree. Verdicts are cached by the content of the request, so that no request is sent twice.
"""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.jsonl import read_json, write_json
from stages.core.output import fresh_file
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.score.intervals import Interval, mean_interval
from stages.score.predictions import PredictedRow

TRIES, FIRST_WAIT_S, TIMEOUT_S = 5, 1.0, 120
KEY = "JUDGE_API_KEY"
"""The environment variable with the API key of the endpoint, if it needs one."""
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


def judge_rows(rows: Sequence[PredictedRow], *, url: str, model: str) -> JudgeResult:
    """Compares the two models' answers to each row. Raises Problem if the endpoint does not answer."""
    judge = Judge(url, model)
    win_rate = mean_interval(
        judge.compare(row.question, row.reference, base=row.base.answer, fine_tuned=row.merged.answer)
        for row in progress(rows, "judge", total=len(rows))
    )
    assert win_rate is not None  # there is at least one test row, and judge_rows is at least 1
    return JudgeResult(model, len(rows), win_rate)


class Judge:
    """A model behind an endpoint. Its verdicts are cached in `.checkpoints/judge` in the folder DVC_ROOT."""

    def __init__(self, url: str, model: str) -> None:
        """`url` is the root of the endpoint, as http://localhost:8000/v1."""
        self.url, self.model = url.rstrip("/"), model
        self.cache = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / "judge"

    def compare(self, question: str, reference: str, *, base: str, fine_tuned: str) -> float:
        """1 if `fine_tuned` is better in both orders, 0 if `base` is, else 0.5. Raises Problem if the endpoint fails."""
        if base == fine_tuned:
            return 0.5
        results = []
        for a, b, fine_tuned_is in ((base, fine_tuned, "B"), (fine_tuned, base, "A")):
            verdict = self._ask(QUESTION.format(question=question, reference=reference, a=a, b=b))
            results.append(0.5 if verdict == "TIE" else float(verdict == fine_tuned_is))
        return results[0] if results[0] == results[1] else 0.5

    def _ask(self, text: str) -> str:
        """The verdict on one question: A, B or TIE, from the cache if it was asked before."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        name = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        path = self.cache / f"{name}.json"
        if path.exists():
            return str(read_json(path))
        verdict = _verdict(self._post(body))
        with fresh_file(path) as file:
            write_json(file, verdict)
        return verdict

    def _post(self, body: dict[str, Any]) -> str:
        """The text of the endpoint's reply. Retries while the endpoint is busy or cannot be reached."""
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if os.environ.get(KEY):
            request.add_header("Authorization", f"Bearer {os.environ[KEY]}")
        for attempt in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                retry = error.code == 429 or error.code >= 500
            except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
                reason, retry = str(getattr(error, "reason", error)), not isinstance(error, http.client.InvalidURL)
            except (ValueError, LookupError, TypeError):
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


def _verdict(reply: str) -> str:
    """A, B or TIE; a reply that is none of them counts as a tie."""
    words = reply.strip().strip(".*\"'[]").upper().split()
    word = words[0].strip(".*\"'[]:,") if words else ""
    return word if word in ("A", "B") else "TIE"
