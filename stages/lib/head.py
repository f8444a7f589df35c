"""A model's output head, which need not make logits where nobody wants them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def before(head: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While it holds, the head gets what `change` makes of the hidden states (rows, tokens, size)."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
