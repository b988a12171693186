"""verify: a model and a batch of the user's, fused and unfused, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as hf

from ..budget import Budget, OverBudget
from ..modules._fused import Fused, State, original_class
from ..modules.memory import Memory
from . import engine
from .exact import InFloat64, exact
from .plan import Row
from .verification import RUNS, Check, Verification
from .whole import DRAWS, Sample, Seen, called, doubled, record, unsaved, why_not_generate, yardstick

# What a check sets for its time and puts back: modes, dropout, and what bitsandbytes settles at its first forward.
_FLAGS = ("training", "p", "attention_dropout", "gradient_checkpointing", "compute_dtype", "compute_type_is_set")

Run = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    ops: Iterable[str] | None = None,
    strict: bool = False,
    memory: str | int = "fast",
) -> Verification:
    """Hold the fused form of a model, on a batch of its own data, against float64. ``print`` what it returns.

    One forward of the original model records what enters each decoder layer and the head (final norm, lm_head and
    loss). Then, from the head down, each is run alone three times from the same recorded input and the same incoming
    gradient: fused; by the original forwards; and by the original forwards in float64, a 4-bit weight being the dense
    weight that it stands for. Compared are its output, the gradient of its input, and the gradient of each of its
    parameters that trains. Within the budget is an error of at most 1.1 times the original's plus one rounding,
    in the root mean square and in the maximum. What exceeds it is run again, up to 16 times, on the recorded input
    moved by less than a 32nd and on the incoming gradient with random signs, and the averages are judged; the budget is
    then wider by the original's own luck, its largest error on one of these runs over its average one. An incoming
    gradient is what the original layers above gave: no error is carried from one layer to another.

    What no layer knows is asked of the whole model. In the forward of a training step, every module that runs and that
    ``explain`` calls fused must count a fused call. The losses of that step are shown, not judged: of a single number,
    one draw is luck. Then a sample: up to four prompts of up to eight tokens of the batch, every other one padded on
    the left, and the eight greedy tokens that the fused model continues each with. Over these same tokens its logits
    are in the same budget against float64: in a training step (read under no_grad, then again, with a gradient),
    without a cache, and over one, token by token. A greedy token, with a cache or without, is right if its float64
    logit is below the best by no more than twice what a logit may err: where two are nearer than rounding, either
    token is. What cannot generate (attention that is not causal, prompt learning) skips that, and ``skipped`` says
    so. The model's own generation_config, and use_cache=False in its config, are not heeded.

    Beside the model, a check needs one layer at a time, or the head, in float64, and the inputs of all layers. Where
    adapters are fp32 over 16-bit weights and autocast is off, the yardstick is the
    original under autocast, as docs/numerics.md has it. Dropout rates are 0 for the check, attention's included, and
    gradient checkpointing is off. Call it in the autocast region that the model trains in, if any.

    The model is left as it was: patched or not, mode, gradients, counters, random numbers, generation_config.

    Args:
        model: holds a LlamaForCausalLM, patched or not (then it is patched for the check); before it is sharded.
        batch: what the model is trained on, with input_ids and labels.
        ops, strict, memory: of ``patch``, for a model that is not patched. One that is keeps its own.

    Returns:
        A Verification: ``within`` says whether all is within the budget, ``exceeded`` what is not, worst first.

    Raises:
        TypeError, ValueError: no LlamaForCausalLM, no labels, an attention_mask that hides all, parameters that are
        sharded, an attention implementation or a quantised base that has no float64 form, options of ``patch`` for a
        patched model.
        NotFused: with strict=True.
    """
    engine._check_model(model)
    causal = _find(model)
    _check_batch(batch)
    for name, parameter in causal.named_parameters():
        if type(parameter) is not nn.Parameter and type(parameter).__name__ not in ("Params4bit", "Int8Params"):
            raise ValueError(f"verify: {name} is a {type(parameter).__name__}; verify the model before it is sharded")
    device = causal.lm_head.weight.device if hasattr(causal.lm_head, "weight") else next(causal.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    options = {"ops": ops, "strict": strict, "memory": memory}
    with _undisturbed(model), _both_ways(model, options) as (unfused, fused):
        unfused()
        implementation = causal.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"verify: attention is {implementation!r}, which has no float64 form; needs 'sdpa' or 'eager', as"
                " model.set_attn_implementation('sdpa')"
            )
        return _Check(model, causal, batch, unfused, fused).run()


def _find(model: nn.Module) -> Any:
    found = [module for module in model.modules() if isinstance(module, hf.LlamaForCausalLM)]
    if len(found) != 1:
        raise ValueError(f"verify: model has {len(found)} LlamaForCausalLM within, needs one")
    return found[0]


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"verify: batch is a {type(batch).__name__}, needs a mapping with input_ids and labels")
    if absent := {"input_ids", "labels"} - set(batch):
        raise ValueError(f"verify: batch has {sorted(batch)}, needs {' and '.join(sorted(absent))} too")
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and not mask.any():
        raise ValueError("verify: batch has an attention_mask of zeros alone, needs a token that is no padding")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Training mode without dropout and checkpointing; modes, rates and random numbers are put back."""
    before = {m: {name: vars(m)[name] for name in _FLAGS if name in vars(m)} for m in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            model.train()
            for module, flags in before.items():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for name, off in (("attention_dropout", 0.0), ("gradient_checkpointing", False)):
                    if name in flags:
                        setattr(module, name, off)
            yield
        finally:
            for module, flags in before.items():
                vars(module).update(flags)


@contextmanager
def _both_ways(model: nn.Module, options: dict[str, Any]) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Two functions that give the model its original forwards and its fused ones, with counters of their own."""
    before = engine._states(model)
    plain: dict[nn.Module, Any] = {module: (original_class(module), None) for module in before}
    patched = any(issubclass(cls, Fused) for cls, _ in before.values())
    if patched and options != {"ops": None, "strict": False, "memory": "fast"}:
        raise ValueError(f"verify: the model is patched, and keeps its own of {', '.join(options)}; unpatch it first")
    try:
        if not patched:
            engine.patch(model, **options)
        states = {module: vars(module).get("_fastlora") for module in before}
        memories = {state.memory: Memory(state.memory.wanted) for state in states.values() if state}
        fast = {
            m: (type(m), State(state.ops, memories[state.memory]) if state else None) for m, state in states.items()
        }
        yield partial(engine._restore, plain), partial(engine._restore, fast)
    finally:
        engine._restore(before)


class _Head(nn.Module):
    """Stands for LlamaModel where only what comes after the last layer is run: the norm, on a given x."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.x = norm, torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.norm(self.x))


def _head_of(causal: Any, norm: nn.Module, lm_head: nn.Module) -> Any:
    """The model without its layers: another module over the same configuration."""
    twin: Any = object.__new__(type(causal))
    vars(twin).update({name: value for name, value in vars(causal).items() if name != "forward"})
    vars(twin)["_modules"] = {**causal._modules, "model": _Head(norm), "lm_head": lm_head}
    return twin


class _Check:
    """One verification as it goes."""

    def __init__(self, model: nn.Module, causal: Any, batch: dict[str, Any], unfused: Any, fused: Any) -> None:
        self.causal, self.batch = causal, batch
        self.model, self.unfused, self.fused = model, unfused, fused
        self.names = {module: name for name, module in model.named_modules()}
        self.checks: list[Check] = []
        mask = batch.get("attention_mask")
        # What is computed for padding is nobody's business.
        self.real = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def run(self) -> Verification:
        fast, plain, fused, unfused = self._steps()
        idle = [Check(row.path, RUNS, (), "said to be fused, but did not run") for row in fused if not row.fused]
        skipped = []
        if any(getattr(module, "_compiled_call_impl", None) for module in self.names):
            fused, idle = (), []
            skipped.append("which modules ran: a compiler traces some, and their calls are not counted")
        if why_not := why_not_generate(self.model, self.causal):
            skipped.append(f"greedy tokens: {why_not}")
        sample = Sample(self.causal, self.batch, self.unfused, self.fused, not why_not)
        self._layers(fast, plain)
        sample.judge()
        return Verification(
            (*idle, *sample.checks, *self.checks),
            unfused,
            fast.loss,
            plain.loss,
            fused,
            sample.tokens,
            (*skipped, *sample.skipped),
        )

    def _steps(self) -> tuple[Seen, Seen, tuple[Row, ...], tuple[Row, ...]]:
        """The forward of a training step, fused and unfused; of what it runs, what is fused, and what is not."""
        self.unfused()
        with torch.no_grad(), called(self.names) as ran:
            plain = record(self.causal, **self.batch)
        self.fused()
        with torch.enable_grad(), unsaved():
            fast = record(self.causal, **self.batch)
        plan = engine.explain(self.model)
        paths = {self.names[module] for module in ran}
        return fast, plain, tuple(row for row in plan.rows if not row.why and row.path in paths), plan.unfused

    def _layers(self, fast: Seen, plain: Seen) -> None:
        """Judge the head, and then the layers from the last to the first."""
        last = plain.last
        labels = {name: value for name, value in self.batch.items() if name not in ("input_ids", "attention_mask")}

        def head(norm: nn.Module, lm_head: nn.Module) -> Any:
            def call(x: torch.Tensor) -> torch.Tensor:
                twin = _head_of(self.causal, norm, lm_head)
                twin.model.x = x
                return type(twin).forward(twin, **labels).loss

            return call

        norm, lm_head = self.causal.model.norm, self.causal.lm_head
        of_head = SimpleNamespace(path=self.names[self.causal], x=last, dy=torch.ones(()), real=None)
        self.unfused()
        whole = nn.ModuleDict({"norm": norm, "lm_head": lm_head})
        precise = exact(whole, last.dtype)
        calls = (head(norm, lm_head), head(norm, lm_head), head(precise["norm"], precise["lm_head"]))
        prefix = {"norm": self.names[norm], "lm_head": self.names[lm_head]}
        dy = self._compare(of_head, calls, whole, precise, prefix)
        del precise, calls
        seen = zip(self.causal.model.layers, plain.layers, fast.layers, strict=True)
        for layer, (x, kwargs), (_, fast_kwargs) in reversed(list(seen)):
            self.unfused()
            precise = exact(layer, x.dtype)
            calls = (partial(layer, **fast_kwargs), partial(layer, **kwargs), partial(precise, **doubled(kwargs)))
            at = SimpleNamespace(path=self.names[layer], x=x, dy=dy.to(x.device), real=self.real)
            dy = self._compare(at, calls, layer, precise, {"": self.names[layer]})

    def _compare(self, at: Any, calls: Any, module: nn.Module, precise: nn.Module, prefix: dict[str, str]) -> Any:
        """Judge one module; returns the original's gradient of its input."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wide = {name: p for name, p in precise.named_parameters() if name in trained}
        as_trained = yardstick(at.x, module)
        budgets: dict[str, Budget] = {}
        worse: dict[str, str] = {}
        first: Any = None
        for draw in range(DRAWS):
            x, dy = (at.x, at.dy) if draw == 0 else _another(at.x, at.dy)
            self.fused()
            ours = _run(calls[0], x, dy, trained, at.real)
            self.unfused()
            with as_trained:
                eager = _run(calls[1], x, dy, trained, at.real)
            with InFloat64(), torch.autocast(x.device.type, enabled=False):
                truth = _run(calls[2], x.double(), dy.double(), wide, at.real)
            if first is None:
                first = eager["gradient of its input"]
            for name, exact_value in truth.items():
                try:
                    budgets.setdefault(name, Budget(name, luck=True)).add(ours[name], eager[name].detach(), exact_value)
                except OverBudget as error:
                    worse[name] = str(error).removeprefix(f"{name}: ")
            if worse or not any(budget.excess() for budget in budgets.values()):
                break
        for name, budget in budgets.items():
            where, quantity = _name(at.path, name, prefix)
            self.checks.append(Check(where, quantity, budget.figures(), worse.get(name)))
        return first


def _name(path: str, quantity: str, prefix: dict[str, str]) -> tuple[str, str]:
    """The module that a quantity belongs to, and what it is of it: a parameter belongs to its projection."""
    if not quantity.startswith("gradient of ") or quantity == "gradient of its input":
        return path, quantity
    parameter = quantity.removeprefix("gradient of ")
    if "" not in prefix:
        first, parameter = parameter.split(".", 1)
        path = prefix[first]
    parts = parameter.split(".")
    at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return ".".join([path, *parts[:at]]), "gradient of " + ".".join(parts[at:])


def _run(
    call: Callable[[torch.Tensor], Any], x: torch.Tensor, dy: torch.Tensor, parameters: dict[str, Any], real: Any
) -> dict[str, torch.Tensor]:
    """Output and gradients of one call; where real is given, of the tokens it names."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = call(x)
    y = y[0] if isinstance(y, tuple) else y
    dy = dy.to(y.device, y.dtype)
    if real is not None:
        dy = dy * real[..., None].to(dy.device)
    with torch.autocast(x.device.type, enabled=False):
        dx, *grads = torch.autograd.grad(y, [x, *parameters.values()], dy, allow_unused=True)
    found = {"output": y.detach(), "gradient of its input": dx}
    if real is not None:
        found = {name: t[real.to(t.device)] for name, t in found.items()}
        found["gradient of its input"] = dx * real[..., None].to(dx.device)
    named = zip(parameters.items(), grads, strict=True)
    return found | {f"gradient of {n}": torch.zeros_like(p) if g is None else g for (n, p), g in named}


def _another(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Another draw: x moved by less than a 32nd of each element, dy with random signs (a scalar keeps its own)."""
    moved = x * (1 + (torch.rand_like(x) - 0.5) / 16)
    signs = 1 - 2 * torch.randint(0, 2, dy.shape, device=dy.device).to(dy.dtype)
    return moved, dy * signs if dy.dim() else dy
