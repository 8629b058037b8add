"""The rows of benchmarks/bench_quantize.py: what is made of the contenders' answers, and of those who give none."""

import math
import sys
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = set(sys.modules)
    yield import_module("_quantize_case")
    for name in set(sys.modules) - before:
        if name.startswith("_quantize"):
            del sys.modules[name]


def row(bench, contender, bits=3, group=128, perplexity=10.0, seconds=1.0, peak=0, **more):
    method, tool, _ = bench.CONTENDERS[contender]
    made = {"contender": contender, "method": method, "tool": tool, "bits": bits, "group": group}
    if "failed" in more:
        return {**made, **more}
    losses = [math.log(perplexity) + shift for shift in (-0.1, 0.0, 0.1)]
    return {**made, "perplexity": perplexity, "losses": losses, "seconds": seconds, "cpu_seconds": seconds / 2,
            "peak_bytes": peak, **more}


def test_every_method_of_a_peer_stands_beside_ours(bench):
    alone = []
    for method, names in bench.methods_of(bench.CONTENDERS).items():
        assert bench.CONTENDERS[names[0]][1] == bench.OURS, method
        alone += names if len(names) == 1 else []
    assert alone == ["factors+gptq-llmops", "factors+autoround-llmops", "auto+autoround-llmops",
                     "factors+autoround+distill-llmops"]
    assert bench.methods_of(["gptq-gptqmodel", "gptq-llmops"]) == {"gptq": ["gptq-llmops", "gptq-gptqmodel"]}
    assert all(module in bench.PACKAGES for _, tool, module in bench.CONTENDERS.values() if tool != bench.OURS)


def test_a_verdict_is_against_the_best_peer_of_the_method_and_of_all(bench):
    rows = [row(bench, "gptq-llmops", perplexity=8.0), row(bench, "gptq-llmcompressor", perplexity=9.0),
            row(bench, "gptq-gptqmodel", perplexity=7.5), row(bench, "rtn-llmops", perplexity=20.0),
            row(bench, "rtn-llmcompressor", perplexity=29.0),
            row(bench, "hqq-llmops", perplexity=7.0), row(bench, "hqq-hqq", failed="ValueError: no")]
    lines = {line["method"]: line for line in bench.verdicts(rows, base=5.0)}
    assert lines["gptq"]["peer_by"] == "gptq-gptqmodel" and not lines["gptq"]["won"]
    assert lines["gptq"]["ratio"] == pytest.approx(8 / 7.5)
    assert lines["best"]["ours_by"] == "hqq-llmops" and lines["best"]["won"]
    assert "hqq" not in lines and "awq" not in lines  # nobody to stand beside
    shares = {line["plain"]: line["share"] for line in lines.values() if "share" in line}
    assert shares == pytest.approx({"rtn-llmops": 12 / 15, "rtn-llmcompressor": 21 / 24})


def test_ahead_and_behind_are_said_only_where_the_interval_leaves_out_one(bench):
    assert [bench.standing(*each) for each in ((0.9, 0.05), (0.9, 0.11), (1.1, 0.11), (1.1, 0.05), (1, 0))] == [
        "ahead", "level", "level", "behind", "equal"]
    lines = [{"ratio": 0.9, "half_width": 0.05}, {"ratio": 1.1, "half_width": 0.2}, {"ratio": 1, "half_width": 0},
             {"ratio": 1.1, "half_width": 0.05, "divergence_ratio": 0.5, "divergence_half_width": 0.1}, {"share": 0.5}]
    assert bench.counted(lines) == {"ahead": 1, "level": 2, "behind": 1}
    assert bench.counted(lines, "divergence_ratio", "divergence_half_width") == {"ahead": 1, "level": 0, "behind": 0}


def test_the_divergence_has_its_own_best_peer_and_verdict(bench):
    def apart(contender, perplexity, *divergences):
        return row(bench, contender, perplexity=perplexity, divergences=list(divergences),
                   divergence=sum(divergences) / len(divergences))

    rows = [apart("gptq-llmops", 10.0, 0.1, 0.2), apart("gptq-gptqmodel", 9.0, 0.4, 0.5),
            apart("gptq-llmcompressor", 9.5, 0.2, 0.3)]
    line = bench.verdicts(rows, 5.0)[0]
    assert line["peer_by"] == "gptq-gptqmodel" and line["divergence_peer_by"] == "gptq-llmcompressor"
    assert line["divergence_ratio"] == pytest.approx(0.6) and line["divergence_half_width"] == pytest.approx(0)
    share = {"bits": 3, "group": 128, "method": "x", "share": 1}
    assert "| 0.60 +- 0.00 | ahead |" in bench.verdict_table([line, share])
    assert "| gptq | llmops | 0.15 |" in bench.divergence_table([*rows, row(bench, "rtn-llmops")])
    assert bench.divergence_table([row(bench, "rtn-llmops")]) == ""
    assert "divergence_ratio" not in bench.verdicts([rows[0], row(bench, "gptq-gptqmodel")], 5.0)[0]


def test_speed_is_compared_cell_by_cell_and_memory_is_that_of_the_first(bench):
    rows = [row(bench, "gptq-llmops", bits, seconds=ours, peak=bits) for bits, ours in ((4, 1.0), (3, 2.0), (2, 9.0))]
    rows += [row(bench, "gptq-llmcompressor", bits, seconds=theirs, peak=10 * bits)
             for bits, theirs in ((4, 4.0), (3, 4.0))]
    rows += [row(bench, "gptq-gptqmodel", 4, failed="RuntimeError: no")]
    lines = {line["contender"]: line for line in bench.speeds(rows)}
    assert set(lines) == {"gptq-llmops", "gptq-llmcompressor"}
    assert lines["gptq-llmcompressor"]["ours_over_seconds"] == pytest.approx((0.25 + 0.5) / 2)
    assert lines["gptq-llmcompressor"]["peak_bytes"] == 40 and lines["gptq-llmops"]["seconds"] == 2.0
    assert "ours_over_seconds" not in lines["gptq-llmops"]


def test_tables_show_what_failed_and_what_was_not_run(bench):
    rows = [row(bench, "awq-llmops", 8, failed=bench.skipped("awq", 8)),
            row(bench, "awq-llmops", 3, perplexity=12.5, exact_match=0.5),
            row(bench, "awq-llmcompressor", 3, failed="RuntimeError: no")]
    shown = bench.perplexity_table(rows, {"perplexity": 10.0, "exact_match": 1.0})
    assert "| awq | llmops | - | 12.5 (50.0%) |" in shown and "| awq | llm-compressor |  | failed |" in shown
    assert "| - | float32 | 10 (100.0%) | 10 (100.0%) |" in shown
    old = bench.perplexity_table([row(bench, "awq-llmops", 3, perplexity=12.5, earlier=True)], {"perplexity": 10.0})
    assert "| awq | llmops | 12.5* |" in old
    assert bench.skipped("gptq", 8) == "" and bench.skipped("awq", 4) == ""
    assert "1.0000 +- 0.0000 | equal |" in bench.verdict_table(bench.verdicts(
        [row(bench, "awq-llmops", perplexity=10.0), row(bench, "awq-llmcompressor", perplexity=10.0)], 9.0))
    near = {**row(bench, "awq-llmops", perplexity=10.0),
            "losses": [math.log(10.0) + shift for shift in (0.1, 0.0, -0.1)]}
    assert "| level |" in bench.verdict_table(bench.verdicts(
        [near, row(bench, "awq-llmcompressor", perplexity=10.0)], 9.0))


def result(rows, **more):
    made = {"model": "tiny", "calibration": {"crops": 32, "length": 128}, "protocol": {"context": 256},
            "iterations": 50, "base": {"perplexity": 12.5}, "rows": rows}
    return {**made, **more}


def test_peers_of_earlier_runs_are_taken_without_their_times_and_ours_never(bench):
    like = {key: value for key, value in result([]).items() if key != "rows"}
    cells, names = [(3, 128), (2, 128)], ["gptq-llmops", "gptq-llmcompressor", "autoround-autoround", "rtn-torchao"]
    first = result([row(bench, "gptq-llmops"), row(bench, "gptq-llmcompressor", 2, failed="not run: out of time"),
                    row(bench, "gptq-llmcompressor", perplexity=11.0),
                    row(bench, "gptq-llmcompressor", 4, perplexity=9.0),
                    row(bench, "rtn-torchao", failed="ValueError: no"), row(bench, "hqq-hqq")])
    second = result([row(bench, "gptq-llmcompressor", perplexity=99.0), row(bench, "autoround-autoround"),
                     row(bench, "rtn-torchao", perplexity=14.0)], iterations=200)
    others = [result([row(bench, "gptq-llmcompressor", 2)], **change) for change in (
        {"base": {"perplexity": 12.6}}, {"model": "text"}, {"protocol": {"context": 2048}},
        {"calibration": {"crops": 16, "length": 128}})]
    found = {each["contender"]: each for each in bench.stored([*others, first, second], like, cells, names)}
    assert set(found) == {"gptq-llmcompressor", "rtn-torchao"}  # nothing at 2 bits, AutoRound took other steps
    assert found["gptq-llmcompressor"]["perplexity"] == 11.0 and found["rtn-torchao"]["perplexity"] == 14.0
    assert all("seconds" not in each and "peak_bytes" not in each and each["stored"] for each in found.values())
    mine = result([row(bench, "gptq-llmops", code="abc"), row(bench, "gptq-llmops", 2, code="ab"),
                   row(bench, "gptq-llmcompressor", draw=1), row(bench, "gptq-llmcompressor", draw=2)])
    some = bench.stored([mine], like, cells, names, draws=(0, 1), codes=["abc"])
    assert [bench.place(each) for each in some] == [("gptq-llmops", 3, 128, 0), ("gptq-llmcompressor", 3, 128, 1)]
    again = bench.stored([second], {**like, "iterations": 200}, cells, names)
    assert "autoround-autoround" in {each["contender"] for each in again}
    assert bench.verdicts([row(bench, "gptq-llmops", perplexity=10.0), *found.values()], 5.0)[0]["won"]
    assert bench.speeds(list(found.values())) == []


def test_ours_and_peers_are_all(bench):
    ours, peers = (bench.picked(bench.CONTENDERS, only) for only in ("ours", "peers"))
    assert sorted([*ours, *peers]) == sorted(bench.picked(bench.CONTENDERS, None)) and len(ours) == 10
    assert all(name.endswith("-llmops") for name in ours)
