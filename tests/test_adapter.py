"""Every kind of adapter: the model that is trained, the one that is merged, and the one that answers are the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.core.problem import Problem
from stages.core.tokens import read_tokens
from stages.generate.generate import Params as GenerateParams
from stages.generate.generate import generate
from stages.merge import merge as merge_module
from stages.merge.merge import Params as MergeParams
from stages.merge.merge import merge
from stages.model.adapter import INITIAL, Adapter, add_adapter, find_targets, initial_lora_from, save_adapter
from stages.model.base_weights import BaseWeights
from stages.model.lora import lora_scaling
from stages.model.quantize import Quantization, load_quantized
from tests.runs import INPUTS, params, run
from tests.tiny import Workspace, make_other_model

SHORT = {"training_arguments": {"max_steps": 4}, "learning_rate": 2e-2}
PARITY = {"base": "dequantized"}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "PARITY_ROWS", 4)


def merged(workspace: Workspace, out: Path, base: Path | str = INPUTS[2], **changed: Any) -> dict[str, Any]:
    """Merges the adapter in `out`, and returns the report and the summary."""
    tokens = workspace.root / "data" / "tokens"
    done = merge(
        MergeParams(**PARITY | changed),
        base=workspace.root / base,
        adapter=out / "adapter",
        validation_tokens=tokens / "validation.arrow",
        chat_template=tokens / "chat_template.jinja",
        merged=out / "merged",
        report=out / "merge.json",
    )
    report: dict[str, Any] = json.loads((out / "merge.json").read_text())
    return report | {"summary": done.summary}


def answered(workspace: Workspace, out: Path) -> list[dict[str, Any]]:
    """The merged model's answers."""
    tokens = workspace.root / "data" / "tokens"
    generate(
        GenerateParams(**workspace.params()["generate"]),
        model=out / "merged",
        test_prompts=tokens / "test.arrow",
        extra_prompts=tokens / "prompts.arrow",
        test_text=tokens / "text.arrow",
        predictions=out / "predictions.jsonl",
        extra_predictions=out / "prompts.jsonl",
        text_losses=out / "text.jsonl",
    ).clean_up()
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def base_of(workspace: Workspace, tmp_path: Path, kind: str) -> Path:
    """The workspace's base, which is a Llama, or a model of another kind."""
    base = workspace.root / "models" / "base"
    if kind != "llama":
        base = Path(shutil.copytree(base, tmp_path / "base"))
        make_other_model(base, kind)
    return base


@pytest.mark.parametrize(
    "given",
    [
        {"use_dora": True},
        {"use_dora": True, "quantization": "none", "use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "quantization": "int8"},
        {"init_lora_weights": "olora", "quantization": "none", "use_rslora": True},
        {"init_lora_weights": "loftq", "quantization": "fp4"},
        {"init_lora_weights": "gaussian", "target_modules": r".*\.(q|v)_proj", "llm_int8_skip_modules": ["q_proj"]},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_every_kind_of_lora_is_merged_into_the_model_that_was_trained(
    workspace: Workspace, scratch: Path, given: dict[str, Any]
) -> None:
    out = run(workspace, scratch, **SHORT | given)
    report = json.loads((out / "report.json").read_text())
    assert report["validation_loss"] < report["validation_loss_before"]
    assert (out / "adapter" / INITIAL).exists() == str(given.get("init_lora_weights")).startswith(("pissa", "olora"))
    parity = merged(workspace, out)
    assert parity["method"] == "lora"
    assert parity["trained_loss"] == pytest.approx(parity["merged_loss"], abs=0.02)
    assert all(row["answer_tokens"] for row in answered(workspace, out))
    assert not (out / "merged" / "adapter").exists()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("gpt2", {"quantization": "none"}),
        ("gpt2", {"quantization": "none", "use_dora": True}),
        ("gpt2", {"quantization": "none", "init_lora_weights": "olora"}),
        ("gpt2", {"quantization": "nf4", "use_dora": True}),
        ("gpt2", {"quantization": "nf4", "init_lora_weights": "pissa", "use_rslora": True}),
        ("gpt2", {"quantization": "int8", "llm_int8_skip_modules": ["c_fc"]}),
        ("gpt2", {"quantization": "nf4", "init_lora_weights": "olora", "rank_pattern": {"mlp.c_proj": 4}}),
        ("phi3", {"quantization": "none", "use_dora": True}),
        ("phi3", {"quantization": "nf4", "target_modules": r".*(0.*_proj|lm_head)"}),
        ("phi3", {"quantization": "nf4", "rank_pattern": {"qkv_proj": 4}, "alpha_pattern": {"0.*o_proj": 3.0}}),
    ],
    ids=str,
)
def test_conv1d_and_fused_layers_are_merged_within_float32_rounding(
    workspace: Workspace, scratch: Path, kind: str, given: dict[str, Any]
) -> None:
    base = base_of(workspace, scratch, kind)
    out = run(workspace, scratch, base, **SHORT | given)
    report = json.loads((out / "report.json").read_text())
    assert report["validation_loss"] < report["validation_loss_before"]
    training = json.loads((out / "adapter" / "training.json").read_text())
    assert len(training["transposed_layers"]) == (8 if kind == "gpt2" else 0)
    assert len(training["quantized_layers"]) == {"none": 0, "nf4": 8, "int8": 6}[given["quantization"]]
    parity = merged(workspace, out, base)
    assert parity["merged_layers"] == (5 if "target_modules" in given else 8)
    # int8 also rounds the inputs of a layer, which the merged layer does not.
    assert parity["mean_kl"] < (0.02 if given["quantization"] == "int8" else 1e-7)
    assert given["quantization"] == "int8" or parity["top1_agreement"] == 1


def test_layers_have_their_own_ranks_and_scaling(workspace: Workspace, tmp_path: Path) -> None:
    model = adapted(
        workspace,
        rank_pattern={r"layers\.1\..*_proj": 4, "up_proj": 8, "^model.layers.0.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 6, "layers.0.mlp.up_proj": 1.5},
        use_rslora=True,
    )
    save_adapter(model, tmp_path, {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "layers.0.self_attn.q_proj": (16, 6 / 4),
        "layers.0.self_attn.k_proj": (16, 32 / 4),
        "layers.0.mlp.up_proj": (8, 1.5 / 8**0.5),
        "layers.0.mlp.down_proj": (2, 32 / 2**0.5),
        "layers.1.self_attn.q_proj": (4, 6 / 2),
        "layers.1.mlp.up_proj": (4, 32 / 2),  # the first pattern counts, also after PEFT has sorted them
    }
    again = PeftModel.from_pretrained(load_quantized(workspace.root / INPUTS[2], settings("nf4")).model, str(tmp_path))
    for name, (r, scaling) in expected.items():
        for each in (model, again):
            layer = each.get_base_model().model.get_submodule(name)
            assert layer.lora_A["default"].weight.shape[0] == r
            assert layer.scaling["default"] == pytest.approx(scaling)
        assert lora_scaling(config, f"model.{name}") == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"rank_pattern": {"q_proj": 2, "W_pack": 2, "layers.1.*q_proj": 4}, "alpha_pattern": {"proj": 1}},
            [
                "params.yaml: train.rank_pattern: 'W_pack' matches none of the layers in train.target_modules",
                "params.yaml: train.rank_pattern: 'layers.1.*q_proj' matches none",
                "params.yaml: train.alpha_pattern: 'proj' matches none",
            ],
        ),
        (
            {"rank_pattern": {"*": 2}},
            ["train.rank_pattern: '(.*\\\\.)?(*)$' is not a valid regular expression: nothing to repeat"],
        ),
    ],
)
def test_a_pattern_that_applies_to_no_layer_is_named(
    workspace: Workspace, given: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(Problem) as caught:
        adapted(workspace, **given)
    for message, part in zip(caught.value.messages, expected, strict=True):
        assert part in message


def test_dora_with_int8_is_refused_on_the_cpu(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem, match=r"params\.yaml: train\.use_dora: must be false with int8 on the CPU"):
        run(workspace, scratch, use_dora=True, quantization="int8")


@pytest.mark.parametrize(
    "given",
    [
        {"method": "p_tuning", "encoder_hidden_size": 32, "learning_rate": 2e-3},
        {"method": "prefix_tuning", "num_virtual_tokens": 4},
        {"method": "prefix_tuning", "prefix_projection": True, "quantization": "none"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_virtual_tokens_are_copied_next_to_the_weights_and_generate_uses_them(
    workspace: Workspace, scratch: Path, given: dict[str, Any]
) -> None:
    out = run(workspace, scratch, **SHORT | given)
    report = json.loads((out / "report.json").read_text())
    assert report["validation_loss"] < report["validation_loss_before"]
    parity = merged(workspace, out)
    assert parity["method"] == given["method"]
    assert parity["merged_layers"] == 0
    assert parity["delta_kept"] is None
    cost = parity["quantization_cost"]
    assert (cost is None) == (given.get("quantization") == "none")
    assert cost is None or cost["cost"] == pytest.approx(parity["base_loss"] - cost["full_base_loss"])
    assert f"{given['method']} cannot be merged, so the adapter is in {out / 'merged' / 'adapter'}" in parity["summary"]
    assert "PeftModel.from_pretrained" in (out / "merged" / "README.md").read_text()
    # The answers are those of the base with the adapter, not of the base alone.
    base = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(out / "merged" / "adapter")).eval()
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    for row, answer in list(zip(rows, answered(workspace, out), strict=True))[:3]:
        ids = list(row["prompt_ids"])
        new: list[int] = []
        for _ in range(answer["answer_tokens"]):
            with torch.no_grad():
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert len(new) == answer["answer_tokens"]
        assert answer["answer"] == _decode(workspace, new)


def _decode(workspace: Workspace, ids: list[int]) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace.root / "models" / "tokenizer")
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# Initialization


def settings(quantization: str) -> Quantization:
    return Quantization.model_validate(
        {
            "quantization": quantization,
            "bnb_4bit_use_double_quant": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": [],
            "dtype": "float32",
        }
    )


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_initial_matrices_are_those_of_peft(how: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    weight = layer[0].weight.detach().clone()
    expected = get_peft_model(layer, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=how))
    lora_a, lora_b = initial_lora_from(weight, 4, scaling=2.0, how=how, settings=settings("none"))
    inner = expected.base_model.model[0]
    product = inner.lora_B["default"].weight @ inner.lora_A["default"].weight
    torch.testing.assert_close(lora_b @ lora_a, product)
    torch.testing.assert_close(weight - 2.0 * lora_b @ lora_a, inner.base_layer.weight)


def adapted(workspace: Workspace, base: Path | str = INPUTS[2], quantization: str = "nf4", **given: Any) -> Any:
    """A base, the workspace's or another, with a new adapter, in evaluation mode."""
    wanted = dict(workspace.params()["train"]) | given
    folder = workspace.root / base
    model = load_quantized(folder, settings(quantization)).model
    adapter = Adapter(**{name: wanted[name] for name in Adapter.model_fields})
    return add_adapter(model, folder, settings=settings(quantization), wanted=adapter).eval()


def test_loftq_starts_closer_to_the_base_than_quantization_alone(workspace: Workspace) -> None:
    base = workspace.root / "models" / "base"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    distance = {}
    for how in (True, "loftq"):
        torch.manual_seed(0)
        model = adapted(workspace, r=16, init_lora_weights=how)
        ids = torch.arange(5, 25).unsqueeze(0)
        with torch.no_grad():
            distance[how] = (model(ids).logits - plain(ids).logits).pow(2).mean().item()
    assert distance["loftq"] < 0.8 * distance[True]


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_initial_delta_weight_is_what_was_subtracted_from_the_base(
    workspace: Workspace, tmp_path: Path, kind: str, how: str
) -> None:
    base = base_of(workspace, tmp_path, kind)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = adapted(workspace, base, "none", init_lora_weights=how)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    assert all(matrix.abs().max() > 0.1 for name, matrix in model.named_parameters() if "lora_B" in name)


# Target modules


def test_layers_are_found_by_name_and_regular_expression_and_all_linear_excludes_the_head(workspace: Workspace) -> None:
    model = load_quantized(workspace.root / "models" / "base", settings("nf4")).model
    all_linear = find_targets(model, "all-linear")
    assert len(all_linear) == 14
    assert find_targets(model, [*{name.rpartition(".")[2] for name in all_linear}]) == all_linear
    assert find_targets(model, ["layers.1.mlp.up_proj", "q_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert find_targets(model, r"model\.layers\.0\.mlp\..*") == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]


def test_the_output_head_can_be_a_target_unless_it_shares_its_weight_with_the_embeddings(
    workspace: Workspace, tmp_path: Path
) -> None:
    for wanted in (["q_proj", "lm_head"], r".*"):
        with pytest.raises(Problem, match=r"train\.target_modules: lm_head shares its weight with the input embed"):
            adapted(workspace, target_modules=wanted)
    model = load_quantized(base_of(workspace, tmp_path, "phi3"), settings("nf4")).model
    assert find_targets(model, ["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_proj", "W_pack"], r"W_pack is not in the model; linear layers here: down_proj, gate_proj, k_proj, lm_head"),
        ([], "the list is empty; linear layers here: down_proj, gate_proj, k_proj, lm_head"),
        ("q_proj", "the regular expression 'q_proj' matches no full name such as 'model.layers.0.self_attn.q_proj'"),
        ("*", "'\\*' is not a valid regular expression: nothing to repeat"),
    ],
)
def test_the_message_for_a_name_that_matches_nothing_lists_the_names(
    workspace: Workspace, wanted: Any, message: str
) -> None:
    model = load_quantized(workspace.root / "models" / "base", settings("nf4")).model
    with pytest.raises(Problem, match=rf"^params\.yaml: train\.target_modules: .*{message}"):
        find_targets(model, wanted)


def test_an_adapter_that_could_not_be_merged_is_refused_before_training(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        Problem, match=r"train\.r: 64 is more than the rank of model\.layers\.0\.self_attn\.k_proj, which is 32 x 64"
    ):
        adapted(workspace, r=64, init_lora_weights="olora")
    adapted(workspace, r=64)
    base = Path(shutil.copytree(workspace.root / INPUTS[2], tmp_path / "base"))
    monkeypatch.setattr(BaseWeights, "__contains__", lambda self, name: not name.endswith("q_proj.weight"))
    with pytest.raises(
        Problem,
        match=r"has no tensor for model\.layers\.0\.self_attn\.q_proj\.weight, into which merge would merge the adapter "
        r"\(and 1 more\)",
    ):
        adapted(workspace, base)


def test_a_module_to_skip_must_be_in_the_model(workspace: Workspace) -> None:
    wanted = settings("nf4").model_copy(update={"llm_int8_skip_modules": ["q_proj", "c_attn"]})
    with pytest.raises(
        Problem, match=r"train\.llm_int8_skip_modules: the model has no linear layer 'c_attn'; its .* are down_proj"
    ):
        load_quantized(workspace.root / "models" / "base", wanted)
    wanted = settings("nf4").model_copy(update={"llm_int8_skip_modules": ["q_proj"]})
    loaded = load_quantized(workspace.root / "models" / "base", wanted)
    assert len(loaded.layers) == 12
    assert not any(name.endswith(("q_proj", "lm_head")) for name in loaded.layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"method": "loha"}, "method"),
    ],
)
def test_an_unknown_value_is_refused(workspace: Workspace, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(workspace, **given)


def test_the_saved_initial_matrices_are_those_from_the_start_of_training(workspace: Workspace, scratch: Path) -> None:
    out = run(workspace, scratch, **SHORT, init_lora_weights="olora")
    first, last = load_file(out / "adapter" / INITIAL), load_file(out / "adapter" / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)
