"""The cases under bench/ops: what they count, and that their gates see."""

import pytest
import torch

from bench import gate, harness
from bench.case import Provider
from bench.ops import attention_masked, cases
from fastlora.kernels import _tiles

BF16 = torch.bfloat16
OPS = ("lora_gemm", "lora_gemm_t", "attention", "attention_masked")


def of(name, device="cpu", quick=True):
    """The cases of one op; those for a GPU as for an H100."""
    with _tiles.assumed_arch(90):
        return list(cases(name, device, BF16, quick))


def red(case, run, **options):
    green, why = gate.reason(Provider("x", run, **options), gate.Witness(case, "cpu", BF16).check)
    return green is False and why.startswith("parity is red")


def off(value):
    """Every tensor of numbers two per cent off, those in tuples too."""
    if isinstance(value, tuple):
        return tuple(map(off, value))
    return value * 1.02 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", OPS)
def test_every_candidate_is_red_on_operands_that_are_off(name):
    for case in of(name):
        for provider in harness.providers(case):
            if provider.run and provider.name != "torch.compile":

                def wrong(run=provider.run, **inputs):
                    return run(**{letter: off(value) for letter, value in inputs.items()})

                assert red(case, wrong, witness=provider.witness), (case.op, provider.name)


@pytest.mark.parametrize("name", ["lora_gemm", "lora_gemm_t"])
def test_the_base_product_alone_is_not_the_op(name):
    for case in of(name):
        bases = [provider for provider in case.providers if provider.name.startswith("base alone")]
        assert bases
        for base in bases:
            assert red(case, base.run), (case.op, base.name)


def test_attention_that_masks_causality_alone_is_not_the_op():
    for case in of("attention_masked"):
        assert red(case, attention_masked.by_row_unmasked), case.op


def test_padding_on_the_right_hides_nothing_from_real_tokens():
    """Why "sdpa causal alone" and "varlen unpadded" are rivals: outputs and gradients of real tokens are the op's."""
    _, case = of("attention_masked")
    inputs = case.prepare("cpu", torch.float64)
    assert min(inputs["lengths"]) < case.shape["T"]
    real = inputs["key_padding_mask"][:, :, None, None]

    def figures(run):
        out = run(**inputs) * real
        return out, *torch.autograd.grad(out, [inputs[name] for name in case.wrt], torch.ones_like(out))

    expected = figures(attention_masked.by_row)
    for run in (attention_masked.by_row_unmasked, attention_masked.by_row_unpadded):
        for one, other in zip(figures(run), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_functions_of_sequences_are_called_as_they_should():
    """By one written out here, which takes (tokens, heads, D), int32 bounds and the longest, as varlen_attn does."""

    def function(q, k, v, bounds, longest):
        assert bounds.dtype == torch.int32 and longest == int(bounds.diff().max())
        each = [[t[i:j].transpose(0, 1)[None] for t in (q, k, v)] for i, j in bounds.unfold(0, 2, 1).tolist()]
        return torch.cat([attention_masked.eager(*one)[0] for one in each])

    packed, padded = of("attention_masked")
    for case, run, witness in (
        (packed, attention_masked.packed_by(function), None),
        (padded, attention_masked.unpadded_by(function), attention_masked.by_row_unpadded),
    ):
        assert gate.reason(Provider("x", run, witness=witness), gate.Witness(case, "cpu", BF16).check) == (True, None)


@pytest.mark.parametrize(("name", "columns", "reduced"), [("lora_gemm", 12288, 4112), ("lora_gemm_t", 4096, 12336)])
def test_work_of_q_k_and_v_by_hand(name, columns, reduced):
    [case] = [c for c in of(name, "cuda", quick=False) if (c.shape["M"], c.shape["R"], c.shape["P"]) == (4096, 16, 3)]
    assert case.forward.flops == 2 * 4096 * columns * reduced
    assert case.forward.bytes == 2 * (4096 * 4096 + 12288 * 4096 + 4096 * 12288 + 4096 * 48 + 12288 * 16)


def test_work_of_packed_attention_by_hand():
    case = of("attention_masked", "cuda", quick=False)[0]
    assert attention_masked.documents(4096) == [691, 1417, 1318, 471, 199]
    assert case.forward.flops == 2 * 32 * 128 * (691**2 + 1417**2 + 1318**2 + 471**2 + 199**2)
    assert case.forward.bytes == 2 * (4 * 4096 * 32 * 128)


def test_the_tile_of_an_a100_is_measured_on_other_gpus():
    def tiles(arch):
        with _tiles.assumed_arch(arch):
            return [p for case in cases("lora_gemm", "cuda", BF16) for p in case.providers if "A100" in p.name]

    assert tiles(90) and not tiles(80)
