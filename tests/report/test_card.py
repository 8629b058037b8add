import re

import pytest
import yaml
from tests.report.rows import EVIL, make_rows, null

from llmops.report.card import card, front_matter
from llmops.report.words import what


def parts(row, rows=None):
    """(front matter as the hub finds it, body)"""
    text = card(row, rows or make_rows())
    found = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\r|\n|$))", text)  # the hub's own pattern
    return yaml.safe_load(found.group(2)), text[found.end():]


def named(name):
    return next(row for row in make_rows() if row["identity"]["variant"] == name)


@pytest.mark.parametrize(("name", "relation"), [("tuned", "finetune"), ("tuned-w4", "quantized"), ("wanda", "finetune"),
                                                ("student", "finetune"), ("base", None)])
def test_relation_to_the_base_model(name, relation):
    row = named(name)
    assert "base_model" not in parts(row)[0]  # the hub could not resolve builtin:tiny
    row["identity"]["base_model"] = "org/model-1.5B"
    head = parts(row)[0]
    assert head["base_model"] == "org/model-1.5B" and head.get("base_model_relation") == relation


def test_an_adapter_is_one():
    row = named("tuned")
    row["identity"]["base_model"], row["transform"]["options"]["merge"] = "org/model", False
    head, body = parts(row)
    assert head["base_model_relation"] == "adapter" and head["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in body


def test_what_was_trained_through_its_rounding_is_quantized_and_says_so():
    row = named("tuned")
    row["identity"]["base_model"], row["transform"]["storage_dtype"] = "org/model", "int2 g32 symmetric"
    row["transform"]["chain"] = ["finetune:lora", "quantize:rtn", "finetune:lora"]
    head, body = parts(row)
    assert head["base_model_relation"] == "quantized" and "compressed-tensors" in head["tags"]
    assert "pip install compressed-tensors" in body and what(row).endswith(" qat")
    assert not what(named("tuned")).endswith(" qat") and not what(named("tuned-w4")).endswith(" qat")


def test_an_adapter_on_packed_layers_tells_how_its_base_is_opened():
    row = named("tuned")
    row["identity"]["base_model"], row["transform"]["options"]["merge"] = "org/model", False
    row["transform"]["storage_dtype"] = "adapter on int4 g32 symmetric"
    head, body = parts(row)
    assert head["base_model_relation"] == "adapter" and not what(row).endswith(" qat")
    assert "CompressedTensorsConfig(dequantize=True)" in body


def test_tags_and_licence():
    head = parts(named("healed"))[0]
    assert head["tags"] == ["llmops", "pruned", "lora", "wanda"]
    assert "license" not in head
    row = named("healed")
    row["identity"]["license"] = "apache-2.0"
    assert parts(row)[0]["license"] == "apache-2.0"


def test_emissions_are_grams_and_only_when_known():
    row = named("tuned-w4")
    found = parts(row)[0]["co2_eq_emissions"]
    assert found["emissions"] == pytest.approx(row["carbon"]["building_g"]["value"], rel=1e-3)
    assert found["training_type"] == "fine-tuning" and found["hardware_used"] == "Example CPU"
    assert found["source"].startswith("estimated; ") and "geographical_location" not in found
    row["carbon"]["intensity"]["method"] = "France (FRA), annual average 2023, location-based (CodeCarbon 3.3.2)"
    assert parts(row)[0]["co2_eq_emissions"]["geographical_location"] == "France (FRA)"
    row["carbon"]["building_g"] = null("gCO2e", "no sensor")
    assert "co2_eq_emissions" not in parts(row)[0]
    assert "co2_eq_emissions" not in parts(named("base"))[0]


def test_the_hub_reads_the_scores():
    from huggingface_hub import ModelCard

    row = named("tuned-w4")
    found = ModelCard(card(row, make_rows()))
    results = {result.metric_name: result.metric_value for result in found.data.eval_results}
    assert results == {"exact_match:test": 0.913, "perplexity:heldout": 6.5}
    assert found.data.model_name == "tuned-w4" and found.data.library_name == "transformers"


def test_the_body_says_how_it_was_made_and_what_it_is_worth():
    _, body = parts(named("healed"))
    places = [body.index(step) for step in ("1. tuned: finetune with lora", "2. wanda: prune", "3. healed: finetune")]
    assert places == sorted(places)
    assert "| exact\\_match:test | 90.0% [86.6, 93.4] | 300 | +19.0 pp [+17.0, +21.0]" in body
    assert "Its zeros lie in dense tensors and save bytes only when compressed" in body
    assert "~61.0 mJ/token" in body and "estimated; CodeCarbon model" in body
    assert "not measured: embodied g: embodied carbon of the hardware is not known" in body
    assert "llmops.load" in body and "AutoModelForCausalLM" in body
    assert "efefefef" in body  # the hash of its data


def test_a_broken_or_failed_variant_says_so_first():
    for name in ("tuned-w2", "healed-w4"):
        head, body = parts(named(name))
        assert "Not fit for use" in body[:400] and set(head["tags"]) & {"broken", "failed"}


def test_a_folder_is_named_without_its_path():
    row = named("tuned")
    row["identity"]["base_model"] = "/home/somebody/models/mine"
    head, body = parts(row)
    assert "somebody" not in body and "`mine`" in body and "base_model" not in head


@pytest.mark.parametrize("evil", [EVIL, "a\n---\nlicense: mit", "[x](https://evil.example)", "a | b | c", "`code`",
                                  "# head", "![i](x)", "https://evil.example", "*b*", "{{ x }}", "\u202eabc"])
def test_names_and_data_are_only_ever_text(evil):
    row = named("tuned-w4")
    row["identity"]["variant"] = row["status"]["reason"] = evil
    row["transform"]["options"]["scheme"] = row["environment"]["cpu"] = evil
    row["quality"][evil] = row["quality"].pop("exact_match:test")
    row["carbon"]["building_g"]["method"] = row["log"]["events"] = [evil]
    row["carbon"]["building_g"]["method"] = evil
    head, body = parts(row, [row])
    assert "license" not in head and head["co2_eq_emissions"]["source"].startswith("estimated; ")
    outside = re.sub(r"(?<!\\)(`+).*?(?<!`)\1(?!`)", "", body)  # what is not in a code span
    assert "<script" not in outside and "\u202e" not in body
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)!\[|https?://", outside)
    heads = [line for line in body.splitlines() if line.startswith("# ")]
    assert len(heads) == 1
    rows_of_tables = [line for line in body.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows_of_tables} <= {4, 5, 6}


@pytest.mark.parametrize("gone", ["identity", "status", "transform", "size", "latency", "energy", "building", "quality",
                                  "carbon", "verdict", "environment", "workload", "parity", "tokens", "log", "goals"])
def test_any_group_may_be_missing_or_null(gone):
    for row in make_rows():
        assert card({key: value for key, value in row.items() if key != gone}, make_rows()).startswith("---\n")
        assert parts({**row, gone: None})[0]["library_name"]
    assert front_matter({})["tags"]


def test_it_says_what_it_is_for_and_that_the_rest_is_untested():
    _, body = parts(named("tuned-w4"))
    use = body[body.index("## Intended use"):body.index("## How it was made")]
    assert "`train`" in use and "`exact_match:test`" in use and "Out of scope" in use
    assert "nothing was trained here" in parts(named("base"))[1]
    assert "None: it is not what was to be built" in parts(named("tuned-w2"))[1]
    assert "Tested for nothing" in parts(named("half"))[1]


def test_the_record_is_in_kwh_and_flop_with_its_method():
    row, rows = named("healed"), make_rows()
    _, body = parts(row, rows)
    table = body[body.index("## Energy and compute"):]
    kwh = row["building"]["chain_energy_j"]["value"] / 3.6e6
    assert f"| ~{kwh:.4g} kWh | estimated | sum over builds" in table
    both = sum(each["building"]["flops"]["value"] for each in rows
               if each["identity"]["variant"] in ("tuned", "healed"))
    assert f"~{both:.4g} FLOP" in table and "sum over tuned, healed" in table
    assert "Annex XI" in table and "not a statement of compliance" in table
    rows[1]["building"]["flops"] = null("FLOP", "not counted")
    assert "that of tuned is not known: not counted" in parts(row, rows)[1]
    assert "nothing was trained" in parts(rows[6], [rows[0], rows[6]])[1]
    assert "## Energy and compute" not in parts(named("base"))[1]


def test_data_of_all_ancestors_and_of_the_scores_are_named_by_their_hashes():
    rows = make_rows()
    row = next(each for each in rows if each["identity"]["variant"] == "tuned-w4")
    row["quality"]["exact_match:test"]["items_sha256"] = "5a" * 32
    body = parts(row, rows)[1]
    assert f"data train of tuned, SHA-256: `{'ef' * 32}`" in body
    assert f"questions of exact\\_match:test, SHA-256 of their items: `{'5a' * 32}`" in body


def test_scores_by_group_name_the_worst():
    row = named("tuned-w4")
    score = row["quality"]["exact_match:test"]
    assert "## Scores by group" not in parts(row)[1]
    group = {"value": {**score["value"], "n": 40}, "n": 40}
    compared = {"n": 40, "delta": {**score["value"], "value": -0.1, "ci95": [-0.2, -0.02]}, "p_holm": 0.012}
    score["slices"] = {"kind": {"food|x": group, "town": group}}
    score["versus"]["parent"]["slices"] = {"kind": {"groups": {"food|x": compared}, "worst": "food|x"}}
    _, body = parts(row)
    table = body[body.index("## Scores by group"):body.index("## Size")]
    assert "| **kind=food\\|x** | " in table and "-10.0 pp [-20.0, -2.0]" in table and "0.012" in table
    assert "| kind=town | " in table


STATED = {"intended_use": "answering | about *our* products", "out_of_scope": "advice",
          "limitations": ["knows nothing after June", EVIL], "license": "apache-2.0"}


def test_what_the_recipe_states_is_printed_as_stated_and_its_absence_is_said():
    row = named("tuned")
    head, body = parts(row)
    assert "stated by nobody" in body and "license" not in head
    row["card"] = STATED
    head, body = parts(row)
    assert "Stated by who made it: answering \\| about \\*our\\* products" in body and "stated by nobody" not in body
    assert "Not for, as stated: advice" in body and "- stated: knows nothing after June" in body
    assert head["license"] == "apache-2.0" and EVIL not in body
