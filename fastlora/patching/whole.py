"""The whole model on a few tokens: what it generates, its logits over a cache and without, and read twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, GenerationConfig

from ..budget import Budget, Figures, OverBudget
from ..modules.quantised import is_4bit
from ..modules.trust import CACHE
from .exact import InFloat64, exact
from .verification import AGAIN, CACHED, TRAINING, UNCACHED, UNFUSED, WHOLE, Check

# Over budget on one draw may be bad luck; over budget on the average of this many, by more than the luck of the
# original, is not.
DRAWS = 16
# Prompts, tokens of the longest one, and tokens to generate.
ROWS, PROMPT, NEW = 4, 8, 8


class Seen(NamedTuple):
    """What entered every layer (its x, its other arguments) and the final norm in one forward, and its loss."""

    layers: list[tuple[torch.Tensor, dict[str, Any]]]
    last: torch.Tensor
    loss: Any


def record(causal: Any, **inputs: Any) -> Seen:
    """Run the model, without a cache, and note what enters its layers."""
    seen: dict[nn.Module, tuple[torch.Tensor, dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, *rest = args if args else (kwargs.pop("hidden_states"),)
        names = ("attention_mask", "position_ids")  # as transformers orders them, should it ever pass them so
        kwargs = {**kwargs, **dict(zip(names, rest, strict=False))}
        # Run alone and several times, a layer must not add to a cache.
        kwargs |= {name: None for name in kwargs if name in ("past_key_value", "past_key_values", "cache")}
        seen[module] = x.detach(), kwargs

    inner = causal.model
    with ExitStack() as stack:
        for module in (*inner.layers, inner.norm):
            stack.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        loss = causal(**{**inputs, "use_cache": False}).loss
    return Seen([seen[layer] for layer in inner.layers], seen[inner.norm][0], None if loss is None else loss.detach())


@contextmanager
def called(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """The set of those of the modules that are called meanwhile."""
    names: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(lambda module, args: names.add(module)))
        yield names


def evaluating(causal: Any) -> Any:
    """The model in inference, but for its 4-bit layers: bitsandbytes repacks their weights for good in one on a CPU."""
    causal.eval()
    for module in causal.modules():
        if is_4bit(module):
            module.train()
    return causal


def unsaved() -> AbstractContextManager[Any]:
    """A forward as training runs it, of which nothing is kept: there will be no backward."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def why_not_generate(model: nn.Module, causal: Any) -> str | None:
    """Why the greedy tokens of a model are not checked; None where they are."""
    can_generate = getattr(causal, "can_generate", lambda: False)
    if not (hasattr(causal, "generate") and can_generate()):
        return f"{type(causal).__name__} does not generate"
    attention = (getattr(layer.self_attn, "is_causal", True) for layer in causal.model.layers)
    if not (getattr(causal.config, "is_causal", True) and all(attention)):
        return "its attention is not causal, and what no token but the last may see has no use for a cache"
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, Mapping) else ():
            if getattr(config, "is_prompt_learning", False):
                return f"{type(config).__name__} writes to the cache before the prompt"
    return None


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer for its float64 copy."""
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, kwargs)


def yardstick(x: torch.Tensor, module: nn.Module) -> Any:
    """What the original runs under: as it is, or, where fp32 adapters stand over 16-bit weights, autocast."""
    device = x.device.type
    dtypes: list[Any] = [p.dtype for p in module.parameters()]
    dtypes += [getattr(m, "compute_dtype", None) for m in module.modules()]
    narrow = [dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)]
    wide = any(p.dtype == torch.float32 and "lora_" in name for name, p in module.named_parameters())
    if torch.is_autocast_enabled(device) or not (narrow and wide):
        return torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
    return torch.autocast(device, narrow[0])


@torch.no_grad()
def _exact_logits(causal: Any, runs: list[Seen]) -> list[torch.Tensor]:
    """The logits of recorded forwards in float64, (B, T, V) each: one layer at a time is there in float64."""
    xs = [seen.layers[0][0].double() for seen in runs]
    head = nn.ModuleDict({"norm": causal.model.norm, "lm_head": causal.lm_head})
    for i, layer in enumerate(causal.model.layers):
        x, _ = runs[0].layers[i]
        precise = exact(layer, x.dtype)  # outside of InFloat64, in which no 4-bit weight can be read
        with InFloat64(), torch.autocast(x.device.type, enabled=False):
            outs = [precise(y.to(x.device), **doubled(seen.layers[i][1])) for y, seen in zip(xs, runs, strict=True)]
        xs = [out[0] if isinstance(out, tuple) else out for out in outs]
    last = runs[0].last
    precise = exact(head, last.dtype)
    with InFloat64(), torch.autocast(last.device.type, enabled=False):
        return [precise["lm_head"](precise["norm"](x.to(last.device))) for x in xs]


class Sample:
    """A few tokens of a batch, through the whole model: fused, unfused, and in float64.

    The prompts are the first tokens of the first rows. Every other one is cut to half its length, and so padded on the
    left; of a single row there are two prompts. They are continued with their fused greedy tokens, and all forms of
    the model are run over these same sequences.

    Logits, of every token that is not padding, are in the budget: of a training step, read under no_grad; of another
    one, read so and then again, with a gradient; in inference without a cache; and over a cache, the prompt at once
    and then token by token. What exceeds it is run again on tokens of the batch in random order, and the averages are
    judged.

    Of a token that ``generate`` chose, the float64 logit, given the tokens before it, may be below the largest one by
    twice what a logit may err (the budget in the maximum): either of the two may have erred. The tokens generated
    without a cache are judged up to the first that differs, where the tokens before it are still the same.

    Args:
        unfused, fused: put the model into this form.
        generates: whether greedy tokens, and logits over a cache, are judged.
    """

    def __init__(self, causal: Any, batch: Mapping[str, Any], unfused: Any, fused: Any, generates: bool) -> None:
        self.causal, self.unfused, self.fused, self.generates = causal, unfused, fused, generates
        self.checks: list[Check] = []
        self.tokens: dict[str, list[list[int]]] = {}
        self.skipped: list[str] = []
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        real = mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else torch.ones_like(ids) > 0
        rows = [row[seen] for row, seen in zip(ids, real, strict=True) if seen.any()]
        self.pool = torch.cat(rows)
        heads = [row[:PROMPT] for row in (rows * 2 if len(rows) == 1 else rows)[:ROWS]]
        heads = [head[: (len(head) + 1) // 2] if i % 2 else head for i, head in enumerate(heads)]
        self.width = max(map(len, heads))
        self.prompts = ids.new_zeros(len(heads), self.width)
        self.mask = ids.new_zeros(len(heads), self.width + NEW)
        for i, head in enumerate(heads):
            self.prompts[i, self.width - len(head) :] = head
            self.mask[i, self.width - len(head) :] = 1
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def judge(self) -> None:
        """Fill checks, tokens and skipped."""
        generated = self._generated() if self.generates else {}
        following = generated.get(CACHED, generated.get(UNFUSED))
        ids = self._random()
        ids[:, : self.width] = self.prompts
        if following is not None:
            ids[:, self.width :] = following
        names = [TRAINING, AGAIN, f"logits {UNCACHED}"]
        names += [f"logits {CACHED}"] if self.generates else []
        budgets, wrong = {name: Budget(name, luck=True) for name in names}, dict[str, str]()
        (truth,) = self._add(budgets, wrong, [ids])
        allowed = {name: budget.figures() for name, budget in budgets.items()}
        over = {name: budget for name, budget in budgets.items() if name not in wrong and budget.excess()}
        if over:
            self._add(over, wrong, [self._random() for _ in range(DRAWS - 1)])
        checks = [Check(WHOLE, name, budget.figures(), wrong.get(name)) for name, budget in budgets.items()]
        for how in (CACHED, UNCACHED):
            if how in generated and allowed[f"logits {how}"]:
                lost = _lost(generated[how], following, truth[:, self.width - 1 : -1])
                _, one = allowed[f"logits {how}"]
                gap = Figures("gap", lost, 2 * one.eager, 2 * one.rounding)
                checks.append(Check(WHOLE, f"greedy tokens {how}", (gap,)))
        self.checks = [*checks, *self.checks]
        self.tokens = {how: tokens.tolist() for how, tokens in generated.items()}

    def _random(self) -> torch.Tensor:
        """Tokens of the batch, in the form of the sample."""
        return self.pool[torch.randint(len(self.pool), self.mask.shape).to(self.pool.device)]

    def _add(self, budgets: dict[str, Budget], wrong: dict[str, str], draws: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run all that has a budget on every draw; the float64 logits."""
        given = {"attention_mask": self.mask, "position_ids": self.positions}
        self.unfused()
        with torch.no_grad():
            truths = _exact_logits(
                self.causal, [record(evaluating(self.causal), input_ids=ids, **given) for ids in draws]
            )
        real = self.mask.bool()
        for ids, truth in zip(draws, truths, strict=True):
            for name, budget in budgets.items():
                if name in wrong:
                    continue
                self.unfused()
                with yardstick(truth, self.causal):
                    eager = self._logits(name, ids)
                self.fused()
                try:
                    budget.add(self._logits(name, ids)[real], eager[real], truth[real])
                except OverBudget as error:
                    wrong[name] = str(error).removeprefix(f"{name}: ")
                except Exception as error:  # what the original does, and the fused form cannot
                    wrong[name] = _words(error)
        return truths

    def _logits(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The logits (B, T, V) that a quantity is about, in the form that the model is in."""
        given = {"attention_mask": self.mask, "position_ids": self.positions}
        if name in (f"logits {CACHED}", f"logits {UNCACHED}"):
            with torch.no_grad():
                evaluating(self.causal)
                if name == f"logits {UNCACHED}":
                    return self.causal(input_ids=ids, **given, use_cache=False).logits
                return self._over_cache(ids)
        labels = ids.masked_fill(self.mask == 0, -100)
        with torch.enable_grad(), unsaved():
            outputs = self.causal.train()(input_ids=ids, labels=labels, **given, use_cache=False)
            with torch.no_grad():
                logits = outputs.logits[...]
            if name == AGAIN:
                logits = outputs.logits[...]
                if outputs.loss.requires_grad and not logits.requires_grad:
                    raise RuntimeError("outputs.logits, read once under no_grad, have no gradient when read again")
            return logits.detach()

    def _over_cache(self, ids: torch.Tensor) -> torch.Tensor:
        cache, logits, begin = DynamicCache(), [], 0
        for end in range(self.width, ids.shape[1] + 1):
            now = slice(begin, end)
            given = {"attention_mask": self.mask[:, :end], "position_ids": self.positions[:, now], CACHE: cache}
            logits.append(self.causal(input_ids=ids[:, now], **given, use_cache=True).logits)
            begin = end
        return torch.cat(logits, 1)

    def _generated(self) -> dict[str, torch.Tensor]:
        """The greedy tokens of the prompts, (B, NEW): unfused, and fused over a cache and without one."""
        found: dict[str, torch.Tensor] = {}
        for how, form, context in (
            (UNFUSED, self.unfused, yardstick(self.prompts, self.causal)),
            (CACHED, self.fused, nullcontext()),
            (UNCACHED, self.fused, nullcontext()),
        ):
            form()
            try:
                with context:
                    found[how] = self._greedy(how != UNCACHED)
            except Exception as error:  # whatever it is: verify judges the fused form, and not generate
                if how == UNFUSED:
                    self.generates = False
                    self.skipped.append(f"greedy tokens: the original cannot generate them ({_words(error)})")
                    return {}
                self.checks.append(Check(WHOLE, f"greedy tokens {how}", (), _words(error)))
        return found

    def _greedy(self, use_cache: bool) -> torch.Tensor:
        """Without what the model's own generation_config asks for: penalties, and an end."""
        own = self.causal.generation_config
        wanted = GenerationConfig(do_sample=False, max_new_tokens=NEW, use_cache=use_cache)
        self.causal.generation_config = GenerationConfig()
        try:
            mask = self.mask[:, : self.width]
            out = evaluating(self.causal).generate(self.prompts, attention_mask=mask, generation_config=wanted)
        finally:
            self.causal.generation_config = own
        return out[:, self.width :]


def _lost(tokens: torch.Tensor, following: Any, truth: torch.Tensor) -> float:
    """By how much the worst of the tokens, up to the first in its row that differs, has a logit below the best."""
    lost = truth.amax(-1) - truth.gather(-1, tokens[..., None].to(truth.device))[..., 0]
    differs = (tokens != following).long()
    judged = differs.cumsum(-1) - differs == 0
    return lost.masked_fill(~judged.to(lost.device), 0).max().item()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
