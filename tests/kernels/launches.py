"""What the layers of Llama 2 launch, forward and backward, on meta tensors."""

import os

import torch

from fastlora.kernels import (
    _tiles,
    dequantize_4bit,
    dropout,
    flash_attention,
    linear_cross_entropy,
    lora_gemm,
    lora_project,
    lora_reduce,
    rms_norm,
    rope,
    swiglu,
    swiglu_reduce,
)
from fastlora.ops._group import Branch, Group, Projection
from fastlora.tuning.aot import Compiled, compiling

M, VOCAB = 4096, 32000
# hidden, ffn, heads, key-value heads
MODELS = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40), "70B": (8192, 28672, 64, 8)}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def group(outputs, x, r, dtype, masters, dropped, residual=False, prologue="none", head=0):
    """Forward and backward of the projections of one x (M, K) to outputs, an adapter of rank r each."""
    K, P = x.shape[1], len(outputs)
    masks = [meta(M, K // 8, dtype=torch.uint8) if dropped else None] * P
    w = [meta(n, K, dtype=dtype) for n in outputs]
    a, b = [meta(r, K, dtype=masters)] * P, [meta(n, r, dtype=masters) for n in outputs]
    s, dy = meta(M, P * r, dtype=dtype), [meta(M, n, dtype=dtype) for n in outputs]
    scale = [2.0] * P
    if prologue == "rms_norm":
        lora_project.rms_norm_project(x, meta(K, dtype=dtype), 1e-5, a, scale, masks, dtype)
    elif prologue == "swiglu":
        lora_project.swiglu_project(x, x, a, scale, masks)
    else:
        lora_project.lora_project(x, a, scale, masks)
    table = meta(1, M, head, dtype=dtype) if head else None
    lora_gemm.lora_gemm(x, w, s, b, [None] * P, dy[0] if residual else None, table, table)
    lora_project.lora_project_t(dy, b, scale)
    lora_gemm.lora_gemm_t(dy, w, s, a, masks)
    if prologue == "rms_norm":
        for weight in {dtype, FP32}:
            weight, rstd = meta(K, dtype=weight), meta(M, dtype=FP32)
            lora_reduce.rms_norm_bwd_reduce(x, x, weight, rstd, x, False, s, [r] * P, masks)
    elif prologue == "swiglu":
        swiglu_reduce.swiglu_bwd_reduce(x, x, x, s, [r], masks, meta(M, 2 * r, dtype=dtype), [r, r])
    else:
        lora_reduce.lora_reduce(s, x, [r] * P, masks)
    lora_reduce.lora_reduce_t(s, dy, [r] * P)


def lora(model, dtype, masters, r, dropped):
    """The four fused groups of a decoder layer, and a projection on its own."""
    hidden, ffn, heads, kv_heads = MODELS[model]
    x, h = meta(M, hidden, dtype=dtype), meta(M, ffn, dtype=dtype)
    kv = hidden // heads * kv_heads
    rest = (r, dtype, masters, dropped)
    group([hidden, kv, kv], x, *rest, prologue="rms_norm", head=hidden // heads)
    group([hidden], x, *rest, residual=True)
    group([ffn, ffn], x, *rest, prologue="rms_norm")
    group([hidden], h, *rest, residual=True, prologue="swiglu")
    group([hidden], x, *rest)


def partial(model, dtype, masters, r):
    """q_proj and v_proj, PEFT's own default: k_proj has no adapter."""
    hidden, _, heads, kv_heads = MODELS[model]
    kv = hidden // heads * kv_heads
    x, weight = meta(M, hidden, dtype=dtype), meta(hidden, dtype=dtype)

    def projection(n, *ranks):
        branches = [Branch(meta(one, hidden, dtype=masters), meta(n, one, dtype=masters), 2.0) for one in ranks]
        return Projection(meta(n, hidden, dtype=dtype), None, tuple(branches))

    group = Group.of([projection(hidden, r), projection(kv), projection(kv, r)], dtype)
    s, dy = meta(M, 2 * r, dtype=dtype), [meta(M, n, dtype=dtype) for n in (hidden, kv, kv)]
    table, masks = meta(1, M, hidden // heads, dtype=dtype), [None, None]
    lora_project.rms_norm_project(x, weight, 1e-5, group.a, group.a_scale, masks, dtype)
    lora_gemm.lora_gemm(x, group.w, s, group.b, group.bias, None, table, table)
    # Adapters of several dtypes.
    lora_gemm.lora_gemm(x, group.w, s, [group.b[0], group.b[1].to(dtype), group.b[2]], group.bias, None, table, table)
    lora_project.lora_project_t(dy, group.b, group.b_scale)
    for wide in {dtype, FP32}:  # under autocast x may be in fp32
        lora_gemm.lora_gemm_t(dy, group.w, s, group.a, masks, wide)
    lora_reduce.rms_norm_bwd_reduce(x, x, weight, meta(M, dtype=FP32), x, False, s, group.ranks(), masks)
    lora_reduce.lora_reduce_t(s, dy, group.b_ranks())


def without_adapters(model, dtype):
    hidden, ffn, heads, kv_heads = MODELS[model]
    x, h, D = meta(M, hidden, dtype=dtype), meta(M, ffn, dtype=dtype), hidden // heads
    rstd = meta(M, dtype=FP32)
    for weight in {dtype, FP32}:
        weight = meta(hidden, dtype=weight)
        rms_norm.rms_norm_fwd(x, weight, 1e-5)
        rms_norm.rms_norm_bwd(x, x, weight, rstd, None, False, False)
        rms_norm.rms_norm_bwd(x, x, weight, rstd, x, True, True)
    swiglu.swiglu_fwd(h, h)
    swiglu.swiglu_bwd(h, h, h)
    q = meta(1, M, heads, D, dtype=dtype).transpose(1, 2)
    k = meta(1, M, kv_heads, D, dtype=dtype).transpose(1, 2)
    table = meta(1, M, D, dtype=dtype)
    for inverse in (False, True):
        rope.rope(q, k, table, table, inverse)
    dropout.dropout_mask(x, torch.tensor(1), 0.05)
    logits, labels = meta(1024, VOCAB, dtype=dtype), meta(1024, dtype=torch.int64)
    for need_grad in (False, True):
        linear_cross_entropy.cross_entropy_rows(logits, labels, meta(dtype=FP32), need_grad)


def quantised(model, dtype):
    """nf4 in blocks of 64, doubly quantised and not."""
    hidden, ffn, _, _ = MODELS[model]
    n = hidden * ffn
    packed, code, absmax2 = meta(n // 2, dtype=torch.uint8), meta(16, dtype=FP32), meta(n // 64 // 256, dtype=FP32)
    second = (absmax2, meta(256, dtype=FP32), meta(dtype=FP32))
    dequantize_4bit.dequantize_4bit(packed, meta(n // 64, dtype=FP32), code, None, None, None, 64, 1, n, dtype)
    dequantize_4bit.dequantize_4bit(packed, meta(n // 64, dtype=torch.uint8), code, *second, 64, 256, n, dtype)


def attend(heads, kv_heads, dtype, D, *masks, p=0.0):
    """Forward and backward of one head dimension under each of the masks: "causal", "padded", "packed"."""
    q = meta(2, M, heads, D, dtype=dtype).transpose(1, 2)
    k = meta(2, M, kv_heads, D, dtype=dtype).transpose(1, 2)
    lse = meta(2, heads, M, dtype=FP32)
    seed = torch.tensor(2**61) if p else None
    for mask in masks:
        real = meta(2, M, dtype=torch.bool) if mask == "padded" else None
        positions = meta(1, M, dtype=torch.int64) if mask == "packed" else None
        arguments = real, positions, 0.1, True, None, p, seed
        flash_attention.flash_attention_fwd(q, k, k, *arguments)
        flash_attention.flash_attention_bwd(q, q, k, k, q, lse, *arguments)


def attention(model):
    """Of Llama 2 in bf16, and the shortest of queries."""
    _, _, heads, kv_heads = MODELS[model]
    attend(heads, kv_heads, BF16, 128, "causal", "padded", "packed")
    q, k = meta(2, heads, 1, 128, dtype=BF16), meta(2, kv_heads, M, 128, dtype=BF16)
    flash_attention.flash_attention_fwd(q, k, k, None, None, 0.1, True, None)


def attention_in_halves(model):
    """Of other head dimensions, and in fp16."""
    attend(32, 8, BF16, 64, "causal", "padded", "packed")
    attend(32, 8, FP16, 128, "causal")
    attend(32, 8, BF16, 256, "padded")


def attention_in_fp32(model):
    for D in (64, 128, 256):
        attend(32, 8, FP32, D, "padded")
        attend(32, 8, FP32, D, "padded", p=0.1)


def attention_dropout(model):
    attend(32, 8, BF16, 64, "padded", p=0.1)
    attend(32, 8, BF16, 128, "causal", "padded", "packed", p=0.1)
    attend(32, 8, BF16, 256, "padded", p=0.1)


# dtype of the base, of the adapters, rank, dropout: most of PEFT's fp32 masters over bf16, some of the others.
ADAPTERS = [
    *((BF16, FP32, r, False) for r in (8, 16, 64, 128)),
    *((BF16, FP32, r, True) for r in (16, 128)),
    (BF16, BF16, 16, False),
    (FP16, FP32, 64, False),
    (FP32, FP32, 16, False),
    (FP32, FP32, 128, True),
]
LAUNCHES = {
    "the rest": (without_adapters, [(dtype,) for dtype in (BF16, FP16, FP32)]),
    "q and v alone": (partial, [(BF16, FP32, 16)]),
    "4-bit weights": (quantised, [(dtype,) for dtype in (BF16, FP16, FP32)]),
    "attention": (attention, [()]),
    "attention, other heads": (attention_in_halves, [()]),
    "attention, fp32": (attention_in_fp32, [()]),
    "attention, dropout": (attention_dropout, [()]),
}
for dtype, masters, r, dropped in ADAPTERS:
    words = f"{str(dtype)[6:]}, {str(masters)[6:]} adapters of rank {r}{', dropout' * dropped}"
    LAUNCHES[words] = lora, [(dtype, masters, r, dropped)]


def resources(arch: int, name: str, skip=None) -> list[Compiled]:
    """What LAUNCHES[name] compiles to, for all models; in a process of its own."""
    os.environ["FASTLORA_GEMM"] = "triton"
    _tiles.ATEN = ""  # tiles, too, of kernels in whose place a composition serves
    function, arguments = LAUNCHES[name]
    with compiling(arch, skip) as compiled:
        for model in MODELS:
            for one in arguments:
                function(model, *one)
    return sorted(compiled.values(), key=str)
