import pytest
import torch
from ops.witness import DEVICE, FLOATS, check, perturbing, run
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops import dora

TRAINED = ("y", "magnitude", "bias")


def make(M=5, N=33, K=40, R=4, dtype=torch.float32, adapters=None, bias=True, train=TRAINED, lead=None, size=1.0):
    """W and B A of about one size: the norm is of their sum."""
    adapters = adapters or dtype
    tensors = {
        "y": torch.randn(*(lead or (M,)), N).to(dtype),
        "magnitude": (1 + 0.3 * torch.rand(N)).to(adapters),
        "weight": (torch.randn(N, K) / K**0.5).to(dtype),
        "lora_a": (torch.randn(R, K) / K**0.5).to(adapters),
        "lora_b": (size * torch.randn(N, R) / R**0.5).to(adapters),
        "bias": torch.randn(N).to(dtype) if bias else None,
    }
    return {name: t if t is None else t.requires_grad_(name in train) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 16, 16), (5, 33, 40), (7, 65, 33), (0, 33, 40), (70, 130, 150)])
def test_within_budget(M, N, K, dtype):
    ours = check(dora, lambda: make(M, N, K, dtype=dtype), scaling=0.5)
    assert ours["output 0"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("R", [1, 3, 16, 65])
def test_ranks(R, dtype):
    check(dora, lambda: make(9, 40, 70, R, dtype), scaling=2.0)


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("scaling", [0.1, 1.0, 4.0])
def test_fp32_masters(scaling, dtype):
    """Magnitude and adapters in fp32 over a narrower base."""
    ours = check(dora, lambda: make(37, 33, 70, dtype=dtype, adapters=torch.float32), scaling=scaling)
    assert ours["dmagnitude"].dtype == torch.float32
    assert ours["output 0"].dtype == ours["dy"].dtype == ours["dbias"].dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0.0, 1e-3])
def test_small_adapters(size, dtype):
    """As training begins: B = 0, and little more."""
    check(dora, lambda: make(37, 33, 70, dtype=dtype, size=size))


@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.float32, 0.5), (torch.bfloat16, 0.5), (torch.bfloat16, 0.9), (torch.float16, 0.5)]
)
def test_an_adapter_that_cancels_part_of_the_base(dtype, part):
    """The norm's three terms are larger than their sum, and must not lose more than the sum of matrices does."""

    def cancelling():
        tensors = make(37, 33, 24, 24, dtype=dtype, adapters=torch.float32)
        tensors["lora_a"] = torch.linalg.qr(torch.randn(24, 24))[0]
        tensors["lora_b"] = -part * tensors["weight"].float() @ tensors["lora_a"].t()
        return tensors

    check(dora, cancelling)


def test_autocast_leaves_the_norm_alone():
    tensors = make(37, 33, 40, size=4.0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        under = dora(**tensors)
    assert torch.equal(under, dora(**tensors))


@pytest.mark.parametrize("train", [(), ("y",), ("magnitude",), ("bias",), ("y", "magnitude"), TRAINED])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_only_some_gradients(dtype, train):
    check(dora, lambda: make(dtype=dtype, train=train))


def test_the_norm_is_held_constant():
    """As the paper proposes: no gradient reaches W, A or B through it."""
    ours = check(dora, lambda: make(train=(*TRAINED, "weight", "lora_a", "lora_b")))
    assert ours["dweight"] is ours["dlora_a"] is ours["dlora_b"] is None
    assert ours["dy"].any() and ours["dmagnitude"].any()


@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 0)])
def test_leading_dimensions(lead):
    assert check(dora, lambda: make(lead=lead))["output 0"].shape == (*lead, 33)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_strides(dtype):
    def view(t):
        return (t.detach().t().clone().t() if t.dim() == 2 else t.detach().repeat_interleave(2)[::2]).requires_grad_(
            t.requires_grad
        )

    check(dora, lambda: {name: view(t) for name, t in make(dtype=dtype).items()})
    check(dora, lambda: make(dtype=dtype), incoming=lambda y: [torch.ones((), dtype=dtype).expand(5, 33)])
    check(dora, lambda: make(dtype=dtype), incoming=lambda y: [torch.randn(33, 5).to(dtype).t()])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", ["y", "magnitude", "weight", "lora_a", "lora_b", "bias"])
def test_the_budget_sees_a_perturbed(operand, dtype):
    def wide():
        return make(37, 33, 40, 8, dtype=dtype)

    def scaled(tensors):  # signs that alternate leave a norm as it was
        return tensors | {operand: (tensors[operand] * (1 + 32 * torch.finfo(dtype).eps)).detach().requires_grad_()}

    check(dora, wide)
    with pytest.raises(AssertionError, match="over budget"):
        check(dora, wide, seen=scaled if operand in ("weight", "lora_a", "lora_b") else perturbing(operand))


class Largest(TorchDispatchMode):
    """Within it, `bytes` is the largest tensor that any operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_w_plus_sba_is_never_materialised(dtype):
    """Nothing that is made, forward or backward, is as large as W."""
    tensors = make(M=3, N=512, K=256, R=4, dtype=dtype, adapters=torch.float32)
    with Largest() as largest:
        run(dora, tensors)
    assert 0 < largest.bytes < tensors["weight"].nbytes


def test_what_is_saved():
    """y, and one number per output."""
    kept = {}
    tensors = make(64, 96, 80)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        dora(**tensors)
    arguments = {t.data_ptr() for t in tensors.values()}
    assert tensors["y"].data_ptr() in kept
    assert all(t.numel() == 96 for key, t in kept.items() if key not in arguments)


def test_two_runs_are_bit_identical():
    tensors, dy = make(530, 33, 40, dtype=torch.bfloat16), torch.randn(530, 33).bfloat16()
    first, second = (run(dora, tensors, lambda y: [dy]) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in ("output 0", "dy", "dmagnitude", "dbias"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(32, 40)}, r"weight has shape \(32, 40\), needs \(33, any\)"),
        ({"magnitude": torch.ones(32)}, r"magnitude has shape \(32,\), needs \(33\) to match the last dimension of y"),
        ({"magnitude": torch.ones(1, 33)}, r"magnitude has shape \(1, 33\), needs \(33\)"),
        ({"lora_a": torch.ones(4, 41)}, r"lora_a has shape \(4, 41\), needs \(any, 40\) as \(R, K\)"),
        ({"lora_b": torch.ones(33, 5)}, r"lora_b has shape \(33, 5\), needs \(33, 4\) as \(N, R\)"),
        ({"bias": torch.ones(32)}, r"bias has shape \(32,\), needs \(33\)"),
        ({"lora_a": torch.ones(4, 40, device="meta")}, f"lora_a is on meta, needs {DEVICE}, the device of y"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = {"y": (5, 33), "magnitude": (33,), "weight": (33, 40), "lora_a": (4, 40), "lora_b": (33, 4)}
    with pytest.raises(ValueError, match="dora: " + message):
        dora(**{name: torch.ones(shape) for name, shape in good.items()} | change)
