"""`fastlora doctor`: what is installed, what runs where, whether it is right, and what to do about what is not."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

import fastlora
from fastlora import ops

from .._versions import KNOWN
from ..kernels import _cache, _library, _rows, _tiles
from ..patching.verification import AGAIN, CACHED, RUNS, TRAINING, UNCACHED
from .errors import first_line
from .report import versions

_WIDTH, _INDENT = 92, 25


class Finding(NamedTuple):
    """One line: a name, what was found, and what to do about it; None where it is well."""

    name: str
    found: str
    remedy: str | None = None


def doctor(console: Console) -> bool:
    """Print every finding; whether all is well."""
    well = True
    for title, findings in (("Versions", _versions), ("Machine", _machine), ("Kernels", _kernels), ("Parity", _parity)):
        console.print(f"[bold]{title}[/bold]", markup=True)
        for finding in findings():
            well &= finding.remedy is None
            _show(console, finding)
    console.print("\nAll is well." if well else "\nNot all is well: see the lines marked ✗.")
    return well


def _show(console: Console, finding: Finding) -> None:
    mark, colour = ("✓", "green") if finding.remedy is None else ("✗", "red")
    lines = textwrap.wrap(finding.found, min(_WIDTH, console.width) - _INDENT, break_on_hyphens=False) or [""]
    console.print(f"  [{colour}]{mark}[/{colour}] {finding.name:20s} {escape(lines[0])}", markup=True)
    # A remedy may be a command to be copied: in one line.
    for line in [*lines[1:], *([f"→ {finding.remedy}"] if finding.remedy else [])]:
        console.print(f"{'':{_INDENT}s}{line}", soft_wrap=True)


def _versions() -> Iterator[Finding]:
    for name, found in versions().items():
        known = KNOWN.get(name)
        if found is None:
            needed = known and (name != "triton" or torch.cuda.is_available())
            yield Finding(name, "not installed", f"pip install {name}" if needed else None)
        elif known and known.too_old(found):
            yield Finding(name, found, f"pip install '{name}>={known.oldest}'")
        elif known and known.too_new(found):
            yield Finding(name, f"{found}: newer than {known.newest}, the newest that was tested with this fastlora")
        else:
            yield Finding(name, found)


def _machine() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding("GPU", f"none that PyTorch {torch.__version__} sees; the C++ kernels run on the CPU")
        if built and os.path.exists("/proc/driver/nvidia/version"):
            yield Finding(
                "CUDA", f"PyTorch is built for CUDA {built}, and a driver is there",
                "the driver may be too old for it, or CUDA_VISIBLE_DEVICES hides the GPU: nvidia-smi tells",
            )  # fmt: skip
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        properties = torch.cuda.get_device_properties(device)
        arch = _tiles.arch(device)
        yield Finding(
            f"GPU {i}", f"{properties.name}, sm_{arch}, {properties.total_memory / 2**30:.0f} GB",
            None if arch >= 80 else "Triton's bf16 products need sm_80 or later: use fp16, or a newer GPU",
        )  # fmt: skip
        own = sum(row.arch == arch for row in _rows.ROWS)
        measured = sum(row.arch == arch and isinstance(row.provenance, _rows.Measured) for row in _rows.ROWS)
        kept = len(_cache.entries(_cache.environment(device, arch)))
        yield Finding(
            f"rows of GPU {i}",
            f"{own} of sm_{arch} ({measured} measured), the default's for the rest; {kept} calls measured here"
            + ("" if kept else ". To measure: fastlora tune"),
        )
    forced = [name for name in os.environ if name.startswith("FASTLORA_") or name.startswith("TRITON_")]
    yield Finding("environment", ", ".join(f"{name}={os.environ[name]}" for name in sorted(forced)) or "nothing set")
    yield _cache_state()


def _cache_state() -> Finding:
    path, name = _cache.path(), "tuning cache"
    _, why = _cache.inspect()
    if why:
        return Finding(name, f"{path}: {why}", f"rm {path}")
    where = path.parent
    while not where.exists():
        where = where.parent
    if not os.access(where, os.W_OK):
        return Finding(name, f"{path}: {where} cannot be written", "set FASTLORA_CACHE_DIR to a folder of yours")
    if not path.exists():
        return Finding(name, f"{path}: not there yet; the shipped rows serve")
    return Finding(name, f"{path}: {sum(map(len, _cache.inspect()[0].values()))} calls")


def _kernels() -> Iterator[Finding]:
    state, _, command = _library.csrc_state.partition("; to build them: ")
    missed = command and not torch.cuda.is_available()
    yield Finding("csrc", state, f"without it the CPU path is slow: {command}" if missed else None)
    by: dict[str, list[str]] = {}
    for name in _library.implementations:
        by.setdefault(_library.runs_on_cpu(name), []).append(name)
    for where, names in by.items():
        yield Finding(f"CPU: {where}", f"{len(names)} operators")
    counts = {"screened": 0, "measured": 0}
    for row in _rows.ROWS:
        counts["measured" if isinstance(row.provenance, _rows.Measured) else "screened"] += 1
    yield Finding("shipped rows", f"{counts['screened']} screened, {counts['measured']} measured")


def _parity() -> Iterator[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    yield Finding(
        "bound", f"rms error ≤ 4 · {torch.finfo(dtype).eps / 2:.2g} of the rms of float64's, in bf16 on {device}"
    )
    for name, check in CHECKS.items():
        generator = torch.Generator().manual_seed(0)

        def new(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

        try:
            error, allowed = _error(*check(new))
        except Exception as raised:  # whatever it is, the other checks are wanted too
            yield Finding(name, f"{type(raised).__name__}: {first_line(raised)}", _REPORT)
            continue
        yield Finding(name, f"{error:.1e}", None if error <= allowed else f"more than {allowed:.1e}. {_REPORT}")
    yield from _whole_model(device)
    for words in _tiles.given_up():
        yield Finding("does not run here", words, f"the library's own way serves instead. {_REPORT}")


def _whole_model(device: str) -> Iterator[Finding]:
    """fastlora.verify on a tiny LoRA Llama with random weights, in bf16."""
    try:
        found = _verified(device)
    except Exception as raised:  # as above
        yield Finding("tiny LoRA Llama", f"{type(raised).__name__}: {first_line(raised)}", _REPORT)
        return
    parts: dict[str, list[Any]] = {"layers": [], "tokens": [], "logits": [], "ran": []}
    for check in found.checks:
        tokens, logits = check.quantity.endswith((CACHED, UNCACHED)), check.quantity in (TRAINING, AGAIN)
        part = "ran" if check.quantity == RUNS else "tokens" if tokens else "logits" if logits else "layers"
        parts[part].append(check)
    most = {part: f"{max((check.times for check in checks), default=0):.2f}" for part, checks in parts.items()}
    ran = f"{sum(row.fused > 0 for row in found.fused)} of {len(found.fused)}"
    for name, part, words in (
        ("tiny LoRA Llama", "layers", f"{most['layers']} of the budget of fastlora.verify, layer by layer"),
        ("greedy tokens", "tokens", f"{most['tokens']} of the budget, with and without a cache, left-padded rows too"),
        ("logits", "logits", f"{most['logits']} of the budget, read twice"),
        ("fused paths", "ran", f"{ran} of those said to be fused ran"),
    ):
        over = next((check for check in found.exceeded if check in parts[part]), None)
        what = over and f"{over.module}: {over.quantity}: {over.wrong or f'{over.times:.3g} times what is allowed'}"
        if part != "ran" and not parts[part]:
            what = "; ".join(found.skipped)
        yield Finding(name, words, None if what is None else f"{what}. {_REPORT}")


def _verified(device: str) -> Any:
    from .train import quiet

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which names a kernel that is not needed here
    quiet()
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Weights large enough that every one of them matters.
        base: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.15))
        model = get_peft_model(
            base.to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.15)
        ids, mask = torch.randint(0, 128, (4, 12)), torch.ones(4, 12, dtype=torch.int64)
        mask[1, :4] = 0
        labels = ids.masked_fill(mask == 0, -100)
        return fastlora.verify(model.to(device), {"input_ids": ids, "attention_mask": mask, "labels": labels})


_REPORT = "report it, with the output of this command, where you got fastlora from"
Check = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[torch.Tensor]]


def _error(ours: Callable[..., Any], truth: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """The largest relative rms error of the output and of the gradients, and the bound: 4 unit roundoffs of bf16.

    One rounding of each operand that a fused op makes on its way, of the result, of the incoming gradient's products
    and of the gradient: four in the deepest, each at most u relative to the rms.
    """
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = ours(*inputs), truth(*doubles)
    incoming = torch.linspace(-1, 1, expected.numel(), device=expected.device).view_as(expected).to(out.dtype)
    got = [out, *torch.autograd.grad(out, inputs, incoming)]
    want = [expected, *torch.autograd.grad(expected, doubles, incoming.double())]
    errors = [
        ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()).item()
        for a, b in zip(got, want, strict=True)
    ]
    # NaN is no error that is small.
    worst = max(errors, key=lambda e: float("inf") if e != e else e)
    return worst if worst == worst else float("inf"), 4 * torch.finfo(torch.bfloat16).eps / 2


def _rms_norm(new: Callable[..., torch.Tensor]) -> Any:
    def truth(x, w):
        return w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    return lambda x, w: ops.rms_norm(x, w, 1e-6), truth, [new(8, 64), new(64)]


def _swiglu(new: Callable[..., torch.Tensor]) -> Any:
    return ops.swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up, [new(8, 64), new(8, 64)]


def _rope(new: Callable[..., torch.Tensor]) -> Any:
    angles = torch.arange(8, dtype=torch.float64)[:, None] * 0.1 ** torch.arange(16, dtype=torch.float64) + 0.3
    q = new(1, 2, 8, 32)
    cos, sin = (f(angles).repeat(1, 2)[None].to(q.device, q.dtype) for f in (torch.cos, torch.sin))

    def truth(x):
        half = torch.cat((-x[..., 16:], x[..., :16]), -1)
        return x * cos.double()[:, None] + half * sin.double()[:, None]

    return lambda x: ops.rope(x, x, cos, sin)[0], truth, [q]


def _lora_linear(new: Callable[..., torch.Tensor]) -> Any:
    def truth(x, w, a, b):
        return x @ w.t() + 2 * (x @ a.t()) @ b.t()

    inputs = [new(16, 64), new(48, 64), new(8, 64), new(48, 8)]
    return lambda x, w, a, b: ops.lora_linear(x, w, a, b, 2.0), truth, inputs


def _lora_group(new: Callable[..., torch.Tensor]) -> Any:
    def ours(x, norm, w, a, b):
        projection = ops.Projection(w, None, (ops.Branch(a, b, 2.0),))
        return ops.lora_group(x, [projection], norm_weight=norm, eps=1e-6)[0]

    def truth(x, norm, w, a, b):
        n = norm * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return n @ w.t() + 2 * (n @ a.t()) @ b.t()

    return ours, truth, [new(16, 64), new(64), new(48, 64), new(8, 64), new(48, 8)]


def _lora_mlp(new: Callable[..., torch.Tensor]) -> Any:
    def ours(x, gate, up, down, a, b):
        first = ops.Projection(gate, None, (ops.Branch(a, b, 2.0),))
        return ops.lora_mlp(x, first, ops.Projection(up), ops.Projection(down))

    def truth(x, gate, up, down, a, b):
        g = x @ gate.t() + 2 * (x @ a.t()) @ b.t()
        return (torch.nn.functional.silu(g) * (x @ up.t())) @ down.t()

    return ours, truth, [new(16, 64), new(48, 64), new(48, 64), new(32, 48), new(8, 64), new(48, 8)]


def _flash_attention(new: Callable[..., torch.Tensor]) -> Any:
    def truth(q, k, v):
        hidden = torch.ones(32, 32, dtype=torch.bool, device=q.device).triu(1)
        return ((q @ k.mT) / 8).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    return lambda q, k, v: ops.flash_attention(q, k, v), truth, [new(1, 2, 32, 64) for _ in range(3)]


def _linear_cross_entropy(new: Callable[..., torch.Tensor]) -> Any:
    x, w = new(16, 64), new(96, 64)
    labels = torch.arange(16, device=x.device)

    def truth(x, w):
        return torch.nn.functional.cross_entropy(x @ w.t(), labels)

    return lambda x, w: ops.linear_cross_entropy(x, w, labels), truth, [x, w]


def _dora(new: Callable[..., torch.Tensor]) -> Any:
    w, a, b = (t.detach() for t in (new(48, 64), new(8, 64), new(48, 8)))

    def truth(y, m):
        return y * m / (w.double() + 2 * b.double() @ a.double()).norm(dim=1)

    return lambda y, m: ops.dora(y, m, w, a, b, 2.0), truth, [new(16, 48), new(48)]


def _dequantize_4bit(new: Callable[..., torch.Tensor]) -> Any:
    x = new(16, 64)
    packed = torch.arange(48 * 32, device=x.device).remainder(251).to(torch.uint8)
    absmax, code = (torch.linspace(-1, 1, n, device=x.device) for n in (48, 16))
    state = SimpleNamespace(
        quant_type="nf4", blocksize=64, absmax=absmax, code=code, state2=None, shape=(48, 64), dtype=x.dtype
    )

    def truth(x):
        halves = torch.stack((packed >> 4, packed & 15), 1).long().view(48, 64)
        return x @ (code.double()[halves] * absmax.double()[:, None]).t()

    return lambda x: x @ ops.dequantize_4bit(packed, state).t(), truth, [x]


CHECKS: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "lora_linear": _lora_linear,
    "lora_group": _lora_group,
    "lora_mlp": _lora_mlp,
    "dora": _dora,
    "dequantize_4bit": _dequantize_4bit,
    "flash_attention": _flash_attention,
    "linear_cross_entropy": _linear_cross_entropy,
}
