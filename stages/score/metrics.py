"""The metrics of one answer against its reference, each between 0 and 1."""

import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jieba
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from stages.score.calls import Call, compare_calls
from stages.score.thinking import SplitAnswer

jieba.setLogLevel(logging.WARNING)
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+")
NGRAM = 4
"""Length in tokens of the n-grams that `repetition` counts."""

METRICS = {
    "exact_match": "the answer equals the reference, apart from leading and trailing white space",
    "valid_json": "the answer is a JSON object; only for rows whose reference is one",
    "json_field_f1": "F1 over the top-level fields of the object, each with its value",
    "call_decision": "the answer calls a tool exactly if the reference does; only for rows with tools",
    "call_names": "right names of called tools; only for rows whose reference calls one",
    "call_arguments_f1": "F1 over the arguments of all calls, each with its value",
    "call_exact": "all calls have the right names and arguments, in any order",
    "chrf": "chrF (Popović 2015), computed by sacrebleu",
    "bleu": "sentence BLEU (Papineni et al. 2002), smoothed, computed by sacrebleu; Chinese by characters",
    "rouge_1": "ROUGE-1 F1 (Lin 2004); Chinese by characters",
    "rouge_2": "ROUGE-2 F1; Chinese by characters",
    "rouge_l": "ROUGE-L F1; Chinese by characters",
    "rouge_l_words": "ROUGE-L F1 of Chinese answers by words, segmented by jieba",
    "distinct_2": "unique token bigrams as a share of all bigrams of the answer (Li et al. 2016)",
    "repetition": f"share of the answer's {NGRAM}-grams that repeat an earlier one",
    "stopped": "the model ended the answer itself, before generate.max_new_tokens",
    "empty": "the answer is empty, apart from its thinking",
    "thinking": "the model thinks before its answer; all other metrics look at what stands behind the thinking",
    "thinking_cut": "the thinking never ends, so there is no answer",
}
"""Name and meaning, in the order of the report. Higher is better, except for `repetition`, `empty` and `thinking_cut`;
`stopped` and `thinking` say nothing about the quality."""
HEADLINE = ("exact_match", "valid_json", "json_field_f1", "call_exact", "call_arguments_f1", "chrf")
"""The metrics in the printed table and in the plot; the report has all of them."""

RowScores = dict[str, float | None]
"""Metric → the score of one answer; None where the metric does not apply to the row."""


def score_answer(
    reference: str,
    answer: str,
    *,
    finish_reason: str | None,
    calls: tuple[Sequence[Call], Sequence[Call]] | None = None,
    thinking: SplitAnswer | None = None,
) -> RowScores:
    """All of `METRICS` for one answer. An empty answer scores 0 in each metric where higher is better, except `stopped`.

    Args:
        reference: Without its thinking.
        answer: Without its thinking.
        finish_reason: "stop" or "length"; None for a baseline, which does not generate.
        calls: Those of the reference and of the answer; None if the row has no tools, or they cannot be read.
        thinking: The whole answer; None for a baseline, and in a run without any thinking.
    """
    wanted_calls, found_calls = calls or ((), ())
    call_scores = compare_calls(wanted_calls, found_calls) if wanted_calls else None
    wanted, found = _json(reference), _json(answer)
    chinese = is_chinese(reference)
    tokens = split(answer)
    rouge = {name: score.fmeasure for name, score in _rouge().score(reference, answer).items()}
    return {
        "exact_match": float(answer.strip() == reference.strip()),
        "valid_json": None if wanted is None else float(found is not None),
        "json_field_f1": None if wanted is None else _field_f1(wanted, found),
        "call_decision": None if calls is None else float(bool(wanted_calls) == bool(found_calls)),
        "call_names": call_scores and call_scores.names,
        "call_arguments_f1": call_scores and call_scores.arguments_f1,
        "call_exact": call_scores and call_scores.exact,
        "chrf": CHRF().sentence_score(answer, [reference]).score / 100,
        "bleu": _bleu(chinese).sentence_score(answer, [reference]).score / 100,
        "rouge_1": rouge["rouge1"],
        "rouge_2": rouge["rouge2"],
        "rouge_l": rouge["rougeL"],
        "rouge_l_words": _rouge_words().score(reference, answer)["rougeL"].fmeasure if chinese else None,
        "distinct_2": _distinct(tokens, 2),
        "repetition": 1 - _distinct(tokens, NGRAM) if len(tokens) >= NGRAM else 0.0,
        "stopped": None if finish_reason is None else float(finish_reason == "stop"),
        "empty": float(not answer.strip()),
        "thinking": thinking and float(bool(thinking.thinking)),
        "thinking_cut": thinking and float(thinking.cut),
    }


def no_scores() -> RowScores:
    """The scores of a system that has no answer to a row."""
    return dict.fromkeys(METRICS)


def bleu_signature(references: list[str]) -> str:
    """sacrebleu's signature for `bleu`, its version and settings: tok:zh if any of the references is Chinese."""
    metric = _bleu(any(map(is_chinese, references)))
    metric.sentence_score("a", ["a"])
    return str(metric.get_signature())


def is_chinese(text: str) -> bool:
    """Whether the text has a Chinese character."""
    return CJK.search(text) is not None


def split(text: str) -> list[str]:
    """The tokens that the metrics compare: words of letters and digits, and single Chinese characters, in lower case."""
    return TOKEN.findall(text.lower())


class _Characters:
    """A tokenizer for RougeScorer, whose default tokenizer drops everything but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return split(text)


class _Words:
    """The same, with Chinese split into words."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in jieba.lcut(text.lower()) if TOKEN.search(word)]


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
    """F1 over the top-level fields; a field counts as found if its value is equal too."""
    pairs = [{(key, json.dumps(value, sort_keys=True)) for key, value in each.items()} for each in (wanted, found or {})]
    return 2 * len(pairs[0] & pairs[1]) / max(1, len(pairs[0]) + len(pairs[1]))


def _distinct(tokens: list[str], size: int) -> float:
    """Unique n-grams as a share of all n-grams of length `size`; 1 for a text too short to have one, 0 for an empty text."""
    ngrams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else float(bool(tokens))
