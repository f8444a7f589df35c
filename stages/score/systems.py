"""What is compared: two models, and two baselines that need no model."""

SYSTEMS = {
    "base": "base model",
    "most_frequent": "most frequent training answer",
    "nearest": "answer of the nearest training prompt",
    "merged": "fine-tuned model",
}
"""System → its name in the report and in the printed table."""
SHORT_NAMES = {"base": "base", "most_frequent": "frequent", "nearest": "nearest", "merged": "fine-tuned"}
"""System → its label in the plot."""
MODELS = ("base", "merged")
