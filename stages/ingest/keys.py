"""The books on keys: every key of a row, a turn or a tool call is read, known to carry nothing, or counted by name.

A key that is known to change what the row means (a picture, a preference label, a weight) must not be lost in silence: where
it is not read, it rejects the row. Keys are compared without regard to case.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from stages.core.problem import Rejection


def _words(text: str) -> list[str]:
    return text.split()


CARRY_NOTHING = frozenset(
    _words("""
    id ids _id uid uuid guid idx index __index_level_0__ row_id sample_id example_id item_id data_id doc_id document_id
    instance_id question_id problem_id task_id qid prompt_id response_id message_id conversation_id conv_id convo_id
    dialog_id dialogue_id chat_id session_id thread_id user_id annotator_id unique_id original_id orig_id seq_id
    hash md5 sha1 sha256 checksum content_hash text_hash prompt_hash conversation_hash digest
    source sources source_id source_url source_dataset source_file source_model src origin original_source provenance
    dataset datasets dataset_name dataset_id data_source data_name subset split config file filename file_name file_path
    path url urls uri link license licence licenses license_type copyright author authors creator annotator provider
    contributor version revision generator generated_by model models model_name model_id model_version engine teacher
    teacher_model
    lang langs language languages lang_code language_code lang_id locale
    category categories subcategory sub_category category_id topic topics subtopic sub_topic domain domains subdomain
    tag tags kind task tasks task_name task_type type data_type question_type problem_type
    prompt_type conversation_type skill skills ability level difficulty cluster cluster_id
    length len num_tokens n_tokens token_count token_counts token_length total_tokens prompt_tokens completion_tokens
    input_tokens output_tokens reasoning_tokens usage num_turns n_turns turn turn_count turn_id turn_index num_messages
    message_count num_chars char_count word_count num_words
    timestamp timestamps time date datetime created created_at created_date created_time create_time creation_date
    updated_at update_time modified_at year
    metadata meta parallel_tool_calls finish_reason stop_reason logprobs signature cache_control
    system_fingerprint service_tier
    """)
)
"""Identity, origin, subject, size and time, as public data sets and the answers of APIs name them."""


class Meaning(NamedTuple):
    """A group of keys that change what a row means."""

    what: str
    """What the key holds."""
    to_do: str
    """What the user can do."""
    neutral: tuple[Any, ...] = ()
    """Values that mean the same as no key."""
    flags: bool = False
    """Whether true, false, "on" and "off" only describe the row, so that the key is counted and does not reject it."""


_REMOVE = "remove the field if the row is complete without it"
_PREFERENCE = Meaning(
    "a preference between answers", "keep only the answers to imitate, and remove the field; this is supervised training"
)
_LABEL = Meaning(
    "a label: a class, or whether the answer is a good one", "name it as the output if it is the answer, or remove the field"
)
_OPTIONS = Meaning("the options of a question", "write them into the question, or remove the field if they stand there")
_MEDIA = Meaning("media, which a text model cannot see", _REMOVE)
_CONTEXT = Meaning("text that the question is about", "write it into the question, or name it as the field that holds it")
_THINKING = Meaning("the thinking behind an answer", "write it as reasoning_content into the assistant's turn", flags=True)
_CALLS = Meaning("tool calls", "write it as tool_calls into the assistant's turn")
_TOOLS = Meaning("tool definitions", "write it as tools beside the list of turns")
_LOSS = Meaning(
    "a weight in the loss", "write train: false into each assistant's turn that is not to be trained", neutral=(1, True)
)
_SYSTEM = Meaning("a system prompt", "name it as ingest.columns.system in params.yaml, or write it as a first system turn")
_HISTORY = Meaning("earlier turns", "write them as turns before the last")
_REFUSAL = Meaning("an answer", "write it as the content of the turn")
_TEMPLATE = Meaning("arguments of the chat template", "set encode.template_kwargs in params.yaml, for all rows alike")

CHANGE_MEANING: dict[str, Meaning] = {
    key: meaning
    for meaning, keys in (
        (
            _PREFERENCE,
            "chosen rejected preferred non_preferred preferred_output non_preferred_output rejected_response"
            " rejected_messages rejected_completion chosen_response chosen_messages preference",
        ),
        (_LABEL, "label kto_tag"),
        (
            _OPTIONS,
            "options choices choice_list answer_choices candidates opa opb opc opd option_a option_b option_c option_d",
        ),
        (
            _MEDIA,
            "image images image_path image_paths image_url image_urls image_file img imgs picture pictures pixel_values"
            " audio audios audio_path audio_paths audio_url video videos video_path video_paths video_url media",
        ),
        (_CONTEXT, "context contexts document documents passage passages article articles knowledge"),
        (
            _THINKING,
            "reasoning_content reasoning reasoning_details reasoning_trace thinking thinking_content thinking_blocks think"
            " thought thoughts cot complex_cot chain_of_thought",
        ),
        (_CALLS, "tool_calls tool_call function_call function_calls"),
        (_TOOLS, "tools functions"),
        (_LOSS, "loss loss_weight loss_scale loss_mask weight weights train training train_detail"),
        (_SYSTEM, "system system_prompt system_message system_instruction sys_prompt"),
        (_HISTORY, "history"),
        (_REFUSAL, "refusal"),
        (_TEMPLATE, "chat_template_kwargs template_kwargs enable_thinking reasoning_effort"),
    )
    for key in _words(keys)
}

MAX_DEPTH = 8
"""A value that is nested deeper is not empty: nobody nests nothing that deep, and Python's stack is not endless."""
_POSITION = re.compile(r"\[\d+\]")


def unread_keys(value: Mapping[str, Any], read: Collection[str], where: str) -> list[str]:
    """The keys of a row, a turn or a call that hold something and are not read, to be counted.

    Args:
        value: The row, turn or call.
        read: The keys of it that are read. A frozenset is the fastest.
        where: The path of `value` in its row, "" for the row itself: "messages[3]".

    Returns:
        Names without positions, such as "messages[].mood", so that a name is the same in all rows.

    Raises Rejection if an unread key is known to change the meaning, see CHANGE_MEANING.
    """
    unread = []
    for key in value:
        if key in read or key in CARRY_NOTHING:
            continue
        found = value[key]
        if is_empty(found):
            continue
        lower = key.casefold()
        if lower in CARRY_NOTHING:
            continue
        meaning = CHANGE_MEANING.get(lower)
        if meaning and found not in meaning.neutral:
            if not (meaning.flags and (isinstance(found, bool) or str(found).casefold() in ("on", "off"))):
                path = f"{where}.{key}" if where else key
                raise Rejection("unread_field", f"{path}: {meaning.what}, is not read here; {meaning.to_do}")
        elif meaning:
            continue
        unread.append(f"{_POSITION.sub('[]', where)}.{key}" if where else key)
    return unread


def is_empty(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a value holds nothing: null, "", or a list or an object of such values.

    Arrow gives every row of a Parquet file all fields of a nested type, so an absent call is {"name": null, ...} there.
    """
    if value is None or value == "":
        return True
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return not value or (depth > 0 and all(is_empty(inner, depth - 1) for inner in value))
    return False
