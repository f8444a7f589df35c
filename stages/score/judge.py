"""A model as a judge of two answers, asked over an OpenAI-compatible endpoint; off unless params.yaml names one.

Each pair is asked twice, in both orders, because judges favour a place; only a verdict that is the same both times counts as
a win. What the endpoint said is kept by the content of the question, so the same question is asked once.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.core.jsonl import read_json, write_json
from stages.core.output import fresh_file
from stages.core.problem import Problem

TRIES, FIRST_WAIT_S, TIMEOUT_S = 5, 1.0, 120
KEY = "JUDGE_API_KEY"
"""The environment variable with the endpoint's key, if it wants one."""
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


class Judge:
    """An endpoint's verdicts, kept in `.checkpoints/judge` below DVC_ROOT."""

    def __init__(self, url: str, model: str) -> None:
        """`url` is the endpoint's root, as http://localhost:8000/v1."""
        self.url, self.model = url.rstrip("/"), model
        self.kept = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / "judge"

    def compare(self, question: str, reference: str, one: str, other: str) -> float:
        """1 if `other` is better in both orders, 0 if `one` is, 0.5 otherwise. Raises Problem."""
        if one == other:
            return 0.5
        verdicts = []
        for a, b, wins in ((one, other, "B"), (other, one, "A")):
            said = self._ask(QUESTION.format(question=question, reference=reference, a=a, b=b))
            verdicts.append(0.5 if said == "TIE" else float(said == wins))
        return verdicts[0] if verdicts[0] == verdicts[1] else 0.5

    def _ask(self, text: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        name = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        path = self.kept / f"{name}.json"
        if path.exists():
            return str(read_json(path))
        verdict = _verdict(self._post(body))
        with fresh_file(path) as file:
            write_json(file, verdict)
        return verdict

    def _post(self, body: dict[str, Any]) -> str:
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if os.environ.get(KEY):
            request.add_header("Authorization", f"Bearer {os.environ[KEY]}")
        for tried in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                again = error.code == 429 or error.code >= 500
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why, again = str(getattr(error, "reason", error)), True
            except (ValueError, LookupError, TypeError):
                why, again = "its reply is no chat completion", False
            if not again or tried == TRIES:
                break
            time.sleep(FIRST_WAIT_S * 2 ** (tried - 1))
        raise Problem(
            f"params.yaml: score.judge_url: {self.url}: {why}. What was judged so far is kept; correct it and run dvc repro "
            f"again ({KEY} is the variable for a key), or leave judge_url empty"
        )


def _verdict(reply: str) -> str:
    """A, B or TIE; a reply that is neither counts as a tie."""
    words = reply.strip().strip(".*\"'[]").upper().split()
    return words[0].strip(".*\"'[]:,") if words and words[0].strip(".*\"'[]:,") in ("A", "B") else "TIE"


def judge_rows(judge: Judge, rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each row of `score`, how the fine-tuned model's answer stands against the base's."""
    return [
        judge.compare(row["question"], row["reference"], row["answers"]["base"], row["answers"]["merged"]) for row in rows
    ]
