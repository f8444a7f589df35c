"""Answers on a GPU with continuous batching, a cache allocated once, and a CUDA graph for the decode step.

Continuous batching: a batch has a fixed number of slots. Each slot holds one row; when its answer is finished, the slot is
given to a row that waits, so a batch never waits for its longest answer. Two kinds of model call take turns:

- Prefill reads the prompts of rows that enter slots, as one padding-free batch, and chooses the first token of each answer.
- A decode step adds one token to every active slot. Its shapes never change, so it is captured once as a CUDA graph and
  replayed. Transformers' generate launches each of the step's thousand kernels from Python.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from stages.core.tokens import IGNORE
from stages.generate.decode_attention import slot_attention
from stages.generate.sampling import SamplingConfig, draw, gumbel_noise, penalize, row_seed
from stages.model.collate import collate_padding_free
from stages.model.logits import modify_head_input
from stages.model.padding_free import RowLayout, padding_free_attention, require_plain_attention
from stages.model.probe import TRIAL_ERRORS, last_logits, logits_match, probe_rows, reason_of

SLOT_ATTENTION = "loratory_slots"
"""The name of this attention function in Transformers' AttentionInterface."""
STEPS_PER_CHECK = 4
"""Decode steps between two checks for finished rows. Each check makes the CPU wait for the GPU."""
MIN_FREE_SHARE = 1 / 8
"""Prompts are read once this share of the slots is free: one prefill of several prompts is faster than several of one."""
MAX_PREFILL_TOKENS = 8192
"""The most prompt tokens in one prefill, unless a single prompt is longer."""


class SlotCache:
    """The keys and values of every slot, for all layers.

    It is passed to the model as the keyword argument `slot_cache`, which Transformers hands on to every layer's attention
    function. That function writes and reads it (`_attention` below). Transformers' own cache is not used: its `update`
    returns all keys and values as tensors, while slot attention reads only the filled part of each slot.
    """

    def __init__(self, slots: int, size: int, *, device: torch.device) -> None:
        """`size` is the number of tokens that a slot can hold."""
        self.slots, self.size = slots, size
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        """(slots,) The number of tokens in each slot."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of one layer, each (slots, size, key heads, head dim).

        Allocated at the layer's first call, in the shape and dtype of `like`: new keys (rows, key heads, tokens, head dim).
        """
        if index not in self._layers:
            shape = (self.slots, self.size, like.shape[1], like.shape[3])
            self._layers[index] = like.new_zeros(shape), like.new_zeros(shape)
        return self._layers[index]


class PromptTokens(NamedTuple):
    """Where the tokens of a prefill belong in the cache; passed to the model as the keyword argument `prompt_tokens`."""

    slots: torch.Tensor
    """(tokens,) The slot of each token."""
    positions: torch.Tensor
    """(tokens,) Its position in the prompt."""


class Decoder:
    """Decodes with one model in a fixed number of slots."""

    def __init__(
        self,
        model: Any,
        sampling: SamplingConfig,
        *,
        stop_tokens: Sequence[int],
        slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        cuda_graph: bool,
    ) -> None:
        """Switches the model to slot attention, allocates the cache and runs a first decode step.

        Args:
            model: A model for which `can_decode` returns "".
            stop_tokens: Those outside the model's vocabulary are ignored.
            slots: The number of rows in a batch.
            max_prompt_tokens: The length of the longest prompt.
            cuda_graph: Whether the decode step is captured as a CUDA graph. Only if all of the model is on one GPU.

        Raises NotImplementedError if the model needs another kind of attention, torch.OutOfMemoryError if the slots do not
        fit into memory.
        """
        self.model, self.sampling, self.max_new_tokens, device = model, sampling, max_new_tokens, model.device
        model.set_attn_implementation(SLOT_ATTENTION)
        self.cache = SlotCache(slots, max_prompt_tokens + max_new_tokens, device=device)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.is_stop_token = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        known = [token for token in stop_tokens if token < vocabulary]
        self.is_stop_token[torch.tensor(known, dtype=torch.long, device=device)] = True
        self.all_slots = torch.arange(slots, device=device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        """(slots,) Whether the slot holds an unfinished answer."""
        self.token = torch.zeros(slots, dtype=torch.long, device=device)
        """(slots,) The newest token of each answer. It is not in the cache yet."""
        self.count = torch.zeros(slots, dtype=torch.long, device=device)
        """(slots,) The number of tokens of each answer."""
        self.answers = torch.zeros(slots, max_new_tokens, dtype=torch.long, device=device)
        self.seeds = torch.zeros(slots, dtype=torch.long, device=device)
        self.seen = torch.zeros(slots, vocabulary if sampling.penalizes else 0, dtype=torch.bool, device=device)
        """(slots, vocabulary) The tokens in each slot's prompt and answer; empty without a repetition penalty."""
        self.graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():  # no slot is active yet: this allocates the cache and shows whether the model can decode
            self._capture_step() if cuda_graph else self._step()

    def decode(self, rows: Sequence[dict[str, Any]], indices: Sequence[int]) -> Iterator[list[tuple[int, list[int]]]]:
        """Answers the rows of these indices. Yields finished answers in groups: the row's index, and the new tokens.

        An answer includes its stop token, if there is one. The random numbers of a row follow from its id.

        Args:
            rows: {"id", "prompt_ids"} each. A row is read when it enters a slot.
            indices: In the order in which the rows are answered.
        """
        waiting = deque(indices)
        occupied: dict[int, int] = {}  # slot: index of the row
        while waiting or occupied:
            free = [slot for slot in range(self.cache.slots) if slot not in occupied]
            if waiting and (not occupied or len(free) >= MIN_FREE_SHARE * self.cache.slots):
                entering = self._next_rows(waiting, rows, at_most=len(free))
                occupied |= dict(zip(free, entering, strict=False))
                self._prefill(
                    free[: len(entering)],
                    prompts=[row["prompt_ids"] for row in entering.values()],
                    row_ids=[row["id"] for row in entering.values()],
                )
            else:
                with torch.no_grad():
                    for _ in range(STEPS_PER_CHECK):
                        self.graph.replay() if self.graph else self._step()
            active = self.active.tolist()
            finished = [slot for slot in occupied if not active[slot]]
            if finished:
                counts, answers = self.count.tolist(), self.answers[finished].tolist()
                yield [(occupied.pop(slot), answer[: counts[slot]]) for slot, answer in zip(finished, answers, strict=True)]

    @staticmethod
    def _next_rows(waiting: deque[int], rows: Sequence[dict[str, Any]], *, at_most: int) -> dict[int, dict[str, Any]]:
        """Takes the indices of the next rows to answer from `waiting`, and returns these rows by index."""
        taken: dict[int, dict[str, Any]] = {}
        tokens = 0
        while waiting and len(taken) < at_most:
            row = rows[waiting[0]]
            tokens += len(row["prompt_ids"])
            if taken and tokens > MAX_PREFILL_TOKENS:
                break
            taken[waiting.popleft()] = row
        return taken

    def _prefill(self, slots: list[int], *, prompts: Sequence[Sequence[int]], row_ids: Sequence[str]) -> None:
        """Reads prompts into slots, and chooses the first token of each answer."""
        device = self.model.device
        slot_index = torch.tensor(slots, device=device)
        batch = collate_padding_free([{"input_ids": prompt, "labels": [IGNORE] * len(prompt)} for prompt in prompts])
        ids, positions = batch["input_ids"].to(device), batch["position_ids"].to(device)
        row_lengths = [len(prompt) for prompt in prompts]
        lengths = torch.tensor(row_lengths, device=device)
        last = lengths.cumsum(0) - 1
        prompt_tokens = PromptTokens(slot_index.repeat_interleave(lengths), positions[0])
        with (
            torch.no_grad(),
            modify_head_input(self.model.get_output_embeddings(), lambda hidden: hidden[:, last.to(hidden.device)]),
        ):
            logits = self._call_model(ids, positions, row_layout=RowLayout(row_lengths), prompt_tokens=prompt_tokens)[0]
        with torch.no_grad():
            self.cache.lengths[slot_index] = lengths
            self.count[slot_index] = 0
            self.active[slot_index] = True
            seeds = [row_seed(self.sampling.seed, row_id) for row_id in row_ids]
            self.seeds[slot_index] = torch.tensor(seeds, device=device)
            if self.sampling.penalizes:
                self.seen[slot_index] = False
                self.seen[prompt_tokens.slots, ids[0]] = True
            self._append_tokens(logits, slot_index)

    def _step(self) -> None:
        """Adds a token to the answer in every active slot. The other slots compute too, but their answers do not change."""
        logits = self._step_logits()
        self.cache.lengths.add_(self.active)
        self._append_tokens(logits, self.all_slots)

    def _step_logits(self) -> torch.Tensor:
        """The logits (slots, vocabulary) after each slot's newest token, which they add to the cache."""
        return self._call_model(self.token.unsqueeze(1), self.cache.lengths.unsqueeze(1))[:, -1]

    def _call_model(self, ids: torch.Tensor, positions: torch.Tensor, **for_attention: Any) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary). Arguments that the model does not know reach its attention functions."""
        logits: torch.Tensor = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, slot_cache=self.cache, **for_attention
        ).logits
        return logits

    def _append_tokens(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Chooses the next token of some slots from their logits (slots, vocabulary), and appends it to active answers."""
        scores = logits
        if self.sampling.penalizes:
            scores = penalize(scores.float(), self.seen[slots], penalty=self.sampling.repetition_penalty)
        active, count = self.active[slots], self.count[slots]
        position = count.clamp_max(self.max_new_tokens - 1)
        if self.sampling.do_sample:
            noise = gumbel_noise(self.seeds[slots], count, vocabulary=scores.shape[1])
            chosen = draw(scores, noise, sampling=self.sampling)
        else:
            chosen = scores.argmax(-1)
        self.answers[slots, position] = torch.where(active, chosen, self.answers[slots, position])
        if self.sampling.penalizes:
            self.seen[slots, chosen] = torch.ones_like(active)  # a plain True would be copied from the CPU at every step
        self.token[slots] = chosen
        self.count[slots] = count + active
        self.active[slots] = active & ~self.is_stop_token[chosen] & (count + 1 < self.max_new_tokens)

    def _capture_step(self) -> None:
        """Captures the decode step as a CUDA graph, after a warm-up on a side stream, as PyTorch requires."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and initializes libraries, which cannot happen in a capture
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()


def can_decode(model: Any, longest_row: int = 0) -> str:
    """Checks in a trial run whether `Decoder` reproduces the model's logits. Leaves the model unchanged.

    Some models have their own attention code or cache, drop the keyword arguments for the attention function, need more
    than plain causal attention, or have a sliding window that only their masks know. A prefill of the rows of `probe_rows`
    and one decode step must give the logits of each whole row.

    Args:
        model: A causal language model in evaluation mode.
        longest_row: Tokens of the longest prompt with its answer.

    Returns:
        "" if it does, otherwise the reason why not.
    """
    own_attention = getattr(model.config, "_attn_implementation", None)
    rows = probe_rows(model, longest_row)
    with torch.no_grad():
        alone = [last_logits(model, [len(row)], input_ids=torch.tensor([row], device=model.device)) for row in rows]
    try:
        matches = logits_match(_probe_logits(model, rows), torch.stack([logits[-1] for logits in alone]))
        reason = "" if matches else "its logits with a slot cache differ"
    except TRIAL_ERRORS as error:
        reason = reason_of(error)
    if own_attention is not None:
        model.set_attn_implementation(own_attention)
    return reason


def _probe_logits(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    """The logits (rows, vocabulary) after each row: all tokens but the last are read in a prefill, the last in a step."""
    greedy = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=0)
    longest = max(map(len, rows))
    decoder = Decoder(
        model, greedy, stop_tokens=[], slots=len(rows), max_prompt_tokens=longest, max_new_tokens=1, cuda_graph=False
    )
    decoder._prefill(list(range(len(rows))), prompts=[row[:-1] for row in rows], row_ids=[""] * len(rows))
    decoder.token.copy_(torch.tensor([row[-1] for row in rows]))
    with torch.no_grad():
        return decoder._step_logits()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    slot_cache: SlotCache | None = None,
    prompt_tokens: PromptTokens | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Called by every attention layer, with the layer itself as `module`. Writes the new keys and values to the slot cache.

    In a prefill (with `prompt_tokens`), padding-free attention within each prompt; the batch is one row of all tokens. In a
    decode step, attention of each slot's new token to all tokens of its slot.

    Args:
        query: (rows, heads, tokens, head dim); in a prefill 1 row, in a decode step (slots, heads, 1, head dim).
        key: As query, perhaps with fewer heads, each for a group of the query's. value: As key.

    Returns:
        (rows, tokens, heads, head dim), and no attention weights.
    """
    index = getattr(module, "layer_idx", None)
    if slot_cache is None or index is None:
        raise NotImplementedError("its attention layers drop the keyword argument slot_cache, or have no layer_idx")
    if key.shape != value.shape:
        raise NotImplementedError("its keys and values differ in size")
    keys, values = slot_cache.layer(index, key)
    if prompt_tokens is not None:
        slots, positions = (
            tensor.to(keys.device) for tensor in prompt_tokens
        )  # a spread model has layers on several devices
        keys[slots, positions] = key[0].transpose(0, 1)
        values[slots, positions] = value[0].transpose(0, 1)
        return padding_free_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
    require_plain_attention(attention_mask, options)
    window: int | None = options.get("sliding_window")
    out = slot_attention(
        query[:, :, 0],
        key[:, :, 0],
        value[:, :, 0],
        key_cache=keys,
        value_cache=values,
        lengths=slot_cache.lengths.to(keys.device),
        window=window or slot_cache.size,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out.unsqueeze(1), None


AttentionInterface.register(SLOT_ATTENTION, _attention)
