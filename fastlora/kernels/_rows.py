"""The shipped rows, as data: kernel × architecture × size of the call, each with where it comes from.

Of a kernel and an architecture the first row that holds the call serves, so the narrowest come first and the last has
no bounds. Architecture 0 is the default, for GPUs without a row of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

SCREENED = "screened"
ANY = 1 << 62


@dataclass(frozen=True)
class Tile:
    """Block sizes along the rows, the columns of the output and the reduction; the most ranks one product takes; warps
    of the program, and stages of its software pipeline."""

    m: int = 1
    n: int = 1
    k: int = 1
    r: int = 64
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        sizes = "×".join(str(size) for size in (self.m, self.n, self.k) if size > 1)
        return f"{sizes} r{self.r} {self.warps}w {self.stages}s" if self.m > 1 else f"{sizes} {self.warps}w"


@dataclass(frozen=True)
class Measured:
    """A row that was timed: medians in ms, of the winner and of the best of what lost."""

    gpu: str
    date: str
    torch: str
    triton: str
    ms: float
    runner_up: str
    runner_up_ms: float

    def __str__(self) -> str:
        against = f"{self.ms:.4g} ms, {self.runner_up} {self.runner_up_ms:.4g} ms"
        return f"measured on {self.gpu}, {self.date}, torch {self.torch}, triton {self.triton}: {against}"


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        kernel, arch: what it is for. Kernels whose name ends in "_fp32" run without tensor cores.
        tile: block sizes.
        method: "triton", or another where that is the safer bet: a name in METHODS of `_tiles.py`.
        m, n, r: it holds calls of up to as many rows, columns of the output, and ranks.
        provenance: SCREENED: compiled for the architecture, no spills, within its shared memory, best by the static
            model (docs/tuning.md); or Measured.
    """

    kernel: str
    arch: int
    tile: Tile
    method: str = "triton"
    m: int = ANY
    n: int = ANY
    r: int = ANY
    provenance: str | Measured = field(default=SCREENED)

    @property
    def source(self) -> str:
        """The provenance in words: of another method, which nothing screens, that nobody has measured it."""
        if self.method != "triton" and self.provenance == SCREENED:
            return "the safe bet, not measured"
        return str(self.provenance)


# The calls of Llama 2 7B with rank 16, at 1024 and 4096 tokens; where a tile won both, the time is that at 4096.
_H200 = partial(Measured, "NVIDIA H200", "2026-11-27", "2.11.0+cu130", "3.6.0")
_FEWER_LAUNCHES = "measured on NVIDIA H200, 2026-11-27: by itself the library is faster, but takes more launches"

ROWS = (
    Row("lora_gemm", 80, Tile(m=128, n=128, k=32, r=16, stages=4), m=1024),
    Row("lora_gemm", 80, Tile(m=128, n=256, k=64, r=16, warps=8, stages=4)),
    Row("lora_gemm", 90, Tile(m=128, n=256, k=64, r=32, warps=8, stages=4), m=1024, n=4096, r=16,
        provenance=_H200(0.0576, "addmm", 0.0639)),
    # Up to 1024 rows the host is the limit: one launch is better than several, though the GPU takes longer for it.
    Row("lora_gemm", 90, Tile(m=128, n=128, k=64, r=16, warps=8, stages=3), m=1024, provenance=_FEWER_LAUNCHES),
    Row("lora_gemm", 90, Tile(m=128, n=256, k=64, r=32, warps=8, stages=4), "addmm",
        provenance=_H200(1.246, "triton 128×128×32 r32 8w 4s", 1.278)),
    Row("lora_gemm", 100, Tile(m=128, n=128, k=32, r=32, warps=8, stages=4), "addmm"),
    Row("lora_gemm", 0, Tile(m=128, n=128, k=32, r=32, stages=4), "addmm"),
    Row("lora_gemm_fp32", 0, Tile(m=32, n=32, k=32, r=16), "addmm"),
    Row("lora_gemm_rotary", 80, Tile(m=128, n=256, k=64, r=16, warps=8, stages=4)),
    Row("lora_gemm_rotary", 90, Tile(m=128, n=256, k=64, r=16, warps=8, stages=4), m=1024,
        provenance=_H200(0.1648, "addmm", 0.1746)),
    Row("lora_gemm_rotary", 90, Tile(m=128, n=256, k=64, r=16, warps=8, stages=4), "addmm",
        provenance=_H200(0.6344, "triton 128×256×64 r16 8w 4s", 0.6778)),
    Row("lora_gemm_rotary", 0, Tile(m=128, n=128, k=32, r=32, warps=8, stages=4), "addmm"),
    Row("lora_gemm_rotary_fp32", 0, Tile(m=16, n=128, k=16, r=16, warps=8), "addmm"),
    Row("lora_gemm_t", 80, Tile(m=128, n=128, k=32, r=16, stages=4), m=1024),
    Row("lora_gemm_t", 80, Tile(m=128, n=256, k=64, r=16, warps=8, stages=4)),
    Row("lora_gemm_t", 90, Tile(m=128, n=256, k=64, r=32, warps=8, stages=4), m=1024,
        provenance=_H200(0.2603, "triton 128×128×32 r16 8w 4s", 0.2703)),
    # By itself the kernel wins (1.032 and 1.059 ms); in a step of 32 layers it takes 75 ms and cuBLAS 71, and
    # attention's backward after it 26 ms and 22.
    Row("lora_gemm_t", 90, Tile(m=128, n=256, k=32, r=16, warps=8, stages=4), "addmm",
        provenance="measured on NVIDIA H200, 2026-11-27, in steps of 4096 tokens"),
    Row("lora_gemm_t", 0, Tile(m=128, n=128, k=32, r=32, stages=4), "addmm"),
    Row("lora_gemm_t_fp32", 0, Tile(m=32, n=32, k=32, r=16), "addmm"),
    Row("lora_gemm_t_dropout", 80, Tile(m=64, n=128, k=32, r=32, warps=8, stages=4)),
    Row("lora_gemm_t_dropout", 90, Tile(m=64, n=64, k=32, r=32, stages=4), "addmm"),
    Row("lora_gemm_t_dropout", 0, Tile(m=64, n=128, k=32, r=32, warps=8, stages=4), "addmm"),
    Row("lora_gemm_t_dropout_fp32", 0, Tile(m=32, n=32, k=32, r=16), "addmm"),
    Row("lora_project", 80, Tile(m=16, k=64, stages=3), m=1024, r=48),
    Row("lora_project", 80, Tile(m=32, k=128, stages=3), r=48),
    Row("lora_project", 80, Tile(m=16, k=64, stages=3), m=512),
    Row("lora_project", 80, Tile(m=32, k=128, stages=3), m=2048),
    Row("lora_project", 80, Tile(m=64, k=128)),
    Row("lora_project", 0, Tile(m=32, k=128, stages=3)),
    Row("lora_project_fp32", 0, Tile(m=16, k=32, r=16)),
    Row("lora_project_dropout", 80, Tile(m=16, k=64, r=32, stages=3), m=1024, r=48),
    Row("lora_project_dropout", 80, Tile(m=32, k=64, r=32, stages=3), r=48),
    Row("lora_project_dropout", 80, Tile(m=32, k=64, r=32, stages=3), m=1024),
    Row("lora_project_dropout", 80, Tile(m=64, k=64, stages=3)),
    Row("lora_project_dropout", 0, Tile(m=32, k=64, r=32, stages=3)),
    Row("lora_project_dropout_fp32", 0, Tile(m=16, k=32, r=16, warps=8)),
    Row("lora_project_t", 80, Tile(m=16, k=128, stages=3), m=1024, r=48),
    Row("lora_project_t", 80, Tile(m=32, k=128, stages=3)),
    Row("lora_project_t", 90, Tile(m=32, k=128, stages=3), m=1024,
        provenance=_H200(0.0234, "triton 16×128 r64 4w 3s", 0.0243)),
    Row("lora_project_t", 90, Tile(m=64, k=128, stages=3), provenance=_H200(0.0652, "triton 32×128 r64 4w 3s", 0.0675)),
    Row("lora_project_t", 0, Tile(m=32, k=128, stages=3)),
    Row("lora_project_t_fp32", 0, Tile(m=16, k=32, r=16)),
    Row("rms_norm_project", 80, Tile(m=16, k=128, stages=3), r=48),
    Row("rms_norm_project", 80, Tile(m=32, k=128, stages=3), m=512),
    Row("rms_norm_project", 80, Tile(m=64, k=64, stages=3)),
    Row("rms_norm_project", 90, Tile(m=16, k=64, stages=3), m=1024, provenance=_FEWER_LAUNCHES),
    Row("rms_norm_project", 90, Tile(m=32, k=128, stages=3), "aten",
        provenance=_H200(0.0395, "triton 32×128 r64 4w 3s", 0.076)),
    Row("rms_norm_project", 0, Tile(m=32, k=128, stages=3)),
    Row("rms_norm_project_fp32", 0, Tile(m=16, k=32, r=16)),
    Row("rms_norm_project_dropout", 80, Tile(m=16, k=64, r=32, stages=3), m=1024, r=48),
    Row("rms_norm_project_dropout", 80, Tile(m=32, k=64, r=32, stages=3), r=48),
    Row("rms_norm_project_dropout", 80, Tile(m=32, k=64, stages=3), m=512),
    Row("rms_norm_project_dropout", 80, Tile(m=64, k=64, r=32, stages=3)),
    Row("rms_norm_project_dropout", 0, Tile(m=32, k=64, r=32, stages=3)),
    Row("rms_norm_project_dropout_fp32", 0, Tile(m=16, k=32, r=16)),
    Row("swiglu_project", 80, Tile(m=16, k=128, stages=3), r=48),
    Row("swiglu_project", 80, Tile(m=16, k=128, stages=3), m=1024),
    Row("swiglu_project", 80, Tile(m=32, k=128, stages=3)),
    Row("swiglu_project", 90, Tile(m=32, k=128), "aten", provenance=_H200(0.1025, "triton 32×64 r64 4w 2s", 0.2816)),
    Row("swiglu_project", 100, Tile(m=32, k=64, stages=3)),
    Row("swiglu_project", 0, Tile(m=32, k=128, stages=3)),
    Row("swiglu_project_fp32", 0, Tile(m=16, k=32, r=16)),
    Row("swiglu_project_dropout", 80, Tile(m=16, k=128, r=32, stages=3), r=48),
    Row("swiglu_project_dropout", 80, Tile(m=32, k=64, r=32, stages=3)),
    Row("swiglu_project_dropout", 0, Tile(m=32, k=64, r=32, stages=3)),
    Row("swiglu_project_dropout_fp32", 0, Tile(m=16, k=32, r=16)),
    Row("lora_reduce", 90, Tile(m=64, n=128, stages=3), provenance=_H200(0.0197, "triton 64×64 r64 4w 3s", 0.0209)),
    Row("lora_reduce", 0, Tile(m=64, n=128, stages=3)),
    Row("lora_reduce_fp32", 0, Tile(m=32, n=32, r=16)),
    Row("lora_reduce_dropout", 0, Tile(m=32, n=64, r=32)),
    Row("lora_reduce_dropout_fp32", 0, Tile(m=16, n=32, r=16, warps=8)),
    Row("rms_norm_reduce", 90, Tile(m=64, n=128, stages=3), provenance=_H200(0.056, "triton 64×64 r64 4w 3s", 0.057)),
    Row("rms_norm_reduce", 0, Tile(m=64, n=128, stages=3)),
    Row("rms_norm_reduce_fp32", 0, Tile(m=32, n=32, r=16)),
    Row("rms_norm_reduce_dropout", 0, Tile(m=32, n=64, r=16)),
    Row("rms_norm_reduce_dropout_fp32", 0, Tile(m=16, n=32, r=16, warps=8)),
    Row("swiglu_reduce", 90, Tile(m=64, n=64, r=16, warps=8)),
    Row("swiglu_reduce", 100, Tile(m=64, n=64, r=16, warps=8)),
    Row("swiglu_reduce", 0, Tile(m=32, n=64, r=16)),
    Row("swiglu_reduce_fp32", 0, Tile(m=16, n=32, r=16)),
    Row("swiglu_reduce_dropout", 0, Tile(m=32, n=64, r=16, warps=8)),
    Row("swiglu_reduce_dropout_fp32", 0, Tile(m=16, n=32, r=16)),
    Row("lora_reduce_t", 90, Tile(m=64, n=128, warps=8, stages=3), m=1024,
        provenance=_H200(0.0178, "triton 64×128 r64 4w 3s", 0.0179)),
    Row("lora_reduce_t", 90, Tile(m=64, n=64, stages=3), provenance=_H200(0.0396, "triton 64×64 r64 8w 3s", 0.04)),
    Row("lora_reduce_t", 0, Tile(m=64, n=128, warps=8, stages=3)),
    Row("lora_reduce_t_fp32", 0, Tile(m=32, n=32, r=16)),
    Row("swiglu", 0, Tile(n=1024)),
    Row("dequantize_4bit", 0, Tile(n=1024)),  # n bytes, of two elements
    # m queries by n keys, by head dimension up to 64, 128 and 256; decode: at most 16 queries. Padding takes
    # registers in the forward.
    Row("flash_attention_decode", 0, Tile(m=16, n=32)),
    Row("flash_attention_fwd_d64", 100, Tile(m=64, n=64, warps=8)),
    Row("flash_attention_fwd_d64", 0, Tile(m=128, n=64, warps=8, stages=3)),
    Row("flash_attention_fwd_d64_fp32", 0, Tile(m=64, n=32, warps=8, stages=1)),
    Row("flash_attention_fwd_d128", 90, Tile(m=64, n=64, stages=3),
        provenance=_H200(0.3479, "triton 128×64 r64 8w 3s", 0.3511)),
    Row("flash_attention_fwd_d128", 0, Tile(m=128, n=64, warps=8, stages=3)),
    Row("flash_attention_fwd_d128_fp32", 80, Tile(m=32, n=32, warps=8, stages=1)),
    Row("flash_attention_fwd_d128_fp32", 0, Tile(m=32, n=16, warps=8, stages=1)),
    Row("flash_attention_fwd_d256", 0, Tile(m=64, n=32, warps=8)),
    Row("flash_attention_fwd_d256_fp32", 100, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_fwd_d256_fp32", 0, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_fwd_d128_padded", 0, Tile(m=128, n=32, warps=8, stages=3)),
    Row("flash_attention_dq_d64", 0, Tile(m=64, n=32, stages=3)),
    Row("flash_attention_dq_d64_fp32", 0, Tile(m=32, n=32, warps=8, stages=1)),
    Row("flash_attention_dq_d128", 90, Tile(m=64, n=64), provenance=_H200(1.3095, "triton 64×32 r64 4w 3s", 1.3146)),
    Row("flash_attention_dq_d128", 0, Tile(m=64, n=32)),
    Row("flash_attention_dq_d128_fp32", 80, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_dq_d128_fp32", 0, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_dq_d256", 80, Tile(m=64, n=32, warps=8)),
    Row("flash_attention_dq_d256", 90, Tile(m=32, n=32, warps=8)),
    Row("flash_attention_dq_d256", 0, Tile(m=64, n=16, warps=8)),
    Row("flash_attention_dq_d256_fp32", 90, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_dq_d256_fp32", 0, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_dkdv_d64", 0, Tile(m=32, n=128, warps=8)),
    Row("flash_attention_dkdv_d64_fp32", 0, Tile(m=32, n=16, warps=8, stages=1)),
    Row("flash_attention_dkdv_d128", 90, Tile(m=16, n=128, warps=8, stages=3),
        provenance=_H200(1.3137, "triton 64×64 r64 8w 2s", 1.5381)),
    Row("flash_attention_dkdv_d128", 100, Tile(m=16, n=64, warps=8)),
    Row("flash_attention_dkdv_d128", 0, Tile(m=64, n=64, warps=8)),
    Row("flash_attention_dkdv_d128_fp32", 90, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_dkdv_d128_fp32", 0, Tile(m=16, n=64, warps=8, stages=1)),
    Row("flash_attention_dkdv_d256", 0, Tile(m=32, n=32, warps=8)),
    Row("flash_attention_dkdv_d256_fp32", 80, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_dkdv_d256_fp32", 0, Tile(m=32, n=16, warps=8, stages=1)),
    # Philox takes registers in all three.
    Row("flash_attention_fwd_d64_dropout", 0, Tile(m=128, n=64, warps=8)),
    Row("flash_attention_fwd_d64_dropout_fp32", 0, Tile(m=64, n=32, warps=8, stages=1)),
    Row("flash_attention_fwd_d128_dropout", 0, Tile(m=128, n=32, warps=8)),
    Row("flash_attention_fwd_d128_dropout_fp32", 90, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_fwd_d128_dropout_fp32", 100, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_fwd_d128_dropout_fp32", 0, Tile(m=32, n=32, warps=8, stages=1)),
    Row("flash_attention_fwd_d256_dropout", 0, Tile(m=64, n=32, warps=8)),
    Row("flash_attention_fwd_d256_dropout_fp32", 100, Tile(m=16, n=16, warps=2, stages=1)),
    Row("flash_attention_fwd_d256_dropout_fp32", 0, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_dq_d64_dropout", 0, Tile(m=64, n=32)),
    Row("flash_attention_dq_d64_dropout_fp32", 90, Tile(m=32, n=16, warps=8, stages=1)),
    Row("flash_attention_dq_d64_dropout_fp32", 0, Tile(m=32, n=32, warps=8, stages=1)),
    Row("flash_attention_dq_d128_dropout", 0, Tile(m=64, n=32, warps=8)),
    Row("flash_attention_dq_d128_dropout_fp32", 0, Tile(m=16, n=16, stages=1)),
    Row("flash_attention_dq_d256_dropout", 0, Tile(m=32, n=32, warps=8)),
    Row("flash_attention_dq_d256_dropout_fp32", 0, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_dkdv_d64_dropout", 0, Tile(m=16, n=128, warps=8)),
    Row("flash_attention_dkdv_d64_dropout_fp32", 90, Tile(m=16, n=16, warps=8, stages=1)),
    Row("flash_attention_dkdv_d64_dropout_fp32", 100, Tile(m=32, n=16, stages=1)),
    Row("flash_attention_dkdv_d64_dropout_fp32", 0, Tile(m=32, n=16, warps=8, stages=1)),
    Row("flash_attention_dkdv_d128_dropout", 90, Tile(m=16, n=64, warps=8)),
    Row("flash_attention_dkdv_d128_dropout", 100, Tile(m=16, n=64, warps=8)),
    Row("flash_attention_dkdv_d128_dropout", 0, Tile(m=32, n=64, warps=8)),
    Row("flash_attention_dkdv_d128_dropout_fp32", 0, Tile(m=16, n=32, warps=8, stages=1)),
    Row("flash_attention_dkdv_d256_dropout", 0, Tile(m=32, n=32, warps=8)),
    Row("flash_attention_dkdv_d256_dropout_fp32", 0, Tile(m=16, n=16, warps=8, stages=1)),
    Row("cross_entropy", 90, Tile(n=8192, warps=8), provenance=_H200(0.234, "triton 4096 8w", 0.2427)),
    Row("cross_entropy", 0, Tile(n=4096, warps=8)),
    # Which attention runs, and on a CPU: docs/decisions/attention.md.
    Row("attention", 90, Tile(), "flash_attention_3"),
    Row("attention", 0, Tile(), "sdpa"),
    Row("attention_cpu", 0, Tile(), "fastlora"),
    Row("attention_aten", 0, Tile(), "fastlora"),
    Row("attention_aten_fp32", 0, Tile(), "sdpa"),
    Row("attention_padded", 0, Tile(), "fastlora"),
    Row("attention_packed", 0, Tile(), "fastlora"),
)  # fmt: skip
