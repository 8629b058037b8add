"""The rows of benchmarks/bench_quantize.py: what is made of the contenders' answers, and of those who give none."""

import math

import pytest
from benchmarks import _quantize_case as bench


def row(contender, bits=3, group=128, perplexity=10.0, seconds=1.0, peak=0, **more):
    method, tool, _ = bench.CONTENDERS[contender]
    made = {"contender": contender, "method": method, "tool": tool, "bits": bits, "group": group}
    if "failed" in more:
        return {**made, **more}
    losses = [math.log(perplexity) + shift for shift in (-0.1, 0.0, 0.1)]
    return {**made, "perplexity": perplexity, "losses": losses, "seconds": seconds, "cpu_seconds": seconds / 2,
            "peak_bytes": peak, **more}


def test_every_method_of_a_peer_stands_beside_ours():
    for method, names in bench.methods_of(bench.CONTENDERS).items():
        assert bench.CONTENDERS[names[0]][1] == bench.OURS, method
        assert len(names) > 1, method
    assert bench.methods_of(["gptq-gptqmodel", "gptq-llmops"]) == {"gptq": ["gptq-llmops", "gptq-gptqmodel"]}
    assert all(module in bench.PACKAGES for _, tool, module in bench.CONTENDERS.values() if tool != bench.OURS)


def test_pairs_are_of_the_same_windows_and_know_their_noise():
    ratio, half = bench.paired([1.0, 2.0, 3.0], [1.1, 2.1, 3.1])
    assert ratio == pytest.approx(math.exp(-0.1)) and half == pytest.approx(0, abs=1e-12)  # the windows agree
    ratio, half = bench.paired([1.0, 2.0], [1.2, 2.0])
    t = 12.706  # of one degree of freedom
    assert ratio == pytest.approx(math.exp(-0.1)) and half == pytest.approx(math.exp(-0.1) * 0.1 * t, rel=1e-4)
    ratio, half = bench.paired_divergences([0.1, 0.3], [0.2, 0.2])
    assert ratio == pytest.approx(1) and half == pytest.approx(0.1 / 0.2 * t, rel=1e-4)
    assert bench.paired_divergences([0.1, 0.1], [0.2, 0.2]) == pytest.approx((0.5, 0.0))
    assert bench.paired([1.0], [1.0]) == (1.0, math.inf)
    with pytest.raises(ValueError, match="2 and 1 windows; expected the same"):
        bench.paired([1.0, 2.0], [1.0])


def test_a_verdict_is_against_the_best_peer_of_the_method_and_of_all():
    rows = [row("gptq-llmops", perplexity=8.0), row("gptq-llmcompressor", perplexity=9.0),
            row("gptq-gptqmodel", perplexity=7.5), row("rtn-llmops", perplexity=20.0),
            row("rtn-llmcompressor", perplexity=29.0),
            row("hqq-llmops", perplexity=7.0), row("hqq-hqq", failed="ValueError: no")]
    lines = {line["method"]: line for line in bench.verdicts(rows, base=5.0)}
    assert lines["gptq"]["peer_by"] == "gptq-gptqmodel" and not lines["gptq"]["won"]
    assert lines["gptq"]["ratio"] == pytest.approx(8 / 7.5)
    assert lines["best"]["ours_by"] == "hqq-llmops" and lines["best"]["won"]
    assert "hqq" not in lines and "awq" not in lines  # nobody to stand beside
    shares = {line["plain"]: line["share"] for line in lines.values() if "share" in line}
    assert shares == pytest.approx({"rtn-llmops": 12 / 15, "rtn-llmcompressor": 21 / 24})


def test_ahead_and_behind_are_said_only_where_the_interval_leaves_out_one():
    assert [bench.standing(*each) for each in ((0.9, 0.05), (0.9, 0.11), (1.1, 0.11), (1.1, 0.05), (1, 0))] == [
        "ahead", "level", "level", "behind", "equal"]
    lines = [{"ratio": 0.9, "half_width": 0.05}, {"ratio": 1.1, "half_width": 0.2}, {"ratio": 1, "half_width": 0},
             {"ratio": 1.1, "half_width": 0.05, "divergence_ratio": 0.5, "divergence_half_width": 0.1}, {"share": 0.5}]
    assert bench.counted(lines) == {"ahead": 1, "level": 2, "behind": 1}
    assert bench.counted(lines, "divergence_ratio", "divergence_half_width") == {"ahead": 1, "level": 0, "behind": 0}


def test_the_divergence_has_its_own_best_peer_and_verdict():
    def apart(contender, perplexity, *divergences):
        return row(contender, perplexity=perplexity, divergences=list(divergences),
                   divergence=sum(divergences) / len(divergences))

    rows = [apart("gptq-llmops", 10.0, 0.1, 0.2), apart("gptq-gptqmodel", 9.0, 0.4, 0.5),
            apart("gptq-llmcompressor", 9.5, 0.2, 0.3)]
    line = bench.verdicts(rows, 5.0)[0]
    assert line["peer_by"] == "gptq-gptqmodel" and line["divergence_peer_by"] == "gptq-llmcompressor"
    assert line["divergence_ratio"] == pytest.approx(0.6) and line["divergence_half_width"] == pytest.approx(0)
    share = {"bits": 3, "group": 128, "method": "x", "share": 1}
    assert "| 0.60 +- 0.00 | ahead |" in bench.verdict_table([line, share])
    assert "| gptq | llmops | 0.15 |" in bench.divergence_table([*rows, row("rtn-llmops")])
    assert bench.divergence_table([row("rtn-llmops")]) == ""
    assert "divergence_ratio" not in bench.verdicts([rows[0], row("gptq-gptqmodel")], 5.0)[0]


def test_speed_is_compared_cell_by_cell_and_memory_is_that_of_the_first():
    rows = [row("gptq-llmops", bits, seconds=ours, peak=bits) for bits, ours in ((4, 1.0), (3, 2.0), (2, 9.0))]
    rows += [row("gptq-llmcompressor", bits, seconds=theirs, peak=10 * bits) for bits, theirs in ((4, 4.0), (3, 4.0))]
    rows += [row("gptq-gptqmodel", 4, failed="RuntimeError: no")]
    lines = {line["contender"]: line for line in bench.speeds(rows)}
    assert set(lines) == {"gptq-llmops", "gptq-llmcompressor"}
    assert lines["gptq-llmcompressor"]["ours_over_seconds"] == pytest.approx((0.25 + 0.5) / 2)
    assert lines["gptq-llmcompressor"]["peak_bytes"] == 40 and lines["gptq-llmops"]["seconds"] == 2.0
    assert "ours_over_seconds" not in lines["gptq-llmops"]


def test_tables_show_what_failed_and_what_was_not_run():
    rows = [row("awq-llmops", 8, failed=bench.skipped("awq", 8)),
            row("awq-llmops", 3, perplexity=12.5, exact_match=0.5),
            row("awq-llmcompressor", 3, failed="RuntimeError: no")]
    shown = bench.perplexity_table(rows, {"perplexity": 10.0, "exact_match": 1.0})
    assert "| awq | llmops | - | 12.5 (50.0%) |" in shown and "| awq | llm-compressor |  | failed |" in shown
    assert "| - | float32 | 10 (100.0%) | 10 (100.0%) |" in shown
    old = bench.perplexity_table([row("awq-llmops", 3, perplexity=12.5, earlier=True)], {"perplexity": 10.0})
    assert "| awq | llmops | 12.5* |" in old
    assert bench.skipped("gptq", 8) == "" and bench.skipped("awq", 4) == ""
    assert "1.0000 +- 0.0000 | equal |" in bench.verdict_table(bench.verdicts(
        [row("awq-llmops", perplexity=10.0), row("awq-llmcompressor", perplexity=10.0)], 9.0))
    near = {**row("awq-llmops", perplexity=10.0), "losses": [math.log(10.0) + shift for shift in (0.1, 0.0, -0.1)]}
    assert "| level |" in bench.verdict_table(bench.verdicts(
        [near, row("awq-llmcompressor", perplexity=10.0)], 9.0))


def result(rows, **more):
    made = {"model": "tiny", "calibration": {"crops": 32, "length": 128}, "protocol": {"context": 256},
            "iterations": 50, "base": {"perplexity": 12.5}, "rows": rows}
    return {**made, **more}


def test_peers_of_earlier_runs_are_taken_without_their_times_and_ours_never():
    like = {key: value for key, value in result([]).items() if key != "rows"}
    cells, names = [(3, 128), (2, 128)], ["gptq-llmops", "gptq-llmcompressor", "autoround-autoround", "rtn-torchao"]
    first = result([row("gptq-llmops"), row("gptq-llmcompressor", 2, failed="not run: out of time"),
                    row("gptq-llmcompressor", perplexity=11.0), row("gptq-llmcompressor", 4, perplexity=9.0),
                    row("rtn-torchao", failed="ValueError: no"), row("hqq-hqq")])
    second = result([row("gptq-llmcompressor", perplexity=99.0), row("autoround-autoround"),
                     row("rtn-torchao", perplexity=14.0)], iterations=200)
    others = [result([row("gptq-llmcompressor", 2)], **change) for change in (
        {"base": {"perplexity": 12.6}}, {"model": "text"}, {"protocol": {"context": 2048}},
        {"calibration": {"crops": 16, "length": 128}})]
    found = {each["contender"]: each for each in bench.stored([*others, first, second], like, cells, names)}
    assert set(found) == {"gptq-llmcompressor", "rtn-torchao"}  # nothing at 2 bits, AutoRound took other steps
    assert found["gptq-llmcompressor"]["perplexity"] == 11.0 and found["rtn-torchao"]["perplexity"] == 14.0
    assert all("seconds" not in each and "peak_bytes" not in each and each["stored"] for each in found.values())
    again = bench.stored([second], {**like, "iterations": 200}, cells, names)
    assert "autoround-autoround" in {each["contender"] for each in again}
    assert bench.verdicts([row("gptq-llmops", perplexity=10.0), *found.values()], 5.0)[0]["won"]
    assert bench.speeds(list(found.values())) == []


def test_ours_and_peers_are_all():
    ours, peers = (bench.picked(bench.CONTENDERS, only) for only in ("ours", "peers"))
    assert sorted([*ours, *peers]) == sorted(bench.picked(bench.CONTENDERS, None)) and len(ours) == 6
    assert all(name.endswith("-llmops") for name in ours)
