"""Every op that has a gradient, as a function of the tensors that train: what holds for all is tested on these."""

import pytest
import torch

from fastlora import ops

M, K, N, R = 6, 24, 40, 4


def leaves(*shapes):
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def rms_norm():
    return ops.rms_norm, leaves((2, 3, K), (K,))


def swiglu():
    return ops.swiglu, leaves((M, K), (M, K))


def rope():
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    return lambda q, k: ops.rope(q, k, cos, sin), leaves((2, 4, 5, 8), (2, 2, 5, 8))


def lora_linear():
    return lambda *t: ops.lora_linear(*t[:4], 0.5, t[4]), leaves((2, 3, K), (N, K), (R, K), (N, R), (N,))


def lora_group():
    """A norm, two projections of what it gives, one with two adapters, and the connection past them."""

    def function(x, norm, w1, a1, b1, w2, a2, b2, a3, b3):
        two = (ops.Branch(a2, b2, 0.5), ops.Branch(a3, b3, 2.0))
        projections = [ops.Projection(w1, None, (ops.Branch(a1, b1),)), ops.Projection(w2, None, two)]
        return ops.lora_group(x, projections, norm_weight=norm)

    adapter = (R, K), (N, R)
    return function, leaves((2, 3, K), (K,), (N, K), *adapter, (N, K), *adapter, *adapter)


def lora_fa():
    """x and B train, A does not: nothing but a gradient of B reads x, and x is not saved."""
    fixed = torch.randn(N, K), torch.randn(R, K)
    return lambda x, b: ops.lora_linear(x, *fixed, b, 0.5), leaves((M, K), (N, R))


def lora_qkv():
    """Queries and keys rotated."""
    tables = torch.randn(1, 3, 8), torch.randn(1, 3, 8)

    def function(x, w1, a1, b1, w2, a2, b2):
        adapters = ops.Branch(a1, b1), ops.Branch(a2, b2, 0.5)
        projections = [ops.Projection(w, None, (one,)) for w, one in zip((w1, w2), adapters)]
        return ops.lora_group(x, projections, rotary=tables)

    adapter = (R, K), (N, R)
    return function, leaves((2, 3, K), (N, K), *adapter, (N, K), *adapter)


def lora_mlp():
    def function(x, norm, w1, a1, b1, w2, a2, b2, w3, a3, b3):
        adapters = ops.Branch(a1, b1), ops.Branch(a2, b2, 0.5), ops.Branch(a3, b3, 2.0)
        three = (ops.Projection(w, None, (one,)) for w, one in zip((w1, w2, w3), adapters))
        return ops.lora_mlp(x, *three, norm_weight=norm)

    adapter = (R, K), (N, R)
    return function, leaves((M, K), (K,), (N, K), *adapter, (N, K), *adapter, (K, N), (R, N), (K, R))


def frozen_mlp():
    """Nothing trains but x, which is not saved."""
    gate, up, down = torch.randn(N, K), torch.randn(N, K), torch.randn(K, N)
    return lambda x: ops.lora_mlp(x, *map(ops.Projection, (gate, up, down))), leaves((M, K))


def linear_cross_entropy():
    labels = torch.tensor([3, -100, 7, 0, 39, 1])
    return lambda h, w: ops.linear_cross_entropy(h, w, labels), leaves((M, K), (N, K))


def linear_cross_entropy_of_items():
    labels, items = torch.tensor([3, -100, 7, 0, 39, 1]), torch.tensor(9)
    return lambda h, w: ops.linear_cross_entropy(h, w, labels, num_items=items), leaves((M, K), (N, K))


def flash_attention():
    return lambda q, k, v: ops.flash_attention(q, k, v), leaves((2, 4, 6, 32), (2, 2, 6, 32), (2, 2, 6, 32))


def dora():
    fixed = [torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)]
    return lambda y, m: ops.dora(y, m, *fixed, 0.5), leaves((M, N), (N,))


CASES = {
    "rms_norm": (rms_norm,),
    "swiglu": (swiglu,),
    "rope": (rope,),
    "lora_linear": (lora_linear, lora_fa),
    "lora_group": (lora_group, lora_qkv),
    "lora_mlp": (lora_mlp, frozen_mlp),
    "linear_cross_entropy": (linear_cross_entropy, linear_cross_entropy_of_items),
    "flash_attention": (flash_attention,),
    "dora": (dora,),
}
NO_GRADIENT = {"dequantize_4bit", "quantised"}
EVERY = [pytest.param(op, make, id=make.__name__) for op, makes in CASES.items() for make in makes]


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)
