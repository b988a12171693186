"""transformers' Llama modules with another forward: no new parameters, no ``__init__``, the same results.

Each forward decides from the module's state now, so adapters may be added, switched, disabled or merged at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama as hf

from ..ops import linear_cross_entropy, rms_norm, swiglu
from ..planning.activations import Adapters
from . import attention, lora, memory
from ._fused import Fused, Part, why_not_called, why_not_plain
from .traced_logits import lazy_logits

_SILU = type(ACT2FN["silu"])


class LlamaRMSNorm(Fused, hf.LlamaRMSNorm):
    def parts(self) -> list[Part]:
        return [Part("", "fastlora rms_norm", why_not_plain(self.weight))]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        why = why_not_plain(hidden_states, self.weight)
        if why is None and self.weight.dtype not in (hidden_states.dtype, torch.float32):
            why = f"mixed dtypes: x {hidden_states.dtype}, weight {self.weight.dtype}".replace("torch.", "")
        self.count("", why)
        if why:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LlamaMLP(Fused, hf.LlamaMLP):
    def _why_not_swiglu(self) -> str | None:
        if "swiglu" not in self._fastlora.ops:
            return "swiglu is not among the chosen ops"
        if type(self.act_fn) not in (nn.SiLU, _SILU):
            return f"act_fn is a {type(self.act_fn).__name__}, not SiLU"
        return why_not_called(self.act_fn)

    def parts(self) -> list[Part]:
        why = self._why_not_swiglu()
        activation = "transformers act_fn(gate) · up" if why else "fastlora swiglu"
        return [Part("", activation, why), *(lora.part(self, n) for n in ("gate_proj", "up_proj", "down_proj"))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def parts(self) -> list[Part]:
        rotation = "fastlora rope" if "rope" in self._fastlora.ops else "transformers rope"
        kernel = f"transformers {self.config._attn_implementation}"
        if self._attends():
            kernel = attention.describe(self.q_proj.weight.device, self.q_proj.weight.dtype)
        projections = (lora.part(self, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
        return [Part("", rotation, None), Part("attention", kernel, None), *projections]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        out, weights, _ = self._attend(hidden_states, None, *args, **kwargs)
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
        past_key_values: Any = None,
        fastlora_mask: attention.Mask | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What the heads attend to, their weights where the implementation gives them, and x as it goes on."""
        batch, tokens = x.shape[:-1]
        cos, sin = position_embeddings
        why = why_not_plain(cos, sin) if "rope" in self._fastlora.ops else "rope is not among the chosen ops"
        self.count("", why)
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v, *carried = lora.group(self, names, x, norm=norm, rotary=None if why else (cos, sin))
        q, k, v = (one.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for one in (q, k, v))
        if why:
            q, k = hf.apply_rotary_pos_emb(q, k, cos, sin)
        mask, decoding = fastlora_mask, past_key_values is not None and not self.training
        if past_key_values is not None:
            # transformers 4 caches may read the tables; transformers 5 ignores the argument.
            tables = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            k, v = past_key_values.update(k, v, self.layer_idx, tables)
            # As transformers: position_ids tell packed sequences apart only where there is no cache.
            kwargs["position_ids"] = None
            mask = mask and mask.over_cache()
        dropout: Any = self.attention_dropout if self.training else 0.0
        if self._attends():
            out, weights = attention.attend(self, q, k, v, attention_mask, mask, decoding, self.scaling, dropout)
        else:
            name = self.config._attn_implementation
            attend = hf.eager_attention_forward if name == "eager" else hf.ALL_ATTENTION_FUNCTIONS[name]
            out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return out.reshape(batch, tokens, -1).contiguous(), weights, carried[0] if carried else x


class LlamaDecoderLayer(Fused, hf.LlamaDecoderLayer):
    self_attn: Any
    mlp: Any

    def _why_not(self) -> str | None:
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
        attends = lora.adapters(self.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj"))
        mlp = lora.adapters(self.mlp, ("gate_proj", "up_proj", "down_proj"))
        if attends is None or mlp is None:
            return None
        both = [*attends, *mlp]
        return Adapters(tuple((name, rank) for name, rank, _ in both if rank), max(rate for _, _, rate in both))

    def parts(self) -> list[Part]:
        why = self._why_not()
        parts = [Part("", "transformers, module by module" if why else "fastlora norm + projections + residual", why)]
        policy = self._fastlora.memory.last(self)
        if policy and policy != memory.KEEP:
            parts.append(Part("memory", memory.WORDS[policy], None))
        return parts

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        why = "arguments by position" if args else self._why_not() or why_not_plain(hidden_states)
        norms = (self.input_layernorm, self.post_attention_layernorm)
        if why is None and any(norm.weight.dtype not in (hidden_states.dtype, torch.float32) for norm in norms):
            why = "mixed dtypes of x and the norms"
        self.count("", why)
        policy = self._fastlora.memory.policy(self, hidden_states)
        if policy != memory.KEEP:
            self.count("memory")
        if policy == memory.MLP and why is None:
            x = self.self_attn.normed(hidden_states, self.input_layernorm, **kwargs)
            return memory.checkpoint(self.mlp.normed, x, self.post_attention_layernorm)
        if policy == memory.KEEP:
            return self._layer(why, hidden_states, *args, **kwargs)
        if kwargs.get("past_key_values") is not None and (mask := kwargs.get("fastlora_mask")):
            kwargs["fastlora_mask"] = mask.over_cache()
        # As under transformers' own checkpointing: the second forward would write to the cache again.
        kwargs["past_key_values"] = None
        return memory.checkpoint(self._layer, why, hidden_states, *args, **kwargs)

    def _layer(self, why: str | None, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if why:
            return super().forward(hidden_states, *args, **kwargs)
        x = self.self_attn.normed(hidden_states, self.input_layernorm, **kwargs)
        return self.mlp.normed(x, self.post_attention_layernorm)


class LlamaModel(Fused, hf.LlamaModel):
    def parts(self) -> list[Part]:
        return []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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
        if self.loss_function is not ForCausalLMLoss:
            return "the model has a loss function of its own"
        return why_not_called(self.lm_head) or why_not_plain(self.lm_head.weight)

    def parts(self) -> list[Part]:
        why = self._why_not_head()
        return [Part("", "transformers loss" if why else "fastlora linear_cross_entropy (training, with labels)", why)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Fused):  # accelerate may keep this forward, wrapped, on the instance after unpatch
            return hf.LlamaForCausalLM.forward(self, *args, **kwargs)
        labels = kwargs.get("labels")
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
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        loss = linear_cross_entropy(
            hidden,
            weight,
            shifted.to(hidden.device),
            ignore_index=kwargs.get("ignore_index", -100),
            num_items=_on(hidden.device, kwargs.get("num_items_in_batch")),
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=lazy_logits(self.lm_head, hidden),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _why_not_loss(self, kwargs: dict[str, Any]) -> str | None:
        if kwargs.get("return_dict", getattr(self.config, "return_dict", True)) is False:
            return "return_dict=False"
        keep = kwargs.get("logits_to_keep", 0)
        if isinstance(keep, torch.Tensor) or keep != 0:
            return "logits_to_keep"
        return self._why_not_head()


def _on(device: torch.device, items: Any) -> Any:
    return items.to(device) if isinstance(items, torch.Tensor) else items
