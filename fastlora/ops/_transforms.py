"""What may call an operator in a way that it has no rule for: torch.func, forward-mode differentiation, jit.trace."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# Every call of an operator asks these: bound here, an answer takes a tenth of a microsecond.
_under_torch_func = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def transform() -> str | None:
    """What transforms or traces the call that runs now, in words; None where nothing does.

    torch.compile is no such transform. But torch.func and forward-mode differentiation inside of a compiled function
    are: torch would leave out gradients and tangents there, and say nothing.
    """
    if _under_torch_func():
        return f"torch.func's {_innermost()}"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if _tracing_state() is not None:
        return "torch.jit.trace"
    return None


def _innermost() -> str:
    """The name of the torch.func transform whose function runs now."""
    if torch.compiler.is_compiling():  # a compiler does not read the stack
        return "transforms"
    return torch._C._functorch.peek_interpreter_stack().key().name.lower()


def refuse(op: str) -> None:
    """Raise RuntimeError where a transform runs: the operators have no rule for any."""
    if name := transform():
        raise RuntimeError(
            f"fastlora.ops.{op} does not run under {name}: use the plain PyTorch expression there, or call"
            " fastlora.unpatch(model) first"
        )
