"""What answers prompts, whatever computes it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from stages.generate.sampling import SamplingConfig
from stages.model.device import DtypeName


class GenerationSettings(NamedTuple):
    """How answers are made; the names are those of generate's parameters."""

    choice: SamplingConfig
    max_new_tokens: int
    batch_size: int
    dtype: DtypeName
    num_processes: int


class Answer(NamedTuple):
    """The new tokens of one row."""

    tokens: list[int]
    """With the token that ended it, if there is one."""
    stopped: bool
    """Whether there is."""


class Backend(Protocol):
    """A loaded model that answers."""

    def answers(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, Answer]]]:
        """The numbers of rows and their answers, as they are finished.

        Args:
            rows: {"id", "prompt_ids"} each, short prompts first.

        Raises Problem if the memory does not suffice for one row.
        """
