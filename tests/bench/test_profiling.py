"""What is read off a profile: of a GPU's events, put in by hand."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import profiling


def event(name, start, end, device=DeviceType.CUDA):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, device_type=device, self_cpu_time_total=0.0)


def test_of_a_gpu(monkeypatch):
    events = [
        event("void gemm<bf16>", 0, 400), event("_swiglu_fwd_kernel", 300, 500), event("void gemm<bf16>", 900, 1000),
        event("ProfilerStep#1", 0, 1000),  # no kernel
        event("cudaLaunchKernel", 0, 5, DeviceType.CPU),
        event("cudaStreamSynchronize", 500, 20_500, DeviceType.CPU),  # a wait within the call
        event("cudaDeviceSynchronize", 1000, 90_000, DeviceType.CPU),  # the one after it
    ]  # fmt: skip

    class Profiler:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        events = lambda self: events  # noqa: E731

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(profiling, "synchronize", lambda device: None)
    found = profiling.profile(lambda: time.sleep(0.05), "cuda")
    assert found["kernels"] == [["void gemm<bf16>", 2, 500.0], ["_swiglu_fwd_kernel", 1, 200.0]]
    # 0 to 500 and 900 to 1000 µs: what overlaps counts once.
    assert found["launches"] == 3 and found["busy_ms"] == 0.6
    assert 30 <= found["host_ms"] < found["ms"] and found["ms"] >= 50


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_lora_project_kernel", "low-rank"), ("fastlora::rms_norm_project", "low-rank"), ("_lora_gemm_kernel", "products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "products"), ("aten::mm", "products"), ("aten::mul", profiling.REST),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "norm, rotary, SwiGLU"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<AdamOp>", "optimizer"),
        ("_cross_entropy_rows_kernel", "loss"), ("Memcpy DtoD (Device -> Device)", profiling.REST),
    ],
)  # fmt: skip
def test_kinds(name, kind):
    assert profiling.kind(name) == kind
    assert profiling.by_kind([[name, 2, 1500.0]]) == {kind: 1.5}
