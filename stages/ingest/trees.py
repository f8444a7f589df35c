"""Reads OpenAssistant's trees of messages: a prompt, its replies, their replies.

One conversation of a tree is read, its best-ranked path: at each message the reply that people ranked first. Replies beside
it were ranked worse, and training on them would teach what people liked less. They are counted as unread replies.
"""

from typing import Any

from stages.core.problem import Rejection
from stages.ingest.row import Row, text_of
from stages.ingest.tools import Message
from stages.ingest.turns import read_answer

TREE_ROLES = ("prompter", "assistant")
READ = frozenset(("text", "role", "replies", "rank", "deleted"))
KNOWN = frozenset(
    (
        *READ, "parent_id", "review_count", "review_result", "synthetic", "emojis", "labels", "detoxify",
        "events", "review_state", "message_tree_id", "tree_state", "deleted",
    )
)  # fmt: skip
"""Fields of a message that are read, or describe how it was reviewed."""


def is_tree(row: Row) -> bool:
    """Whether the prompt is a message of a tree."""
    tree = row.get("tree")
    return isinstance(tree, dict) and "replies" in tree and "text" in tree


def read_tree(row: Row) -> list[Message]:
    """The best-ranked path of a tree, up to the last answer on it."""
    messages: list[Message] = []
    where, node = row.field("tree"), row.get("tree")
    if node is None:
        raise Rejection("missing_field", where)
    while node is not None:
        if not isinstance(node, dict):
            raise Rejection("wrong_type", f"{where}: wanted an object with text, role and replies")
        role = node.get("role")
        if role not in TREE_ROLES:
            raise Rejection("unknown_role", f"{where}.role: {role!r}")
        row.books(node, KNOWN, where)
        text = text_of(node, "text", where=f"{where}.")
        messages.append(read_answer(text, f"{where}.text") if role == "assistant" else {"role": "user", "content": text})
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise Rejection("wrong_type", f"{where}.replies: wanted a list of objects")
        best, others = _best(replies)
        below = f"{row.field('tree')}.replies[]"
        if others:
            row.unread.append(f"{below} (not ranked first)")
        node, where = best, below
    if messages[-1]["role"] == "user" and len(messages) > 1:
        row.unread.append(f"{where} (a question without a reply)")
        messages.pop()
    return messages


def refuse_message(_: Row) -> list[Message]:
    """Rejects a row of OpenAssistant's flat files, each of which is one message of a tree."""
    raise Rejection(
        "unknown_format",
        "one message of OpenAssistant's trees, not a conversation; use the file of trees that is published beside it "
        "(…trees.jsonl.gz)",
    )


def _best(replies: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, int]:
    """The reply that is ranked first, and the number of the others. Of unranked ones: that with the most turns below."""
    alive = [reply for reply in replies if not reply.get("deleted")]
    if not alive:
        return None, len(replies)
    best = min(alive, key=lambda reply: (_rank(reply), -_depth(reply)))
    return best, len(replies) - 1


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")


def _depth(reply: dict[str, Any]) -> int:
    """The number of messages of the longest conversation below a reply; counted level by level, since a tree may be deep."""
    depth, level = 0, [reply]
    while level:
        depth += 1
        level = [
            below
            for message in level
            for below in (message.get("replies") if isinstance(message.get("replies"), list) else None) or []
            if isinstance(below, dict) and not below.get("deleted")
        ]
    return depth
