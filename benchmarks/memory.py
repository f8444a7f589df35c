"""Memory of the weights of a 7B model in 16, 8 and 4 bits.

    python benchmarks/memory.py

Prints, for the shape of baichuan-7B (its W_pack is query, key and value in one layer), the bytes of all weights including
quantization scales: computed from the shapes, and measured on the GPU if there is one. On any machine the computed size is
also compared with a two-layer model that is really quantized.
"""

import gc

import bitsandbytes as bnb
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BAICHUAN_7B = {"vocab_size": 64000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
SMALL = {"vocab_size": 640, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
BLOCK, SCALES_A_BLOCK = 64, 256
"""bitsandbytes: 4-bit weights per scale, and scales per second-level scale with double quantization."""
KINDS = {
    "float16": "16 bits",
    "int8": "8 bits (LLM.int8)",
    "nf4": "4 bits (NF4)",
    "nf4+dq": "4 bits (NF4), double quantization",
}


def make(shape: dict[str, int], device: str) -> LlamaForCausalLM:
    config = LlamaConfig(**shape, num_attention_heads=8, tie_word_embeddings=False, dtype=torch.float16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.float16)
    return model if device == "meta" else model.to_empty(device=device)


def linear_layers(model: LlamaForCausalLM) -> dict[str, torch.nn.Linear]:
    """The layers that are quantized: all but the output head."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}


def computed_bytes(model: LlamaForCausalLM, kind: str) -> int:
    """Bytes of all weights, computed from their shapes."""
    total = sum(2 * parameter.numel() for parameter in model.parameters())
    if kind == "float16":
        return total
    for layer in linear_layers(model).values():
        weights = layer.weight.numel()
        blocks = -(-weights // BLOCK)
        total -= 2 * weights
        if kind == "int8":
            total += weights + 4 * layer.out_features  # one float32 scale per row
        elif kind == "nf4":
            total += -(-weights // 2) + 4 * blocks + 4 * 16  # the 16 values of the 4-bit codes
        else:
            # One byte per scale, a float32 for each 256 of them and for their mean, and the 256 values of the 8-bit codes.
            total += -(-weights // 2) + blocks + 4 * -(-blocks // SCALES_A_BLOCK) + 4 + 4 * 16 + 4 * 256
    return total


def quantize(model: LlamaForCausalLM, kind: str, device: str) -> int:
    """Quantizes the model, layer by layer, and returns the bytes of all its tensors."""
    for layer in linear_layers(model).values():
        torch.nn.init.normal_(layer.weight, std=0.02)
        weight = layer.weight.data
        if kind == "int8":
            layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        elif kind != "float16":
            layer.weight = bnb.nn.Params4bit(
                weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=kind == "nf4+dq"
            ).to(device)
    gc.collect()
    held: dict[int, int] = {}

    def hold(tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()

    for parameter in model.parameters():
        hold(parameter.data)
        hold(getattr(parameter, "SCB", None))
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            for tensor in (state.absmax, state.code, state.offset):
                hold(tensor)
            state = state.state2
    return sum(held.values())


def main() -> None:
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "no GPU: only computed"
    print(f"baichuan-7B's shape, {device}; torch {torch.__version__}, bitsandbytes {bnb.__version__}")
    print("| | computed GiB | tensors GiB | allocated GiB | two layers: computed / tensors |")
    print("|---|---:|---:|---:|---:|")
    for kind, name in KINDS.items():
        small = computed_bytes(make(SMALL, "meta"), kind) / quantize(make(SMALL, "cpu"), kind, "cpu")
        found = held = "–"
        if gpu:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            model = make(BAICHUAN_7B, "cuda")
            held = f"{quantize(model, kind, 'cuda') / 2**30:.2f}"
            found = f"{(torch.cuda.memory_allocated() - before) / 2**30:.2f}"
            del model
            gc.collect()
        print(f"| {name} | {computed_bytes(make(BAICHUAN_7B, 'meta'), kind) / 2**30:.2f} | {held} | {found} | {small:.4f} |")


if __name__ == "__main__":
    main()
