from __future__ import annotations

import subprocess
import sys

import pytest

from llmops.errors import LlmopsError
from llmops.measure.carbon import carbon, embodied_per_1k, grams, intensity, sci_per_1k, zones
from llmops.quantity import Quantity


def test_a_zone_is_that_country_with_source_and_year():
    france = intensity("FRA")
    assert france.provenance == "constant" and france.unit == "gCO2e/kWh"
    assert france.value is not None and 20 < france.value < 120
    assert "France (FRA)" in france.method and "20" in france.method and "CodeCarbon" in france.method


def test_the_table_is_the_one_that_codecarbon_would_apply():
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    peer = Emissions(DataSource(), electricitymaps_api_token="")
    for zone in ("FRA", "POL", "USA", "IND", "NOR"):
        kg = peer.get_private_infra_emissions(Energy.from_energy(kWh=1.0), GeoMetadata(zone, zone))
        assert intensity(zone).value == pytest.approx(1000 * kg)


def test_no_zone_is_the_world_and_says_so():
    world = intensity(None)
    assert world.value == 475
    assert "world average; no zone given" in world.method


@pytest.mark.parametrize("zone, hint", [
    ("USS", "USA"), ("DEE", "DEU"), ("XYZ", ""), ("FRANCE", "FRA"), ("fra", "FRA"), ("FRR", "FRA"), ("FR", "FRA"),
    ("GER", "DEU"), ("DE", "DEU"), ("UK", "GBR"), ("UAE", "ARE"), ("NL", "NLD"), ("DK", "DNK"), ("US-CAL", "USA")])
def test_an_unknown_zone_is_refused_never_replaced(zone, hint):
    with pytest.raises(LlmopsError) as caught:
        intensity(zone)
    assert f'"{zone}"' in str(caught.value) and "leave the zone out" in str(caught.value)
    assert f'did you mean "{hint}" (' in str(caught.value) if hint else "did you mean" not in str(caught.value)


def test_every_zone_in_the_table_works():
    assert len(zones()) > 200
    for zone in zones():
        value = intensity(zone).value
        assert value is not None and 0 < value < 2000, zone


def test_grams_of_one_kilowatt_hour():
    grid = Quantity(500.0, "gCO2e/kWh", "constant", "grid")
    found = grams(Quantity(3.6e6, "J", "measured", "counter", (1.8e6, 5.4e6), 7), grid)
    assert (found.value, found.unit, found.provenance, found.n) == (500.0, "gCO2e", "constant", 7)
    assert found.ci95 == (250.0, 750.0)
    assert grams(Quantity(1.0, "J", "estimated", "model"), grid).provenance == "estimated"
    assert grams(Quantity.null("J", "no sensor"), grid) == Quantity.null("gCO2e", "no sensor")


def test_sci_needs_its_embodied_part():
    grid = Quantity(360.0, "gCO2e/kWh", "constant", "grid")
    per_token = Quantity(10.0, "J/token", "measured", "m", (9.0, 11.0), 5)
    without = sci_per_1k(per_token, grid)
    assert without.value is None and "M of ISO/IEC 21031" in without.method
    found = sci_per_1k(per_token, grid, Quantity(0.5, "gCO2e", "estimated", "maker's sheet"))
    assert found.value == pytest.approx(1.0 + 0.5)  # 10 kJ x 360 g/kWh = 1 g
    assert found.ci95 == pytest.approx((1.4, 1.6))
    assert found.provenance == "estimated" and "ISO/IEC 21031" in found.method
    assert sci_per_1k(Quantity.null("J/token", "no sensor"), grid, found).method == "no SCI: no sensor"


def test_the_group_of_a_row():
    group = carbon(Quantity(7.2e6, "J", "estimated", "model"), Quantity(3.6, "J/token", "estimated", "model"),
                   intensity("FRA"))
    value = intensity("FRA").value
    assert group["building_g"]["value"] == pytest.approx(2 * value)
    assert group["per_1k_tokens_g"]["value"] == pytest.approx(value / 1000)
    assert group["embodied_g"]["value"] is None and group["sci_g_per_1k_tokens"]["value"] is None
    assert group["intensity"]["value"] == value


def test_the_table_is_read_without_torch_or_codecarbon():
    code = ("import sys; from llmops.measure.carbon import intensity; intensity('DEU');"
            "sys.exit(bool({'torch', 'codecarbon', 'pandas'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_embodied_carbon_is_the_share_of_a_lifetime():
    found = embodied_per_1k(1312.0, 4.0, 0.025)  # 25 s for 1,000 tokens, of 4 years
    assert found.value == pytest.approx(1312e3 * 25 / (4 * 365.25 * 86400)) and found.provenance == "estimated"
    assert embodied_per_1k(1.0, 4.0, None).value is None
    per_token = Quantity(3.6, "J/token", "measured", "m")
    group = carbon(Quantity(1.0, "J", "measured", "m"), per_token, intensity("FRA"), found)
    alone = group["per_1k_tokens_g"]["value"]
    assert group["sci_g_per_1k_tokens"]["value"] == pytest.approx(alone + found.value) and group["embodied_g"]["value"]
