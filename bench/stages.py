"""What a GPU must answer, in two calls: the stages of each, most decisive first."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_PARITY = 150.0  # seconds of everything that compares
# Seconds of each call in all.
LIMITS = {"gpu": 420.0, "gpu_more": 300.0}


class Stage(NamedTuple):
    """A command and the most seconds it may take.

    Attributes:
        command: arguments of ``python -m bench``; with ``shell`` a program and its arguments.
        environment: variables that it runs with.
        why: why it cannot run here; None where it can.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    environment: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default is never written to
    shell: bool = False
    why: str | None = None


class _Calls:
    """The commands of stages: on a GPU at full size, or tiny ones on the CPU, to rehearse."""

    def __init__(self, results: Path, rehearse: bool) -> None:
        self.device = "cpu" if rehearse else "cuda"
        self.into = ("--append", str(results), "--device", self.device)
        self.rehearse = rehearse

    def step(
        self, seconds: float, providers: str, *options: str, tokens: str = "1x4096", layers: int = 0
    ) -> tuple[str, ...]:
        """Training steps of 7B, of all its layers unless told; of a tiny model, to rehearse."""
        command = ("train_step", *self.into, "--memory", "off", "--providers", providers, *options)
        if self.rehearse:
            return *command, "--model", "tiny", "--tokens", "2x32", "--seconds", "0.2"
        few = ("--layers", str(layers)) if layers else ()
        return *command, "--model", "7b", "--tokens", tokens, "--seconds", f"{seconds:g}", *few

    def ops(self, seconds: float, ops: str, providers: str = "") -> tuple[str, ...]:
        """Single operators; every provider of them, to rehearse."""
        if self.rehearse:
            return (*ops.split(), *self.into, "--quick", "--seconds", "0.02")
        only = ("--providers", providers) if providers else ()
        return (*ops.split(), *self.into, "--seconds", f"{seconds:g}", *only)

    def first(self) -> list[tuple[Stage, ...]]:
        """The headline, where its time goes, the products, attention, and the region where the host is the limit."""
        tuned = ("--quick",) if self.rehearse else ("--model", "7b", "--tokens", "4096,1024")
        ways = "peft,fastlora-addmm,fastlora-triton,fastlora-augmented"
        # On a GPU every stage compiles ahead of its own timing.
        ahead = ("precompile", "--arch", "90", "--model", "tiny", "--tokens", "64", "--ops", "swiglu")
        rehearsed = [Stage("compiling ahead", 90, ahead)] if self.rehearse else []
        # A process each: what the profiler leaves behind would slow the next size down.
        host_bound = [
            Stage(f"7B step, {tokens}", 40, self.step(4, "peft,peft-bf16,fastlora", "--profile", tokens=tokens))
            for tokens in ("1x1024", "1x512", "4x1024")
        ]
        alone = [
            *rehearsed,
            Stage("7B step", 130, self.step(12, "peft,peft-bf16,fastlora,fastlora-bf16", "--profile")),
            Stage("ways of the base product", 45, self.step(4, ways, "--profile", layers=4)),
            Stage("products", 75, self.ops(0.3, "lora_gemm lora_gemm_t")),
            Stage("attention", 55, self.ops(0.3, "attention attention_masked", "fastlora,sdpa,varlen,flash-attn")),
            *host_bound,
            Stage("7B step, dropout", 40, self.step(5, "peft,fastlora", "--profile", "--dropout", "0.05")),
            Stage("tuning", 80, ("tune", *self.into, "--seconds", "0.2", *tuned)),
        ]
        return [(stage,) for stage in alone]

    def second(self) -> list[tuple[Stage, ...]]:
        """Others at their best, parity in every dtype, other batches, ranks and bases, the A100's code."""
        others = "peft,peft-bf16,peft-compile-layers,peft-bf16-compile-layers,liger,liger-bf16,fastlora,fastlora-bf16"
        rest = "rms_norm swiglu rope lora_skinny lora_group lora_mlp linear_cross_entropy"
        return [
            (Stage("others at their best", 100, self.step(8, others, layers=8)),),
            # None of these is timed: all at once.
            (*self._parity(), self._pytest(), self._sanitizer()),
            (Stage("packed and padded", 50, self.step(5, "peft,fastlora", "--batch", "packed,padded", layers=8)),),
            (Stage("7B step, rank 64", 40, self.step(5, "peft,fastlora", "--rank", "64")),),
            (
                Stage("the A100's code", 50, self.ops(0.2, "lora_gemm lora_gemm_t attention", "fastlora"),
                      {"TRITON_OVERRIDE_ARCH": "sm80"}),
            ),
            (Stage("other operators", 50, self.ops(0.2, rest, "fastlora,eager,base,addmm")),),
            (
                Stage("4-bit base", 40, self.step(5, "peft,fastlora", "--base", "nf4", layers=8),
                      why=_missing("bitsandbytes")),
            ),
        ]  # fmt: skip

    def _parity(self) -> list[Stage]:
        """Of the models of ``bench parity``, a process for each dtype and size."""
        sizes = [("--quick",)] if self.rehearse else [("--model", "l7b"), ("--model", "mini")]
        return [
            Stage(f"parity of models, {' '.join([*size[1:], dtype])}", _PARITY,
                  ("parity", *self.into, "--dtype", dtype, *size))
            for dtype in ("bfloat16", "float16", "float32")
            for size in sizes
        ]  # fmt: skip

    def _pytest(self) -> Stage:
        tests = "tests/ops/test_swiglu.py" if self.rehearse else "tests/ops"
        workers = ("-n", "10", "--dist", "worksteal") if find_spec("xdist") and not self.rehearse else ()
        options = ("--tb=short", "--disable-warnings", "-p", "no:cacheprovider", *workers)
        # Interrupted a little before it is killed, pytest tells what has failed so far.
        limit = ("timeout", "-s", "INT", f"{_PARITY - 10:.0f}") if shutil.which("timeout") else ()
        command = (*limit, sys.executable, "-m", "pytest", tests, "--device", self.device, *options)
        return Stage("parity of operators", _PARITY, command, shell=True, why=_missing("pytest"))

    def _sanitizer(self) -> Stage:
        """Training steps and decoding of a tiny model, every access to memory checked."""
        found = shutil.which("compute-sanitizer")
        sanitizer = () if self.rehearse else (found or "", "--error-exitcode", "9")
        command = (*sanitizer, sys.executable, "-m", "bench", "parity", *self.into, "--quick")
        why = None if self.rehearse or found else "there is no compute-sanitizer"
        return Stage("memory accesses", _PARITY, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, shell=True, why=why)


def of_call(call: str, results: Path, rehearse: bool, only: Sequence[str] | None = None) -> list[tuple[Stage, ...]]:
    """The stages of "gpu" or "gpu_more", which add their results to a file; those of a group run at once.

    only: patterns of names; others are left out.
    """
    calls = _Calls(results, rehearse)
    groups = calls.first() if call == "gpu" else calls.second()
    if only is None:
        return groups
    kept = [tuple(s for s in group if any(fnmatch(s.name, name) for name in only)) for group in groups]
    return [group for group in kept if group]


def _missing(package: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"
