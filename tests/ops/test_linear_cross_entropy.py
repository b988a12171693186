import weakref

import pytest
import torch
from ops.witness import DEVICE, FLOATS, TRITON, Calls, called, check, perturbing, run
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels import linear_cross_entropy as kernels
from fastlora.ops import linear_cross_entropy

IGNORE = -100
RAISED = pytest.mark.cpu_only(reason="a GPU gives NaN, and waits for nobody")


def make(M=37, H=24, V=50, dtype=torch.float32, ignored=0.3, train=("hidden",), lead=None):
    labels = torch.randint(0, V, (M,))
    labels[torch.rand(M) < ignored] = IGNORE
    labels[0] = V - 1
    tensors = {
        "hidden": torch.randn(M, H).to(dtype),
        "weight": (2 * torch.randn(V, H) / H**0.5).to(dtype),
        "labels": labels,
    }
    if lead is not None:
        tensors |= {"hidden": tensors["hidden"].view(*lead, H), "labels": labels.view(lead)}
    return {name: t.requires_grad_(name in train) for name, t in tensors.items()}


@pytest.fixture
def chunks_of_eight(monkeypatch):
    monkeypatch.setattr(kernels, "chunk_rows", lambda *sizes: 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_within_budget(ignored, reduction, dtype, chunks_of_eight):
    ours = check(linear_cross_entropy, lambda: make(dtype=dtype, ignored=ignored), reduction=reduction)
    assert ours["output 0"].dtype == torch.float32 and ours["dhidden"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "H", "V"), [(1, 8, 2), (3, 33, 1), (5, 130, 129), (2, 16, 4100), (3, 16, 9001)])
def test_sizes(M, H, V, dtype):
    check(linear_cross_entropy, lambda: make(M, H, V, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("train", [("weight",), ("hidden", "weight")])
def test_a_head_that_trains(train, reduction, dtype, chunks_of_eight):
    ours = check(linear_cross_entropy, lambda: make(dtype=dtype, train=train), reduction=reduction)
    assert ours["dweight"].dtype == dtype


def test_nothing_to_train():
    check(linear_cross_entropy, lambda: make(train=()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "num_items",
    [7, 1000.5, torch.tensor(13), torch.tensor(13.5), torch.tensor(13.5, dtype=torch.float64), torch.tensor(96.0).bfloat16()],
    ids=["int", "float", "int64 tensor", "fp32 tensor", "fp64 tensor", "bf16 tensor"],
)  # fmt: skip
def test_num_items(num_items, dtype, chunks_of_eight):
    # As a number for the witness: PyTorch would divide the float64 truth in the dtype of the tensor.
    options = {"num_items": float(num_items)}
    check(linear_cross_entropy, lambda: make(dtype=dtype), **options)
    tensors = make(dtype=dtype)
    tensor, number = (
        run(linear_cross_entropy, tensors, lambda y: [torch.ones(())], num_items=n)
        for n in (num_items, float(num_items))
    )
    assert tensor["output 0"].dtype == torch.float32
    assert all(torch.equal(tensor[name], number[name]) for name in ("output 0", "dhidden"))


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_num_items_in_a_shape(shape):
    """The loss takes the shape that a division by it gives."""
    tensors, items = make(train=("hidden", "weight")), torch.full(shape, 13)
    check(linear_cross_entropy, lambda: make(train=("hidden", "weight")), num_items=items)
    shaped = run(linear_cross_entropy, tensors, lambda y: [torch.ones(shape)], num_items=items)
    plain = run(linear_cross_entropy, tensors, lambda y: [torch.ones(())], num_items=13)
    assert shaped["output 0"].shape == shape
    assert all(
        torch.equal(shaped[name].view_as(plain[name]), plain[name]) for name in ("output 0", "dhidden", "dweight")
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("M", [37, 0])
def test_no_row_counts(M, reduction):
    """The mean over no rows is NaN as torch's is; its gradient is 0, and so is all else."""
    tensors = {
        "hidden": torch.randn(M, 24, requires_grad=True),
        "weight": torch.randn(50, 24, requires_grad=reduction != "none"),
        "labels": torch.full((M,), IGNORE),
    }
    ours = run(linear_cross_entropy, tensors, reduction=reduction)
    assert ours["output 0"].isnan() if reduction == "mean" else not ours["output 0"].any()
    assert ours["dhidden"].shape == (M, 24) and not ours["dhidden"].any()
    assert reduction == "none" or not ours["dweight"].any()
    assert not run(linear_cross_entropy, tensors | {"weight": tensors["weight"].detach()}, num_items=3)["dhidden"].any()


def test_another_ignore_index():
    def ignoring():
        tensors = make()
        return tensors | {"labels": tensors["labels"].masked_fill(tensors["labels"] == IGNORE, 3)}

    check(linear_cross_entropy, ignoring, ignore_index=3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_loss_scaling(dtype):
    """A loss over a million tokens, scaled for fp16: unscaled, its gradients would all be 0 there."""
    ours = check(
        linear_cross_entropy,
        lambda: make(dtype=dtype, train=("hidden", "weight")),
        incoming=lambda y: [torch.tensor(65536.0)],
        num_items=1_000_000,
    )
    assert ours["dhidden"].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_incoming_gradients(reduction):
    """As accumulation over three steps makes them; and one number for all rows."""
    check(linear_cross_entropy, make, incoming=lambda y: [torch.full_like(y[0], 1 / 3)], reduction=reduction)
    check(linear_cross_entropy, make, incoming=lambda y: [torch.tensor(1.7).expand(y[0].shape)], reduction=reduction)


def test_logits_of_minus_infinity():
    """fp16 logits past the range, for words that are not the label: probability 0, loss finite."""

    def past_the_range():
        tensors = make(M=8, dtype=torch.float16, ignored=0.0)
        with torch.no_grad():
            tensors["hidden"][:, 0] = 300
            tensors["weight"][:, 0] = 0
            tensors["weight"][::3, 0] = -300
            tensors["labels"] = 3 * (tensors["labels"] // 3) + 1
            tensors["labels"].clamp_(max=49)
        return tensors

    tensors = past_the_range()
    assert (tensors["hidden"] @ tensors["weight"].t()).isneginf().any(0).sum() == 17
    check(linear_cross_entropy, past_the_range)


@pytest.mark.parametrize("lead", [(6, 6), (2, 3, 6)])
def test_leading_dimensions(lead):
    check(linear_cross_entropy, lambda: make(M=36, lead=lead), reduction="none")


def test_non_contiguous():
    def strided():
        return {
            "hidden": torch.randn(24, 37).t().requires_grad_(),
            "weight": torch.randn(24, 100)[:, ::2].t().requires_grad_(),
            "labels": torch.randint(0, 50, (74,))[::2],
        }

    check(linear_cross_entropy, strided)


@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight")])
def test_autocast_is_the_bf16_result(train):
    tensors = make(train=train)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        under = run(linear_cross_entropy, tensors, lambda y: [torch.ones(())])
    cast = {n: tensors[n].detach().bfloat16().requires_grad_(n in train) for n in ("hidden", "weight")}
    plain = run(linear_cross_entropy, tensors | cast, lambda y: [torch.ones(())])
    assert torch.equal(under["output 0"], plain["output 0"])
    for name in train:
        assert under[f"d{name}"].dtype == torch.float32
        assert torch.equal(under[f"d{name}"], plain[f"d{name}"].float()), name


def test_no_gradient_is_made_where_none_can_flow():
    tensors = make(train=("hidden", "weight"))
    with Calls() as calls, torch.no_grad():
        linear_cross_entropy(**tensors)
    ((_, arguments),) = calls.calls
    assert arguments[-2:] == (False, False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", ["hidden", "weight", "labels"])
def test_the_budget_sees_a_perturbed(operand, dtype):
    train = ("hidden", "weight")
    check(linear_cross_entropy, lambda: make(dtype=dtype, train=train))
    with pytest.raises(AssertionError, match="over budget"):
        check(linear_cross_entropy, lambda: make(dtype=dtype, train=train), seen=perturbing(operand))


def test_runs_our_operators():
    assert called(linear_cross_entropy, make()) == {"linear_cross_entropy_fwd": 1}


def test_runs_our_rows_once_per_chunk(chunks_of_eight, monkeypatch):
    rows = []
    ours = torch.ops.fastlora.cross_entropy_rows
    monkeypatch.setattr(
        torch.ops.fastlora, "cross_entropy_rows", lambda x, *rest: rows.append(len(x)) or ours(x, *rest)
    )
    run(linear_cross_entropy, make(ignored=0.0))
    assert rows == [8, 8, 8, 8, 5]


@pytest.mark.skipif(not TRITON, reason="csrc raises IndexError before")
def test_a_label_out_of_range_is_nan_in_loss_and_gradient():
    logits = torch.randn(3, 50)
    loss = kernels.cross_entropy_rows(logits, torch.tensor([49, 50, -1]), torch.ones(()), True)
    assert loss.isnan().tolist() == [False, True, True]
    assert logits.isnan().all(1).tolist() == [False, True, True] and not logits[0].isnan().any()


def test_one_chunk_of_logits_is_alive_at_a_time(chunks_of_eight):
    class Logits(TorchDispatchMode):
        """Remembers every (rows, V) product, and how many of them lived at once."""

        def __init__(self):
            super().__init__()
            self.made, self.most = [], 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default and result.shape[1] == 50:
                self.made.append(weakref.ref(result))
                self.most = max(self.most, sum(one() is not None for one in self.made))
            return result

    tensors = make(ignored=0.0)
    with torch.no_grad(), Logits() as logits:
        kernels.linear_cross_entropy_fwd(*tensors.values(), torch.ones(()), IGNORE, True, False)
    assert (len(logits.made), logits.most) == (5, 1)


def test_two_runs_are_bit_identical():
    tensors = make(dtype=torch.bfloat16, train=("hidden", "weight"))
    first, second = (run(linear_cross_entropy, tensors, lambda y: [torch.ones(())]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("output 0", "dhidden", "dweight"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(5, 24).double()}, TypeError, "hidden is float64, needs float32 or bfloat16 or float16"),
        ({"weight": torch.ones(50, 23)}, ValueError, r"weight has shape \(50, 23\), needs \(any, 24\) as \(V, H\)"),
        ({"weight": torch.ones(24)}, ValueError, r"weight has shape \(24,\), needs \(any, 24\)"),
        ({"weight": torch.ones(50, 24).half()}, TypeError, "weight is float16, needs float32 to match hidden"),
        ({"labels": torch.zeros(6).long()}, ValueError, r"labels has shape \(6,\), needs \(5\) to match hidden"),
        ({"labels": torch.zeros(5).int()}, TypeError, "labels is int32, needs int64"),
        ({"labels": torch.zeros(5).long().to("meta")}, ValueError, f"labels is on meta, needs {DEVICE}, the device of"),
        ({"reduction": "max"}, ValueError, "reduction is 'max', needs 'mean', 'sum' or 'none'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items goes with reduction 'mean', got 'sum'"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items has shape \(2,\), needs one element"),
        ({"num_items": torch.ones(1, 0)}, ValueError, r"num_items has shape \(1, 0\), needs one element"),
        ({"weight": torch.ones(50, 24, requires_grad=True), "reduction": "none"}, ValueError, "weight requires a gradient"),
        pytest.param(
            {"labels": torch.tensor([1, 2, 50, 3, 4])}, IndexError, r"labels must be in \[0, 50\), got 50", marks=RAISED
        ),
        pytest.param(
            {"labels": torch.tensor([1, -1, 2, 3, 4])}, IndexError, r"labels must be in \[0, 50\), got -1", marks=RAISED
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    good = {"hidden": torch.ones(5, 24), "weight": torch.ones(50, 24), "labels": torch.zeros(5).long()}
    with pytest.raises(error, match="linear_cross_entropy: " + message):
        linear_cross_entropy(**good | change)
