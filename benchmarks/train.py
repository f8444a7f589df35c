"""Real tokens a second of QLoRA training: Loratory's train beside Transformers' Trainer with PEFT, on the same rows.

    python benchmarks/train.py [--steps 12] [--batch 16]

Run it after `make repro`: it trains models/base on data/tokens, on the GPU if there is one. Both sides: NF4 with double
quantization, LoRA r=16 on all linear layers, the same batch size and learning rate. The first steps warm up and are not
counted. Prints tokens a second (padding is no token), peak memory, and the loss of the last step of each side, so that
speed is not bought with another training.
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

from benchmarks.ways import peak_main_memory, run_way  # noqa: E402

WARM_UP = 2
WAYS = {
    "trainer": "Transformers' Trainer + PEFT (padded batches, loss over all positions)",
    "loratory": "Loratory",
}


def clocked(trainer: Any, lengths: list[int], steps: int) -> dict[str, Any]:
    """Trains, and counts the tokens and seconds behind the warm-up, and the losses."""
    import torch
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.monotonic())

    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = marks[-1] - marks[WARM_UP - 1]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_main_memory()
    return {"tokens": sum(lengths), "seconds": seconds, "peak": peak, "losses": losses, "steps": steps}


def run(way: str, steps: int, batch: int) -> dict[str, Any]:
    import torch

    from stages.lib.batch import Shuffled, use_flat_rows
    from stages.lib.device import pick_device
    from stages.lib.params import read_yaml
    from stages.lib.tokens import TokenRows, read_tokens
    from stages.train import OURS, Params

    section = read_yaml(ROOT / "params.yaml")["train"]
    params = Params(
        **section
        | {
            "per_device_train_batch_size": batch,
            "logging_steps": 1,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            "training_arguments": {"max_steps": steps},
        }
    )
    rows = TokenRows(read_tokens(ROOT / "data" / "tokens" / "train.arrow"))
    validation = TokenRows(read_tokens(ROOT / "data" / "tokens" / "validation.arrow"))
    order = list(Shuffled(len(rows), params.data_seed))
    counted = [int(rows.lengths[number]) for number in order[WARM_UP * batch : steps * batch]]
    base = ROOT / "models" / "base"
    device = pick_device()
    with tempfile.TemporaryDirectory() as folder:
        if way == "loratory":
            from stages.lib.adapter import Adapter, add_adapter
            from stages.lib.arguments import make_arguments
            from stages.lib.loss import load_loss
            from stages.lib.quantized import Quantization, load_quantized
            from stages.lib.trainer import AdapterTrainer

            torch.manual_seed(0)
            model = add_adapter(load_quantized(base, params).model, base, params, params)
            flat = use_flat_rows(model.eval())
            given = params.model_dump(exclude={*Quantization.model_fields, *Adapter.model_fields, *OURS})
            arguments = make_arguments(given, params.training_arguments, Path(folder), model.dtype, cpu=device.type == "cpu")
            loss = load_loss(ROOT / params.loss, model.config.vocab_size, {}, 0.0)
            trainer = AdapterTrainer(model, arguments, rows, validation, loss, flat=flat, early_stopping_patience=0)
        else:
            from peft import LoraConfig, get_peft_model
            from transformers import (
                AutoModelForCausalLM,
                AutoTokenizer,
                BitsAndBytesConfig,
                DataCollatorForSeq2Seq,
                Trainer,
                TrainingArguments,
            )

            from stages.lib.device import pick_dtype

            dtype = pick_dtype("auto", device)
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
            )
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, device_map={"": device}, quantization_config=config
            )
            torch.manual_seed(0)
            lora = LoraConfig(r=params.r, lora_alpha=params.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
            data = [
                {name: rows[number][name].tolist() for name in ("input_ids", "labels")} for number in order[: steps * batch]
            ]
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch,
                learning_rate=params.learning_rate,
                lr_scheduler_type=params.lr_scheduler_type,
                warmup_steps=params.warmup_steps,
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=device.type == "cpu",
                bf16=dtype == torch.bfloat16,
            )

            class InOrder(Trainer):  # type: ignore[misc]
                def _get_train_sampler(self, *_: Any) -> Any:
                    return torch.utils.data.SequentialSampler(data)

            collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base), padding=True)
            trainer = InOrder(model=get_peft_model(model, lora), args=arguments, train_dataset=data, data_collator=collate)
        return clocked(trainer, counted, steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.steps, given.batch)))
        return
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, batches of {given.batch} rows")
    print("| | tokens/s | seconds | peak MB | loss of the last step |")
    print("|---|---:|---:|---:|---:|")
    for way, name in WAYS.items():
        found, failure = run_way(__file__, way, "--steps", str(given.steps), "--batch", str(given.batch))
        if found is None:
            sys.exit(f"{way} failed: {failure}")
        rate, peak = found["tokens"] / found["seconds"], found["peak"] / 1e6
        print(f"| {name} | {rate:,.0f} | {found['seconds']:.1f} | {peak:,.0f} | {found['losses'][-1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
