"""The HTML page that shows which text of some training rows is in the loss, and why. In English and Chinese."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import jinja2

from stages.encode.pieces import Kind, Piece, Why
from stages.encode.previews import Preview

PAGE = Path(__file__).with_name("masks.html.jinja")
ROWS_SHOWN = 3
"""Rows of one conversation that are shown, if it became several."""

Words: TypeAlias = tuple[str, str]
"""The same in English and in Chinese."""

KIND_WORDS: Mapping[Kind, Words] = {
    "system": ("system prompt", "系统提示"),
    "user": ("user", "用户"),
    "tool": ("tool result", "工具结果"),
    "reasoning": ("reasoning", "思考"),
    "answer": ("answer", "回答"),
    "call": ("tool call", "工具调用"),
    "stop": ("stop token", "停止符"),
    "text": ("raw text", "纯文本"),
    "template": ("written by the template", "模板文字"),
    "cut": ("cut off", "已截去"),
}
WHY_WORDS: Mapping[Why, Words] = {
    "trained": ("in the loss", "计入损失"),
    "prompt": ("prompt, not in the loss", "提示，不计入损失"),
    "context": ("earlier answer, here only context", "之前的回答，此处只作上文"),
    "untrained": ('"train": false, not in the loss', '"train": false，不计入损失'),
    "left_out": ("left out of the loss by encode.thinking", "按 encode.thinking 不计入损失"),
    "removed": ("longer than encode.max_length", "超过 encode.max_length"),
}
ROW_WORDS: Mapping[str, Words] = {
    "text": ("raw text", "纯文本"),
    "thinking": ("reasoning", "思考"),
    "tools": ("tools", "工具"),
    "turns": ("several turns", "多轮对话"),
    "per_answer": ("one row per answer", "每个回答一行"),
    "untrained": ('"train": false', ""),
    "cut": ("truncated", "有截断"),
    "special_text": ("text of a special token", "含特殊符号文字"),
}
"""The kinds of Preview; a format that is missing here stands under its own name."""


def render_masks_page(shown: Sequence[tuple[Preview, Sequence[Sequence[Piece]]]]) -> str:
    """The page as HTML.

    Args:
        shown: Conversations, each with the pieces of its rows.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    conversations = [
        {
            "source": preview.rows[0].source,
            "kinds": [ROW_WORDS.get(kind, (kind, "")) for kind in preview.kinds if kind],
            "rows": list(zip(preview.rows, rows, strict=True))[:ROWS_SHOWN],
            "hidden": max(0, len(rows) - ROWS_SHOWN),
        }
        for preview, rows in shown
    ]
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return page.render(conversations=conversations, kinds=KIND_WORDS, whys=WHY_WORDS)
