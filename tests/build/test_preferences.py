"""Training on pairs: the packed loss is that of each answer alone, killed runs go on bit for bit, zeros stay."""

import json

import pytest
import torch
from tests.twins import twin

from llmops.build.job import Job
from llmops.build.preferences import Pairs, answer_log_probs, dpo_step, pair_loss, pair_rows
from llmops.build.variant import STEPS
from llmops.data.options import DataSource, Limits
from llmops.data.pairs import encode_pairs
from llmops.data.sources import rows_from
from llmops.errors import DataError, StepError
from llmops.methods.finetune.dpo import dpo_loss
from llmops.methods.finetune.lora import zero_masks
from llmops.methods.finetune.options import Dpo, Stop
from llmops.models import parity
from llmops.models.load import load
from llmops.models.packed_rows import use_packed_attention
from llmops.train import Checkpoints

PAIRS = [{"prompt": f"Where is bridge {number}?", "chosen": "near the sea" + "!" * (number % 3),
          "rejected": "north" + " of the river" * (number % 2)} for number in range(12)]


def job(rows=PAIRS, chain=(), **more) -> Job:
    model, tokenizer = twin("llama", torch.float32)
    found = {"pairs": rows_from("pairs", rows), "other": rows_from("other", PAIRS[:3])}
    return Job(model, tokenizer, torch.float32, list(chain), lambda name: found[name],
               lambda name: DataSource(source=name), 0, **more)


def options(**more) -> Dpo:
    return Dpo(**{"method": "dpo", "data": "pairs", "epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "rank": 4,
                  "schedule": "constant", "warmup": 0.0} | more)


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def made(packed: bool = True) -> tuple[torch.nn.Module, Pairs]:
    """A model and pairs of random tokens: sides of different lengths after a common prompt."""
    model, _ = twin("llama", torch.float32)
    draw = torch.Generator().manual_seed(3)

    def side(number: int, size: int) -> dict[str, list[int]]:
        ids = torch.randint(5, 512, (6 + number + size,), generator=draw).tolist()
        return {"input_ids": ids, "labels": [-100] * (6 + number) + ids[6 + number:]}

    chosen, rejected = [side(n, 4) for n in range(5)], [side(n, 2 + n) for n in range(5)]
    return model, Pairs(chosen, rejected, [0, 1, 2, 3], [4], 0, packed)


def alone(model, side) -> float:
    """Summed log-probability of an answer, from full logits of its own forward pass."""
    ids = torch.tensor([side["input_ids"]])
    log_p = model(input_ids=ids).logits[0].detach().log_softmax(-1)
    return sum(float(log_p[place - 1, label]) for place, label in enumerate(side["labels"]) if label != -100)


@pytest.mark.parametrize("packed", [True, False])
def test_log_probabilities_of_a_batch_are_those_of_each_answer_alone(packed):
    model, pairs = made(packed)
    found = answer_log_probs(model, pairs, [4, 1, 2])
    expected = [[alone(model, sides[index]) for index in (4, 1, 2)] for sides in (pairs.chosen, pairs.rejected)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_a_batch_is_the_sum_over_pairs_of_the_function_on_tensors(packed):
    model, pairs = made(packed)
    reference = torch.linspace(-30, -10, 10).view(2, 5)
    rows = pair_rows(pairs, pairs.train, reference)
    assert list(rows.weights) == [1, 1, 1, 1] and rows.lengths[2] == 2 * 8 + 4 + 4
    live = torch.tensor([[alone(model, side[index]) for index in (3, 1)] for side in (pairs.chosen, pairs.rejected)])
    count = torch.tensor([[4.0, 4.0], [5.0, 3.0]])
    with use_packed_attention(model) if packed else torch.no_grad():
        for kind, smoothing, average, sft in (("sigmoid", 0.1, False, 0.0), ("hinge", 0.0, False, 0.5),
                                              ("ipo", 0.0, True, 0.0)):
            given = options(loss=kind, label_smoothing=smoothing, average_log_probs=average, sft_weight=sft)
            by = count if average else torch.ones(2, 2)
            expected = dpo_loss(*(live / by), *(reference[:, [3, 1]] / by), beta=0.1, kind=kind,
                                label_smoothing=smoothing).sum() - sft * (live[0] / count[0]).sum()
            found = pair_loss(model, rows.batch([3, 1]), options=given)
            assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4), kind


def test_passes_hold_every_pair_once_and_no_more_tokens_than_they_may(monkeypatch):
    model, pairs = made()
    whole = answer_log_probs(model, pairs, range(5))
    monkeypatch.setattr("llmops.build.preferences.PASS_TOKENS", 60)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs, given: calls.append(given["input_ids"].numel()),
                                    with_kwargs=True)
    torch.testing.assert_close(answer_log_probs(model, pairs, range(5)), whole, rtol=0, atol=1e-4)
    sizes = [pairs.tokens(index) for index in range(5)]
    assert sum(calls) == sum(sizes) and len(calls) > 1 and max(calls) <= max(60, *sizes)


def test_the_loss_begins_at_log_two_and_the_margin_grows():
    given = job()
    steps: list[tuple[int, dict]] = []
    given.log = lambda step, figures: steps.append((step, dict(figures)))
    work = dpo_step(given, options(epochs=8))
    assert work.loss[0][1] == pytest.approx(0.693147, abs=1e-5) and work.loss[-1][1] < 0.6
    assert steps[0][1]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1][1]["reward_margin"] > 0.2 and steps[-1][1]["reward_accuracy"] == 1.0
    assert work.data["reward_accuracy"] == 1.0 and work.data["pairs_looked_at"] == 12
    assert work.data["likelier_after"] > work.data["likelier_before"]
    assert any("used in every epoch" in event for event in work.events)
    assert any("reward margin 0 ->" in event for event in work.events)


def test_the_reference_is_the_parent_and_not_what_is_trained():
    """The margin reported at the end is that of a fresh copy of the parent against the result."""
    given = job()
    work = dpo_step(given, options())
    before, tokenizer = twin("llama", torch.float32)
    encoded = encode_pairs(rows_from("pairs", PAIRS), tokenizer, max_length=256, limits=Limits())
    pairs = Pairs(encoded.chosen, encoded.rejected, list(range(12)), [], 0)
    now, then = (answer_log_probs(model, pairs, range(12)) for model in (work.model, before))
    margin = 0.1 * ((now[0] - then[0]) - (now[1] - then[1])).mean()
    assert work.data["reward_margin"] == pytest.approx(float(margin), abs=1e-4) and float(margin) > 0.01


@pytest.mark.parametrize("more", [{}, {"rank": None}, {"dropout": 0.1, "loss": "ipo", "average_log_probs": True}])
def test_a_cut_off_training_goes_on_bit_for_bit(tmp_path, more):
    whole = dpo_step(job(checkpoints=Checkpoints(tmp_path / "whole", every_steps=1)), options(**more))

    def cut(done: int, total: int, text: str) -> None:
        if text.startswith("loss") and done == 4:
            raise KeyboardInterrupt

    place = Checkpoints(tmp_path / "cut", every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        dpo_step(job(checkpoints=place, progress=cut), options(**more))
    kept = (tmp_path / "cut" / "reference.safetensors").stat().st_mtime_ns
    told: list[str] = []
    again = dpo_step(job(checkpoints=place, progress=lambda done, total, text: told.append(text)), options(**more))
    assert (tmp_path / "cut" / "reference.safetensors").stat().st_mtime_ns == kept
    assert not any(text.startswith("reference") for text in told)
    assert any("went on from the checkpoint of step 3" in event for event in again.events)
    assert again.loss == whole.loss and torch.equal(weights(again.model), weights(whole.model))


def test_the_reference_is_computed_for_the_pairs_that_the_training_comes_to():
    whole, part = job(), job()
    told: list[tuple[int, str]] = []
    part.progress = lambda done, total, text: told.append((total, text))
    work = dpo_step(part, options(max_steps=2))
    assert {total for total, text in told if text.startswith("reference")} == {8}
    assert work.data["pairs_looked_at"] == 8 and work.data["pairs"] == 12
    same = dpo_step(whole, options()).loss[:2]  # the same rows in the same order
    assert [value for _, value in work.loss] == pytest.approx([value for _, value in same], abs=1e-5)


def test_a_reference_of_other_pairs_or_a_broken_file_is_computed_again(tmp_path):
    place = Checkpoints(tmp_path / "place", every_steps=100)
    expected = dpo_step(job(PAIRS[:6]), options())
    dpo_step(job(checkpoints=place), options())
    other = Checkpoints(tmp_path / "other", every_steps=100)
    other.folder.mkdir()
    file = other.folder / "reference.safetensors"
    file.write_bytes((place.folder / "reference.safetensors").read_bytes())
    assert dpo_step(job(PAIRS[:6], checkpoints=other), options()).loss == expected.loss
    other.discard()
    other.folder.mkdir()
    file.write_bytes(b"half a fi")
    assert dpo_step(job(PAIRS[:6], checkpoints=other), options()).loss == expected.loss


@pytest.mark.parametrize("rank", [4, None])
def test_zeros_of_a_pruned_parent_stay_zero_and_the_rest_moves(rank):
    given = job(chain=["prune:magnitude"])
    with torch.no_grad():
        for module in given.model.modules():
            if isinstance(module, torch.nn.Linear) and module is not given.model.lm_head:
                module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    before, count = zero_masks(given.model), weights(given.model)
    work = dpo_step(given, options(rank=rank))
    after = zero_masks(work.model)
    assert before.keys() == after.keys() and len(before) > 5
    for name, mask in before.items():
        assert not (after[name] & ~mask).any(), name
    assert not torch.equal(weights(work.model), count)


def test_accumulation_equals_the_big_batch():
    big = dpo_step(job(), options(epochs=1, batch_size=12))
    small = dpo_step(job(), options(epochs=1, batch_size=2, accumulate=6))
    assert big.loss[0][1] == pytest.approx(small.loss[0][1], rel=1e-5)
    torch.testing.assert_close(weights(big.model), weights(small.model), rtol=0, atol=2e-4)


def test_held_out_pairs_are_looked_at_and_named(tmp_path):
    work = dpo_step(job(), options(stop=Stop(holdout=0.25, every=1, share=1.0)))
    assert work.data["held_out"] == work.data["held_out_pairs_looked_at"] == 3 and work.data["pairs_looked_at"] == 9
    assert work.looks and work.looks[0][1] < 0.8 and "held_out_reward_margin" in work.data
    named = dpo_step(job(), options(stop=Stop(data="other", every=2, share=1.0)))
    assert named.data["pairs_looked_at"] == 12 and named.data["held_out_pairs_looked_at"] == 3


@pytest.mark.parametrize("merge", [True, False])
def test_what_is_saved_is_what_was_trained(tmp_path, merge):
    given = job(base_source=str(tmp_path / "base"))
    given.model.save_pretrained(tmp_path / "base")
    given.tokenizer.save_pretrained(tmp_path / "base")
    work = dpo_step(given, options(merge=merge))
    (tmp_path / "out").mkdir()
    work.save(tmp_path / "out")
    model, _ = load(tmp_path / "out", dtype="float32", device="cpu")
    ids = torch.arange(5, 45).view(2, 20)
    torch.testing.assert_close(model(input_ids=ids).logits, work.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "out" / ("config.json" if merge else "adapter_config.json")).read_text())


def test_an_adapter_apart_is_found_sound_where_its_base_is_stored_in_16_bits(tmp_path):
    """The adapter itself is in float32: it promises its rank, not the type of the base."""
    given = job(base_source=str(tmp_path / "base"), revision="main")
    given.model, given.storage = given.model.bfloat16(), torch.bfloat16
    given.model.save_pretrained(tmp_path / "base")
    given.tokenizer.save_pretrained(tmp_path / "base")
    work = dpo_step(given, options(merge=False, max_steps=1))
    before = parity.snapshot(work.model, given.tokenizer, torch.arange(5, 45).view(2, 20))
    (tmp_path / "out").mkdir()
    work.save(tmp_path / "out")
    model, tokenizer = load(tmp_path / "out", dtype="float32", device="cpu")
    assert parity.check(before, model, tokenizer, tmp_path / "out", work.expected)["ok"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "main"


def test_a_head_that_is_not_known_is_refused_and_not_guessed(monkeypatch):
    """Log-probabilities are taken from head(last hidden state); a scale that nobody knows of would ruin them."""
    given = job()
    forward = type(given.model).forward

    def scaled(self, *arguments, **named):
        out = forward(self, *arguments, **named)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(type(given.model), "forward", scaled)
    with pytest.raises(StepError, match="a scale of its logits is not known here; expected a model whose logits"):
        dpo_step(given, options(max_steps=1))


def test_padded_pairs_say_so_where_a_pack_was_wanted(monkeypatch):
    monkeypatch.setattr("llmops.build.training.can_pack", lambda model: "it carries state")
    work = dpo_step(job(), options(max_steps=1))
    assert "rows are padded: it carries state" in work.events
    assert not any("padded" in event for event in dpo_step(job(), options(max_steps=1, packing=False)).events)


def test_rows_of_another_kind_are_refused():
    with pytest.raises(DataError, match="are prompt_completion.*expected preferences, with prompt\\+chosen\\+rejected"):
        dpo_step(job([{"prompt": "a", "completion": "b"}]), options())


def test_identical_sides_are_refused_beyond_the_limit():
    same = [*PAIRS, {"prompt": "Why?", "chosen": "north", "rejected": "north"}]
    with pytest.raises(DataError, match="1 of 13 rows are equal on both sides"):
        dpo_step(job(same), options())



def test_a_broken_parent_is_refused_before_the_training():
    given = job()
    with torch.no_grad():
        given.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(StepError, match="no finite log-probability to 12 of 12 pairs"):
        dpo_step(given, options())


def test_one_pair_cannot_be_held_out():
    with pytest.raises(StepError, match="has 1 pair to train on"):
        dpo_step(job(PAIRS[:1]), options(stop=Stop()))


def test_the_step_is_registered():
    assert STEPS["finetune", "dpo"] is dpo_step
