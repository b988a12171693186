"""Llama, as data: which class gives way to which, for which ops, unless what."""

from __future__ import annotations

from typing import Any

from transformers.models.llama import modeling_llama as hf

from ..modules import llama as fast
from .engine import Swap


def _not_silu(module: Any) -> str | None:
    activation = module.config.hidden_act
    return None if activation in ("silu", "swish") else f"hidden_act is {activation}, not silu"


TABLE = (
    Swap("norm", hf.LlamaRMSNorm, fast.LlamaRMSNorm, ops={"rms_norm"}),
    Swap("mlp", hf.LlamaMLP, fast.LlamaMLP, ops={"swiglu", "lora_linear"}, unless=_not_silu),
    Swap("attention", hf.LlamaAttention, fast.LlamaAttention, ops={"flash_attention", "lora_linear", "rope"}),
    Swap("layer", hf.LlamaDecoderLayer, fast.LlamaDecoderLayer, ops={"rms_norm", "lora_linear"}),
    Swap("model", hf.LlamaModel, fast.LlamaModel, ops={"flash_attention"}),
    Swap("head", hf.LlamaForCausalLM, fast.LlamaForCausalLM, ops={"linear_cross_entropy"}),
)
