"""The protocol on tiny random models, with a sensor that bills a known energy for every forward pass.

`Bill` makes a pass over p prompt tokens cost `prefill` J a token and a decoded token cost `decode` J, per sequence of
the batch, times a seeded noise: what the protocol should find is known in advance.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tests.measure.replay import Clock, ReplaySensor

from llmops.errors import LlmopsError
from llmops.measure.beside import beside
from llmops.measure.decode import Measurement, measure, peak_memory
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.sensors import NullSensor
from llmops.measure.workload import Runner, make_prompts, prompts_sha256
from llmops.quantity import Quantity

OPTIONS = MeasureOptions(prompt_tokens=6, new_tokens=5, batch_sizes=[1, 3], repeats=5, idle_s=0)


class Ids:
    """As much of a tokenizer as the workload needs."""

    all_special_ids = [0, 1]
    added_tokens_decoder = {0: "<pad>", 1: "<end>", 63: "<tool>"}

    def __len__(self) -> int:
        return 64


def llama(layers: int = 1, seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True} | changes
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **config)).eval()


class Bill:
    def __init__(self, noise: float = 0.0) -> None:
        self.joules = 0.0
        self.noise = noise
        self.draw = random.Random(1)
        self.shapes: dict[str, list[tuple[int, int]]] = {}

    def watch(self, model: Any, name: str, prefill: float, decode: float) -> Any:
        def charge(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            batch, length = kwargs["input_ids"].shape
            self.shapes.setdefault(name, []).append((batch, length))
            price = decode if length == 1 else prefill * length
            self.joules += batch * price * math.exp(self.draw.gauss(0, self.noise))

        model.register_forward_hook(charge, with_kwargs=True)
        return model

    def meter(self, provenance: str = "measured", period: float | None = None) -> Meter:
        return Meter(ReplaySensor(lambda: {"gpu0": self.joules}, provenance, period))


def run(noise: float = 0.0, decode: float = 1.0, provenance: str = "measured",
        **changes: Any) -> tuple[Measurement, Bill]:
    bill = Bill(noise)
    variant = bill.watch(llama(1), "variant", 0.5, decode)
    base = bill.watch(llama(2), "base", 1.0, 2.0)
    options = OPTIONS.model_copy(update=changes)
    return measure(variant, base, Ids(), options, bill.meter(provenance), seed=0), bill


def test_known_energies_are_recovered():
    found, _ = run()
    for batch in ("1", "3"):
        energy = found.energy[batch]
        # a request: 6 prompt tokens at 0.5 J, then 4 decoded tokens at 1 J; 5 output tokens
        assert energy["joules_per_request"]["value"] == pytest.approx(7.0)
        assert energy["joules_per_token"]["value"] == pytest.approx(7.0 / 5)
        assert energy["prefill_joules_per_token"]["value"] == pytest.approx(0.5)
        assert energy["decode_joules_per_token"]["value"] == pytest.approx(1.0)
        assert energy["ratio_to_base"]["value"] == pytest.approx(0.5)
        assert energy["ratio_to_base"]["ci95"] == pytest.approx([0.5, 0.5])
        assert energy["saving"] == "shown"
        assert energy["joules_per_token"]["n"] == 5
        assert energy["ratio_to_base"]["provenance"] == "measured"


def test_a_noisy_saving_has_an_interval_around_the_truth():
    found, _ = run(noise=0.05)
    ratio = found.energy["1"]["ratio_to_base"]
    assert ratio["ci95"][0] < 0.5 < ratio["ci95"][1] < 1
    assert ratio["ci95"][1] - ratio["ci95"][0] > 0.005


def test_no_difference_is_not_shown_as_a_saving():
    found, _ = run(noise=0.05, decode=2.75)  # 14 J a request on both sides
    assert found.energy["1"]["ratio_to_base"]["value"] == pytest.approx(1.0, abs=0.1)
    assert found.energy["1"]["saving"] == "not shown"


def test_an_estimate_stays_an_estimate():
    found, _ = run(provenance="estimated")
    assert found.energy["1"]["saving"] == "shown"
    for name in ("ratio_to_base", "joules_per_token", "decode_joules_per_token"):
        assert found.energy["1"][name]["provenance"] == "estimated"


def test_without_a_sensor_there_is_speed_and_no_joule():
    found = measure(llama(1), llama(2), Ids(), OPTIONS, Meter(NullSensor("no counter here")), seed=0)
    energy = found.energy["1"]
    assert energy["saving"] == "unmeasured"
    for name, quantity in energy.items():
        if name != "saving":
            assert quantity["value"] is None and quantity["provenance"] == "null"
    assert "no counter here" in energy["joules_per_token"]["method"]
    assert found.latency["1"]["decode_tokens_per_s"]["value"] > 0
    assert not [line for line in found.warnings if not line.startswith("not alone")]


def test_a_sensor_that_dies_midway_loses_the_energy_and_nothing_else():
    bill = Bill()
    variant, base = bill.watch(llama(1), "variant", 1, 1), bill.watch(llama(2), "base", 1, 1)
    reads = 0

    def trace() -> dict[str, float]:
        nonlocal reads
        reads += 1
        if reads > 20:
            raise OSError("fell off the bus")
        return {"gpu0": bill.joules}

    found = measure(variant, base, Ids(), OPTIONS, Meter(ReplaySensor(trace)), seed=0)
    assert found.energy["1"]["joules_per_token"]["value"] is None
    assert "fell off the bus" in found.energy["1"]["joules_per_token"]["method"]
    assert found.energy["1"]["saving"] == "unmeasured"
    assert found.latency["3"]["speed_ratio_to_base"]["value"] is not None


def test_the_base_runs_against_itself_for_the_noise_floor():
    bill = Bill(noise=0.05)
    base = bill.watch(llama(2), "base", 1.0, 2.0)
    found = measure(base, None, Ids(), OPTIONS, bill.meter(), seed=0)
    energy, latency = found.energy["1"], found.latency["1"]
    assert energy["ratio_to_base"]["value"] is None and "aa_ratio" in energy["ratio_to_base"]["method"]
    assert energy["aa_ratio"]["ci95"][0] < 1 < energy["aa_ratio"]["ci95"][1]
    assert energy["saving"] == "not shown"
    assert energy["joules_per_request"]["value"] == pytest.approx(14, rel=0.1)
    assert latency["speed_ratio_to_base"]["value"] is None and latency["aa_speed_ratio"]["n"] == 5
    assert found.workload["compared_with"] == "itself (A/A)"


def test_blocks_take_turns_in_a_seeded_random_order():
    def order(seed: int) -> list[tuple[int, int, str]]:
        options = OPTIONS.model_copy(update={"repeats": 8})
        found = measure(llama(1), llama(1), Ids(), options, Meter(NullSensor("")), seed)
        return [(block.batch, block.repeat, block.arm) for block in found.blocks]

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    pairs = [first[place:place + 2] for place in range(0, len(first), 2)]
    assert all({arm for *_, arm in pair} == {"base", "variant"} and pair[0][:2] == pair[1][:2] for pair in pairs)
    assert len({pair[0][2] for pair in pairs}) == 2  # neither arm always goes first


def test_every_request_is_one_prefill_and_exactly_the_new_tokens():
    found, bill = run(batch_sizes=[3])
    for name in ("variant", "base"):
        shapes = bill.shapes[name]
        assert set(shapes) == {(3, 6), (3, 1)}
        prefills = shapes.count((3, 6))
        alone = sum(block.prefills for block in found.blocks if block.arm == name)
        assert shapes.count((3, 1)) == (prefills - alone) * 4
    timing = found.blocks[0].requests[0]
    assert len(timing.steps_s) == 4
    assert sum(timing.steps_s) <= timing.decode_s
    assert found.latency["3"]["inter_token_ms_p50"]["n"] == 5 * 4
    assert found.latency["3"]["first_token_ms_p95"]["value"] >= found.latency["3"]["first_token_ms_p50"]["value"]


def test_the_loop_writes_what_generate_writes():
    model = llama(2, seed=4)
    prompts = make_prompts([model], Ids(), 2, 6, seed=3)
    runner = Runner(model)
    with torch.inference_mode():
        token, cache = runner.prefill(prompts)
        mine = [token]
        for _ in range(6):
            token, cache = runner.step(token, cache)
            mine.append(token)
        peer = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=7, min_new_tokens=7,
                              do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(torch.cat(mine, dim=1), peer[:, 6:])


def test_prompts_are_seeded_ordinary_tokens_that_both_models_know():
    small = llama(1, vocab_size=40)
    prompts = make_prompts([llama(1), small], Ids(), 50, 20, seed=5)
    assert torch.equal(prompts, make_prompts([small, llama(1)], Ids(), 50, 20, seed=5))
    assert set(prompts.unique().tolist()) == set(range(2, 40))
    assert 63 in make_prompts([llama(1)], type("Plain", (), {"__len__": lambda self: 64})(), 50, 20, 5)
    assert 63 not in make_prompts([llama(1)], Ids(), 50, 20, seed=5)
    assert prompts_sha256(prompts) != prompts_sha256(make_prompts([small], Ids(), 50, 20, seed=6))
    assert prompts_sha256(torch.zeros(2, 3, dtype=torch.long)) != prompts_sha256(torch.zeros(3, 2, dtype=torch.long))


def test_window_and_sensor_make_blocks_last():
    found, _ = run(window_s=0.4, repeats=2, batch_sizes=[1])
    assert all(block.wall_s >= 0.4 and block.prefill_wall_s >= 0.4 for block in found.blocks)
    assert any(len(block.requests) > 1 and block.prefills > 1 for block in found.blocks)  # any: a busy machine stalls
    bill = Bill()
    model = bill.watch(llama(1), "variant", 1, 1)
    few = OPTIONS.model_copy(update={"repeats": 2, "batch_sizes": [1]})
    slow = measure(model, None, Ids(), few, bill.meter("estimated", period=0.02), seed=0)  # an estimate: three updates
    assert all(block.wall_s >= 0.06 and block.prefill_wall_s >= 0.06 for block in slow.blocks)
    assert any("measure.window_s to 2 or more" in line for line in slow.warnings)
    counter = measure(model, None, Ids(), few, bill.meter(period=0.002), seed=0)  # a counter: 200
    assert all(block.wall_s >= 0.4 and block.prefill_wall_s >= 0.4 for block in counter.blocks)
    assert counter.workload["window_s"] == pytest.approx(0.4)
    assert not any("window_s" in line for line in counter.warnings)


def test_gpus_are_summed_and_each_is_shown():
    bill = Bill()
    model = bill.watch(llama(1), "variant", 0.5, 1.0)
    meter = Meter(ReplaySensor(lambda: {"gpu0": bill.joules, "gpu1": 3 * bill.joules}))
    found = measure(model, None, Ids(), OPTIONS, meter, seed=0).energy["1"]
    assert found["joules_per_token"]["value"] == pytest.approx(4 * 1.4)
    assert found["joules_per_token_gpu0"]["value"] == pytest.approx(1.4)
    assert found["joules_per_token_gpu1"]["value"] == pytest.approx(3 * 1.4)


def test_others_at_work_are_told_and_refused_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("llmops.measure.beside.shared_folder", lambda: tmp_path)
    few = OPTIONS.model_copy(update={"repeats": 2, "batch_sizes": [1]})
    found, _ = run(repeats=2, batch_sizes=[1])
    assert found.workload["beside"] == [] and found.workload["conditions"]["after"].keys() <= {"load_average_1m"}
    with beside():
        with_other, _ = run(repeats=2, batch_sizes=[1])
        assert any("not alone on this machine: llmops process" in line for line in with_other.warnings)
        with pytest.raises(LlmopsError, match="exclusive measuring was asked for"):
            measure(llama(1), None, Ids(), few.model_copy(update={"exclusive": True}), Meter(NullSensor("no")), seed=0)


def test_idle_power_is_taken_off(monkeypatch):
    clock, bill = Clock(), Bill()
    monkeypatch.setattr("llmops.measure.decode.time.sleep", clock.advance)
    variant = bill.watch(llama(1), "variant", 0.5, 1.0)
    variant.register_forward_hook(lambda *_: clock.advance(0.25))  # a pass takes 0.25 s
    sensor = ReplaySensor(lambda: {"gpu0": bill.joules + 100 * clock.now})
    found = measure(variant, None, Ids(), OPTIONS.model_copy(update={"idle_s": 4.0, "batch_sizes": [1]}),
                    Meter(sensor, clock=clock), seed=0)
    assert found.energy["idle_watts"]["value"] == pytest.approx(100)
    assert found.energy["idle_watts"]["n"] == 2
    assert found.energy["1"]["joules_per_token"]["value"] == pytest.approx(1.4 + 100 * 5 * 0.25 / 5)
    assert found.energy["1"]["net_joules_per_token"]["value"] == pytest.approx(1.4)


def test_idle_power_that_was_not_read_is_null():
    found, _ = run(repeats=2)
    assert found.energy["idle_watts"]["value"] is None
    assert "idle_s: 0" in found.energy["1"]["net_joules_per_token"]["method"]


def test_the_groups_have_the_fields_of_a_row():
    found, _ = run(repeats=2)
    assert set(found.latency) == {"1", "3"} and set(found.energy) == {"1", "3", "idle_watts"}
    assert set(found.latency["1"]) == {
        "prefill_tokens_per_s", "decode_tokens_per_s", "first_token_ms_p50", "first_token_ms_p95",
        "inter_token_ms_p50", "inter_token_ms_p95", "speed_ratio_to_base"}
    assert set(found.energy["1"]) == {
        "joules_per_token", "joules_per_request", "prefill_joules_per_token", "decode_joules_per_token",
        "ratio_to_base", "saving", "net_joules_per_token"}
    for group in (found.latency["1"], found.energy["1"]):
        for name, body in group.items():
            if name != "saving":
                assert Quantity.from_dict(body).as_dict() == body
    assert found.workload["prompt_tokens"] == 6 and found.workload["order_seed"] == 0
    assert len(found.workload["prompts_sha256"]) == 64


@pytest.mark.parametrize("prompt, new", [(30, 3), (31, 2), (500, 2)])
def test_what_does_not_fit_the_context_is_refused(prompt, new):
    options = OPTIONS.model_copy(update={"prompt_tokens": prompt, "new_tokens": new})
    with pytest.raises(LlmopsError, match="do not fit the context of 32 tokens of the variant model"):
        measure(llama(1), llama(1, max_position_embeddings=2000), Ids(), options, Meter(NullSensor("")), seed=0)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_other_architectures_decode_past_their_sliding_window(name):
    from tests.twins import tokenizer, twin

    model, _ = twin(name)
    options = MeasureOptions(prompt_tokens=30, new_tokens=8, batch_sizes=[2], repeats=2)
    found = measure(model, None, tokenizer(), options, Meter(NullSensor("")), seed=0)
    assert found.latency["2"]["inter_token_ms_p95"]["n"] == 2 * 7


def test_the_models_are_left_as_they_were():
    variant, base = llama(1).train(), llama(2).eval()
    before = {name: value.clone() for name, value in variant.state_dict().items()}
    calls: list[tuple[int, int]] = []
    measure(variant, base, Ids(), OPTIONS.model_copy(update={"repeats": 2}), Meter(NullSensor("")), seed=0,
            progress=lambda done, whole: calls.append((done, whole)))
    assert variant.training and not base.training
    assert all(torch.equal(value, before[name]) for name, value in variant.state_dict().items())
    assert calls == [(step, 8) for step in range(1, 9)]


def test_peak_memory_is_more_than_the_weights():
    model = llama(2)
    found = peak_memory(model, Ids(), OPTIONS, seed=0)
    assert found.value is not None
    assert found.value >= sum(parameter.nbytes for parameter in model.parameters())
