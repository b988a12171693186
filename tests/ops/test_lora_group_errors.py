import pytest
import torch
from ops.witness import DEVICE

from fastlora.ops import Branch, Projection, lora_group


def projection(N=24, K=40, R=4, **change):
    fields = {"weight": torch.ones(N, K), "bias": None, "a": torch.ones(R, K), "b": torch.ones(N, R), "rate": 0.0}
    fields |= change
    return Projection(fields["weight"], fields["bias"], (Branch(fields["a"], fields["b"], 1.0, fields["rate"]),))


@pytest.mark.parametrize(
    ("x", "change", "options", "error", "message"),
    [
        (torch.ones(5, 40).double(), {}, {}, TypeError, "x is float64, needs float32 or"),
        (torch.ones(5, 40).bfloat16(), {}, {}, TypeError, "x is bfloat16, needs float32 to match the weights"),
        (torch.ones(5, 39), {}, {}, ValueError, r"projections\[0\].weight has shape \(24, 40\), needs \(any, 39\)"),
        (None, {"bias": torch.ones(23)}, {}, ValueError, r"projections\[1\].bias has shape \(23,\), needs \(24\)"),
        (None, {"a": torch.ones(4, 39)}, {}, ValueError, r"projections\[1\].a has shape \(4, 39\), needs \(any, 40\)"),
        (None, {"b": torch.ones(24, 5)}, {}, ValueError, r"projections\[1\].b has shape \(24, 5\), needs \(24, 4\)"),
        (None, {"R": 513}, {}, ValueError, r"projections\[1\].a has rank 513, needs a rank from 1 to 512"),
        (None, {"a": torch.ones(4, 40).half()}, {}, TypeError, r"projections\[1\].a is float16, needs float32"),
        (None, {"b": torch.ones(24, 4).half()}, {}, TypeError, r"projections\[1\].b is float16, needs float32"),
        (None, {"weight": torch.ones(24, 40).half()}, {}, TypeError, r"projections\[1\].weight is float16, needs"),
        (None, {"rate": 1.5}, {}, ValueError, r"projections\[1\].dropout is 1.5, needs a probability from 0 to 1"),
        (None, {"rate": -0.1}, {}, ValueError, r"projections\[1\].dropout is -0.1, needs"),
        (None, {"a": torch.ones(4, 40, device="meta")}, {}, ValueError, rf"projections\[1\].a is on meta, .* {DEVICE}"),
        (None, {}, {"norm_weight": torch.ones(39)}, ValueError, r"norm_weight has shape \(39,\), needs \(40\)"),
        (None, {}, {"norm_weight": torch.ones(40).double()}, TypeError, "norm_weight is float64, needs float32 or"),
        (None, {}, {"residual": torch.ones(5, 24)}, ValueError, "residual goes with one projection, got 2"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(x, change, options, error, message):
    x = torch.ones(5, 40) if x is None else x
    with pytest.raises(error, match="lora_group: " + message):
        lora_group(x, [projection(), projection(**change)], **options)


TABLE = torch.ones(1, 5, 8)


@pytest.mark.parametrize(
    ("x", "rotary", "error", "message"),
    [
        ((5, 40), (TABLE, TABLE), ValueError, r"x has shape \(5, 40\), needs \(any, any, any\) as \(B, T, K\)"),
        ((2, 5, 40), (TABLE[:, :4], TABLE), ValueError, r"rotary\[0\] has shape \(1, 4, 8\), needs \(1, 5, any\)"),
        ((2, 5, 40), (TABLE, TABLE[..., :4]), ValueError, r"rotary\[1\] has shape \(1, 5, 4\), needs \(1, 5, 8\)"),
        ((2, 5, 40), (TABLE.expand(3, 5, 8),) * 2, ValueError, r"rotary\[0\] has shape \(3, 5, 8\), needs \(2, 5, any\)"),
        ((2, 5, 40), (TABLE.double(), TABLE), TypeError, r"rotary\[0\] is float64, needs"),
        ((2, 5, 40), (TABLE, TABLE.half()), TypeError, r"rotary\[1\] is float16, needs float32 to match"),
        ((2, 5, 40), (torch.ones(1, 5, 10),) * 2, ValueError, r"projections\[0\] has 24 outputs and .* heads of 10, needs"),
        ((2, 5, 40), (torch.ones(1, 5, 3),) * 2, ValueError, r"projections\[0\] has 24 .* heads of 3, needs whole heads"),
    ],
)  # fmt: skip
def test_errors_of_the_rotation(x, rotary, error, message):
    with pytest.raises(error, match="lora_group: " + message):
        lora_group(torch.ones(x), [projection(), projection()], rotary=rotary)


def test_rotation_goes_with_queries_and_keys():
    with pytest.raises(ValueError, match="rotary goes with queries and keys, got 1 projection"):
        lora_group(torch.ones(2, 5, 40), [projection()], rotary=(TABLE, TABLE))


def test_no_projections():
    with pytest.raises(ValueError, match="lora_group: projections is empty, needs at least one"):
        lora_group(torch.ones(5, 40), [])
