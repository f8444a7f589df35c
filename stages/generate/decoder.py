"""Answers on a GPU, many at a time: a finished row's place is taken by a waiting one, and a step is one CUDA graph.

Transformers' generate starts each of a step's thousand kernels from Python, and a batch lasts until its longest answer.
Here a step is recorded once and replayed, the memory for keys and values is laid out once, and each row stands in a slot
of it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from stages.core.tokens import IGNORE
from stages.generate.decode_attention import slot_attention
from stages.generate.sampling import SamplingConfig, draw, noise_of, penalize, seed_of
from stages.model.collate import collate_padding_free
from stages.model.logits import modify_head_input
from stages.model.padding_free import expect, logits_match, padding_free_attention, require_plain_attention

SLOTS = "loratory_slots"
"""The name under which Transformers knows the attention below."""
AT_ONCE = 4
"""Steps between two looks at which rows have finished; each look makes the GPU wait a little."""
REFILL = 8
"""A waiting row is let in when one slot in so many is free: reading prompts in groups costs less than one by one."""
PROMPT_TOKENS = 8192
"""The most that are read at once."""


class Decoder:
    """A model with slots for rows."""

    def __init__(
        self,
        model: Any,
        choice: SamplingConfig,
        stops: Sequence[int],
        slots: int,
        longest: int,
        new: int,
        *,
        recorded: bool,
    ) -> None:
        """Args:
        slots: Rows at a time.
        longest: Tokens of the longest prompt.
        new: The most tokens of an answer.
        recorded: Whether a step is a CUDA graph.

        Raises NotImplementedError if the model wants attention of another kind, torch.OutOfMemoryError if the slots do not
        fit.
        """
        self.model, self.choice, self.new, device = model, choice, new, model.device
        model.set_attn_implementation(SLOTS)
        self.cache = _Slots(model, slots, longest + new)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.stopping = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        known = [token for token in stops if token < vocabulary]
        self.stopping[torch.tensor(known, dtype=torch.long, device=device)] = True
        self.rows = torch.arange(slots, device=device)
        self.token, self.count = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.out = torch.zeros(slots, new, dtype=torch.long, device=device)
        self.seeds = torch.zeros(slots, dtype=torch.long, device=device)
        self.seen = torch.zeros(slots, vocabulary if choice.penalizes else 0, dtype=torch.bool, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            self._record() if recorded else self._step()  # no slot is active: it only shows whether the model can

    def answers(self, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> Iterator[list[tuple[int, list[int]]]]:
        """Each prompt's number and its new tokens, the stop token included if there is one, as they are finished.

        `names` are what the rows' random numbers follow from.
        """
        waiting = deque(range(len(prompts)))
        standing: dict[int, int] = {}  # slot: number of the prompt
        while waiting or standing:
            free = [slot for slot in range(len(self.rows)) if slot not in standing]
            if waiting and (not standing or len(free) * REFILL >= len(self.rows)):
                entering = self._pick(waiting, len(free), prompts)
                standing |= dict(zip(free, entering, strict=False))
                self._read(free[: len(entering)], [prompts[n] for n in entering], [names[n] for n in entering])
            else:
                with torch.no_grad():
                    for _ in range(AT_ONCE):
                        self.graph.replay() if self.graph else self._step()
            active = self.active.tolist()
            done = [slot for slot in standing if not active[slot]]
            if done:
                counts, out = self.count.tolist(), self.out[done].tolist()
                yield [(standing.pop(slot), out[row][: counts[slot]]) for row, slot in enumerate(done)]

    @staticmethod
    def _pick(waiting: deque[int], places: int, prompts: Sequence[Sequence[int]]) -> list[int]:
        picked: list[int] = []
        tokens = 0
        while waiting and len(picked) < places and (not picked or tokens + len(prompts[waiting[0]]) <= PROMPT_TOKENS):
            tokens += len(prompts[waiting[0]])
            picked.append(waiting.popleft())
        return picked

    def _read(self, slots: list[int], prompts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        """Puts prompts into slots, and chooses the first token of each answer."""
        device = self.model.device
        places = torch.tensor(slots, device=device)
        batch = collate_padding_free([{"input_ids": prompt, "labels": [IGNORE] * len(prompt)} for prompt in prompts])
        ids, positions = batch["input_ids"].to(device), batch["position_ids"].to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        slot_of_token = places.repeat_interleave(lengths)
        expect(positions, batch["row_lengths"])
        last = lengths.cumsum(0) - 1
        self.cache.reading = (slot_of_token, positions[0])
        try:
            with torch.no_grad(), modify_head_input(self.model.get_output_embeddings(), lambda hidden: hidden[:, last]):
                logits = self._call(ids, positions)[0]
        finally:
            self.cache.reading = None
        with torch.no_grad():
            self.cache.lengths[places] = lengths
            self.count[places] = 0
            self.active[places] = True
            self.seeds[places] = torch.tensor([seed_of(self.choice.seed, name) for name in names], device=device)
            if self.choice.penalizes:
                self.seen[places] = False
                self.seen[slot_of_token, ids[0]] = True
            self._take(logits, places)

    def _step(self) -> None:
        """One more token for every active slot; the others compute too, and change nothing."""
        logits = self._logits()
        self.cache.lengths.add_(self.active)
        self._take(logits, self.rows)

    def _logits(self) -> torch.Tensor:
        """(slots, vocabulary), for the token behind each slot's last."""
        return self._call(self.token.unsqueeze(1), self.cache.lengths.unsqueeze(1))[:, -1]

    def _call(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits
        return logits

    def _take(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Chooses and notes a token for each of the slots, by its logits (slots, vocabulary)."""
        scores = logits
        if self.choice.penalizes:
            scores = penalize(scores.float(), self.seen[slots], self.choice.repetition_penalty)
        active, count = self.active[slots], self.count[slots]
        place = count.clamp_max(self.new - 1)
        if self.choice.do_sample:
            chosen = draw(scores, noise_of(self.seeds[slots], count, scores.shape[1]), self.choice)
        else:
            chosen = scores.argmax(-1)
        self.out[slots, place] = torch.where(active, chosen, self.out[slots, place])
        if self.choice.penalizes:
            self.seen[slots, chosen] = torch.ones_like(active)  # a mere True would be copied from main memory
        self.token[slots] = chosen
        self.count[slots] = count + active
        self.active[slots] = active & ~self.stopping[chosen] & (count + 1 < self.new)

    def _record(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries woken before the recording
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()


def can_decode(model: Any) -> bool:
    """Whether the model's logits, slot by slot, are those that it gives for whole rows; if not it is left as it was.

    Tried as it is for flat rows: models that bring attention or a cache of their own do not fit.
    """
    own = getattr(model.config, "_attn_implementation", None)
    prompts = [[5, 6, 7, 8], [9, 5]]
    with torch.no_grad():
        wanted = [model(input_ids=torch.tensor([[*p, 7]], device=model.device)).logits[0, -1] for p in prompts]
    try:
        decoder = Decoder(model, SamplingConfig(False, 1.0, 1.0, 1.0, 0), [], 2, 4, 2, recorded=False)
        decoder._read([0, 1], prompts, ["", ""])
        decoder.token.fill_(7)
        with torch.no_grad():
            found = decoder._logits()
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        found = None
    if found is not None and logits_match(found, torch.stack(wanted)):
        return True
    if own is not None:
        model.set_attn_implementation(own)
    return False


class _Slots(Cache):  # type: ignore[misc]
    """Keys and values of all slots, as Transformers' models ask for them."""

    def __init__(self, model: Any, slots: int, length: int) -> None:
        config = model.config.get_text_config()
        self.lengths = torch.zeros(slots, dtype=torch.long, device=model.device)
        """(slots,) Tokens in each."""
        self.reading: tuple[torch.Tensor, torch.Tensor] | None = None
        """While prompts are read: the slot and the position of each of their tokens."""
        super().__init__(layers=[_Layer(self, slots, length) for _ in range(config.num_hidden_layers)])


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One block's keys and values, (slots, length, heads, size) each."""

    is_sliding = False

    def __init__(self, owner: _Slots, slots: int, length: int) -> None:
        super().__init__()
        self.owner, self.slots, self.length = owner, slots, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes the memory, when the first keys tell its shape."""
        self.keys, self.values = (
            states.new_zeros(self.slots, self.length, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes the keys and values (rows, heads, tokens, size) of prompts, and returns what attention is to be called with.

        They are the same: while prompts are read, attention is among them, and afterwards it looks for the others itself.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        _Now.layer = self
        if self.owner.reading:
            slots, positions = self.owner.reading
            self.keys[slots, positions] = key_states[0].transpose(0, 1)
            self.values[slots, positions] = value_states[0].transpose(0, 1)
            _Now.layer = None
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Models ask for it to find positions, which they are given here."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """For a mask that is not made."""
        return self.length, 0

    def get_max_length(self) -> int:
        """Tokens that a slot holds."""
        return self.length

    get_max_cache_shape = get_max_length


class _Now:
    """The block whose attention is called next; None while prompts are read."""

    layer: _Layer | None = None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **wanted: Any,
) -> tuple[torch.Tensor, None]:
    """Flat attention while prompts are read; afterwards each slot's query, (slots, heads, 1, size), over what it holds."""
    layer, _Now.layer = _Now.layer, None  # what is not used again is not to be held
    if layer is None:
        return padding_free_attention(module, query, key, value, attention_mask, dropout, scaling, **wanted)
    require_plain_attention(attention_mask, wanted)
    window = wanted.get("sliding_window")
    if window and window < layer.length:
        raise NotImplementedError("a window")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[:, :, 0] for tensor in (query, key, value))
    return slot_attention(query, key, value, layer.keys, layer.values, layer.owner.lengths, scaling).unsqueeze(1), None


AttentionInterface.register(SLOTS, _attention)
