"""fetch: bases that come quantized, tensor by tensor against what Transformers and bitsandbytes make of the same files."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.fetch import dequantize
from tests.fetching import Hub, edit_config, from_hub, refused, refused_by_hub, run, set_free_space
from tests.hub_server import COMMIT, served
from tests.tiny import folder_hash, make_model, make_tokenizer

Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 48]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"]}
KEPT = "model.norm.weight"
"""A tensor that no format quantizes."""


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8, and the scale of each block, whose last ones may be smaller."""
    scales = torch.empty(math.ceil(weight.shape[0] / block[0]), math.ceil(weight.shape[1] / block[1]))
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].float().abs().max() / 448
            values[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def times_scales(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The other way round, one number at a time."""
    rows, columns = torch.meshgrid(torch.arange(values.shape[0]), torch.arange(values.shape[1]), indexing="ij")
    return (values.float() * scales.float()[rows // block[0], columns // block[1]]).to(torch.bfloat16)


def is_matrix(name: str) -> bool:
    """Whether a tensor of the tiny Llama is quantized in these tests."""
    return name.endswith("proj.weight")


def rewrite(folder: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=settings)
    return folder


def make_fp8(folder: Path) -> Path:
    """The tiny Llama as DeepSeek V3 is stored: float8, and a scale for each block."""
    make_model(folder)
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if is_matrix(name):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(weight, (32, 48))
        else:
            tensors[name] = weight
    return rewrite(folder, tensors, FP8)


def make_mxfp4(folder: Path) -> Path:
    """A gpt-oss of two layers as it was released."""
    from transformers import GptOssConfig, GptOssForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = weight.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(110, 132, (experts, outputs, inputs // 32), dtype=torch.uint8)
        else:
            tensors[name] = weight
    return rewrite(folder, tensors, MXFP4)


def make_bnb(folder: Path, *, dtype: torch.dtype = torch.bfloat16, model: Path | None = None, **given: Any) -> Path:
    """A model as bitsandbytes and Transformers save it: the tiny Llama, or that of the folder `model`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if model is None:
        make_model(model := folder.with_name("plain"))
    config = BitsAndBytesConfig(**given)
    make_tokenizer(folder)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=config).save_pretrained(folder)
    return folder


def fetched(tmp_path: Path, folder: Path) -> Path:
    return run(tmp_path, model_name_or_path=str(folder), revision=folder_hash(folder))


def same_weights(base: Path, reference: Any) -> int:
    """Asserts that Transformers loads `base` with every weight of another model, to the bit; returns how many there are."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    own, wanted = model.state_dict(), reference.state_dict()
    assert own.keys() == wanted.keys()
    assert [name for name in own if not torch.equal(own[name], wanted[name].to(torch.bfloat16))] == []
    return len(own)


def assert_ordinary(base: Path) -> None:
    """What the later stages rely on."""
    config = json.loads((base / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not [key for key in config if "quant" in key]
    assert {tensor.dtype for tensor in load_file(base / "model.safetensors").values()} == {torch.bfloat16}
    manifest = json.loads((base / "manifest.json").read_text())
    assert manifest["files"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir() if file.name != "manifest.json"
    }


def test_fp8_in_blocks_is_what_transformers_dequantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    # Blocks that fill the matrices: for others Transformers takes the wrong size, see the next test.
    folder = make_fp8(tmp_path / "model")
    settings = FP8 | {"weight_block_size": [32, 32]}
    tensors = load_file(folder / "model.safetensors")
    for name in filter(is_matrix, list(tensors)):
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name].float(), (32, 32))
    rewrite(folder, tensors, settings)
    base = fetched(tmp_path, folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert same_weights(base, loaded) > 14
    assert_ordinary(base)
    assert "fetch: dequantized 14 of 20 tensors from fp8 to bfloat16: 1 MB to 1 MB" in capsys.readouterr().out
    assert json.loads((base / "manifest.json").read_text())["dequantized_from"] == "fp8"


def test_fp8_blocks_at_an_edge_are_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize, "CHUNK_ELEMENTS", 64 * 40)  # several chunks of rows
    folder = make_fp8(tmp_path / "model")
    stored, written = load_file(folder / "model.safetensors"), load_file(fetched(tmp_path, folder) / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (2, 3)  # of 64 rows and 128 columns
    for name in filter(is_matrix, written):
        assert torch.equal(written[name], times_scales(stored[name], stored[f"{name}_scale_inv"], (32, 48))), name


@pytest.mark.parametrize(
    ("weight", "scale", "unused"),
    [
        ("weight", "weight_scale_inv", "activation_scale"),  # Mistral 3
        ("weight", "weight_scale", "input_scale"),  # AutoFP8
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_fp8_with_one_scale_for_a_tensor(tmp_path: Path, weight: str, scale: str, unused: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    make_model(folder := tmp_path / "model")
    tensors: Tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if is_matrix(name):
            layer = name.removesuffix(weight)
            one = (value.float().abs().max() / 448).to(dtype)
            tensors[name] = (value.float() / one).to(torch.float8_e4m3fn)
            tensors[layer + scale], tensors[layer + unused] = one, torch.tensor(0.5, dtype=dtype)
        else:
            tensors[name] = value
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    rewrite(folder, tensors, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None})
    base = fetched(tmp_path, folder)
    written = load_file(base / "model.safetensors")
    assert written.keys() == {name for name in tensors if not name.endswith("_scale") and not name.endswith("scale_inv")}
    name = "model.layers.1.mlp.up_proj.weight"
    one = tensors[name.removesuffix(weight) + scale]
    assert torch.equal(written[name], (tensors[name].float() * one.float()).to(torch.bfloat16))
    if scale == "weight_scale_inv":
        config = FineGrainedFP8Config(dequantize=True, weight_block_size=None, activation_scheme="static")
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
        same_weights(base, loaded)


@pytest.mark.parametrize("grid", ["block", "row", "expert"])
def test_fp8_experts_in_one_tensor(tmp_path: Path, grid: str) -> None:
    make_model(folder := tmp_path / "model")
    experts = torch.randn(3, 64, 96)
    blocks = {"block": (32, 48), "row": (1, 96), "expert": (64, 96)}
    parts = [to_fp8(each, blocks[grid]) for each in experts]
    values, scales = (torch.stack(each) for each in zip(*parts, strict=True))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(folder / "model.safetensors") | {name: values, f"{name}_scale_inv": scales}
    written = load_file(fetched(tmp_path, rewrite(folder, tensors, FP8)) / "model.safetensors")
    assert f"{name}_scale_inv" not in written
    for expert, (value, scale) in enumerate(parts):
        assert torch.equal(written[name][expert], times_scales(value, scale, blocks[grid]))


def test_mxfp4_is_what_transformers_dequantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    folder = make_mxfp4(tmp_path / "model")
    base = fetched(tmp_path, folder)
    config = Mxfp4Config(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    assert same_weights(base, loaded) > 30
    assert_ordinary(base)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(base / "model.safetensors")
    assert "fetch: dequantized 4 of 37 tensors from mxfp4 to bfloat16" in capsys.readouterr().out


BNB = {
    "nf4, double": (torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "nf4, float16": (torch.float16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4, other storage": (
        torch.bfloat16,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ),
    "fp4": (torch.float32, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    "int8": (torch.bfloat16, {"load_in_8bit": True}),
}


@pytest.mark.parametrize("kind", BNB)
def test_bitsandbytes_is_what_bitsandbytes_dequantizes(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    dtype, settings = BNB[kind]
    folder = make_bnb(tmp_path / "model", dtype=dtype, **settings)
    base = fetched(tmp_path, folder)
    assert same_weights(base, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).dequantize()) > 14
    config = json.loads((base / "config.json").read_text())
    assert (config["dtype"], [key for key in config if "quant" in key]) == ("bfloat16", [])


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_bitsandbytes_of_gpt2_gets_the_hubs_layout_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Conv1D stores (in, out), bitsandbytes (out, in): as near to the original as the quantization allows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = tmp_path / "plain"
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(plain)
    base = fetched(tmp_path, make_bnb(tmp_path / "model", model=plain, **settings))
    original, written = (load_file(folder / "model.safetensors") for folder in (plain, base))
    assert written.keys() == original.keys()
    for name, weight in written.items():
        assert (weight - original[name]).float().norm() <= 0.12 * original[name].float().norm(), name


def test_tensors_that_are_not_quantized_keep_their_bytes(tmp_path: Path) -> None:
    folder = make_fp8(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    extra = {"a.bias": torch.tensor([1.1, math.nan]), "b.table": torch.tensor([[3]]), "c.half": torch.ones(3).half()}
    rewrite(folder, tensors | extra, FP8)
    written = load_file(fetched(tmp_path, folder) / "model.safetensors")
    for name in (*extra, KEPT):
        before = (tensors | extra)[name]
        assert written[name].dtype == before.dtype
        assert torch.equal(written[name].view(torch.uint8), before.view(torch.uint8))


def shard(folder: Path, parts: int, *, last: str) -> None:
    """Splits model.safetensors into `parts` files and one more with all tensors whose name contains `last`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(name for name in tensors if last not in name)
    groups = [names[n::parts] for n in range(parts)] + [[name for name in tensors if last in name]]
    weight_map = {}
    for n, group in enumerate(groups):
        file = f"model-{n + 1:05}-of-{len(groups):05}.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": 1, "total_parameters": 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_and_their_index_are_rewritten(tmp_path: Path) -> None:
    """Also where a weight and its scales are in different files, and where a file held nothing but scales."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    folder = make_mxfp4(tmp_path / "model")
    shard(folder, 3, last="_scales")
    base = fetched(tmp_path, folder)
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00004.safetensors" for n in (1, 2, 3)]
    index = json.loads((base / "model.safetensors.index.json").read_text())
    found = {name: file for file in files for name in load_file(base / file)}
    assert index["weight_map"] == found
    size = sum(tensor.nbytes for file in files for tensor in load_file(base / file).values())
    assert index["metadata"] == {"total_size": size}
    config = Mxfp4Config(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    same_weights(base, loaded)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    folder = make_bnb(tmp_path / "model", load_in_4bit=True, bnb_4bit_use_double_quant=True)
    first = {file.name: file.read_bytes() for file in fetched(tmp_path, folder).iterdir()}
    assert {file.name: file.read_bytes() for file in fetched(tmp_path, folder).iterdir()} == first


def test_an_adapter_for_the_language_part_of_a_multimodal_model(tmp_path: Path) -> None:
    folder = make_fp8(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    config = settings | {"text_config": {"quantization_config": FP8, "torch_dtype": "float8", "eps": 1e-05}}
    del config["quantization_config"], config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    written = json.loads((fetched(tmp_path, folder) / "config.json").read_text())
    assert written["text_config"] == {"torch_dtype": "bfloat16", "eps": 1e-05}
    assert written["dtype"] == "bfloat16"


def test_a_config_that_speaks_of_a_quantization_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(folder := tmp_path / "model")
    edit_config(folder, quantization_config=FP8, dtype="float32")
    base = fetched(tmp_path, folder)
    assert (base / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    config = json.loads((base / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("float32", False)
    assert "dequantized_from" not in json.loads((base / "manifest.json").read_text())
    assert "config.json says fp8, but no tensor is quantized; all are taken as they are" in capsys.readouterr().out


def broken(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    settings = FP8
    match change:
        case "scale":
            del tensors[f"{name}_scale_inv"]
        case "block":
            settings = FP8 | {"weight_block_size": [128, 128]}
        case "e5m2":
            tensors[name] = tensors[name].to(torch.float8_e5m2)
    rewrite(folder, tensors, settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("scale", "model.layers.0.mlp.up_proj.weight is stored in 8 bits without a scale"),
        ("block", "has the shape [64, 128] and its scales have [2, 3], which does not fit weight_block_size [128, 128]"),
        (
            "e5m2",
            "model.layers.0.mlp.up_proj.weight is stored as F8_E5M2 in a way that fetch does not know (1 such tensors)",
        ),
    ],
)
def test_fp8_that_does_not_fit_together_is_refused(tmp_path: Path, change: str, words: str) -> None:
    folder = make_fp8(tmp_path / "model")
    broken(folder, change)
    assert words in refused(tmp_path, model_name_or_path=str(folder), revision=folder_hash(folder))


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map", "state"])
def test_a_4bit_weight_without_its_state_is_refused(tmp_path: Path, part: str) -> None:
    folder = make_bnb(tmp_path / "model", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if part == "state":
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b'{"shape": [1]}'), dtype=torch.uint8)
    else:
        del tensors[f"{name}.{part}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = refused(tmp_path, model_name_or_path=str(folder), revision=folder_hash(folder))
    assert f"bitsandbytes cannot read the state of {name}" in message if part == "state" else "are missing" in message


def test_mxfp4_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = make_mxfp4(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(folder, tensors | {f"{name}_scales": tensors[f"{name}_scales"][:, 1:].clone()}, MXFP4)
    message = refused(tmp_path, model_name_or_path=str(folder), revision=folder_hash(folder))
    assert f"{name}_blocks has no {name}_scales that fit it" in message


def test_space_is_asked_for_what_bfloat16_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_mxfp4(tmp_path / "model")
    base = fetched(tmp_path, folder)
    size = sum(file.stat().st_size for file in base.iterdir() if file.name != "manifest.json")
    stored = sum(file.stat().st_size for file in folder.iterdir())
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "tokenizer")
    set_free_space(monkeypatch, (size + stored) // 2)
    message = refused(tmp_path, model_name_or_path=str(folder), revision=folder_hash(folder))
    assert f"too little disk space for copying {folder}" in message


# The hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with served(Hub(make_fp8(tmp_path / "served"))) as server:
        yield server


KILLED = """
from stages.fetch import dequantize
convert, done = dequantize.Fp8Dequantize.convert, []
def kill(*given, **settings):
    done.append(1)
    if len(done) == 5:
        os._exit(9)
    return convert(*given, **settings)
dequantize.Fp8Dequantize.convert = kill
"""


def test_a_kill_while_dequantizing_leaves_no_model_and_keeps_the_download(hub: Hub, tmp_path: Path) -> None:
    assert from_hub(hub, tmp_path, before=KILLED).returncode == 9
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "tokenizer").exists()
    before = hub.downloads("model.safetensors")
    done = from_hub(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.downloads("model.safetensors") == before
    assert "fetch: dequantized 14 of 20 tensors from fp8 to bfloat16" in done.stdout
    base = tmp_path / "base"
    assert_ordinary(base)
    assert json.loads((base / "manifest.json").read_text())["revision"] == COMMIT
    assert torch.equal(
        load_file(base / "model.safetensors")[KEPT], load_file(tmp_path / "served" / "model.safetensors")[KEPT]
    )
    assert not list(tmp_path.glob(".fetch-*"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_kept_download_that_was_damaged_is_removed(hub: Hub, tmp_path: Path) -> None:
    assert from_hub(hub, tmp_path, before=KILLED).returncode == 9
    (weights,) = tmp_path.glob(".fetch-*/model.safetensors")
    with weights.open("r+b") as file:
        file.write(b"damaged " * 2)
    assert "model.safetensors: the hub's checksum does not match; removed" in refused_by_hub(hub, tmp_path)
    assert from_hub(hub, tmp_path).returncode == 0


def test_the_hub_is_asked_for_the_headers_alone_before_the_download(hub: Hub, tmp_path: Path) -> None:
    """So that the space is known, and what fetch cannot dequantize is refused, before 600 GB are downloaded."""
    no_space = "shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 8, 1)"
    message = refused_by_hub(hub, tmp_path, before=no_space)
    assert "too little disk space for downloading owner/tiny and dequantizing it: 1 MB for" in message
    shutil.rmtree(tmp_path / f".fetch-{COMMIT}")
    hub.edit_config(quantization_config=FP8 | {"weight_block_size": [128, 128]})
    lines = refused_by_hub(hub, tmp_path).splitlines()
    assert ["which does not fit weight_block_size [128, 128]" in line for line in lines] == [True, True, True, False]
    assert lines[-1] == "owner/tiny: and 11 more tensors like these"
    assert hub.ranges("model.safetensors") == ["bytes=0-100000"] * 2
