"""Which attention runs in a Llama: ours, SDPA, or flash-attn where it is installed.

transformers makes the mask of a batch once per forward, in LlamaModel, of the kind that the implementation named in the
config wants. Models may share a config, so no name of ours is written there. LlamaModel gives its layers a Mask, which
says in words what is visible, and an empty tensor in the place of the (B, 1, T, T) mask, on which any other attention
would fail rather than see too much.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.models.llama import modeling_llama as hf

from .. import ops
from ..kernels import _library, _tiles
from . import flash_attn, trust
from ._fused import Fused, changes_arguments, instance_forward, original_class, why_not_plain

OURS, SDPA = "fastlora", "sdpa"
# Arguments that transformers' SDPA does not read, or that the Mask stands for. Any other may change the attention.
_INERT = {
    *("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"),
    *("shift_labels", "num_items_in_batch", "ignore_index"),
}
KINDS = ("plain", "padded", "packed")


class Mask(NamedTuple):
    """What the tokens of a batch see, beside causality.

    Attributes:
        padding: (B, T) bool, True for real tokens.
        positions: (B or 1, T), the index of every token in its own sequence.
        sequences: the same as flash-attn takes it.
    """

    padding: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    sequences: flash_attn.Sequences | None = None

    def over_cache(self) -> Mask:
        """As transformers: position_ids tell packed sequences apart only where there is no cache."""
        return Mask(padding=self.padding)

    @property
    def kind(self) -> str:
        if self.padding is not None:
            return "padded"
        return "plain" if self.positions is None else "packed"


def _kernel(kind: str, device: torch.device) -> str:
    """What `choose` knows batches of a kind by."""
    if kind == "plain" and device.type == "cpu":
        return "attention_cpu" if _library.csrc_state == "loaded" else "attention_aten"
    if kind == "plain":
        return "attention"
    return f"attention_{kind}"


def _chosen(kind: str, like: torch.Tensor, **sizes: int) -> str:
    if torch.compiler.is_compiling():
        return _shipped(_kernel(kind, like.device), like.dtype, like.device)
    return _tiles.choose(_kernel(kind, like.device), like, **sizes).method


@torch.compiler.assume_constant_result
def _shipped(kernel: str, dtype: torch.dtype, device: torch.device) -> str:
    """What is chosen at any size, for a graph: a compiler would trace the reading of the cache of measurements."""
    return _tiles.answer(_tiles.Call(kernel, dtype, device)).method


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """For explain: every implementation chosen, and for what."""
    chosen: dict[str, list[str]] = {}
    for kind in KINDS:
        method = _tiles.answer(_tiles.Call(_kernel(kind, device), dtype, device)).method
        chosen.setdefault(method, []).append(kind)
    names = {OURS: "fastlora flash_attention", SDPA: "torch SDPA"}
    return ", ".join(f"{names.get(name, name)} ({', '.join(kinds)})" for name, kinds in chosen.items())


def why_not(module: Any) -> str | None:
    """Why what transformers would run attends in a LlamaAttention, and no choice of ours; None where ours does."""
    if why := trust.why_not("sdpa"):
        return why
    if not getattr(module.config, "is_causal", True):
        return "config.is_causal is False: fastlora's attention is causal"
    if not getattr(module, "is_causal", True):
        return "is_causal of the module is False: fastlora's attention is causal"
    if owner := changes_arguments(module):
        return f"a hook of {owner} may change its arguments, as context parallelism does"
    return None


def why_not_arguments(kwargs: dict[str, Any]) -> str | None:
    """Why these arguments of a forward are left to transformers' attention; None where they mean nothing to it."""
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _INERT)
    return f"the argument {unknown[0]}, which is passed on to transformers' attention" if unknown else None


def _masks(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether masks are ours to make: not over a cache, nor where any layer would not understand them."""
    rest = {name: value for name, value in kwargs.items() if name not in trust.MODEL_ARGUMENTS}
    cached = any(kwargs.get(name) is not None for name in trust.CACHE_NAMES)
    if len(args) > 1 or cached or model.config._attn_implementation != SDPA or why_not_arguments(rest):
        return False
    for layer in model.layers:
        attention = layer.self_attn
        if original_class(layer) is not hf.LlamaDecoderLayer or instance_forward(layer) or instance_forward(attention):
            return False
        if not isinstance(attention, Fused) or "flash_attention" not in attention._fastlora.ops:
            return False
        if changes_arguments(layer) or why_not(attention):
            return False
    return trust.why_not("layer", "attention") is None


def mask_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LlamaModel's forward that change where the mask of the batch is ours to make; else none.

    As transformers: position_ids tell packed sequences apart where there is no attention_mask, at every token whose
    position is not the one before plus 1. No answer is waited for but whether a given mask hides anything. (Without
    position_ids transformers 4 makes a (T, T) mask, where there is no cache, for sequences it does not find.)
    """
    padding, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    x = args[0] if args else kwargs.get("input_ids")
    x = kwargs.get("inputs_embeds") if x is None else x
    if x is None or not _masks(model, args, kwargs):
        return {}
    B, T = x.shape[:2]
    if padding is not None:
        if padding.shape != (B, T):
            return {}
        # A copy: backward reads it, and the caller may fill the same buffer for the next batch before that.
        padding = padding.to(x.device, torch.bool, copy=True)
        hides = torch.compiler.is_compiling() or not padding.all()
        mask = Mask(padding=padding if hides else None)
    elif position_ids is not None:
        if position_ids.shape not in ((B, T), (1, T)):
            return {}
        mask = Mask(positions=_positions(position_ids))
    else:
        mask = Mask()
    chosen = _chosen(mask.kind, x)
    if chosen == SDPA and mask.kind != "plain":
        return {}
    if chosen in flash_attn.PACKAGES and mask.positions is not None:
        mask = mask._replace(sequences=flash_attn.sequences(mask.positions.expand(B, T)))
    return {"attention_mask": x.new_empty((B, 1, 0, 0), dtype=torch.bool), "fastlora_mask": mask}


def _positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Each token's index in its own sequence, whatever number its sequence begins with."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return index - torch.where(begins, index, 0).cummax(-1).values


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask: Mask | None,
    decoding: bool,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query (B, H, T, D), key and value (B, H_kv, T_kv, D), and the Mask that LlamaModel made or transformers' own.

    decoding: over a cache in inference, where that is as it should be. kwargs: what transformers' attention takes,
    scaling and dropout among them, and all else that the layer was given.
    Returns (B, T, H, D), and weights where the implementation gives them.
    """
    if mask is None:
        rest = {name: value for name, value in kwargs.items() if name not in ("dropout", "scaling")}
        why = why_not(module) or why_not_arguments(rest)
        if not why and attention_mask is not None and not decoding and _chosen("padded", query) != SDPA:
            why = "a mask of the caller's own, or a layer that is not fused: SDPA"
        if why:
            module.count("attention", why)
        return transformers_attention(module, query, key, value, attention_mask, **kwargs)
    scaling, dropout = kwargs["scaling"], kwargs["dropout"]
    _, H, T, D = query.shape
    name = _chosen(mask.kind, query, m=T, n=H * D, k=D, p=H // key.shape[1])
    why = _why_not(name, query, key, mask, dropout)
    if why and name != OURS:
        name = OURS if _why_not(OURS, query, key, mask, dropout) is None else SDPA
    elif why:
        name = SDPA
    if why or name == OURS:
        module.count("attention", f"{why}: {name}" if why else None)
    if name == OURS:
        out = ops.flash_attention(
            query,
            key,
            value,
            scale=scaling,
            key_padding_mask=mask.padding,
            position_ids=mask.positions,
            dropout_p=dropout,
        )
        return out.transpose(1, 2), None
    if name in flash_attn.PACKAGES:
        return flash_attn.attend(name, query, key, value, mask.sequences, scaling, dropout), None
    full = _full(query, mask)
    return transformers_attention(module, query, key, value, full, dropout=dropout, scaling=scaling)


def transformers_attention(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the config names, looked up as transformers does: whatever is registered there is called."""
    name = module.config._attn_implementation
    if hasattr(hf.ALL_ATTENTION_FUNCTIONS, "get_interface"):
        attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(name, hf.eager_attention_forward)
    else:
        attend = hf.eager_attention_forward if name == "eager" else hf.ALL_ATTENTION_FUNCTIONS[name]
    return attend(module, *args, **kwargs)


def _why_not(name: str, query: torch.Tensor, key: torch.Tensor, mask: Mask, dropout: float) -> str | None:
    if name == SDPA:
        return None
    if name in flash_attn.PACKAGES:
        return flash_attn.why_not(name, query, mask.kind, dropout)
    if not 32 <= query.shape[-1] <= 256:
        return f"head dimension {query.shape[-1]}"
    return why_not_plain(query, key)


def _full(query: torch.Tensor, mask: Mask) -> torch.Tensor | None:
    """The (B, 1, T, T) mask that says the same; None where SDPA's own causal flag does."""
    if mask.kind == "plain":
        return None
    keys = torch.arange(query.shape[2], device=query.device)
    seen = (keys <= keys[:, None])[None]
    if mask.positions is not None:
        seen = seen & (keys >= keys[:, None] - mask.positions[:, :, None])
    if mask.padding is not None:
        seen = seen & mask.padding[:, None]
    return seen[:, None]
