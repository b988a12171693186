"""Whether the code that a fused forward stands in for is still the code it was written against.

A fused forward computes what functions of transformers, PEFT and torch would have computed, and does not call them.
If one of them was replaced, it is not ours to bypass: the module runs the replacement, and ``explain`` says why.
`BYPASSED` lists those that people replace. A function counts as replaced if it is not the one that was there when
fastlora was imported, or if that one did not come from the library's own files.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import peft
import torch
import transformers
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import variants as peft_variants
from torch.nn.modules import module as torch_hooks
from transformers import masking_utils
from transformers.activations import ACT2FN
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama as hf

from ..ops._transforms import transform

Forward = TypeVar("Forward", bound=Callable[..., Any])

SILU = type(ACT2FN["silu"])


class Bypassed(NamedTuple):
    """A function that fused forwards bypass.

    Attributes:
        role: what is left alone where the function was replaced: a class, or a part of what the classes compute.
        owner, name: where to look it up: an attribute of a class or module, or a key of a registry.
        library: the package that it has to come from.
    """

    role: str
    owner: Any
    name: str
    library: ModuleType = transformers

    def read(self) -> Any:
        """The function that is there now; None if nothing is."""
        if isinstance(self.owner, Mapping):
            return self.owner.get(self.name)
        function = getattr(self.owner, self.name, None)
        # The package kernels makes modules of functions; a kernel from the Hub becomes their forward.
        return function.forward if isinstance(function, torch.nn.Module) else function

    def __str__(self) -> str:
        if isinstance(self.owner, Mapping):
            return f"{type(self.owner).__name__}[{self.name!r}]"
        module = isinstance(self.owner, ModuleType)
        return f"{self.owner.__name__ if module else self.owner.__qualname__}.{self.name}"


_TABLE = (
    Bypassed("norm", hf.LlamaRMSNorm, "forward"),
    Bypassed("mlp", hf.LlamaMLP, "forward"),
    Bypassed("attention", hf.LlamaAttention, "forward"),
    Bypassed("layer", hf.LlamaDecoderLayer, "forward"),
    Bypassed("model", hf.LlamaModel, "forward"),
    Bypassed("head", hf.LlamaForCausalLM, "forward"),
    Bypassed("head", loss_utils, "fixed_cross_entropy"),
    Bypassed("head", torch.nn.functional, "cross_entropy", torch),
    Bypassed("silu", SILU, "forward", sys.modules[SILU.__module__.split(".")[0]]),
    Bypassed("silu", torch.nn.SiLU, "forward", torch),
    Bypassed("silu", torch.nn.functional, "silu", torch),
    Bypassed("rope", hf, "apply_rotary_pos_emb"),
    Bypassed("rope", hf, "rotate_half"),
    Bypassed("projection", torch.nn.Linear, "forward", torch),
    Bypassed("projection", torch.nn.Dropout, "forward", torch),
    Bypassed("projection", torch.nn.functional, "linear", torch),
    Bypassed("projection", torch.nn.functional, "dropout", torch),
    Bypassed("projection", peft_layer.Linear, "forward", peft),
    Bypassed("dora", peft_variants.DoraLinearVariant, "forward", peft),
    Bypassed("projection", peft_layer.Linear, "_cast_input_dtype", peft),
    Bypassed("dora", peft_dora.DoraLinearLayer, "forward", peft),
    Bypassed("dora", peft_dora.DoraLinearLayer, "get_weight_norm", peft),
    Bypassed("dora", peft_dora.DoraLinearLayer, "get_lora_weight", peft),
    Bypassed("dora", peft_dora, "dequantize_module_weight", peft),
    Bypassed("sdpa", hf.ALL_ATTENTION_FUNCTIONS, "sdpa"),
    Bypassed("sdpa", masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa"),
    Bypassed("sdpa", hf, "create_causal_mask"),
    Bypassed("sdpa", hf, "ALL_ATTENTION_FUNCTIONS"),
    Bypassed("sdpa", type(hf.ALL_ATTENTION_FUNCTIONS), "get_interface"),
    Bypassed("sdpa", torch.nn.functional, "scaled_dot_product_attention", torch),
    Bypassed("call", torch.nn.Module, "__call__", torch),
    Bypassed("call", torch.nn.Module, "_call_impl", torch),
    Bypassed("call", torch.nn.Linear, "__call__", torch),
)
# Not every version of a library has all of them.
BYPASSED = tuple(entry for entry in _TABLE if entry.read() is not None)
ROLES = tuple(dict.fromkeys(entry.role for entry in BYPASSED))
# Roles that run without calling the modules inside: hooks on every module, and another way of calling them ("call"),
# would not be seen.
_SKIP_MODULES = ("mlp", "attention", "layer", "head", "silu", "projection", "dora")

# The parameters of the forwards we know, transformers 4.57 to 5.24. An argument that we do not know may matter.
_ATTENTION = "hidden_states", "position_embeddings", "attention_mask"
_LAYER = "hidden_states", "attention_mask", "position_ids"
_MODEL = "input_ids", "attention_mask", "position_ids"
KNOWN: dict[str, set[tuple[str, ...]]] = {
    "norm": {("hidden_states",)},
    "mlp": {("x",)},
    "attention": {
        (*_ATTENTION, "past_key_values", "cache_position", "kwargs"),
        (*_ATTENTION, "past_key_values", "kwargs"),
        (*_ATTENTION, "cache", "kwargs"),
    },
    "layer": {
        (*_LAYER, "past_key_values", "use_cache", "cache_position", "position_embeddings", "kwargs"),
        (*_LAYER, "past_key_values", "use_cache", "position_embeddings", "kwargs"),
        (*_LAYER, "cache", "use_cache", "position_embeddings", "kwargs"),
    },
    "model": {
        (*_MODEL, "past_key_values", "inputs_embeds", "cache_position", "use_cache", "kwargs"),
        (*_MODEL, "past_key_values", "inputs_embeds", "use_cache", "kwargs"),
        (*_MODEL, "cache", "inputs_embeds", "use_cache", "kwargs"),
    },
    "head": {
        (*_MODEL, cache, "inputs_embeds", "labels", "use_cache", *position, "logits_to_keep", "kwargs")
        for cache, position in (("past_key_values", ("cache_position",)), ("past_key_values", ()), ("cache", ()))
    },
}


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, without self."""
    return tuple(inspect.signature(function).parameters)[1:]


# transformers 5.24 calls `cache` what was `past_key_values`, and knows the old name in calls until 5.40.
CACHE = "cache" if "cache" in parameters(hf.LlamaModel.forward) else "past_key_values"
CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values")))
MODEL_ARGUMENTS = parameters(hf.LlamaModel.forward)
ATTENTION_ARGUMENTS = parameters(hf.LlamaAttention.forward)[1:-1]


def why_unknown(role: str, function: Callable[..., Any]) -> str | None:
    """Why a forward is not one that we know how to stand in for; None where its parameters are known."""
    names = parameters(function)
    if names in KNOWN[role]:
        return None
    return (
        f"{function.__qualname__}({', '.join(names)}) of transformers {transformers.__version__} takes other arguments"
        " than fastlora knows: left alone until a newer fastlora knows it"
    )


def _layers(function: Any) -> Iterator[Any]:
    """A function and all that it wraps."""
    while function is not None:
        if isinstance(getattr(function, "__self__", None), torch.nn.Module):  # of the package kernels: see `read`
            function = inspect.getclosurevars(function).nonlocals.get("func", function)
        yield getattr(function, "__func__", function)
        function = getattr(function, "__wrapped__", None)


def comes_from(function: Any, library: ModuleType) -> bool:
    """Whether a function, and all that it wraps, was written in the files of a library, or in C."""
    folder = os.path.dirname(os.path.abspath(str(library.__file__))) + os.sep
    for layer in _layers(function):
        code = getattr(layer, "__code__", None)
        if not (inspect.isbuiltin(layer) if code is None else os.path.abspath(code.co_filename).startswith(folder)):
            return False
    return True


def _place(function: Any) -> str:
    """What a function is and where it was written, whatever functools.wraps has it say."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        kind = type(function)
        return str(getattr(function, "__qualname__", f"a {kind.__module__}.{kind.__qualname__}"))
    module = getattr(function, "__globals__", {}).get("__name__", "an unknown module")
    return f"{module}.{code.co_name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def _learn(entry: Bypassed) -> Any:
    """The function of an entry as it has to stay; where it is not what we know, a fresh object, equal to nothing."""
    function = entry.read()
    mapping = isinstance(function, Mapping)
    unknown = entry.name == "forward" and entry.role in KNOWN and why_unknown(entry.role, function)
    return function if mapping or (comes_from(function, entry.library) and not unknown) else object()


_known = tuple(map(_learn, BYPASSED))


class _Root:
    """What the attributes that are compared are looked up in, all by one call of C."""


def _getter() -> Callable[[Any], tuple[Any, ...]]:
    paths = []
    for i, entry in enumerate(BYPASSED):
        if not isinstance(entry.owner, Mapping):
            setattr(_Root, f"owner{i}", entry.owner)
            module = isinstance(getattr(entry.owner, entry.name), torch.nn.Module)
            paths.append(f"owner{i}.{entry.name}" + (".forward" if module else ""))
    return attrgetter(*paths)


_attributes = _getter()
_attention, _masks = hf.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
_forward, _before = torch_hooks._global_forward_hooks, torch_hooks._global_forward_pre_hooks
_backward, _before_backward = torch_hooks._global_backward_hooks, torch_hooks._global_backward_pre_hooks


def _hooks() -> tuple[Any, ...]:
    """The global hooks on modules, but for those of torch's own ModuleTracker, which only note names."""
    hooks = (*_forward.values(), *_before.values(), *_backward.values(), *_before_backward.values())
    return tuple(hook for hook in hooks if getattr(hook, "__module__", "") != "torch.utils.module_tracker")


def token() -> tuple[Any, ...]:
    """The identity of everything that is bypassed: equal as long as nothing in it was replaced."""
    hooks = _hooks() if _forward or _before or _backward or _before_backward else ()
    return _attributes(_Root), _attention["sdpa"], _masks["sdpa"], hooks, transform()


def _same_product(function: Any) -> bool:
    """Whether this is what DeepSpeed's ZeRO-3 puts in the place of torch's linear: the same, with less kept."""
    zero = sys.modules.get("deepspeed.runtime.zero.linear")
    return zero is not None and function is getattr(zero, "zero3_linear_wrap", None)


def _answer() -> dict[str, str]:
    """By role, why it must not be bypassed; empty where all is as it was."""
    if running := transform():
        return dict.fromkeys(ROLES, f"{running} runs, for which fused operators have no rule")
    found: dict[str, str] = {}
    for entry, known in zip(BYPASSED, _known, strict=True):
        function = entry.read()
        if function is known or (inspect.ismethod(function) and function == known) or _same_product(function):
            continue
        unknown = None
        if entry.name == "forward" and entry.role in KNOWN and comes_from(function, entry.library):
            unknown = why_unknown(entry.role, function)
        why = unknown or f"{entry} was replaced by {_place(function)}, which runs instead"
        for role in _SKIP_MODULES if entry.role == "call" else (entry.role,):
            found.setdefault(role, why)
    if hooks := _hooks():
        why = f"a global module hook has to see every module: {_place(hooks[0])}"
        for role in _SKIP_MODULES:
            found.setdefault(role, why)
    return found


_seen: tuple[tuple[Any, ...], dict[str, str]] = (), {}


class _Held(threading.local):
    """The answer of the forward that runs now in this thread; None between forwards."""

    reasons: dict[str, str] | None = None


_held = _Held()


def reasons() -> dict[str, str]:
    """By role, why it must not be bypassed now; empty where all is as it was."""
    global _seen
    if _held.reasons is not None:
        return _held.reasons
    seen, now = _seen, token()
    if now != seen[0]:
        _seen = seen = now, _answer()
    return seen[1]


def once(forward: Forward) -> Forward:
    """A forward in which the token is compared once, for all modules inside."""

    @functools.wraps(forward)
    def asked_once(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _held.reasons is not None:
            return forward(*args, **kwargs)
        _held.reasons = reasons()
        try:
            return forward(*args, **kwargs)
        finally:
            _held.reasons = None

    return asked_once  # type: ignore[return-value]


def why_not(*roles: str) -> str | None:
    """Why what these roles stand for must not be bypassed now; None where it may be. See `BYPASSED`."""
    if torch.compiler.is_compiling():
        return _traced(roles)
    if why := reasons():
        return next((why[role] for role in roles if role in why), None)
    return None


@torch.compiler.assume_constant_result
def _traced(roles: tuple[str, ...]) -> str | None:
    """The answer when a graph is made, for as long as it is used."""
    why = reasons()
    return next((why[role] for role in roles if role in why), None)


_trusted: dict[type, Any] = {}


def why_not_class(cls: type) -> str | None:
    """Why the forward of a class must not be bypassed; None where it is that of its own package.

    For the classes of packages that may not be installed, such as bitsandbytes.
    """
    forward: Any = cls.forward  # type: ignore[attr-defined]
    if _trusted.get(cls) is forward:
        return None
    if not comes_from(forward, sys.modules[cls.__module__.split(".")[0]]):
        return f"{cls.__qualname__}.forward was replaced by {_place(forward)}, which runs instead"
    _trusted[cls] = forward
    return None
