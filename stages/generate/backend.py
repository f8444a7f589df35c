"""The interface of the two backends that answer prompts: Transformers and vLLM."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from stages.generate.sampling import SamplingConfig
from stages.model.device import DtypeName


class GenerationSettings(NamedTuple):
    """The parameters of the stage that a backend needs, under the same names."""

    sampling: SamplingConfig
    max_new_tokens: int
    batch_size: int
    dtype: DtypeName
    num_processes: int


class Answer(NamedTuple):
    """The new tokens of one row."""

    tokens: list[int]
    """Includes the stop token, if there is one."""
    stopped: bool
    """Whether the last token is a stop token; otherwise the answer was cut at max_new_tokens."""


class Backend(Protocol):
    """A loaded model that answers prompts."""

    def prepare(self, longest_prompt: int) -> None:
        """Chooses how prompts are answered, and notes (`distributed.note`) why not in the fastest way.

        Args:
            longest_prompt: Tokens of the longest prompt that any of the processes will answer.
        """

    def generate(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, Answer]]]:
        """Answers all rows. Yields finished answers in groups, each answer with its row's index in `rows`.

        Args:
            rows: {"id", "prompt_ids"} each, sorted by length, shortest prompt first. They may be read from a file at each
                access, so a backend must not hold all of them.

        Raises Problem if a single row does not fit into memory.
        """

    def text_losses(self, windows: Sequence[dict[str, Any]]) -> list[float]:
        """The summed loss in nats of each window of raw text in one batch.

        Args:
            windows: {"id", "input_ids", "labels"} each.

        Raises Problem if a single window does not fit into memory, or if the backend cannot give losses.
        """
