"""The tokenizer: text to tokens that know which characters they stand for, whichever kind of tokenizer it is."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer
from transformers.utils import logging

from stages.lib.jsonl import read_json
from stages.lib.mask import Span, token_range

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD_START = "\u2581"
"""SentencePiece writes a space so."""


class Encoded(NamedTuple):
    """A text's tokens, and the tokens [first, last) of a span of its characters."""

    ids: list[int]
    range_of: Callable[[Span], tuple[int, int]]


class Encoder:
    """A tokenizer from a folder, fast or slow."""

    def __init__(self, folder: Path) -> None:
        logging.set_verbosity_error()  # it warns of rows longer than the model's context, which are counted by encode
        # fetch brings code along only where params.yaml trusts it.
        trust = "auto_map" in read_json(folder / "config.json")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special_tokens = sorted({token for token in [*self.tokenizer.all_special_tokens, *added] if token})
        self._special = re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))) or r"(?!)")
        # Some tokenizers put a BOS before every text; then the model expects one.
        bos = self.tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []
        self.unk_id = self.tokenizer.unk_token_id
        self._fast = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None
        self._plain: Any = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """The special tokens by name, as chat templates use them."""
        variables: dict[str, Any] = self.tokenizer.special_tokens_map
        return variables

    def id_of(self, token: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included, nothing tidied."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def special_in(self, text: str) -> str | None:
        """The first special token that stands in a user's text."""
        found = self._special.search(text)
        return found[0] if found else None

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """The tokens of each text, without any that a tokenizer would put around it."""
        if self._fast is None:
            return [self._encode_slow(text) for text in texts]
        encodings = self._fast.encode_batch(texts, add_special_tokens=False)
        return [
            Encoded(encoding.ids, _RangeOf(encoding, len(text))) for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """The tokens of one text."""
        return self.encode_batch([text])[0].ids

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
        return Encoded(ids, lambda span: token_range(span, offsets))

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
        return Encoded(ids, lambda span: token_range(span, offsets))


class _RangeOf:
    """The tokens of a span, asked of the tokenizer's own table: to copy all offsets out would take longer."""

    def __init__(self, encoding: Any, length: int) -> None:
        self._encoding, self._length = encoding, length

    def __call__(self, span: Span) -> tuple[int, int]:
        encoding = self._encoding
        first = encoding.char_to_token(span.start)
        last = len(encoding) if span.end >= self._length else encoding.char_to_token(span.end)
        if first is None or last is None or span.start == span.end:  # white space that has no token
            return token_range(span, encoding.offsets)
        if span.end < self._length and encoding.token_to_chars(last)[0] < span.end:
            last += 1  # a token that the answer shares with the text behind it
        return first, last


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
