"""The budget keeps what is as good as eager, and rejects what is not."""

import pytest
import torch
from budget import Budget, assert_within_budget, ulp

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# On a GPU the same seed draws other numbers.
OF_ONE_SEED = pytest.mark.cpu_only(reason="holds of the numbers that one seed draws on a CPU")


def products(dtype):
    """A matrix product: the operands, eager's result and the truth."""
    x, w = torch.randn(64, 96).to(dtype), torch.randn(96, 48).to(dtype)
    return x, w, x @ w, x.double() @ w.double()


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    x = (torch.randn(1000) * 2.0 ** torch.randint(-12, 12, (1000,))).to(dtype)
    following = torch.nextafter(x.abs(), torch.tensor(torch.inf, dtype=dtype))
    assert torch.equal(ulp(x, dtype), following.double() - x.abs().double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_keeps_another_order_of_summation(dtype):
    budget = Budget("product")
    for _ in range(8):
        x, w, eager, truth = products(dtype)
        order = torch.randperm(96)
        budget.add(x[:, order] @ w[order], eager, truth)
    assert budget.excess() is None, budget.excess()


@pytest.mark.parametrize("dtype", FLOATS)
def test_keeps_one_rounding_of_the_truth_beside_an_exact_yardstick(dtype):
    *_, truth = products(dtype)
    assert_within_budget(truth.to(dtype), truth, truth, "product")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", [0, 1])
def test_rejects_a_perturbed_operand(operand, dtype):
    *operands, eager, truth = products(dtype)
    noise = 1.0 - 2.0 * torch.randint(0, 2, operands[operand].shape)
    operands[operand] = (operands[operand] * (1 + 16 * torch.finfo(dtype).eps * noise)).to(dtype)
    with pytest.raises(AssertionError, match="product: over budget in rms: error"):
        assert_within_budget(operands[0] @ operands[1], eager, truth, "product")


@pytest.mark.parametrize("dtype", FLOATS)
def test_rejects_one_wrong_element_that_the_rms_would_hide(dtype):
    truth = torch.rand(1000, 1000, dtype=torch.float64)
    ours, eager = truth.to(dtype), truth.to(dtype)
    ours[3, 5] += 4 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="over budget in max"):
        assert_within_budget(ours, eager, truth, "product")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rejects_what_is_not_finite(bad):
    _, _, eager, truth = products(torch.float32)
    ours = eager.clone()
    ours[0, 0] = bad
    with pytest.raises(AssertionError, match="1 of 3072 elements are NaN or infinite"):
        assert_within_budget(ours, eager, truth, "product")


def drawn(size: int, off: float = 1.0) -> Budget:
    """A quantity of this size, over draws: the errors of ours are eager's kind, or ``off`` times larger."""
    budget = Budget("noise", luck=True)
    for _ in range(16):
        truth, *errors = torch.randn(3, size, dtype=torch.float64)
        budget.add((truth + 1e-2 * off * errors[0]).float(), (truth + 1e-2 * errors[1]).float(), truth)
        if off == 1 and budget.excess() is None:
            break
    return budget


@OF_ONE_SEED
@pytest.mark.parametrize("size", [1, 8, 512])
def test_luck_is_no_excess(size):
    """Of many quantities of no more error than eager's: none. Without allowing for luck, some."""
    torch.manual_seed(0)
    budgets = [drawn(size) for _ in range(500)]
    assert not [budget.excess() for budget in budgets if budget.excess()]
    strict = 0
    for budget in budgets:
        budget._luck = False
        strict += budget.excess() is not None
    assert strict


@OF_ONE_SEED
@pytest.mark.parametrize(("size", "off"), [(1, 8), (8, 2.5), (512, 1.4), (10_000, 1.25)])
def test_luck_hides_no_fault(size, off):
    """The smaller the quantity, the larger what can be told from luck."""
    torch.manual_seed(0)
    assert all(drawn(size, off).excess() for _ in range(20))


@OF_ONE_SEED
def test_luck_hides_no_wrong_element():
    torch.manual_seed(0)
    budget = Budget("noise", luck=True)
    for _ in range(16):
        truth, noise, ours = torch.randn(3, 512, dtype=torch.float64)
        ours[7] += 6
        budget.add((truth + 1e-2 * ours).float(), (truth + 1e-2 * noise).float(), truth)
    rms, maximum = budget.figures()
    assert rms.times < 1 < maximum.times
    assert rms.luck < 1.1 < maximum.luck


def test_the_first_draw_is_no_luck():
    """It may be of another kind: larger errors on both sides."""
    budget = Budget("noise", luck=True)
    for size in (100.0, 1.0, 1.0):
        budget.add(torch.tensor([1.2 * size]), torch.tensor([size]), torch.zeros(1, dtype=torch.float64))
    assert [figures.luck for figures in budget.figures()] == [1, 1]
    assert "error" in budget.excess()


def test_rejects_another_shape():
    _, _, eager, truth = products(torch.float32)
    with pytest.raises(AssertionError, match="product: torch.Size"):
        assert_within_budget(eager.t(), eager, truth, "product")


def test_the_poison_reaches_every_allocation():
    """conftest's NaN, from Python and from ATen."""
    like = torch.ones(3)
    for fresh in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty(3, dtype=torch.bfloat16)):
        assert fresh.isnan().all()
