"""What tuning knows of a step is what a step launches."""

import os

import pytest
import torch
from torch import nn

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("counted on meta tensors, which nothing interprets", allow_module_level=True)

from bench import layer
from bench.launches import Count
from bench.models import shape
from fastlora.tuning import calls

META = torch.device("meta")


def _launched(model, rank, dropout):
    """The calls that a layer's training step asks `choose` about, forward and backward, as an A100 would."""
    provider = layer.BY_NAME["fastlora"]
    one = layer.Layer(provider, shape(model), torch.bfloat16, 4096, rank)
    for module in one.module.modules():
        if dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
    asked = []

    def launch(kernel, grid, *args, choice=None, **meta):
        assert 0 not in grid
        if choice is not None:
            asked.append(choice.call)

    with layer.traced(Count("meta"), launch):
        one.backward(one.forward())
    return asked


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("model", ["7b", "70b"])
def test_the_calls_of_a_model_are_those_of_its_layers(model, dropout):
    launched = _launched(model, 16, dropout)
    known = calls.of_model(calls.MODELS[model], 4096, 16, torch.bfloat16, META, dropout)
    assert set(launched) == {call for call in known if call.kernel != "cross_entropy"}
    assert {call.kernel for call in known} <= set(calls.KERNELS)
