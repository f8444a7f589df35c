"""Tiny random checkpoints of the architectures that Transformers has causal models for, as the hub would hold them.

FAMILIES has those that people fine-tune most, each with what is special about its release: towers for images beside the
language model, names without a prefix, weights that are quantized, code in the repository. For all other model types of
Transformers `family` makes an entry by itself. Names of tensors and config.json are those of `save_pretrained`, which undoes
what Transformers renames and fuses when it loads a checkpoint: a file has a tensor for each expert, for example.

tools/sweep.py runs the whole pipeline on each of them, tests/test_family_chains.py on a few.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY = 512
STOP = 2
"""The token that ends an answer: EOS."""
FIRST_WORD, LAST_WORD = 10, 480
"""The tokens of texts. Those above stand for images and the like."""
WINDOW = 16
"""Of sliding windows and chunks of attention: shorter than every row."""


class Family(NamedTuple):
    """A checkpoint."""

    model_type: str
    hub: str = ""
    """Released models of this kind."""
    config: Mapping[str, Any] = {}
    """Fields of the config that are not as `small_config` makes them."""
    change: tuple[Callable[[Path], None], ...] = ()
    """What makes a release of the folder that `save_pretrained` wrote."""
    shards: str = "5GB"
    """The largest size of a file of weights."""


# Configs

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "audio_vocab_size": 16,
    "type_vocab_size": 2,
    "context_length": 1024,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 1024),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "original_max_position_embeddings"), 1024),
    # Widths. The hidden size is a block of NF4.
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim", "embedding_size"), 64),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "mamba_d_ssm", "word_embed_proj_dim", "hidden_size_global"), 64),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "out_hidden_size", "backbone_hidden_size"), 64),
    **dict.fromkeys(("adapter_out_dim", "ple_embed_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "d_inner", "d_ff", "feed_forward_size"), 128
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "mlp_dim"), 128),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "router_hidden_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "output_channels"), 32),
    # Layers.
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_global_layers", "conf_num_hidden_layers", "num_lstm_layers", "num_layers_per_stack"), 2),
    # Heads.
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads", "conf_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    "linear_num_key_heads": 2,
    "index_n_heads": 32,  # with few of them scores are often zero, and which keys are the best is chance
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "dim_head", "d_kv", "kv_channels", "attention_head_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    **dict.fromkeys(("q_lora_rank",), 24),
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "laurel_rank", "gated_norm_rank", "adapter_rank", "hc_lowrank"), 16),
    # Experts: a shared one, of four two for each token, and a first layer without them.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_end_index"), 1),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers", "zero_expert_num"), 0),
    # Recurrent layers.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), WINDOW),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    # Windows.
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("local_attention", "local_attention_window_len", "keep_window_size"), WINDOW),
    **dict.fromkeys(("index_topk", "index_block_size", "local_attn_chunk_length", "lsh_attn_chunk_length"), WINDOW),
    # Inputs of each layer.
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    "vocab_size_per_layer_input": VOCABULARY,
    # Images and sounds.
    **dict.fromkeys(("image_size", "crop_size"), 64),
    "patch_size": 16,
    "num_position_embeddings": 64,
    "position_embedding_size": 64,
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    "base_channels": 32,
    "codebook_size": 32,
    "num_mel_bins": 16,
    "ngram_vocab_size_base": 64,
    "encoder_hash_byte_group_vocab": 64,
    "shape_vocab_size": 64,
    "pronunciation_vocab_size": 64,
}
TOKENS = {
    "bos_token_id": 1,
    "eos_token_id": STOP,
    "pad_token_id": 0,
    "decoder_start_token_id": STOP,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 5


def small_config(model_type: str, **given: Any) -> Any:
    """A config of this type with small sizes, and as many layers as it takes to have each kind of layer.

    `given` are fields of the config; those of a config inside it, as text_config, are given as a dict.
    """
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_small_fields(config_class, given))


def _small_fields(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    default: dict[str, Any] = {}
    config = config_class(**{name: value for name, value in given.items() if name == "model_type"})
    for field in dataclasses.fields(config_class):
        try:
            default[field.name] = getattr(config, field.name)
        except AmbiguousGlobalPerLayerAttributeError:  # its value differs from layer to layer
            default[field.name] = 0
    fields: dict[str, Any] = {
        name: SIZES[name] for name, value in default.items() if name in SIZES and (value is not None or name == "head_dim")
    }
    fields |= _few_layers(default, given)
    if default.get("kv_lora_rank") and "num_key_value_heads" in fields:  # latent attention has as many as heads
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    number = LAST_WORD + 10
    for name in default:
        if name.endswith(("token_id", "token_index", "_token_ids")):
            number += name not in TOKENS
            fields[name] = TOKENS.get(name, number)
    for name, value in default.items():
        if isinstance(value, PreTrainedConfig) or (isinstance(given.get(name), Mapping) and name.endswith("config")):
            inner = dict(given.get(name) or {})
            kind = type(value) if isinstance(value, PreTrainedConfig) else None
            if "model_type" in inner:
                kind = CONFIG_MAPPING[inner["model_type"]]
            if kind is None:
                kind = CONFIG_MAPPING[f"{config_class.model_type}_{name.removesuffix('_config')}"]
            fields[name] = _small_fields(kind, inner) | {"model_type": kind.model_type}
    return fields | {
        name: value for name, value in given.items() if name not in fields or not isinstance(fields[name], dict)
    }


def _few_layers(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and of every list with an entry for each layer those of a few layers of different kinds."""
    count_name = next((name for name in LAYERS if default.get(name)), None)
    if count_name is None or count_name in given:
        return {}
    count = default[count_name]
    lists = {
        name: value
        for name, value in default.items()
        if isinstance(value, list) and len(value) == count and not isinstance(value[0], list) and name not in given
    }
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))[:MOST_LAYERS] if lists else []
    kinds += kinds[-1:] * (2 - len(kinds))
    fields: dict[str, Any] = {count_name: max(2, len(kinds))}
    for index, name in enumerate(lists):
        fields[name] = [kind[index] for kind in kinds]
    return fields


# Weights


def build(entry: Family) -> Any:
    """A random model of the class that its release has, in float32."""
    config = small_config(entry.model_type, **entry.config)
    names = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(entry.model_type),
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(entry.model_type) if config.is_encoder_decoder else None,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(entry.model_type),
    )
    torch.manual_seed(0)
    model = getattr(transformers, next(filter(None, names)))(config)
    randomize(model)
    return model.eval()


def randomize(model: Any) -> None:
    """Weights of unit gain, so that logits differ from token to token, and what leaks from row to row shows in them.

    Norms, biases and the parameters of recurrences stay as Transformers initializes them.
    """
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    kept = ("A_log", "time_", "dt_bias", "scale", "norm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name or name.endswith(".A"):  # of Doge, which chooses keys by it
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1 and not any(part in name for part in kept):
                std = 0.3 if id(parameter) in embeddings else 0.5 if "conv" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def write_release(entry: Family, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes weights, config and a tokenizer into a new folder."""
    folder.mkdir(parents=True)
    build(entry).to(dtype).save_pretrained(folder, max_shard_size=entry.shards)
    for change in entry.change:
        change(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Each token is a word, w and its number: some tokenizers put no space between words that they decode."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": STOP, "<unk>": 3} | {f"w{number}": number for number in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


# What releases have otherwise than `save_pretrained` writes it


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Of a folder with one file of weights."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))


def without_prefix(folder: Path) -> None:
    """Saved long ago from the model without its head: GPT-2, BLOOM."""
    _change_weights(folder, lambda weights: {name.removeprefix("transformer."): weight for name, weight in weights.items()})


def with_more_layers(prefix: str, like: str, joined: str) -> Callable[[Path], None]:
    """A layer that predicts further tokens, which Transformers does not load: copied here from the layer `like`.

    `joined` is the matrix in which hidden states and embeddings come together.
    """

    def add(folder: Path) -> None:
        _change_weights(
            folder,
            lambda weights: (
                weights
                | {
                    prefix + name.removeprefix(like): weight.clone()
                    for name, weight in weights.items()
                    if name.startswith(like)
                }
                | {joined: torch.randn(64, 128)}
            ),
        )

    return add


def with_code(folder: Path) -> None:
    """Code in the repository, of the time before Transformers had the architecture. It must not be run."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    names = {"AutoConfig": f"configuration_{kind}.TinyConfig", "AutoModelForCausalLM": f"modeling_{kind}.TinyForCausalLM"}
    for name in names.values():
        (folder / f"{name.partition('.')[0]}.py").write_text("raise RuntimeError('this code was run')\n")
    _change_config(folder, auto_map=names)


def inside_gemma3n(folder: Path) -> None:
    """The language model as a part of the whole, whose towers need timm, which Loratory does not install."""
    _change_weights(
        folder, lambda weights: {name.replace("model.", "model.language_model.", 1): weights[name] for name in weights}
    )
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"model_type": "gemma3n_vision"}}))


def in_fp8(folder: Path) -> None:
    """Linear weights in FP8 with a scale for each block of 128 x 128, as DeepSeek and Qwen release them."""

    def quantize(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            if not name.endswith("proj.weight"):
                found[name] = weight
                continue
            rows, columns = (-(-size // 128) for size in weight.shape)
            whole = torch.zeros(128 * rows, 128 * columns)
            whole[: weight.shape[0], : weight.shape[1]] = weight
            blocks = whole.view(rows, 128, columns, 128)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            quantized = (blocks / scales).view(whole.shape)[: weight.shape[0], : weight.shape[1]]
            found[name] = quantized.to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scales.view(rows, columns)
        return found

    _change_weights(folder, quantize)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    _change_config(folder, quantization_config=settings)


def in_mxfp4(folder: Path) -> None:
    """Experts in MXFP4, as gpt-oss is released: 32 weights share a scale, a power of two."""

    def quantize(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found, generator = {}, torch.Generator().manual_seed(2)
        for name, weight in weights.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                found[name] = weight
                continue
            experts, inputs, outputs = weight.shape
            shape = (experts, outputs, inputs // 32)
            found[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            found[f"{name}_scales"] = torch.randint(121, 124, shape, dtype=torch.uint8, generator=generator)
        return found

    _change_weights(folder, quantize)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def in_4bit(folder: Path) -> None:
    """Saved from bitsandbytes' NF4 with double quantization, as Unsloth's copies."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
    quantized.save_pretrained(folder)


def in_gptq(folder: Path) -> None:
    """A config that says so; nobody has to read the weights."""
    _change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})


# The families that people fine-tune

TIED = {"tie_word_embeddings": True}
SMALL_SHARDS = "100KB"
"""The experts of a layer are then in several files."""
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 64}
PIXTRAL = {"model_type": "pixtral", "image_size": 64, "num_channels": 3}
QWEN_VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
GEMMA_4 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
    **TIED,
}
GEMMA_4_VISION = {"patch_size": 4, "pooling_kernel_size": 2}
GEMMA_3N = {
    "num_hidden_layers": 4,
    "intermediate_size": [128] * 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    **TIED,
}
LLAMA_4 = {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
GRANITE_4 = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"], **TIED}

QWEN_4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

FAMILIES: dict[str, Family] = {
    # Dense.
    "llama": Family("llama", "Llama 3.1 8B, TinyLlama", shards=SMALL_SHARDS),
    "llama_tied": Family("llama", "Llama 3.2 1B and 3B", TIED),
    "mistral": Family("mistral", "Mistral 7B v0.2 and later, Nemo", {"sliding_window": None}),
    "mistral_window": Family("mistral", "Mistral 7B v0.1, Zephyr"),
    "ministral": Family("ministral", "Ministral 8B", {"layer_types": LOCAL_GLOBAL}),
    "qwen2": Family("qwen2", "Qwen 2 and 2.5 7B, DeepSeek-R1-Distill-Qwen"),
    "qwen2_tied": Family("qwen2", "Qwen 2.5 0.5B to 3B", TIED),
    "qwen3": Family("qwen3", "Qwen 3 8B to 32B"),
    "qwen3_tied": Family("qwen3", "Qwen 3 0.6B to 4B", TIED),
    "gemma": Family("gemma", "Gemma 1", TIED),
    "gemma2": Family("gemma2", "Gemma 2", TIED),
    "gemma3_text": Family("gemma3_text", "Gemma 3 270M and 1B", TIED),
    "phi": Family("phi", "Phi-2"),
    "phi3": Family("phi3", "Phi-4, Phi-3.5 mini", {"sliding_window": None}),
    "phi3_window": Family("phi3", "Phi-3 mini 4k"),
    "phi3_code": Family("phi3", "Phi-4 mini, with auto_map", {"sliding_window": None}, (with_code,)),
    "glm4": Family("glm4", "GLM-4 0414 9B and 32B"),
    "olmo2": Family("olmo2", "OLMo 2"),
    "olmo3": Family("olmo3", "OLMo 3", {"layer_types": LOCAL_GLOBAL}),
    "granite": Family("granite", "Granite 3 dense", {"embedding_multiplier": 12.0, "logits_scaling": 8.0, **TIED}),
    "smollm3": Family("smollm3", "SmolLM3 3B", {"no_rope_layers": [1, 0], **TIED}),
    "ernie4_5": Family("ernie4_5", "ERNIE 4.5 0.3B", TIED),
    "hunyuan": Family("hunyuan_v1_dense", "Hunyuan 0.5B to 7B", TIED),
    "seed_oss": Family("seed_oss", "Seed-OSS 36B"),
    "apertus": Family("apertus", "Apertus 8B and 70B"),
    "exaone4": Family("exaone4", "EXAONE 4", {"layer_types": LOCAL_GLOBAL}),
    "cohere": Family("cohere", "Command R", TIED),
    "cohere2": Family("cohere2", "Command R7B, Command A", {"layer_types": LOCAL_GLOBAL, **TIED}),
    "starcoder2": Family("starcoder2", "StarCoder2", TIED),
    "stablelm": Family("stablelm", "StableLM 2"),
    "nemotron": Family("nemotron", "Nemotron-4, Minitron", {"num_key_value_heads": 2}),
    "minicpm3": Family("minicpm3", "MiniCPM3 4B, with auto_map", {}, (with_code,)),
    "internlm3": Family("internlm3", "InternLM3 8B, with auto_map", {}, (with_code,)),
    "bitnet": Family("bitnet", "BitNet b1.58 2B in bfloat16", TIED),
    "nanochat": Family("nanochat", "nanochat"),
    "gpt_neox": Family("gpt_neox", "Pythia, GPT-NeoX"),
    "gptj": Family("gptj", "GPT-J"),
    "gpt2": Family("gpt2", "GPT-2 of the hub", TIED, (without_prefix,)),
    "gpt2_prefix": Family("gpt2", "copies of GPT-2 that were saved anew", TIED),
    "bloom": Family("bloom", "BLOOM of the hub", TIED, (without_prefix,)),
    "opt": Family("opt", "OPT", TIED),
    "falcon": Family("falcon", "Falcon 7B", {"multi_query": True, "bias": False, "new_decoder_architecture": False, **TIED}),
    "falcon_new": Family("falcon", "Falcon 40B", {"new_decoder_architecture": True, **TIED}),
    "mpt": Family("mpt", "MPT 7B", TIED),
    # Mixtures of experts.
    "mixtral": Family("mixtral", "Mixtral 8x7B", {"sliding_window": None}, shards=SMALL_SHARDS),
    "qwen2_moe": Family("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", {"sliding_window": None}),
    "qwen3_moe": Family("qwen3_moe", "Qwen3-30B-A3B, Qwen3-Coder", {"sliding_window": None}, shards=SMALL_SHARDS),
    "olmoe": Family("olmoe", "OLMoE"),
    "glm4_moe": Family(
        "glm4_moe",
        "GLM-4.5, 4.6, Air",
        {},
        (with_more_layers("model.layers.46.", "model.layers.1.", "model.layers.46.eh_proj.weight"),),
    ),
    "glm4_moe_lite": Family("glm4_moe_lite", "GLM-4.7-Flash", {}),
    "gpt_oss": Family("gpt_oss", "gpt-oss in bfloat16"),
    "deepseek_v2": Family(
        "deepseek_v2", "DeepSeek V2 Lite, with auto_map", {"q_lora_rank": None, "num_experts_per_tok": 2}, (with_code,)
    ),
    "deepseek_v3": Family("deepseek_v3", "DeepSeek V3, R1, Kimi K2, Moonlight", {}, (with_code,), SMALL_SHARDS),
    "granitemoe": Family("granitemoe", "Granite 3 MoE", TIED),
    "phimoe": Family("phimoe", "Phi-3.5-MoE"),
    "ernie4_5_moe": Family("ernie4_5_moe", "ERNIE 4.5 21B-A3B", {"moe_num_shared_experts": 2}),
    "hunyuan_moe": Family("hunyuan_v1_moe", "Hunyuan A13B"),
    "minimax_m2": Family("minimax_m2", "MiniMax M2"),
    "lfm2_moe": Family(
        "lfm2_moe", "LFM2 8B-A1B", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], **TIED}
    ),
    # Hybrids of attention and recurrent layers, and recurrent models.
    "qwen3_next": Family(
        "qwen3_next", "Qwen3-Next 80B-A3B", {}, (with_more_layers("mtp.layers.0.", "model.layers.0.", "mtp.fc.weight"),)
    ),
    "lfm2": Family("lfm2", "LFM2 350M to 2.6B", TIED),
    "granite4_dense": Family("granitemoehybrid", "Granite 4 H-Micro", {"num_local_experts": 0, **GRANITE_4}),
    "granite4_moe": Family("granitemoehybrid", "Granite 4 H-Tiny and H-Small", GRANITE_4),
    "falcon_h1": Family("falcon_h1", "Falcon-H1", {"mamba_n_heads": 4, "mamba_expand": 1}),
    "nemotron_h": Family("nemotron_h", "Nemotron-H, Nemotron Nano 2 and 3"),
    "bamba": Family("bamba", "Bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "jamba": Family("jamba", "Jamba", {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2}),
    "olmo_hybrid": Family("olmo_hybrid", "OLMo Hybrid"),
    "recurrent_gemma": Family("recurrent_gemma", "RecurrentGemma", {"num_hidden_layers": 3, **TIED}),
    "mamba": Family("mamba", "Mamba", TIED),
    "mamba2": Family("mamba2", "Mamba 2, Codestral Mamba", {"num_heads": 8}),
    "falcon_mamba": Family("falcon_mamba", "Falcon Mamba 7B"),
    "rwkv": Family("rwkv", "RWKV-4"),
    "zamba2": Family("zamba2", "Zamba 2", {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}),
    # A language model inside another one.
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen 3.5 0.8B to 27B",
        {"text_config": TIED, "vision_config": QWEN_VISION, **TIED},
        (with_more_layers("mtp.layers.0.", "model.language_model.layers.0.", "mtp.fc.weight"),),
    ),
    "qwen3_5_moe": Family("qwen3_5_moe", "Qwen 3.5 35B-A3B", {"vision_config": QWEN_VISION}, shards=SMALL_SHARDS),
    "gemma3": Family(
        "gemma3", "Gemma 3 4B to 27B", {"text_config": TIED, "vision_config": SIGLIP, "mm_tokens_per_image": 4, **TIED}
    ),
    "gemma3n_text": Family("gemma3n_text", "the language model of Gemma 3n", GEMMA_3N),
    "gemma3n": Family("gemma3n_text", "Gemma 3n E2B and E4B", GEMMA_3N, (inside_gemma3n,)),
    "gemma4": Family(
        "gemma4",
        "Gemma 4 E2B and E4B",
        {
            "text_config": {**GEMMA_4, "num_kv_shared_layers": 2},
            "vision_config": GEMMA_4_VISION,
            **TIED,
        },
    ),
    "gemma4_dense": Family(
        "gemma4",
        "Gemma 4 31B",
        {
            "text_config": {**GEMMA_4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
            "vision_config": GEMMA_4_VISION,
            **TIED,
        },
    ),
    "gemma4_moe": Family(
        "gemma4",
        "Gemma 4 26B-A4B",
        {
            "text_config": {
                **GEMMA_4,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
            },
            "vision_config": GEMMA_4_VISION,
            **TIED,
        },
    ),
    "mistral3": Family(
        "mistral3",
        "Mistral Small 3.1 and 3.2",
        {"text_config": {"model_type": "mistral", "sliding_window": None}, "vision_config": PIXTRAL},
    ),
    "ministral3": Family("mistral3", "Ministral 3", {"text_config": {"model_type": "ministral3"}, "vision_config": PIXTRAL}),
    "llama4": Family("llama4", "Llama 4 Scout", {"text_config": LLAMA_4}),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        {
            "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
            "vision_config": {**QWEN_VISION, "hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    "qwen3_vl": Family("qwen3_vl", "Qwen3-VL", {"vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]}}),
    "llava": Family("llava", "LLaVA 1.5", {"text_config": {"model_type": "llama"}, "vision_config": SIGLIP}),
    # Weights that come quantized.
    "gpt_oss_mxfp4": Family("gpt_oss", "gpt-oss as released, MXFP4", {}, (in_mxfp4,)),
    "qwen3_fp8": Family("qwen3", "Qwen3-FP8", {"hidden_size": 128, "intermediate_size": 192}, (in_fp8,)),
    "deepseek_v3_fp8": Family("deepseek_v3", "DeepSeek V3 as released, FP8", {}, (in_fp8, with_code)),
    "llama_bnb_4bit": Family("llama", "unsloth/…-bnb-4bit", {}, (in_4bit,)),
    "qwen2_gptq": Family("qwen2", "…-GPTQ-Int4", {}, (in_gptq,)),
}

REFUSED = {"qwen2_gptq": "gptq", "gemma3n": "needs a package that is not installed"}
"""Those of FAMILIES that end before the training, each with a word of the reason."""

OTHERS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4} for kind in LOCAL_GLOBAL
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 500, "<|extra_200|>": 501, "<|visual token 000000|>": 502}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "qwen4_exp": {"text_config": QWEN_4},
    "qwen4_exp_text": QWEN_4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [32, 32],
        "axial_pos_embds_dim": [16, 48],
    },
    "longcat_flash": {"head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields of the configs of other model types, where small sizes must fit each other in a way of their own."""


NOT_BUILT = {
    "gemma4_assistant": "it drafts tokens for another model, whose hidden states it needs",
    "gemma4_unified_assistant": "as gemma4_assistant",
    "musicgen": "its causal model takes a part of the config that no checkpoint has by itself; it continues sounds",
    "musicgen_melody": "as musicgen",
}
"""Model types that `build` cannot make, and why."""


def family(name: str) -> Family:
    """An entry of FAMILIES, or one for a model type of Transformers."""
    return FAMILIES.get(name) or Family(name, config=OTHERS.get(name, {}))


def other_types() -> Sequence[str]:
    """The model types with a causal model that FAMILIES does not have."""
    known = {entry.model_type for entry in FAMILIES.values()}
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known and name not in NOT_BUILT]
