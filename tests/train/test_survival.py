"""Killed at any step, or while a checkpoint is written: what remains is bitwise that of an undisturbed training."""

import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tests.train.makers import examples
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.errors import StepError, StoreError
from llmops.methods.finetune.neftune import noisy_embeddings
from llmops.models.token_loss import next_token_loss
from llmops.train import Checkpoints, Hooks, Schedule, Stopping, fit, token_rows
from llmops.train.checkpoint import Saved, _own


class Killed(BaseException):
    pass


def model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                        num_attention_heads=2, num_key_value_heads=1, attention_dropout=dropout))


def rows(packed: bool = True, count: int = 10):
    return token_rows(examples(count), pad_id=0, packed=packed)


def train(folder: Path | None, die_at: int | None = None, *, packed: bool = True, stop: bool = False,
          alpha: float = 0.0, every: int = 2, spent=None, schedule: dict | None = None, min_gain: float = 0.0):
    """One attempt: (fit, weights). `die_at`: dies in that step of it, the weights touched and nothing saved."""
    net = model(dropout=0.2)
    noise = noisy_embeddings(net, alpha)
    begun = [0]

    def after_step() -> None:
        begun[0] += 1
        if begun[0] == die_at:
            raise Killed

    checkpoints = Checkpoints(folder, every_steps=every) if folder is not None else None
    settings = {"epochs": 2.6, "learning_rate": 1e-2, "batch_size": 2, "accumulate": 2} | (schedule or {})
    stopping = Stopping(patience=1, every=2, share=1.0, min_gain=min_gain) if stop else None
    with noise if noise is not None else nullcontext():
        done = fit(net, rows(packed), Schedule(**settings), seed=3, checkpoints=checkpoints,
                   hooks=Hooks(after_step, noise.see if noise is not None else None, spent=spent or (lambda: None)),
                   held_out=token_rows(examples(4, seed=9), pad_id=0, packed=packed) if stop else None,
                   stopping=stopping)
    return done, {name: value.detach().clone() for name, value in net.named_parameters()}


def optimizer_of(folder: Path) -> dict:
    (_, saved), = [Checkpoints(folder).latest()]
    return saved.optimizer


CASES = {
    "packed, dropout, accumulation, fractional epochs": {},
    "padded, NEFTune": {"packed": False, "alpha": 5.0},
    "packed, NEFTune, held-out looks": {"alpha": 5.0, "stop": True},
    "stopped early, best weights kept": {"stop": True, "min_gain": 10.0},
    "a checkpoint every third step, sgd": {"every": 3, "schedule": {"optimizer": "sgd"}},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_in_every_step_the_rest_is_bitwise_the_same(case, tmp_path):
    expected, weights = train(tmp_path / "whole", **CASES[case])
    steps = expected.steps
    assert steps >= 4
    for at in range(1, steps + 1):
        folder = tmp_path / f"killed-{at}"
        with pytest.raises(Killed):
            train(folder, at, **CASES[case])
        found, again = train(folder, **CASES[case])
        assert found.loss == expected.loss and found.looks == expected.looks
        assert (found.tokens, found.trained_tokens, found.steps) == (expected.tokens, expected.trained_tokens, steps)
        assert len(found.resumed) == (at > 1)  # the first checkpoint follows the first step
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        first, second = optimizer_of(tmp_path / "whole"), optimizer_of(folder)
        assert all(torch.equal(value, second[index][name]) for index, entry in first.items()
                   for name, value in entry.items() if isinstance(value, torch.Tensor))


def test_dropout_and_noise_do_draw_and_how_often_is_saved_changes_nothing(tmp_path):
    with_noise, _ = train(None, alpha=5.0)
    without, _ = train(None)
    assert with_noise.loss != without.loss
    saved, _ = train(tmp_path, every=1)
    assert saved.loss == without.loss


def test_killed_in_one_attempt_after_another(tmp_path):
    expected, weights = train(None)
    for _ in range(3):
        with pytest.raises(Killed):
            train(tmp_path, 2, every=1)  # dies in the second step of each attempt, one step further every time
    found, again = train(tmp_path, every=1)
    assert found.loss == expected.loss and found.resumed == [1, 2, 3]
    assert sum("went on from the checkpoint" in event for event in found.events) == 1
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("number", range(6))
def test_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch, number):
    """Dies at the `number`-th call that flushes or renames: the one before it is whole, and no scratch stays."""
    expected, _ = train(None)
    calls = [0]

    def dying(function):
        def wrapped(*given):
            calls[0] += 1
            if calls[0] == 8 + number:
                raise Killed
            return function(*given)
        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr("llmops.train.checkpoint._sync", dying(lambda path: None))
        patch.setattr("llmops.train.checkpoint.shutil.rmtree", lambda *given, **more: None)  # a kill runs no `finally`
        with pytest.raises(Killed):
            train(tmp_path, every=1)
    found, _ = train(tmp_path, every=1)
    assert found.loss == expected.loss and found.resumed
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{found.steps:06d}"]


def test_a_training_that_had_ended_is_not_done_again(tmp_path):
    expected, weights = train(tmp_path)
    found, again = train(tmp_path, die_at=1)  # no step is left to die in
    assert found.loss == expected.loss and found.steps == expected.steps
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_time_and_energy_go_on_from_the_checkpoint(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, 4, every=1, spent=lambda: 7.0)
    found, _ = train(tmp_path, spent=lambda: 5.0)
    assert found.energy_j == 12.0
    assert found.wall_s > 0


def test_the_checkpoint_of_another_training_is_dropped(tmp_path):
    train(tmp_path, schedule={"learning_rate": 5e-3, "epochs": 5})
    later = max(path.name for path in tmp_path.iterdir())
    found, weights = train(tmp_path, every=1)
    expected, others = train(None)
    assert found.loss == expected.loss and any("another training" in event for event in found.events)
    assert all(torch.equal(others[name], weights[name]) for name in weights)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{found.steps:06d}"] != [later]


# ------------------------------------------------------------------------------------------- checkpoints that fail


def test_the_first_checkpoint_comes_after_the_first_step(tmp_path):
    seen = []

    def loss(net, batch):
        seen.append([path.name for path in tmp_path.glob("step-*")])
        return next_token_loss(net, batch)

    fit(model(), rows(), Schedule(epochs=1, batch_size=5), seed=0, loss=loss, checkpoints=Checkpoints(tmp_path, 1e9))
    assert seen == [[], ["step-000001"]]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_folder_that_cannot_be_written_fails_in_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(StoreError, match="could not be written.*--runs"):
        fit(model(), rows(), Schedule(epochs=4, batch_size=2), seed=0, checkpoints=Checkpoints(tmp_path / "file" / "c"),
            hooks=Hooks(after_step=lambda: steps.append(1)))
    assert len(steps) == 1


def test_a_disk_that_is_full_keeps_the_checkpoint_before_and_the_same_call_goes_on(tmp_path):
    expected, weights = train(None)
    with pytest.raises(Killed):
        train(tmp_path, 3, every=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # the kernel refuses to write more: EFBIG
    try:
        with pytest.raises(StoreError, match=r"step-000003: the checkpoint could not be written .*free some disk"):
            train(tmp_path, every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    found, again = train(tmp_path, every=1)
    assert found.loss == expected.loss and found.resumed == [2]
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_checkpoint_copies_only_what_it_has_to():
    whole = torch.arange(12.0).view(3, 4)
    held = _own({"a": whole, "same": whole, "part": whole[1], "turned": whole.t(), "other": torch.ones(2)})
    assert held["a"].data_ptr() == whole.data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in held.values()}) == len(held)
    assert held["part"].untyped_storage().nbytes() == 16 and torch.equal(held["turned"], whole.t())


def test_a_damaged_checkpoint_says_what_to_remove(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, 3, every=1)
    (tmp_path / "step-000002" / "trained.safetensors").write_bytes(b"half")
    with pytest.raises(StoreError, match="step-000002: the checkpoint cannot be read .*remove the folder"):
        train(tmp_path)


def test_writing_checkpoints_gets_a_twentieth_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("llmops.train.checkpoint.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("llmops.train.checkpoint._sync", lambda path: clock.__setitem__(0, clock[0] + 1.0))
    checkpoints = Checkpoints(tmp_path, every_s=10)
    assert checkpoints.due(1)
    checkpoints.save(1, Saved({"w": torch.zeros(2)}, {0: {"step": torch.tensor(1.0)}}, {}))
    took = clock[0]
    clock[0] += 19 * took
    assert not checkpoints.due(2)
    clock[0] += 2 * took
    assert checkpoints.due(3)


def test_nested_optimizer_states_come_back(tmp_path):
    state = {0: {"step": 3, "state1": torch.arange(3), "quant": {"absmax": torch.ones(2), "name": "dynamic"}}, 1: {}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, Saved({"w": torch.zeros(2)}, state, {"x": 0.1}))
    found = checkpoints.latest()
    assert found is not None
    step, saved = found
    assert step == 1 and saved.state == {"x": 0.1}
    assert saved.optimizer[0]["step"] == 3 and saved.optimizer[0]["quant"]["name"] == "dynamic"
    assert torch.equal(saved.optimizer[0]["quant"]["absmax"], torch.ones(2))


def test_what_was_worked_out_once_is_remembered(tmp_path):
    calls = []
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        assert checkpoints.remember("rate", lambda: calls.append(1) or {"rate": 0.1}) == {"rate": 0.1}
    assert len(calls) == 1 and checkpoints.latest() is None


# ------------------------------------------------------------------------------------------- memory that runs out


def short_of_memory(most: int, error: Exception):
    """The usual loss in a memory that holds `most` rows."""

    def loss(net, batch):
        if len(batch["cu_seq_lens_q"]) - 1 > most:
            raise error
        return next_token_loss(net, batch)

    return loss


OUT = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
       RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                    "tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)")]


@pytest.mark.parametrize("error", OUT, ids=["gpu", "cpu"])
def test_memory_that_runs_out_halves_the_passes_and_not_the_gradient(error):
    whole, halved = model(), model()
    schedule = Schedule(epochs=2, learning_rate=1e-2, batch_size=10, optimizer="sgd", warmup=0.0)
    expected = fit(whole, rows(), schedule, seed=1)
    found = fit(halved, rows(), schedule, seed=1, loss=short_of_memory(3, error))
    assert [step for step, _ in found.loss] == [1, 2]
    assert [loss for _, loss in found.loss] == pytest.approx([loss for _, loss in expected.loss], rel=1e-6)
    for one, other in zip(whole.parameters(), halved.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert found.tokens == expected.tokens
    assert [event.split(" (")[0] for event in found.events] == ["memory ran out at step 1"] * 2
    assert "at most 5 rows" in found.events[0] and "at most 3 rows" in found.events[1]


def test_a_killed_run_remembers_how_small_the_passes_have_to_be(tmp_path):
    def attempt(die_at=None):
        steps = []
        return fit(model(), rows(), Schedule(epochs=3, batch_size=10), seed=1, loss=short_of_memory(3, OUT[0]),
                   checkpoints=Checkpoints(tmp_path, every_steps=1),
                   hooks=Hooks(lambda: steps.append(1) or (_die() if len(steps) == die_at else None)))

    with pytest.raises(Killed):
        attempt(2)
    found = attempt()
    assert sum("memory ran out" in event for event in found.events) == 2  # both of the first attempt, none again


def _die() -> None:
    raise Killed


def test_one_row_that_is_too_large_is_named():
    with pytest.raises(StepError, match=r"step 1 with one row in a forward pass \(CUDA out of memory.*the longest row "
                                        r"of the step is row 10 with 13 tokens: lower max_length"):
        fit(model(), rows(), Schedule(epochs=1, batch_size=10), seed=1, loss=short_of_memory(0, OUT[0]))


def test_memory_that_runs_out_in_a_look_halves_its_passes():
    def loss(net, batch):
        if not net.training and len(batch["cu_seq_lens_q"]) - 1 > 1:
            raise OUT[0]
        return next_token_loss(net, batch)

    found = fit(model(), rows(), Schedule(epochs=1, batch_size=5), seed=1, loss=loss, held_out=rows(count=4),
                stopping=Stopping(every=1, share=1.0))
    assert len(found.looks) == 2 and sum("at the look after step 1" in event for event in found.events) == 2


def test_memory_that_runs_out_in_the_update_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (_ for _ in ()).throw(OUT[0]))
    with pytest.raises(StepError, match="in the update of optimizer step 1 .*adamw_8bit"):
        fit(model(), rows(), Schedule(epochs=1, batch_size=5), seed=1)


def test_other_errors_are_not_taken_for_memory():
    def loss(net, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(model(), rows(), Schedule(epochs=1), seed=1, loss=loss)
