"""The energy of a run: measured by the GPU's own counter through NVML, and the plan's estimate beside it."""

from typing import Any

from fastlora.planning import energy, plan

from . import ranks
from .settings import Settings


def gpu_uuid() -> str | None:
    """NVML's name of this process's GPU, whose number CUDA_VISIBLE_DEVICES may have moved; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(ranks.local_rank()).uuid}"


class EnergyMeter:
    """Energy that the GPU has drawn since construction. `why` says why nothing is measured; None where it is."""

    why: str | None = None

    def __init__(self) -> None:
        self._start = 0
        uuid = gpu_uuid()
        if uuid is None:
            self.why = "no GPU"
            return
        try:
            import pynvml
        except ImportError:
            self.why = "nvidia-ml-py is not installed; pip install nvidia-ml-py"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._start = self._millijoules()
        except pynvml.NVMLError as error:
            self.why = f"NVML: {error}"

    def _millijoules(self) -> int:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def kwh(self) -> float | None:
        """The energy so far; None where it cannot be measured."""
        if self.why is not None:
            return None
        try:
            return (self._millijoules() - self._start) / 3.6e9
        except self._nvml.NVMLError as error:
            self.why = f"NVML: {error}"
            return None


def energy_report(meter: EnergyMeter, settings: Settings, config: Any, tokens: int, length: int) -> dict[str, Any]:
    """The run's energy for report.json: of all GPUs, measured, with the estimate for the same tokens beside it.

    Of a resumed run, what it took since. Every process has to call it.
    """
    each = ranks.from_all((meter.kwh(), meter.why))
    missing = [f"rank {rank}: {why}" if len(each) > 1 else why for rank, (kwh, why) in enumerate(each) if kwh is None]
    used = None if missing else sum(kwh for kwh, _ in each)
    return {
        "kwh": used,
        "kg_co2eq": None if used is None else energy.kg_co2eq(used),
        "why": missing[0] if missing else None,
        "what": "drawn by the GPUs from the first step to the last, by NVML's counters",
        "kg_co2eq_per_kwh": energy.INTENSITY,
        "estimate": _estimate(settings, config, tokens, length),
    }


def _estimate(settings: Settings, config: Any, tokens: int, length: int) -> dict[str, Any]:
    nothing: dict[str, Any] = {"kwh": None, "kg_co2eq": None, "gpu_hours": None, "rates": None}
    chosen: dict[str, Any] = {}
    if settings.targets != "all-linear":
        chosen["targets"] = [name.strip() for name in settings.targets.split(",")]
    if settings.gradient_checkpointing or settings.memory == "lean":
        memory = "lean"
    else:
        memory = "fast" if settings.memory == "fast" else "auto"
    engine = "fsdp2" if ranks.engine() else "ddp"
    try:
        made = plan(
            config, max(tokens, 1), "auto", gpus=ranks.world_size(), engine=engine if ranks.world_size() > 1 else None,
            rank=settings.rank, dropout=settings.dropout, seq=length, micro_batch=settings.batch_size, memory=memory,
            **chosen,
        )  # fmt: skip
    except ValueError as error:
        return nothing | {"why": str(error)}
    one = made if settings.patch else made.peft
    if one is None or not one.fits:
        return nothing | {"why": "by the plan, it does not fit this GPU"}
    labels = "/".join(sorted({rate.label for rate in made.provenance.values()}))
    return {"kwh": one.kwh, "kg_co2eq": one.kg_co2eq, "gpu_hours": one.gpu_hours, "rates": labels, "why": None}
