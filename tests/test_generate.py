"""generate: an answer depends only on its own prompt, and says why it ended."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from stages.core.params import parse_section
from stages.core.problem import Problem
from stages.core.tokens import PROMPTS, TRAINING, choose_rows, decode_answer, open_tokens, read_tokens
from stages.generate import decoder, text_losses
from stages.generate.backend import Answer, GenerationSettings
from stages.generate.decoder import Decoder, can_decode
from stages.generate.fused_projections import fuse_projections
from stages.generate.generate import Params, answer_share, generate, kept_answers
from stages.generate.rows import WINDOWS_PER_DOCUMENT, choose_windows, document_of, read_rows
from stages.generate.sampling import RowSampler, SamplingConfig, draw, gumbel_noise, row_seed
from stages.generate.transformers_backend import TransformersBackend
from stages.generate.vllm_backend import VllmBackend
from stages.model import limits
from tests.tiny import Workspace

PARAMS: dict[str, Any] = {
    "max_predict_samples": 0,
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


GREEDY = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=0)


def answer(
    workspace: Workspace,
    out: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    stops: Sequence[int] = (2,),
    model: Path | None = None,
    **given: Any,
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
        model=model or workspace.root / "models" / "merged",
        test_prompts=prompts,
        extra_prompts=tokens / "prompts.arrow",
        test_text=tokens / "text.arrow",
        predictions=out,
        extra_predictions=extra,
        text_losses=out.with_suffix(".text.jsonl"),
    ).clean_up()
    assert [json.loads(line)["id"] for line in extra.read_text().splitlines()] == ["prompt-1", "prompt-2", "prompt-3"]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_batch_size_and_row_order_do_not_change_answers(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    assert len({len(row["prompt_ids"]) for row in rows}) > 3
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16)
    alone = answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1)
    backwards = answer(workspace, tmp_path / "c.jsonl", rows[::-1], batch_size=3)
    assert together == alone == backwards[::-1]
    assert [row["id"] for row in together] == [row["id"] for row in rows]
    assert len({row["answer"] for row in together}) > 1


def test_greedy_answer_is_the_most_likely_token_at_every_position(workspace: Workspace, tmp_path: Path) -> None:
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
        assert found["answer"] == decode_answer(tokenizer, new[:-1] if new[-1] == 2 else new)
        assert (found["prompt"], found["reference"]) == (row["prompt"], row["reference"])


def test_sampling_is_reproducible_and_depends_on_the_seed(workspace: Workspace, tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 5.0, "top_p": 1.0}
    first = answer(workspace, tmp_path / "a.jsonl", **given)
    assert answer(workspace, tmp_path / "b.jsonl", **given) == first
    assert answer(workspace, tmp_path / "c.jsonl", **given, seed=1) != first


def test_a_sampled_answer_does_not_depend_on_the_rest_of_the_batch(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    given = {"do_sample": True, "temperature": 2.0, "top_p": 0.95}
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16, **given)
    assert answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1, **given) == together
    assert answer(workspace, tmp_path / "c.jsonl", rows[:3], batch_size=3, **given) == together[:3]
    assert len({row["answer"] for row in together}) > len(rows) // 2


def test_tokens_are_drawn_with_their_probabilities() -> None:
    scores = torch.tensor([[1.0, 2.0, -1.0, 0.0]]).expand(20_000, 4)
    sampling = SamplingConfig(do_sample=True, temperature=0.7, top_p=1.0, repetition_penalty=1.0, seed=0)
    noise = gumbel_noise(torch.full((20_000,), row_seed(0, "x")), torch.arange(20_000), vocabulary=4)
    expected = torch.nn.functional.softmax(scores[0] / 0.7, -1)
    frequencies = torch.bincount(draw(scores, noise, sampling=sampling)) / 20_000
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    drawn = draw(scores, noise, sampling=sampling._replace(top_p=0.85))
    assert set(drawn.tolist()) == {0, 1}, "token 1 has the probability 0.77, tokens 0 and 1 together 0.95"
    assert set(draw(scores, noise, sampling=sampling._replace(top_p=0.5)).tolist()) == {1}


def test_noise_has_the_gumbel_distribution_and_differs_between_rows_and_steps() -> None:
    seeds = torch.tensor([row_seed(0, "x"), row_seed(0, "y"), row_seed(1, "x")])
    noise = gumbel_noise(seeds, torch.tensor([0, 0, 0]), vocabulary=50_000)
    assert noise.mean(1).tolist() == pytest.approx([0.5772] * 3, abs=0.02)  # Euler's constant
    assert noise.var(1).tolist() == pytest.approx([1.6449] * 3, abs=0.06)  # pi squared / 6
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.02
    later = gumbel_noise(torch.tensor([row_seed(0, "x")]), torch.tensor([1]), vocabulary=50_000)
    assert abs(float(torch.corrcoef(torch.cat([noise[:1], later]))[0, 1])) < 0.02
    assert noise[0, :3].tolist() == pytest.approx([_gumbel_number(row_seed(0, "x"), n) for n in range(3)], abs=1e-6)


def _gumbel_number(seed: int, number: int) -> float:
    """SplitMix64 with Python's integers."""
    x = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return -math.log(-math.log((((x ^ (x >> 31)) >> 11) + 0.5) * 2**-53))


def test_the_repetition_penalty_is_that_of_transformers_but_ignores_padding() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    scores, prompt = torch.tensor([[3.0, -2.0, 1.0, 0.5]]), [1, 2]
    ours = RowSampler(GREEDY._replace(repetition_penalty=2.0), ["x"], prompts=[prompt], device=torch.device("cpu"))
    assert torch.equal(
        ours(torch.tensor([[0, 0, 1, 2]]), scores), RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([prompt]), scores)
    )
    assert ours(torch.tensor([[0, 0, 1, 2, 3]]), scores).tolist() == [[3.0, -4.0, 0.5, 0.25]]


def test_padding_does_not_change_answers_with_a_repetition_penalty(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16, repetition_penalty=2.0)
    assert answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1, repetition_penalty=2.0) == together
    assert together != answer(workspace, tmp_path / "c.jsonl", rows, batch_size=16)


# Continuous batching, as on a GPU


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 2.0},
        {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
)
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_the_decoder_gives_the_answers_of_transformers_generate(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], slots: int
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    stops = range(0, 800, 5)  # including some outside the model's vocabulary
    expected = answer(workspace, tmp_path / "a.jsonl", rows, stops=stops, **sampling)
    monkeypatch.setattr(TransformersBackend, "_generate", _decode)
    assert answer(workspace, tmp_path / "b.jsonl", rows, stops=stops, batch_size=slots, **sampling) == expected
    assert len({row["answer_tokens"] for row in expected}) > 1, "some answers end early, and other rows get their slots"


def _decode(backend: TransformersBackend, rows: Any) -> Any:
    assert can_decode(backend.model) == ""
    assert fuse_projections(backend.model) == ""
    return backend._decode(rows)


def test_a_model_that_the_decoder_does_not_fit_is_left_as_it_was() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(vocab_size=100, num_key_value_heads=2, sliding_window=3, **sizes)).eval()
    wide = MistralForCausalLM(MistralConfig(vocab_size=100, num_key_value_heads=2, sliding_window=64, **sizes)).eval()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2)).eval()
    before = [model.config._attn_implementation for model in (windowed, wide, gpt2)]
    assert can_decode(wide) == ""
    assert can_decode(windowed) == ""
    can_decode(gpt2)
    assert [model.config._attn_implementation for model in (windowed, wide, gpt2)] == before


def test_a_model_with_other_logits_in_slots_or_its_own_attention_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()
    assert can_decode(model) == ""
    real = decoder.slot_attention
    monkeypatch.setattr(decoder, "slot_attention", lambda *args, **given: 2 * real(*args, **given))
    assert can_decode(model) == "its logits with a slot cache differ"
    monkeypatch.setattr(decoder, "slot_attention", real)
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def forward_without_slot_cache(*args: Any, **given: Any) -> Any:
        given.pop("slot_cache", None)
        return forward(*args, **given)

    monkeypatch.setattr(attention, "forward", forward_without_slot_cache)
    assert can_decode(model) == "its attention layers drop the keyword argument slot_cache, or have no layer_idx"
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 100), "it still works without slots"


def test_without_a_gpu_a_line_says_what_answers(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answer(workspace, tmp_path / "a.jsonl")
    assert capfd.readouterr().out.splitlines() == ["generate: no GPU: using Transformers' generate"]


def test_the_reason_for_the_slower_generate_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend: Any = TransformersBackend.__new__(TransformersBackend)  # without a model: there is no GPU to load it on
    backend.model, backend.can_pad = SimpleNamespace(device=torch.device("cuda")), False
    line = "generate: using Transformers' generate, which is slower: the model does not fit the faster decoder: "
    backend.settings = SimpleNamespace(max_new_tokens=8)
    assert not backend._prepare_decoder(5)
    assert capsys.readouterr().out == f"{line}its adapter is not merged\n"
    monkeypatch.setattr("stages.generate.transformers_backend.can_decode", lambda *_: "its attention needs a mask")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    backend.can_pad = True
    assert not backend._prepare_decoder(5)
    assert capsys.readouterr().out == f"{line}its attention needs a mask (process 1)\n"


def test_the_tutorials_values_are_ordinary_parameters(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()[:1]
    prompt = {name: value[-1:] if name == "prompt_ids" else value for name, value in rows[0].items()}
    tutorial = {"do_sample": True, "temperature": 0.5, "top_p": 0.85, "repetition_penalty": 2.0, "max_new_tokens": 1024}
    (found,) = answer(workspace, tmp_path / "a.jsonl", [prompt], **tutorial)
    assert 0 < found["answer_tokens"] <= 1024
    assert found["finish_reason"] == "stop" or found["answer_tokens"] == 1024
    assert [found] == answer(workspace, tmp_path / "b.jsonl", [prompt], **tutorial)
    (greedy,) = answer(workspace, tmp_path / "c.jsonl", [prompt], **tutorial | {"do_sample": False})
    assert greedy["answer"] != found["answer"]


def test_prompts_that_the_model_has_no_tokens_or_positions_for_are_refused(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "_has_position_table", lambda *_, **__: True)
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()[:3]
    rows[0]["prompt_ids"], rows[1]["prompt_ids"], rows[2]["prompt_ids"] = [400] * 40, [5] * 20, [5] * 60
    with pytest.raises(Problem) as problem:
        answer(workspace, tmp_path / "a.jsonl", rows, max_new_tokens=2009)
    model = workspace.root / "models" / "merged"
    token, positions = problem.value.messages
    assert token.startswith(
        f"{model}: a prompt or a window of raw text has the token 400, and the model's vocabulary has 400"
    )
    assert positions.startswith("params.yaml: generate.max_new_tokens: with 2,009 new tokens, ")
    assert f"than the 2,048 positions of {model}; the longest prompt has " in positions
    monkeypatch.undo()  # rotary positions go on
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 64}
    short = Path(shutil.copytree(model, tmp_path / "short"))
    (short / "config.json").write_text(json.dumps(config))
    answer(workspace, tmp_path / "b.jsonl", rows[1:], model=short, max_new_tokens=8)
    said = rf"generate: with 8 new tokens, \d of 5 answers could need more than the 64 positions of {short}, and what is "
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("linear", 512), ("dynamic", 512), ("yarn", 512), ("llama3", 128), ("longrope", 128), ("default", 128)],
)
def test_scaled_rotary_positions_count(kind: str, positions: int) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128}
    assert limits._positions(SimpleNamespace(max_position_embeddings=128, rope_parameters=rope)) == positions
    assert limits._positions(SimpleNamespace()) is None


def test_the_removed_preset_names_the_values_to_write() -> None:
    with pytest.raises(Problem) as problem:
        parse_section("generate", Params, PARAMS | {"preset": "tutorial"})
    assert problem.value.messages == (
        "params.yaml: generate.preset: removed; write the tutorial's values instead: do_sample: true, temperature: 0.5, "
        "top_p: 0.85, repetition_penalty: 2.0, max_new_tokens: 1024",
    )


# The text of an answer


def test_special_tokens_stay_in_an_answer_and_padding_at_its_end_does_not(tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    ids = tokenizer("<|endoftext|> a , 'b' <|im_start|>\n", add_special_tokens=False).input_ids
    pad = tokenizer.pad_token_id
    assert decode_answer(tokenizer, [*ids, pad, pad]) == "<|endoftext|> a , 'b' <|im_start|>\n"
    assert decode_answer(tokenizer, np.array(ids, np.int32)) == decode_answer(tokenizer, ids)
    assert decode_answer(tokenizer, [pad]) == decode_answer(tokenizer, []) == ""
    assert (
        decode_answer(tokenizer, [ids[1], pad, ids[1]]) == f"{tokenizer.decode(ids[1])}<|im_end|>{tokenizer.decode(ids[1])}"
    )


def test_slow_tokenizers_keep_special_tokens_and_words_apart_too(sentencepiece_tokenizers: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    for folder in sentencepiece_tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
        call, end = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
        words = tokenizer.encode("three red apples", add_special_tokens=False)
        assert decode_answer(tokenizer, words) == "three red apples"
        found = decode_answer(tokenizer, [call, *words, tokenizer.bos_token_id, end, tokenizer.eos_token_id])
        assert found.replace("> ", ">").replace(" <", "<") == "<tool_call>three red apples<s></tool_call>", folder


def test_a_perfect_call_behind_a_special_token_is_the_reference(workspace: Workspace, tmp_path: Path) -> None:
    """The template writes a special token before a call; reference and answer go through one decoder."""
    from stages.encode.chunks import prompt_batch
    from stages.encode.rows import RowMaker, TokenRow

    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.tool_calls -%}{{ '<|endoftext|>' + "
        "(m.tool_calls[0].function | tojson) }}{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    maker = RowMaker(
        workspace.root / "models" / "tokenizer",
        template,
        labels_on="assistant",
        thinking="train",
        train_empty_thinking=False,
        max_length=200,
        truncation_strategy="drop",
        use_fastokens=False,
    )
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "Köln"}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ((row,),) = maker.rows([{"id": "x", "source": "s", "messages": messages}], "test")
    assert isinstance(row, TokenRow)
    (prompt,) = prompt_batch(maker, [row]).to_pylist()
    answer_ids = row.ids[row.prompt_length :].tolist()
    stop = maker.stop_token_ids[0]
    assert prompt["reference"] == decode_answer(maker.encoder.tokenizer, answer_ids[: answer_ids.index(stop)])
    assert prompt["reference"].startswith('<|endoftext|>{"')


# What is answered


def test_at_most_so_many_test_prompts_are_answered_and_all_extra_ones(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    every = {row["id"]: row for row in answer(workspace, tmp_path / "a.jsonl", rows)}
    assert len(every) > 6
    some = answer(workspace, tmp_path / "b.jsonl", rows, max_predict_samples=5)
    assert some == [every[rows[index]["id"]] for index in choose_rows((row["id"] for row in rows), 5)]
    fewer = answer(workspace, tmp_path / "c.jsonl", rows[::-1][:-1], max_predict_samples=5)
    assert {row["id"] for row in some} - {row["id"] for row in fewer} <= {rows[0]["id"]}, "the others stay chosen"
    assert answer(workspace, tmp_path / "d.jsonl", rows, max_predict_samples=len(rows)) == list(every.values())


def test_lines_say_how_many_of_the_test_rows_are_answered(
    workspace: Workspace, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, predictions = workspace.root / "data" / "tokens", scratch / "out.jsonl"
    count = len(read_tokens(tokens / "test.arrow"))
    summaries = []
    for at_most in (2, 0):
        done = generate(
            Params(**PARAMS | {"max_predict_samples": at_most, "max_new_tokens": 1}),
            model=workspace.root / "models" / "merged",
            test_prompts=tokens / "test.arrow",
            extra_prompts=tokens / "prompts.arrow",
            test_text=tokens / "text.arrow",
            predictions=predictions,
            extra_predictions=scratch / "extra.jsonl",
            text_losses=scratch / "text.jsonl",
        )
        done.clean_up()
        summaries.append(done.summary)
    line = f"generate: answering 2 of {count} test rows and 3 other prompts (generate.max_predict_samples)\n"
    out = capsys.readouterr().out
    assert out.count("generate: answering") == out.count(line) == 1
    cut = "other prompts answered, "
    assert summaries[0].startswith(f"{predictions}: 2 of {count} test rows and 3 {cut}")
    assert summaries[1].startswith(f"{predictions}: {count} test rows and 3 {cut}")


def text_table(path: Path, windows: dict[str, int]) -> pa.Table:
    """Windows of documents, by the document's id."""
    ids = [f"{name}.{n}" if count > 1 else name for name, count in windows.items() for n in range(1, count + 1)]
    with open_tokens(path, TRAINING, [2]) as stream:
        for id in ids:
            row = {"id": id, "input_ids": [1, 2], "labels": [-100, 2]}
            stream.write_batch(pa.RecordBatch.from_pylist([row], schema=TRAINING))
    return read_tokens(path)


def test_documents_of_raw_text_are_chosen_whole_and_their_windows_are_bounded(tmp_path: Path) -> None:
    windows = {f"{number:016x}": 1 + number % 4 for number in range(50)}
    table = text_table(tmp_path / "a.arrow", windows)
    ids = table["id"].to_pylist()
    found = [ids[index] for index in choose_windows(table, 10)]
    documents = {document_of(id) for id in found}
    assert len(documents) == 10
    assert found == [id for id in ids if document_of(id) in documents], "all windows of each"
    assert documents == {list(windows)[index] for index in choose_rows(windows, 10)}
    assert choose_windows(table, 50) == list(range(len(ids)))
    book = text_table(tmp_path / "b.arrow", {"book": 500, "note": 1})
    some = choose_windows(book, 3)
    assert len(some) == 3 * WINDOWS_PER_DOCUMENT
    assert some == sorted(some)
    assert max(some) > 250


def test_prompts_are_read_where_they_are_needed(workspace: Workspace, tmp_path: Path) -> None:
    tokens = workspace.root / "data" / "tokens"
    expected = [*read_tokens(tokens / "test.arrow").to_pylist(), *read_tokens(tokens / "prompts.arrow").to_pylist()]
    rows = read_rows(tokens / "test.arrow", tokens / "prompts.arrow", tokens / "text.arrow", at_most=0)
    assert list(rows.prompts) == expected
    assert rows.prompts.lengths.tolist() == [len(row["prompt_ids"]) for row in expected]
    order = np.array([4, 0, 2])
    assert list(rows.prompts.select(order)[1:]) == [expected[0], expected[2]]
    assert vars(rows.prompts).keys() == {"_table", "_numbers", "lengths"}, "no rows are held"


def kill_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> list[int]:
    """Interrupts a method of the backend at its call of this number. Returns the sizes of the batches of all calls."""
    calls: list[int] = []
    real = getattr(TransformersBackend, method)

    def killed(self: Any, batch: Any) -> Any:
        calls.append(len(batch))
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(TransformersBackend, method, killed)
    return calls


def test_every_flipped_bit_of_a_kept_result_is_noticed_and_costs_that_result_alone(tmp_path: Path) -> None:
    answers = {index: Answer([5, 6, 7 + index], stopped=bool(index % 2)) for index in range(3)}
    kept_answers(tmp_path, 0).add(list(answers.items()))
    data = (tmp_path / "0.jsonl").read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "0.jsonl").write_bytes(flipped)
        found = kept_answers(tmp_path, 0)
        assert {index: found[index] for index in found}.items() <= answers.items()
        assert len(found) == 2 or (data[bit // 8] == ord("\n") and len(found) == 1)
        assert found.damaged == 1 or bit // 8 == len(data) - 1  # without its last newline it is one that was not finished
        found.add([(index, answers[index]) for index in answers if index not in found])
        again = kept_answers(tmp_path, 0)
        assert {index: again[index] for index in again} == answers


# Raw text


def make_windows(lengths: Sequence[int]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    windows = []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, 400, length).tolist()
        windows.append({"id": f"doc{number // 2}.{number % 2 + 1}", "input_ids": ids, "labels": [-100, *ids[1:]]})
    return windows


def text_run(
    workspace: Workspace, out: Path, windows: list[dict[str, Any]], *, prompts: bool = False, **given: Any
) -> list[dict[str, Any]]:
    tokens = workspace.root / "data" / "tokens"
    files = {name: out / f"{name}.arrow" for name in ("text", "none")}
    out.mkdir(exist_ok=True)
    with open_tokens(files["text"], TRAINING, [2]) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(windows, schema=TRAINING))
    with open_tokens(files["none"], PROMPTS, [2]):
        pass
    generate(
        Params(**PARAMS | given),
        model=workspace.root / "models" / "merged",
        test_prompts=tokens / "test.arrow" if prompts else files["none"],
        extra_prompts=tokens / "prompts.arrow" if prompts else files["none"],
        test_text=files["text"],
        predictions=out / "out.jsonl",
        extra_predictions=out / "extra.jsonl",
        text_losses=out / "text.jsonl",
    ).clean_up()
    return [json.loads(line) for line in (out / "text.jsonl").read_text().splitlines()]


def plain_losses(model: Any, windows: list[dict[str, Any]]) -> list[float]:
    """The definition, a window at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(window["labels"][1:], dtype=torch.long)
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
    return losses


def test_the_losses_of_raw_text_are_those_of_single_windows(workspace: Workspace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    windows = make_windows([9, 30, 2, 30, 1, 17, 30])
    windows[1]["labels"][5] = -100
    found = text_run(workspace, tmp_path / "a", windows)
    model = AutoModelForCausalLM.from_pretrained(workspace.root / "models" / "merged", dtype=torch.float32).eval()
    assert [row["id"] for row in found] == [window["id"] for window in windows]
    assert [row["tokens"] for row in found] == [8, 28, 1, 29, 0, 16, 29]
    assert [row["loss"] for row in found] == pytest.approx(plain_losses(model, windows), rel=1e-5)
    assert (tmp_path / "a" / "out.jsonl").read_text() == (tmp_path / "a" / "extra.jsonl").read_text() == "\n"
    assert text_run(workspace, tmp_path / "b", windows, batch_size=1) == [
        row | {"loss": pytest.approx(row["loss"], rel=1e-5)} for row in found
    ]


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_the_losses_include_what_a_model_does_after_its_head_and_need_few_logits_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "gemma2": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "final_logit_softcapping": 0.5,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    }[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=400, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = make_windows([9, 30, 12])
    expected = plain_losses(model, windows)
    rows: list[int] = []
    passes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: rows.append(logits.shape[-2]))
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(text_losses, "MAX_LOGITS", 7 * 400)
    assert text_losses.window_losses(model, windows) == pytest.approx(expected, rel=1e-5)
    assert max(rows) == 7
    chunks = math.ceil((8 + 29 + 11) / 7)
    assert len(rows) == 1 + 2 + chunks  # the windows, the trial whether the head is last, the chunks
    assert len(passes) == {"gemma2": 2 + chunks, "gpt2": 2}[kind]  # what follows Gemma's head needs the whole model


def test_an_adapter_of_virtual_tokens_gives_losses_too() -> None:
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, initializer_range=0.3, **sizes))
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    windows = make_windows([9, 20])
    assert text_losses.window_losses(adapted, windows) == pytest.approx(plain_losses(adapted, windows), rel=1e-5)


def test_batches_of_windows_are_bounded_and_shortest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_losses, "MAX_BATCH_TOKENS", 20)
    assert text_losses.make_batches([30, 5, 5, 5, 10, 10, 6], batch_size=3) == [[1, 2, 3], [6, 4], [5], [0]]
    assert text_losses.make_batches([], batch_size=3) == []


def test_windows_that_do_not_fit_into_memory_are_halved(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, real = make_windows([4, 4, 4]), text_losses._batch_losses
    most = 1

    def small(model: Any, some: Any) -> Any:
        if len(some) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, some)

    model: Any = torch.nn.Module()
    monkeypatch.setattr(text_losses, "_batch_losses", small)
    real = lambda _, some: [float(len(window["id"])) for window in some]  # noqa: E731
    assert text_losses.window_losses(model, windows) == [6.0] * 3
    most = 0
    with pytest.raises(Problem, match=r"out of memory on a single window of raw text, doc0\.1 with 4 tokens; lower encode"):
        text_losses.window_losses(model, windows)
    most, real = 3, lambda _, some: [1.0, math.nan, 1.0]
    with pytest.raises(Problem, match=r"the loss on raw text, doc0\.2, is nan; set generate\.dtype to float32 or bfloat16"):
        text_losses.window_losses(model, windows)


@pytest.mark.parametrize("lost", [0, 1])
def test_raw_text_resumes_and_two_processes_give_the_same_bytes(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    windows = make_windows([9, 30, 2, 30, 1, 17, 30, 12, 14])
    text_run(workspace, scratch / "whole", windows, prompts=True)
    text_run(workspace, scratch / "two", windows, num_processes=2)
    whole = (scratch / "whole" / "text.jsonl").read_bytes()
    assert (scratch / "two" / "text.jsonl").read_bytes() == whole
    calls = kill_at(monkeypatch, "text_losses", 2)
    with pytest.raises(KeyboardInterrupt):
        text_run(workspace, scratch / "again", windows)
    (kept,) = (scratch / ".checkpoints").glob("generate-merged-*/0.text.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[: len(lines) - lost]))  # as if killed in the middle of writing a batch
    text_run(workspace, scratch / "again", windows)
    assert calls == [4, 4, *[4] * lost, 4, 1]
    assert (scratch / "again" / "text.jsonl").read_bytes() == whole


def test_at_most_so_many_documents_of_raw_text_are_measured(workspace: Workspace, tmp_path: Path) -> None:
    windows = make_windows([9, 30, 2, 30, 1, 17, 30])
    every = {row["id"]: row for row in text_run(workspace, tmp_path / "a", windows)}
    some = text_run(workspace, tmp_path / "b", windows, max_predict_samples=2)
    documents = {row["id"].split(".")[0] for row in some}
    assert len(documents) == 2
    assert some == [
        row | {"loss": pytest.approx(row["loss"], rel=1e-5)} for id, row in every.items() if id.split(".")[0] in documents
    ]


def test_raw_text_is_refused_with_vllm(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(
        Problem, match=r"params\.yaml: generate\.use_vllm: true, but the losses on the 2 windows of raw text in .* to false"
    ):
        text_run(workspace, scratch / "a", make_windows([3, 4]), use_vllm=True)


# Interrupted runs, and too little memory


def test_a_killed_run_resumes_after_the_last_finished_batch_and_writes_the_same_bytes(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(workspace, scratch / "whole.jsonl")
    calls = kill_at(monkeypatch, "_generate_batch", 3)
    with pytest.raises(KeyboardInterrupt):
        answer(workspace, scratch / "out.jsonl")
    assert not (scratch / "out.jsonl").exists()
    (kept,) = (scratch / ".checkpoints").glob("generate-merged-*/0.jsonl")
    assert len(kept.read_bytes().splitlines()) == 2 * 4
    with kept.open("ab") as file:
        file.write(b"[0, [[1, 2")  # killed while it wrote a batch
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # a run with other parameters starts from the beginning
        answer(workspace, scratch / "other.jsonl", max_new_tokens=7)
    calls.extend([0] * 9)
    first = len(calls)
    answer(workspace, scratch / "out.jsonl")
    prompts = len(read_tokens(workspace.root / "data" / "tokens" / "test.arrow")) + 3
    assert len(calls) - first == math.ceil(prompts / 4) - 2, "all batches but the two that were finished"
    assert (scratch / "out.jsonl").read_bytes() == (scratch / "whole.jsonl").read_bytes()
    assert not kept.parent.exists()


def test_an_incomplete_last_line_of_kept_answers_is_dropped(tmp_path: Path) -> None:
    first, second = [(3, Answer([5, 6], stopped=True))], [(0, Answer([7], stopped=False)), (1, Answer([8], stopped=False))]
    kept = kept_answers(tmp_path, 1)
    kept.add(first)
    with (tmp_path / "1.jsonl").open("ab") as file:
        file.write(b"[0, [[7")
    kept = kept_answers(tmp_path, 1)
    assert dict(kept) == dict(first)
    kept.add(second)
    assert dict(kept) == dict(kept_answers(tmp_path, 1)) == dict(first + second)
    assert dict(kept_answers(tmp_path, 0)) == {}


def test_a_second_run_on_the_same_inputs_is_refused_until_the_first_has_ended(workspace: Workspace, scratch: Path) -> None:
    tokens = workspace.root / "data" / "tokens"

    def run() -> Any:
        return generate(
            Params(**PARAMS),
            model=workspace.root / "models" / "merged",
            test_prompts=tokens / "prompts.arrow",
            extra_prompts=tokens / "prompts.arrow",
            test_text=tokens / "text.arrow",
            predictions=scratch / "out.jsonl",
            extra_predictions=scratch / "extra.jsonl",
            text_losses=scratch / "text.jsonl",
        )

    done = run()  # python -m stages has yet to call its clean_up
    with pytest.raises(Problem, match=rf"process {os.getpid()} is running generate-merged on the same "):
        run()
    done.clean_up()
    run().clean_up()
    assert not [path for path in (scratch / ".checkpoints").iterdir() if path.is_dir()]


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = answer(workspace, tmp_path / "a.jsonl")
    sizes, real = [], TransformersBackend._generate_batch
    capfd.readouterr()

    def small(self: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, rows)

    monkeypatch.setattr(TransformersBackend, "_generate_batch", small)
    assert answer(workspace, tmp_path / "b.jsonl", batch_size=8) == expected
    assert {8, 4, 2} <= set(sizes)
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if "batch of 8" in line] == [
        "generate: out of memory with a batch of 8 prompts; continuing with 4"
    ]

    def none(self: Any, rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersBackend, "_generate_batch", none)
    with pytest.raises(Problem, match=r"out of memory on a single prompt, [\w-]+ with \d+ tokens"):
        answer(workspace, tmp_path / "c.jsonl")


@pytest.mark.parametrize("field", ["max_new_tokens", "batch_size", "temperature", "top_p"])
def test_parameters_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Params(**PARAMS | {field: 0})


class _SharedInput(torch.nn.Module):
    """Two layers that share an input. `flat_view`: it views their outputs as one dimension, which a slice does not allow."""

    device = torch.device("cpu")

    def __init__(self, *, flat_view: bool) -> None:
        super().__init__()
        self.a, self.b, self.flat_view = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), flat_view

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        x = input_ids.unsqueeze(-1).float().expand(-1, -1, 4).clone()
        a, b = self.a(x), self.b(x)
        return SimpleNamespace(logits=(a.view(-1) + b.view(-1)) if self.flat_view else (a + b).flatten())


@pytest.mark.parametrize("flat_view", [False, True])
def test_projections_are_fused_only_if_the_model_can_use_slices(flat_view: bool) -> None:
    model, ids = _SharedInput(flat_view=flat_view), torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    reason = fuse_projections(model)
    assert reason.startswith("RuntimeError: view size is not compatible") if flat_view else reason == ""
    assert ("forward" in vars(model.a)) != flat_view
    torch.testing.assert_close(model(ids).logits, expected)


def test_the_decoder_continues_with_half_the_slots_if_memory_is_short(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    stops = [2, *range(20, 800, 40)]
    expected = answer(workspace, tmp_path / "a.jsonl", rows, stops=stops)
    most, prefill, seen = 3, Decoder._prefill, []

    def small(self: Any, slots: Any, *, prompts: Any, row_ids: Any) -> None:
        # The first prefills succeed, so that some rows are answered before. The rows of can_decode have no id.
        if self.cache.slots > most and len(seen) >= 2 and row_ids[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append((self.cache.slots, row_ids[0]))
        prefill(self, slots, prompts=prompts, row_ids=row_ids)

    monkeypatch.setattr(TransformersBackend, "_generate", _decode)
    monkeypatch.setattr(Decoder, "_prefill", small)
    monkeypatch.setattr("stages.generate.decoder.MAX_PREFILL_TOKENS", 60)
    assert answer(workspace, tmp_path / "b.jsonl", rows, stops=stops, batch_size=8) == expected
    assert {slots for slots, row_id in seen if row_id} == {8, 2}
    most = 0
    with pytest.raises(Problem, match=r"out of memory on a single prompt, [\w-]+ with \d+ tokens"):
        answer(workspace, tmp_path / "c.jsonl", rows, stops=stops, batch_size=8)


# Several processes


def test_two_processes_give_the_answers_of_one_and_resume_from_kept_answers(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    expected = answer(workspace, scratch / "one.jsonl", rows)
    assert answer(workspace, scratch / "two.jsonl", rows, num_processes=2) == expected

    def only_rank_1(function: Any, processes: int, *given: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setenv("TORCHELASTIC_RUN_ID", "0")
            patched.setenv("WORLD_SIZE", "2")
            patched.setenv("RANK", "1")
            patched.setattr("stages.model.distributed.init_exchange", lambda: None)
            answer_share(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("stages.generate.generate.launch", only_rank_1)
        with pytest.raises(KeyboardInterrupt):
            answer(workspace, scratch / "two.jsonl", rows, num_processes=2)
    (kept,) = (scratch / ".checkpoints").glob("generate-merged-*/1.jsonl")
    answers = kept_answers(kept.parent, 1)
    number = next(iter(answers))
    answers.add([(number, Answer([5], stopped=False))])  # a mark that shows that it is not answered again
    found = answer(workspace, scratch / "two.jsonl", rows, num_processes=2)
    assert found[number]["answer_tokens"] == 1
    assert found[:number] + found[number + 1 :] == expected[:number] + expected[number + 1 :]
    assert not kept.parent.exists()


# vLLM is not installed here: a fake with the parts of its interface that are used


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


def test_vllm_gets_the_tokens_stop_tokens_and_seeds_and_its_answers_are_written_alike(
    workspace: Workspace, tmp_path: Path, engine: type[_Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    stops = [2, *range(20, 800, 40)]
    expected = answer(workspace, tmp_path / "a.jsonl", rows, stops=stops)
    monkeypatch.setattr("stages.generate.vllm_backend.ROWS_PER_CALL", 4)
    assert answer(workspace, tmp_path / "b.jsonl", rows, stops=stops, use_vllm=True, num_processes=2) == expected
    assert {row["finish_reason"] for row in expected} == {"stop", "length"}
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
    assert {params.seed for params in seen} >= {row_seed(0, row["id"]) for row in rows}
    assert len({params.seed for params in seen}) == len(seen)


def test_if_vllm_is_not_installed_a_message_says_so(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        Problem, match=r"params\.yaml: generate\.use_vllm: true, but vLLM is not installed; pip install vllm, or "
    ):
        answer(workspace, tmp_path / "a.jsonl", use_vllm=True)


def test_errors_of_vllm_are_reported(workspace: Workspace, tmp_path: Path, engine: type[_Engine]) -> None:
    folder = tmp_path / "error"
    shutil.copytree(workspace.root / "models" / "merged", folder)
    settings = GenerationSettings(sampling=GREEDY, max_new_tokens=8, batch_size=4, dtype="float32", num_processes=1)
    with pytest.raises(Problem, match=r"vLLM cannot load .*error: no such architecture"):
        VllmBackend(folder, settings, template_stops=[2])
    long = {"id": "long", "prompt": "", "prompt_ids": [5] * 501, "reference": ""}
    with pytest.raises(Problem, match="vLLM: the prompt is too long"):
        answer(workspace, tmp_path / "a.jsonl", [long], use_vllm=True)
    (folder / "adapter").mkdir()
    with pytest.raises(
        Problem, match=r"params\.yaml: generate\.use_vllm: true, but vLLM does not read the adapter in .*; set it to false"
    ):
        VllmBackend(folder, settings, template_stops=[2])
