"""What runs a model's kernel calls, in words: for explain."""

from __future__ import annotations

import torch

from ..kernels._tiles import Call, answer, arch
from . import calls


def lines(model: calls.Model, rank: int, device: torch.device, dtype: torch.dtype, tokens: int = 4096) -> list[str]:
    """Which implementation, which tile, and where that is known from, for a step of so many tokens."""
    groups: dict[tuple[str, str], list[str]] = {}
    every = calls.of_model(model, tokens, rank, dtype, device) + calls.of_attention(model, tokens, dtype, device)
    masked = [Call(name, dtype, device) for name in ("attention_padded", "attention_packed")]
    for call in [*every, *masked]:
        choice = answer(call)
        of = groups.setdefault((str(choice), choice.source), [])
        if call.kernel not in of:
            of.append(call.kernel)
    found = [f"  {choice}, {source}: {', '.join(names)}" for (choice, source), names in groups.items()]
    return [f"For {tokens} tokens, rank {rank}, tiles of sm_{arch(device)}:", *sorted(found)]
