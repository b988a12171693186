"""Cross-entropy of a linear head, a chunk of rows at a time; the gradient is made in the forward."""

from __future__ import annotations

import torch

from . import _flops
from ._library import register
from ._tiles import choose
from ._tl import launch, next_power_of_2, tl, triton

_CPU_ROWS = 256
_GPU_BYTES = 1 << 28


def chunk_rows(device: str, vocab: int, itemsize: int) -> int:
    """Rows of logits alive at once: as few as a CPU's matrix product keeps its rate with; 256 MB to fill a GPU."""
    return _CPU_ROWS if device == "cpu" else max(1, _GPU_BYTES // (vocab * itemsize))


@triton.jit
def _cross_entropy_rows_kernel(p_logits, p_labels, p_scale, p_loss, V, NEED_GRAD: tl.constexpr, BLOCK_V: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_m * V
    label = tl.load(p_labels + i_m)
    o_v = tl.arange(0, BLOCK_V)
    b_max = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
    for i_v in range(0, V, BLOCK_V):
        b_x = tl.load(p_row + i_v + o_v, mask=i_v + o_v < V, other=float("-inf")).to(tl.float32)
        b_max = tl.maximum(b_max, b_x)
    top = tl.max(b_max, axis=0)
    b_sum = tl.zeros([BLOCK_V], dtype=tl.float32)
    b_hit = tl.zeros([BLOCK_V], dtype=tl.float32)
    for i_v in range(0, V, BLOCK_V):
        b_x = tl.load(p_row + i_v + o_v, mask=i_v + o_v < V, other=float("-inf")).to(tl.float32)
        b_sum += tl.exp(b_x - top)
        b_hit += tl.where(i_v + o_v == label, b_x, 0.0)
    total = tl.sum(b_sum, axis=0)
    # Not through lse = top + log(total): rounded at the size of a logit, it would scale the whole row.
    # A label outside [0, V) makes loss and gradient NaN: an error on the GPU must be seen, not averaged away.
    valid = tl.where((label >= 0) & (label < V), 1.0, float("nan"))
    loss = (tl.log(total) + (top - tl.sum(b_hit, axis=0))) * valid
    tl.store(p_loss + i_m, loss)
    if NEED_GRAD:
        scale = tl.load(p_scale) * valid
        for i_v in range(0, V, BLOCK_V):
            b_x = tl.load(p_row + i_v + o_v, mask=i_v + o_v < V, other=float("-inf")).to(tl.float32)
            b_d = (tl.exp(b_x - top) / total - tl.where(i_v + o_v == label, 1.0, 0.0)) * scale
            tl.store(p_row + i_v + o_v, b_d.to(p_logits.dtype.element_ty), mask=i_v + o_v < V)


def cross_entropy_rows(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, need_grad: bool
) -> torch.Tensor:
    """loss (M,) fp32 = logsumexp(row) − row[label]; with need_grad, logits become (softmax − onehot) · scale."""
    M, V = logits.shape
    loss = torch.empty(M, dtype=torch.float32, device=logits.device)
    choice = choose("cross_entropy", logits, m=M, n=V)
    launch(
        _cross_entropy_rows_kernel,
        (M,),
        *(logits, labels, scale, loss, V),
        choice=choice,
        NEED_GRAD=need_grad,
        BLOCK_V=min(choice.tile.n, next_power_of_2(V)),
    )
    return loss


def _rows_aten(logits, labels, scale, need_grad):
    x = logits.float()
    loss = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    if need_grad:
        x = torch.softmax(x, -1)
        x.scatter_add_(1, labels[:, None], x.new_full((len(labels), 1), -1.0))
        logits.copy_(x.mul_(scale))
    return loss


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b in fp32: straight from the accumulators where cuBLAS offers it."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def linear_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss per row (M,) fp32, and scale · dloss/dhidden (M, H), scale · dloss/dweight (V, H) fp32, (0,) if not needed.

    Rows labelled ignore_index reach no matrix product; their loss and gradient are 0. Counting the others waits for
    the GPU once.
    """
    M, V = hidden.shape[0], weight.shape[0]
    loss = torch.zeros(M, dtype=torch.float32, device=hidden.device)
    dh = torch.zeros_like(hidden) if need_dh else hidden.new_empty(0)
    dw = torch.zeros_like(weight, dtype=torch.float32) if need_dw else weight.new_empty(0, dtype=torch.float32)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if hidden.device.type == "cpu" and len(rows):
        low, high = labels[rows].aminmax()
        if low < 0 or high >= V:
            raise IndexError(f"linear_cross_entropy: labels must be in [0, {V}), got {int(low if low < 0 else high)}")
    chunk = chunk_rows(hidden.device.type, V, hidden.element_size())
    for start in range(0, len(rows), chunk):
        # A run of consecutive rows is sliced, not gathered.
        index = slice(start, start + chunk) if len(rows) == M else rows[start : start + chunk]
        h = hidden[index]
        logits = h @ weight.t()
        loss[index] = torch.ops.fastlora.cross_entropy_rows(logits, labels[index], scale, need_dh or need_dw)
        if need_dh:
            dh[index] = logits @ weight
        if need_dw:
            dw += _product_fp32(logits.t(), h)
        del logits  # before the next are made
    return loss, dh, dw


def _fwd_fake(hidden, weight, labels, scale, ignore_index, need_dh, need_dw):
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        torch.empty_like(hidden) if need_dh else hidden.new_empty(0),
        weight.new_empty(weight.shape if need_dw else 0, dtype=torch.float32),
    )


register(
    "cross_entropy_rows(Tensor(a!) logits, Tensor labels, Tensor scale, bool need_grad) -> Tensor",
    triton=cross_entropy_rows,
    aten=_rows_aten,
    fake=lambda logits, labels, scale, need_grad: logits.new_empty(logits.shape[0], dtype=torch.float32),
    flops=None,
)
register(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor labels, Tensor scale, int ignore_index,"
    " bool need_dh, bool need_dw) -> (Tensor, Tensor, Tensor)",
    triton=linear_cross_entropy_fwd,
    aten=linear_cross_entropy_fwd,
    fake=_fwd_fake,
    flops=_flops.linear_cross_entropy,
    cuda_graphs=False,
)
