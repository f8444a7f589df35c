"""Tokens per second of QLoRA training: Loratory's train stage, Trainer + PEFT, TRL and Unsloth on the same rows.

    python benchmarks/train.py                                     models/base on data/tokens, after `make repro`
    python benchmarks/train.py --shape 8b --lengths full belle     an 8B model with random weights, on a GPU

All use NF4 with double quantization, LoRA r=16 on all linear layers, no dropout and AdamW. Each runs in its own process.
--peers names a folder of packages that only the peers see, since they need other versions than Loratory. The first steps
are warm-up and are not counted, and padding does not count as tokens. The table also has the loss of the last step and the
final validation loss, which show whether the faster training is still the same training.
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

from benchmarks.shapes import LONGEST, make_model, make_rows, vocabulary_of, write_rows  # noqa: E402
from benchmarks.ways import machine, peak_memory, run_row, train_paths  # noqa: E402

WARM_UP = 3
WAYS = {
    "loratory": "Loratory",
    "fp8": "Loratory, compute: fp8",
    "trainer": "Transformers' Trainer + PEFT (padded batches, loss over all positions)",
    "trl": "TRL's SFTTrainer, no checkpointing, packed where lengths differ",
    "unsloth": "Unsloth, no checkpointing, packed where lengths differ",
}
CPU_WAYS = ["loratory", "trainer"]
PEERS_ROWS = 8
"""Rows in a micro-batch of the peers."""


class Clock:
    """The time at which each step ended on the GPU (not at which it was queued)."""

    def __init__(self, steps: int) -> None:
        from transformers import TrainerCallback

        marks: list[float] = []

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                import torch

                if torch.cuda.is_available() and len(marks) in (WARM_UP - 1, steps - 1):
                    torch.cuda.synchronize()
                marks.append(time.monotonic())

        self.callback, self.marks, self.steps = Callback(), marks, steps

    def report(self, trainer: Any, tokens: int) -> dict[str, Any]:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seconds = self.marks[self.steps - 1] - self.marks[WARM_UP - 1]
        return {"tokens": tokens, "seconds": seconds, "peak": peak_memory(), "losses": losses}


def batches(rows: Any, batch: int, steps: int, data_seed: int) -> list[list[int]]:
    """The row numbers of each step, in Loratory's order."""
    from stages.train.batches import Shuffled

    order, found = Shuffled(len(rows), data_seed), []
    for epoch in range(steps):
        order.set_epoch(epoch)
        numbers = list(order)
        found += [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
        if len(found) >= steps:
            break
    return found[:steps]


def counted_tokens(rows: Any, steps: list[list[int]]) -> int:
    return sum(int(rows.lengths[number]) for step in steps[WARM_UP:] for number in step)


def validation_loss(model: Any, rows: Any) -> float:
    """The mean cross-entropy per label, computed row by row."""
    import torch

    from stages.core.tokens import IGNORE

    total, count = 0.0, 0
    model.eval()
    for number in range(len(rows)):
        ids, labels = (torch.tensor(rows[number][name].astype(int), device=model.device) for name in ("input_ids", "labels"))
        with torch.no_grad(), torch.autocast(model.device.type, dtype=model.dtype, enabled=model.device.type == "cuda"):
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum"))
        count += int((labels[1:] != IGNORE).sum())
    return total / count


def loratory(folder: Path, steps: int, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    """The stage itself."""
    from stages.core.tokens import TokenRows, read_tokens
    from stages.train import train as stage
    from stages.train.trainer import AdapterTrainer

    clock = Clock(steps)
    made = []

    class Clocked(AdapterTrainer):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.add_callback(clock.callback)
            made.append(self)

    stage.AdapterTrainer = Clocked  # type: ignore[misc]
    params = stage.Params(**section | {"per_device_train_batch_size": batch})
    rows = TokenRows(read_tokens(folder / "train.arrow"))
    out = folder / "out"
    stage.train(params, **train_paths(folder, out)).clean_up()
    tokens = counted_tokens(rows, batches(rows, batch, steps, params.data_seed))
    validation = json.loads((out / "report.json").read_text())["validation_loss"]
    return clock.report(made[0], tokens) | {"validation": validation}


def trainer(folder: Path, steps: int, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    from stages.core.tokens import TokenRows, read_tokens
    from stages.model.device import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype("auto", device)
    rows, validation = (TokenRows(read_tokens(folder / f"{name}.arrow")) for name in ("train", "validation"))
    order = batches(rows, batch, steps, section["data_seed"])
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=dtype, device_map={"": device}, quantization_config=config
    )
    torch.manual_seed(section["seed"])
    lora = LoraConfig(r=section["r"], lora_alpha=section["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    data = [{name: rows[number][name].tolist() for name in ("input_ids", "labels")} for number in range(len(rows))]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        learning_rate=section["learning_rate"],
        lr_scheduler_type=section["lr_scheduler_type"],
        warmup_steps=section["warmup_steps"],
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=device.type == "cuda",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )

    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder / "base"), padding=True)

    class InOrder(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=collate)

    clock = Clock(steps)
    trainer = InOrder(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=data,
        callbacks=[clock.callback],
    )
    trainer.train()
    return clock.report(trainer, counted_tokens(rows, order)) | {"validation": validation_loss(trainer.model, validation)}


def peer_train(folder: Path, steps: int, batch: int, section: dict[str, Any], model: Any, *, plain: bool) -> dict[str, Any]:
    """Trains a model with an adapter with TRL; rows of different lengths are packed by TRL.

    Args:
        plain: Rows of the same length go to Transformers' Trainer, which the peer has patched; TRL's trainer would
            concatenate them.
    """
    import datasets
    import pyarrow as pa
    from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator
    from trl import SFTConfig, SFTTrainer

    with pa.memory_map(str(folder / "train.arrow")) as file:
        rows = pa.ipc.open_stream(file).read_all().column("input_ids").to_pylist()
    packing = len(set(map(len, rows))) > 1
    if packing:
        # A packed step has as many tokens as a step of Loratory, in rows of the maximum length.
        batch = max(PEERS_ROWS, round(batch * sum(map(len, rows)) / len(rows) / LONGEST / PEERS_ROWS) * PEERS_ROWS)
    parts = batch // PEERS_ROWS
    arguments = {
        "output_dir": str(folder / "out"),
        "bf16": True,
        "per_device_train_batch_size": PEERS_ROWS,
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "learning_rate": section["learning_rate"],
        "lr_scheduler_type": section["lr_scheduler_type"],
        "warmup_steps": section["warmup_steps"],
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": section["seed"],
        "gradient_checkpointing": False,
    }
    clock = Clock(steps)
    trainer: Any
    if plain and not packing:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
            data_collator=default_data_collator,
            callbacks=[clock.callback],
        )
    else:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments, max_length=LONGEST, dataset_num_proc=1, packing=packing),
            train_dataset=datasets.Dataset.from_list([{"input_ids": row} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(folder / "base"),
            callbacks=[clock.callback],
        )
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    counted: list[int] = []
    collate = trainer.data_collator

    def counting(features: Any) -> Any:
        found = collate(features)
        mask = found.get("attention_mask")
        counted.append(int(mask.sum()) if mask is not None else found["input_ids"].numel())
        return found

    trainer.data_collator = counting
    trainer.train()
    return clock.report(trainer, sum(counted[WARM_UP * parts : steps * parts]))


def unsloth(folder: Path, steps: int, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    import os

    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    from unsloth import FastLanguageModel  # isort: skip  # before transformers, which it patches
    import torch

    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "base"), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=True, device_map={"": 0}
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=section["r"],
        lora_alpha=section["lora_alpha"],
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    return peer_train(folder, steps, batch, section, model, plain=True)


def trl(folder: Path, steps: int, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.bfloat16, device_map={"": 0}, quantization_config=config
    )
    lora = LoraConfig(r=section["r"], lora_alpha=section["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    return peer_train(folder, steps, batch, section, get_peft_model(model, lora), plain=False)


def train_section(steps: int, rate: float) -> dict[str, Any]:
    """The section `train` of params.yaml for `steps` steps, without validation and checkpoints in between."""
    from stages.core.params import read_yaml

    return read_yaml(ROOT / "params.yaml")["train"] | {
        "learning_rate": rate,
        "logging_steps": 1,
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "training_arguments": {"max_steps": steps},
    }


def run(way: str, folder: Path, steps: int, batch: int, rate: float) -> dict[str, Any]:
    section = train_section(steps, rate)
    if way == "fp8":
        return loratory(folder, steps, batch, section | {"compute": "fp8"})
    return {"loratory": loratory, "trainer": trainer, "trl": trl, "unsloth": unsloth}[way](folder, steps, batch, section)


def prepare(folder: Path, lengths: str, count: int) -> None:
    """Writes random rows for the random model."""
    vocabulary = vocabulary_of(folder / "base")
    write_rows(folder / "train.arrow", make_rows(count, lengths, vocabulary))
    write_rows(folder / "validation.arrow", make_rows(4, lengths, vocabulary, seed=2))


def table(folder: Path, title: str, given: argparse.Namespace, batch: int) -> None:
    print(f"\n{title}, {batch} rows per step\n")
    print("| | tokens/s | seconds | peak GB | loss of the last step | validation loss |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in given.ways:
        packages = given.peers if way in ("trl", "unsloth") else None
        arguments = ("--folder", folder, "--steps", given.steps, "--batch", batch, "--rate", given.rate)
        found = run_row(__file__, way, WAYS[way], *arguments, packages=packages, limit=given.limit)
        if found is None:
            continue
        rate, peak = found["tokens"] / found["seconds"], found["peak"] / 1e9
        losses = f"{found['losses'][-1]:.4f} | " + (f"{found['validation']:.4f}" if "validation" in found else "–")
        print(f"| {WAYS[way]} | {rate:,.0f} | {found['seconds']:.1f} | {peak:,.1f} | {losses} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--shape", help="a model with random weights instead of models/base")
    parser.add_argument("--base", type=Path, help="the folder of an existing model of that shape")
    parser.add_argument("--lengths", nargs="*", default=["belle"], choices=["full", "belle"])
    parser.add_argument("--ways", nargs="*", default=CPU_WAYS, choices=WAYS)
    parser.add_argument("--peers", type=Path, help="a folder of packages for TRL and Unsloth")
    parser.add_argument("--limit", type=float, help="the maximum time of each run in seconds")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.folder, given.steps, given.batch, given.rate)))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.shape:
            (folder / "base").symlink_to(ROOT / "models" / "base")
            for table_name in ("train.arrow", "validation.arrow"):
                (folder / table_name).symlink_to(ROOT / "data" / "tokens" / table_name)
            table(folder, "models/base on data/tokens", given, given.batch)
            return
        if given.base:
            (folder / "base").symlink_to(given.base)
        else:
            make_model(folder / "base", given.shape)
        for lengths in given.lengths:
            # About the same number of tokens per step: eight of BELLE's rows have 2,048 tokens on average.
            batch = given.batch * (8 if lengths == "belle" else 1)
            prepare(folder, lengths, batch * given.steps)
            table(folder, f"{given.shape} shape, rows of {lengths} lengths", given, batch)


if __name__ == "__main__":
    main()
