"""Real tokens a second of QLoRA training: Loratory's train stage beside Trainer + PEFT, TRL and Unsloth, on the same rows.

    python benchmarks/train.py                                     models/base on data/tokens, after `make repro`
    python benchmarks/train.py --shape 8b --lengths full belle     an 8B model of random weights, on a GPU

All: NF4 with double quantization, LoRA r=16 on all linear layers, no dropout, AdamW. Each way runs in a process of its own.
With --peers a folder of packages is named that the peers alone see, since they want other versions than Loratory. The first
steps warm up and are not counted; padding is no token. The loss of the last step stands beside, so that speed is not bought
with another training.
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

from benchmarks.shapes import LONGEST, make_model, make_rows, write_rows  # noqa: E402
from benchmarks.ways import machine, peak_memory, run_row  # noqa: E402

WARM_UP = 3
WAYS = {
    "loratory": "Loratory",
    "fp8": "Loratory, compute: fp8",
    "trainer": "Transformers' Trainer + PEFT (padded batches, loss over all positions)",
    "trl": "TRL's SFTTrainer, no checkpointing, packed where lengths differ",
    "unsloth": "Unsloth, no checkpointing, packed where lengths differ",
}
CPU_WAYS = ["loratory", "trainer"]


class Clock:
    """When each step ended, by the GPU's time and not by that of its queue."""

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


def loratory(folder: Path, steps: int, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    """The stage itself."""
    import stages.train
    from stages.lib.batch import Shuffled
    from stages.lib.tokens import TokenRows, read_tokens
    from stages.lib.trainer import AdapterTrainer

    clock = Clock(steps)
    made = []

    class Clocked(AdapterTrainer):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.add_callback(clock.callback)
            made.append(self)

    stages.train.AdapterTrainer = Clocked  # type: ignore[misc]
    params = stages.train.Params(**section | {"per_device_train_batch_size": batch})
    rows = TokenRows(read_tokens(folder / "train.arrow"))
    order = list(Shuffled(len(rows), params.data_seed))
    out = folder / "out"
    stages.train.train(
        params,
        folder / "train.arrow",
        folder / "validation.arrow",
        folder / "base",
        ROOT / params.loss,
        *(out / name for name in ("adapter", "report.json", "loss", "machine.json")),
    )
    tokens = sum(int(rows.lengths[number]) for number in order[WARM_UP * batch : steps * batch])
    return clock.report(made[0], tokens)


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

    from stages.lib.batch import Shuffled
    from stages.lib.device import pick_device, pick_dtype
    from stages.lib.tokens import TokenRows, read_tokens

    device = pick_device()
    dtype = pick_dtype("auto", device)
    rows = TokenRows(read_tokens(folder / "train.arrow"))
    order = list(Shuffled(len(rows), section["data_seed"]))[: steps * batch]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=dtype, device_map={"": device}, quantization_config=config
    )
    torch.manual_seed(section["seed"])
    lora = LoraConfig(r=section["r"], lora_alpha=section["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    data = [{name: rows[number][name].tolist() for name in ("input_ids", "labels")} for number in order]
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

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    clock = Clock(steps)
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder / "base"), padding=True)
    trainer = InOrder(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[clock.callback],
    )
    trainer.train()
    tokens = sum(int(rows.lengths[number]) for number in order[WARM_UP * batch :])
    return clock.report(trainer, tokens)


def peer_arguments(folder: Path, steps: int, batch: int, at_once: int, section: dict[str, Any]) -> dict[str, Any]:
    """What SFTConfig gets; `at_once` rows in a micro-batch."""
    return {
        "output_dir": str(folder / "out"),
        "bf16": True,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": batch // at_once,
        "max_steps": steps,
        "learning_rate": section["learning_rate"],
        "lr_scheduler_type": section["lr_scheduler_type"],
        "warmup_steps": section["warmup_steps"],
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "max_length": LONGEST,
        "dataset_num_proc": 1,
        "seed": section["seed"],
    }


def peer_train(folder: Path, steps: int, batch: int, section: dict[str, Any], model: Any, at_once: int) -> dict[str, Any]:
    """TRL's trainer on a model with an adapter: rows of one length as they are, others packed by the peer's own way."""
    import datasets
    import pyarrow as pa
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with pa.memory_map(str(folder / "train.arrow")) as file:
        rows = pa.ipc.open_stream(file).read_all().column("input_ids").to_pylist()
    packing = len(set(map(len, rows))) > 1
    if packing:
        # A packed step is as many tokens as a step of Loratory's, in rows of the longest length.
        batch = max(at_once, round(batch * sum(map(len, rows)) / len(rows) / LONGEST / at_once) * at_once)
    arguments = SFTConfig(
        **peer_arguments(folder, steps, batch, at_once, section), packing=packing, gradient_checkpointing=False
    )
    clock = Clock(steps)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
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
    parts = batch // at_once
    return clock.report(trainer, sum(counted[WARM_UP * parts : steps * parts]))


def unsloth(folder: Path, steps: int, batch: int, section: dict[str, Any]) -> dict[str, Any]:
    import os

    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    from unsloth import FastLanguageModel  # before transformers, which it changes

    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "base"), max_seq_length=LONGEST, load_in_4bit=True, device_map={"": 0}
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
    return peer_train(folder, steps, batch, section, model, at_once=4)


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
    return peer_train(folder, steps, batch, section, get_peft_model(model, lora), at_once=4)


def train_section(steps: int, rate: float) -> dict[str, Any]:
    """params.yaml's section, for so many steps without validation and checkpoints in between."""
    from stages.lib.params import read_yaml

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
    """Random rows beside the random model."""
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    write_rows(folder / "train.arrow", make_rows(count, lengths, vocabulary))
    write_rows(folder / "validation.arrow", make_rows(4, lengths, vocabulary, seed=2))


def table(folder: Path, title: str, given: argparse.Namespace, batch: int) -> None:
    print(f"\n{title}, {batch} rows a step\n")
    print("| | tokens/s | seconds | peak GB | loss of the last step |")
    print("|---|---:|---:|---:|---:|")
    for way in given.ways:
        packages = given.peers if way in ("trl", "unsloth") else None
        arguments = ("--folder", folder, "--steps", given.steps, "--batch", batch, "--rate", given.rate)
        found = run_row(__file__, way, WAYS[way], *arguments, packages=packages)
        if found is None:
            continue
        rate, peak = found["tokens"] / found["seconds"], found["peak"] / 1e9
        print(
            f"| {WAYS[way]} | {rate:,.0f} | {found['seconds']:.1f} | {peak:,.1f} | {found['losses'][-1]:.4f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--shape", help="a model of random weights in place of models/base")
    parser.add_argument("--base", type=Path, help="such a model that is there already")
    parser.add_argument("--lengths", nargs="*", default=["belle"], choices=["full", "belle"])
    parser.add_argument("--ways", nargs="*", default=CPU_WAYS, choices=WAYS)
    parser.add_argument("--peers", type=Path, help="a folder of packages for TRL and Unsloth")
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
            # As many tokens a step, near enough: 2,048 are the mean of eight of BELLE's rows.
            batch = given.batch * (8 if lengths == "belle" else 1)
            prepare(folder, lengths, batch * given.steps)
            table(folder, f"{given.shape} shape, rows of {lengths} lengths", given, batch)


if __name__ == "__main__":
    main()
