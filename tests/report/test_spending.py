import pytest
from tests.report.rows import make_rows, null
from tests.report.test_html import Reader

from llmops.quantity import Quantity
from llmops.report.details import quantities
from llmops.report.markup import tag
from llmops.report.provenance import counts, never, protocol
from llmops.report.sections import Page
from llmops.report.spending import kwh, section, spent


def named(rows, name):
    return next(row for row in rows if row["identity"]["variant"] == name)


def test_the_parts_are_all_of_own_energy_and_scoring():
    row = named(make_rows(), "student")
    row["building"]["teacher_energy_j"] = {**row["building"]["energy_j"], "value": 900.0}
    row["building"]["attempts"] = [{"wall_s": 1, "energy_j": 300.0}, {"wall_s": 1, "energy_j": None},
                                   {"wall_s": 9, "energy_j": 1700.0}]
    parts = {stage: each.value for stage, each in spent(row).parts.items()}
    assert parts == {"distill": 1700.0, "teacher": 900.0, "tries": 300.0, "evaluate": 210.0}
    assert sum(parts.values()) == pytest.approx(row["building"]["energy_j"]["value"] + 210.0)
    assert spent(row).total().provenance == "estimated"


def test_the_run_counts_a_shared_build_once_and_says_what_it_does_not_know():
    rows = make_rows()
    words = Reader(tag("div", section(Page(rows)))).words
    total = sum(spent(row).total().value or 0.0 for row in rows)
    assert f"took at least  ~{total / 1000:.1f} kJ" in words and "went into fine-tuning" in words
    twin = {**named(rows, "tuned"), "identity": {**named(rows, "tuned")["identity"], "variant": "twin"}}
    twin["building"] = {**twin["building"], "evaluate_energy_j": null("J", "no sensor")}
    again = Reader(tag("div", section(Page([*rows, twin])))).words
    assert f"~{total / 1000:.1f} kJ" in again and "scoring: no sensor" in again


def test_stages_that_come_later_are_shown_by_their_name():
    row = named(make_rows(), "tuned")
    row["building"]["data_energy_j"] = {**row["building"]["energy_j"], "value": 5.0}
    assert spent(row).parts["data"].value == 5.0


def test_nothing_metered_is_no_zero():
    rows = make_rows()[:2]
    for row in rows:
        for name in ("energy_j", "evaluate_energy_j"):
            row["building"][name] = null("J", "no sensor")
    words = Reader(tag("div", section(Page(rows)))).words
    assert "No energy of this run is known: no sensor" in words and "0.00" not in words
    assert kwh(Quantity.null("J", "no sensor")) == "-"
    assert kwh(Quantity.measured(3.6e6, "J", "x")) == "1.00 kWh"


def test_provenance_is_counted_over_every_figure():
    rows = make_rows()
    found = counts(rows, quantities)
    assert sum(sum(many.values()) for many in found.values()) == sum(1 for row in rows for _ in quantities(row))
    assert found["energy"]["measured"] == 0 and found["energy"]["estimated"] > 50


def test_what_no_figure_tells_follows_the_rows():
    rows = make_rows()
    assert any("no ratio of this run comes from one" in line for line in never(rows))
    assert any("embodied" in line for line in never(rows))
    for row in rows:
        if "energy" in row:
            row["energy"]["1"]["ratio_to_base"] |= {"value": 1.0, "provenance": "measured"}
            row["carbon"]["embodied_g"] = Quantity(3.0, "gCO2e", "constant", "given").as_dict()
    assert not any("no ratio of this run" in line or "embodied" in line for line in never(rows))
    assert protocol([{}]) == []
    rows[0]["energy"]["1"]["aa_ratio"] = Quantity.measured(1.01, "ratio", "x", (0.98, 1.04), 5).as_dict()
    assert any("0.980, 1.040" in line for line in protocol(rows))
