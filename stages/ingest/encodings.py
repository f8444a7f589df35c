"""Which encoding a file of text has: named by a byte order mark, certain from its first bytes, or neither.

Everything behind this module is UTF-8: a file in UTF-16, UTF-32 or GB18030 is converted as it is read, if the encoding is
certain. Where it is only likely, nothing is converted, since the wrong guess would give other text without any error.
"""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
"""The byte order marks of Unicode (The Unicode Standard, 23.8), and the one that GB18030 has for U+FEFF."""
WIDE = (
    ("utf-32-le", re.compile(rb"[^\0]\0\0\0")),
    ("utf-32-be", re.compile(rb"\0\0\0[^\0]")),
    ("utf-16-le", re.compile(rb"[^\0]\0")),
    ("utf-16-be", re.compile(rb"\0[^\0]")),
)
"""How a text begins whose first character is ASCII: with the zeros of the wider encodings (RFC 4627, section 3)."""
COMMON_HAN = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
"""Chinese characters and punctuation; most of what is not ASCII in a Chinese text."""
MIN_HAN = 10
"""From this many Chinese characters on, an encoding is likely enough to be named."""

codecs.register_error("loratory.invalid", lambda error: ("\udcff", getattr(error, "end", 0)))


def find_encoding(head: bytes) -> tuple[str, int]:
    """The encoding of a file that begins with `head`, and the length of its byte order mark.

    It is "utf-8" where nothing else is certain.
    """
    for mark, name in MARKS:
        if head.startswith(mark):
            return name, len(mark)
    for name, start in WIDE:
        if start.match(head) and _decodes(head, name):
            return name, 0
    return "utf-8", 0


def guess_other_encoding(head: bytes) -> str:
    """The name that iconv has for the encoding that a text which is not UTF-8 is likely in; "" if none is likely."""
    if find_encoding(head) != ("utf-8", 0):
        return ""
    errors = codecs.getincrementaldecoder("utf-8")("replace").decode(head).count("\ufffd")
    if not errors:
        return ""
    if b"\0" in head:
        return next((name.upper() for name in ("utf-16-le", "utf-16-be") if _is_chinese(head, name)), "")
    # In UTF-8 with a few damaged characters, the sound ones are many more.
    if errors < MIN_HAN or len(COMMON_HAN.findall(head.decode("utf-8", "ignore"))) > errors:
        return ""
    return next((name.upper() for name in ("gb18030", "big5") if _is_chinese(head, name)), "")


def to_utf8(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The same text in UTF-8. Each place that cannot be decoded becomes the byte FF, so that its row is rejected."""
    decode = codecs.getincrementaldecoder(encoding)("loratory.invalid").decode
    for chunk, last in itertools.chain(((chunk, False) for chunk in chunks), [(b"", True)]):
        if text := decode(chunk, last):
            yield text.encode("utf-8", "surrogateescape")


def _decodes(head: bytes, encoding: str) -> bool:
    """Whether `head`, which may end within a character, is text in this encoding."""
    try:
        return "\0" not in codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False


def _is_chinese(head: bytes, encoding: str) -> bool:
    if not _decodes(head, encoding):
        return False
    text = codecs.getincrementaldecoder(encoding)().decode(head)
    other = sum(not character.isascii() for character in text)
    return len(COMMON_HAN.findall(text)) >= max(MIN_HAN, 0.9 * other)
