import pytest
import torch
from ops.witness import DEVICE, FLOATS, called, check, perturbing, run

from fastlora.ops import rms_norm


def make(shape=(5, 96), dtype=torch.float32, weight_dtype=None, train=("x", "weight")):
    tensors = {
        "x": torch.randn(shape).to(dtype),
        "weight": (1 + 0.1 * torch.randn(shape[-1])).to(weight_dtype or dtype),
    }
    return {name: t.requires_grad_(name in train) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(5, 96), (64,), (1, 64), (0, 64), (2, 0, 64), (3, 7, 130), (2, 4097), (230, 33)],  # 230: programs share rows
)
def test_within_budget(shape, dtype):
    ours = check(rms_norm, lambda: make(shape, dtype))
    assert ours["output 0"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_fp32_weight(dtype):
    ours = check(rms_norm, lambda: make((4, 130), dtype, torch.float32))
    assert ours["output 0"].dtype == ours["dweight"].dtype == torch.float32


@pytest.mark.parametrize(("dtype", "weight_dtype"), [FLOATS[1:], FLOATS[:0:-1], (torch.float32, torch.float16)])
def test_a_weight_of_another_dtype(dtype, weight_dtype):
    """As autocast leaves the norms of a model in half precision: promoted, where eager promotes."""
    ours = check(rms_norm, lambda: make((4, 130), dtype, weight_dtype))
    assert ours["output 0"].dtype == torch.float32
    assert (ours["dx"].dtype, ours["dweight"].dtype) == (dtype, weight_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
def test_eps_beside_small_rows(eps, dtype):
    def small():
        tensors = make((4, 64), dtype)
        with torch.no_grad():
            tensors["x"] *= 2.0**-8
        return tensors

    check(rms_norm, small, eps=eps)


def test_a_row_of_zeros_stays_finite():
    def zeros():
        tensors = make((3, 64))
        with torch.no_grad():
            tensors["x"][1] = 0
        return tensors

    check(rms_norm, zeros)


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_non_contiguous(layout, dtype):
    layouts = {
        "transposed": lambda: torch.randn(40, 6).to(dtype).t(),
        "sliced": lambda: torch.randn(6, 64).to(dtype)[:, 8:48],
        "strided": lambda: torch.randn(6, 80).to(dtype)[:, ::2],
        "expanded": lambda: torch.randn(1, 40).to(dtype).expand(6, 40),
    }

    def strided():
        tensors = {"x": layouts[layout](), "weight": torch.randn(80).to(dtype)[::2]}
        return {name: t.requires_grad_() for name, t in tensors.items()}

    check(rms_norm, strided)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_expanded_and_transposed_gradients(dtype):
    check(rms_norm, lambda: make((6, 40), dtype), incoming=lambda y: [torch.ones((), dtype=dtype).expand(6, 40)])
    check(rms_norm, lambda: make((6, 40), dtype), incoming=lambda y: [torch.randn(40, 6).to(dtype).t()])


@pytest.mark.parametrize("train", [("x",), ("weight",), ()])
def test_only_some_gradients(train):
    check(rms_norm, lambda: make((4, 64), train=train))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", ["x", "weight"])
def test_the_budget_sees_a_perturbed(operand, dtype):
    check(rms_norm, lambda: make((16, 96), dtype))
    with pytest.raises(AssertionError, match="over budget"):
        check(rms_norm, lambda: make((16, 96), dtype), seen=perturbing(operand))


def test_runs_our_operators():
    assert called(rms_norm, make()) == {"rms_norm_fwd": 1, "rms_norm_bwd": 1}


def test_two_runs_are_bit_identical():
    tensors, dy = make((230, 40), torch.bfloat16), torch.randn(230, 40).bfloat16()
    first, second = (run(rms_norm, tensors, lambda y: [dy]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 64).double()}, TypeError, "x is float64, needs float32 or bfloat16 or float16"),
        ({"x": torch.ones(4, 64).long()}, TypeError, "x is int64"),
        ({"weight": torch.ones(65)}, ValueError, r"weight has shape \(65,\), needs \(64\) to match the last dimension"),
        ({"weight": torch.ones(1, 64)}, ValueError, r"weight has shape \(1, 64\), needs \(64\)"),
        ({"weight": torch.ones(64).double()}, TypeError, "weight is float64, needs float32 or"),
        ({"weight": torch.ones(64, device="meta")}, ValueError, f"weight is on meta, needs {DEVICE}, the device of x"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="rms_norm: " + message):
        rms_norm(**{"x": torch.ones(4, 64), "weight": torch.ones(64)} | change)
