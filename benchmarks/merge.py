"""Time and memory to merge an adapter into the weights of an 8B model.

    python benchmarks/merge.py [--layers 32]

Makes a random model with the shapes of Llama-3-8B in bfloat16 (16 GB with 32 layers) and a LoRA adapter with r=16 for all
linear layers. Each method writes the merged model in its own process: Loratory (into the full weights, and into the
dequantized NF4 weights), PEFT on the CPU and on the GPU, and a plain copy of the files, the lower bound for any merge.
Prints the seconds, the process's peak main memory, and the share of weights that differ from the exact sum, rounded once.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from benchmarks.ways import peak_main_memory, run_row  # noqa: E402

SHARD_BYTES = 5e9
WAYS = {
    "copy": "plain copy of the files",
    "full": "Loratory, merge.base: full",
    "dequantized": "Loratory, merge.base: dequantized (NF4)",
    "peft_gpu": "PEFT merge_and_unload on the GPU, save_pretrained",
    "peft_cpu": "PEFT merge_and_unload on the CPU, save_pretrained",
}


def make(work: Path, layers: int, width: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = work / "base"
    base.mkdir()
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0.0
    for name, tensor in model.state_dict().items():
        size += 2 * math.prod(tensor.shape)
        if size > SHARD_BYTES:
            shards.append({})
            size = 2 * math.prod(tensor.shape)
        shards[-1][name] = tensor.shape
    torch.manual_seed(0)
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {name: torch.randn(shape, device=device).mul(0.02).bfloat16() for name, shape in shard.items()}
        save_file(made, base / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    (base / "manifest.json").write_text(json.dumps({"model": "random", "revision": "", "trust_remote_code": False}))
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = work / "adapter"
    adapter.mkdir()
    tensors = {
        name.replace(".default", ""): torch.randn(tensor.shape) * 0.02
        for name, tensor in adapted.state_dict().items()
        if "lora_" in name
    }
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    lora_config = adapted.peft_config["default"]
    lora_config.base_model_name_or_path, lora_config.inference_mode = str(base), True
    lora_config.save_pretrained(adapter)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"]
    names = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in linear]
    training = {
        "quantization": settings("nf4"),
        "quantized_layers": sorted({name for name in names if ".lora_" not in name}),
        "transposed_layers": [],
        "summed_in_float32": sorted({name for name in names if ".lora_" not in name}),  # as in training on a GPU
        "data": {"rows": 0, "tokens": 0, "label_tokens": 0},
    }
    (adapter / "training.json").write_text(json.dumps(training))
    os.sync()


def settings(quantization: str) -> dict[str, object]:
    return {
        "quantization": quantization,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": [],
        "dtype": "bfloat16",
    }


def merge(work: Path, way: str) -> None:
    base, adapter, out = work / "base", work / "adapter", work / "out"
    out.mkdir()
    started = time.monotonic()
    if way == "copy":
        for file in base.iterdir():
            shutil.copyfile(file, out / file.name)
    elif way in ("full", "dequantized"):
        from stages.merge.lora_weights import LoraWeights
        from stages.merge.training import read_training
        from stages.merge.weights import MergedWeights

        started = time.monotonic()  # imports are not counted
        training = read_training(adapter)
        MergedWeights(base, LoraWeights(adapter), training=training, dequantized=way == "dequantized").write(out)
    else:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        started = time.monotonic()
        device = "cuda" if way == "peft_gpu" else "cpu"
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    seconds = time.monotonic() - started
    wrong = wrong_share(work) if way in ("full", "peft_gpu", "peft_cpu") else None
    print(json.dumps({"seconds": seconds, "peak": peak_main_memory(), "wrong": wrong}))


def wrong_share(work: Path) -> float:
    """The share of weights that differ from the exact sum, rounded once; of four matrices of the first layer."""

    def read(folder: Path, name: str) -> torch.Tensor:
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118
                    return file.get_tensor(name)
        raise KeyError(name)

    wrong = count = 0
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        stem = f"model.layers.0.{part}"
        lora_a, lora_b = (read(work / "adapter", f"base_model.model.{stem}.lora_{matrix}.weight") for matrix in "AB")
        exact = (read(work / "base", f"{stem}.weight").double() + 2.0 * lora_b.double() @ lora_a.double()).bfloat16()
        wrong += int((read(work / "out", f"{stem}.weight") != exact).sum())
        count += exact.numel()
    return wrong / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if given.way:
        merge(given.work, given.way)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make(work, given.layers, given.width)
        size = sum(file.stat().st_size for file in (work / "base").iterdir())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        print(f"{size / 1e9:.1f} GB, {device}, torch {torch.__version__}")
        print("| | seconds | peak GB | differ from exact |")
        print("|---|---:|---:|---:|")
        for way in [way for way in given.ways if way != "peft_gpu" or torch.cuda.is_available()]:
            found = run_row(__file__, way, WAYS[way], "--work", work)
            shutil.rmtree(work / "out", ignore_errors=True)
            if found is None:
                continue
            wrong = "–" if found["wrong"] is None else f"{100 * found['wrong']:.3f} %"
            print(f"| {WAYS[way]} | {found['seconds']:.1f} | {found['peak'] / 1e9:.2f} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
