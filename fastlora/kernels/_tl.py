"""Triton itself, the one launch function, and device helpers that two or more kernels call."""

from __future__ import annotations

from typing import Any

import torch

from ._tiles import Choice, LaunchFailed, tf32

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for macOS and Windows comes without Triton; the CPU kernels do not need it

    class _NoTriton:
        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = _NoTriton()  # type: ignore[assignment]


# Kernels that Triton has compiled, and their compile-time arguments; by all that it would compile anew for.
_loaded: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, choice: Choice | None = None, **meta: Any) -> None:
    """Run ``kernel[grid](*args, **meta)`` on the device of the first argument; an empty grid runs nothing.

    choice gives the warps and the stages, and is what a failure is blamed on. Every Triton launch of the library passes
    here, so compilation ahead of time and counting need one seam. A kernel that ran before with arguments of the same
    kind is started without asking Triton again, which would take another 5 to 15 µs.

    Raises:
        LaunchFailed: the kernel does not compile, or not launch, in the tile chosen.
    """
    if 0 in grid:
        return
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    device = first.device
    on_gpu = device.type == "cuda"
    way = (choice.tile.warps, choice.tile.stages) if choice else ()
    key = (kernel, device, way, kinds(args), tuple(meta.items())) if on_gpu else ()
    if key in _loaded and device.index == torch.cuda.current_device() and not _watched(kernel):
        compiled, constants = _loaded[key]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        words = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(*(*grid, 1, 1)[:3], stream, *words, *args, *constants)
        return
    with torch.cuda.device(device) if on_gpu else torch.device(device):
        try:
            compiled = kernel[grid](*args, **options(choice, dict(meta)))
        except Exception as error:
            if choice is None or device.type == "cpu" or not _is_the_tiles_fault(error):
                raise
            raise LaunchFailed(choice, error) from error
    if on_gpu and compiled is not None:  # a hook of Triton's may keep it from compiling
        _loaded[key] = compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])


def kinds(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of its arguments: dtypes and alignment of tensors, and of integers their width
    and whether they are 1 or multiples of 16."""
    return tuple([_kind(value) for value in args])


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    if isinstance(value, tuple):
        return kinds(value)
    return type(value)


def _watched(kernel: Any) -> bool:
    """Whether somebody wants to see every launch, such as Triton's profiler."""
    runtime = triton.knobs.runtime
    return bool(kernel.pre_run_hooks or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def options(choice: Choice | None, meta: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a launch: meta, with the warps and stages of the choice."""
    if choice is not None:
        meta |= {"num_warps": choice.tile.warps, "num_stages": choice.tile.stages}
    # Passed explicitly: Triton announces another default for the next version.
    return {"enable_fp_fusion": True} | meta


# What an earlier kernel did, or what another tile would not mend.
_NOT_THE_TILE = ("out of memory", "illegal", "misaligned", "assert", "unspecified launch failure", "uncorrectable")


def _is_the_tiles_fault(error: Exception) -> bool:
    """Whether another tile may run where this one did not: it does not compile, or asks for more than the GPU has."""
    if isinstance(error, (triton.CompilationError, triton.OutOfResources, triton.runtime.errors.PTXASError)):
        return True
    if type(error) is not RuntimeError:  # torch's own, out of memory among them, derive from it
        return False
    return not any(words in str(error) for words in _NOT_THE_TILE)


def require_no_capture(what: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured: a replay would draw the same seed again."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what}: its seed is drawn on the host, and every replay of a CUDA graph would repeat it")


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is ≥ n; 1 for n ≤ 1."""
    return 1 << max(0, n - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """What tl.dot does with fp32 operands: the user's own ``torch.backends.cuda.matmul`` setting."""
    return "tf32" if dtype == torch.float32 and tf32() else "ieee"


@triton.jit
def swizzle(pid, grid_m, grid_n, GROUP_M: tl.constexpr):
    """Tile coordinates of program pid, in groups of GROUP_M rows of tiles so that operands stay in L2."""
    width = GROUP_M * grid_n
    group = pid // width
    rows = tl.minimum(grid_m - group * GROUP_M, GROUP_M)
    i_m = group * GROUP_M + (pid % width) % rows
    i_n = (pid % width) // rows
    return i_m, i_n


@triton.jit
def normalised(b_x, b_rstd, b_w):
    """w · (x · rstd) of a tile in Hugging Face's rounding: x · rstd takes the dtype of x first; b_w (1, n) fp32."""
    return b_w * (b_x.to(tl.float32) * b_rstd[:, None]).to(b_x.dtype).to(tl.float32)


@triton.jit
def silu_mul(b_gate, b_up):
    """silu(gate) · up in the dtype of gate, in Hugging Face's rounding: silu(gate) is rounded before it meets up."""
    b_gf = b_gate.to(tl.float32)
    b_silu = (b_gf * tl.sigmoid(b_gf)).to(b_gate.dtype).to(tl.float32)
    return (b_silu * b_up.to(tl.float32)).to(b_gate.dtype)
