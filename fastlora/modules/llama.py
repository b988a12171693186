"""transformers' Llama modules with another forward: no new parameters, no ``__init__``, the same results.

Each forward decides from the module's state now, so adapters may be added, switched, disabled or merged at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama as hf

from ..ops import linear_cross_entropy, rms_norm, swiglu
from ..planning.activations import Adapters
from . import attention, lora, memory, trust
from ._fused import Fused, Part, why_not_called, why_not_plain
from .traced_logits import lazy_logits


class LlamaRMSNorm(Fused, hf.LlamaRMSNorm):
    def parts(self) -> list[Part]:
        why = trust.why_not("norm") or why_not_plain(self.weight)
        return [Part("", "transformers LlamaRMSNorm" if why else "fastlora rms_norm", why)]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        why = trust.why_not("norm") or why_not_plain(hidden_states, self.weight)
        if why is None and self.weight.dtype not in (hidden_states.dtype, torch.float32):
            why = f"mixed dtypes: x {hidden_states.dtype}, weight {self.weight.dtype}".replace("torch.", "")
        self.count("", why)
        if why:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_MLP = ("gate_proj", "up_proj", "down_proj")


class LlamaMLP(Fused, hf.LlamaMLP):
    def _why_not_swiglu(self) -> str | None:
        if "swiglu" not in self._fastlora.ops:
            return "swiglu is not among the chosen ops"
        if type(self.act_fn) not in (nn.SiLU, trust.SILU):
            return f"act_fn is a {type(self.act_fn).__name__}, not SiLU"
        return trust.why_not("silu") or why_not_called(self.act_fn)

    def parts(self) -> list[Part]:
        whole = trust.why_not("mlp")
        why = whole or self._why_not_swiglu()
        activation = "transformers act_fn(gate) · up" if why else "fastlora swiglu"
        return [Part("", activation, why), *(lora.part(self, name, whole) for name in _OF_MLP)]

    @trust.once
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if why := trust.why_not("mlp"):
            for part in ("", *_OF_MLP):
                self.count(part, why)
            return super().forward(x)
        return self._run(x, None)

    def normed(self, x: torch.Tensor, norm: LlamaRMSNorm) -> torch.Tensor:
        """``x + self(norm(x))`` in one operator."""
        return self._run(x, norm)

    def _run(self, x: torch.Tensor, norm: LlamaRMSNorm | None) -> torch.Tensor:
        why = self._why_not_swiglu()
        if why is None and (out := lora.mlp(self, x, norm)) is not None:
            return out
        gate, up, *carried = lora.group(self, ("gate_proj", "up_proj"), x, norm=norm)
        why = why or why_not_plain(gate, up)
        self.count("", why)
        h = self.act_fn(gate) * up if why else swiglu(gate, up)
        return lora.group(self, ("down_proj",), h, residual=carried[0] if carried else None)[0]


class LlamaAttention(Fused, hf.LlamaAttention):
    def _attends(self) -> bool:
        """Whether it chooses the attention: where the user's choice is SDPA, transformers' default."""
        return "flash_attention" in self._fastlora.ops and self.config._attn_implementation == attention.SDPA

    def _why_not_rope(self) -> str | None:
        return trust.why_not("rope") if "rope" in self._fastlora.ops else "rope is not among the chosen ops"

    def parts(self) -> list[Part]:
        whole = trust.why_not("attention")
        rotation, kernel = "fastlora rope", f"transformers {self.config._attn_implementation}"
        why_not_rope = whole or (self._why_not_rope() if "rope" in self._fastlora.ops else None)
        if why_not_rope or "rope" not in self._fastlora.ops:
            rotation = "transformers rope"
        why = (whole or attention.why_not(self)) if self._attends() else None
        if self._attends() and not why:
            kernel = attention.describe(self.q_proj.weight.device, self.q_proj.weight.dtype)
        projections = (lora.part(self, name, whole) for name in _OF_ATTENTION)
        return [Part("", rotation, why_not_rope), Part("attention", kernel, why), *projections]

    @trust.once
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        if why := trust.why_not("attention"):
            for part in ("", "attention", *_OF_ATTENTION):
                self.count(part, why)
            return super().forward(hidden_states, *args, **kwargs)
        arguments = dict(zip(trust.ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        out, weights, _ = self._attend(hidden_states, None, **arguments)
        return lora.group(self, ("o_proj",), out)[0], weights

    def normed(self, x: torch.Tensor, norm: LlamaRMSNorm, **kwargs: Any) -> torch.Tensor:
        """``x + self(norm(x))`` in two operators around the attention."""
        out, _, x = self._attend(x, norm, **kwargs)
        return lora.group(self, ("o_proj",), out, residual=x)[0]

    def _attend(
        self,
        x: torch.Tensor,
        norm: LlamaRMSNorm | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        fastlora_mask: attention.Mask | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What the heads attend to, their weights where the implementation gives them, and x as it goes on.

        kwargs: the cache, and all that transformers' own forward would pass on to the attention.
        """
        batch, tokens = x.shape[:-1]
        cos, sin = position_embeddings
        caches = [kwargs.pop(name, None) for name in trust.CACHE_NAMES]
        cache = next((cache for cache in caches if cache is not None), None)
        why = self._why_not_rope() or why_not_plain(cos, sin, x)
        self.count("", why)
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v, *carried = lora.group(self, names, x, norm=norm, rotary=None if why else (cos, sin))
        q, k, v = (projected.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for projected in (q, k, v))
        if why:
            q, k = hf.apply_rotary_pos_emb(q, k, cos, sin)
        mask, decoding = fastlora_mask, cache is not None and not self.training
        if cache is not None:
            k, v = self._cached(cache, k, v, cos, sin, kwargs)
            mask = mask and mask.over_cache()
        if "cache_position" in trust.ATTENTION_ARGUMENTS:  # where it is for the cache, and goes no further
            kwargs.pop("cache_position", None)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if self._attends():
            out, weights = attention.attend(self, q, k, v, attention_mask, mask, decoding, **kwargs)
        else:
            out, weights = attention.transformers_attention(self, q, k, v, attention_mask, **kwargs)
        return out.reshape(batch, tokens, -1).contiguous(), weights, carried[0] if carried else x

    def _cached(self, cache: Any, k: torch.Tensor, v: torch.Tensor, cos: Any, sin: Any, kwargs: dict[str, Any]) -> Any:
        """The keys and values so far, in the words that each transformers has for it."""
        if trust.CACHE == "cache":
            return cache.update(k, v, self.layer_idx, kwargs=kwargs)
        if "cache_position" in trust.ATTENTION_ARGUMENTS:
            tables = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            return cache.update(k, v, self.layer_idx, tables)
        return cache.update(k, v, self.layer_idx)


class LlamaDecoderLayer(Fused, hf.LlamaDecoderLayer):
    self_attn: Any
    mlp: Any

    def _why_not(self) -> str | None:
        if why := trust.why_not("layer", "norm", "attention", "mlp"):
            return why
        for child in (self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp):
            if not isinstance(child, Fused):
                return f"its {type(child).__name__} is not fused"
            if why := why_not_called(child):
                return why
        return why_not_plain(self.input_layernorm.weight, self.post_attention_layernorm.weight)

    def adapters(self) -> Adapters | None:
        """The adapters of this layer's projections; None where not all of it runs fused."""
        if self._why_not() or self.mlp._why_not_swiglu():
            return None
        attends, mlp = lora.adapters(self.self_attn, _OF_ATTENTION), lora.adapters(self.mlp, _OF_MLP)
        if attends is None or mlp is None:
            return None
        both = [*attends, *mlp]
        return Adapters(tuple((name, rank) for name, rank, _ in both if rank), max(rate for _, _, rate in both))

    def state(self) -> Any:
        """What a second forward of this layer depends on, beside weights and arguments."""
        return lora.state(self)

    def parts(self) -> list[Part]:
        why = self._why_not()
        parts = [Part("", "transformers, module by module" if why else "fastlora norm + projections + residual", why)]
        policy = self._fastlora.memory.last(self)
        if policy and policy != memory.KEEP:
            parts.append(Part("memory", memory.WORDS[policy], None))
        return parts

    @trust.once
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        why = "arguments by position" if args else self._why_not() or why_not_plain(hidden_states)
        norms = (self.input_layernorm, self.post_attention_layernorm)
        if why is None and any(norm.weight.dtype not in (hidden_states.dtype, torch.float32) for norm in norms):
            why = "mixed dtypes of x and the norms"
        self.count("", why)
        policy = self._fastlora.memory.policy(self, hidden_states)
        if policy != memory.KEEP:
            cached = [cache for name in trust.CACHE_NAMES if (cache := kwargs.get(name)) is not None]
            once = lora.why_only_once(self)
            if any(cache.get_seq_length() for cache in cached):
                once = "a cache with tokens in it: nothing is recomputed"
            self.count("memory", once)
            policy = memory.KEEP if once else policy
        if policy == memory.MLP and why is None:
            x = self.self_attn.normed(hidden_states, self.input_layernorm, **kwargs)
            return memory.checkpoint(self, self.mlp.normed, x, self.post_attention_layernorm)
        if policy == memory.KEEP:
            return self._layer(why, hidden_states, *args, **kwargs)
        if cached and (mask := kwargs.get("fastlora_mask")):
            kwargs["fastlora_mask"] = mask.over_cache()
        # As under transformers' own checkpointing: the second forward would write to the cache again.
        kwargs = {name: None if name in trust.CACHE_NAMES else value for name, value in kwargs.items()}
        return memory.checkpoint(self, self._layer, why, hidden_states, *args, **kwargs)

    def _layer(self, why: str | None, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if why:
            return super().forward(hidden_states, *args, **kwargs)
        # With the defaults of transformers' layer, which it passes on.
        kwargs = {"position_ids": None, "use_cache": False, **kwargs}
        x = self.self_attn.normed(hidden_states, self.input_layernorm, **kwargs)
        return self.mlp.normed(x, self.post_attention_layernorm)


class LlamaModel(Fused, hf.LlamaModel):
    def parts(self) -> list[Part]:
        why = trust.why_not("model")
        return [Part("", "transformers LlamaModel", why)] if why else []

    @trust.once
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if trust.why_not("model"):
            return super().forward(*args, **kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and not embeds.requires_grad and self.training and torch.is_grad_enabled():
            # The first norm keeps them for backward, and the caller may fill the same buffer again before that.
            kwargs["inputs_embeds"] = embeds.clone()
        return super().forward(*args, **kwargs | attention.mask_arguments(self, args, kwargs))


class LlamaForCausalLM(Fused, hf.LlamaForCausalLM):
    def _why_not_head(self) -> str | None:
        if getattr(self, "_is_replica", False):
            return "inside DataParallel, which gathers tensors only"
        if "forward" in self.__dict__:
            # Of the function itself: functools.wraps makes a wrapper claim the module of what it wraps.
            function = getattr(self.forward, "__func__", self.forward)
            owner = getattr(function, "__globals__", {}).get("__name__", "the caller")
            return f"the model's forward was replaced on the instance (by {owner}), which calls ours or not"
        if type(self.lm_head) is not nn.Linear:
            return f"lm_head is a {type(self.lm_head).__name__}"
        if self.lm_head.bias is not None:
            return "lm_head has a bias"
        if self.lm_head.out_features != self.config.vocab_size:
            return f"lm_head gives {self.lm_head.out_features} logits, config.vocab_size is {self.config.vocab_size}"
        if self.loss_function is not ForCausalLMLoss:
            return "the model has a loss function of its own"
        why = trust.why_not("head", "projection") or why_not_called(self.lm_head)
        return why or why_not_plain(self.lm_head.weight)

    def parts(self) -> list[Part]:
        why = self._why_not_head()
        return [Part("", "transformers loss" if why else "fastlora linear_cross_entropy (training, with labels)", why)]

    @trust.once
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Fused):  # accelerate may keep this forward, wrapped, on the instance after unpatch
            return hf.LlamaForCausalLM.forward(self, *args, **kwargs)
        labels = kwargs.get("labels")
        ignore_index = kwargs.get("ignore_index", -100)
        self._fastlora.memory.fused_loss = False
        if labels is None or not self.training or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        if why := self._why_not_loss(kwargs):
            self.count("", why)
            return super().forward(*args, **kwargs)
        self._fastlora.memory.fused_loss = True
        kwargs.pop("labels")
        kwargs.pop("logits_to_keep", None)
        outputs = self.model(*args, **kwargs)
        hidden = outputs.last_hidden_state
        weight = self.lm_head.weight
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"lm_head: hidden states are {hidden.dtype} and its weight is {weight.dtype}")
        self.count("")
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = linear_cross_entropy(
            hidden,
            weight,
            shifted.to(hidden.device),
            ignore_index=ignore_index,
            num_items=_on(hidden.device, kwargs.get("num_items_in_batch")),
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=lazy_logits(self.lm_head, hidden),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{trust.CACHE: outputs.get(trust.CACHE)},
        )

    def _why_not_loss(self, kwargs: dict[str, Any]) -> str | None:
        if kwargs.get("return_dict", getattr(self.config, "return_dict", True)) is False:
            return "return_dict=False"
        keep = kwargs.get("logits_to_keep", 0)
        if isinstance(keep, torch.Tensor) or keep != 0:
            return "logits_to_keep"
        if why := why_not_plain(kwargs.get("inputs_embeds")):
            return why
        items = kwargs.get("num_items_in_batch")
        if isinstance(items, torch.Tensor) and items.numel() != 1:
            return f"num_items_in_batch has {items.numel()} elements"
        return self._why_not_head()


def _on(device: torch.device, items: Any) -> Any:
    return items.to(device) if isinstance(items, torch.Tensor) else items
