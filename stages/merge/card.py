"""The README.md of models/merged."""

from pathlib import Path
from typing import Any

from stages.core.jsonl import read_json
from stages.core.provenance import MANIFEST
from stages.merge.training import Training
from stages.model.load import ADAPTER


def write_card(folder: Path, base: Path, *, adapter: Path, training: Training, figures: dict[str, Any]) -> None:
    """Writes README.md: the base, the adapter, the training data, and how close the merged model is to the trained one.

    Args:
        folder: The merged model's folder.
        base: The base model's folder.
        adapter: The adapter's folder.
        training: How it was trained.
        figures: The stage's report.
    """
    manifest = read_json(base / MANIFEST)
    config = read_json(adapter / "adapter_config.json")
    (folder / "README.md").write_text(
        f"# {manifest['model']}, fine-tuned\n\n"
        f"Base model: {manifest['model']}, revision {manifest['revision']}. "
        f"{_describe_adapter(config, training, figures)}\n\n"
        f"Trained on {training.rows:,} rows with {training.tokens:,} tokens, {training.label_tokens:,} of them in the loss; "
        f"validated on {figures['validation_rows']:,} other rows.\n\n"
        f"Compared with the model as it was trained, on {figures['tokens']:,} labelled tokens of {figures['rows']:,} "
        f"validation rows: the mean KL divergence is {_with_error(figures, 'mean_kl', '.2e')} nats, the most likely token "
        f"agrees at {100 * figures['top1_agreement']:.2f} % of the positions, the loss is "
        f"{_with_error(figures, 'merged_loss', '.4f')} ({figures['trained_loss']:.4f} as trained, "
        f"{figures['base_loss']:.4f} without the adapter), and {100 * figures['greedy_agreement']:.0f} % of "
        f"{figures['greedy_rows']} greedy answers are identical{_describe_near_ties(figures)}."
        f"{_describe_kept(figures)}{_describe_quantization(figures)}\n",
        encoding="utf-8",
        newline="\n",
    )


def describe_cost(figures: dict[str, Any]) -> str:
    """For a message: "nf4 raised the base's loss by 0.0312 ± 0.0040 (from 2.1034)"; or why it is not known."""
    cost = figures["quantization_cost"]
    if cost["cost"] is None:
        return f"the cost of {figures['quantization']} was not measured"
    error = "" if cost["standard_error"] is None else f" ± {cost['standard_error']:.4f}"
    verb, change = ("raised", cost["cost"]) if cost["cost"] >= 0 else ("lowered", -cost["cost"])
    return f"{figures['quantization']} {verb} the base's loss by {change:.4f}{error} (from {cost['full_base_loss']:.4f})"


def _describe_near_ties(figures: dict[str, Any]) -> str:
    count = figures["greedy_near_ties"]
    return f"; {count} differ from a near tie of the trained model on" if count else ""


def _describe_kept(figures: dict[str, Any]) -> str:
    kept = figures["delta_kept"]
    if kept is None:
        return ""
    return f" The {kept['dtype']} of the files keeps {100 * kept['share']:.1f} % of the delta weights."


def _describe_quantization(figures: dict[str, Any]) -> str:
    return f" Before the training, {describe_cost(figures)}." if figures["quantization_cost"] else ""


def _with_error(figures: dict[str, Any], name: str, form: str) -> str:
    """A figure with its standard error, if it has one: 9.05e-05 ± 1.20e-05."""
    error = figures["standard_errors"][name]
    return f"{figures[name]:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _describe_adapter(config: dict[str, Any], training: Training, figures: dict[str, Any]) -> str:
    quantization = training.settings.quantization
    trained_on = "the unquantized base" if quantization == "none" else f"the base quantized to {quantization}"
    if figures["method"] == "lora":
        others = " (other values in some layers)" * bool(config["rank_pattern"] or config["alpha_pattern"])
        return (
            f"Adapter: LoRA with r={config['r']} and lora_alpha={config['lora_alpha']}{others}, trained on {trained_on} and "
            f"merged into its {figures['base']} weights."
        )
    return (
        f"Adapter: {figures['method']} with {config['num_virtual_tokens']} virtual tokens, trained on {trained_on}. It "
        f"cannot be merged into weights. This folder has the {figures['base']} weights of the base: load them with "
        f'Transformers, then the adapter with PeftModel.from_pretrained(model, "{ADAPTER}"); {ADAPTER} is a folder in it.'
    )
