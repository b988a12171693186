"""The CUDA path's host code on an emulated GPU, in processes of their own: the emulator changes torch for good."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}

MIXES = """
import torch
from torch import device
from cuda_emulator import EMULATOR, OnCuda, _seal_launches
import bf16_interpreter

bf16_interpreter.install()
_seal_launches()

def refused(run):
    try:
        run()
    except (RuntimeError, AssertionError, TypeError) as error:
        return str(error).split(",")[0]

with EMULATOR:
    x = torch.ones(2, 64, device="cuda")
    assert type(x) is OnCuda and x.device == device("cuda:0") and x.is_cuda and type(x + 1) is OnCuda
    assert type(x.cpu()) is torch.Tensor and x.sum().item() == 128
    print(refused(lambda: x + torch.ones(2, 64)))
    print(refused(lambda: x[torch.tensor([0])]))
    print(refused(lambda: torch.ones(2)[x[:, 0].long()]))
    print(refused(lambda: torch.randn(2, device="cuda", generator=torch.Generator())))
    print(refused(lambda: x.numpy()))
    print(refused(lambda: torch.ops.fastlora.swiglu_fwd(x, torch.ones(2, 64))))
    gate = torch.ones(2, 64, device="cuda", requires_grad=True)
    from fastlora.ops import swiglu
    swiglu(gate, x).sum().backward()
    assert type(gate.grad) is OnCuda
    # One seed, two devices, two sequences; what is drawn on one moves the other nowhere.
    torch.manual_seed(3)
    first = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(9, device="cuda")
    assert torch.equal(torch.rand(4), first)
"""


def test_operators_on_an_emulated_gpu():
    tests = (
        "test_swiglu.py",
        "test_rms_norm.py",
        "test_dropout.py::test_seeds_are_drawn_on_the_cpu_whatever_the_default_device",
    )
    command = [sys.executable, "-m", "pytest", "-p", "cuda_emulator", "--device", "cuda", "-p", "no:cacheprovider"]
    command += [f"tests/ops/{name}" for name in tests]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_it_refuses_what_two_devices_refuse():
    done = subprocess.run([sys.executable, "-c", MIXES], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "Expected all tensors to be on the same device",
        "None",  # an index may come from the CPU
        "indices should be on cpu (aten.index.Tensor)",
        "Expected a 'cuda' device type for generator but found 'cpu'",
        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()",
        "_swiglu_fwd_kernel: [device(type='cuda'",
    ]
