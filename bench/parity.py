"""A patched model against float64, dtype by dtype: loss and gradients of training steps, logits of decoding.

loss and gradients  of dense, padded and packed batches, as the gate of train_step judges them.
logits              of a prompt with a left-padded row and of greedy tokens after it, with and without a cache: no
                    further from an unpatched float64 model than the unpatched model is, under the tests' error budget.
                    In fp32 `generate` must give the unpatched model's tokens, too.

On a GPU every way of the base product (FASTLORA_GEMM) is judged. Exit status 1 if anything is red.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastlora.kernels import _tiles

from . import precompile
from .cli import common_options, new_parser, open_sink
from .gate import Red, budget
from .providers import environment
from .record import Record
from .setting import Setting
from .step_providers import BY_NAME
from .training import Gate, Trainee

_PROMPT, _NEW, _PADDED, _DRAWS = 12, 12, 5, 8


def main(argv: list[str]) -> int:
    parser = new_parser("parity", __doc__)
    common_options(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny model, and the chosen way only")
    parser.add_argument("--model", choices=("mini", "l7b"), help="only this one (default: both on a GPU)")
    args = parser.parse_args(argv)
    sink = open_sink(args, "parity")
    gpu = args.device == "cuda" and not args.quick
    names = ("fastlora", "fastlora-triton", "fastlora-addmm", "fastlora-augmented") if gpu else ("fastlora",)
    names = tuple(name for name in names if not args.providers or name in args.providers)
    # Heads of 64 and 128; the second is a layer of Llama 2 7B at its own width.
    shapes = [("mini", 2, 384, 2), ("l7b", 1, 1024, 1)] if gpu or args.model else [("tiny", 2, 40, 2)]
    shapes = [shape for shape in shapes if args.model in (None, shape[0])]
    red = 0
    for dtype in args.dtype:
        for model, rows, sequence, layers in shapes:
            setting = Setting(model, dtype, args.device, rows, sequence, layers)
            if gpu:
                precompile.compile_all(precompile.of_step(setting, names))
            for line in (*steps(setting, names), *decoding(setting, names)):
                sink.write(setting.record() | {"bench": "parity"} | line)
                red += line["parity"] is not True
    return min(red, 1)


def steps(setting: Setting, names: tuple[str, ...]) -> Iterator[Record]:
    """Loss and gradients of every provider and kind of batch."""
    base = setting.base_model()
    for batch in ("dense", "padded", "packed"):
        one = Setting(**vars(setting) | {"batch": batch})
        gate = Gate(one, base)
        for name in names:
            line = {"provider": name, "mode": f"loss and gradients, {batch}"}
            yield line | _judged(lambda one=one, name=name, gate=gate: gate.check(Trainee(BY_NAME[name], base, one)))


def decoding(setting: Setting, names: tuple[str, ...]) -> Iterator[Record]:
    """Logits of prompt and greedy tokens, with and without a cache, and in fp32 the tokens themselves."""
    base = setting.base_model()
    eager = BY_NAME["peft"].build(base, setting.rank, 0.0).eval()
    prompts = [_Prompt(eager, setting, seed) for seed in range(_DRAWS)]
    for name in names:
        with environment(BY_NAME[name].environment):
            patched = BY_NAME[name].build(base, setting.rank, 0.0).eval()
            for cached in (False, True):
                line = {"provider": name, "mode": f"logits, {'with' if cached else 'without'} a cache"}
                yield line | _judged(lambda patched=patched, cached=cached: _check(patched, prompts, cached))


class _Prompt:
    """Rows of random tokens, the first padded on the left, and what the unpatched model makes of them."""

    def __init__(self, eager: nn.Module, setting: Setting, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, setting.shape.vocab, (3, _PROMPT), generator=generator).to(setting.device)
        mask = torch.ones(3, _PROMPT + _NEW, dtype=torch.int64, device=setting.device)
        mask[0, :_PADDED] = 0
        self.exact = setting.dtype == torch.float32
        self.ids, self.mask = ids, mask
        self._model = eager
        self._eager: dict[bool, torch.Tensor] = {}

    @functools.cached_property
    def tokens(self) -> torch.Tensor:
        return generated(self._model, self, use_cache=True)

    @functools.cached_property
    def truth(self) -> torch.Tensor:
        return logits(copy.deepcopy(self._model).double(), self, cached=False)

    def eager(self, cached: bool) -> torch.Tensor:
        if cached not in self._eager:
            self._eager[cached] = logits(self._model, self, cached)
        return self._eager[cached]


def _check(patched: nn.Module, prompts: list[_Prompt], cached: bool) -> dict[str, float]:
    """Raise Red for logits over budget: of the first prompt, or, that being luck, of all of them together."""
    judge = budget.Budget("logits")
    for prompt in prompts:
        judge.add(logits(patched, prompt, cached), prompt.eager(cached), prompt.truth)
        if prompt.exact and not torch.equal(made := generated(patched, prompt, use_cache=cached), prompt.tokens):
            raise Red(f"{int((made != prompt.tokens).sum())} of {made.numel()} greedy tokens differ")
        if not judge.excess():
            break
    if excess := judge.excess():
        raise Red(excess)
    rms, maximum = judge.figures()
    return {"rms": round(rms.times, 3), "max": round(maximum.times, 3)}


def _judged(check: Any) -> Record:
    before = set(_tiles.given_up())
    try:
        found = check()
        if lost := set(_tiles.given_up()) - before:  # green, but it is not the kernel that was judged
            raise Red(f"a tile does not run here: {'; '.join(sorted(lost))}")
        return {"parity": True, "gate": found}
    except AssertionError as error:  # Red, and the budget's own
        return {"parity": False, "why": f"parity is red: {error}"}
    except Exception as error:  # what cannot run says why, and the rest is judged
        return {"parity": None, "why": f"{type(error).__name__}: {str(error).strip()[:200]}"}


@torch.no_grad()
def generated(model: nn.Module, prompt: _Prompt, use_cache: bool) -> torch.Tensor:
    """The prompt and the greedy tokens after it."""
    return model.generate(
        input_ids=prompt.ids, attention_mask=prompt.mask[:, :_PROMPT], max_new_tokens=_NEW, min_new_tokens=_NEW,
        do_sample=False, use_cache=use_cache, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module, prompt: _Prompt, cached: bool) -> torch.Tensor:
    """(rows, new tokens, vocabulary): what predicts every token after the prompt, the tokens being given."""
    from fastlora.modules.trust import CACHE

    positions = (prompt.mask.cumsum(1) - 1).clamp(min=0)
    last = _PROMPT + _NEW - 1
    ends = [_PROMPT, *range(_PROMPT + 1, last + 1)] if cached else [last]
    cache, found, start = None, [], 0
    for end in ends:
        out = model(
            input_ids=prompt.tokens[:, start:end], attention_mask=prompt.mask[:, :end],
            position_ids=positions[:, start:end], use_cache=cached, **{CACHE: cache},
        )  # fmt: skip
        cache, start = out.get(CACHE), end
        found.append(out.logits[:, -1:] if cached else out.logits[:, _PROMPT - 1 :])
    return torch.cat(found, 1)
