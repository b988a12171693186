"""The kernel calls of a Llama 2 training step: which there are, their operands, and what they compute in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ..kernels._library import implementations
from ..kernels._tiles import ATEN, Call
from . import attention
from .attention import New


class Model(NamedTuple):
    """Sizes of a Llama: hidden, ffn, query and key-value heads."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = {
    "7b": Model(4096, 11008, 32, 32),
    "13b": Model(5120, 13824, 40, 40),
    "34b": Model(8192, 22016, 64, 8),
    "70b": Model(8192, 28672, 64, 8),
}
TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
RANKS = (8, 16, 64, 128)
VOCAB = 32000


def of_model(
    model: Model, tokens: int, rank: int, dtype: torch.dtype, device: torch.device, dropout: bool = False
) -> list[Call]:
    """Every call of a step that is chosen, in a layer forward and backward and in the loss, with LoRA of one rank on
    all seven projections."""
    H, F, kv = model.hidden, model.ffn, model.kv_heads * model.head_dim
    dropped = "_dropout" if dropout else ""
    found = []

    def group(producer: str, gemm: str, n: int, k: int, p: int, reduces: Iterable[str]) -> None:
        """p projections of one x: the columns of all together, and the reduction."""
        ranks = {"r": p * rank, "p": p}
        found.extend(
            [
                (f"{producer}_project{dropped}", {"k": k, **ranks}),
                (gemm, {"n": n, "k": k, **ranks}),
                ("lora_project_t", {"k": n, **ranks}),
                (f"lora_gemm_t{dropped}", {"n": k, "k": n, **ranks}),
                *((one, {"n": n if one.endswith("_t") else k, **ranks}) for one in reduces),
            ]
        )

    group("rms_norm", "lora_gemm_rotary", H + 2 * kv, H, 3, (f"rms_norm_reduce{dropped}", "lora_reduce_t"))
    group("lora", "lora_gemm", H, H, 1, (f"lora_reduce{dropped}", "lora_reduce_t"))
    group("rms_norm", "lora_gemm", 2 * F, H, 2, (f"rms_norm_reduce{dropped}",))
    group("swiglu", "lora_gemm", H, F, 1, ("lora_reduce_t",))
    # dA of down_proj and dB of gate_proj and up_proj, in one.
    found += [(f"swiglu_reduce{dropped}", {"n": F, "r": rank, "p": 3}), ("cross_entropy", {"n": VOCAB})]
    return list(dict.fromkeys(Call(kernel, dtype, device, m=tokens, **sizes) for kernel, sizes in found))


def of_attention(
    model: Model, tokens: int, dtype: torch.dtype, device: torch.device, dropout: bool = False
) -> list[Call]:
    """Which attention runs for batches that nothing masks, and the kernels of ours, forward and backward."""
    if not 32 <= model.head_dim <= 256:
        return []
    bucket = next(D for D in (64, 128, 256) if model.head_dim <= D)
    names = [f"flash_attention_{one}_d{bucket}{'_dropout' * dropout}" for one in ("fwd", "dq", "dkdv")]
    sizes = tokens, model.heads, model.kv_heads, model.head_dim, dtype, device
    return [attention.call(name, *sizes) for name in ("attention", *names)]


def beside(model: Model, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    """What only some layers launch: SwiGLU on its own, where a projection of the MLP is left to PEFT, and weights of
    four bits made wide."""
    H, kv = model.hidden, model.kv_heads * model.head_dim
    weights = [Call("dequantize_4bit", dtype, device, n=n * H) for n in dict.fromkeys((H, kv, model.ffn))]
    return [Call("swiglu", dtype, device, n=tokens * model.ffn), *weights]


def _parts(total: int, p: int) -> list[int]:
    """Columns of p projections that are ``total`` together: as q, k and v are, the first the widest."""
    rest = total // p // 64 * 64 or total // p
    return [total - (p - 1) * rest, *[rest] * (p - 1)]


class Kernel(NamedTuple):
    """An operator, its arguments for a call, and what it computes.

    Attributes:
        op: its name under torch.ops.fastlora; or a function that runs what is chosen, where that is no one kernel.
        arguments: makes them; called with the call and with new(*shape, dtype=None, scale=1.0).
        truth: the outputs in float64, from the arguments.
        methods: the ways beside the tiles, to be measured with them.
        others: arguments whose code takes more registers, which its rows serve too.
    """

    op: str | Callable[..., Any]
    arguments: Callable[[Call, New], tuple[Any, ...]]
    truth: Callable[..., list[torch.Tensor]]
    methods: tuple[str, ...] = (ATEN,)
    others: tuple[Callable[[Call, New], tuple[Any, ...]], ...] = ()

    @property
    def launcher(self) -> Callable[..., Any] | None:
        """Of its tiles; None where it has none."""
        return implementations[self.op][0] if isinstance(self.op, str) else None

    @property
    def run(self) -> Callable[..., Any]:
        return getattr(torch.ops.fastlora, self.op) if isinstance(self.op, str) else self.op


def _masks(call: Call, new: New, columns: int) -> list[torch.Tensor | None]:
    if "dropout" not in call.kernel:
        return [None] * call.p
    return [new(call.m, -(-columns // 8), dtype=torch.uint8)] * call.p


def _gemm_arguments(c: Call, new: New) -> tuple[Any, ...]:
    N, r = _parts(c.n, c.p), c.r // c.p
    w = [new(n, c.k, scale=c.k**-0.5) for n in N]
    b = [new(n, r, dtype=torch.float32, scale=r**-0.5) for n in N]
    residual = new(c.m, c.n) if c.p == 1 else None
    return new(c.m, c.k), w, new(c.m, c.r), b, [None] * c.p, residual


def _rotary_arguments(c: Call, new: New) -> tuple[Any, ...]:
    """As columns of queries c.k, as many of keys and of values; their heads have 128, or what divides them."""
    N, r = (c.k, *[(c.n - c.k) // 2] * 2), c.r // c.p
    D = math.gcd(N[1], 128)
    w = [new(n, c.k, scale=c.k**-0.5) for n in N]
    b = [new(n, r, dtype=torch.float32, scale=r**-0.5) for n in N]
    return new(c.m, c.k), w, new(c.m, c.r), b, [None] * c.p, None, new(1, c.m, D), new(1, c.m, D)


def _rotary_truth(x, w, s, b, bias, residual, cos, sin):
    q, k, v = _gemm_truth(x, w, s, b, bias, residual)
    cos, sin = _d(cos).transpose(0, 1), _d(sin).transpose(0, 1)
    rotated = []
    for y in (q, k):
        heads = y.view(len(y), -1, cos.shape[2])
        first, second = heads.chunk(2, 2)
        rotated.append((heads * cos + torch.cat((-second, first), 2) * sin).view(y.shape))
    return [*rotated, v]


def _gemm_truth(x, w, s, b, bias, residual):
    y = [
        _d(x) @ _d(wi).t() + _d(si) @ _d(bi).t()
        for wi, si, bi in zip(w, s.split(s.shape[1] // len(w), 1), b, strict=True)
    ]
    return y if residual is None else [y[0] + _d(residual)]


def _gemm_t_arguments(c: Call, new: New) -> tuple[Any, ...]:
    K, r = _parts(c.k, c.p), c.r // c.p
    a = [new(r, c.n, dtype=torch.float32, scale=r**-0.5) for _ in K]
    w = [new(k, c.n, scale=c.k**-0.5) for k in K]
    return [new(c.m, k) for k in K], w, new(c.m, c.r), a, _masks(c, new, c.n)


def _gemm_t_truth(dy, w, ds, a, masks):
    total = torch.zeros((), dtype=torch.float64, device=ds.device)
    for dyi, wi, dsi, ai, mask in zip(dy, w, ds.split(a[0].shape[0], 1), a, masks, strict=True):
        total = total + _d(dyi) @ _d(wi) + _dropped(_d(dsi) @ _d(ai), mask)
    return [total]


def _adapters(c: Call, new: New) -> list[torch.Tensor]:
    return [new(c.r // c.p, c.k, dtype=torch.float32, scale=c.k**-0.5) for _ in range(c.p)]


def _project_arguments(c: Call, new: New) -> tuple[Any, ...]:
    return new(c.m, c.k), _adapters(c, new), [2.0] * c.p, _masks(c, new, c.k)


def _rms_norm_project_arguments(c: Call, new: New) -> tuple[Any, ...]:
    x, weight = new(c.m, c.k), new(c.k)
    return x, weight, 1e-5, _adapters(c, new), [2.0] * c.p, _masks(c, new, c.k), x.dtype


def _swiglu_project_arguments(c: Call, new: New) -> tuple[Any, ...]:
    return new(c.m, c.k), new(c.m, c.k), _adapters(c, new), [2.0] * c.p, _masks(c, new, c.k)


def _project_truth(x, a, scale, masks):
    return [torch.cat([f * _dropped(_d(x), mask) @ _d(ai).t() for ai, f, mask in zip(a, scale, masks, strict=True)], 1)]


def _rms_norm_project_truth(x, weight, eps, a, scale, masks, dtype):
    rstd = torch.rsqrt(_d(x).square().mean(1) + eps)
    n = _d(weight) * _d(x) * rstd[:, None]
    return [n, rstd, *_project_truth(n, a, scale, masks)]


def _swiglu_project_truth(gate, up, a, scale, masks):
    h = torch.nn.functional.silu(_d(gate)) * _d(up)
    return [h, *_project_truth(h, a, scale, masks)]


def _project_t_arguments(c: Call, new: New) -> tuple[Any, ...]:
    K, r = _parts(c.k, c.p), c.r // c.p
    b = [new(k, r, dtype=torch.float32, scale=k**-0.5) for k in K]
    return [new(c.m, k) for k in K], b, [2.0] * c.p


def _project_t_truth(dy, b, scale):
    return [torch.cat([f * (_d(dyi) @ _d(bi)) for dyi, bi, f in zip(dy, b, scale, strict=True)], 1)]


def _reduce_arguments(c: Call, new: New) -> tuple[Any, ...]:
    return new(c.m, c.r), new(c.m, c.n), [c.r // c.p] * c.p, _masks(c, new, c.n)


def _reduce_truth(ds, x, ranks, masks):
    parts = [_d(dsi).t() @ _dropped(_d(x), mask) for dsi, mask in zip(ds.split(ranks, 1), masks, strict=True)]
    return [torch.cat([part.flatten() for part in parts])]


def _reduce_t_arguments(c: Call, new: New) -> tuple[Any, ...]:
    return new(c.m, c.r), [new(c.m, n) for n in _parts(c.n, c.p)], [c.r // c.p] * c.p


def _reduce_t_truth(s, dy, ranks):
    return [torch.cat([(_d(dyi).t() @ _d(si)).flatten() for dyi, si in zip(dy, s.split(ranks, 1), strict=True)])]


def _rms_norm_reduce_arguments(c: Call, new: New) -> tuple[Any, ...]:
    dn, x, dresidual = new(c.m, c.n), new(c.m, c.n), new(c.m, c.n)
    rstd = torch.rsqrt(x.float().square().mean(1) + 1e-5)
    return dn, x, new(c.n), rstd, dresidual, False, new(c.m, c.r), [c.r // c.p] * c.p, _masks(c, new, c.n)


def _rms_norm_reduce_truth(dn, x, weight, rstd, dresidual, need_dw, ds, ranks, masks):
    normed = _d(x) * _d(rstd)[:, None]
    g = _d(dn) * _d(weight)
    dx = _d(rstd)[:, None] * (g - normed * (g * normed).mean(1, keepdim=True)) + _d(dresidual)
    return [dx, *_reduce_truth(ds, normed * _d(weight), ranks, masks)]


def _swiglu_reduce_arguments(c: Call, new: New) -> tuple[Any, ...]:
    dh, gate, up = (new(c.m, c.n) for _ in range(3))
    return dh, gate, up, new(c.m, c.r), [c.r], _masks(c, new, c.n)[:1], new(c.m, 2 * c.r), [c.r, c.r]


def _swiglu_reduce_truth(dh, gate, up, ds, ranks, masks, s, b_ranks):
    dgate, dup = _swiglu_truth(dh, gate, up)
    h = torch.nn.functional.silu(_d(gate)) * _d(up)
    flat = torch.cat([*_reduce_truth(ds, h, ranks, masks), *_reduce_t_truth(s, [dgate, dup], b_ranks)])
    return [dgate, dup, flat]


def _swiglu_arguments(c: Call, new: New) -> tuple[Any, ...]:
    return new(1, c.n), new(1, c.n), new(1, c.n)


def _swiglu_truth(dh, gate, up):
    g, u, sig = _d(gate), _d(up), torch.sigmoid(_d(gate))
    return [_d(dh) * u * sig * (1 + g * (1 - sig)), _d(dh) * g * sig]


def _cross_entropy_arguments(c: Call, new: New) -> tuple[Any, ...]:
    labels = torch.zeros(c.m, dtype=torch.int64, device=c.device)
    return new(c.m, c.n), labels, torch.ones((), device=c.device), True


def _cross_entropy_truth(logits, labels, scale, need_grad):
    return [torch.nn.functional.cross_entropy(_d(logits), labels, reduction="none")]


def _dequantize_arguments(c: Call, new: New) -> tuple[Any, ...]:
    """Doubly quantised: blocks of 64 numbers, and of 256 of their scales."""
    packed, absmax = new(-(-c.n // 2), dtype=torch.uint8), new(-(-c.n // 64), dtype=torch.uint8)
    sizes = (16,), (-(-c.n // 16384),), (256,), ()
    code, absmax2, code2, offset = (new(*size, dtype=torch.float32) for size in sizes)
    return packed, absmax, code, absmax2, code2, offset, 64, 256, c.n, c.dtype


def _dequantize_truth(packed, absmax, code, absmax2, code2, offset, blocksize, blocksize2, numel, dtype):
    scale = _d(code2)[absmax.int()] * _d(absmax2).repeat_interleave(blocksize2)[: len(absmax)] + _d(offset)
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[:numel].int()
    return [_d(code)[codes] * scale.repeat_interleave(blocksize)[:numel]]


def _d(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double()


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return x
    bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return x * bits.flatten(1)[:, : x.shape[1]]


def _of_attention(name: str) -> Kernel:
    forward = "fwd" in name or "decode" in name
    op = "flash_attention_fwd" if forward else "flash_attention_bwd"
    arguments = attention.forward_arguments if forward else attention.backward_arguments
    truth: Callable[..., list[torch.Tensor]] = attention.forward_truth if forward else attention.backward_truth
    *others, easiest = (functools.partial(arguments, kind=kind) for kind in attention.kinds(name))
    # The composition waits for the device, and no CUDA graph holds it: it is not measured.
    return Kernel(op, easiest, truth, (), tuple(others))


_GEMM_WAYS = ("addmm", "augmented")
_GEMM_T = Kernel("lora_gemm_t", _gemm_t_arguments, _gemm_t_truth, _GEMM_WAYS[:1])
_PROJECT = Kernel("lora_project", _project_arguments, _project_truth)
_NORM = Kernel("rms_norm_project", _rms_norm_project_arguments, _rms_norm_project_truth)
_SWIGLU = Kernel("swiglu_project", _swiglu_project_arguments, _swiglu_project_truth)
_NORM_REDUCE = Kernel("rms_norm_bwd_reduce", _rms_norm_reduce_arguments, _rms_norm_reduce_truth)
_SWIGLU_REDUCE = Kernel("swiglu_bwd_reduce", _swiglu_reduce_arguments, _swiglu_reduce_truth)
_REDUCE = Kernel("lora_reduce", _reduce_arguments, _reduce_truth)
KERNELS = {
    "lora_gemm": Kernel("lora_gemm", _gemm_arguments, _gemm_truth, _GEMM_WAYS),
    "lora_gemm_rotary": Kernel("lora_gemm", _rotary_arguments, _rotary_truth, _GEMM_WAYS),
    "lora_gemm_t": _GEMM_T,
    "lora_gemm_t_dropout": _GEMM_T,
    "lora_project": _PROJECT,
    "lora_project_dropout": _PROJECT,
    "rms_norm_project": _NORM,
    "rms_norm_project_dropout": _NORM,
    "swiglu_project": _SWIGLU,
    "swiglu_project_dropout": _SWIGLU,
    "lora_project_t": Kernel("lora_project_t", _project_t_arguments, _project_t_truth),
    "lora_reduce": _REDUCE,
    "lora_reduce_dropout": _REDUCE,
    "rms_norm_reduce": _NORM_REDUCE,
    "rms_norm_reduce_dropout": _NORM_REDUCE,
    "swiglu_reduce": _SWIGLU_REDUCE,
    "swiglu_reduce_dropout": _SWIGLU_REDUCE,
    "lora_reduce_t": Kernel("lora_reduce_t", _reduce_t_arguments, _reduce_t_truth),
    "swiglu": Kernel("swiglu_bwd", _swiglu_arguments, _swiglu_truth),
    "cross_entropy": Kernel("cross_entropy_rows", _cross_entropy_arguments, _cross_entropy_truth),
    "dequantize_4bit": Kernel("dequantize_4bit", _dequantize_arguments, _dequantize_truth),
    "attention": Kernel(attention.layer, attention.layer_arguments, attention.layer_truth, ("sdpa", "fastlora")),
} | {name: _of_attention(name) for name in attention.KERNELS}


def of_kernel(
    kernel: str, model: Model, tokens: int, rank: int, dtype: torch.dtype, device: torch.device
) -> list[Call]:
    """The calls of one kernel in a model; of attention in the head dimension of its row."""
    if kernel in attention.KERNELS:
        D = attention.head_dim(kernel)
        return [attention.call(kernel, tokens, model.heads, model.kv_heads, D, dtype, device)]
    every = of_model(model, tokens, rank, dtype, device, "dropout" in kernel) + beside(model, tokens, dtype, device)
    return [call for call in every if call.kernel == kernel]


def probes(kernel: str) -> Iterator[Call]:
    """Calls whose code is what Llama 2 asks of a kernel at its hardest: ranks 128 and 16, as many projections as there
    are, one with a residual; and query heads in groups. Two projections, and fp16, where they decide: products and
    attention take the registers of bf16 (tests compile the shipped tiles for fp16 all the same)."""
    meta, name = torch.device("meta"), kernel.removesuffix("_fp32")
    dtype = torch.float32 if kernel.endswith("_fp32") else torch.bfloat16

    model = MODELS["70b" if name in attention.KERNELS else "7b"]
    high, low = ({c.p: c for c in of_kernel(name, model, 4096, rank, dtype, meta)} for rank in (128, 16))
    most = max(high)
    yield high[1 if name == "lora_gemm" else most]
    yield low[most]
    if dtype != torch.float32 and high[most].r and "gemm" not in name:
        yield high.get(2, high[most])._replace(dtype=torch.float16)
