"""Llama's MLP in one operator: the norm before it, dropout on both of its inputs, and the residual after it.

Tensors are flat here: projection p of gate, up and down has p_weight and p_bias, its adapter j has p_a{j} and p_b{j}.
"""

import re
from typing import NamedTuple

import pytest
import torch
from budget import Budget
from masks import Drawn
from ops.witness import DEVICE, DRAWS, FLOATS, _figures, _leaves, autocast, called, perturbing, random_incoming

from fastlora import reference
from fastlora.ops import Branch, Projection, lora_mlp

ADAPTERS = r"_[ab]\d"
NAMES = ("gate", "up", "down")
EVERYTHING = ""
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


class Case(NamedTuple):
    """Rows, hidden and ffn sizes, and the ranks of the adapters of gate, up and down."""

    M: int = 7
    K: int = 24
    F: int = 40
    ranks: tuple[tuple[int, ...], ...] = ((4,), (3, 5), (2,))
    rate: float = 0.0
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype | None = None
    norm: torch.dtype | None = None
    x: torch.dtype | None = None
    bias: bool = True
    train: str = f"^x|{ADAPTERS}"
    cast: torch.dtype | None = None  # autocast's

    def make(self):
        """Every product of about the same size, so that none hides another's error."""
        M, K, F, dtype = self.M, self.K, self.F, self.dtype
        adapters = self.adapters or dtype
        tensors = {"x": torch.randn(M, K).to(self.x or dtype)}
        if self.norm is not None:
            tensors["norm_weight"] = (1 + 0.3 * torch.randn(K)).to(self.norm)
        for name, ranks, (n, k) in zip(NAMES, self.ranks, ((F, K), (F, K), (K, F)), strict=True):
            tensors[f"{name}_weight"] = (torch.randn(n, k) / k**0.5).to(dtype)
            if self.bias and name != "up":
                tensors[f"{name}_bias"] = torch.randn(n).to(dtype)
            for j, rank in enumerate(ranks):
                tensors[f"{name}_a{j}"] = (torch.randn(rank, k) / k**0.5).to(adapters)
                tensors[f"{name}_b{j}"] = (torch.randn(n, rank) / rank**0.5).to(adapters)
        return {name: t.requires_grad_(bool(re.search(self.train, name))) for name, t in tensors.items()}

    def call(self, op, tensors, **masks):
        projections = []
        for name, ranks in zip(NAMES, self.ranks, strict=True):
            branches = (
                Branch(tensors[f"{name}_a{j}"], tensors[f"{name}_b{j}"], 0.5 + j, self.rate_of(j))
                for j in range(len(ranks))
            )
            projections.append(Projection(tensors[f"{name}_weight"], tensors.get(f"{name}_bias"), tuple(branches)))
        norm = {} if self.norm is None else {"norm_weight": tensors["norm_weight"], "eps": 1e-5}
        if self.cast is None or tensors["x"].dtype == torch.float64:  # the truth is not rounded
            return (op(tensors["x"], *projections, **norm, **masks),)
        with autocast(self.cast):
            return (op(tensors["x"], *projections, **norm, **masks),)

    def rate_of(self, j):
        """The second adapter of a projection has no dropout, so that both kinds meet in one kernel."""
        return self.rate if j == 0 else 0.0

    def kept(self, masks):
        """One mask per adapter, of those that drop."""
        left = iter(masks)
        return [next(left) if self.rate_of(j) else None for ranks in self.ranks for j in range(len(ranks))]


def check(case, make=None, incoming=random_incoming, seen=None):
    """The output and the gradients within the budget, under the masks that ours drew; the last ones are returned."""
    make = make or case.make
    budgets = {}
    for _ in range(1 if seen else DRAWS):
        tensors = make()
        leaves = _leaves(seen(tensors) if seen else tensors)
        with Drawn() as drawn:
            results = case.call(lora_mlp, leaves)
        gradients = incoming(results)
        ours = _figures(results, leaves, gradients)
        eager, truth = (
            _figures(
                case.call(
                    reference.lora_mlp, leaves, masks=case.kept([mask.to(leaves["x"].dtype) for mask in drawn.masks])
                ),
                leaves,
                gradients,
            )
            for leaves in (_leaves(tensors), _leaves(tensors, torch.float64))
        )
        for name, expected in truth.items():
            assert (ours[name] is None) == (expected is None), f"{name}: {ours[name]}, needs {expected}"
            if expected is not None:
                assert ours[name].dtype == eager[name].dtype, name
                budgets.setdefault(name, Budget(name)).add(ours[name], eager[name], expected)
        excesses = [excess for budget in budgets.values() if (excess := budget.excess())]
        if not excesses:
            return ours
    raise AssertionError("\n".join(excesses))


@DTYPES
@pytest.mark.parametrize(
    ("M", "K", "F"), [(1, 24, 40), (7, 24, 40), (9, 33, 37), (0, 24, 40), (70, 40, 130), (521, 9, 17)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_sizes(normed, M, K, F, dtype):
    if M == 1 and dtype == torch.float32:
        M = 5  # a BLAS has kernels of their own for a row or two, which sum in more accumulators than a tile
    check(Case(M, K, F, dtype=dtype, norm=dtype if normed else None))


@DTYPES
@pytest.mark.parametrize(
    "ranks",
    [((), (), ()), ((4,), (), ()), ((), (1,), (17,)), ((), (), (2, 3)), ((33,), (40,), ()), ((1, 2), (), (65,))],
)
def test_ranks(ranks, dtype):
    """None, one or two adapters to each; more ranks than a tile takes; ranks that differ."""
    check(Case(ranks=ranks, dtype=dtype, norm=torch.float32))


@DTYPES
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate, dtype):
    check(Case(9, 37, 45, rate=rate, dtype=dtype, norm=dtype))
    check(Case(9, 37, 45, ranks=((3,), (), (4, 3)), rate=rate, dtype=dtype))
    check(Case(521, 9, 17, rate=rate, dtype=dtype))  # more rows than are made of h at a time


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("x", ["same", "fp32"])
def test_fp32_masters(x, dtype):
    """Adapters in fp32 over a narrower base: their gradients are fp32 sums. The output takes the dtype of x."""
    wide = dtype if x == "same" else torch.float32
    ours = check(Case(37, 40, 70, dtype=dtype, adapters=torch.float32, norm=torch.float32, x=wide))
    assert ours["output 0"].dtype == wide and ours["dgate_a0"].dtype == ours["ddown_b0"].dtype == torch.float32
    for name in ("dgate_b0", "dup_b1", "ddown_a0"):
        rounded = (ours[name] == ours[name].to(dtype)).double().mean()
        assert rounded < 0.2, f"{name}: {rounded:.0%} of the elements are numbers of {dtype}"


SUBSETS = ("nothing", "^x", ADAPTERS, "down_", "gate_", "up_b", "gate_weight", "down_weight", "norm", "_a0", "_b0|bias")


@pytest.mark.parametrize("train", [*SUBSETS, EVERYTHING])
@pytest.mark.parametrize("normed", [False, True])
def test_only_some_gradients(normed, train):
    """The first layer's x, LoRA-FA's A, weights that train, and nothing at all."""
    check(Case(rate=0.3, train=train, norm=torch.float32 if normed else None))


@pytest.mark.parametrize(
    "operand", ["x", "norm_weight", "up_weight", "down_weight", "gate_a0", "up_b1", "down_a0", "down_b0"]
)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_the_budget_sees_a_perturbed(dtype, operand):
    case = Case(17, 40, 50, dtype=dtype, norm=dtype, train=EVERYTHING)
    check(case)
    with pytest.raises(AssertionError, match="over budget"):
        check(case, seen=perturbing(operand))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_strides(dtype):
    """Transposed parameters, expanded and transposed gradients."""
    case = Case(6, 40, 24, dtype=dtype, norm=dtype, rate=0.2, train=EVERYTHING)

    def strided():
        tensors = case.make()
        for name, t in tensors.items():
            if t.dim() == 2:
                tensors[name] = t.detach().t().clone().t().requires_grad_()
        return tensors

    check(case, strided)
    check(case, incoming=lambda results: tuple(torch.randn(r.shape[::-1]).to(r.dtype).t() for r in results))
    check(case, incoming=lambda results: tuple(torch.ones((), dtype=r.dtype).expand(r.shape) for r in results))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(lead):
    x, w, d = torch.randn(*lead, 8), torch.randn(6, 8), torch.randn(8, 6)
    assert lora_mlp(x, Projection(w), Projection(w), Projection(d), norm_weight=torch.ones(8)).shape == (*lead, 8)


def test_autocast():
    """fp32 weights under autocast are the bf16 result; x, which the norm reads, stays fp32."""
    half = Case(9, 37, 45, rate=0.3, norm=torch.float32, dtype=torch.bfloat16, adapters=torch.float32, x=torch.float32)
    tensors = half.make()
    wide = {n: t.detach().float().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    torch.manual_seed(1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = half.call(lora_mlp, leaves := _leaves(wide))
    incoming = random_incoming(results)
    under = _figures(results, leaves, incoming)
    torch.manual_seed(1)
    plain = _figures(half.call(lora_mlp, leaves := _leaves(tensors)), leaves, incoming)
    assert under["output 0"].dtype == torch.float32
    for name, t in plain.items():
        assert t is None or torch.equal(under[name], t.to(under[name].dtype)), name


@pytest.mark.parametrize(("dtype", "cast"), [FLOATS[1:], FLOATS[:0:-1]], ids=str)
@pytest.mark.parametrize("x", ["same", "fp32"])
@pytest.mark.parametrize("normed", [True, False])
def test_autocast_to_the_other_half(normed, x, dtype, cast):
    """fp16 weights under bf16 autocast, and the other way round; x as the residual stream is before and after a layer."""
    x = dtype if x == "same" else torch.float32
    for adapters in (dtype, torch.float32):
        case = Case(37, 40, 45, dtype=dtype, cast=cast, x=x, adapters=adapters, rate=0.3, train=EVERYTHING)
        ours = check(case._replace(norm=dtype) if normed else case)
        assert ours["output 0"].dtype == (torch.float32 if normed else cast)
        assert ours["dx"].dtype == x and ours["dgate_weight"].dtype == dtype


def test_two_runs_of_one_seed_are_bit_identical():
    case = Case(130, 24, 40, rate=0.3, dtype=torch.bfloat16, adapters=torch.float32, norm=torch.bfloat16)
    tensors = case.make()

    def once(seed):
        torch.manual_seed(seed)
        return _figures(
            results := case.call(lora_mlp, leaves := _leaves(tensors)), leaves, [torch.ones_like(results[0])]
        )

    first, second, other = once(1), once(1), once(2)
    assert all(first[name] is None or torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["output 0"], other["output 0"])


def test_one_pass_over_everything():
    case = Case(norm=torch.float32, rate=0.5)
    counts = called(lambda **tensors: case.call(lora_mlp, tensors)[0], case.make())
    assert counts == {
        "dropout_mask": 3, "rms_norm_project": 1, "swiglu_project": 1, "lora_gemm": 2, "lora_project_t": 2,
        "lora_gemm_t": 2, "swiglu_bwd_reduce": 1, "rms_norm_bwd_reduce": 1, "lora_reduce_t": 1,
    }  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_what_is_saved(rate):
    """x, gate and up, rank-sized s, one number per row, and masks of one bit per element: nothing else of M × F."""
    M, K, F = 64, 80, 96
    case = Case(M, K, F, ((4,), (8,), (2,)), rate=rate, dtype=torch.bfloat16, norm=torch.bfloat16, bias=False)
    kept, tensors = {}, case.make()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        case.call(lora_mlp, tensors)
    arguments = {t.data_ptr() for t in tensors.values()}
    assert tensors["x"].data_ptr() in kept
    found = sorted(t.nbytes for key, t in kept.items() if t.numel() and key not in arguments)
    bits = [M * K // 8] * 2 + [M * F // 8] if rate else []
    assert found == sorted([M * F * 2, M * F * 2, M * 12 * 2, M * 2 * 2, M * 4, *bits])


GOOD = {
    "x": torch.zeros(3, 8),
    "gate": Projection(torch.zeros(6, 8)),
    "up": Projection(torch.zeros(6, 8)),
    "down": Projection(torch.zeros(8, 6)),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 7)}, ValueError, r"gate.weight has shape \(6, 8\), needs \(any, 7\)"),
        ({"x": torch.zeros(3, 8).double()}, TypeError, "x is float64, needs float32 or bfloat16 or float16"),
        ({"x": torch.zeros(3, 8).half()}, TypeError, "x is float16, needs float32 to match the weights"),
        (
            {"up": Projection(torch.zeros(5, 8))},
            ValueError,
            r"up.weight has shape \(5, 8\), needs \(6, 8\) to match gate",
        ),
        ({"up": Projection(torch.zeros(6, 8).half())}, TypeError, "up.weight is float16, needs float32"),
        ({"down": Projection(torch.zeros(8, 5))}, ValueError, r"down.weight .* needs \(any, 6\) .* the rows of gate"),
        (
            {"down": Projection(torch.zeros(8, 6).half())},
            TypeError,
            "down.weight is float16, needs float32 to match gate",
        ),
        ({"norm_weight": torch.ones(7)}, ValueError, r"norm_weight has shape \(7,\), needs \(8\)"),
        (
            {"norm_weight": torch.ones(8), "down": Projection(torch.zeros(5, 6))},
            ValueError,
            r"down.weight has shape \(5, 6\), needs \(8, 6\) as \(K, F\), since x is added",
        ),
        (
            {"gate": Projection(torch.zeros(6, 8), None, (Branch(torch.zeros(2, 8), torch.zeros(5, 2)),))},
            ValueError,
            r"gate.b has shape \(5, 2\), needs \(6, 2\)",
        ),
        (
            {"down": Projection(torch.zeros(8, 6), None, (Branch(torch.zeros(2, 6), torch.zeros(8, 2), 1.0, 1.5),))},
            ValueError,
            "down.dropout is 1.5, needs a probability from 0 to 1",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"lora_mlp: {message}"):
        lora_mlp(**GOOD | change)
