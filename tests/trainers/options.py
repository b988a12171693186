"""What fastlora.patch takes, given to it by others."""

from __future__ import annotations

from torch import nn

import fastlora

OPS = "flash_attention, lora_linear, rms_norm, rope, swiglu"
OPTIONS = {"ops": OPS, "strict": True, "memory": "lean"}


def assert_taken(model: nn.Module) -> None:
    """All is fused but the loss, which is not among the ops; layers keep their input alone."""
    plan = fastlora.explain(model)
    assert [row.runs for row in plan.unfused] == ["transformers LlamaForCausalLM"]
    memory = [row.runs for row in plan.rows if row.path.endswith(".memory")]
    assert memory == ["checkpointed: recomputes the layer in backward"] * 2
