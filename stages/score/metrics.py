"""The metrics of one answer against its reference, each between 0 and 1."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jieba
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import _UCODE_RANGES

from stages.score.calls import Call, compare_calls
from stages.score.thinking import SplitAnswer

jieba.setLogLevel(logging.WARNING)
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+")
NGRAM = 4
"""Length in tokens of the n-grams that `repetition` counts."""
BLEU_NGRAM = 4
RECENT_TEXTS = 8
"""A reference is scored against the answers of all systems in turn, so what is made of the last texts is kept."""

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
    wanted = _json(reference)
    found = None if wanted is None else _json(answer)
    chinese = is_chinese(reference)
    tokens = split(answer)
    return {
        "exact_match": float(answer.strip() == reference.strip()),
        "valid_json": None if wanted is None else float(found is not None),
        "json_field_f1": None if wanted is None else _field_f1(wanted, found),
        "call_decision": None if calls is None else float(bool(wanted_calls) == bool(found_calls)),
        "call_names": call_scores and call_scores.names,
        "call_arguments_f1": call_scores and call_scores.arguments_f1,
        "call_exact": call_scores and call_scores.exact,
        "chrf": _chrf(reference).corpus_score([answer], None).score / 100,
        "bleu": _bleu(_bleu_tokens(reference, chinese=chinese), _bleu_tokens(answer, chinese=chinese)),
        "rouge_1": _rouge_n(split(reference), tokens, 1),
        "rouge_2": _rouge_n(split(reference), tokens, 2),
        "rouge_l": _rouge_l(split(reference), tokens),
        "rouge_l_words": _rouge_l(_words(reference), _words(answer)) if chinese else None,
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


def bleu_signature(*, chinese: bool) -> str:
    """sacrebleu's signature for `bleu`, its version and settings: tok:zh if any of the references is Chinese."""
    metric = BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    metric.sentence_score("a", ["a"])
    return str(metric.get_signature())


def forget_texts() -> None:
    """Empties the caches. Those of sacrebleu's tokenizers keep 65,536 texts each: 500 MB if these have 2,000 characters."""
    for kept in (Tokenizer13a.__call__, TokenizerRegexp.__call__, split, _words, _ngrams, _chrf, _bleu_tokens):
        kept.cache_clear()


def is_chinese(text: str) -> bool:
    """Whether the text has a Chinese character."""
    return CJK.search(text) is not None


@lru_cache(RECENT_TEXTS)
def split(text: str) -> tuple[str, ...]:
    """The tokens that the metrics compare: words of letters and digits, and single Chinese characters, in lower case."""
    return tuple(TOKEN.findall(text.lower()))


@lru_cache(RECENT_TEXTS)
def _words(text: str) -> tuple[str, ...]:
    """The same, with Chinese split into words."""
    return tuple(word for word in jieba.lcut(text.lower()) if TOKEN.search(word))


def _rouge_l(wanted: Sequence[str], found: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two texts' tokens, as rouge_score has it, whose table is quadratic."""
    return _f1(LCSseq.similarity(wanted, found), len(wanted), len(found))


def _rouge_n(wanted: tuple[str, ...], found: tuple[str, ...], size: int) -> float:
    """F1 of the common n-grams of two texts' tokens."""
    return _f1(_count_shared(wanted, found, size), max(0, len(wanted) - size + 1), max(0, len(found) - size + 1))


def _count_shared(wanted: tuple[str, ...], found: tuple[str, ...], size: int) -> int:
    """The n-grams of `found` that `wanted` has too, each at most as often as there."""
    known = _ngrams(wanted, size)
    return sum(min(count, known[ngram]) for ngram, count in _ngrams(found, size).items() if ngram in known)


@lru_cache(3 * RECENT_TEXTS)  # for ROUGE and BLEU, six of each text
def _ngrams(tokens: tuple[str, ...], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[at:] for at in range(size)), strict=False))


def _f1(shared: int, wanted: int, found: int) -> float:
    """In the order of rouge_score's operations, so that the last bit is the same."""
    if not shared:
        return 0.0
    precision, recall = shared / found, shared / wanted
    return 2 * precision * recall / (precision + recall)


@lru_cache(RECENT_TEXTS)
def _chrf(reference: str) -> CHRF:
    """sacrebleu counts the n-grams of a reference once if it is given when the metric is made."""
    return CHRF(references=[[reference]])


def _bleu(wanted: tuple[str, ...], found: tuple[str, ...]) -> float:
    """sacrebleu's sentence BLEU of two texts' tokens; its own counting of the n-grams takes longer than all the rest."""
    sizes = range(1, BLEU_NGRAM + 1)
    shared = [_count_shared(wanted, found, size) for size in sizes]
    total = [max(0, len(found) - size + 1) for size in sizes]
    score = BLEU.compute_bleu(shared, total, len(found), len(wanted), smooth_method="exp", effective_order=True).score
    return float(score) / 100


@lru_cache(RECENT_TEXTS)
def _bleu_tokens(text: str, *, chinese: bool) -> tuple[str, ...]:
    """The tokens of sacrebleu's tokenizer zh or 13a.

    The tokenizer zh sets each Chinese character between spaces and splits that text as 13a does. Here only what stands
    between Chinese characters is split, which is the same and takes a third of the time.
    """
    text = text.rstrip()
    if not chinese:
        return tuple(_TOKENIZER_13A(text).split())
    pieces = BLEU_CHINESE.split(text.strip())  # other text and Chinese in turn
    last = len(pieces) - 1
    for at in range(0, len(pieces), 2):
        if pieces[at]:
            pieces[at] = _TOKENIZER_RE(f"{' ' * (at > 0)}{pieces[at]}{' ' * (at < last)}")
    for at in range(1, len(pieces), 2):
        pieces[at] = " ".join(pieces[at])
    return tuple(" ".join(pieces).split())


_TOKENIZER_13A, _TOKENIZER_RE = Tokenizer13a(), TokenizerRegexp()
# Two of sacrebleu's bounds are texts of two characters, which no single character equals.
_RANGES = [(start if len(start) == 1 else chr(ord(start[0]) + 1), end[0]) for start, end in _UCODE_RANGES]
BLEU_CHINESE = re.compile(f"([{''.join(f'{start}-{end}' for start, end in _RANGES)}]+)")
"""What sacrebleu takes for Chinese characters, wider than CJK."""


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


def _distinct(tokens: Sequence[str], size: int) -> float:
    """Unique n-grams as a share of all n-grams of length `size`; 1 for a text too short to have one, 0 for an empty text."""
    count = len(tokens) - size + 1
    return len(set(zip(*(tokens[at:] for at in range(size)), strict=False))) / count if count > 0 else float(bool(tokens))
