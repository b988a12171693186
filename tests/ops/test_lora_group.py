"""Projections of one input, with the norm before them, dropout, and the rotary embedding or the residual after them.

Tensors are flat here: projection i has weight{i} and bias{i}, its adapter j has a{i}{j} and b{i}{j}.
"""

import re
from typing import NamedTuple

import pytest
import torch
from budget import Budget
from masks import Drawn
from ops.witness import DEVICE, DRAWS, FLOATS, TRITON, _figures, _leaves, autocast, called, perturbing, random_incoming

from fastlora import reference
from fastlora.ops import Branch, Projection, lora_group

ADAPTERS = r"[ab]\d\d"
EVERYTHING = ""  # a pattern that every name has in it


class Case(NamedTuple):
    """A group: rows, the size of the input, and per projection its outputs and the ranks of its adapters."""

    M: int = 5
    K: int = 40
    N: tuple[int, ...] = (24, 33, 24)
    ranks: tuple[tuple[int, ...], ...] = ((4,), (3, 5), ())
    rate: float = 0.0
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype | None = None
    norm: torch.dtype | None = None
    x: torch.dtype | None = None
    residual: torch.dtype | None = None
    bias: bool = True
    heads: int = 0  # columns of a head of the first two outputs, which are then rotated, in one row of M tokens
    cast: torch.dtype | None = None  # autocast's
    train: str = f"^x|residual|{ADAPTERS}"

    def make(self):
        """Every product of about the same size, so that none hides another's error."""
        M, K, dtype = self.M, self.K, self.dtype
        adapters, x = self.adapters or dtype, self.x or dtype
        tensors = {"x": torch.randn(M, K).to(x)}
        if self.norm is not None:
            tensors["norm_weight"] = (1 + 0.3 * torch.randn(K)).to(self.norm)
        if self.residual is not None:
            tensors["residual"] = torch.randn(M, self.N[0]).to(self.residual)
        if self.heads:
            tensors |= {name: torch.randn(1, M, self.heads).to(dtype) for name in ("cos", "sin")}
        for i, (n, ranks) in enumerate(zip(self.N, self.ranks, strict=True)):
            tensors[f"weight{i}"] = (torch.randn(n, K) / K**0.5).to(dtype)
            if self.bias and i % 2 == 0:
                tensors[f"bias{i}"] = torch.randn(n).to(dtype)
            for j, rank in enumerate(ranks):
                tensors[f"a{i}{j}"] = (torch.randn(rank, K) / K**0.5).to(adapters)
                tensors[f"b{i}{j}"] = (torch.randn(n, rank) / rank**0.5).to(adapters)
        return {name: t.requires_grad_(bool(re.search(self.train, name))) for name, t in tensors.items()}

    def call(self, tensors, op, kind=Branch, **masks):
        """op on the flat tensors; the truth of what autocast rounds is not rounded."""
        if self.cast is None or tensors["x"].dtype == torch.float64:
            return self._call(tensors, op, kind, **masks)
        with autocast(self.cast):
            return self._call(tensors, op, kind, **masks)

    def _call(self, tensors, op, kind, **masks):
        projections = []
        for i, ranks in enumerate(self.ranks):
            branches = (
                kind(tensors[f"a{i}{j}"], tensors[f"b{i}{j}"], 0.5 + j, self.rate_of(i, j)) for j in range(len(ranks))
            )
            projections.append(Projection(tensors[f"weight{i}"], tensors.get(f"bias{i}"), tuple(branches)))
        residual = tensors.get("residual")
        more = {} if self.norm is None else {"norm_weight": tensors["norm_weight"], "eps": 1e-5}
        if self.heads:
            more["rotary"] = tensors["cos"], tensors["sin"]
            masks = {name: [m if m is None else m[None] for m in some] for name, some in masks.items()}
            return tuple(y[0] for y in op(tensors["x"][None], projections, **more, **masks))
        return op(tensors["x"], projections, residual=residual, **more, **masks)

    def rate_of(self, i, j):
        """The second adapter of a projection has no dropout, so that both kinds meet in one kernel."""
        return self.rate if j == 0 else 0.0

    def ours(self, tensors):
        return self.call(tensors, lora_group)

    def witness(self, tensors, masks):
        """masks: one (M, K) per adapter that drops."""
        left = iter(masks)
        rates = [self.rate_of(i, j) for i, ranks in enumerate(self.ranks) for j in range(len(ranks))]
        kept = [next(left) if rate else None for rate in rates]
        if self.rate == 1:  # 0 · mask / (1 − 1) is PEFT's 0

            def nothing(a, b, scaling, rate):
                return Branch(a, b, scaling * (rate == 0), 0.0)

            return self.call(tensors, reference.lora_group, nothing, masks=[None] * len(kept))
        return self.call(tensors, reference.lora_group, masks=kept)


def run(case, tensors, incoming=random_incoming):
    """One forward and one backward, unjudged."""
    leaves = _leaves(tensors)
    results = case.ours(leaves)
    return _figures(results, leaves, incoming(results))


def check(case, make=None, incoming=random_incoming, seen=None):
    """Outputs and gradients within the budget, under the masks that ours drew; the last ones are returned."""
    make = make or case.make
    budgets = {}
    for _ in range(1 if seen else DRAWS):
        tensors = make()
        leaves = _leaves(seen(tensors) if seen else tensors)
        with Drawn() as drawn:
            results = case.ours(leaves)
        gradients = incoming(results)
        ours = _figures(results, leaves, gradients)
        leaves = _leaves(tensors)
        eager = _figures(case.witness(leaves, [m.to(case.dtype) for m in drawn.masks]), leaves, gradients)
        leaves = _leaves(tensors, torch.float64)
        truth = _figures(case.witness(leaves, drawn.masks), leaves, gradients)
        for name, expected in truth.items():
            assert (ours[name] is None) == (expected is None), f"{name}: {ours[name]}, needs {expected}"
            if expected is not None:
                assert ours[name].dtype == eager[name].dtype, name
                budgets.setdefault(name, Budget(name)).add(ours[name], eager[name], expected)
        excesses = [excess for budget in budgets.values() if (excess := budget.excess())]
        if not excesses:
            return ours
    raise AssertionError("\n".join(excesses))


DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)
NORMED = {"norm": torch.float32, "bias": False}
ROTARY = {"N": (24, 16, 17), "heads": 8}


@DTYPES
@pytest.mark.parametrize(("M", "K"), [(1, 16), (5, 40), (7, 33), (0, 40), (37, 70)])
@pytest.mark.parametrize("kind", ["plain", "norm", "rotary"])
def test_sizes(kind, M, K, dtype):
    more = {"plain": {}, "norm": {"norm": dtype}, "rotary": {"norm": dtype, **ROTARY}}[kind]
    check(Case(M, K, dtype=dtype, **more))


@DTYPES
@pytest.mark.parametrize("ranks", [((),), ((1,),), ((65,),), ((2, 3),), ((1,), ()), ((), (17,)), ((1, 65), (), (16,))])
def test_ranks(ranks, dtype):
    """None, one or two adapters to each of one, two or three projections."""
    check(Case(N=(24, 33, 17)[: len(ranks)], ranks=ranks, dtype=dtype))


@DTYPES
def test_large_products(dtype):
    """More than one tile along every dimension.

    No rank below 16: a BLAS may sum a narrow product in more accumulators than the stacked one that we ask it for.
    """
    check(Case(130, 140, (150, 33), ((17,), (16,)), dtype=dtype))


@DTYPES
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_dropout(kind, rate, dtype):
    more = {"plain": {}, "norm": {"norm": dtype}}[kind]
    ours = check(Case(9, 37, rate=rate, dtype=dtype, **more))
    if rate == 1:
        assert not ours["da00"].any() and not ours["db00"].any()


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kind", [{}, {"norm": torch.float32, "x": torch.float32}], ids=["plain", "norm"])
def test_fp32_masters(kind, dtype):
    """Adapters in fp32 over a narrower base: their gradients are fp32 sums. Also an fp32 x behind the norm."""
    ours = check(Case(37, 70, dtype=dtype, adapters=torch.float32, **kind))
    assert ours["da00"].dtype == ours["db00"].dtype == torch.float32


def test_gradients_of_masters_are_not_rounded():
    """The sums over tokens keep bits that bf16 does not have, those of an fp32 bias too."""
    case = Case(37, 70, dtype=torch.bfloat16, adapters=torch.float32, train=EVERYTHING)
    tensors = case.make()
    tensors["bias0"] = torch.randn(24).requires_grad_()
    ours = run(case, tensors)
    for name in ("da00", "db00", "db10", "da11", "dbias0"):
        rounded = (ours[name] == ours[name].bfloat16()).double().mean()
        assert rounded < 0.05, f"{name}: {rounded:.0%} of the elements are bf16 numbers"


@DTYPES
@pytest.mark.parametrize("norm", ["same", "fp32"])
@pytest.mark.parametrize("train", [f"^x|{ADAPTERS}", EVERYTHING, "norm_weight", ADAPTERS, "weight"])
def test_norm(train, norm, dtype):
    """A norm weight in the dtype of x or in fp32; frozen, training, and alone in training."""
    weight = dtype if norm == "same" else torch.float32
    ours = check(Case(7, 37, dtype=dtype, norm=weight, train=train))
    assert len(ours) - len(Case(norm=dtype).make()) == 4, "three projections, and x itself last"


@DTYPES
@pytest.mark.parametrize("residual", ["same", "fp32"])
def test_residual(residual, dtype):
    """The output takes the residual's dtype."""
    wide = dtype if residual == "same" else torch.float32
    ours = check(Case(7, 37, (33,), ((4,),), dtype=dtype, residual=wide))
    assert ours["output 0"].dtype == ours["dresidual"].dtype == wide


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("carried", [True, False])
def test_gradient_of_the_carried_x(carried, dtype):
    """Only through the projections, only through x, or both; the rest of the network decides."""

    def only(results):
        return tuple(torch.randn_like(r) if (r.shape[1] == 40) == carried else torch.zeros_like(r) for r in results)

    case = Case(7, 40, (24, 33), ((4,), (3,)), dtype=dtype, norm=dtype)
    ours = check(case, incoming=only)
    assert bool(ours["da00"].any()) is not carried


SUBSETS = ["nothing", "^x", ADAPTERS, r"b\d\d", r"^x|b\d\d", r"a\d\d", "weight1", "bias0", "a00|b11"]


@pytest.mark.parametrize("train", [*SUBSETS, EVERYTHING])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_only_some_gradients(rate, train):
    """The first layer's x, LoRA-FA's A, weights that train, and nothing at all."""
    check(Case(rate=rate, train=train))
    check(Case(N=(33,), ranks=((4,),), rate=rate, train=train, residual=torch.float32))


@pytest.mark.skipif(not TRITON, reason="the Triton launcher's choice")
@pytest.mark.parametrize("method", ["triton", "addmm", "augmented"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_way_to_multiply(dtype, method, monkeypatch):
    monkeypatch.setenv("FASTLORA_GEMM", method)
    check(Case(dtype=dtype, adapters=torch.float32, norm=dtype, rate=0.3))
    check(Case(N=(33,), ranks=((4,),), dtype=dtype, residual=torch.float32))
    check(Case(dtype=dtype, **ROTARY))


@DTYPES
@pytest.mark.parametrize(
    ("K", "N", "heads"),
    [(40, (256, 64, 64), 64), (16, (128, 256), 128), (24, (80, 160), 80), (24, (6, 12, 5), 6), (16, (512, 64), 32)],
)
def test_rotary(K, N, heads, dtype):
    """Heads that fill a tile, several of them in one, and those of which no tile is a multiple; ranks of none and some."""
    ours = check(
        Case(37, K, N, ((4,), (), (3,))[: len(N)], dtype=dtype, heads=heads, norm=dtype, adapters=torch.float32)
    )
    assert len(ours) > len(N)


def test_rotary_by_row():
    """Tables of their own for every row of the batch, as left padding makes them, are those of one long row."""
    case = Case(6, 16, (16, 8), ((4,), (3,)), heads=8)
    tensors = case.make()
    projections = [
        Projection(tensors[f"weight{i}"], None, (Branch(tensors[f"a{i}0"], tensors[f"b{i}0"]),)) for i in (0, 1)
    ]
    tables = tensors["cos"], tensors["sin"]
    long = lora_group(tensors["x"][None], projections, rotary=tables)
    rows = lora_group(tensors["x"].view(2, 3, 16), projections, rotary=[t.view(2, 3, 8) for t in tables])
    assert all(torch.equal(a.flatten(0, 1), b.flatten(0, 1)) for a, b in zip(long, rows, strict=True))


@pytest.mark.parametrize("operand", ["x", "weight1", "bias0", "a00", "a11", "b00", "b11", "norm_weight"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_the_budget_sees_a_perturbed(dtype, operand):
    case = Case(17, 40, dtype=dtype, norm=None if operand == "x" else dtype, train=EVERYTHING)
    check(case)
    with pytest.raises(AssertionError, match="over budget"):
        check(case, seen=perturbing(operand))


@pytest.mark.parametrize("operand", ["x", "weight0", "a00", "b00", "residual"])
def test_the_budget_sees_a_perturbed_half(operand):
    case = Case(17, 40, (33,), ((4,),), residual=torch.float32)
    check(case)
    with pytest.raises(AssertionError, match="over budget"):
        check(case, seen=perturbing(operand))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("operand", ["x", "weight0", "b10", "cos", "sin"])
def test_the_budget_sees_a_perturbed_rotation(operand, dtype):
    case = Case(17, 40, (24, 16), ((4,), (3,)), dtype=dtype, heads=8)
    check(case)
    with pytest.raises(AssertionError, match="over budget"):
        check(case, seen=perturbing(operand))


def test_the_budget_sees_one_wrong_bit_of_a_mask(monkeypatch):
    """One element of one mask, dropped for us and kept for the witness."""
    case = Case(9, 37, rate=0.3)
    to_ones = Drawn.__torch_dispatch__

    def one_bit_off(self, func, types, args=(), kwargs=None):
        before = len(self.masks)
        out = to_ones(self, func, types, args, kwargs)
        if before == 0 and self.masks:
            self.masks[0][4, 30] = 1 - self.masks[0][4, 30]
        return out

    monkeypatch.setattr(Drawn, "__torch_dispatch__", one_bit_off)
    with pytest.raises(AssertionError, match="over budget"):
        check(case, seen=dict)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_strides(dtype):
    """Views, transposed and expanded tensors on every side, and leading dimensions."""
    case = Case(6, 40, (24, 33), ((4,), (3,)), dtype=dtype, norm=dtype, rate=0.2, train=EVERYTHING)

    def strided():
        def view(t):
            other = t.detach().repeat_interleave(2, -1)[..., ::2] if t.dim() == 1 else t.detach().t().clone().t()
            return other.requires_grad_()

        return {name: view(t) for name, t in case.make().items()}

    check(case, strided)
    check(case, incoming=lambda results: tuple(torch.randn(r.shape[::-1]).to(r.dtype).t() for r in results))
    check(case, incoming=lambda results: tuple(torch.ones((), dtype=r.dtype).expand(r.shape) for r in results))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_leading_dimensions(lead):
    x, w, a, b = torch.randn(*lead, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    y, carried = lora_group(x, [Projection(w, None, (Branch(a, b),))], norm_weight=torch.ones(8))
    assert y.shape == (*lead, 6) and carried.shape == x.shape
    assert torch.equal(carried, x)


@pytest.mark.parametrize("kind", [{"norm": torch.float32}, {}], ids=["norm", "plain"])
def test_autocast(kind):
    """fp32 weights under autocast are the bf16 result; x, where a norm reads it, stays fp32."""
    case = Case(9, 37, rate=0.3, **kind)
    half = case._replace(dtype=torch.bfloat16, adapters=torch.float32, x=torch.float32 if "norm" in kind else None)
    tensors = half.make()
    wide = {n: t.detach().float().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    torch.manual_seed(1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = case.ours(leaves := _leaves(wide))
    incoming = random_incoming(results)
    under = _figures(results, leaves, incoming)
    torch.manual_seed(1)
    plain = run(half, tensors, lambda results: incoming)
    assert under["output 0"].dtype == torch.bfloat16
    if "norm" not in kind:
        plain.pop("dx")  # which is added up in fp32: see the next test
    for name, t in plain.items():
        assert t is None or torch.equal(under[name], t.to(under[name].dtype)), name


@pytest.mark.parametrize("cast", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kind", ["plain", "one", "norm", "rotary", "dropout"])
def test_autocast_of_fp32_weights(kind, cast):
    """Gradients of an fp32 x are added up in fp32, as autograd does."""
    norm, one = {"norm": torch.float32}, {"N": (33,), "ranks": ((4, 3),)}
    more = {"plain": {}, "one": one, "norm": norm, "rotary": norm | ROTARY, "dropout": norm | {"rate": 0.3}}[kind]
    ours = check(Case(37, 40, cast=cast, train="^(?!cos|sin)", **more))
    assert ours["output 0"].dtype == cast and ours["dx"].dtype == ours["da00"].dtype == torch.float32


HALVES = pytest.mark.parametrize(("dtype", "cast"), [FLOATS[1:], FLOATS[:0:-1]], ids=str)


@HALVES
@pytest.mark.parametrize("x", ["same", "fp32"])
@pytest.mark.parametrize("kind", ["norm", "rotary", "dropout"])
def test_autocast_to_the_other_half(kind, x, dtype, cast):
    """fp16 weights under bf16 autocast, and the other way round; x is in the weights' dtype, or in fp32 as the residual
    stream is from the first layer on."""
    more = {"norm": {}, "rotary": ROTARY, "dropout": {"rate": 0.3}}[kind]
    x = dtype if x == "same" else torch.float32
    for adapters in (dtype, torch.float32):
        case = Case(37, 40, dtype=dtype, cast=cast, norm=dtype, x=x, adapters=adapters, train="^(?!cos|sin)", **more)
        ours = check(case)
        assert ours["output 0"].dtype == cast and ours["dnorm_weight"].dtype == ours["dweight0"].dtype == dtype


@HALVES
@pytest.mark.parametrize("x", ["same", "fp32", "cast"])
@pytest.mark.parametrize("residual", ["same", "fp32", "cast"])
def test_residual_of_the_other_half(residual, x, dtype, cast):
    """The sum of a bf16 and an fp16 number is fp32."""
    dtypes = {"same": dtype, "fp32": torch.float32, "cast": cast}
    case = Case(7, 37, (33,), ((4,),), dtype=dtype, cast=cast, x=dtypes[x], residual=dtypes[residual], train=EVERYTHING)
    ours = check(case)
    assert ours["output 0"].dtype == torch.promote_types(dtypes[residual], cast)
    assert ours["dresidual"].dtype == dtypes[residual]


def test_a_sum_past_fp16():
    """Which the residual's own dtype would not hold."""
    weight, x = torch.ones(4, 4).half(), torch.full((2, 4), 3e4)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (y,) = lora_group(x, [Projection(weight)], residual=torch.full((2, 4), 6e4).half())
    assert y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("table", FLOATS)
@DTYPES
def test_rotary_tables_of_another_dtype(dtype, table):
    case = Case(9, 40, dtype=dtype, **ROTARY)

    def make():
        tensors = case.make()
        return tensors | {name: tensors[name].detach().to(table) for name in ("cos", "sin")}

    check(case, make)


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_two_runs_of_one_seed_are_bit_identical(kind):
    more = {"plain": {}, "norm": {"norm": torch.bfloat16}}[kind]
    case = Case(
        530 if kind == "plain" else 40,
        40,
        rate=0.3,
        dtype=torch.bfloat16,
        adapters=torch.float32,
        train=EVERYTHING,
        **more,
    )
    tensors = case.make()

    def once(seed):
        torch.manual_seed(seed)
        return run(case, tensors)

    first, second, other = once(1), once(1), once(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["output 0"], other["output 0"])


def test_independent_masks_of_torchs_generator():
    """One mask per adapter that drops; without dropout the generator is left alone."""
    case = Case(64, 64, (24, 24), ((4,), (4,)), rate=0.5)
    tensors = case.make()
    state = torch.get_rng_state()
    case._replace(rate=0.0).ours(tensors)
    assert torch.equal(torch.get_rng_state(), state)
    with Drawn() as drawn:
        case.ours(tensors)
        case.ours(tensors)
    assert not torch.equal(torch.get_rng_state(), state)
    assert len({mask.cpu().numpy().tobytes() for mask in drawn.masks}) == 4


RUNS = {"lora_gemm": 1, "lora_project_t": 1, "lora_gemm_t": 1, "lora_reduce_t": 1}


@pytest.mark.parametrize(
    ("case", "more"),
    [
        (Case(), {"lora_project": 1, "lora_reduce": 1}),
        (Case(norm=torch.float32), {"rms_norm_project": 1, "rms_norm_bwd_reduce": 1}),
        (Case(**ROTARY), {"lora_project": 1, "lora_reduce": 1, "rope": 1}),
    ],
    ids=["plain", "norm", "rotary"],
)
def test_one_pass_over_x(case, more):
    """However many projections and adapters: each operator runs once, and no other.

    The forward's rotation is the epilogue's in Triton; `rope` is the backward's. Elsewhere the product calls it too.
    """

    def op(**tensors):
        return case.ours(tensors)

    assert called(op, case.make()) == RUNS | more
    counts = called(op, case._replace(rate=0.5).make())
    assert {name: n for name, n in counts.items() if "mask" not in name} == RUNS | more


def saved(case):
    """Storages that the graph keeps for backward and that are no argument: name, and bytes."""
    kept = {}
    tensors = case.make()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        case.ours(tensors)
    arguments = {t.data_ptr() for t in tensors.values()}
    found = {key: t for key, t in kept.items() if t.numel()}
    inputs = ["x"] if tensors["x"].data_ptr() in found else []
    return inputs, sorted(t.nbytes for key, t in found.items() if key not in arguments)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_what_is_saved(kind, rate):
    """x, rank-sized s, one number per row, and masks of one bit per element: nothing else of M × K."""
    M, K, dtype = 64, 80, torch.bfloat16
    groups = {"N": (96, 32, 96), "ranks": ((4,), (8,), ())}
    more = {"plain": groups, "norm": groups | {"norm": dtype}}[kind]
    case = Case(M, K, rate=rate, dtype=dtype, adapters=torch.float32, bias=False, **more)
    inputs, others = saved(case)
    assert inputs == ["x"]
    R = sum(map(sum, case.ranks))
    expected = [M * R * 2] + [M * 4] * (kind == "norm")
    expected += [M * K // 8] * (sum(map(len, case.ranks)) if rate else 0)
    assert others == sorted(expected)


@pytest.mark.parametrize(("train", "inputs"), [(r"^x|b\d\d", []), (r"^x|a\d\d", ["x"]), ("^x|weight0", ["x"])])
def test_x_is_saved_for_those_who_train(train, inputs):
    """With every A frozen (LoRA-FA) and no adapter at all, nothing needs it."""
    assert saved(Case(64, 80, bias=False, ranks=((4,), (8,), ()), train=train))[0] == inputs
    assert saved(Case(64, 80, bias=False, ranks=((), (), ()), train="^x"))[0] == []
