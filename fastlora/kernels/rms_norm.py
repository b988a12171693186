"""RMSNorm, forward and backward, one row per program; Hugging Face's rounding order."""

from __future__ import annotations

import torch

from ._library import register
from ._tl import launch, next_power_of_2, tl, triton

# Programs that share the weight gradient's rows; their partial sums are added in a fixed order.
_DW_PROGRAMS = 216


@triton.jit
def _rms_norm_fwd_kernel(p_x, p_w, p_y, p_rstd, H, eps, BLOCK_H: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_x = tl.load(p_x + i_m * H + o_h, mask=m_h, other=0.0)
    b_xf = b_x.to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(b_xf * b_xf, axis=0) / H + eps)
    b_w = tl.load(p_w + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_n = (b_xf * rstd).to(b_x.dtype).to(tl.float32)  # x·rstd is rounded before it meets the weight
    tl.store(p_y + i_m * H + o_h, (b_w * b_n).to(p_y.dtype.element_ty), mask=m_h)
    tl.store(p_rstd + i_m, rstd)


@triton.jit
def _rms_norm_bwd_kernel(
    p_dy, p_x, p_w, p_rstd, p_dres, p_dx, p_dw, p_n, M, H, programs,
    NEED_DW: tl.constexpr, HAS_DRES: tl.constexpr, NEED_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_w = tl.load(p_w + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_m in range(i_p, M, programs):
        b_dy = tl.load(p_dy + i_m * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + i_m * H + o_h, mask=m_h, other=0.0)
        rstd = tl.load(p_rstd + i_m)
        b_n = b_x.to(tl.float32) * rstd
        b_g = b_dy * b_w
        b_dx = rstd * (b_g - b_n * (tl.sum(b_g * b_n, axis=0) / H))
        if HAS_DRES:
            b_dx += tl.load(p_dres + i_m * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        tl.store(p_dx + i_m * H + o_h, b_dx.to(p_dx.dtype.element_ty), mask=m_h)
        b_n = b_n.to(b_x.dtype).to(tl.float32)
        if NEED_N:
            tl.store(p_n + i_m * H + o_h, (b_w * b_n).to(p_n.dtype.element_ty), mask=m_h)
        if NEED_DW:
            b_dw += b_dy * b_n
    if NEED_DW:
        tl.store(p_dw + i_p * H + o_h, b_dw, mask=m_h)


def _warps(H: int) -> int:
    return min(16, max(1, next_power_of_2(H) // 1024))


def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, H) = weight · round(x · rstd), and rstd (M,) fp32 = (mean x² + eps)^-½."""
    M, H = x.shape
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    launch(_rms_norm_fwd_kernel, (M,), x, weight, y, rstd, H, eps, BLOCK_H=next_power_of_2(H), num_warps=_warps(H))
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
    need_dw: bool,
    need_n: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (M, H), with dresidual (M, H) added; dweight (H,); y again, in the dtype of dy. What is not needed is (0,)."""
    M, H = x.shape
    dx = torch.empty_like(x)
    n = torch.empty_like(dy) if need_n else dy.new_empty(0)
    programs = min(M, _DW_PROGRAMS) if need_dw else M
    partials = torch.empty((programs if need_dw else 0, H), dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_bwd_kernel,
        (programs,),
        *(dy, x, weight, rstd, dresidual, dx, partials, n, M, H, programs),
        NEED_DW=need_dw,
        HAS_DRES=dresidual is not None,
        NEED_N=need_n,
        BLOCK_H=next_power_of_2(H),
        num_warps=_warps(H),
    )
    return dx, partials.sum(0).to(weight.dtype) if need_dw else weight.new_empty(0), n


def _fwd_aten(x, weight, eps):
    xf = x.float()
    rstd = torch.rsqrt(xf.pow(2).mean(-1) + eps)
    return weight * (xf * rstd[:, None]).to(x.dtype), rstd


def _bwd_aten(dy, x, weight, rstd, dresidual, need_dw, need_n):
    normalised = x.float() * rstd[:, None]
    g = dy.float() * weight.float()
    dx = (g - normalised * (g * normalised).mean(-1, keepdim=True)) * rstd[:, None]
    if dresidual is not None:
        dx += dresidual
    normalised = normalised.to(x.dtype)
    dw = (dy.float() * normalised).sum(0) if need_dw else weight.new_empty(0)
    n = (weight * normalised).to(dy.dtype) if need_n else dy.new_empty(0)
    return dx.to(x.dtype), dw.to(weight.dtype), n


def _fwd_fake(x, weight, eps):
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[0], dtype=torch.float32)


def _bwd_fake(dy, x, weight, rstd, dresidual, need_dw, need_n):
    n = torch.empty_like(dy) if need_n else dy.new_empty(0)
    return torch.empty_like(x), weight.new_empty(weight.shape if need_dw else 0), n


register(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    triton=rms_norm_fwd,
    aten=_fwd_aten,
    fake=_fwd_fake,
    flops=None,
)
register(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual, bool need_dw, bool need_n)"
    " -> (Tensor, Tensor, Tensor)",
    triton=rms_norm_bwd,
    aten=_bwd_aten,
    fake=_bwd_fake,
    flops=None,
)
