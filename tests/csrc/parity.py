"""The C++ kernels against float64, under the instruction set FASTLORA_CPU_ISA names: python tests/csrc/parity.py.

A script, because the instruction set is chosen once per process; test_isa.py runs it for each. It defines the schemas
itself and imports nothing of fastlora but the budget. A kernel passes if it is no further from float64 than eager code in its dtype.
"""

import ctypes
import os
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from fastlora.budget import Budget

EXTENSION = Path(os.environ.get("FASTLORA_C", Path(__file__).parents[2] / "fastlora" / "_C.abi3.so"))
SCHEMAS = """
rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)
rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual, bool need_dw, bool need_n)
    -> (Tensor, Tensor, Tensor)
rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)
swiglu_fwd(Tensor gate, Tensor up) -> Tensor
swiglu_bwd(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)
cross_entropy_rows(Tensor(a!) logits, Tensor labels, Tensor scale, bool need_grad) -> Tensor
dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, Tensor? absmax2, Tensor? code2, Tensor? offset,
    int blocksize, int blocksize2, SymInt numel, ScalarType dtype) -> Tensor
attention_softmax(Tensor(a!) scores, Tensor first, Tensor last, Tensor? bias, float scale) -> Tensor
attention_softmax_bwd(Tensor(a!) scores, Tensor(b!) dp, Tensor first, Tensor last, Tensor? bias, float scale) -> ()
fused_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? real, Tensor first, float scale, bool causal)
    -> (Tensor, Tensor)
fused_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? real, Tensor first,
    float scale, bool causal) -> (Tensor, Tensor, Tensor)
accumulate(Tensor(a!) total, Tensor parts) -> ()
tall_product(Tensor narrow, Tensor wide, Tensor? mask) -> Tensor
"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5

library = torch.library.Library("fastlora", "DEF")
for schema in SCHEMAS.strip().replace("\n    ", " ").splitlines():
    library.define(schema)
torch.ops.load_library(str(EXTENSION))
ops = torch.ops.fastlora
isa = ctypes.CDLL(str(EXTENSION)).fastlora_cpu_isa
isa.restype = ctypes.c_char_p


budgets: dict[str, Budget] = {}  # by quantity and shape, over all its draws


def draws(*shape):
    """How often a case is drawn: small ones until a few hundred elements are at hand."""
    return range(max(1, 512 // max(1, torch.Size(shape).numel())) if torch.Size(shape).numel() < 64 else 1)


def check(name, ours, eager, truth):
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, eager gives {eager.dtype}"
    budgets.setdefault(name, Budget(name)).add(ours, eager, truth)


def grads(f, inputs, d_out, dtype=None):
    """The outputs of f and its gradients, in the inputs' own dtypes or all in `dtype`."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    d_out = d_out if isinstance(d_out, tuple) else (d_out,)
    gradients = torch.autograd.grad(out, leaves, [d.to(o.dtype) for d, o in zip(d_out, out, strict=True)])
    return [o.detach() for o in out], gradients


def same_bits_on_two_threads(f, *args):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = f(*args)
        results.append(out if isinstance(out, tuple) else (out,))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)), "bits differ"
    return results[0] if len(results[0]) > 1 else results[0][0]


def hf_rms_norm(x, weight):
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_norm_case(dtype, weight_dtype, rows, cols):
    what = f"rms_norm {dtype} {weight_dtype} {rows}x{cols}"
    x = (torch.randn(rows, cols) * 3).to(dtype)
    weight = (1 + torch.randn(cols) / 10).to(weight_dtype)
    dy = torch.randn(rows, cols).to(weight_dtype)
    (eager,), (eager_dx, eager_dw) = grads(hf_rms_norm, (x, weight), dy)
    (truth,), (true_dx, true_dw) = grads(hf_rms_norm, (x, weight), dy, torch.double)
    y, rstd = same_bits_on_two_threads(ops.rms_norm_fwd, x, weight, EPS)
    check(what + " y", y, eager, truth)
    true_rstd = torch.rsqrt(x.double().pow(2).mean(-1) + EPS)
    check(what + " rstd", rstd, torch.rsqrt(x.float().pow(2).mean(-1) + EPS), true_rstd)
    dx, dw, n = same_bits_on_two_threads(ops.rms_norm_bwd, dy, x, weight, rstd, None, True, True)
    check(what + " dx", dx, eager_dx, true_dx)
    check(what + " dw", dw, eager_dw, true_dw)
    assert torch.equal(n, y), what
    only_dx, *none = ops.rms_norm_bwd(dy, x, weight, rstd, None, False, False)
    assert torch.equal(only_dx, dx)
    assert [(e.shape, e.dtype) for e in none] == [((0,), weight_dtype), ((0,), weight_dtype)]

    dresidual = torch.randn(rows, cols).to(dtype)
    dx, *_ = ops.rms_norm_bwd(dy, x, weight, rstd, dresidual, False, False)
    check(what + " dx + dresidual", dx, eager_dx + dresidual, true_dx + dresidual)
    narrow = dy.bfloat16()  # as under autocast
    dx, dw, n = ops.rms_norm_bwd(narrow, x, weight, rstd, None, True, True)
    wide_dx, wide_dw, _ = ops.rms_norm_bwd(narrow.to(weight_dtype), x, weight, rstd, None, True, False)
    assert n.dtype == torch.bfloat16 and torch.equal(n, y.bfloat16())
    if weight_dtype != torch.float16:  # whose range ends before bf16's
        assert torch.equal(dx, wide_dx) and torch.equal(dw, wide_dw), what


def rms_norm():
    shapes = ((257, 3), (65, 7), (64, 33), (67, 1000), (300, 4096), (0, 8), (1000, 16))
    for dtype, (rows, cols) in product(DTYPES, shapes):
        for weight_dtype in dict.fromkeys((dtype, torch.float32)):
            for _ in draws(cols):  # dw has as many elements
                rms_norm_case(dtype, weight_dtype, rows, cols)


def hf_rope(q, k, cos, sin):
    def rotate_half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rope_case(dtype, table_dtype, layout, table_batch, b, heads, kv, t, d):
    what = f"rope {dtype} {table_dtype} {layout.__name__} {(b, heads, kv, t, d)}"
    q, k = layout(b, heads, t, d).to(dtype), layout(b, kv, t, d).to(dtype)
    dq, dk = layout(b, heads, t, d).to(dtype), layout(b, kv, t, d).to(dtype)
    cos, sin = torch.randn(2, table_batch, t, d).to(table_dtype)
    eager, eager_grads = grads(partial(hf_rope, cos=cos.to(dtype), sin=sin.to(dtype)), (q, k), (dq, dk))
    exact = partial(hf_rope, cos=cos.double(), sin=sin.double())
    truth, true_grads = grads(exact, (q, k), (dq, dk), torch.double)
    out = same_bits_on_two_threads(ops.rope, q, k, cos, sin, False)
    back = same_bits_on_two_threads(ops.rope, dq, dk, cos, sin, True)
    for i, name in enumerate("qk"):
        check(f"{what} {name}", out[i], eager[i], truth[i])
        check(f"{what} d{name}", back[i], eager_grads[i], true_grads[i])
        assert out[i].stride() == torch.empty_like((q, k)[i]).stride()


def rope():
    def transposed(b, h, t, d):
        return torch.randn(b, t, h, d).transpose(1, 2)

    def gapped(b, h, t, d):
        return torch.randn(b, h, t, 2 * d)[..., :d]

    def expanded(b, h, t, d):
        return torch.randn(1, 1, t, d).expand(b, h, t, d)

    shapes = ((2, 4, 2, 5, 64), (1, 3, 1, 37, 6), (2, 2, 2, 33, 2), (1, 8, 8, 40, 128), (2, 2, 1, 0, 8))
    layouts = (torch.randn, transposed, gapped, expanded)
    for dtype, layout, shape in product(DTYPES, layouts, shapes):
        for table_dtype, table_batch in product(dict.fromkeys((dtype, torch.float32)), dict.fromkeys((1, shape[0]))):
            rope_case(dtype, table_dtype, layout, table_batch, *shape)


def eager_swiglu(gate, up):
    return F.silu(gate) * up


def swiglu():
    for dtype in DTYPES:
        for shape in (s for s in ((1, 1), (13, 7), (64, 1000), (129, 1033), (0, 5), (5, 0)) for _ in draws(*s)):
            gate, up, dh = ((torch.randn(3, *shape) * torch.tensor([6.0, 1, 1])[:, None, None]).to(dtype)).unbind()
            (eager,), eager_grads = grads(eager_swiglu, (gate, up), dh)
            (truth,), true_grads = grads(eager_swiglu, (gate, up), dh, torch.double)
            check(f"swiglu {dtype} {shape}", same_bits_on_two_threads(ops.swiglu_fwd, gate, up), eager, truth)
            back = same_bits_on_two_threads(ops.swiglu_bwd, dh, gate, up)
            for i, name in enumerate(("dgate", "dup")):
                check(f"swiglu {dtype} {shape} {name}", back[i], eager_grads[i], true_grads[i])
        extremes = torch.tensor([[-3e4, -200.0, -88.5, -0.0, 0.0, 88.5, 200.0, 3e4]], dtype=dtype)
        h = ops.swiglu_fwd(extremes, torch.ones_like(extremes))
        assert torch.allclose(h.double(), F.silu(extremes.double()).to(dtype).double(), rtol=1e-2, atol=1e-37), h
        assert ops.swiglu_bwd(torch.ones_like(h), extremes, extremes)[0].isfinite().all()


def eager_cross_entropy(logits, labels):
    return F.cross_entropy(logits if logits.dtype == torch.double else logits.float(), labels, reduction="none")


def cross_entropy_with_grad(logits, labels, scale):
    logits = logits.clone()
    return ops.cross_entropy_rows(logits, labels, scale, True), logits


def cross_entropy():
    inf, scale = float("inf"), torch.tensor(0.25)
    for dtype in DTYPES:
        shapes = ((100, 1), (67, 17), (64, 1000), (64, 32000), (65, 32001), (0, 9))
        for rows, vocab in shapes:
            what = f"cross_entropy {dtype} {rows}x{vocab}"
            logits, labels = (torch.randn(rows, vocab) * 4).to(dtype), torch.randint(vocab, (rows,))
            f, d_loss = partial(eager_cross_entropy, labels=labels), torch.full((rows,), 0.25)
            (eager,), (eager_grad,) = grads(f, (logits,), d_loss)
            (truth,), (true_grad,) = grads(f, (logits,), d_loss, torch.double)
            loss, grad = same_bits_on_two_threads(cross_entropy_with_grad, logits, labels, scale)
            check(what + " loss", loss, eager, truth)
            check(what + " grad", grad, eager_grad, true_grad)
            before = logits.clone()
            assert torch.equal(ops.cross_entropy_rows(logits, labels, scale, False), loss)
            assert torch.equal(logits, before), "logits changed without need_grad"

        rows = [[1.0, -inf, 2.0, -inf, -inf], [-inf, 0.0, -inf, -inf, -inf], [1e4, -1e4, 0, 0, 0]]
        x, labels = torch.tensor(rows, dtype=dtype), torch.tensor([0, 1, 2])
        loss, grad = cross_entropy_with_grad(x, labels, torch.tensor(1.0))
        torch.testing.assert_close(loss.double(), eager_cross_entropy(x.double(), labels))
        torch.testing.assert_close(grad.double(), x.double().softmax(-1) - F.one_hot(labels, 5), rtol=1e-2, atol=1e-7)
        x = torch.full((2, 40), 1.0, dtype=dtype)
        x[1, 17] = float("nan")
        loss, grad = cross_entropy_with_grad(x, torch.tensor([3, 3]), scale)
        assert loss.isnan().tolist() == [False, True] and grad.isnan().any(1).tolist() == [False, True]


def dequantize_4bit():
    """Bit by bit the products of fp32, rounded once."""
    for dtype, numel, blocksize, double in product(DTYPES, (0, 1, 33, 4096, 70000), (32, 64, 4096), (False, True)):
        packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
        blocks, code = -(-numel // blocksize), torch.randn(16)
        scale, second = torch.rand(blocks), (None, None, None)
        absmax = scale
        if double:
            absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
            second = (torch.rand(-(-blocks // 256)), torch.randn(256), torch.rand(()))
            scale = second[1][absmax.long()] * second[0].repeat_interleave(256)[:blocks] + second[2]
        w = same_bits_on_two_threads(ops.dequantize_4bit, packed, absmax, code, *second, blocksize, 256, numel, dtype)
        halves = torch.stack((packed >> 4, packed & 15), 1).flatten()[:numel].long()
        assert torch.equal(w, (code[halves] * scale.repeat_interleave(blocksize)[:numel]).to(dtype))


def eager_softmax(scores, hidden, scale):
    x = (scores * scale).masked_fill(hidden, float("-inf"))
    wide = x if x.dtype == torch.double else x.float()
    return wide.softmax(-1).masked_fill(hidden.all(-1, True), 0.0).to(scores.dtype)


def softmax_in_place(scores, *rest):
    scores = scores.clone()
    return scores, ops.attention_softmax(scores, *rest)


def softmax_bwd_in_place(scores, dp, *rest):
    scores, dp = scores.clone(), dp.clone()
    ops.attention_softmax_bwd(scores, dp, *rest)
    return scores, dp


def attention_case(dtype, heads, queries, keys, padded):
    what = f"attention {dtype} {(heads, queries, keys)} padded={padded}"
    scores, dp = (torch.randn(2, heads, queries, keys) * 4).to(dtype)
    first = torch.randint(-3, keys // 2 + 1, (queries,))
    last = torch.randint(keys // 2 - 2, keys + 3, (queries,))
    bias = torch.where(torch.rand(keys) < 0.3, float("-inf"), 0.0) if padded else None
    j = torch.arange(keys)
    hidden = (j < first[:, None]) | (j >= last[:, None]) | (False if bias is None else bias < 0)
    rest = first, last, bias, 0.3
    f = partial(eager_softmax, hidden=hidden, scale=0.3)
    (eager,), (eager_ds,) = grads(f, (scores,), dp)
    (truth,), (true_ds,) = grads(f, (scores,), dp, torch.double)
    p, lse = same_bits_on_two_threads(softmax_in_place, scores, *rest)
    check(what + " p", p, eager, truth)
    assert (p.masked_select(hidden) == 0).all(), what
    some = ~hidden.all(-1).expand(heads, -1)
    true_lse = (scores.double() * 0.3).masked_fill(hidden, float("-inf")).logsumexp(-1)
    eager_lse = (scores.float() * 0.3).masked_fill(hidden, float("-inf")).logsumexp(-1)
    check(what + " lse", *(torch.where(some, one, 0.0) for one in (lse, eager_lse, true_lse)))
    assert (lse[~some] == float("inf")).all(), what
    again, ds = same_bits_on_two_threads(softmax_bwd_in_place, scores, dp, *rest)
    assert torch.equal(again, p), what
    check(what + " ds", ds, eager_ds, true_ds)


def attention():
    shapes = ((3, 1, 1), (2, 5, 7), (1, 40, 33), (2, 64, 64), (3, 30, 97), (1, 3, 1000), (2, 4, 0), (0, 4, 5))
    for dtype, (heads, queries, keys), padded in product(DTYPES, shapes, (False, True)):
        for _ in range(1 + 2000 // max(100, heads * queries * keys)):
            attention_case(dtype, heads, queries, keys, padded)
    x = torch.tensor([[[1.0, float("nan"), 2.0], [1.0, 2.0, float("nan")]]])
    p, _ = softmax_in_place(x, torch.tensor([0, 0]), torch.tensor([3, 2]), None, 1.0)
    assert p.isnan().any(-1).tolist() == [[True, False]], "a NaN that is seen is kept, one that is hidden is not"


def eager_attention(q, k, v, hidden, scale):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return eager_softmax(q @ k.mT, hidden, scale) @ v


def fused_attention_case(dtype, B, H, H_kv, T, T_kv, D, causal, masked):
    what = f"fused attention {dtype} {(B, H, H_kv, T, T_kv, D)} causal={causal} masked={masked}"
    q, dout = torch.randn(2, B, T, H, D).to(dtype).transpose(2, 3)
    k, v = torch.randn(2, B, H_kv, T_kv, D + 3).to(dtype)[..., :D]
    position = torch.arange(T)[None] + T_kv - T
    first = torch.zeros_like(position)
    real = torch.rand(B, T_kv) < 0.7 if masked else None
    if masked:
        first = (position - torch.randint(0, T_kv + 1, (B, T))).clamp(min=0)
    j = torch.arange(T_kv)
    hidden = (j < first[:, :, None]) | ((j > position[:, :, None]) if causal else False)
    hidden = (hidden if real is None else hidden | ~real[:, None])[:, None]
    f = partial(eager_attention, hidden=hidden, scale=0.2)
    (eager,), eager_grads = grads(f, (q, k, v), dout)
    (truth,), true_grads = grads(f, (q, k, v), dout, torch.double)
    rest = real, first, 0.2, causal
    out, lse = same_bits_on_two_threads(ops.fused_attention_fwd, q, k, v, *rest)
    check(what + " out", out, eager, truth)
    blind = hidden.all(-1).expand(B, H, T)
    assert (lse[blind] == float("inf")).all() and (out[blind] == 0).all(), what
    scores = q.double() @ k.double().repeat_interleave(H // H_kv, 1).mT * 0.2
    true_lse = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    assert torch.allclose(lse[~blind].double(), true_lse[~blind], atol=1e-5, rtol=1e-5), what
    back = same_bits_on_two_threads(ops.fused_attention_bwd, dout, q, k, v, out, lse, *rest)
    for name, ours, theirs, exact in zip("qkv", back, eager_grads, true_grads, strict=True):
        check(f"{what} d{name}", ours, theirs, exact)
    assert (back[0][blind] == 0).all(), what


def fused_attention():
    """Heads of every kind, numbers that no block, tile or vector divides, keys that some or all queries do not see."""
    shapes = (
        (1, 2, 1, 33, 33, 32, True, False),
        (1, 2, 2, 150, 150, 40, True, True),
        (2, 4, 2, 70, 200, 64, True, True),
        (1, 3, 1, 129, 61, 80, True, False),
        (1, 2, 1, 65, 140, 96, False, True),
        (1, 4, 1, 7, 131, 128, True, False),
        (1, 1, 1, 67, 67, 255, False, False),
        (1, 1, 1, 34, 70, 256, True, True),
        (1, 2, 1, 0, 5, 32, True, False),
        (1, 2, 1, 5, 0, 32, True, False),
    )
    for dtype, shape in product(DTYPES, shapes):
        for _ in range(4):
            fused_attention_case(dtype, *shape)


def accumulated(total, parts):
    total = total.clone()
    ops.accumulate(total[:, 1:], parts)
    return total


def accumulate():
    for dtype, (groups, members, rows, cols) in product(
        DTYPES, ((1, 1, 1, 1), (3, 2, 5, 7), (2, 1, 9, 64), (2, 4, 0, 3))
    ):
        total, parts = torch.randn(groups, rows + 1, cols), torch.randn(groups * members, rows, cols).to(dtype)
        ours = same_bits_on_two_threads(accumulated, total, parts)
        added = parts.unflatten(0, (groups, members))
        eager, truth = total.clone(), total.double()
        eager[:, 1:] += added.float().sum(1)
        truth[:, 1:] += added.double().sum(1)
        check(f"accumulate {dtype} {(groups, members, rows, cols)}", ours, eager, truth)


def tall_product():
    shapes = ((1, 1, 1), (5, 3, 7), (130, 9, 33), (300, 16, 64), (129, 11, 100), (0, 2, 5), (4, 0, 5))
    for dtype, (rows, members, cols), masked in product(DTYPES, shapes, (False, True)):
        for _ in draws(rows, members):
            narrow, wide = torch.randn(rows, members), torch.randn(rows, cols).to(dtype)
            bits = torch.randint(256, (rows, (cols + 7) // 8), dtype=torch.uint8) if masked else None
            seen = wide
            if masked:
                seen = wide * (bits[:, :, None] >> torch.arange(8) & 1).flatten(1)[:, :cols]
            ours = same_bits_on_two_threads(ops.tall_product, narrow, wide, bits)
            what = f"tall_product {dtype} {(rows, members, cols)} masked={masked}"
            check(what, ours, narrow.t() @ seen.float(), narrow.double().t() @ seen.double())


def conversions():
    """Every bf16 and fp16 value survives load and store; every rounding boundary rounds as PyTorch rounds."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1)
        normed, _ = ops.rms_norm_fwd(torch.ones_like(every), every.flatten(), 0.0)  # ones * weight, stored again
        assert torch.equal(normed.isnan(), every.isnan())
        assert torch.equal(normed.nan_to_num(7), every.nan_to_num(7))
        # The middle between any two neighbours and the floats beside it: rope computes 1 * cos, rounded.
        finite = every[every.isfinite()].float()
        middle = ((finite[:-1].double() + finite[1:].double()) / 2).float()
        above, below = torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)
        middle = torch.cat((middle, above, below))
        q = torch.ones(1, 1, middle.numel(), 2, dtype=dtype)
        cos = middle.reshape(1, -1, 1).expand(1, -1, 2).contiguous()
        out, _ = ops.rope(q, q, cos, torch.zeros_like(cos), False)
        assert torch.equal(out[0, 0, :, 0], middle.to(dtype)), f"{dtype} rounding"


def refusals():
    x, w = torch.ones(4, 8), torch.ones(8)
    scale, labels, bad = torch.tensor(1.0), torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 8, 2])
    x4 = x.expand(1, 2, 4, 8)

    def fuse(q=x4, k=x4, v=x4, real=None, first=labels[None]):
        return ops.fused_attention_fwd(q, k, v, real, first, 1.0, True)

    for call, word in (
        (lambda: ops.rms_norm_fwd(x.double(), w, EPS), "x is Double (4, 8)"),
        (lambda: ops.rms_norm_fwd(x.t(), w, EPS), "x is Float (8, 4) with strides (1, 8)"),
        (lambda: ops.rms_norm_fwd(x, w.bfloat16(), EPS), "weight is BFloat16 (8)"),
        (lambda: ops.rms_norm_fwd(x, w[:7], EPS), "weight is Float (7)"),
        (lambda: ops.rms_norm_bwd(x, x, w, w, None, True, False), "rstd is Float (8)"),
        (lambda: ops.rms_norm_bwd(x[:3], x, w, w[:4], None, True, False), "dy is Float (3, 8)"),
        (lambda: ops.rms_norm_bwd(x, x, w, w[:4], x.half(), True, False), "dresidual is Half (4, 8)"),
        (lambda: ops.swiglu_fwd(x, x[:2]), "up is Float (2, 8)"),
        (lambda: ops.rope(x[None, None, :, :7], x[None, None], x[None], x[None], False), "q is Float (1, 1, 4, 7)"),
        (lambda: ops.rope(x[None, None], x[None, None], x[None, :3], x[None], False), "cos is Float (1, 3, 8)"),
        (lambda: ops.cross_entropy_rows(x, bad, scale, False), "not 8 as in row 2"),
        (lambda: ops.cross_entropy_rows(x, labels.int(), scale, False), "labels is Int (4)"),
        (lambda: ops.cross_entropy_rows(x, labels, scale.double(), False), "scale is Double ()"),
        (lambda: ops.dequantize_4bit(x, w, w, None, None, None, 64, 1, 32, x.dtype), "packed is Float (4, 8)"),
        (lambda: ops.dequantize_4bit(labels.byte(), w, w, None, None, None, 64, 1, 8, x.dtype), "code is Float (8)"),
        (lambda: ops.attention_softmax(x, labels, labels, None, 1.0), "scores is Float (4, 8)"),
        (lambda: ops.attention_softmax(x[None], labels[:3], labels, None, 1.0), "first is Long (3)"),
        (lambda: ops.attention_softmax(x[None], labels, labels.int(), None, 1.0), "last is Int (4)"),
        (lambda: ops.attention_softmax(x[None], labels, labels, w.half(), 1.0), "bias is Half (8)"),
        (lambda: ops.attention_softmax_bwd(x[None], x[None, :2], labels, labels, w, 1.0), "dp is Float (1, 2, 8)"),
        (lambda: fuse(q=x4.double()), "q is Double (1, 2, 4, 8)"),
        (lambda: fuse(k=x4[:, :, :, :7]), "k is Float (1, 2, 4, 7)"),
        (lambda: fuse(k=x4[:, :0]), "k is Float (1, 0, 4, 8)"),
        (lambda: fuse(v=x4.half()), "v is Half (1, 2, 4, 8)"),
        (lambda: fuse(real=labels[None].byte()), "real is Byte (1, 4)"),
        (lambda: fuse(first=labels[None].int()), "first is Int (1, 4)"),
        (lambda: ops.fused_attention_bwd(x4, x4, x4, x4, x4, w, None, labels[None], 1.0, True), "lse is Float (8)"),
        (lambda: ops.tall_product(x.half(), x, None), "narrow is Half (4, 8)"),
        (lambda: ops.tall_product(x, x, labels[:, None].byte()[:3]), "mask is Byte (3, 1)"),
        (lambda: ops.accumulate(x[None], x[None, :2]), "total is Float (1, 4, 8)"),
        (lambda: ops.accumulate(x[None].expand(2, 4, 8), x.expand(3, 4, 8).contiguous()), "parts is Float (3, 4, 8)"),
    ):
        try:
            call()
        except RuntimeError as error:
            assert word in str(error), f"{word!r} not in {error}"
        else:
            raise AssertionError(f"accepted: {word}")


if __name__ == "__main__":
    torch.manual_seed(0)
    kernels = (
        rms_norm,
        rope,
        swiglu,
        cross_entropy,
        dequantize_4bit,
        attention,
        fused_attention,
        accumulate,
        tall_product,
    )
    for test in (*kernels, conversions, refusals):
        test()
        assert not (over := [excess for budget in budgets.values() if (excess := budget.excess())]), over
        print(f"{isa().decode()} {test.__name__} ok")
