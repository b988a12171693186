import pytest
import torch
from ops.witness import DEVICE, FLOATS, called, check, perturbing, run

from fastlora.ops import swiglu


def make(shape=(5, 96), dtype=torch.float32, train=("gate", "up")):
    return {name: (2 * torch.randn(shape)).to(dtype).requires_grad_(name in train) for name in ("gate", "up")}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 96), (7,), (1, 1), (0, 64), (3, 7, 131), (3, 1024), (5, 1300)])
def test_within_budget(shape, dtype):
    ours = check(swiglu, lambda: make(shape, dtype))
    assert ours["output 0"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_gates(dtype):
    def large():
        tensors = make((4, 64), dtype)
        with torch.no_grad():
            tensors["gate"].copy_(torch.linspace(-110, 110, 256).view(4, 64))
        return tensors

    check(swiglu, large)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_non_contiguous(dtype):
    layouts = {
        "halves of one tensor": lambda: torch.randn(6, 80).to(dtype).chunk(2, dim=-1),
        "transposed": lambda: (torch.randn(40, 6).to(dtype).t(), torch.randn(6, 40).to(dtype)),
        "expanded": lambda: (torch.randn(6, 40).to(dtype), torch.randn(1, 40).to(dtype).expand(6, 40)),
        "strided vectors": lambda: torch.randn(2, 80).to(dtype)[:, ::2].unbind(),
    }
    for layout in layouts.values():
        check(swiglu, lambda layout=layout: {n: t.requires_grad_() for n, t in zip(("gate", "up"), layout())})


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_expanded_and_transposed_gradients(dtype):
    check(swiglu, lambda: make((6, 40), dtype), incoming=lambda y: [torch.ones((), dtype=dtype).expand(6, 40)])
    check(swiglu, lambda: make((6, 40), dtype), incoming=lambda y: [torch.randn(40, 6).to(dtype).t()])


@pytest.mark.parametrize("train", [("gate",), ("up",), ()])
def test_only_some_gradients(train):
    check(swiglu, lambda: make((4, 64), train=train))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", ["gate", "up"])
def test_the_budget_sees_a_perturbed(operand, dtype):
    check(swiglu, lambda: make((16, 96), dtype))
    with pytest.raises(AssertionError, match="over budget"):
        check(swiglu, lambda: make((16, 96), dtype), seen=perturbing(operand))


def test_runs_our_operators():
    assert called(swiglu, make()) == {"swiglu_fwd": 1, "swiglu_bwd": 1}


def test_two_runs_are_bit_identical():
    tensors, dy = make((30, 130), torch.bfloat16), torch.randn(30, 130).bfloat16()
    first, second = (run(swiglu, tensors, lambda y: [dy]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(4, 64).double()}, TypeError, "gate is float64, needs float32 or"),
        ({"up": torch.ones(4, 65)}, ValueError, r"up has shape \(4, 65\), needs \(4, 64\) to match gate"),
        ({"up": torch.ones(64)}, ValueError, r"up has shape \(64,\), needs \(4, 64\)"),
        ({"up": torch.ones(4, 64).bfloat16()}, TypeError, "up is bfloat16, needs float32 to match gate"),
        ({"up": torch.ones(4, 64, device="meta")}, ValueError, f"up is on meta, needs {DEVICE}, the device of gate"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="swiglu: " + message):
        swiglu(**{"gate": torch.ones(4, 64), "up": torch.ones(4, 64)} | change)
