"""Predicted bytes against torch's own accounting of saved tensors, on full-size layers without memory."""

import pytest
import torch

from bench import launches, layer, models
from bench.harness import SavedBytes
from bench.layer import Through
from fastlora.modules.memory import Memory
from fastlora.planning import activations, roofline
from fastlora.planning.activations import POLICIES, Adapters

BF16 = torch.bfloat16
WITHIN = 0.03
SHAPES = ("mini", "7b", "13b", "34b", "70b")


class Fixed(Memory):
    """One policy for every layer, whatever the device."""

    def __init__(self, policy):
        super().__init__("auto")
        self.fixed = policy

    def policy(self, layer, x):
        return self.fixed


def counted(provider, shape, rank, policy=None, dropout=0.0, tokens=1024):
    """Bytes that one layer keeps per token: the difference of two counts, so that what is there once is not in it."""
    kept = []
    for n in (tokens, 2 * tokens):
        one = layer.Layer(layer.BY_NAME[provider], models.shape(shape), BF16, n, rank)
        if policy:
            one.module._fastlora.memory = Fixed(policy)
        for module in one.module.modules():
            if dropout and hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout)
        with layer.traced(Through(), lambda *args, **kwargs: None), SavedBytes(one.weights()) as saved:
            y = one.forward()
        kept.append(saved.bytes)
        del y
    return (kept[1] - kept[0]) / tokens


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_layer_keeps_what_is_predicted(shape, policy):
    predicted = sum(activations.saved(models.shape(shape), Adapters.uniform(16), policy).values())
    assert predicted == pytest.approx(counted("fastlora", shape, 16, policy), rel=WITHIN)


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_of_dropout_and_other_ranks(policy):
    predicted = sum(activations.saved(models.shape("7b"), Adapters.uniform(64, dropout=0.1), policy).values())
    assert predicted == pytest.approx(counted("fastlora", "7b", 64, policy, dropout=0.1), rel=WITHIN)


@pytest.mark.parametrize("shape", SHAPES)
def test_pefts_layer_keeps_what_is_predicted(shape):
    predicted = sum(activations.peft_saved(models.shape(shape), Adapters.uniform(16)).values())
    assert predicted == pytest.approx(counted("peft", shape, 16), rel=WITHIN)


def test_pefts_dropout_masks():
    """A GPU keeps a mask of bytes where the CPU, on which this is traced, keeps one of fp32 numbers."""
    kept = activations.peft_saved(models.shape("7b"), Adapters.uniform(16, dropout=0.1))
    predicted = sum(kept.values()) + 3 * kept["dropout masks"]
    assert predicted == pytest.approx(counted("peft", "7b", 16, dropout=0.1), rel=WITHIN)


@pytest.mark.parametrize("shape", ["7b", "13b", "70b"])
@pytest.mark.parametrize("fused", [True, False])
def test_traffic_is_what_the_launches_move(shape, fused):
    found = [launches.count("fastlora" if fused else "peft", shape, BF16, n).bytes for n in (1024, 2048)]
    per_token = {kind: (found[1][kind] - found[0][kind]) / 1024 for kind in found[0]}
    sizes = models.shape(shape)
    assert roofline.elementwise_bytes(sizes, fused) == pytest.approx(per_token["elementwise"], rel=WITHIN)
    skinny = roofline.skinny_bytes(sizes, Adapters.uniform(16), fused)
    assert skinny == pytest.approx(per_token["skinny"], rel=WITHIN)
