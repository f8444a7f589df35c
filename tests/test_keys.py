"""The books on keys: read, known to carry nothing, or counted by name; a key that changes the meaning is never lost."""

from typing import Any

import pytest

from stages.core.problem import Rejection
from stages.ingest.keys import CARRY_NOTHING, CHANGE_MEANING, is_empty, unread_keys

READ = frozenset(("role", "content"))
TURN = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("value", "where", "names"),
    [
        (TURN, "messages[3]", []),
        (TURN | {"mood": "good"}, "messages[3]", ["messages[].mood"]),
        (TURN | {"mood": "good", "score": 0, "ok": False}, "", ["mood", "score", "ok"]),
        ({"x": 1}, "messages[3].tool_calls[12]", ["messages[].tool_calls[].x"]),
        (TURN | {"id": 7, "Lang": "de", "UUID": "u", "__index_level_0__": 3, "created_at": "today"}, "", []),
        (TURN | {"mood": None, "label": None, "images": [], "tool_calls": "", "image": ""}, "", []),
        (TURN | {"function_call": {"name": None, "arguments": None}, "images": [None, {"bytes": None}]}, "", []),
        (TURN | {"weight": 1, "train": True, "loss_weight": 1.0}, "messages[1]", []),
        # Llama-Nemotron's rows say whether they reason; this is no reasoning.
        (TURN | {"reasoning": "on"}, "", ["reasoning"]),
        (TURN | {"thinking": False}, "", ["thinking"]),
    ],
)
def test_unread_keys_are_named_without_positions(value: dict[str, Any], where: str, names: list[str]) -> None:
    assert unread_keys(value, READ, where) == names


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("label", False),
        ("label", True),
        ("chosen", "a"),
        ("rejected", [{"role": "assistant", "content": "a"}]),
        ("image", "0.png"),
        ("images", ["0.png"]),
        ("videos", ["v"]),
        ("audio", {"path": "a.wav", "bytes": None}),
        ("context", "c"),
        ("reasoning_content", "r"),
        ("thinking", "r"),
        ("Complex_CoT", "r"),
        ("function_call", {"name": "f", "arguments": None}),
        ("functions", [{"name": "f"}]),
        ("tool_calls", [{"name": "f"}]),
        ("loss", 0),
        ("loss", False),
        ("loss_weight", 0.5),
        ("weight", 0),
        ("train", False),
        ("system_prompt", "s"),
        ("refusal", "no"),
    ],
)
def test_a_key_that_changes_the_meaning_rejects_the_row_by_its_name(key: str, found: Any) -> None:
    with pytest.raises(Rejection) as caught:
        unread_keys(TURN | {key: found}, READ, "messages[3]")
    assert caught.value.reason == "unread_field"
    assert caught.value.detail.startswith(f"messages[3].{key}: ")
    assert caught.value.detail.endswith(CHANGE_MEANING[key.casefold()].to_do)
    assert unread_keys(TURN | {key: found}, READ | {key}, "messages[3]") == []


def test_the_message_says_what_the_field_holds_and_what_to_do() -> None:
    with pytest.raises(Rejection) as caught:
        unread_keys({"image": "0.png"}, (), "")
    assert caught.value.detail == (
        "image: media, which a text model cannot see, is not read here; remove the field if the row is complete without it"
    )


def test_no_key_both_carries_nothing_and_changes_the_meaning() -> None:
    assert not CARRY_NOTHING & CHANGE_MEANING.keys()
    assert all(key == key.casefold() for key in (*CARRY_NOTHING, *CHANGE_MEANING))


@pytest.mark.parametrize(
    ("value", "empty"),
    [
        (None, True),
        ("", True),
        ([], True),
        ({}, True),
        ([None, {"a": [""]}], True),
        (0, False),
        (False, False),
        (" ", False),
    ],
)
def test_is_empty(value: Any, empty: bool) -> None:
    assert is_empty(value) is empty
