"""What can be said of one answer beside the right one, each between 0 and 1."""

import json
import logging
import re
from functools import lru_cache
from typing import Any

import jieba
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

jieba.setLogLevel(logging.WARNING)
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
PIECE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+")
NGRAM = 4
"""Tokens in a row whose return within an answer counts as repetition."""

METRICS = {
    "exact_match": "the answer is the right one, but for white space at its ends",
    "valid_json": "the answer is a JSON object, where the right one is",
    "json_field_f1": "F1 over the object's fields with their values",
    "chrf": "chrF (Popović 2015), sacrebleu's",
    "bleu": "BLEU of the row (Papineni et al. 2002), sacrebleu's, smoothed; Chinese by characters",
    "rouge_1": "ROUGE-1 F1 (Lin 2004); Chinese by characters",
    "rouge_2": "ROUGE-2 F1; Chinese by characters",
    "rouge_l": "ROUGE-L F1; Chinese by characters",
    "rouge_l_words": "ROUGE-L F1 of Chinese answers by words (jieba's)",
    "distinct_2": "share of the answer's token pairs that are different ones (Li et al. 2016)",
    "repetition": f"share of its runs of {NGRAM} tokens that stood in it before",
    "stopped": "the model ended the answer itself, and was not cut at generate.max_new_tokens",
    "empty": "there is no answer",
}
"""Name and meaning, in the order of the report. Of the last three less is better, or it says nothing of quality."""


def score_answer(reference: str, answer: str, finish_reason: str | None) -> dict[str, float | None]:
    """Each of `METRICS`; None where one says nothing of such a reference. An empty answer has 0 where more is better.

    Args:
        finish_reason: "stop" or "length", None if no model gave the answer.
    """
    wanted, found = _json(reference), _json(answer)
    chinese = is_chinese(reference)
    pieces = split(answer)
    rouge = {name: score.fmeasure for name, score in _rouge().score(reference, answer).items()}
    return {
        "exact_match": float(answer.strip() == reference.strip()),
        "valid_json": None if wanted is None else float(found is not None),
        "json_field_f1": None if wanted is None else _field_f1(wanted, found),
        "chrf": CHRF().sentence_score(answer, [reference]).score / 100,
        "bleu": _bleu(chinese).sentence_score(answer, [reference]).score / 100,
        "rouge_1": rouge["rouge1"],
        "rouge_2": rouge["rouge2"],
        "rouge_l": rouge["rougeL"],
        "rouge_l_words": _rouge_words().score(reference, answer)["rougeL"].fmeasure if chinese else None,
        "distinct_2": _distinct(pieces, 2),
        "repetition": 1 - _distinct(pieces, NGRAM) if len(pieces) >= NGRAM else 0.0,
        "stopped": None if finish_reason is None else float(finish_reason == "stop"),
        "empty": float(not answer.strip()),
    }


def bleu_signature(references: list[str]) -> str:
    """sacrebleu's signature of what `bleu` is over these rows."""
    metric = _bleu(any(map(is_chinese, references)))
    metric.sentence_score("a", ["a"])
    return str(metric.get_signature())


def is_chinese(text: str) -> bool:
    """Whether a text has Chinese characters in it."""
    return CJK.search(text) is not None


def split(text: str) -> list[str]:
    """Tokens to compare by: words of letters and digits, and each Chinese character for itself."""
    return PIECE.findall(text.lower())


class _Characters:
    """For RougeScorer, whose own tokenizer knows only Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        return split(text)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return [word for word in jieba.lcut(text.lower()) if PIECE.search(word)]


@lru_cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Characters())


@lru_cache
def _rouge_words() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_Words())


@lru_cache
def _bleu(chinese: bool) -> BLEU:
    return BLEU(tokenize="zh" if chinese else "13a", effective_order=True)


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _field_f1(wanted: dict[str, Any], found: dict[str, Any] | None) -> float:
    """Harmonic mean of precision and recall over the top-level fields with their values."""
    pairs = [{(key, json.dumps(value, sort_keys=True)) for key, value in each.items()} for each in (wanted, found or {})]
    return 2 * len(pairs[0] & pairs[1]) / max(1, len(pairs[0]) + len(pairs[1]))


def _distinct(pieces: list[str], size: int) -> float:
    runs = [tuple(pieces[at : at + size]) for at in range(len(pieces) - size + 1)]
    return len(set(runs)) / len(runs) if runs else float(bool(pieces))
