import copy

import pytest
from tests.report.rows import make_rows, null, q

from llmops.methods.quantize.options import Rtn
from llmops.report import reading
from llmops.report.reading import figure, name_of, quantity, saving, tree, versus
from llmops.report.words import what


def test_tree_order_is_depth_first_and_loses_no_row():
    rows = make_rows()
    found = [(depth, name_of(row)) for depth, row in tree(reversed(rows))]
    assert sorted(name for _, name in found) == sorted(map(name_of, rows))
    depths = dict((name, depth) for depth, name in found)
    assert (depths["base"], depths["tuned"], depths["wanda"], depths["healed"], depths["healed-w4"]) == (0, 1, 2, 3, 4)
    order = [name for _, name in found]
    assert order.index("healed-w4") == order.index("healed") + 1


def test_a_cycle_or_a_lost_parent_hides_no_row():
    rows = make_rows()[:4]
    rows[1]["identity"]["parent"], rows[2]["identity"]["parent"] = "tuned-w8", "tuned"  # each the other's
    rows[3]["identity"]["parent"] = "gone"
    assert sorted(name_of(row) for _, row in tree(rows)) == ["base", "tuned", "tuned-w4", "tuned-w8"]


@pytest.mark.parametrize("body", [None, 3, [], {"value": True, "unit": "B", "provenance": "measured"},
                                  {"value": "4", "unit": "B", "provenance": "measured"},
                                  {"value": 4, "unit": "B", "provenance": "guessed"}, {"value": 4}])
def test_what_is_no_figure_is_null_with_a_reason(body):
    found = quantity(body, "nothing there")
    assert found.value is None and found.method


def test_a_missing_figure_says_why():
    rows = {name_of(row): row for row in make_rows()}
    assert figure(rows["healed-w4"], "size", "disk_bytes").method.startswith("the variant is failed: layer")
    assert figure(rows["half"], "size", "disk_bytes").method == "not measured in this run"
    assert figure({}, "size", "disk_bytes").value is None


@pytest.mark.parametrize(("ratio", "ci95", "stated", "verdict"), [
    (0.7, (0.65, 0.75), "shown", "saves"), (0.9, (0.7, 1.1), "not shown", "no saving shown"),
    (1.4, (1.2, 1.6), "not shown", "costs more"), (0.9, (0.7, 1.1), "shown", "no saving shown"),
    (1.4, (1.2, 1.6), "shown", "costs more"), (0.7, (0.65, 0.75), "unmeasured", "unmeasured")])
def test_saving_never_says_more_than_the_interval(ratio, ci95, stated, verdict):
    row = {"energy": {"1": {"ratio_to_base": q(ratio, "ratio", ci95=ci95), "saving": stated}}}
    assert saving(row, "1") == verdict
    assert saving({"energy": {"1": {"ratio_to_base": null("ratio", "no sensor")}}}, "1") == "unmeasured"


def test_versus_finds_a_comparison_by_label_or_by_the_variants_name():
    row = make_rows()[3]
    by_name = versus(row, "exact_match:test", "tuned")
    assert by_name and by_name == versus(row, "exact_match:test", "parent")
    assert versus(row, "exact_match:test", "student") == {}
    row["quality"]["exact_match:test"]["versus"]["variant student"] = {"variant": "student", "n": 7}
    assert versus(row, "exact_match:test", "student")["n"] == 7


def test_what_says_the_last_step():
    said = {name_of(row): what(row) for row in make_rows()}
    assert said["base"] == "as it came"
    assert said["tuned"] == "lora r16 3 ep"
    assert (said["tuned-w8"], said["tuned-w4"]) == ("rtn w8a16", "rtn w4a16 g128")
    assert (said["wanda"], said["half"], said["student"]) == ("wanda 50%", "depth 4 layers", "logits of tuned 2 ep")


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w2a16"])
def test_the_group_size_left_out_is_the_default_of_the_method(scheme):
    options = Rtn(method="rtn", scheme=scheme)
    row = {"transform": {"method": "rtn", "options": options.model_dump()}}
    assert what(row) == f"rtn {scheme}" + (f" g{options.group}" if options.group != -1 else "")


@pytest.mark.parametrize(("method", "options", "said"), [
    ("lora", {"merge": True, "init": "default", "lora_plus_ratio": 0.0}, "lora r8 2 ep"),
    ("lora", {"merge": False, "rslora": True, "init": "pissa", "lora_plus_ratio": 16.0},
     "lora r8 rslora pissa lora+16 apart 2 ep"),
    ("qlora", {"merge": "original", "dora": True, "quant": "nf4"}, "qlora r8 dora nf4 original 2 ep")])
def test_ways_to_train_adapters_are_told_apart(method, options, said):
    assert what({"transform": {"method": method, "options": {"rank": 8, "epochs": 2.0, **options}}}) == said


@pytest.mark.parametrize(("method", "options", "said"), [
    ("depth", {"layers": 4, "choose": "block_influence"}, "depth 4 layers by block influence"),
    ("depth", {"parameters": 0.5, "choose": "perplexity", "contiguous": True},
     "depth 0.5x parameters by perplexity contiguous"),
    ("depth", {"layers": [0, 2], "choose": "even", "contiguous": False}, "depth 2 layers"),
    ("logits", {"loss": "reverse_kl", "on_policy": {"fraction": 1.0}}, "logits of t reverse_kl on-policy 5 steps"),
    ("logits", {"loss": "forward_kl", "offline": {"k": 32}, "student": {"config": {"num_hidden_layers": 2}}},
     "logits of t fresh offline 5 steps"),
    ("logits", {"student": {"model": "org/small"}}, "logits of t org/small 5 steps")])
def test_ways_to_cut_and_to_teach_are_told_apart(method, options, said):
    assert what({"transform": {"method": method, "options": {
        **({"teacher": "t", "max_steps": 5} if method == "logits" else {}), **options}}}) == said


def test_other_options_are_named():
    row = {"transform": {"method": "new", "options": {"method": "new", "beta": 2, "list": [1]}, "simulated": True}}
    assert what(row) == "new beta=2 simulated"
    pattern = {"transform": {"method": "wanda", "options": {"sparsity": 0.5, "pattern": "2:4"}}}
    assert what(pattern) == "wanda 2:4"


def test_different_protocols_workloads_and_machines_are_told_apart():
    one, two = make_rows()[3:5]
    score = "exact_match:test"
    assert reading.different_protocol(one, two, score) is None and reading.different_workload(one, two) is None
    other = copy.deepcopy(two)
    other["quality"][score]["protocol"]["dtype"] = "float32"  # incidental
    assert reading.different_protocol(one, other, score) is None
    other["quality"][score]["protocol"]["max_new_tokens"] = 99
    assert "max_new_tokens is 16 here and 99 there" in reading.different_protocol(one, other, score)
    other = copy.deepcopy(two)
    other["quality"][score]["n"] = 5
    assert "different items" in reading.different_protocol(one, other, score)
    other["workload"]["prompts_sha256"] = "00"
    assert "prompts_sha256" in reading.different_workload(one, other)
    other = copy.deepcopy(two)
    other["environment"]["cpu"] = "another"
    assert "different environment: cpu" in reading.different_workload(one, other)
