import pytest
import torch
from ops.witness import DEVICE, FLOATS, called, check, perturbing, run

from fastlora.ops import rope


def make(B=2, HQ=4, HK=2, T=5, D=8, dtype=torch.float32, table_dtype=None, tables=None, train=("q", "k")):
    """Tables of independent numbers: a kernel that takes one half of a table for the other is seen."""
    tables = B if tables is None else tables
    tensors = {
        "q": torch.randn(B, HQ, T, D).to(dtype),
        "k": torch.randn(B, HK, T, D).to(dtype),
        "cos": torch.randn(tables, T, D).to(table_dtype or dtype),
        "sin": torch.randn(tables, T, D).to(table_dtype or dtype),
    }
    return {name: t.requires_grad_(name in train) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 1, "HQ": 1, "HK": 1, "T": 1, "D": 2},
        {"B": 2, "HQ": 4, "HK": 2, "T": 5, "D": 8},
        {"B": 3, "HQ": 3, "HK": 1, "T": 7, "D": 6},
        {"B": 2, "HQ": 5, "HK": 5, "T": 3, "D": 130},
        {"B": 3, "tables": 1},
        {"B": 0},
        {"B": 0, "tables": 1},
        {"T": 0},
    ],
)
def test_within_budget(sizes, dtype):
    ours = check(rope, lambda: make(**sizes, dtype=dtype))
    assert ours["output 0"].dtype == ours["output 1"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("table_dtype", FLOATS)
@pytest.mark.parametrize("tables", [1, 2])
def test_tables_of_another_dtype(tables, table_dtype, dtype):
    """As autocast makes them of a model in the other half precision."""
    ours = check(rope, lambda: make(dtype=dtype, table_dtype=table_dtype, tables=tables))
    assert ours["output 0"].dtype == ours["dq"].dtype == dtype


def test_tables_are_widened_and_not_rounded():
    """In fp32 they have the bits of their own dtype, which q's may not."""
    tensors = make(dtype=torch.bfloat16, table_dtype=torch.float16, train=())
    wide = tensors | {name: tensors[name].float() for name in ("cos", "sin")}
    assert all(map(torch.equal, rope(**tensors), rope(**wide)))


def test_angles_of_llama():
    """Tables as a model makes them: a rotation, which keeps lengths."""
    angles = torch.outer(torch.arange(9.0), 10000.0 ** (-torch.arange(0, 16, 2) / 16)).repeat(1, 2)[None]
    tensors = make(B=1, T=9, D=16) | {"cos": angles.cos(), "sin": angles.sin()}
    ours = check(rope, lambda: tensors)
    torch.testing.assert_close(ours["output 0"].norm(dim=-1), tensors["q"].detach().norm(dim=-1))


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_strides_of_a_projection(dtype):
    """q and k as a model makes them: (B, T, H · D) seen as (B, H, T, D)."""

    def projected():
        tensors = make(dtype=dtype)
        for name in ("q", "k"):
            B, H, T, D = tensors[name].shape
            tensors[name] = torch.randn(B, T, H * D).to(dtype).view(B, T, H, D).transpose(1, 2).requires_grad_()
        return tensors

    check(rope, projected)
    tensors = projected()
    q, k = rope(**tensors)
    assert q.stride() == tensors["q"].stride() and k.stride() == tensors["k"].stride()


@pytest.mark.parametrize("layout", ["sliced heads", "strided", "expanded", "last dimension strided"])
def test_non_contiguous(layout):
    layouts = {
        "sliced heads": lambda: torch.randn(2, 9, 5, 8)[:, 2:6],
        "strided": lambda: torch.randn(2, 4, 10, 16)[:, :, ::2, :8],
        "expanded": lambda: torch.randn(2, 1, 5, 8).expand(2, 4, 5, 8),
        "last dimension strided": lambda: torch.randn(2, 4, 5, 16)[..., ::2],
    }
    check(rope, lambda: make() | {"q": layouts[layout]().requires_grad_(), "cos": torch.randn(2, 8, 5).mT})


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_expanded_gradients(dtype):
    def ones(outputs):
        return [torch.ones((), dtype=dtype).expand(o.shape) for o in outputs]

    def one_for_all_heads(outputs):
        return [torch.randn(2, 1, 5, 8).to(dtype).expand(o.shape) for o in outputs]

    check(rope, lambda: make(dtype=dtype), incoming=ones)
    check(rope, lambda: make(dtype=dtype), incoming=one_for_all_heads)


@pytest.mark.parametrize("train", [("q",), ("k",), ()])
def test_only_some_gradients(train):
    check(rope, lambda: make(train=train))


def test_a_loss_of_one_output_alone():
    tensors = make()
    (dq,) = torch.autograd.grad(rope(**tensors)[0].sum(), tensors["q"])
    check(rope, lambda: tensors, incoming=lambda outputs: [torch.ones_like(outputs[0]), torch.zeros_like(outputs[1])])
    both = run(rope, tensors, lambda outputs: [torch.ones_like(outputs[0]), torch.zeros_like(outputs[1])])
    assert torch.equal(dq, both["dq"])


def test_far_strides_are_64_bit():
    """Heads more than 2³¹ elements apart, in memory that is reserved and almost nowhere touched."""
    apart = 2**31 + 64
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(apart + 4 * 8, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    tensors = make(B=1, HQ=2, HK=1, T=4, D=8, dtype=torch.float16, train=())
    far = memory.as_strided((1, 2, 4, 8), (0, apart, 8, 1)).copy_(tensors["q"])
    assert torch.equal(rope(**tensors | {"q": far})[0], rope(**tensors)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", ["q", "k", "cos", "sin"])
def test_the_budget_sees_a_perturbed(operand, dtype):
    check(rope, lambda: make(T=9, D=16, dtype=dtype))
    with pytest.raises(AssertionError, match="over budget"):
        check(rope, lambda: make(T=9, D=16, dtype=dtype), seen=perturbing(operand))


def test_runs_our_operators():
    assert called(rope, make()) == {"rope": 2}


def test_two_runs_are_bit_identical():
    tensors = make(dtype=torch.bfloat16)
    dy = [torch.randn(2, 4, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()]
    first, second = (run(rope, tensors, lambda outputs: dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("output 0", "output 1", "dq", "dk"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 4, 5, 8).double()}, TypeError, "q is float64, needs float32 or bfloat16 or float16"),
        ({"q": torch.ones(2, 5, 8)}, ValueError, r"q has shape \(2, 5, 8\), needs \(any, any, any, any\)"),
        ({"q": torch.ones(2, 4, 5, 7)}, ValueError, r"q has shape \(2, 4, 5, 7\), needs an even last dimension"),
        ({"k": torch.ones(2, 2, 6, 8)}, ValueError, r"k has shape \(2, 2, 6, 8\), needs \(2, any, 5, 8\) to match q"),
        ({"k": torch.ones(2, 2, 5, 8).half()}, TypeError, "k is float16, needs float32 to match q"),
        ({"cos": torch.ones(3, 5, 8)}, ValueError, r"cos has shape \(3, 5, 8\), needs \(2, 5, 8\) or a first size of 1"),
        ({"cos": torch.ones(2, 5, 4)}, ValueError, r"cos has shape \(2, 5, 4\), needs \(2, 5, 8\)"),
        ({"cos": torch.ones(2, 5, 8).double()}, TypeError, "cos is float64, needs float32 or bfloat16 or float16"),
        ({"cos": torch.ones(2, 5, 8).half()}, TypeError, "sin is float32, needs float16 to match cos"),
        ({"cos": torch.ones(())}, ValueError, r"cos has shape \(\), needs \(2, 5, 8\)"),
        ({"sin": torch.ones(1, 5, 8)}, ValueError, r"sin has shape \(1, 5, 8\), needs \(2, 5, 8\) to match cos"),
        ({"sin": torch.ones(2, 5, 8, device="meta")}, ValueError, f"sin is on meta, needs {DEVICE}, the device of q"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    good = {"q": (2, 4, 5, 8), "k": (2, 2, 5, 8), "cos": (2, 5, 8), "sin": (2, 5, 8)}
    with pytest.raises(error, match="rope: " + message):
        rope(**{name: torch.ones(shape) for name, shape in good.items()} | change)
