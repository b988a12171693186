"""Llama models with random weights and LoRA adapters on all seven projections."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from fastlora import planning, reference
from fastlora.planning.shapes import PROJECTIONS, Shape

FORMULA = "tokens · (4·(layers·projections + V·H) + 3.5·2·T·H·layers)"
SHAPES = {
    "tiny": Shape(64, 176, 2, 2, 1, 256),
    "mini": Shape(512, 1376, 8, 8, 8),
    "small": Shape(1024, 2752, 8, 16, 16),
    "l7b": Shape(4096, 11008, 1, 32, 32),
    **planning.SHAPES,
}


def shape(name: str, layers: int | None = None) -> Shape:
    """A shape by name, with another number of layers where given.

    Raises:
        ValueError: there is no such model.
    """
    if name not in SHAPES:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(SHAPES)}")
    return replace(SHAPES[name], layers=layers) if layers else SHAPES[name]


def base_model(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Module:
    """A LlamaForCausalLM whose weights are representable in bf16, so that every dtype holds the same numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=16384,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype)
    if device == "meta":
        return model
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, off one so that a norm without its weight is noticed
                values = 1 + 0.1 * torch.randn(parameter.shape, generator=generator, device=device)
            else:
                values = torch.randn(parameter.shape, generator=generator, device=device) * parameter.shape[1] ** -0.5
            parameter.copy_(values.bfloat16())
    # to_empty left the rotary frequencies, which are not parameters, without values.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def in_4_bits(model: nn.Module, quant_type: str) -> nn.Module:
    """The model with its projections as bitsandbytes keeps them, doubly quantised; the head stays as it is.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    import bitsandbytes as bnb

    for layer in list(model.modules()):
        for name, linear in list(layer.named_children()):
            if name not in PROJECTIONS:
                continue
            weight = linear.weight.data
            options = {"compress_statistics": True, "quant_type": quant_type}
            sizes = linear.in_features, linear.out_features
            packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, device="meta", **options)
            packed.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, module=packed, **options)
            setattr(layer, name, packed.to(weight.device))
    model.is_loaded_in_4bit = True
    return model


def frozen_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a projection as its products see it, (N, K)."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return module.weight.detach()
    return reference.dequantize_4bit(module.weight, state, module.compute_dtype)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters: every provider trains on one set of frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_lora(model: nn.Module, rank: int, dropout: float, fp32_adapters: bool, seed: int = 1) -> nn.Module:
    """get_peft_model with random A and B (representable in bf16), alpha = 2·rank, on all seven projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapters(model).items()):
            if not fp32_adapters:  # PEFT leaves meta adapters in fp32
                parameter.data = parameter.data.to(model.base_model.model.lm_head.weight.dtype)
            if parameter.device.type == "meta":
                continue
            generator = torch.Generator(parameter.device).manual_seed(seed + i)
            values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
            parameter.copy_((values * scale).bfloat16())
    return model


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by a name that wrappers (torch.compile's, say) do not change."""
    return {
        name.split("base_model.model.", 1)[-1].replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def set_dropout(model: nn.Module, p: float) -> None:
    """Set the probability of every LoRA dropout in place."""
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = p
