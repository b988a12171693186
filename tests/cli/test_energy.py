"""The meter of a run's energy, on a stand-in for NVML."""

import sys
import types

import pytest

from fastlora.cli import energy
from fastlora.cli.settings import Settings


@pytest.fixture
def nvml(monkeypatch):
    """A pynvml whose counter, in millijoules, the test sets."""
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.counter = {"GPU-7": 1_000_000}
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: module.counter[handle]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(energy, "gpu_uuid", lambda: "GPU-7")
    return module


def test_what_was_drawn_since_the_start(nvml):
    meter = energy.EnergyMeter()
    nvml.counter["GPU-7"] += 7_200_000_000
    assert meter.kwh() == 2.0 and meter.why is None


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_an_error_of_nvml_is_the_reason(nvml, monkeypatch, call):
    def fails(*args):
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(nvml, call, fails)
    meter = energy.EnergyMeter()
    assert meter.kwh() is None and meter.why == "NVML: Not Supported"


def test_an_error_at_the_end_is_the_reason_too(nvml, monkeypatch):
    meter = energy.EnergyMeter()
    monkeypatch.setattr(meter, "_millijoules", lambda: (_ for _ in ()).throw(nvml.NVMLError("GPU is lost")))
    assert meter.kwh() is None and meter.why == "NVML: GPU is lost"


def test_a_run_on_several_gpus_adds_up_and_says_whose_is_missing(nvml, monkeypatch):
    settings = Settings(model="7b", data="", out="")
    others = [(2.0, None), (3.0, None)]
    monkeypatch.setattr(energy.ranks, "from_all", lambda mine: [mine, *others])
    assert energy.energy_report(energy.EnergyMeter(), settings, "7b", 10, 128)["kwh"] == 5.0
    others[1] = None, "NVML: GPU is lost"
    found = energy.energy_report(energy.EnergyMeter(), settings, "7b", 10, 128)
    assert found["kwh"] is None and found["why"] == "rank 2: NVML: GPU is lost"


def test_without_the_package_and_without_a_gpu(monkeypatch):
    monkeypatch.setattr(energy, "gpu_uuid", lambda: "GPU-7")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in energy.EnergyMeter().why
    monkeypatch.setattr(energy, "gpu_uuid", lambda: None)
    meter = energy.EnergyMeter()
    assert meter.kwh() is None and meter.why == "no GPU"


def test_the_gpu_is_named_as_nvml_names_it(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="12-ab"))
    assert energy.gpu_uuid() == "GPU-12-ab"
