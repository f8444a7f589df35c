"""Time and memory of the comparison that merge makes, at a vocabulary of 152,000 words.

    python benchmarks/merge_proof.py [--labels 2000] [--before FOLDER]

Makes a random Llama of two narrow layers with that vocabulary, a LoRA adapter for all its linear layers, and 64 validation
rows. Runs the stage on NF4 in its own process, once with a single row of 16 labels and once with all rows. The difference of
the two peaks of main memory (of GPU memory, if there is a GPU) is what the comparison takes above the models.

`--before` names a checkout of other code to measure too. Code that holds all logits takes 28 bytes for each of them: 545 GB
with 2,000 labels a row.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if "--code" in sys.argv:
    sys.path.insert(0, sys.argv[sys.argv.index("--code") + 1])
else:
    sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402
import torch  # noqa: E402

VOCABULARY = 152_000
WIDTH = 64
ROWS = 64
PROMPT = 100
FEW_LABELS = 16


def make(work: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    base, adapter = work / "base", work / "adapter"
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(base)
    (base / "manifest.json").write_text(json.dumps({"model": "random", "revision": "", "trust_remote_code": False}))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=layers, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(adapter)
    quantization = {
        "quantization": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": [],
        "dtype": "auto",
    }
    training = {
        "quantization": quantization,
        "quantized_layers": sorted(layers),
        "transposed_layers": [],
        "data": {"rows": 0, "tokens": 0, "label_tokens": 0},
    }
    (adapter / "training.json").write_text(json.dumps(training))
    (work / "chat_template.jinja").write_text("")


def write_rows(path: Path, rows: int, labels: int) -> None:
    from stages.core.tokens import IGNORE, TRAINING, open_tokens

    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, PROMPT + labels), generator=random).tolist()
    made = [{"id": str(n), "input_ids": row, "labels": [IGNORE] * PROMPT + row[PROMPT:]} for n, row in enumerate(ids)]
    with open_tokens(path, TRAINING, [2]) as stream:
        stream.write_table(pa.Table.from_pylist(made, schema=TRAINING))


def merge(work: Path, rows: int, labels: int) -> None:
    from benchmarks.ways import peak_memory
    from stages.merge.merge import Params
    from stages.merge.merge import merge as stage

    tokens = work / "validation.arrow"
    write_rows(tokens, rows, labels)
    started = time.monotonic()
    stage(
        Params(base="dequantized"),
        base=work / "base",
        adapter=work / "adapter",
        validation_tokens=tokens,
        chat_template=work / "chat_template.jinja",
        merged=work / "merged",
        report=work / "merge.json",
    )
    print(json.dumps({"seconds": time.monotonic() - started, "peak": peak_memory()}))


def main() -> None:
    from benchmarks.ways import machine, run_row

    parser = argparse.ArgumentParser()
    parser.add_argument("--labels", type=int, nargs="+", default=[2000])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--way")
    parser.add_argument("--code", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    given = parser.parse_args()
    if given.way:
        merge(given.work, given.rows, given.labels[0])
        return
    checkouts = {"now": ROOT} | ({"before": given.before.resolve()} if given.before else {})
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make(work)
        print(machine())
        print("| code | labels of a row | seconds | peak GB | above the models, GB |")
        print("|---|---:|---:|---:|---:|")
        for name, code in checkouts.items():
            to = ("--work", work, "--code", code)
            least = run_row(__file__, name, name, *to, "--rows", 1, "--labels", FEW_LABELS)
            for labels in given.labels:
                found = run_row(__file__, name, name, *to, "--rows", given.rows, "--labels", labels)
                if least and found:
                    above = (found["peak"] - least["peak"]) / 1e9
                    print(
                        f"| {name} | {labels:,} | {found['seconds']:.0f} | {found['peak'] / 1e9:.2f} | {above:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
