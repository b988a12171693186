"""What holds for every op and operator: signatures, registration, tracing, and that our kernels are what runs."""

import inspect
import subprocess
import sys

import pytest
import torch
from ops.witness import TRITON

from fastlora import ops, reference
from fastlora.kernels import _library, _tiles, dropout, flash_attention
from fastlora.kernels._library import INTERPRET

M, K, N, R = 5, 24, 40, 4
SEED = torch.tensor(1234, device="cpu")  # where the ops draw it
# What the compositions for the CPU are made of: not Triton on any device.
ON_CPU = {"accumulate", "apply_mask", "attention_softmax", "attention_softmax_bwd", "tall_product"}
ON_CPU |= {"fused_attention_fwd", "fused_attention_bwd"}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def samples() -> dict[str, list[tuple]]:
    """Arguments for every operator of torch.ops.fastlora: the plain case first, then what else its schema allows."""
    x, weight, norm, rstd = normal(M, K), normal(N, K), normal(K), normal(M).abs()
    a, b, s, y = normal(R, K), normal(N, R), normal(M, R), normal(M, N)
    half = normal(M, K, dtype=torch.bfloat16)
    mask = torch.randint(0, 256, (M, K // 8), dtype=torch.uint8)
    packed, code = torch.randint(0, 256, (451,), dtype=torch.uint8), normal(16)
    labels = torch.tensor([3, 0, 39, 7, 1])
    q, k = normal(2, 4, 6, 32).transpose(1, 2).contiguous().transpose(1, 2), normal(2, 2, 6, 32)
    cos, sin, table = normal(2, 6, 32), normal(1, 6, 32), normal(1, M, 8)
    out, lse = torch.ops.fastlora.flash_attention_fwd(q, k, k, None, None, 0.2, True, None, 0.0, None)
    keys = torch.arange(6)
    real, positions = torch.ones(2, 6, dtype=torch.bool), torch.arange(6)[None]
    return {
        "rms_norm_fwd": [(x, norm, 1e-6), (half, norm, 1e-6)],
        "rms_norm_bwd": [(x, x, norm, rstd, None, True, False), (x, x, norm, rstd, x.clone(), False, True)],
        "rope": [(q, k, cos, cos.clone(), False), (q, k, sin, sin.clone(), True)],
        "swiglu_fwd": [(x, x.clone())],
        "swiglu_bwd": [(x, x.clone(), x.clone())],
        "dropout_mask": [(x, SEED, 0.3)],
        "apply_mask": [(x, mask)],
        "lora_project": [(x, [a], [0.5], [None]), (x, [a, a.clone()], [0.5, 2.0], [mask, None]), (x, [], [], [])],
        "lora_project_t": [([y], [b], [0.5]), ([y, y.clone()], [b, b.clone()], [0.5, 2.0])],
        "rms_norm_project": [(x, norm, 1e-6, [a], [0.5], [None], torch.float32)],
        "swiglu_project": [(x, x.clone(), [a], [0.5], [mask])],
        "swiglu_bwd_reduce": [(x, x.clone(), x.clone(), s, [R], [mask], normal(M, 2 * R), [R, R])],
        "rms_norm_bwd_reduce": [(x, x.clone(), norm, rstd, None, False, s, [R], [mask])],
        "lora_gemm": [
            (x, [weight], s, [b], [None], None),
            (x, [weight], s, [b], [normal(N)], y),
            (x, [weight, weight.clone()], normal(M, 2 * R), [b, b.clone()], [None, normal(N)], None),
            (x, [weight, weight.clone()], normal(M, 2 * R), [b, b.clone()], [None, None], None, table, table.clone()),
        ],
        "lora_gemm_t": [
            ([y], [weight], s, [a], [None]),
            ([y, y.clone()], [weight, weight.clone()], s, [a], [mask]),
            ([y.half()], [weight.half()], s.half(), [a], [None], torch.float32),
        ],
        "lora_reduce": [(s, x, [R], [None]), (s, x, [1, 3], [mask, None])],
        "lora_reduce_t": [(s, [y], [R]), (s, [y, y.clone()], [1, 3])],
        "cross_entropy_rows": [(y, labels, torch.tensor(0.7), False), (y, labels, torch.tensor(0.7), True)],
        "linear_cross_entropy_fwd": [
            (x, weight, labels, torch.tensor(0.7), -100, True, False),
            (x, weight, labels, torch.tensor(0.7), 7, False, True),
        ],
        "dequantize_4bit": [
            (packed, rstd.repeat(3), code, None, None, None, 64, 1, 901, torch.bfloat16),
            (packed, packed[:15], code, rstd, normal(256), norm[:1], 64, 4, 902, torch.float32),
        ],
        "flash_attention_fwd": [
            (q, k, k, None, None, 0.2, True, None, 0.0, None),
            (q, k, k, real, positions, 0.2, True, 3, 0.1, SEED),
        ],
        "flash_attention_bwd": [
            (out, q, k, k, out, lse, None, None, 0.2, True, None, 0.0, None),
            (out, q, k, k, out, lse, None, None, 0.2, True, None, 0.1, SEED),
        ],
        "attention_softmax": [(q.flatten(0, 1).contiguous(), keys, keys + 9, None, 0.2)],
        "attention_softmax_bwd": [(normal(3, 6, 7), normal(3, 6, 7), keys, keys + 2, normal(7), 0.2)],
        "fused_attention_fwd": [
            (q, k, k, None, keys[None] - 3, 0.2, True),
            (q, k, k, real, (keys - 1).repeat(2, 1), 0.2, False),
        ],
        "fused_attention_bwd": [(out, q, k, k, out, lse, None, keys[None] * 0, 0.2, True)],
        "accumulate": [(normal(2, 6, 7), normal(4, 6, 7))],
        "tall_product": [(s, x, None), (s, half, mask)],
    }


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fastlora::") for name in names if name.startswith("fastlora::"))


def test_the_samples_are_of_every_operator():
    assert sorted(samples()) == registered()


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.fastlora, name).default, arguments)


@pytest.mark.cpu_only(reason="of the CPU key")
def test_the_cpu_key_runs_what_this_process_is_meant_to_test(backend):
    """Triton under its interpreter; csrc where it is loaded; ATen everywhere else."""
    kinds = {name: _library.runs_on_cpu(name) for name in registered()}
    if INTERPRET:
        assert set(kinds.values()) == {"triton (interpreter)"}
    elif _library.csrc_state == "loaded":
        in_cpp = {"rms_norm_fwd", "rms_norm_bwd", "rope", "swiglu_fwd", "swiglu_bwd", "cross_entropy_rows"}
        in_cpp |= ON_CPU | {"dequantize_4bit", "dropout_mask"}
        assert {kinds[name] for name in in_cpp} == {"csrc"}
    else:
        assert set(kinds.values()) == {"aten"}


@pytest.mark.skipif(not TRITON, reason="the Triton launchers run on a GPU, and under TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", sorted(set(registered()) - ON_CPU))
def test_nothing_comes_out_without_the_kernel(name, monkeypatch):
    """Without launches all is poison: nothing but the kernel computes it, and no test can miss that it did not run."""
    arguments = samples()[name][0]
    for module in [module for path, module in sys.modules.items() if path.startswith("fastlora.kernels.")]:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *args, **meta: None)
    monkeypatch.setenv("FASTLORA_GEMM", "triton")
    monkeypatch.setattr(_tiles, "tf32", lambda: True)  # without, fp32 products on a GPU are the library's
    outputs = getattr(torch.ops.fastlora, name)(*arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if name == "linear_cross_entropy_fwd":  # its matrix products are the library's
        outputs = outputs[:1]
    for output in outputs:
        assert output.isnan().all() if output.is_floating_point() else (output == torch.iinfo(output.dtype).max).all()


@pytest.mark.parametrize("name", reference.__all__)
def test_op_and_witness_have_one_signature(name):
    """But for masks: the witness of an op with dropout is told what the op drew."""

    def parameters(function):
        signature = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in signature if p.name != "masks"]

    assert parameters(getattr(ops, name)) == parameters(getattr(reference, name))


@pytest.mark.parametrize("switch", ["torch.backends.fp32_precision", "torch.backends.cuda.matmul.allow_tf32"])
def test_tf32_is_the_users_own_setting(switch):
    """By the new name, as transformers' tf32=True sets it, after which reading the old one raises, and by the old."""
    program = (
        "import torch; from fastlora.kernels._tl import dot_precision; before = dot_precision(torch.float32);"
        f"{switch} = {'True' if 'allow' in switch else repr('tf32')};"
        "print(before, dot_precision(torch.float32), dot_precision(torch.bfloat16))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["ieee", "tf32", "ieee"]


@pytest.mark.parametrize("draw", [lambda x: dropout.dropout_mask(x, SEED, 0.5), lambda x: attend(x, 0.5)])
def test_no_cuda_graph_repeats_a_seed(draw, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="every replay of a CUDA graph would repeat it"):
        draw(normal(1, 8))


def attend(x, p):
    q = x.view(1, 1, 1, 8)
    return flash_attention.flash_attention_fwd(q, q, q, None, None, 1.0, True, None, p, SEED)
