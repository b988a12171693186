import pytest
import torch

from fastlora.ops import Branch, Projection, lora_group, swiglu_lora


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
        (None, {"a": torch.ones(4, 40, device="meta")}, {}, ValueError, r"projections\[1\].a is on meta, needs cpu"),
        (None, {}, {"norm_weight": torch.ones(39)}, ValueError, r"norm_weight has shape \(39,\), needs \(40\)"),
        (None, {}, {"norm_weight": torch.ones(40).half()}, TypeError, "norm_weight is float16, needs float32"),
        (None, {}, {"residual": torch.ones(5, 24)}, ValueError, "residual goes with one projection, got 2"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(x, change, options, error, message):
    x = torch.ones(5, 40) if x is None else x
    with pytest.raises(error, match="lora_group: " + message):
        lora_group(x, [projection(), projection(**change)], **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(5, 40).double()}, TypeError, "gate is float64, needs float32 or"),
        ({"up": torch.ones(5, 41)}, ValueError, r"up has shape \(5, 41\), needs \(5, 40\) to match gate"),
        ({"up": torch.ones(5, 40).half()}, TypeError, "up is float16, needs float32 to match gate"),
        ({"up": torch.ones(5, 40, device="meta")}, ValueError, "up is on meta, needs cpu, the device of gate"),
        ({"gate": torch.ones(5, 40).half(), "up": torch.ones(5, 40).half()}, TypeError, "gate is float16, needs"),
        ({"projection": projection(K=41)}, ValueError, r"projections\[0\].weight has shape \(24, 41\), needs"),
        ({"residual": torch.ones(5, 25)}, ValueError, r"residual has shape \(5, 25\), needs \(5, 24\)"),
    ],
)  # fmt: skip
def test_errors_of_the_second_half(change, error, message):
    good = {"gate": torch.ones(5, 40), "up": torch.ones(5, 40), "projection": projection()}
    with pytest.raises(error, match="swiglu_lora: " + message):
        swiglu_lora(**good | change)


def test_no_projections():
    with pytest.raises(ValueError, match="lora_group: projections is empty, needs at least one"):
        lora_group(torch.ones(5, 40), [])
