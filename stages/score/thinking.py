"""Splits an answer into the thinking and what stands behind it."""

import re
from typing import NamedTuple

MARKS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron, MiniMax, Kimi
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
)
"""What current models write before and after their thinking."""
MESSAGE, ASSISTANT = "<|message|>", "<|start|>assistant"
MESSAGE_END = re.compile(r"<\|(?:end|eom|call|return|eot)\|>\s*$")
THOUGHT_HEADER = re.compile(r"<\|channel\|>analysis(?!.*to=)|\bto=self\b", re.DOTALL)
"""Header of a message that is thinking: gpt-oss's channel, Muse Glimmer's recipient."""
RECIPIENT = re.compile(r"\bto=(?!user\b)\S")


class SplitAnswer(NamedTuple):
    """The two parts of an answer."""

    thinking: str
    """Without its marks; "" if there is none."""
    answer: str
    """What stands behind the thinking; the whole text if there is none."""
    cut: bool = False
    """Whether the thinking never ends; `answer` is then ""."""


def split_thinking(text: str, prompt: str = "") -> SplitAnswer:
    """Splits an answer as the current models write it.

    Args:
        text: The answer with its special tokens.
        prompt: The prompt before it. Some templates open the thinking there; the answer then has only the end of it.
    """
    if MESSAGE in text and (text.lstrip().startswith("<|channel|>") or prompt.endswith(ASSISTANT)):
        return _split_messages(text)
    for opening, closing in MARKS:
        opened = prompt.rstrip().endswith(opening)
        if not opened and opening not in text and closing in text:
            opened = True  # by a prompt that is not known
        if opened or text.lstrip().startswith(opening):
            return _split_marks(text if opened else text.lstrip()[len(opening) :], opening, closing)
    return SplitAnswer("", text)


def _split_marks(text: str, opening: str, closing: str) -> SplitAnswer:
    """`text` starts inside the thinking. An answer may think several times before it begins."""
    thoughts = []
    while True:
        thinking, end, rest = text.partition(closing)
        thoughts.append(thinking.strip())
        rest = rest.lstrip()
        if not end or not rest.startswith(opening):
            return SplitAnswer("\n".join(filter(None, thoughts)), rest, cut=not end)
        text = rest[len(opening) :]


def _split_messages(text: str) -> SplitAnswer:
    """An answer in several messages, each with a header: gpt-oss's channels. Calls of tools keep their header."""
    thoughts, answers, cut = [], [], False
    for message in text.split(ASSISTANT):
        header, mark, content = message.partition(MESSAGE)
        if not mark:
            continue
        ended = MESSAGE_END.search(content)
        content = MESSAGE_END.sub("", content)
        is_thinking = THOUGHT_HEADER.search(header) is not None
        cut = is_thinking and not ended
        if is_thinking:
            thoughts.append(content.strip())
        else:
            answers.append(header + mark + content if RECIPIENT.search(header) else content)
    return SplitAnswer("\n".join(filter(None, thoughts)), "\n".join(answers), cut=cut and not answers)
