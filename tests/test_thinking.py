"""score: the thinking is told from the answer behind it, as current models write both."""

import pytest

from stages.score.thinking import SplitAnswer, split_thinking

ANALYSIS = "<|channel|>analysis<|message|>so"
FINAL = "<|start|>assistant<|channel|>final<|message|>yes"
CALL = " to=functions.now<|channel|>commentary json<|message|>{}"


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("yes", "", "yes"),
        (" yes\n", "", " yes\n"),
        ("<think>\nso\n</think>\n\nyes", "so", "yes"),
        ("\n<think>so</think>yes", "so", "yes"),
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("so\n</think>\n\nyes", "so", "yes"),
        ("<think>a</think><think>b</think>yes", "a\nb", "yes"),
        ("[THINK]so[/THINK]yes", "so", "yes"),
        ("<|START_THINKING|>so<|END_THINKING|><|START_ACTION|>[]<|END_ACTION|>", "so", "<|START_ACTION|>[]<|END_ACTION|>"),
        ("<|channel>thought\nso\n<channel|>yes", "so", "yes"),
        ("<seed:think>so</seed:think>yes", "so", "yes"),
        (f"{ANALYSIS}<|end|>{FINAL}", "so", "yes"),
        (f"{ANALYSIS}<|end|>{FINAL}<|return|>", "so", "yes"),
        ("<|channel|>final<|message|>yes", "", "yes"),
        (f"{ANALYSIS}<|end|><|start|>assistant{CALL}", "so", CALL),
        (
            "<b> and <think> open, </think> ends.",
            "",
            "<b> and <think> open, </think> ends.",
        ),
        ("a <|message|> b", "", "a <|message|> b"),
    ],
)
def test_the_thinking_and_what_stands_behind_it(text: str, thinking: str, answer: str) -> None:
    assert split_thinking(text) == SplitAnswer(thinking, answer)


@pytest.mark.parametrize("text", ["<think>so", "[THINK]so", "<think>a</think><think>so", ANALYSIS, "<|channel>thought\nso"])
def test_thinking_that_never_ends_has_no_answer(text: str) -> None:
    found = split_thinking(text)
    assert (found.answer, found.cut) == ("", True)
    assert found.thinking.endswith("so")


def test_the_prompt_may_open_the_thinking_or_the_message() -> None:
    opened = "<|im_start|>assistant\n<think>\n"
    assert split_thinking("so\n</think>\n\nyes", opened) == SplitAnswer("so", "yes")
    assert split_thinking("so", opened) == SplitAnswer("so", "", cut=True)
    assert split_thinking("", opened) == SplitAnswer("", "", cut=True)
    assert split_thinking("yes", "<think>\n\n</think>\n\n") == SplitAnswer("", "yes")
    assert split_thinking(CALL, "<|start|>assistant") == SplitAnswer("", CALL)
    muse = " to=self<|message|>so<|eom|><|start|>assistant to=user<|message|>yes"
    assert split_thinking(muse, "<|start|>assistant") == SplitAnswer("so", "yes")
