import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As the middle of transformers' LlamaMLP."""
    return torch.nn.functional.silu(gate) * up
