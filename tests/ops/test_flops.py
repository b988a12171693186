"""FlopCounterMode counts a fused step: every operator's formula is what its products are, here and in the witness."""

from collections.abc import Sequence

import pytest
import torch
from ops import test_lora_group, test_lora_mlp
from ops.test_operators import registered, samples
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastlora import ops, reference
from fastlora.kernels import _library

NO_PRODUCTS = {
    *("rms_norm_fwd", "rms_norm_bwd", "rope", "swiglu_fwd", "swiglu_bwd", "dropout_mask", "apply_mask"),
    *("cross_entropy_rows", "dequantize_4bit", "attention_softmax", "attention_softmax_bwd", "accumulate"),
}


# A product in place, which torch forgets.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, left, right, **more: 2 * left[0] * left[1] * right[1]}


def counted(function, *arguments, **more):
    with FlopCounterMode(display=False, **more) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_every_operator_has_a_formula_or_no_products():
    with_formula = {name for name in registered() if getattr(torch.ops.fastlora, name) in flop_registry}
    assert not with_formula & NO_PRODUCTS
    assert with_formula | NO_PRODUCTS == set(registered())


@pytest.mark.cpu_only(reason="of what serves on a CPU")
@pytest.mark.parametrize("name", registered())
def test_a_formula_counts_the_products_of_the_composition(name):
    """torch counts what the composition is made of, where it is not hidden inside of an operator."""
    composition = _library.implementations[name][1]
    for arguments in samples()[name]:
        arguments = whole(name, arguments)
        flops = counted(getattr(torch.ops.fastlora, name), *arguments)
        assert flops == counted(composition, *arguments, custom_mapping=IN_PLACE)
        assert bool(flops) == (name not in NO_PRODUCTS and (name, len(arguments[1])) != ("lora_project", 0))


def whole(name, arguments):
    """So that the composition leaves out no product that comes to nothing."""
    if name == "linear_cross_entropy_fwd":
        return (*arguments[:4], -100, *arguments[5:])
    if name.startswith("fused_attention"):  # the first key that a query sees is the first
        return tuple(t * 0 if isinstance(t, torch.Tensor) and t.dtype == torch.int64 else t for t in arguments)
    return arguments


def step(op, tensors, **options):
    """Forward and backward."""
    result = op(**tensors, **options)
    outputs = result if isinstance(result, Sequence) else [result]
    pairs = [(y, torch.randn_like(y)) for y in outputs if y.requires_grad]
    torch.autograd.backward(*zip(*pairs))


def floats(train="", **shapes):
    return {name: torch.randn(shape).requires_grad_(name in train.split()) for name, shape in shapes.items()}


@pytest.mark.parametrize(("M", "K", "N", "R"), [(5, 24, 40, 4), (1, 16, 8, 1), (7, 33, 17, 65)])
@pytest.mark.parametrize(
    ("train", "factors"),
    # Of M K N, M K R and M R N: y and s; dx and ds; dW, dA and dB.
    [
        ("x lora_a lora_b", (2, 3, 3)),
        ("lora_a lora_b", (1, 2, 3)),
        ("lora_b", (1, 1, 2)),
        ("x", (2, 2, 2)),
        ("x weight lora_a lora_b bias", (3, 3, 3)),
    ],
)
def test_lora_linear(train, factors, M, K, N, R):
    tensors = floats(train, x=(M, K), weight=(N, K), lora_a=(R, K), lora_b=(N, R), bias=(N,))
    wide, down, up = factors
    expected = 2 * (wide * M * K * N + down * M * K * R + up * M * R * N)
    assert counted(lambda: step(ops.lora_linear, tensors)) == expected
    assert counted(lambda: step(reference.lora_linear, tensors)) == expected


def group_and_mlp():
    group, mlp = test_lora_group, test_lora_mlp
    for rate in (0.0, 0.3):
        for norm in (None, torch.float32):
            for train in ("^x|residual|[ab]\\d\\d", "", "[ab]\\d\\d", r"b\d\d", "^x"):
                yield group, group.Case(rate=rate, norm=norm, train=train)
            for train in (r"^x|_[ab]\d", "", r"_[ab]\d", r"_b\d", "^x", "down_[ab]"):
                yield mlp, mlp.Case(rate=rate, norm=norm, train=train)
    yield group, group.Case(N=(33,), ranks=((4,),), residual=torch.float32)
    yield group, group.Case(9, 70, (24, 16, 17), heads=8)
    yield mlp, mlp.Case(9, 33, 37, ranks=((), (3,), ()))


@pytest.mark.parametrize(("module", "case"), group_and_mlp())
def test_groups_count_as_the_witness(module, case):
    tensors = case.make()

    def fused():
        with module.Drawn() as drawn:
            results = case.ours(tensors) if module is test_lora_group else case.call(ops.lora_mlp, tensors)
        masks.extend(mask.to(case.dtype) for mask in drawn.masks)
        step(lambda: results, {})

    def eager():
        if module is test_lora_group:
            return case.witness(tensors, masks)
        return case.call(reference.lora_mlp, tensors, masks=case.kept(masks))

    masks = []
    flops = counted(fused)
    assert flops == counted(lambda: step(eager, {})) > 0


@pytest.mark.parametrize(("M", "H", "V"), [(5, 24, 40), (37, 8, 129)])
@pytest.mark.parametrize(("train", "products"), [("", 1), ("hidden", 2), ("weight", 2), ("hidden weight", 3)])
def test_linear_cross_entropy(train, products, M, H, V):
    """By design the gradients' products are in the forward, and the total is that of a forward and a backward."""
    tensors = floats(train, hidden=(M, H), weight=(V, H)) | {"labels": torch.randint(0, V, (M,))}
    expected = 2 * products * M * H * V
    assert counted(lambda: ops.linear_cross_entropy(**tensors)) == expected
    if train:
        assert counted(lambda: step(ops.linear_cross_entropy, tensors)) == expected
        assert counted(lambda: step(reference.linear_cross_entropy, tensors)) == expected
    with torch.no_grad():
        assert counted(lambda: ops.linear_cross_entropy(**tensors)) == 2 * M * H * V


@pytest.mark.parametrize(("H", "H_kv", "T", "T_kv", "D"), [(4, 2, 6, 6, 32), (3, 3, 17, 40, 64), (8, 1, 1, 9, 80)])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention(causal, H, H_kv, T, T_kv, D):
    """In full, causal or not; and by design the backward makes the scores again, a product that eager's has saved."""
    tensors = floats("q k v", q=(2, H, T, D), k=(2, H_kv, T_kv, D), v=(2, H_kv, T_kv, D))
    product = 2 * 2 * H * T * T_kv * D
    assert counted(lambda: ops.flash_attention(**tensors, causal=causal)) == 2 * product
    assert counted(lambda: step(ops.flash_attention, tensors, causal=causal)) == (2 + 5) * product
    assert counted(lambda: step(reference.flash_attention, tensors, causal=causal)) == (2 + 4) * product


@pytest.mark.parametrize("T", [6, 17])
def test_attention_as_torch_counts_its_own(T):
    """The formulas of its flash kernels, which never run on a CPU."""
    aten = torch.ops.aten
    q, k = torch.randn(2, 4, T, 32), torch.randn(2, 4, 9, 32)
    forward = flop_registry[aten._scaled_dot_product_flash_attention](q, k, k)
    backward = flop_registry[aten._scaled_dot_product_flash_attention_backward](q, q, k, k)
    assert flop_registry[torch.ops.fastlora.flash_attention_fwd](q, k, k) == forward
    assert flop_registry[torch.ops.fastlora.flash_attention_bwd](q, q, k, k) == backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora(dtype):
    """By design not W + s B A but products of rank R; torch counts them, and dm of every output, a product of M."""
    M, N, K, R = 5, 33, 40, 4
    tensors = floats("y magnitude", y=(M, N), magnitude=(N,), weight=(N, K), lora_a=(R, K), lora_b=(N, R))
    tensors |= {name: tensors[name].detach().to(dtype) for name in ("weight", "lora_a", "lora_b")}
    expected = 2 * (N * K * R + K * R * R + N * R * R + M * N)
    assert counted(lambda: step(ops.dora, tensors)) == expected


def test_by_operator():
    """The table of a step names operators, not what they are made of."""
    tensors = floats("x lora_a lora_b", x=(5, 24), weight=(40, 24), lora_a=(4, 24), lora_b=(40, 4))
    with FlopCounterMode(display=False) as counter:
        step(ops.lora_linear, tensors)
    names = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert names == {
        f"fastlora.{n}"
        for n in ("lora_project", "lora_gemm", "lora_project_t", "lora_gemm_t", "lora_reduce", "lora_reduce_t")
    }
