"""The labels of token rows."""

IGNORE = -100
"""The label that the loss leaves out (PyTorch's `ignore_index`)."""
