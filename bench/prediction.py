"""What the planner says of a training step before it is measured: its arithmetic for the same model, batch and GPU."""

from __future__ import annotations

from fastlora.planning import energy, gpus, roofline
from fastlora.planning.activations import KEEP, POLICIES, Adapters, saved
from fastlora.planning.step import step_bytes

from .record import Record
from .setting import Setting

# The providers that the planner knows, and whether their layers are fused.
_FUSED = {"peft": False, "fastlora": True}


def of_step(setting: Setting, provider: str) -> Record | None:
    """Peak bytes above the loaded model, bytes that fused layers keep for backward, and, of a known GPU, milliseconds
    and joules.

    None for a provider, a batch or a base that the planner does not know.
    """
    if provider not in _FUSED or setting.batch != "dense" or setting.base != "dense" or setting.checkpointing:
        return None
    fused, shape, tokens = _FUSED[provider], setting.shape, setting.rows * setting.sequence
    adapters = Adapters.uniform(setting.rank, dropout=setting.dropout)
    need = step_bytes(
        shape, adapters, tokens, setting.sequence, itemsize=setting.dtype.itemsize, device=setting.device, fused=fused,
        fused_loss=fused,
    )  # fmt: skip
    found: Record = {"peak_bytes": round(need.peak(shape.layers, 0, 0))}
    if fused:  # without logits, what the layers keep is as good as all
        kept = saved(shape, adapters, itemsize=setting.dtype.itemsize)
        found["saved_bytes"] = round(tokens * shape.layers * sum(kept.values()))
    if setting.device != "cuda" or setting.dtype.itemsize != 2:
        return found
    try:
        card = gpus.gpu_of("auto")
    except ValueError:  # a GPU that the planner does not know
        return found
    seconds = sum(
        roofline.seconds(
            shape, adapters, card, tokens=tokens, sequence=setting.sequence,
            layers={policy: shape.layers * (policy == KEEP) for policy in POLICIES}, fused=fused,
            updated=shape.layers * adapters.parameters(shape),
        ).values()
    )  # fmt: skip
    joules = energy.kwh(seconds / 3600, card.watts) * 3.6e6
    return found | {"ms": round(1e3 * seconds, 3), "joules": round(joules, 2), "gpu": card.name}
