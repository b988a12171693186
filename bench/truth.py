"""A whole LoRA step in float64, from the eager witnesses: the truth that every training step is judged against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import reference

from . import models

Gradients = dict[str, torch.Tensor]


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Every token's label is the next token; -100 where there is none."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def step(
    model: nn.Module, shape: models.Shape, batch: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor, Gradients]:
    """Loss, its terms (one per counted token) and adapter gradients of one PEFT model on one batch, in float64.

    Frozen weights are read off the model one layer at a time and layers are recomputed backward, so that it needs the
    memory of two layers. The rotary tables are inputs here: those of Hugging Face in the model's own dtype.
    """
    llama = model.base_model.model
    leaves = {name: p.detach().double().requires_grad_() for name, p in models.adapters(model).items()}
    ids = batch["input_ids"]
    x = llama.model.embed_tokens(ids).detach()
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    tables = tuple(t.double() for t in llama.model.rotary_emb(x, positions))
    mask = _mask(batch, ids)
    x = x.double().requires_grad_()
    for i, layer in enumerate(llama.model.layers):
        x = checkpoint(_layer, x, layer, f"model.layers.{i}", leaves, shape, tables, mask, use_reentrant=False)
    x = _norm(x, llama.model.norm)
    labels = shifted(batch["labels"])
    terms = reference.linear_cross_entropy(x, llama.lm_head.weight.detach().double(), labels, reduction="none")
    terms = terms[labels != -100]
    loss = terms.mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), terms.detach(), dict(zip(leaves, gradients, strict=True))


def _mask(batch: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor | None:
    """(B, 1, T, T), True where a query sees a key; None for plain causal attention."""
    T = ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    if batch.get("attention_mask") is not None:
        # A padded query sees itself, which keeps its row finite; no real token ever reads it.
        real = batch["attention_mask"].bool()[:, None, None, :] | torch.eye(T, dtype=torch.bool, device=ids.device)
        return causal & real
    if batch.get("position_ids") is not None:
        sequence = (batch["position_ids"] == 0).cumsum(1)
        return causal & (sequence[:, None, :, None] == sequence[:, None, None, :])
    return None


def _layer(x, layer, name, leaves, shape, tables, mask):
    def project(x, part, projection):
        module = getattr(getattr(layer, part), projection)
        where = f"{name}.{part}.{projection}.lora"
        return reference.lora_linear(
            x,
            models.frozen_weight(module.base_layer).double(),
            leaves[f"{where}_A.default.weight"],
            leaves[f"{where}_B.default.weight"],
            module.scaling["default"],
        )

    B, T, _ = x.shape
    n = _norm(x, layer.input_layernorm)
    q, k, v = (
        project(n, "self_attn", p).view(B, T, -1, shape.head_dim).transpose(1, 2) for p in models.PROJECTIONS[:3]
    )
    q, k = reference.rope(q, k, *tables)
    groups = shape.heads // shape.kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    x = x + project(out.transpose(1, 2).reshape(B, T, -1), "self_attn", "o_proj")
    n = _norm(x, layer.post_attention_layernorm)
    h = reference.swiglu(project(n, "mlp", "gate_proj"), project(n, "mlp", "up_proj"))
    return x + project(h, "mlp", "down_proj")


def _norm(x, module):
    return reference.rms_norm(x, module.weight.detach().double(), module.variance_epsilon)
