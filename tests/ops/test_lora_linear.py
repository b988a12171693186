import pytest
import torch
from ops.witness import DEVICE, FLOATS, TRITON, called, check, perturbing, run

from fastlora.ops import lora_linear

EVERYTHING = ("x", "weight", "lora_a", "lora_b", "bias")


def make(M=5, K=48, N=40, R=4, dtype=torch.float32, adapters=None, bias=False, train=("x", "lora_a", "lora_b")):
    """Base and adapter products of about the same size, so that neither hides the other's error."""
    adapters = adapters or dtype
    tensors = {
        "x": torch.randn(M, K).to(dtype),
        "weight": (torch.randn(N, K) / K**0.5).to(dtype),
        "lora_a": (torch.randn(R, K) / K**0.5).to(adapters),
        "lora_b": (torch.randn(N, R) / R**0.5).to(adapters),
        "bias": torch.randn(N).to(dtype) if bias else None,
    }
    return {name: t if t is None else t.requires_grad_(name in train) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [(1, 16, 16), (5, 48, 40), (7, 33, 65), (0, 48, 40), (150, 130, 270), (130, 257, 33)],
)
def test_within_budget(M, K, N, dtype):
    ours = check(lora_linear, lambda: make(M, K, N, dtype=dtype))
    assert ours["output 0"].dtype == ours["dlora_a"].dtype == ours["dlora_b"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("R", [1, 3, 16, 65, 512])
def test_ranks(R, dtype):
    check(lora_linear, lambda: make(9, 70, 66, R, dtype=dtype), scaling=0.5)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_many_rows(dtype):
    """More rows than one run of the reductions over tokens takes."""
    check(lora_linear, lambda: make(1100, 33, 35, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("R", [3, 65])
def test_fp32_masters(R, dtype):
    """The truth takes the masters as they are; eager and ours cast them."""

    def masters():
        return make(37, 70, 66, R, dtype=dtype, adapters=torch.float32, bias=True)

    ours = check(lora_linear, masters, scaling=0.25)
    assert ours["output 0"].dtype == ours["dx"].dtype == dtype
    assert ours["dlora_a"].dtype == ours["dlora_b"].dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("train", [("x", "lora_a", "lora_b"), EVERYTHING])
def test_bias_and_base_that_trains(train, dtype):
    check(lora_linear, lambda: make(37, 70, 66, dtype=dtype, bias=True, train=train), scaling=2.0)


@pytest.mark.parametrize(
    "train",
    [(), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), ("x", "bias"), ("lora_a", "lora_b")],
)
def test_only_some_gradients(train):
    check(lora_linear, lambda: make(bias=True, train=train), scaling=0.5)


@pytest.mark.parametrize("scaling", [0.0, -1.0, 2])
def test_scaling(scaling):
    check(lora_linear, make, scaling=scaling)


@pytest.mark.skipif(not TRITON, reason="the Triton launcher's choice")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", ["triton", "addmm", "augmented"])
def test_every_way_to_multiply(method, dtype, monkeypatch):
    monkeypatch.setenv("FASTLORA_GEMM", method)
    check(lora_linear, lambda: make(37, 70, 66, dtype=dtype, adapters=torch.float32, bias=True), scaling=0.5)


def test_an_adapter_of_zeros():
    """As LoRA begins, B = 0: the base layer's output, dA = 0, dB not."""

    def fresh():
        tensors = make()
        with torch.no_grad():
            tensors["lora_b"].zero_()
        return tensors

    ours = check(lora_linear, fresh)
    assert not ours["dlora_a"].any() and ours["dlora_b"].any()


@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (2, 0, 48), (1, 2, 3, 48)])
def test_leading_dimensions(shape):
    def shaped():
        return make(bias=True, train=EVERYTHING) | {"x": torch.randn(shape).requires_grad_()}

    assert check(lora_linear, shaped)["output 0"].shape == (*shape[:-1], 40)


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("operand", EVERYTHING)
def test_non_contiguous(operand, dtype):
    layouts = {
        "x": lambda: torch.randn(48, 5).to(dtype).t(),
        "weight": lambda: (torch.randn(80, 96) / 7).to(dtype)[::2, ::2],
        "lora_a": lambda: (torch.randn(48, 8) / 7).to(dtype)[:, ::2].t(),
        "lora_b": lambda: (torch.randn(4, 40) / 2).to(dtype).t(),
        "bias": lambda: torch.randn(80).to(dtype)[::2],
    }

    def strided():
        return make(dtype=dtype, bias=True, train=EVERYTHING) | {operand: layouts[operand]().requires_grad_()}

    check(lora_linear, strided)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_expanded_and_transposed_gradients(dtype):
    layouts = [
        lambda y: [torch.ones((), dtype=dtype).expand(5, 40)],
        lambda y: [torch.randn(1, 40).to(dtype).expand(5, 40)],
        lambda y: [torch.randn(40, 5).to(dtype).t()],
    ]
    for incoming in layouts:
        check(lora_linear, lambda: make(dtype=dtype, bias=True, train=EVERYTHING), incoming=incoming)


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
def test_autocast_is_the_bf16_result(adapters):
    tensors, dy = make(37, 70, 66, adapters=adapters, bias=True), torch.randn(37, 66).bfloat16()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        under = run(lora_linear, tensors, lambda y: [dy])
    cast = {name: tensors[name].detach().bfloat16() for name in ("x", "weight", "bias")}
    cast["x"].requires_grad_()
    plain = run(lora_linear, tensors | cast, lambda y: [dy])
    assert under["output 0"].dtype == torch.bfloat16 and under["dx"].dtype == torch.float32
    for name in ("output 0", "dlora_a", "dlora_b"):  # dx is added up in fp32: see test_lora_group.py
        assert torch.equal(under[name], plain[name].to(under[name].dtype)), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", EVERYTHING)
def test_the_budget_sees_a_perturbed(operand, dtype):
    def wide():
        return make(37, 48, 40, 8, dtype=dtype, bias=True)

    check(lora_linear, wide)
    with pytest.raises(AssertionError, match="over budget"):
        check(lora_linear, wide, seen=perturbing(operand))


def test_runs_our_operators():
    assert called(lora_linear, make()) == {
        "lora_project": 1,
        "lora_gemm": 1,
        "lora_project_t": 1,
        "lora_gemm_t": 1,
        "lora_reduce": 1,
        "lora_reduce_t": 1,
    }


def test_two_runs_are_bit_identical():
    tensors, dy = make(1100, 33, 35, dtype=torch.bfloat16), torch.randn(1100, 35).bfloat16()
    first, second = (run(lora_linear, tensors, lambda y: [dy]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("output 0", "dx", "dlora_a", "dlora_b"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(5, 48).double()}, TypeError, "x is float64, needs float32 or bfloat16 or float16"),
        ({"weight": torch.ones(40, 47)}, ValueError, r"weight has shape \(40, 47\), needs \(any, 48\) as \(N, K\)"),
        ({"weight": torch.ones(48)}, ValueError, r"weight has shape \(48,\), needs \(any, 48\)"),
        ({"weight": torch.ones(40, 48).half()}, TypeError, "weight is float16, needs float32 to match x"),
        ({"lora_a": torch.ones(4, 47)}, ValueError, r"lora_a has shape \(4, 47\), needs \(any, 48\) as \(R, K\)"),
        ({"lora_a": torch.ones(4, 48).half()}, TypeError, "lora_a is float16, needs float32"),
        ({"lora_a": torch.ones(0, 48), "lora_b": torch.ones(40, 0)}, ValueError, "lora_a has rank 0, needs a rank from 1"),
        ({"lora_a": torch.ones(513, 48), "lora_b": torch.ones(40, 513)}, ValueError, "lora_a has rank 513, .* 1 to 512"),
        ({"lora_b": torch.ones(40, 5)}, ValueError, r"lora_b has shape \(40, 5\), needs \(40, 4\) as \(N, R\)"),
        ({"lora_b": torch.ones(4, 40)}, ValueError, r"lora_b has shape \(4, 40\), needs \(40, 4\)"),
        ({"lora_b": torch.ones(40, 4).bfloat16()}, TypeError, "lora_b is bfloat16, needs float32 to match lora_a"),
        ({"bias": torch.ones(41)}, ValueError, r"bias has shape \(41,\), needs \(40\) to match the rows of weight"),
        ({"bias": torch.ones(40).bfloat16()}, TypeError, "bias is bfloat16, needs float32 to match x"),
        ({"lora_b": torch.ones(40, 4, device="meta")}, ValueError, f"lora_b is on meta, needs {DEVICE}, the device"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    good = {"x": (5, 48), "weight": (40, 48), "lora_a": (4, 48), "lora_b": (40, 4)}
    with pytest.raises(error, match="lora_linear: " + message):
        lora_linear(**{name: torch.ones(shape) for name, shape in good.items()} | change)
