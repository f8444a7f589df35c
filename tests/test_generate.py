"""generate: an answer depends on its prompt alone, and says why it ended."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.core.problem import Problem
from stages.core.tokens import PROMPTS, open_tokens, read_tokens
from stages.generate.backend import GenerationSettings
from stages.generate.decoder import Decoder, can_decode
from stages.generate.fused_projections import fuse_projections
from stages.generate.generate import TUTORIAL, Params, answer_share, generate
from stages.generate.sampling import RowSampler, SamplingConfig, draw, noise_of, seed_of
from stages.generate.transformers_backend import TransformersAnswers
from stages.generate.vllm_backend import VllmAnswers
from tests.tiny import Workspace

PARAMS: dict[str, Any] = {
    "preset": "own",
    "max_new_tokens": 8,
    "do_sample": False,
    "temperature": 0.5,
    "top_p": 0.85,
    "repetition_penalty": 1.0,
    "seed": 0,
    "batch_size": 4,
    "dtype": "float32",
    "num_processes": 1,
    "use_vllm": False,
}


def answer(
    workspace: Workspace, out: Path, rows: list[dict[str, Any]] | None = None, stops: Sequence[int] = (2,), **given: Any
) -> list[dict[str, Any]]:
    tokens = workspace.root / "data" / "tokens"
    prompts = tokens / "test.arrow"
    if rows is not None:
        prompts = out.with_suffix(".arrow")
        with open_tokens(prompts, PROMPTS, stops) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=PROMPTS))
    extra = out.with_suffix(".extra.jsonl")
    generate(
        Params(**PARAMS | given),
        model=workspace.root / "models" / "merged",
        test_prompts=prompts,
        extra_prompts=tokens / "prompts.arrow",
        predictions=out,
        extra_predictions=extra,
    ).clean_up()
    assert [json.loads(line)["id"] for line in extra.read_text().splitlines()] == ["prompt-1", "prompt-2", "prompt-3"]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_batch_size_and_order_change_no_answer(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    assert len({len(row["prompt_ids"]) for row in rows}) > 3
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16)
    alone = answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1)
    backwards = answer(workspace, tmp_path / "c.jsonl", rows[::-1], batch_size=3)
    assert together == alone == backwards[::-1]
    assert [row["id"] for row in together] == [row["id"] for row in rows]
    assert len({row["answer"] for row in together}) > 1


def test_an_answer_is_the_greedy_continuation_token_by_token(workspace: Workspace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = workspace.root / "models" / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()[:3]
    for row, found in zip(rows, answer(workspace, tmp_path / "a.jsonl", rows), strict=True):
        ids: list[int] = list(row["prompt_ids"])
        while (len(ids) < len(row["prompt_ids"]) + 8 and ids[-1] != 2) or len(ids) == len(row["prompt_ids"]):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(row["prompt_ids"]) :]
        assert found["answer_tokens"] == len(new)
        assert found["finish_reason"] == ("stop" if new[-1] == 2 else "length")
        assert found["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (found["prompt"], found["reference"]) == (row["prompt"], row["reference"])


def test_sampling_is_repeatable_and_follows_its_seed(workspace: Workspace, tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 5.0, "top_p": 1.0}
    first = answer(workspace, tmp_path / "a.jsonl", **given)
    assert answer(workspace, tmp_path / "b.jsonl", **given) == first
    assert answer(workspace, tmp_path / "c.jsonl", **given, seed=1) != first


def test_a_drawn_answer_does_not_depend_on_its_neighbours(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    given = {"do_sample": True, "temperature": 2.0, "top_p": 0.95}
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16, **given)
    assert answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1, **given) == together
    assert answer(workspace, tmp_path / "c.jsonl", rows[:3], batch_size=3, **given) == together[:3]
    assert len({row["answer"] for row in together}) > len(rows) // 2


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[1.0, 2.0, -1.0, 0.0]]).expand(20_000, 4)
    choice = SamplingConfig(do_sample=True, temperature=0.7, top_p=1.0, repetition_penalty=1.0, seed=0)
    noise = noise_of(torch.full((20_000,), seed_of(0, "x")), torch.arange(20_000), 4)
    wanted = torch.nn.functional.softmax(scores[0] / 0.7, -1)
    torch.testing.assert_close(torch.bincount(draw(scores, noise, choice)) / 20_000, wanted, atol=0.015, rtol=0)
    assert set(draw(scores, noise, choice._replace(top_p=0.85)).tolist()) == {0, 1}, "they have 0.77, and 0.95 together"
    assert set(draw(scores, noise, choice._replace(top_p=0.5)).tolist()) == {1}


def test_noise_is_gumbels_and_each_rows_own() -> None:
    noise = noise_of(torch.tensor([seed_of(0, "x"), seed_of(0, "y"), seed_of(1, "x")]), torch.tensor([0, 0, 0]), 50_000)
    assert noise.mean(1).tolist() == pytest.approx([0.5772] * 3, abs=0.02)  # Euler's constant
    assert noise.var(1).tolist() == pytest.approx([1.6449] * 3, abs=0.06)  # pi squared by 6
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.02
    later = noise_of(torch.tensor([seed_of(0, "x")]), torch.tensor([1]), 50_000)
    assert abs(float(torch.corrcoef(torch.cat([noise[:1], later]))[0, 1])) < 0.02
    assert noise[0, :3].tolist() == pytest.approx([_by_hand(seed_of(0, "x"), place) for place in range(3)], abs=1e-6)


def _by_hand(seed: int, place: int) -> float:
    """SplitMix64 on Python's own numbers."""
    x = (seed + place * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return -math.log(-math.log((((x ^ (x >> 31)) >> 11) + 0.5) * 2**-53))


def test_the_repetition_penalty_is_transformers_own_but_for_padding() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    scores, prompt = torch.tensor([[3.0, -2.0, 1.0, 0.5]]), [1, 2]
    choice = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=2.0, seed=0)
    ours = RowSampler(choice, ["x"], [prompt], torch.device("cpu"))
    assert torch.equal(
        ours(torch.tensor([[0, 0, 1, 2]]), scores), RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([prompt]), scores)
    )
    assert ours(torch.tensor([[0, 0, 1, 2, 3]]), scores).tolist() == [[3.0, -4.0, 0.5, 0.25]]


def test_padding_changes_no_answer_under_a_repetition_penalty(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16, repetition_penalty=2.0)
    assert answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1, repetition_penalty=2.0) == together
    assert together != answer(workspace, tmp_path / "c.jsonl", rows, batch_size=16)


# Slots, as on a GPU


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"repetition_penalty": 2.0},
        {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
)
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_rows_in_slots_get_the_answers_of_generate(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], slots: int
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    stops = range(0, 800, 5)  # also some that the model does not know
    wanted = answer(workspace, tmp_path / "a.jsonl", rows, stops, **choice)
    monkeypatch.setattr(TransformersAnswers, "_generated", _in_slots)
    assert answer(workspace, tmp_path / "b.jsonl", rows, stops, batch_size=slots, **choice) == wanted
    assert len({row["answer_tokens"] for row in wanted}) > 1, "some end early, and their slots are taken by others"


def _in_slots(answers: TransformersAnswers, rows: Any) -> Any:
    assert can_decode(answers.model)
    fuse_projections(answers.model)
    return answers._decoded(rows)


def test_what_slots_do_not_fit_is_left_to_generate() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(vocab_size=100, num_key_value_heads=2, sliding_window=3, **sizes)).eval()
    wide = MistralForCausalLM(MistralConfig(vocab_size=100, num_key_value_heads=2, sliding_window=64, **sizes)).eval()
    assert can_decode(wide)
    assert not can_decode(windowed)
    assert windowed.config._attn_implementation != "loratory_slots"
    foreign = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2)).eval()
    before = foreign.config._attn_implementation
    assert can_decode(foreign) or foreign.config._attn_implementation == before


def test_the_tutorials_settings_have_a_name(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()[:2]
    given = TUTORIAL | {"max_new_tokens": 1024}
    assert TUTORIAL == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.85,
        "repetition_penalty": 2.0,
        "max_new_tokens": 1024,
    }
    prompt = {name: value[-1:] if name == "prompt_ids" else value for name, value in rows[0].items()}
    named = answer(workspace, tmp_path / "a.jsonl", [prompt], preset="tutorial")
    assert named == answer(workspace, tmp_path / "b.jsonl", [prompt], **given)


# Interrupted, and short of memory


def test_a_killed_run_goes_on_behind_the_last_batch_and_ends_in_the_same_bytes(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(workspace, scratch / "whole.jsonl")
    calls: list[int] = []
    batch = TransformersAnswers._batch

    def killed(self: Any, rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, rows)

    monkeypatch.setattr(TransformersAnswers, "_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(workspace, scratch / "out.jsonl")
    assert not (scratch / "out.jsonl").exists()
    (kept,) = (scratch / ".checkpoints").glob("generate-*.jsonl")
    assert len(kept.read_bytes().splitlines()) == 2
    with kept.open("ab") as file:
        file.write(b"[[0, [1, 2")  # a batch that was being written
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # other parameters begin anew
        answer(workspace, scratch / "other.jsonl", max_new_tokens=7)
    calls.extend([0] * 9)
    first = len(calls)
    answer(workspace, scratch / "out.jsonl")
    assert len(calls) - first == len(set(_numbers(kept, workspace)))
    assert (scratch / "out.jsonl").read_bytes() == (scratch / "whole.jsonl").read_bytes()
    assert not kept.exists()


def _numbers(kept: Path, workspace: Workspace) -> range:
    """The batches that were left: all but two."""
    count = len(read_tokens(workspace.root / "data" / "tokens" / "test.arrow")) + 3
    return range(-(-count // 4) - 2)


def test_a_batch_that_is_too_large_is_halved(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answer(workspace, tmp_path / "a.jsonl")
    sizes, real = [], TransformersAnswers._generate

    def small(self: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, rows)

    monkeypatch.setattr(TransformersAnswers, "_generate", small)
    assert answer(workspace, tmp_path / "b.jsonl", batch_size=8) == wanted
    assert {8, 4, 2} <= set(sizes)

    def none(self: Any, rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersAnswers, "_generate", none)
    with pytest.raises(Problem, match=r"out of memory on a single prompt, [\w-]+ with \d+ tokens"):
        answer(workspace, tmp_path / "c.jsonl")


@pytest.mark.parametrize("field", ["max_new_tokens", "batch_size", "temperature", "top_p"])
def test_senseless_settings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Params(**PARAMS | {field: 0})


class _Merging(torch.nn.Module):
    """Two layers that read the same; a view over tokens and features together, which a part of a tensor does not allow."""

    device = torch.device("cpu")

    def __init__(self, *, merging: bool) -> None:
        super().__init__()
        self.a, self.b, self.merging = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), merging

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = input_ids.unsqueeze(-1).float().expand(-1, -1, 4).clone()
        a, b = self.a(x), self.b(x)
        return (a.view(-1) + b.view(-1)) if self.merging else (a + b).flatten()


@pytest.mark.parametrize("merging", [False, True])
def test_layers_whose_outputs_must_be_whole_are_not_joined(merging: bool) -> None:
    model, ids = _Merging(merging=merging), torch.tensor([[5, 6, 7]])
    wanted = model(ids)
    fuse_projections(model)
    assert ("forward" in vars(model.a)) != merging
    torch.testing.assert_close(model(ids), wanted)


def test_rows_that_do_not_fit_into_slots_get_fewer_of_them(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    stops = [2, *range(20, 800, 40)]
    wanted = answer(workspace, tmp_path / "a.jsonl", rows, stops)
    most, read, seen = 3, Decoder._read, []

    def small(self: Any, slots: Any, prompts: Any, names: Any) -> None:
        if len(self.rows) > most and len(seen) >= 2 and names[0]:  # some rows are answered before; the trial's have no name
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append((len(self.rows), names[0]))
        read(self, slots, prompts, names)

    monkeypatch.setattr(TransformersAnswers, "_generated", _in_slots)
    monkeypatch.setattr(Decoder, "_read", small)
    monkeypatch.setattr("stages.generate.decoder.PROMPT_TOKENS", 60)
    assert answer(workspace, tmp_path / "b.jsonl", rows, stops, batch_size=8) == wanted
    assert {slots for slots, name in seen if name} == {8, 2}
    most = 0
    with pytest.raises(Problem, match=r"out of memory on a single prompt, [\w-]+ with \d+ tokens"):
        answer(workspace, tmp_path / "c.jsonl", rows, stops, batch_size=8)


# Several processes


def test_two_processes_give_the_answers_of_one_and_take_up_what_is_kept(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    wanted = answer(workspace, scratch / "one.jsonl", rows)
    assert answer(workspace, scratch / "two.jsonl", rows, num_processes=2) == wanted

    def second_alone(function: Any, processes: int, *given: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setenv("WORLD_SIZE", "2")
            patched.setenv("RANK", "1")
            answer_share(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("stages.generate.distributed.launch", second_alone)
        with pytest.raises(KeyboardInterrupt):
            answer(workspace, scratch / "two.jsonl", rows, num_processes=2)
    (kept,) = (file for file in (scratch / ".checkpoints").glob("generate-*-1.jsonl") if file.stat().st_size)
    number, (tokens, _) = json.loads(kept.read_text().splitlines()[0])[0]
    kept.write_text(kept.read_text().replace(json.dumps(tokens), "[5]", 1))  # to be told from one that is made again
    found = answer(workspace, scratch / "two.jsonl", rows, num_processes=2)
    assert found[number]["answer_tokens"] == 1
    assert found[:number] + found[number + 1 :] == wanted[:number] + wanted[number + 1 :]
    assert not kept.exists()


# vLLM, which is not installed here: a stand-in with the parts of its interface that are used


class _SamplingParams(SimpleNamespace):
    pass


class _Engine:
    made: list["_Engine"]

    def __init__(self, model: str, **given: Any) -> None:
        from transformers import AutoModelForCausalLM

        if "error" in model:
            raise ValueError("no such architecture")
        self.given, self.seen = given, []  # type: ignore[var-annotated]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        _Engine.made.append(self)

    def generate(self, prompts: list[dict[str, list[int]]], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.seen += sampling_params
        assert max(sampling_params[0].stop_token_ids) < self.model.config.vocab_size, "vLLM refuses other tokens"
        if max(len(prompt["prompt_token_ids"]) for prompt in prompts) > 500:
            raise ValueError("the prompt is too long")
        return [self._answer(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: list[int], params: Any) -> Any:
        ids = list(prompt)
        while len(ids) < len(prompt) + params.max_tokens and (
            len(ids) == len(prompt) or ids[-1] not in params.stop_token_ids
        ):
            with torch.no_grad():
                ids.append(int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids[len(prompt) :]))])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[_Engine]:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams, _Engine.made = _Engine, _SamplingParams, []
    monkeypatch.setitem(sys.modules, "vllm", module)
    return _Engine


def test_vllm_gets_tokens_stops_and_seeds_and_its_answers_become_the_same_rows(
    workspace: Workspace, tmp_path: Path, engine: type[_Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    stops = [2, *range(20, 800, 40)]
    wanted = answer(workspace, tmp_path / "a.jsonl", rows, stops)
    monkeypatch.setattr("stages.generate.vllm_backend.AT_ONCE", 4)
    assert answer(workspace, tmp_path / "b.jsonl", rows, stops, use_vllm=True, num_processes=2) == wanted
    assert {row["finish_reason"] for row in wanted} == {"stop", "length"}
    (made,) = engine.made
    assert made.given == {
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "trust_remote_code": False,
        "generation_config": "vllm",
    }
    assert len(made.seen) == len(rows) + 3
    assert {params.temperature for params in made.seen} == {0.0}, "greedy"
    drawn = {"use_vllm": True, "do_sample": True, "repetition_penalty": 1.5}
    answer(workspace, tmp_path / "c.jsonl", rows, **drawn)
    seen = engine.made[1].seen
    assert {(params.temperature, params.top_p, params.repetition_penalty) for params in seen} == {(0.5, 0.85, 1.5)}
    assert {params.seed for params in seen} >= {seed_of(0, row["id"]) for row in rows}
    assert len({params.seed for params in seen}) == len(seen)


def test_without_vllm_or_for_what_it_cannot_load_there_is_one_message(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(Problem, match=r"generate\.use_vllm: vLLM is not installed: pip install vllm, or false"):
        answer(workspace, tmp_path / "a.jsonl", use_vllm=True)


def test_what_vllm_says_is_passed_on(workspace: Workspace, tmp_path: Path, engine: type[_Engine]) -> None:
    folder = tmp_path / "error"
    shutil.copytree(workspace.root / "models" / "merged", folder)
    settings = GenerationSettings(SamplingConfig(False, 1.0, 1.0, 1.0, 0), 8, 4, "float32", 1)
    with pytest.raises(Problem, match=r"vLLM cannot load .*error: no such architecture"):
        VllmAnswers(folder, settings, [2])
    long = {"id": "long", "prompt": "", "prompt_ids": [5] * 501, "reference": ""}
    with pytest.raises(Problem, match="vLLM: the prompt is too long"):
        answer(workspace, tmp_path / "a.jsonl", [long], use_vllm=True)
    (folder / "adapter").mkdir()
    with pytest.raises(Problem, match="vLLM does not read the adapter in"):
        VllmAnswers(folder, settings, [2])
