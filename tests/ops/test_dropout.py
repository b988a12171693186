"""Dropout masks as bits: the layout, the rate, and independence.

Every statistic is a number of standard deviations of a normal approximation, held below 6: a correct generator exceeds
that once in 5·10⁸ figures, and the tests look at a few thousand.
"""

import math

import pytest
import torch
from masks import unpack
from ops.witness import FLOATS, TRITON, Calls

from fastlora import ops
from fastlora.kernels import dropout  # noqa: F401  registers the operators
from fastlora.kernels._library import INTERPRET

M, K = (64, 256) if INTERPRET else (512, 1024)
BOUND = 6.0
RATES = [0.05, 0.1, 0.5, 0.9]
LAST_SEED = (1 << 62) - 1
KNOWN = {
    "cpu": {0: "580223be63aa", 1: "5c76a05ef7d1", LAST_SEED: "a0ea4d8648cd"},
    "triton": {0: "fe9eed7eb70a", 1: "ef2f3b0e2777", LAST_SEED: "edeeda22d168"},
}


def bits(like: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    return torch.ops.fastlora.dropout_mask(like, torch.tensor(seed, device="cpu"), p)


def draw(seed: int, p: float = 0.5, m: int = M, k: int = K) -> torch.Tensor:
    """(m, k) booleans: what is kept."""
    return unpack(bits(torch.empty(m, k), seed, p), k)


def z(kept: torch.Tensor, p: float) -> torch.Tensor:
    """Standard deviations between each row's count and the binomial mean."""
    n = kept.shape[-1]
    return (kept.double().sum(-1) - n * (1 - p)) / math.sqrt(n * p * (1 - p))


def agreement(a: torch.Tensor, b: torch.Tensor, p: float) -> float:
    """Standard deviations between how often a and b agree and how often independent masks do."""
    same = p * p + (1 - p) * (1 - p)
    return float(z((a == b).flatten(), 1 - same))


@pytest.mark.parametrize("p", RATES)
def test_keep_rate(p):
    """Of the whole mask, and of every row, column and bit of a byte."""
    kept = draw(1, p)
    figures = {
        "whole": z(kept.flatten(), p),
        "rows": z(kept, p),
        "columns": z(kept.t(), p),
        "bits": z(kept.view(-1, 8).t(), p),
    }
    for name, found in figures.items():
        assert found.abs().max() < BOUND, f"{name}: {found.abs().max():.1f} standard deviations"


@pytest.mark.parametrize("p", RATES)
def test_rows_scatter_as_they_should(p):
    """The counts of rows vary as binomial counts do: not more, and not less."""
    found = z(draw(2, p, m=4 * M), p)
    chi_square = (found.square().sum() - len(found)) / math.sqrt(2 * len(found))
    assert abs(chi_square) < BOUND


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 32, 64, K, K + 1, 8 * K])
def test_elements_are_independent(lag, p):
    """Of those any distance away: the next, in the next byte, in the next row."""
    kept = draw(3, p).flatten()
    # Two halves of the pairs, so that no element is in two pairs of one count.
    for start in (0, lag):
        pairs = kept[start : start + (len(kept) - start) // (2 * lag) * 2 * lag].view(-1, 2, lag)
        assert abs(agreement(pairs[:, 0], pairs[:, 1], p)) < BOUND


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_seeds_are_independent(p):
    """Neighbouring seeds, seeds a bit apart, and seeds that differ in the upper half only."""
    seeds = [0, 1, 2, 3, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 61, LAST_SEED, 0x1234567890ABCDEF >> 2]
    masks = [draw(seed, p) for seed in seeds]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(agreement(a, b, p)) < BOUND


def test_a_mask_is_not_another_shifted():
    """Neither the counter nor the seed walks into the other's sequence."""
    masks = [draw(seed).flatten() for seed in (5, 6)]
    for shift in (1, 2, 4, 8, 16, 4 * K, 8 * K):
        assert abs(agreement(masks[0][shift:], masks[1][:-shift], 0.5)) < BOUND
        assert abs(agreement(masks[1][shift:], masks[0][:-shift], 0.5)) < BOUND


def test_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first = draw(7, 0.3)
    torch.rand(3)
    assert torch.equal(draw(7, 0.3), first)
    torch.set_rng_state(before)
    draw(7, 0.3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, LAST_SEED])
def test_known_masks(seed):
    """A run that is resumed elsewhere drops the same: csrc and ATen make one sequence, Triton another."""
    known = KNOWN["triton" if TRITON else "cpu"][seed]
    mask = bits(torch.empty(2, 20), seed, 0.5)
    assert bytes(mask.flatten().tolist()).hex() == known


def test_a_higher_rate_drops_more_of_the_same():
    """One random number per element is compared with the rate, whatever the rate."""
    low, high = draw(8, 0.2), draw(8, 0.7)
    assert (high <= low).all() and high.sum() < low.sum()


@pytest.mark.parametrize(("p", "kept"), [(1.0, 0), (1e-12, M * K)])
def test_extreme_rates(p, kept):
    assert draw(9, p).sum() == kept


@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 8), (5, 33), (7, 100), (0, 16), (2, 1030)])
def test_layout(m, k):
    """One byte for eight elements of a row, on any dtype of x; a row begins a byte."""
    for dtype in FLOATS:
        like = torch.empty(m, k, dtype=dtype)
        mask = bits(like, 1, 0.5)
        assert mask.shape == (m, -(-k // 8)) and mask.dtype == torch.uint8
        assert torch.equal(mask, bits(torch.empty(m, k), 1, 0.5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 8), (5, 33), (0, 16), (40, 1030)])
def test_apply_mask(m, k, dtype):
    """x, bit for bit, where it is kept, and zero elsewhere, even of what is infinite."""
    x = torch.randn(m, k).to(dtype)
    mask = torch.randint(0, 256, (m, -(-k // 8)), dtype=torch.uint8)
    out = torch.ops.fastlora.apply_mask(x, mask)
    assert out.dtype == dtype
    assert torch.equal(out, torch.where(unpack(mask, k), x, 0))


@pytest.mark.parametrize("draw", ["attention", "group"])
def test_seeds_are_drawn_on_the_cpu_whatever_the_default_device(draw):
    """A checkpoint's second forward runs where the default device is off: another generator would draw other masks."""
    q = torch.randn(1, 1, 8, 32)
    projection = ops.Projection(
        torch.randn(64, 32), None, (ops.Branch(torch.randn(4, 32), torch.randn(64, 4), 1.0, 0.5),)
    )
    with Calls() as seen, torch.device("meta"):
        if draw == "attention":
            ops.flash_attention(q, q, q, dropout_p=0.5)
        else:
            ops.lora_group(q[0, 0], [projection])
    tensors = [arg for _, args in seen.calls for arg in args if isinstance(arg, torch.Tensor)]
    seeds = [t for t in tensors if t.dtype == torch.int64]
    assert seeds and all(seed.device.type == "cpu" for seed in seeds)
