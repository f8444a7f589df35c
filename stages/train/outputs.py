"""What `train` writes: the adapter, its report and curves, and what differs from run to run."""

import platform
import resource
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stages.core.jsonl import write_json
from stages.core.output import fresh_file, fresh_folder
from stages.core.tokens import TokenRows
from stages.model.adapter import save_adapter
from stages.model.device import pick_device
from stages.train.trainer import AdapterTrainer


def write_adapter(
    adapter: Path, model: Any, *, initial_lora: Mapping[str, torch.Tensor], training: Mapping[str, Any]
) -> None:
    """Writes PEFT's two files and training.json.

    Args:
        adapter: The folder to write.
        initial_lora: The initial LoRA weights that were subtracted from the base (PiSSA, OLoRA); may be empty.
        training: The content of training.json: what `merge` must know about the training.
    """
    with fresh_folder(adapter) as folder:
        save_adapter(model, folder, initial_lora)
        write_json(folder / "training.json", training)


def count_rows(rows: TokenRows) -> dict[str, int]:
    """The number of rows, of their tokens, and of the tokens in the loss."""
    return {"rows": len(rows), "tokens": int(rows.lengths.sum()), "label_tokens": rows.label_tokens}


def write_report(
    report: Path,
    trainer: AdapterTrainer,
    *,
    validation_rows: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    """Writes counts and the validation loss before and after the training, as measured by `AdapterTrainer.measure`.

    `validation_rows` is the number of all of them; the loss is that of "eval_rows" of them.
    """
    counts = count_rows(trainer.train_dataset) | {
        "validation_rows": validation_rows,
        "eval_rows": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if best:
        counts["best_step"] = int(Path(best).name.rpartition("-")[2])
    losses = {
        "validation_loss_before": before["loss"],
        "validation_loss": after["loss"],
        "validation_token_accuracy_before": before["token_accuracy"],
        "validation_token_accuracy": after["token_accuracy"],
    }
    with fresh_file(report) as file:
        write_json(file, counts | losses)


def write_curves(curves: Path, trainer: AdapterTrainer, *, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Writes the loss by optimizer step: train.csv and validation.csv."""
    history, last = trainer.state.log_history, trainer.state.global_step
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validated = [(0, before["loss"])] + [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    # With load_best_model_at_end, `after` belongs to the best step, not to the last one.
    if validated[-1][0] < last and not trainer.args.load_best_model_at_end:
        validated.append((last, after["loss"]))
    with fresh_folder(curves) as folder:
        for name, curve in (("train", points), ("validation", validated)):
            lines = "".join(f"{step},{loss}\n" for step, loss in curve)
            (folder / f"{name}.csv").write_text("step,loss\n" + lines, encoding="utf-8", newline="\n")


def write_machine(machine: Path, trainer: AdapterTrainer, *, seconds: float, resumed_from: str | None) -> None:
    """Writes what differs between runs with the same inputs: date, commit, device, time, memory."""
    device = pick_device()
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with fresh_file(machine) as file:
        write_json(
            file,
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": _commit(),
                "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
                "processes": trainer.accelerator.num_processes,
                "seconds": round(seconds, 1),
                "tokens_per_second": round(trainer.progress.tokens_per_second, 1),
                "peak_memory_bytes": peak,
                "resumed_from": Path(resumed_from).name if resumed_from else None,
            },
        )


def _commit() -> str:
    """The commit that is checked out; "" without git or outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
