from __future__ import annotations

import torch


def transform() -> str | None:
    """In words, the transform of functions that runs now; None where there is none."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return None
