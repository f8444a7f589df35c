"""The HTML page that shows which text of the first training rows is in the loss."""

from pathlib import Path
from typing import TypeAlias

import jinja2

PAGE = Path(__file__).with_name("masks.html.jinja")

MarkedRow: TypeAlias = tuple[str, list[tuple[str, bool]]]
"""A row's id, and its text in pieces, each with whether it is in the loss."""


def render_masks_page(rows: list[MarkedRow]) -> str:
    """The page as HTML."""
    return jinja2.Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8")).render(rows=rows)
