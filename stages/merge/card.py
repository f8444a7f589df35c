"""The README of the merged folder."""

from pathlib import Path
from typing import Any

from stages.core.jsonl import read_json
from stages.model.load import ADAPTER


def write_card(folder: Path, base: Path, adapter: Path, validation_rows: int, figures: dict[str, Any]) -> None:
    manifest = read_json(base / "manifest.json")
    training = read_json(adapter / "training.json")
    config = read_json(adapter / "adapter_config.json")
    quantization, data = training["quantization"]["quantization"], training["data"]
    if figures["method"] == "lora":
        how = (
            f"LoRA with r={config['r']} and lora_alpha={config['lora_alpha']}"
            + " (some layers have others)" * bool(config["rank_pattern"] or config["alpha_pattern"])
            + f", trained on the base in {quantization} and merged into its {figures['base']} weights."
        )
    else:
        how = (
            f"{figures['method']} with {config['num_virtual_tokens']} virtual tokens, trained on {quantization} weights. "
            f"It cannot be merged into weights: load this folder's {figures['base']} weights with Transformers, then "
            f'PeftModel.from_pretrained(model, "{ADAPTER}") from the folder inside it.'
        )
    scores = f"greedy answers that are the same: {100 * figures['greedy_agreement']:.0f} % of {figures['greedy_rows']}"
    (folder / "README.md").write_text(
        f"# {manifest['model']}, fine-tuned\n\n"
        f"Base: {manifest['model']} at {manifest['revision']}. {how}\n\n"
        f"Trained on {data['rows']:,} rows of {data['tokens']:,} tokens, of which {data['label_tokens']:,} were learned; "
        f"{validation_rows:,} further rows for validation.\n\n"
        f"Measured against the trained model on {figures['tokens']} tokens: mean KL {figures['mean_kl']:.2e} nats, the "
        f"likeliest token agrees at {100 * figures['top1_agreement']:.2f} %, {scores}.\n",
        encoding="utf-8",
        newline="\n",
    )
