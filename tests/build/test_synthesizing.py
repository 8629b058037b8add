"""Data that a teacher writes."""

import hashlib
import json

import pytest
import torch
from tests.runs import TUNED, recipe, workplace
from tests.twins import twin

import llmops
from llmops.build import synthesizing
from llmops.build.shared import Shared
from llmops.build.synthesizing import filtered, synthesize, write_answers
from llmops.data.options import Synthesize
from llmops.data.sources import rows_from
from llmops.errors import StepError
from llmops.recipe import parse_recipe

PROMPTS = rows_from("asked", [{"prompt": f"Where does number {number} live?"} for number in range(9)])
HOW = Synthesize(teacher="t", prompts="asked", min_tokens=2, max_new_tokens=8)
ANSWERS = [("in the old town", 4, True), ("", 1, True), (" \n", 1, True), ("lake", 1, True), ("never ends", 8, False),
           ("on and on and on and on and on and on and on and on", 17, True), ("in the old town", 4, True),
           ("by the sea", 3, True), ("by the river", 3, True)]


def test_every_answer_is_kept_or_left_out_for_one_reason_that_is_counted():
    words = twin("llama")[1]
    kept, counts = filtered(PROMPTS, [[answer] for answer in ANSWERS], HOW, words)
    assert [row["messages"][0]["content"] for row in kept] == [f"Where does number {number} live?"
                                                              for number in (0, 6, 7, 8)]
    assert kept[0]["messages"][1] == {"role": "assistant", "content": "in the old town"}
    assert counts == {"prompts": 9, "written": 9, "unfinished": 1, "empty": 2, "short": 1, "repetitive": 1, "equal": 0,
                      "near": 0, "kept": 4, "tokens": 14}
    assert counts["written"] == counts["kept"] + sum(counts[reason] for reason in synthesizing.REASONS)


def test_equal_and_nearly_equal_rows_are_told_apart():
    words = twin("llama")[1]
    same = rows_from("asked", [{"prompt": "Where is the old garden of the town?"}] * 2)
    given = [[("It is behind the bridge", 5, True), ("It is behind the bridge", 5, True)],
             [("It is behind the bridge!", 6, True), ("Nobody here could say where it is", 7, True)]]
    _, counts = filtered(same, given, HOW, words)
    assert (counts["equal"], counts["near"], counts["kept"]) == (1, 1, 2)


def test_the_same_seed_writes_the_same_and_temperature_zero_is_greedy():
    model, words = twin("llama", torch.float32)
    prompts = [[5, 6, 7], [9, 8], [30, 31, 32, 33]]
    hot = Synthesize(teacher="t", prompts="a", answers=2, temperature=1.0, max_new_tokens=5)
    first, again, other = (write_answers(model, words, prompts, hot, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and all(len(each) == 2 for each in first)
    cold = write_answers(model, words, prompts, Synthesize(teacher="t", prompts="a", max_new_tokens=5), seed=1)
    for prompt, ((text, count, ended),) in zip(prompts, cold, strict=True):
        with torch.no_grad():
            told = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                  max_new_tokens=5, do_sample=False)[0, len(prompt):]
        assert (text, count, ended) == (words.decode(told, skip_special_tokens=True), len(told), False)


def test_a_kill_between_shards_asks_only_for_what_is_missing(tmp_path, monkeypatch):
    model, words = twin("llama")
    monkeypatch.setattr(synthesizing, "SHARD_PROMPTS", 4)
    calls = []

    def answers(teacher, tokenizer, prompts, how, *, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [[ANSWERS[len(prompt) % 2 * 7]] for prompt in prompts]

    monkeypatch.setattr(synthesizing, "write_answers", answers)
    shared = Shared(tmp_path / "key", {"teacher": "abc"}, "me")
    with pytest.raises(KeyboardInterrupt):
        synthesize(shared, PROMPTS, HOW, lambda: model, words, seed=7)
    assert shared.manifest() is None and not (shared.folder / "rows.jsonl").exists()
    card = synthesize(shared, PROMPTS, HOW, lambda: model, words, seed=7)
    assert calls == [700_021, 700_022, 700_022, 700_023]
    body = (shared.folder / "rows.jsonl").read_bytes()
    assert card["rows_sha256"] == hashlib.sha256(body).hexdigest() and card["counts"]["kept"] == body.count(b"\n") == 9
    told = (shared.folder / "README.md").read_text()
    assert card["rows_sha256"] in told and "9 rows of 9 prompts" in told and "abc" in told
    again = synthesize(shared, PROMPTS, HOW, lambda: pytest.fail("asked again"), words, seed=7)
    assert again["counts"] == card["counts"]


def test_a_teacher_of_which_nothing_is_left_is_told(tmp_path, monkeypatch):
    model, words = twin("llama")
    shared = Shared(tmp_path / "key", {"teacher": "abc"}, "me")
    with pytest.raises(StepError, match="wrote 9 answers, and no row is left: 9 were unfinished; expected a teacher"):
        synthesize(shared, PROMPTS, Synthesize(teacher="t", prompts="asked", max_new_tokens=2), lambda: model, words,
                   seed=0)
    assert shared.manifest() is None and not (shared.folder / "rows.jsonl").exists()


def test_any_step_trains_on_what_was_written_and_shares_its_cost(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    place, asked = workplace(tmp_path / "place"), []

    def answers(teacher, tokenizer, prompts, how, *, seed):
        asked.append(len(prompts))
        return [[(f"the lake of {number}", 4, True)] for number, _ in enumerate(prompts)]

    monkeypatch.setattr(synthesizing, "write_answers", answers)
    body = recipe({"tuned": TUNED, "full": {"finetune": {"method": "full", "data": "written", "max_steps": 1}},
                   "some": {"from": "tuned", "finetune": {**TUNED["finetune"], "data": "few", "max_steps": 1}}},
                  evaluate=[])
    body["measure"] = {"sensor": "declared", "watts": 10, "prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1],
                       "repeats": 2}
    body["data"] |= {"written": {"synthesize": {"teacher": "tuned", "prompts": "train"}},
                     "few": {"from": "written", "split": "[:10%]"}}
    parsed = parse_recipe(body, base_dir=place)
    assert list(parsed.variants) == ["tuned", "full", "some"]  # who writes is built first
    result = llmops.run(parsed, runs=tmp_path / "runs")
    assert not result.failed and asked == [64]
    rows = {row["identity"]["variant"]: row["building"] for row in result.rows}
    assert (rows["full"]["data"]["rows"], rows["some"]["data"]["rows"]) == (64, 6)
    keys = {entry["key"] for name in ("full", "some") for entry in rows[name]["shared"]}
    assert len(keys) == 1 and rows["full"]["shared"][0]["counts"]["kept"] == 64
    assert rows["full"]["shared"][0]["teacher"] == "tuned" and "break_even_to_teacher_tokens" not in rows["tuned"]
    for name in ("full", "some"):  # who wrote is who it has to pay off against
        assert rows[name]["break_even_to_teacher_tokens"]["unit"] == "tokens"
    link = tmp_path / "runs" / "r" / "_written" / "written"
    assert len(link.joinpath("rows.jsonl").read_text().splitlines()) == 64
    assert json.loads(link.joinpath("manifest.json").read_text())["teacher"] == "tuned"
    assert llmops.run(parsed, runs=tmp_path / "runs").failed == [] and asked == [64]
    again = {**body, "variants": {"tuned": TUNED, "last": {"finetune": {
        "method": "full", "data": "twice", "max_steps": 1}}}}
    again["data"] = {**body["data"], "twice": {"synthesize": {"teacher": "base", "prompts": "written"}}}
    rows = llmops.run(parse_recipe(again, base_dir=place), runs=tmp_path / "runs").rows
    assert asked == [64, 64]  # the answers of base to the prompts that tuned has answered: those are there already
    assert {entry["what"] for entry in rows[-1]["building"]["shared"]} == {"data twice", "data written"}
