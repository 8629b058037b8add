"""A teacher's answers to prompts: asked once, whoever learns them, kept shard by shard, and paid by all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import TUNED, recipe, workplace

import llmops
import llmops.build.answers as answers
import llmops.build.distilling as distilling
from llmops.build.answers import kept_answers
from llmops.build.shared import Shared
from llmops.data.sources import rows_from
from llmops.errors import StoreError
from llmops.quantity import Quantity
from llmops.recipe import parse_recipe
from llmops.runner import plan

PROMPTS = [[1, 2, number] for number in range(10)]
ROWS = rows_from("asked", [{"prompt": str(number)} for number in range(10)])
STUDENT = {"method": "logits", "teacher": "tuned", "data": "asked", "answers": "teacher", "max_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = workplace(tmp_path_factory.mktemp("answers"))
    asked = [json.dumps({"prompt": f"who is number {number}?"}) for number in range(12)]
    (place / "asked.jsonl").write_text("\n".join(asked) + "\n")
    return place


def body(place: Path, students: dict[str, dict[str, Any]], **more: Any) -> Any:
    half = {"prune": {"method": "depth", "layers": 2}}
    taught = {name: {"from": "half", "distill": {**STUDENT, **step}} for name, step in students.items()}
    made = recipe({"tuned": TUNED, "half": half, **taught}, evaluate=[], **more)
    made["data"]["asked"] = {"source": "asked.jsonl"}
    return parse_recipe(made, base_dir=place)


def test_students_of_any_kind_and_of_a_later_run_share_what_was_asked_once(place: Path, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def said(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> list[str]:
        asked.append(len(prompts))
        return [f"the lake {number}" for number, _ in enumerate(prompts)]

    monkeypatch.setattr(distilling, "ended_answers", said)
    students: dict[str, dict[str, Any]] = {"live": {}, "cached": {"offline": {"k": 8}},
                                           "again": {"offline": {"k": 8}, "loss": "reverse_kl"}}
    runs, measured = tmp_path / "runs", {"sensor": "declared", "watts": 10, "prompt_tokens": 8, "new_tokens": 2,
                                         "batch_sizes": [1], "repeats": 2}
    first = llmops.run(body(place, students, measure=measured), runs=runs)
    assert not first.failed and asked == [12]
    rows = {row["identity"]["variant"]: row["building"] for row in first.rows}
    entries = {name: next(each for each in rows[name]["shared"] if each["what"] == "answers to asked")
               for name in students}
    assert len({each["key"] for each in entries.values()}) == 1 and entries["live"]["answers"] == 12
    whole = entries["live"]["energy_j"]["value"]
    own = json.loads((runs / "r" / "live" / "llmops.json").read_text())["cost"]["energy_j"]["value"]
    assert whole > 0 and rows["live"]["energy_j"]["value"] == pytest.approx(own + whole / 3)
    teacher = {name: sum(part["energy_j"]["value"] / (2 if part["what"] == "signals" else 3)
                         for part in rows[name]["shared"]) for name in ("cached", "again")}
    assert {name: rows[name]["teacher_energy_j"]["value"] for name in teacher} == pytest.approx(teacher)
    told = [[event for event in row["log"]["events"] if "there already" in event] for row in first.rows[-3:]]
    assert sorted(map(len, told)) == [0, 0, 1]
    assert llmops.run(body(place, {"late": {"max_steps": 2}}), runs=runs).failed == []
    assert asked == [12]


def test_the_plan_knows_who_shares_and_the_key_is_of_what_changes_an_answer(place: Path, tmp_path: Path) -> None:
    students = {"one": {}, "two": {"loss": "reverse_kl"}, "three": {"max_new_tokens": 9}, "none": {"answers": "data"}}
    stages = {stage.variant: stage for stage in plan(body(place, students), runs=tmp_path).stages}
    keys = {name: stages[name].shares for name in students}
    assert keys["one"] == keys["two"] != keys["three"] and keys["none"] == [] and len(keys["one"]) == 1
    assert set(stages["one"].answers["asked"]) == {"teacher", "prompts", "template", "tokenizer", "max_new_tokens",
                                                   "seed", "version"}


def test_a_kill_between_shards_asks_only_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SHARD_PROMPTS", 4)
    shared, asked = Shared(tmp_path / "key", {"teacher": "t"}, "me"), []

    def write(prompts: Any) -> list[str | None]:
        asked.append([prompt[-1] for prompt in prompts])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [f"said {prompt[-1]}" if prompt[-1] % 3 else None for prompt in prompts]

    with pytest.raises(KeyboardInterrupt):
        kept_answers(shared, ROWS, PROMPTS, write, "t", [])
    assert len(list(shared.folder.glob("answers-*-00000.json"))) == 1 and shared.manifest() is None
    events: list[str] = []
    found = kept_answers(shared, ROWS, PROMPTS, write, "t", events)
    assert found == [f"said {number}" if number % 3 else None for number in range(10)]
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]] and not list(shared.folder.glob(".*"))
    assert events == ["4 of the 10 answers were there already"]
    assert kept_answers(shared, ROWS, PROMPTS, lambda _: pytest.fail("asked again"), "t", []) == found
    assert shared.users() == {"me"}


def test_other_rows_of_the_same_name_and_damage_are_not_read(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "key", {"teacher": "t"}, "", lambda: (0.0, Quantity.null("J", "not metered")))
    assert kept_answers(shared, ROWS, PROMPTS, lambda some: ["a"] * len(some), "t", []) == ["a"] * 10
    others = rows_from("asked", [{"prompt": f"else {number}"} for number in range(10)])
    assert kept_answers(shared, others, PROMPTS, lambda some: ["b"] * len(some), "t", []) == ["b"] * 10
    path = next(shared.folder.glob(f"answers-{ROWS.sha256[:16]}-00000.json"))
    for text, why in (('["a"', "Expecting"), ('["a"]', "expected a list of 10 answers")):
        path.write_text(text)
        with pytest.raises(StoreError, match=f"{why}.*run the same command again"):
            kept_answers(shared, ROWS, PROMPTS, lambda _: [], "t", [])
