import pytest

from llmops.quantity import Quantity
from llmops.report.figures import number, scaled, show, told


@pytest.mark.parametrize(("value", "unit", "text"), [
    (0.913, "fraction", "91.3%"), (1.0, "fraction", "100.0%"), (0.0, "fraction", "0.0%"),
    (999, "B", "999 B"), (1000, "B", "1.00 kB"), (5_300_000, "B", "5.30 MB"), (0, "B", "0 B"),
    (0.0412, "J/token", "41.2 mJ/token"), (3920, "J", "3.92 kJ"), (139.3, "s", "2.32 min"), (0.75, "s", "750 ms"),
    (131_000, "tokens", "131 k"), (7_900_000, "parameters", "7.90 M"), (2.33e13, "FLOP", "23.3 TFLOP"),
    (6.1, "perplexity", "6.10"), (0.672, "ratio", "0.672"), (610, "tokens/s", "610 tokens/s"),
    (5.0984, "bits", "5.10 bits"), (0.000612, "gCO2e", "612 ugCO2e"), (-0.0, "perplexity", "0")])
def test_units_are_scaled_to_three_digits(value, unit, text):
    assert show(Quantity.measured(value, unit, "counted")) == text


def test_an_estimate_is_marked_and_a_null_is_a_dash_never_zero():
    assert show(Quantity(3.0, "J", "estimated", "a model")) == "~3.00 J"
    assert show(Quantity(475.0, "g", "constant", "a table")) == "475 g"
    assert show(Quantity.null("J", "no sensor")) == "-"
    assert told(Quantity.null("J", "no sensor")) == "not known: no sensor"


def test_the_interval_has_the_decimals_and_the_unit_of_its_value():
    quantity = Quantity.measured(0.0412, "J/token", "NVML", (0.0401, 0.0425), 5)
    assert show(quantity, with_interval=True) == "41.2 mJ/token [40.1, 42.5]"
    assert told(quantity) == "measured; NVML; 95% interval 0.0401 to 0.0425 J/token; n = 5"


def test_a_very_narrow_interval_gets_more_decimals():
    narrow = Quantity.measured(0.9134, "ratio", "", (0.91335, 0.91345))
    assert show(narrow, with_interval=True) == "0.913 [0.91335, 0.91345]"


def test_a_difference_is_signed_and_a_fraction_differs_in_points():
    delta = Quantity.measured(-0.027, "fraction", "paired", (-0.047, 0.001), 300)
    assert show(delta, with_interval=True, difference=True) == "-2.7 pp [-4.7, +0.1]"
    none = Quantity.measured(0.0, "perplexity", "paired", (-0.4, 0.4), 60)
    assert show(none, with_interval=True, difference=True) == "+0.000 [-0.400, +0.400]"


@pytest.mark.parametrize(("value", "text"), [(float("inf"), "inf"), (1e-9, "1.00e-09"), (3e9, "3.00e+09"),
                                             (1234.5, "1,234"), (0.00123, "0.00123")])
def test_extreme_numbers(value, text):
    assert number(value) == text


def test_scaled_gives_the_worth_of_one_shown_unit():
    assert scaled(2.1e6, "B") == (1e6, "MB")
    assert scaled(0.5, "fraction", difference=True) == (0.01, "pp")
