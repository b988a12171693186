"""Energy and carbon of GPU hours."""

from __future__ import annotations

# kg CO2eq per kWh: about what the rows of the Llama 2 report imply.
INTENSITY = 0.4234
PUE = 1.0  # the report counts what the GPUs draw, and no cooling


def kwh(gpu_hours: float, watts: float, pue: float = PUE) -> float:
    """Energy: ``hours · watts / 1000 · pue``, every GPU at its design limit all the time.

    Args:
        pue: power usage effectiveness: what the data centre draws, over what its computers do.
    """
    return gpu_hours * watts / 1000 * pue


def kg_co2eq(energy: float, intensity: float = INTENSITY) -> float:
    """Carbon: ``kWh · intensity``, in kg of CO2 equivalent.

    Source: Touvron et al., Llama 2, arXiv:2307.09288, table 2, for the method.
    """
    return energy * intensity
