"""The tokenizer: text to tokens whose positions in the text are known, for fast and slow tokenizers."""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.core.jsonl import read_json
from stages.core.problem import Problem
from stages.encode.mask import SpecialTokens, token_range

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_START = "\u2581"
"""SentencePiece writes this character for a space."""

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

CHECKED_TEXTS, CHECK_INTERVAL = 200, 50
"""fastokens is compared with the tokenizer on the first texts of each process, and then on one text per interval."""

CACHED_CHARACTERS = 1 << 24
"""fastokens caches every word. After this many characters it is loaded again, so that its cache does not fill the memory."""


class EncodedText(NamedTuple):
    """A text's tokens (tokens,), and a function that gives the tokens [start, end) of some of its characters [start, end).

    The function raises ValueError if the tokens cannot be located because the tokenizer changes the text.
    """

    ids: Ids
    token_range: Callable[[int, int], tuple[int, int]]


class FastTokenizerMismatch(Exception):
    """fastokens and the tokenizer gave different tokens for a text; nothing that fastokens has tokenized may be used."""


class Encoder:
    """A tokenizer from a folder, fast or slow.

    For byte-level BPE (as in GPT-2, Llama 3, Qwen, SmolLM) a token's position follows from counting bytes, without the
    tokenizer's offsets, and `fastokens` tokenizes several times as fast as `tokenizers`. Some of the texts, always
    including the first ones, are tokenized with both to check that the tokens are the same. With Qwen's NFC normalizer this
    holds for texts that are in NFC already, as nearly all are; the others are located by the tokenizer's offsets.
    """

    def __init__(self, folder: Path, *, use_fastokens: bool = True) -> None:
        """Raises Problem if Transformers cannot load the tokenizer."""
        logging.set_verbosity_error()  # It warns of rows longer than the model's context, which `encode` checks itself.
        try:
            # fetch downloads code only if params.yaml trusts it.
            trust = "auto_map" in read_json(folder / "config.json")
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise Problem(
                f"{folder}: Transformers cannot load this tokenizer: {reason}; check the model in the fetch section of "
                "params.yaml"
            ) from None
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special = SpecialTokens([*self.tokenizer.all_special_tokens, *added])
        # If the tokenizer puts a BOS before every text, the model expects one.
        self.bos_id = self.tokenizer.bos_token_id
        adds_bos = self.bos_id is not None and self.tokenizer("")["input_ids"][:1] == [self.bos_id]
        self.bos_ids = [self.bos_id] if adds_bos else []
        self.unk_id = self.tokenizer.unk_token_id
        self._backend: Any = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None
        self._plain_backend: Any = None
        settings = json.loads(self._backend.to_str()) if self._backend is not None else {}
        self._token_bytes = _bytes_of_tokens(self._backend, settings) if self._backend is not None else None
        self._normalizes = bool(settings.get("normalizer"))
        self._fastokens: Any = None
        self.fastokens_error = ""
        """Why fastokens is not used although it should be, "" otherwise."""
        self._checked = self._cached = 0
        if use_fastokens and self._token_bytes is not None:
            try:
                self._fastokens = load_fastokens(self._backend)
            except (ImportError, ValueError, RuntimeError) as error:
                self.fastokens_error = str(error)

    @property
    def template_variables(self) -> dict[str, Any]:
        """The special tokens by name, as chat templates use them."""
        variables: dict[str, Any] = self.tokenizer.special_tokens_map
        return variables

    def id_of(self, token: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the tokens, with special tokens and without clean-up of spaces."""
        return str(
            self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """The tokens of each text, without those that a tokenizer would add around it.

        Raises FastTokenizerMismatch if fastokens and the tokenizer give different tokens.
        """
        if not texts:
            return []
        if self._backend is None:
            return [self._encode_slow(text) for text in texts]
        if self._token_bytes is None:
            return [self._encode_with_offsets(text) for text in texts]
        changed = {n for n, text in enumerate(texts) if self._normalizes and not is_nfc(text)}
        counted = [text for n, text in enumerate(texts) if n not in changed] if changed else list(texts)
        encoded = iter(self._encode_bytes(counted, self._token_bytes))
        return [self._encode_with_offsets(text) if n in changed else next(encoded) for n, text in enumerate(texts)]

    def encode(self, text: str) -> list[int]:
        """The tokens of one text."""
        ids: list[int] = self.encode_batch([text])[0].ids.tolist()
        return ids

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> EncodedText:
        """The tokens of a text in pieces, each with whether special tokens in it are control tokens or plain text.

        For the rare row in which a user wrote the text of a special token: it must not become a control token.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for text, has_control_tokens in pieces:
            new = self.encode(text) if has_control_tokens else self._encode_plain(text)
            ids += new
            # Every token gets the range of its piece, which is enough: no range that is asked for starts or ends within one.
            offsets += [(at, at + len(text))] * len(new)
            at += len(text)
        return EncodedText(np.array(ids, dtype=np.int32), partial(token_range, offsets=offsets))

    def _encode_bytes(self, texts: list[str], token_bytes: Ids) -> list[EncodedText]:
        """For byte-level BPE: all tokens together are the bytes of the text, so counting bytes locates each token."""
        if not texts:
            return []
        ids, bounds = self._tokenize(texts)
        ends = np.cumsum(token_bytes[ids], dtype=np.int64)
        encoded = []
        for number, text in enumerate(texts):
            row = slice(int(bounds[number]), int(bounds[number + 1]))
            before = int(ends[row.start - 1]) if row.start else 0
            size = len(text) if text.isascii() else len(text.encode())
            if row.stop > row.start and int(ends[row.stop - 1]) - before == size:
                encoded.append(EncodedText(ids[row], _ByteCounter(text, ends[row], before)))
            else:  # The tokenizer changes the text before it splits it.
                encoded.append(self._encode_with_offsets(text))
        return encoded

    def _tokenize(self, texts: list[str]) -> tuple[Ids, Any]:
        """The tokens of all texts, concatenated, and where the tokens of each text start (texts + 1,)."""
        if self._fastokens is None:
            lists = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
            bounds = np.cumsum([0, *map(len, lists)])
            return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(bounds[-1])), bounds
        if self._cached > CACHED_CHARACTERS:
            self._fastokens, self._cached = load_fastokens(self._backend), 0
        self._cached += sum(map(len, texts))
        id_bytes, bound_bytes = self._fastokens.encode_batch_flat(texts, add_special_tokens=False)
        ids, bounds = np.frombuffer(id_bytes, np.uint32).astype(np.int32), np.frombuffer(bound_bytes, np.uint64)
        self._check_fastokens(texts, ids, bounds)
        return ids, bounds

    def _check_fastokens(self, texts: list[str], ids: Ids, bounds: Any) -> None:
        """Compares fastokens' tokens of part of the texts with the tokenizer's. Raises FastTokenizerMismatch."""
        before, self._checked = self._checked, self._checked + len(texts)
        chosen = [n for n in range(len(texts)) if before + n < CHECKED_TEXTS or (before + n) % CHECK_INTERVAL == 0]
        expected = self._backend.encode_batch_fast([texts[number] for number in chosen], add_special_tokens=False)
        for number, encoding in zip(chosen, expected, strict=True):
            if ids[int(bounds[number]) : int(bounds[number + 1])].tolist() != encoding.ids:
                raise FastTokenizerMismatch(texts[number][:80])

    def _encode_with_offsets(self, text: str) -> EncodedText:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return EncodedText(np.array(encoding.ids, dtype=np.int32), partial(token_range, offsets=encoding.offsets))

    def _encode_plain(self, text: str) -> list[int]:
        """The tokens of a text in which special tokens are plain text."""
        if self._backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if self._plain_backend is None:
            self._plain_backend = type(self._backend).from_str(self._backend.to_str())
            self._plain_backend.encode_special_tokens = True
        return list(self._plain_backend.encode(text, add_special_tokens=False).ids)

    def _encode_slow(self, text: str) -> EncodedText:
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))

        @cache
        def offsets() -> list[tuple[int, int]]:
            return align(text, self.tokenizer.convert_ids_to_tokens(ids))

        return EncodedText(np.array(ids, dtype=np.int32), lambda start, end: token_range(start, end, offsets()))


class _ByteCounter:
    """Finds the tokens of some characters by the number of bytes before them and in them."""

    def __init__(self, text: str, ends: Any, before: int) -> None:
        """`ends` (tokens,) are the byte positions where the tokens end; the text's first byte is at `before`."""
        self._text, self._ends, self._before = text, ends, before

    def __call__(self, start: int, end: int) -> tuple[int, int]:
        first_byte = self._before + len(self._text[:start].encode())
        end_byte = first_byte + len(self._text[start:end].encode())
        first = int(np.searchsorted(self._ends, first_byte, side="right"))
        return first, int(np.searchsorted(self._ends, end_byte, side="left")) + 1 if end_byte > first_byte else first


def load_fastokens(backend: Any) -> Any:
    """fastokens' version of a tokenizer. Raises ImportError, or ValueError or RuntimeError if it does not support it."""
    import fastokens

    return fastokens.Tokenizer.from_json_str(backend.to_str())


def is_nfc(text: str) -> bool:
    """Whether Unicode's normalization NFC leaves the text as it is."""
    return text.isascii() or unicodedata.is_normalized("NFC", text)


def _bytes_of_tokens(backend: Any, settings: Mapping[str, Any]) -> Ids | None:
    """(vocabulary,) Bytes of each token; None if the tokenizer is not a byte-level BPE, or changes texts that are in NFC.

    `settings` are those of tokenizer.json.
    """
    pre_tokenizer = settings.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    is_byte_level = "ByteLevel" in [step["type"] for step in steps if "type" in step]
    normalizer = settings.get("normalizer") or {"type": "Sequence", "normalizers": []}
    keeps_nfc = all(step["type"] == "NFC" for step in normalizer.get("normalizers", [normalizer]))
    if settings["model"].get("type") != "BPE" or not keeps_nfc or not is_byte_level:
        return None
    if any(step.get("add_prefix_space") for step in steps):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, number in vocabulary.items():
        sizes[number] = len(token)  # The byte-level alphabet writes each byte as one character.
    for added in settings.get("added_tokens", []):
        if added["lstrip"] or added["rstrip"]:
            return None
        sizes[added["id"]] = len(added["content"].encode())
    return sizes


def align(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The characters [start, end) of each token of a SentencePiece tokenizer that does not return offsets.

    The tokens are the text in pieces: a space is written ▁, one may be added before the first word of the text or after a
    special token, and a character outside the vocabulary becomes its bytes (<0xE4>) or one unknown token.

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
            offsets.append((at, end))  # An unknown token covers the text up to the next token.
            at = end
            continue
        at += len(written)
    return offsets
