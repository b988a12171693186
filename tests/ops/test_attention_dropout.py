"""Dropout in attention: torch's, under a mask that is read off the operator and given to the witness.

The mask is what an attention with equal scores and the identity for values lets through.
"""

import pytest
import torch
import torch.nn.functional as F
from budget import Budget
from ops.test_dropout import BOUND, agreement, z
from ops.test_flash_attention import make, packed, padding
from ops.witness import TRITON, _figures, _leaves, _results, random_incoming, run
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastlora import reference
from fastlora.ops import flash_attention

CASES = {
    "causal": ({"T": 66}, {}),
    "full, other keys": ({"H": 4, "H_kv": 2, "T": 40, "T_kv": 75, "D": 64}, {"causal": False}),
    "head of 128": ({"T": 66, "D": 128}, {}),
    "decoding": ({"B": 2, "T": 3, "T_kv": 90}, {}),
    "left padding": ({"B": 2, "T": 66, "key_padding_mask": padding(66, -50, 66)}, {}),
    "packed, window": ({"T": 128, "position_ids": packed((60, 68))}, {"window": 40}),
}
FP32 = ("causal", "left padding")


def kept(seed, p, *, B=1, H=2, H_kv=1, T=70, T_kv=None, D=None, **masks) -> torch.Tensor:
    """(B, H, T, T_kv) booleans: what is visible and not dropped."""
    T_kv = T_kv or T
    wide = 128 if T_kv <= 128 else 256
    zeros = {name: torch.zeros(B, heads, n, wide).half() for name, heads, n in (("q", H, T), ("k", H_kv, T_kv))}
    v = torch.eye(T_kv, wide).half().expand(B, H_kv, T_kv, wide)
    torch.manual_seed(seed)
    return flash_attention(**zeros, v=v, dropout_p=p, **masks)[..., :T_kv] != 0


class Dropping(TorchFunctionMode):
    """In the place of F.dropout, a given mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.dropout:
            return torch.where(self.mask, args[0] / (1 - kwargs["p"]), 0)
        return function(*args, **(kwargs or {}))


def excesses(case: str, dtype: torch.dtype, p: float, draws: int, change=lambda mask: mask) -> list[str]:
    """What is over the budget under the same masks, changed for the witness: as witness.check."""
    sizes, options = CASES[case]
    budgets: dict[str, Budget] = {}
    for seed in range(draws):
        mask = change(kept(seed, p, **sizes, **options))
        tensors = make(**sizes, dtype=dtype)
        leaves = _leaves(tensors)
        torch.manual_seed(seed)
        results = _results(flash_attention, leaves, options | {"dropout_p": p})
        incoming = random_incoming(results)
        figures = [_figures(results, leaves, incoming)]
        for wide in (None, torch.float64):
            leaves = _leaves(tensors, wide)
            with Dropping(mask):
                results = _results(reference.flash_attention, leaves, options | {"dropout_p": p})
            figures.append(_figures(results, leaves, incoming))
        for name in ("output 0", "dq", "dk", "dv"):
            budgets.setdefault(name, Budget(name)).add(*(f[name] for f in figures))
        over = [excess for budget in budgets.values() if (excess := budget.excess())]
        if not over:
            return []
    return over


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.bfloat16) for case in CASES), *((case, torch.float32) for case in FP32)]
)
def test_results_under_the_same_mask(case, dtype):
    assert excesses(case, dtype, 0.3, draws=16) == []


def test_the_budget_sees_one_probability_dropped():
    def one_less(mask):
        visible = mask.nonzero()
        mask[tuple(visible[len(visible) // 2])] = False
        return mask

    assert excesses("causal", torch.float32, 0.3, draws=1, change=one_less)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_and_independence(p):
    """Of rows, columns and heads; of neighbours along the keys, the queries and the heads; of seeds."""
    sizes = {"B": 2, "H": 4, "T": 128, "causal": False}
    mask, other = (kept(seed, p, **sizes) for seed in (1, 2))
    for name, rows in {"whole": mask.flatten(), "rows": mask, "columns": mask.mT, "heads": mask.flatten(2)}.items():
        assert z(rows, p).abs().max() < BOUND, name
    assert abs(agreement(mask, other, p)) < BOUND
    for axis in range(4):
        for lag in (1, 2, 4, 8, 32):
            if lag < mask.shape[axis]:
                # Two halves of the pairs, so that no element is in two pairs of one count.
                pairs = mask.movedim(axis, 0)[: mask.shape[axis] // (2 * lag) * 2 * lag].unflatten(0, (-1, 2, lag))
                assert abs(agreement(pairs[:, 0], pairs[:, 1], p)) < BOUND, (axis, lag)


@pytest.mark.skipif(not TRITON, reason="the CPU kernel draws slab after slab")
def test_a_function_of_place_alone():
    """Whatever the shapes and the other masks."""
    small = kept(3, 0.4, H=2, T=40, causal=False)
    large = kept(3, 0.4, H=2, T=130, causal=False)
    assert torch.equal(small, large[:, :, :40, :40])
    assert torch.equal(kept(3, 0.4, H=2, T=40), small.tril())


def test_a_seed_of_torchs_generator():
    """The same one, the same bits; one number drawn per call, and none at a rate of 0."""
    tensors, dout = make(T=40), torch.randn(1, 2, 40, 32)

    def once(p, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return run(flash_attention, tensors, lambda _: [dout], dropout_p=p)

    first, again, later = once(0.5, 1), once(0.5, 1), once(0.5)
    assert all(torch.equal(first[name], again[name]) for name in ("output 0", "dq", "dk", "dv"))
    assert not torch.equal(first["output 0"], later["output 0"])
    state = torch.get_rng_state()
    assert torch.equal(once(0.0)["output 0"], flash_attention(**tensors))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rate_of_one():
    found = run(flash_attention, make(T=40), dropout_p=1.0)
    assert not any(found[name].any() for name in ("output 0", "dq", "dk", "dv"))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_drops_the_same_again(reentrant):
    tensors, dout = make(T=40), torch.randn(1, 2, 40, 32)

    def checkpointed(q, k, v, **options):
        return checkpoint(lambda q, k, v: flash_attention(q, k, v, **options), q, k, v, use_reentrant=reentrant)

    found = []
    for function in (flash_attention, checkpointed):
        torch.manual_seed(4)
        found.append(run(function, tensors, lambda _: [dout], dropout_p=0.5))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("output 0", "dq", "dk", "dv"))
