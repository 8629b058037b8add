from __future__ import annotations

import math

import pytest

from llmops.measure.cost import break_even, break_even_beside, total
from llmops.quantity import Quantity


def joules(value: float, provenance="measured", ci95=None) -> Quantity:
    return Quantity(value, "J", provenance, "counter", ci95)


def test_break_even_of_the_illustration():
    """600 kJ of building against a saving of 0.05 J a token: 12 million tokens."""
    found = break_even(joules(600e3), Quantity(0.10, "J/token", "measured", "m"),
                       Quantity(0.5, "ratio", "measured", "m", (0.4, 0.6), 5))
    assert found.value == pytest.approx(12e6)
    assert found.ci95 == pytest.approx((10e6, 15e6))
    assert (found.unit, found.provenance, found.n) == ("tokens", "measured", 5)


def test_break_even_is_where_the_two_totals_meet():
    build, base, ratio = 1234.0, 0.31, 0.87
    found = break_even(joules(build), Quantity(base, "J/token", "estimated", "m"),
                       Quantity(ratio, "ratio", "measured", "m", (0.8, 0.9)))
    assert found.value is not None
    assert build + found.value * base * ratio == pytest.approx(found.value * base)
    assert found.provenance == "estimated"


@pytest.mark.parametrize("interval, reason", [
    ((0.9, 1.0), "reaches 1"), ((0.9, 1.1), "reaches 1"), (None, "no interval")])
def test_no_saving_shown_no_break_even(interval, reason):
    found = break_even(joules(1.0), Quantity(1.0, "J/token", "measured", "m"),
                       Quantity(0.95, "ratio", "measured", "m", interval))
    assert found.value is None
    assert "no saving shown" in found.method and reason in found.method


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_is_missing_is_named(missing):
    parts = [joules(1.0), Quantity(1.0, "J/token", "measured", "m"),
             Quantity(0.5, "ratio", "measured", "m", (0.4, 0.6))]
    parts[missing] = Quantity.null(parts[missing].unit, "sensor gone")
    found = break_even(*parts)
    assert found.value is None and "sensor gone" in found.method


def test_a_total_has_the_weakest_provenance():
    found = total([joules(1.0, ci95=(0.0, 2.0)), joules(2.5, "estimated", (2.5 - 1.0, 2.5 + 1.0))])
    assert (found.value, found.provenance) == (3.5, "estimated")
    assert found.ci95 == pytest.approx((3.5 - 2**0.5, 3.5 + 2**0.5))


def test_a_total_with_a_hole_is_null():
    found = total([joules(1.0), Quantity.null("J", "no sensor then"), joules(2.0)])
    assert found.value is None
    assert "1 of 3" in found.method and "no sensor then" in found.method


def test_units_do_not_mix():
    with pytest.raises(ValueError, match="one unit"):
        total([joules(1.0), Quantity.measured(1.0, "s", "clock")])
    with pytest.raises(ValueError, match="one unit"):
        total([])


def figures(per_token: float, ratio: float, ci95) -> dict:
    return {"joules_per_token": Quantity(per_token, "J/token", "measured", "m").as_dict(),
            "ratio_to_base": Quantity(ratio, "ratio", "measured", "m", ci95, 5).as_dict()}


def test_a_student_pays_for_itself_where_its_total_meets_its_teachers():
    student, teacher = figures(0.04, 0.4, (0.38, 0.42)), figures(0.08, 0.8, (0.75, 0.85))
    found = break_even_beside(joules(1000.0), student, teacher)
    assert found.value == pytest.approx(1000 / (0.08 - 0.04))
    spread = math.hypot(math.log(0.42 / 0.4), math.log(0.8 / 0.75))  # of the ratio 0.5, upwards
    assert found.ci95[1] == pytest.approx(1000 / 0.08 / (1 - 0.5 * math.exp(spread)))
    assert found.ci95[0] < found.value < found.ci95[1]


def test_a_teacher_that_is_the_base_was_measured_beside_its_student():
    student = figures(0.04, 0.4, (0.38, 0.42))
    found = break_even_beside(joules(1000.0), student, {"joules_per_token": student["joules_per_token"]},
                              teacher_is_base=True)
    plain = break_even(joules(1000.0), Quantity(0.1, "J/token", "measured", "m"),
                       Quantity(0.4, "ratio", "measured", "m", (0.38, 0.42)))
    assert found.value == pytest.approx(plain.value) and found.ci95 == pytest.approx(plain.ci95)


def test_no_saving_beside_a_teacher_and_no_measurement_are_told():
    found = break_even_beside(joules(1.0), figures(1, 0.9, (0.8, 1.0)), figures(1, 0.9, (0.8, 1.0)))
    assert found.value is None and "no saving shown" in found.method
    assert "of the teacher were not measured" in break_even_beside(joules(1.0), figures(1, 0.9, (0.8, 1)), {}).method
