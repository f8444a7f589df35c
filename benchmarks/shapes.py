"""Models with random weights and rows of random tokens: the speed depends only on their sizes."""

import json
import math
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "70b-8": {  # a tenth of its layers
        "hidden_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "30b": {  # Qwen's 32B
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}
SHAPES["8b-4"] = SHAPES["8b"] | {"num_hidden_layers": 4}  # same width, small enough to be compared with float32
QWEN_SHAPES: dict[str, dict[str, Any]] = {  # Qwen2.5's sizes; 8b: Qwen3's
    "1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "tie_word_embeddings": True,
    },
    "3b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "tie_word_embeddings": True,
    },
    "8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    },
}
QWEN_VOCABULARY = 151_936
"""Rows of Qwen's embedding; its tokenizer has 151,646 tokens with the three special ones of ChatML."""
LONGEST = 2048


def make_model(folder: Path, shape: str) -> None:
    """Writes a Llama in bfloat16 as `fetch` would, with a tokenizer whose tokens are numbers."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {str(number): number for number in range(4, config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LONGEST,
    ).save_pretrained(folder)
    manifest = {"model": f"{shape} shape, random weights", "revision": "none", "trust_remote_code": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def make_qwen(folder: Path, shape: str) -> None:
    """Writes a Qwen in bfloat16, beside whose files its tokenizer is to be put."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **QWEN_SHAPES[shape],
        vocab_size=QWEN_VOCABULARY,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")


def make_rows(count: int, lengths: str, vocabulary: int, seed: int = 1) -> list[list[int]]:
    """Rows of tokens: `full` have 2,048 each; `belle` have lengths like BELLE's (log-normal, median 200, mean 268)."""
    import numpy as np

    random = np.random.default_rng(seed)
    if lengths == "full":
        sizes = np.full(count, LONGEST)
    else:
        sizes = np.clip(np.round(np.exp(random.normal(math.log(200), 0.8, count))), 16, LONGEST).astype(int)
    return [random.integers(4, vocabulary, size).tolist() for size in sizes]


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of 128 tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    return [random.integers(4, vocabulary, 128).tolist() for _ in range(count)]


def vocabulary_of(base: Path) -> int:
    size: int = json.loads((base / "config.json").read_text())["vocab_size"]
    return size


def write_rows(path: Path, rows: list[list[int]]) -> None:
    """Writes rows as `encode` would, with a label for every token but the first."""
    import pyarrow as pa

    from stages.core.tokens import IGNORE, TRAINING, open_tokens

    columns = [
        [str(number) for number in range(len(rows))],
        rows,
        [[IGNORE, *row[1:]] for row in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, TRAINING, strict=True)]
    with open_tokens(path, TRAINING, [2]) as stream:
        stream.write_batch(pa.record_batch(arrays, schema=TRAINING))
