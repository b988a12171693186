"""Offsets past 2³¹ elements, without the memory: where the first and last programs of each launch read and write.

The launchers run on meta tensors of real sizes. Of each launch the corner programs are run by Triton's interpreter on
made-up addresses, with loads and stores that only write down where they go. An offset that is computed in 32 bits fails
in the interpreter's own overflow check, lands outside its tensor, or misses the tensor's end.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fastlora.kernels._library import INTERPRET

if not INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 only", allow_module_level=True)

from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _get_np_dtype

from fastlora.kernels import dequantize_4bit as dequantize
from fastlora.kernels import dropout, linear_cross_entropy, rms_norm, rope, swiglu, swiglu_reduce
from fastlora.kernels import flash_attention as attention
from fastlora.kernels import lora_gemm as gemm
from fastlora.kernels import lora_project as project
from fastlora.kernels import lora_reduce as reduce
from fastlora.kernels._tl import tl, triton

FAR = 2**31
_SPACING = 48  # bits between the addresses of two tensors


@dataclass
class Pointer:
    """What a kernel gets for a tensor: its dtype, an address far from all others, and what was touched there."""

    tensor: torch.Tensor
    number: int
    low: int = FAR**2
    high: int = -1

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def data_ptr(self) -> int:
        return self.number << _SPACING

    def touch(self, offsets: np.ndarray) -> None:
        self.low, self.high = min(self.low, int(offsets.min())), max(self.high, int(offsets.max()))


def typed_range(*bounds):
    """The builtin gives Python integers, of no width; compiled, the variable has the width of the widest bound."""
    kind = tl.int64 if any(isinstance(b, tl.tensor) and b.dtype == tl.int64 for b in bounds) else tl.int32
    for value in range(*map(int, bounds)):
        yield tl.core.tensor(TensorHandle(np.array([value], _get_np_dtype(kind)), kind), kind)


@dataclass
class Spy:
    """Stands for _tl.launch. `pointers` are the tensors of the last launch."""

    pointers: list[Pointer] = field(default_factory=list)
    program: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()

    def launch(self, kernel, grid, *args, **meta):
        self.pointers, self.grid = [], grid

        def stand_in(argument):
            if isinstance(argument, tuple):
                return tuple(map(stand_in, argument))
            if not isinstance(argument, torch.Tensor):
                return argument
            self.pointers.append(Pointer(argument, len(self.pointers) + 1))
            return self.pointers[-1]

        args = stand_in(args)
        for self.program in itertools.product(*({0, size - 1} for size in grid)):
            kernel[(1,)](*args, **meta)
        assert any([self.judge(kernel.fn.__name__, pointer) for pointer in self.pointers]), "no tensor is far"

    def record(self, builder, pointers, mask):
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        for number in np.unique(addresses >> np.uint64(_SPACING)):
            near = addresses[addresses >> np.uint64(_SPACING) == number]
            assert 0 < number <= len(self.pointers), f"an address of no tensor: {int(near[0]):#x}"
            self.pointers[int(number) - 1].touch(near & np.uint64((1 << _SPACING) - 1))

    @staticmethod
    def judge(kernel: str, pointer: Pointer) -> bool:
        """Whether the tensor is a far one that was used."""
        t = pointer.tensor
        if pointer.high < 0:
            return False
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) * t.element_size()
        assert pointer.high <= last, (
            f"{kernel}: byte {pointer.high} of {tuple(t.shape)} {t.dtype}, which ends at {last}"
        )
        if last // t.element_size() >= FAR:
            assert pointer.high == last, f"{kernel}: {tuple(t.shape)} ends at byte {last}, touched up to {pointer.high}"
            assert pointer.low == 0, f"{kernel}: {tuple(t.shape)} is touched from byte {pointer.low} on"
            return True
        return False


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()

    def load(builder, pointers, mask, *rest):
        spy.record(builder, pointers, mask)
        dtype = pointers.get_element_ty()
        return TensorHandle(np.zeros(pointers.data.shape, _get_np_dtype(dtype)), dtype)

    def program_id(builder, axis):
        return TensorHandle(np.array([spy.program[axis]], np.int32), tl.int32)

    def num_programs(builder, axis):
        return TensorHandle(np.array([spy.grid[axis]], np.int32), tl.int32)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, options: (args, options))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(
        InterpreterBuilder, "create_masked_store", lambda b, p, value, mask, *rest: spy.record(b, p, mask)
    )
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    monkeypatch.setattr(InterpreterBuilder, "create_get_num_programs", num_programs)
    for path, module in list(sys.modules.items()):
        if path.startswith("fastlora.kernels."):
            monkeypatch.setattr(module, "range", typed_range, raising=False)
            if hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", spy.launch)
    monkeypatch.setenv("FASTLORA_GEMM", "triton")
    with np.errstate(all="ignore"):
        yield spy


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


K = 4096
M = FAR // K + 5
X, W, A, B, S = meta(M, K), meta(K, K), meta(16, K), meta(K, 16), meta(M, 16)
MASK, NORM = meta(M, K // 8, dtype=torch.uint8), meta(K)
RSTD = meta(M, dtype=torch.float32)
# The reductions loop over rows: few rows, and so many columns that one run of rows takes them all. Of the programs that
# share the rows of dweight the first has the last row.
ROWS = 10 * rms_norm._DW_PROGRAMS + 1
WIDE, FEW, WIDE_MASK = meta(ROWS, 2**20), meta(ROWS, 16), meta(ROWS, 2**17, dtype=torch.uint8)
# Parameters of a size no model has: strides below 2³¹ and a product above it.
NARROW, RANK, TALL, LONG = meta(64, 80), meta(64, 80), meta(2**27 + 8, 80), meta(80, 2**27 + 8)
# Attention loops over tokens: few of them, far apart in the batch or by heads.
ROWS_APART = meta(520, 260, 32, 512)[..., :128].transpose(1, 2)
HEADS_APART = meta(1, 40, 64, 2**20)[..., :128]


def rotate(q):
    table = meta(1, q.shape[2], q.shape[3])
    rope.rope(q, q, table, table, False)


def attend(q):
    attention.flash_attention_fwd(q, q, q, None, None, 0.1, True, None)


def attend_backward(q):
    lse = meta(*q.shape[:3], dtype=torch.float32)
    attention.flash_attention_bwd(q, q, q, q, q, lse, None, None, 0.1, True, None)


def dequantise(n):
    """The bytes, too, are more than 2³¹."""
    packed, absmax = meta((n + 1) // 2, dtype=torch.uint8), meta(-(-n // 64), dtype=torch.uint8)
    code, absmax2, code2 = (meta(size, dtype=torch.float32) for size in (16, -(-len(absmax) // 256), 256))
    dequantize.dequantize_4bit(
        packed, absmax, code, absmax2, code2, meta(dtype=torch.float32), 64, 256, n, torch.bfloat16
    )


LAUNCHES = {
    "rms_norm_fwd": lambda: rms_norm.rms_norm_fwd(X, NORM, 1e-6),
    "rms_norm_bwd": lambda: rms_norm.rms_norm_bwd(X, X, NORM, RSTD, X, False, True),
    "rms_norm_bwd with dweight": lambda: rms_norm.rms_norm_bwd(WIDE, WIDE, meta(2**20), RSTD[:ROWS], None, True, False),
    "rope of tokens": lambda: rotate(meta(1, M, 32, 128).transpose(1, 2)),
    "rope of heads": lambda: rotate(meta(1, 64, 2**19, 128)),
    "rope of rows": lambda: rotate(meta(5, 32, 2**17, 128)),
    "swiglu_fwd": lambda: swiglu.swiglu_fwd(X, X),
    "swiglu_bwd": lambda: swiglu.swiglu_bwd(X, X, X),
    "dequantize_4bit": lambda: dequantise(2 * FAR + 5),
    "dropout_mask": lambda: dropout.dropout_mask(meta(8 * M, K), torch.tensor(1), 0.5),
    "lora_project": lambda: project.lora_project(X, [A, A], [1.0, 1.0], [MASK, None]),
    "rms_norm_project": lambda: project.rms_norm_project(X, NORM, 1e-6, [A], [1.0], [MASK], torch.bfloat16),
    "swiglu_project": lambda: project.swiglu_project(X, X, [A], [1.0], [MASK]),
    "lora_project_t": lambda: project.lora_project_t([X, X], [B, B], [1.0, 1.0]),
    "lora_gemm": lambda: gemm.lora_gemm(X, [W], S, [B], [NORM], X),
    "lora_gemm of parameters": lambda: gemm.lora_gemm(NARROW, [TALL], RANK, [TALL], [None], None),
    "lora_gemm_t of parameters": lambda: gemm.lora_gemm_t([NARROW], [LONG], RANK, [LONG], [None]),
    "lora_gemm_t": lambda: gemm.lora_gemm_t([X], [W], S, [A], [MASK]),
    "lora_gemm_t without dropout": lambda: gemm.lora_gemm_t([X], [W], S, [A], [None]),
    "lora_reduce": lambda: reduce.lora_reduce(FEW, WIDE, [16], [WIDE_MASK]),
    "lora_reduce_t": lambda: reduce.lora_reduce_t(FEW, [WIDE], [16]),
    "rms_norm_bwd_reduce": lambda: reduce.rms_norm_bwd_reduce(
        WIDE, WIDE, meta(2**20), RSTD[:ROWS], None, False, FEW, [16], [WIDE_MASK]
    ),
    "swiglu_bwd_reduce": lambda: swiglu_reduce.swiglu_bwd_reduce(
        WIDE, WIDE, WIDE, FEW, [16], [WIDE_MASK], meta(ROWS, 32), [16, 16]
    ),
    "cross_entropy_rows": lambda: linear_cross_entropy.cross_entropy_rows(
        meta(FAR // 32000 + 5, 32000),
        meta(FAR // 32000 + 5, dtype=torch.int64),
        meta(dtype=torch.float32),
        True,
    ),
    "flash_attention_fwd of rows": lambda: attend(ROWS_APART),
    "flash_attention_fwd of heads": lambda: attend(HEADS_APART),
    "flash_attention_bwd of rows": lambda: attend_backward(ROWS_APART),
    "flash_attention_bwd of heads": lambda: attend_backward(HEADS_APART),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_address_is_in_its_tensor(name, spy):
    LAUNCHES[name]()
    assert spy.pointers, "nothing was launched"


@triton.jit
def _careless_kernel(p_x, H, BLOCK: tl.constexpr):
    tl.store(p_x + tl.program_id(0) * H + tl.arange(0, BLOCK), 0.0)


@triton.jit
def _short_kernel(p_x, H, BLOCK: tl.constexpr):
    tl.store(p_x + (tl.program_id(0).to(tl.int64) * H).to(tl.int32) + tl.arange(0, BLOCK), 0.0)


@pytest.mark.parametrize("kernel", [_careless_kernel, _short_kernel])
def test_an_offset_of_32_bits_is_noticed(kernel, spy):
    with pytest.raises(
        (InterpreterError, AssertionError), match="int32 overflow|an address of no tensor|touched up to"
    ):
        spy.launch(kernel, (M,), X, K, BLOCK=K)
