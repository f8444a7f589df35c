"""The tokenizer: text to tokens that know which characters they stand for, whichever kind of tokenizer it is."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.core.jsonl import read_json
from stages.encode.mask import Span, SpecialTokens, token_range

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_START = "\u2581"
"""SentencePiece writes a space so."""


Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

CHECKED_AT_FIRST, CHECKED_THEN_EVERY = 200, 50
"""Texts of a process that go through both tokenizers: so many at first, then one in so many."""


CACHED_CHARACTERS = 1 << 24
"""The quick engine remembers every word that it has seen; after so much text a new one takes its place."""


class Encoded(NamedTuple):
    """A text's tokens (tokens,), and the tokens [first, last) of a span of its characters."""

    ids: Ids
    range_of: Callable[[Span], tuple[int, int]]


class EngineDiffersError(Exception):
    """The quick engine gave other tokens than the tokenizer; what it has made must not be used."""


class Encoder:
    """A tokenizer from a folder, fast or slow.

    For byte-level BPE (GPT-2's kind: Llama 3, Qwen, SmolLM, ...) the tokens are counted in bytes instead of asked for their
    offsets, and `fastokens`, where it is installed, makes them several times as fast as `tokenizers`. That both give the
    same tokens is checked on part of the texts, always on the first.
    """

    def __init__(self, folder: Path, *, use_engine: bool = True) -> None:
        logging.set_verbosity_error()  # it warns of rows longer than the model's context, which are counted by encode
        # fetch brings code along only where params.yaml trusts it.
        trust = "auto_map" in read_json(folder / "config.json")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special = SpecialTokens([*self.tokenizer.all_special_tokens, *added])
        # Some tokenizers put a BOS before every text; then the model expects one.
        self.bos_id = self.tokenizer.bos_token_id
        begins = self.bos_id is not None and self.tokenizer("")["input_ids"][:1] == [self.bos_id]
        self.bos_ids = [self.bos_id] if begins else []
        self.unk_id = self.tokenizer.unk_token_id
        self._fast: Any = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None
        self._plain: Any = None
        self._bytes = _bytes_of_tokens(self._fast) if self._fast is not None else None
        self._use_engine = use_engine and self._bytes is not None
        self._engine: Any = None
        self._seen = self._cached = 0

    @property
    def template_variables(self) -> dict[str, Any]:
        """The special tokens by name, as chat templates use them."""
        variables: dict[str, Any] = self.tokenizer.special_tokens_map
        return variables

    def id_of(self, token: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the tokens, special ones included, nothing tidied."""
        return str(
            self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """The tokens of each text, without any that a tokenizer would put around it.

        Raises EngineDiffersError if the quick engine is found to give others than the tokenizer.
        """
        if not texts:
            return []
        if self._fast is None:
            return [self._encode_slow(text) for text in texts]
        if self._bytes is not None:
            return self._encode_bytes(list(texts), self._bytes)
        return [self._encode_offsets(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """The tokens of one text."""
        ids: list[int] = self.encode_batch([text])[0].ids.tolist()
        return ids

    def _encode_bytes(self, texts: list[str], bytes_of: Ids) -> list[Encoded]:
        """Byte-level BPE: a token is some bytes, and all tokens are the text, so counting tells where each one is."""
        ids, bounds = self._flat(texts)
        ends = np.cumsum(bytes_of[ids], dtype=np.int64)
        encoded = []
        for number, text in enumerate(texts):
            row = slice(int(bounds[number]), int(bounds[number + 1]))
            before = int(ends[row.start - 1]) if row.start else 0
            size = len(text) if text.isascii() else len(text.encode())
            if row.stop > row.start and int(ends[row.stop - 1]) - before == size:
                encoded.append(Encoded(ids[row], _ByteRange(text, ends[row], before)))
            else:  # a tokenizer that changes the text before it cuts it
                encoded.append(self._encode_offsets(text))
        return encoded

    def _flat(self, texts: list[str]) -> tuple[Ids, Any]:
        """The tokens of all texts end to end, and where each text's begin (texts + 1,)."""
        if self._use_engine and (self._engine is None or self._cached > CACHED_CHARACTERS):
            self._engine, self._cached = _load_engine(self._fast), 0
            self._use_engine = self._engine is not None
        if not self._use_engine:
            lists = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
            bounds = np.cumsum([0, *map(len, lists)])
            return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(bounds[-1])), bounds
        self._cached += sum(map(len, texts))
        flat, places = self._engine.encode_batch_flat(texts, add_special_tokens=False)
        ids, bounds = np.frombuffer(flat, np.uint32).astype(np.int32), np.frombuffer(places, np.uint64)
        self._check(texts, ids, bounds)
        return ids, bounds

    def _check(self, texts: list[str], ids: Ids, bounds: Any) -> None:
        seen, self._seen = self._seen, self._seen + len(texts)
        chosen = [n for n in range(len(texts)) if seen + n < CHECKED_AT_FIRST or (seen + n) % CHECKED_THEN_EVERY == 0]
        wanted = self._fast.encode_batch_fast([texts[number] for number in chosen], add_special_tokens=False)
        for number, encoding in zip(chosen, wanted, strict=True):
            if ids[int(bounds[number]) : int(bounds[number + 1])].tolist() != encoding.ids:
                raise EngineDiffersError(texts[number][:80])

    def _encode_offsets(self, text: str) -> Encoded:
        encoding = self._fast.encode(text, add_special_tokens=False)
        return Encoded(np.array(encoding.ids, dtype=np.int32), partial(token_range, offsets=encoding.offsets))

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> Encoded:
        """The tokens of a text in pieces, each with whether special tokens in it are meant.

        For the rare row in which a user wrote a special token: there it stays text.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for text, meant in pieces:
            new = self.encode(text) if meant else self._encode_plain(text)
            ids += new
            # Tokens of one piece are told apart no further: no answer begins or ends within one.
            offsets += [(at, at + len(text))] * len(new)
            at += len(text)
        return Encoded(np.array(ids, dtype=np.int32), partial(token_range, offsets=offsets))

    def _encode_plain(self, text: str) -> list[int]:
        """The tokens of a text in which a special token is only its letters."""
        if self._fast is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if self._plain is None:
            self._plain = type(self._fast).from_str(self._fast.to_str())
            self._plain.encode_special_tokens = True
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def _encode_slow(self, text: str) -> Encoded:
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        offsets = align(text, self.tokenizer.convert_ids_to_tokens(ids))
        return Encoded(np.array(ids, dtype=np.int32), partial(token_range, offsets=offsets))


class _ByteRange:
    """The tokens of a span, found by the bytes before and in it."""

    def __init__(self, text: str, ends: Any, before: int) -> None:
        self._text, self._ends, self._before = text, ends, before

    def __call__(self, span: Span) -> tuple[int, int]:
        start = self._before + len(self._text[: span.start].encode())
        end = start + len(self._text[span.start : span.end].encode())
        first = int(np.searchsorted(self._ends, start, side="right"))
        return first, int(np.searchsorted(self._ends, end, side="left")) + 1 if end > start else first


def _bytes_of_tokens(fast: Any) -> Ids | None:
    """How many bytes each token stands for, by id; None if the tokenizer is no byte-level BPE that keeps every byte."""
    made = json.loads(fast.to_str())
    pre = made.get("pre_tokenizer") or {}
    steps = [step["type"] for step in pre.get("pretokenizers", [pre]) if "type" in step]
    if made["model"].get("type") != "BPE" or made.get("normalizer") or "ByteLevel" not in steps:
        return None
    if any(step.get("add_prefix_space") for step in pre.get("pretokenizers", [pre])):
        return None
    vocabulary = fast.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, number in vocabulary.items():
        sizes[number] = len(token)  # in the byte-level alphabet a byte is written as one character
    for added in made.get("added_tokens", []):
        if added["lstrip"] or added["rstrip"]:
            return None
        sizes[added["id"]] = len(added["content"].encode())
    return sizes


def _load_engine(fast: Any) -> Any:
    try:
        import fastokens

        return fastokens.Tokenizer.from_json_str(fast.to_str())
    except (ImportError, ValueError, RuntimeError):
        return None


def align(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The characters [start, end) of each token of a SentencePiece tokenizer that gives no offsets itself.

    Tokens are the text in pieces: a space is written ▁, one may be put before the first word of the text or after a special
    token, and a character outside the vocabulary is its bytes (<0xE4>), or one unknown token.

    Raises:
        ValueError: If the tokens are not the text in pieces.
    """
    offsets: list[tuple[int, int]] = []
    at = 0
    pending = b""
    for number, token in enumerate(tokens):
        byte = BYTE.fullmatch(token)
        if byte:
            pending += bytes([int(byte[1], 16)])
            try:
                character = pending.decode()
            except UnicodeDecodeError:
                offsets.append((at, at + 1))
                continue
            offsets.append((at, at + len(character)))
            at, pending = at + len(character), b""
            continue
        written = token.replace(WORD_START, " ")
        if not text.startswith(written, at) and written.startswith(" ") and text.startswith(written[1:], at):
            written = written[1:]
        if text.startswith(written, at):
            offsets.append((at, at + len(written)))
        else:
            following = tokens[number + 1].replace(WORD_START, " ") if number + 1 < len(tokens) else ""
            end = text.find(following, at) if following else len(text)
            if end <= at or "�" in text[at:end] or end - at > 64:
                raise ValueError(f"token {number + 1}, {token!r}, is not the text at character {at + 1}")
            offsets.append((at, end))  # an unknown token stands for what lies before the next one
            at = end
            continue
        at += len(written)
    return offsets
