"""Rotary position embedding of q and k together, one (batch, token) per program, any strides but the last."""

from __future__ import annotations

import torch

from ._library import register
from ._tl import launch, next_power_of_2, tl, triton


@triton.jit
def _rotate(p_in, p_out, stride_in, stride_out, o_d, m_d, D2, b_c1, b_c2, b_s1, b_s2, HEADS, BLOCK_HEADS: tl.constexpr):
    o_h = tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
    mask = (o_h < HEADS) & m_d
    p_1 = p_in + o_h * stride_in + o_d
    b_1 = tl.load(p_1, mask=mask, other=0.0).to(tl.float32)
    b_2 = tl.load(p_1 + D2, mask=mask, other=0.0).to(tl.float32)
    p_1 = p_out + o_h * stride_out + o_d
    tl.store(p_1, (b_1 * b_c1 - b_2 * b_s1).to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_1 + D2, (b_2 * b_c2 + b_1 * b_s2).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    p_q, p_k, p_cos, p_sin, p_oq, p_ok,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_oqb, stride_oqh, stride_oqt, stride_okb, stride_okh, stride_okt,
    T, D2, HQ, HK, stride_cb,
    INVERSE: tl.constexpr, BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) // T
    i_t = tl.program_id(0).to(tl.int64) % T
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D2
    p_c = p_cos + i_b * stride_cb + i_t * 2 * D2 + o_d
    p_s = p_sin + i_b * stride_cb + i_t * 2 * D2 + o_d
    b_c1 = tl.load(p_c, mask=m_d, other=0.0).to(tl.float32)
    b_c2 = tl.load(p_c + D2, mask=m_d, other=0.0).to(tl.float32)
    b_s1 = tl.load(p_s, mask=m_d, other=0.0).to(tl.float32)
    b_s2 = tl.load(p_s + D2, mask=m_d, other=0.0).to(tl.float32)
    if INVERSE:  # the transpose: sines change sides and sign
        b_s1, b_s2 = -b_s2, -b_s1
    p_q += i_b * stride_qb + i_t * stride_qt
    p_oq += i_b * stride_oqb + i_t * stride_oqt
    _rotate(p_q, p_oq, stride_qh, stride_oqh, o_d, m_d, D2, b_c1, b_c2, b_s1, b_s2, HQ, BLOCK_HQ)
    p_k += i_b * stride_kb + i_t * stride_kt
    p_ok += i_b * stride_okb + i_t * stride_okt
    _rotate(p_k, p_ok, stride_kh, stride_okh, o_d, m_d, D2, b_c1, b_c2, b_s1, b_s2, HK, BLOCK_HK)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q (B, H, T, D) and k (B, H_kv, T, D) in the strides of the inputs; ``inverse`` is the gradient."""
    B, HQ, T, D = q.shape
    HK = k.shape[1]
    oq, ok = torch.empty_like(q), torch.empty_like(k)
    launch(
        _rope_kernel,
        (B * T,),
        *(q, k, cos, sin, oq, ok),
        *q.stride()[:3],
        *k.stride()[:3],
        *oq.stride()[:3],
        *ok.stride()[:3],
        *(T, D // 2, HQ, HK, cos.stride(0) if cos.shape[0] > 1 else 0),
        INVERSE=inverse,
        BLOCK_HQ=next_power_of_2(HQ),
        BLOCK_HK=next_power_of_2(HK),
        BLOCK_D=next_power_of_2(D // 2),
        num_warps=4,
    )
    return oq, ok


def _aten_one(x, cos, sin, inverse):
    cos, sin = cos[:, None].float(), sin[:, None].float()
    half = x.shape[-1] // 2
    (x1, x2), (s1, s2) = x.float().split(half, -1), sin.split(half, -1)
    rotated = torch.cat((x2 * s2, -x1 * s1) if inverse else (-x2 * s1, x1 * s2), -1)
    return torch.empty_like(x).copy_(x.float() * cos + rotated)


def _aten(q, k, cos, sin, inverse):
    return _aten_one(q, cos, sin, inverse), _aten_one(k, cos, sin, inverse)


def _fake(q, k, cos, sin, inverse):
    return torch.empty_like(q), torch.empty_like(k)


register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    triton=rope,
    aten=_aten,
    fake=_fake,
    flops=None,
)
