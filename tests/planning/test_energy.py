"""The Llama 2 report's own table, arXiv:2307.09288, table 2."""

from decimal import ROUND_DOWN, Decimal

import pytest

from fastlora import planning
from fastlora.planning import energy

# GPU hours, watts, and tonnes of CO2eq as printed.
REPORT = {
    "7b": (184_320, 400, "31.22"),
    "13b": (368_640, 400, "62.44"),
    "34b": (1_038_336, 350, "153.90"),
    "70b": (1_720_320, 400, "291.42"),
}


def tonnes(hours: int, watts: int, intensity: float) -> Decimal:
    return Decimal(energy.kg_co2eq(energy.kwh(hours, watts), intensity)) / 1000


def test_the_reports_table_to_the_printed_digit():
    """Every row and the total come out at 0.4235 kg/kWh, cut after two digits as the report cuts them."""
    cent = Decimal("0.01")
    mine = {name: tonnes(hours, watts, 0.4235) for name, (hours, watts, _) in REPORT.items()}
    assert {name: str(t.quantize(cent, ROUND_DOWN)) for name, t in mine.items()} == {n: r[2] for n, r in REPORT.items()}
    assert str(sum(mine.values()).quantize(cent, ROUND_DOWN)) == "539.00"
    assert sum(hours for hours, _, _ in REPORT.values()) == 3_311_616


def test_the_default_intensity_gives_each_row_within_a_thousandth():
    for hours, watts, printed in REPORT.values():
        assert float(tonnes(hours, watts, energy.INTENSITY)) == pytest.approx(float(printed), rel=1e-3)


def test_a_plan_multiplies_hours_watts_intensity_and_pue():
    made = planning.plan("7b", 10**9, gpus=2, watts=350, intensity=0.1, pue=1.2)
    assert made.gpu_hours == pytest.approx(2 * made.hours)
    assert made.hours == pytest.approx(10**9 / made.tokens_per_s / 3600)
    assert made.kwh == pytest.approx(made.gpu_hours * 0.350 * 1.2)
    assert made.kg_co2eq == pytest.approx(made.kwh * 0.1)
