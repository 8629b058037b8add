import json
import math
from pathlib import Path

import pytest
import torch
from tests.twins import twin

from llmops.errors import DataError, LlmopsError
from llmops.evaluate import EVALUATORS
from llmops.evaluate.options import Harness
from llmops.evaluate.statistics import paired, proportion_interval

TASKS = Path(__file__).parent.parent.parent / "recipes" / "tasks"

try:
    import lm_eval
except ImportError:
    lm_eval = None
needed = pytest.mark.skipif(lm_eval is None, reason="lm-eval is not installed (extra: harness)")

ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: prose.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
metadata: {version: 2.0}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: prose.jsonl}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 6}
doc_to_text: "{{text}}"
doc_to_target: "{{last}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prose.yaml").write_text(ROLLING)
    (tmp_path / "written.yaml").write_text(WRITTEN)
    lines = ["The old river runs north.", "A new bridge was built long ago and stands near the sea.", "Every clock."]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps({"text": t, "last": t[-4:]}) + "\n" for t in lines))
    return tmp_path


def run(model, tokenizer, *tasks, include=TASKS, progress=None, **options):
    options = Harness(tasks=list(tasks), include=str(include), **options)
    return EVALUATORS["harness"](model, tokenizer, None, options, id=f"harness:{'+'.join(tasks)}", seed=0,
                                 progress=progress)


def state(model, tokenizer):
    return str((model.config.to_dict(), model.generation_config.to_dict(), tokenizer.padding_side, tokenizer.pad_token,
                model.training, torch.initial_seed()))


def plain(model, tokenizer, folder, task, monkeypatch):
    """What lm-eval itself reports for the task, called as its documentation has it."""
    import warnings

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=[task],
                                        task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    return found["results"][task]


@needed
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_the_local_task_gives_lm_evals_own_figures(metric, monkeypatch):
    model, tokenizer = twin("llama", torch.float32)
    seen = []
    [score] = run(model, tokenizer, "everyday", metric=metric, progress=lambda *counts: seen.append(counts))
    own = plain(model, tokenizer, TASKS, "everyday", monkeypatch)
    assert score.id == "harness:everyday" and score.metric == metric and score.higher_is_better
    assert score.value.value == pytest.approx(own[f"{metric},none"], abs=1e-12)
    assert score.stderr == pytest.approx(own[f"{metric}_stderr,none"], abs=1e-12)
    assert score.value.ci95 == pytest.approx(proportion_interval(sum(item.score for item in score.items), 16))
    assert seen == [(0, 1), (1, 1)] and score.protocol["version"] == 1.0
    rows = [json.loads(line) for line in (TASKS / "everyday.jsonl").read_text().splitlines()]
    for item, row in zip(score.items, rows, strict=True):
        assert item.detail["expected"] == row["choices"][row["answer"]] and item.answer in row["choices"]
        assert item.score == float(item.answer == item.detail["expected"])
    json.dumps([score.as_dict(), *[item.as_dict() for item in score.items]], allow_nan=False)


@needed
@pytest.mark.parametrize("metric", ["word_perplexity", "bits_per_byte"])
def test_rolling_tasks_are_means_of_their_items(folder, metric, monkeypatch):
    model, tokenizer = twin("llama", torch.float32)
    [score] = run(model, tokenizer, "prose", include=folder, metric=metric)
    own = plain(model, tokenizer, folder, "prose", monkeypatch)
    assert score.value.value == pytest.approx(own[f"{metric},none"], rel=1e-9)
    assert not score.higher_is_better and score.value.ci95[0] < score.value.value < score.value.ci95[1]
    found = paired(score, score, 0)
    assert found["delta"].value == 0
    assert ("ratio" in found) == (metric == "word_perplexity")


@needed
def test_written_answers_give_lm_evals_own_figures(folder, monkeypatch):
    model, tokenizer = twin("llama", torch.float32)
    own = plain(model, tokenizer, folder, "written", monkeypatch)
    [score] = run(model, tokenizer, "written", include=folder)
    assert score.value.value == pytest.approx(own["exact_match,none"], abs=1e-12)
    assert score.stderr == pytest.approx(own["exact_match_stderr,none"], abs=1e-12)


@needed
def test_documents_of_a_task_have_groups_and_clusters(folder):
    model, tokenizer = twin("llama", torch.float32)
    [score] = run(model, tokenizer, "written", include=folder, slices=["last"], cluster="text")
    assert [item.groups["last"] for item in score.items] == ["rth.", "sea.", "ock."]
    assert score.items[0].cluster == "The old river runs north."
    with pytest.raises(DataError, match='slices names the column "topic"'):
        run(model, tokenizer, "written", include=folder, slices=["topic"])


@needed
def test_written_answers_are_kept_and_pair_across_models(folder):
    model, tokenizer = twin("llama", torch.float32)
    other, _ = twin("llama", torch.float32, seed=1)
    scores = run(model, tokenizer, "written", "prose", include=folder)
    assert [score.id for score in scores] == ["harness:written", "harness:prose"]
    found = paired(scores[0], run(other, tokenizer, "written", include=folder)[0], 0)
    assert found["n"] == 3 and found["changed_answers"] == 3 and found["mcnemar_p"] == 1.0


@needed
def test_nothing_of_model_and_tokenizer_is_changed(folder):
    model, tokenizer = twin("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    before = state(model, tokenizer)
    run(model, tokenizer, "written", include=folder)
    assert state(model, tokenizer) == before


@needed
def test_limit_and_a_ruined_model(folder):
    model, tokenizer = twin("llama", torch.float32)
    [score] = run(model, tokenizer, "everyday", limit=5)
    assert score.value.n == 5 and score.protocol["limit"] == 5
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    [score] = run(model, tokenizer, "prose", include=folder)
    assert score.value.value is None and score.items[0].score is None


@needed
def test_unknown_names_and_missing_data(folder):
    model, tokenizer = twin("llama")
    with pytest.raises(LlmopsError, match='unknown metric "f1"; expected one of acc, acc_norm'):
        run(model, tokenizer, "everyday", metric="f1")
    with pytest.raises(LlmopsError, match="include '.*nowhere' is no folder"):
        run(model, tokenizer, "everyday", include=folder / "nowhere")
    (folder / "prose.jsonl").unlink()
    with pytest.raises(DataError, match="the data of prose cannot be read .*prose.jsonl"):
        run(model, tokenizer, "prose", include=folder)


@needed
def test_unknown_tasks_are_refused(monkeypatch):
    import lm_eval.tasks

    model, tokenizer = twin("llama")
    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, include_defaults=False: whole(
        include_path=include_path, include_defaults=False))  # the thousands that lm-eval ships take a minute to index
    with pytest.raises(LlmopsError, match='unknown task "everydy"; expected one of everyday; did you mean "everyday"'):
        run(model, tokenizer, "everydy")


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model, tokenizer = twin("llama")
    with pytest.raises(LlmopsError, match=r'not installed .* pip install "llmops\[harness\]"'):
        run(model, tokenizer, "everyday")
