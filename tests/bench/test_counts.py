"""The machine-independent figures, against what can be counted by hand."""

import pytest
import torch

from bench import launches, layer, models, saved_bytes

BF16 = torch.bfloat16


def test_aten_launches_and_bytes_by_hand():
    x, w = (torch.empty(1024, 1024, device="meta") for _ in "xw")
    a = torch.empty(16, 1024, device="meta")
    with launches.Count() as count:
        y = x @ w.t()  # base
        s = x @ a.t()  # skinny
        y = y * 2 + x  # two passes: 2 and 3 tensors
        y.view(-1)[None].detach()  # views
        torch.empty_like(y)  # no kernel
        y.add_(1)  # reads and writes
        s.zero_()
        torch.zeros(4) + 1  # on the host
    big, small = 4 * 1024 * 1024, 4 * 16 * 1024
    assert count.launches == {"base": 1, "skinny": 1, "elementwise": 4}
    assert count.bytes == {"base": 3 * big, "skinny": big + 2 * small, "elementwise": 7 * big + 2 * small}


def test_what_may_return_its_input_counts_where_it_copies():
    x = torch.empty(64, 32, device="meta")
    with launches.Count() as count:
        torch.ops.aten.to.dtype(x, torch.float32)
        torch.ops.aten.reshape(x, [32, 64])
    assert not count.launches
    with launches.Count() as count:
        torch.ops.aten.to.dtype(x, torch.bfloat16)
        torch.ops.aten.reshape(x.t(), [64, 32])
    assert count.launches["elementwise"] == 2 and count.bytes["elementwise"] == (4 + 2 + 4 + 4) * 64 * 32


def test_an_expanded_gradient_counts_at_its_size_in_memory():
    with launches.Count() as count:
        torch.ones((), device="meta").expand(100, 100).neg()
    assert count.bytes["elementwise"] == 4 + 4 + 4 * 100 * 100


@pytest.mark.parametrize("model", ["7b", "70b"])
def test_fastlora_keeps_what_the_design_says(model):
    """Both inputs, q, k, v, the attention output, gate and up; log-sum-exps, s of seven adapters, two rstd."""
    s, R = models.shape(model), 16
    kv = s.kv_heads * s.head_dim
    wide = 2 * (2 * s.hidden + s.hidden + 2 * kv + s.hidden + 2 * s.ffn)
    per_token, beside = saved_bytes.count("fastlora", model, BF16, R)
    assert per_token == wide + 4 * s.heads + 2 * 7 * R + 4 * 2
    assert beside < 4096


def test_peft_keeps_twice_that():
    peft, ours = (saved_bytes.count(name, "7b", BF16)[0] for name in ("peft", "fastlora"))
    assert peft > 2 * ours


def test_launches_of_a_layer():
    peft, peft_bf16, ours = (launches.count(name, "7b", BF16) for name in ("peft", "peft-bf16", "fastlora"))
    # Seven base products forward and seven backward; PEFT's first layer input needs a gradient here as in any layer.
    assert peft.launches["base"] == peft_bf16.launches["base"] == 14
    # A and B forward, and twice as many products backward.
    assert peft.launches["skinny"] == 7 * 6
    # Each projection's fp32 copies and casts are what bf16 adapters spare.
    assert peft.launches["elementwise"] - peft_bf16.launches["elementwise"] == 7 * 8
    assert sum(ours.launches.values()) < sum(peft_bf16.launches.values()) / 2
    assert all(count.launches["attention"] == 2 for count in (peft, peft_bf16, ours))
    # Through the library's products, A and B of the seven adapters take a cast each.
    addmm = launches.count("fastlora-addmm", "7b", BF16)
    assert addmm.names["to"] == 14 and sum(addmm.launches.values()) > sum(ours.launches.values())


def test_every_triton_launch_of_fastlora_is_seen():
    provider = layer.BY_NAME["fastlora"]
    one = layer.Layer(provider, models.shape("tiny"), BF16, 64, 8)
    counter, launched = launches.Count(), []

    def twice(kernel, grid, *args, **meta):
        launched.append(kernel)
        for _ in range(2):
            counter.launch(kernel, grid, *args, **meta)

    with layer.traced(counter, twice):
        one.backward(one.forward())
    once = launches.count("fastlora", "tiny", BF16, 64, 8)
    assert launched and sum(counter.launches.values()) == sum(once.launches.values()) + len(launched)


def test_who_cannot_be_traced_says_why():
    assert "code generator" in layer.why_not(layer.BY_NAME["peft-compile"], BF16)
    assert layer.why_not(layer.BY_NAME["liger"], BF16)
