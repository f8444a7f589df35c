"""Tokens per second and peak memory of training a mixture-of-experts model: Loratory beside Transformers + PEFT.

    python benchmarks/experts.py --shape qwen3-30b-a3b --layers 4     on a GPU with 80 GB: 4 of its 48 layers, random weights
    python benchmarks/experts.py --shape tiny --layers 2 --tokens 256 --steps 4                                    on a CPU

All have a LoRA of the same rank on all linear layers, and, but for those named "without", on all parameters of experts. A
step is a forward and backward pass over one row and a step of AdamW. The loss is that of the last 64 tokens, so that a large
vocabulary does not hide what the layers take. The first steps are warm-up and are not counted. Each way runs in its own
process. The loss after the last step shows whether it is still the same training; the ways differ by their quantization.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ways import machine, peak_memory, run_row  # noqa: E402

WARM_UP = 2
LAST = 64
RANK = 16
WAYS = {
    "loratory": "Loratory, experts in NF4",
    "loratory-full": "Loratory, experts in 16 bits",
    "loratory-frozen": "Loratory, experts in NF4, without an adapter on them",
    "peft": "Transformers + PEFT, experts in 16 bits, other layers in NF4",
    "peft-checkpointed": "the same with gradient checkpointing",
    "bitsandbytes": "Transformers + PEFT, experts in NF4 by bitsandbytes.nn.parametrize",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def make_base(folder: Path, shape: str, layers: int) -> None:
    """A Qwen3-MoE with random weights in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", **SHAPES[shape], num_hidden_layers=layers, decoder_sparse_step=1, tie_word_embeddings=False
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "manifest.json").write_text('{"model": "random", "revision": "", "trust_remote_code": false}')


def loratory(base: Path, way: str) -> Any:
    """The model as the train stage makes it."""
    from stages.core.params import read_yaml
    from stages.model.adapter import Adapter, add_adapter
    from stages.model.quantize import Quantization, load_quantized
    from stages.train.coverage import describe_weights
    from stages.train.expert_layers import ExpertLayers
    from stages.train.lora_layers import LoraLayers
    from stages.train.recompute import Recompute

    section = read_yaml(ROOT / "params.yaml")["train"]
    section |= {"r": RANK, "target_parameters": [] if way == "loratory-frozen" else "all-experts"}
    if way == "loratory-full":
        section["llm_int8_skip_modules"] = ["experts"]
    settings = Quantization(**{name: section[name] for name in Quantization.model_fields})
    wanted = Adapter(**{name: section[name] for name in Adapter.model_fields})
    quantized = load_quantized(base, settings)
    model = add_adapter(quantized.model, base, settings=settings, wanted=wanted)
    print(describe_weights(quantized, model, settings=settings, wanted=wanted), file=sys.stderr)
    experts = ExpertLayers(model)
    layers = LoraLayers(model, fp8=False, keep_dequantized=False, recompute=Recompute())
    assert experts.layers, experts.skipped
    assert not layers.skipped, layers.skipped
    return model


def mend_peft() -> None:
    """PEFT 0.21 removes its parametrization beside one of bitsandbytes only if it is of another class: step 2 would fail."""
    import torch
    from peft.tuners.lora import layer

    class Proxy(layer._LoraParameterProxy):  # type: ignore[misc]
        def __init__(self, lhs: Any, rhs: Any, scaling: float) -> None:
            torch.nn.Module.__init__(self)
            self.lhs, self.rhs, self.scaling = lhs, rhs, scaling

        forward = layer._LoraFactorsProxy.forward

    layer._LoraFactorsProxy = Proxy


def peers(base: Path, way: str) -> Any:
    """The model as Transformers and PEFT make it, with bitsandbytes as axolotl uses it for experts."""
    import torch
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from stages.model.device import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype("auto", device)
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map={"": device}, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **four_bit)
    )
    names = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]
    if way == "bitsandbytes":
        mend_peft()
        for name in names:
            for parameter in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(model.get_submodule(name), parameter, compress_statistics=True, quant_type="nf4")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=[f"{name}.{parameter}" for name in names for parameter in ("gate_up_proj", "down_proj")],
    )
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    if way == "peft-checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def measure(base: Path, way: str, tokens: int, steps: int) -> dict[str, Any]:
    """Trains, and returns tokens per second, bytes and the last loss."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = (loratory if way.startswith("loratory") else peers)(base, way).train()
    device, vocabulary = model.device, model.config.vocab_size
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (steps, 1, tokens), generator=generator).to(device)
    marks, loss = [], torch.zeros(())
    for step in range(steps):
        with torch.autocast(device.type, dtype=model.dtype, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[step], use_cache=False, logits_to_keep=LAST).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[step, 0, -LAST + 1 :])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.monotonic())
    speed = tokens * (steps - WARM_UP) / (marks[-1] - marks[WARM_UP - 1])
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return {"speed": speed, "peak": peak_memory(), "held": held, "trained": trained, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step, in one row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}")
    if args.way:
        print(json.dumps(measure(args.base, args.way, args.tokens, args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), args.shape, args.layers)
        print(f"{args.shape}, {args.layers} layers, rows of {args.tokens:,} tokens; {machine()}\n", flush=True)
        print("| | tokens/s | peak | of it the model | trained weights | loss |\n|---|---|---|---|---|---|", flush=True)
        for way in args.ways:
            given = ("--base", folder, "--tokens", args.tokens, "--steps", args.steps)
            found = run_row(__file__, way, WAYS[way], *given)
            if found:
                print(
                    f"| {WAYS[way]} | {found['speed']:,.0f} | {found['peak'] / 1e9:.2f} GB | {found['held'] / 1e9:.2f} GB | "
                    f"{found['trained'] / 1e6:,.1f} M | {found['loss']:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
