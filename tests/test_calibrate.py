"""The walk: statistics against hooks on the plain model, propagation against brute force, every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.twins import NAMES, tokens, twin
from torch import nn

from llmops import calibrate
from llmops.calibrate import Block, block_influence, block_scores, walk, walk_blocks
from llmops.errors import LlmopsError, StepError
from llmops.methods.prune import block_influence as influence
from llmops.methods.prune import magnitude_mask, wanda_mask
from llmops.methods.quantize import rtn
from llmops.models.arch import decoder_layers


@torch.no_grad()
def inputs_of(model: Any, ids: torch.Tensor, upto: int | None = None) -> dict[str, torch.Tensor]:
    """Every linear layer's input over one plain forward pass, (tokens, in)."""
    seen: dict[str, torch.Tensor] = {}
    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
               for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def gather(model: Any, ids: torch.Tensor | None, statistic: str, **options: Any) -> dict[str, torch.Tensor | None]:
    got: dict[str, torch.Tensor | None] = {}
    options = {"ignore": ["lm_head"], **options}
    walk(model, ids, statistic, lambda name, layer, value: got.update({name: value}), **options)
    return got


@pytest.mark.parametrize("name", NAMES)
def test_statistics_match_hooks_on_the_plain_forward(name: str) -> None:
    model, _ = twin(name, torch.float32)
    ids = tokens(6, 48)  # longer than the sliding windows, so their masks matter
    x = {key: value.double() for key, value in inputs_of(model, ids).items()}
    for statistic, exact in (("x_norm", lambda v: v.norm(dim=0)), ("x_absmax", lambda v: v.abs().amax(0)),
                             ("hessian", lambda v: 2 * v.T @ v / v.shape[0])):
        got = gather(model, ids, statistic, batch_size=4)  # 6 rows: the last batch is smaller
        assert got.keys() == x.keys() - {"lm_head"} and len(got) == 28
        for key, value in got.items():
            assert value is not None
            torch.testing.assert_close(value.double(), exact(x[key]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_later_blocks_see_the_compressed_activations(name: str) -> None:
    ids = tokens()
    model, _ = twin(name, torch.float32)
    walk(model, ids, "x_norm", lambda _, layer, x: layer.weight * wanda_mask(layer.weight, x, 0.5), ignore=["lm_head"])
    brute, _ = twin(name, torch.float32)
    path, blocks = decoder_layers(brute)
    for index in range(len(blocks)):  # the plain way: a whole forward pass for every block
        seen = inputs_of(brute, ids)
        for key, layer in brute.named_modules():
            if isinstance(layer, nn.Linear) and key.startswith(f"{path}.{index}."):
                layer.weight.data *= wanda_mask(layer.weight.data, seen[key].norm(dim=0), 0.5)
    for key, value in brute.state_dict().items():
        differing = (model.state_dict()[key] != value).float().mean()
        assert differing < 1e-3, key  # sums in another order may swap two near-equal scores


@pytest.mark.parametrize("name", NAMES)
def test_wanda_and_magnitude_reach_exactly_half_in_every_row_and_layer(name: str) -> None:
    for statistic in ("x_norm", "none"):
        model, _ = twin(name)

        def update(_: str, layer: nn.Linear, x: torch.Tensor | None) -> torch.Tensor:
            mask = magnitude_mask(layer.weight, 0.5) if x is None else wanda_mask(layer.weight, x, 0.5)
            return layer.weight * mask

        walk(model, tokens() if statistic != "none" else None, statistic, update, ignore=["lm_head"])
        _, blocks = decoder_layers(model)
        for layer in blocks.modules():
            if isinstance(layer, nn.Linear):
                zeros = layer.weight == 0
                assert int(zeros.sum()) == layer.weight.numel() // 2
                if statistic == "x_norm":
                    assert zeros.sum(1).eq(layer.in_features // 2).all()
        with torch.no_grad():
            assert torch.isfinite(model(tokens()).logits).all()


def test_walking_twice_gives_the_same_model_whatever_the_batches() -> None:
    def pruned(batch_size: int) -> dict[str, torch.Tensor]:
        model, _ = twin("qwen3")
        walk(model, tokens(), "x_norm", lambda _, layer, x: layer.weight * wanda_mask(layer.weight, x, 0.5),
             ignore=["lm_head"], batch_size=batch_size)
        return model.state_dict()

    first, again, other = pruned(4), pruned(4), pruned(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all((first[key] == other[key]).float().mean() > 0.98 for key in first)


def test_without_a_statistic_nothing_is_run_and_progress_is_told() -> None:
    model, _ = twin("llama")
    model.forward = model.model.forward = lambda *args, **kwargs: pytest.fail("a forward pass was made")
    told: list[tuple[int, int]] = []
    got = gather(model, None, "none", progress=lambda done, total: told.append((done, total)))
    assert set(got.values()) == {None} and told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_model_is_left_as_it_was_when_nothing_is_updated() -> None:
    model, _ = twin("gemma3")
    with torch.no_grad():
        before = model(tokens()).logits
        gather(model, tokens(), "hessian")
        block_influence(model, tokens())
        assert torch.equal(model(tokens()).logits, before)
    _, blocks = decoder_layers(model)
    assert all("forward" not in block.__dict__ for block in blocks)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_an_untied_head_is_walked_when_it_is_not_ignored_and_a_tied_one_is_refused() -> None:
    model, _ = twin("mistral", torch.float32)
    got = gather(model, tokens(), "x_norm", ignore=[], batch_size=4)
    assert list(got)[-1] == "lm_head"
    exact = inputs_of(model, tokens())["lm_head"].norm(dim=0)
    torch.testing.assert_close(got["lm_head"], exact, rtol=1e-4, atol=1e-4)
    tied, _ = twin("llama")
    with pytest.raises(LlmopsError, match="lm_head shares its weight.*ignore"):
        gather(tied, None, "none", ignore=[])


def test_ignore_takes_ends_of_names_and_refuses_what_is_not_there() -> None:
    model, _ = twin("llama")
    got = gather(model, None, "none", ignore=["lm_head", "down_proj", "layers.0.self_attn.q_proj"])
    assert len(got) == 28 - 4 - 1
    with pytest.raises(LlmopsError, match='unknown layer to ignore "down_prj".*did you mean "down_proj"'):
        gather(model, None, "none", ignore=["down_prj"])


@pytest.mark.parametrize("name", NAMES)
def test_block_influence_matches_hidden_states_of_the_plain_forward(name: str) -> None:
    model, _ = twin(name, torch.float32)
    scores = block_influence(model, tokens(), batch_size=4)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    _, blocks = decoder_layers(model)
    handles = [block.register_forward_hook(lambda _, args, out: pairs.append((args[0], out))) for block in blocks]
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    assert scores == pytest.approx([influence(x, y) for x, y in pairs], abs=1e-5)
    assert block_scores(model, tokens(), lambda x, y: 1.0) == [1.0] * 4


def test_nan_is_named_by_layer() -> None:
    model, _ = twin("llama")
    _, blocks = decoder_layers(model)
    blocks[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(StepError, match=r"model\.layers\.2\.mlp\.up_proj: the weight holds NaN"):
        gather(model, None, "none")
    with pytest.raises(StepError, match=r"model\.layers\.2\.mlp\.down_proj: the input activations hold"):
        gather(model, tokens(), "x_norm")
    healthy, _ = twin("llama")
    with pytest.raises(StepError, match=r"model\.layers\.0\.self_attn\.q_proj: the new weight holds NaN"):
        walk(healthy, None, "none", lambda _, layer, x: layer.weight * float("inf"), ignore=["lm_head"])
    with pytest.raises(StepError, match=r"model\.layers\.2: the output activations hold"):
        block_influence(model, tokens())


def test_wrong_calls_are_refused() -> None:
    model, _ = twin("llama")
    with pytest.raises(LlmopsError, match='unknown statistic "x_nrm".*did you mean "x_norm"'):
        gather(model, tokens(), "x_nrm")
    with pytest.raises(LlmopsError, match="needs calibration tokens"):
        gather(model, None, "hessian")

    def failing(name: str, layer: nn.Linear, x: torch.Tensor | None) -> torch.Tensor:
        raise LlmopsError("group_size 48 does not divide")

    with pytest.raises(LlmopsError, match=r"^model\.layers\.0\.self_attn\.q_proj: group_size 48"):
        walk(model, None, "none", failing, ignore=["lm_head"])
    _, blocks = decoder_layers(model)
    blocks[1].mlp.experts = nn.ParameterList([nn.Parameter(torch.zeros(2, 3, 4))])
    with pytest.raises(LlmopsError, match="3-D weights .fused experts"):
        gather(model, None, "none")


@pytest.mark.parametrize("whole", [0, calibrate.WHOLE], ids=["a pass a turn", "one pass"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_take_turns_see_the_earlier_ones_updated(name: str, whole: int,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "WHOLE", whole)
    turns = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    got: dict[str, torch.Tensor] = {}

    def update(full: str, layer: nn.Linear, H: torch.Tensor | None) -> torch.Tensor:
        assert H is not None
        got[full] = H
        return rtn(layer.weight, bits=3, group_size=32).dequantize()

    model, _ = twin(name, torch.float32)
    runs = []
    _, blocks = decoder_layers(model)
    handle = blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    walk(model, tokens(), "hessian", update, ignore=["lm_head"], sequential=True, batch_size=4)
    handle.remove()
    assert len(runs) == (1 + 1 if whole else 2 + 1 + 2 * 5)  # capture; to find the turns; four turns and on
    brute, _ = twin(name, torch.float32)
    path, blocks = decoder_layers(brute)
    order = []
    for index in range(2):  # the plain way: a whole forward pass for every turn
        for turn in turns:
            seen = inputs_of(brute, tokens())
            for key, layer in brute.named_modules():
                if key.startswith(f"{path}.{index}.") and key.endswith(turn):
                    x = seen[key].double()
                    exact = 2 * x.T @ x / len(x)
                    assert (got[key].double() - exact).norm() <= 1e-4 * exact.norm(), key
                    layer.weight.data = rtn(layer.weight.data, bits=3, group_size=32).dequantize()
                    order.append(key)
    ran = [key for key in got if key.startswith((f"{path}.0.", f"{path}.1."))]
    place = {last: number for number, turn in enumerate(turns) for last in turn}
    assert [place[key.rsplit(".", 1)[-1]] for key in ran] == [place[key.rsplit(".", 1)[-1]] for key in order]
    for key, value in brute.state_dict().items():
        if key.startswith((f"{path}.0.", f"{path}.1.")):
            torch.testing.assert_close(model.state_dict()[key], value)


def test_layers_that_share_an_input_share_its_statistic() -> None:
    model, _ = twin("qwen2", torch.float32)
    apart = gather(model, tokens(), "hessian")
    together = gather(model, tokens(), "hessian", sequential=True)
    assert apart.keys() == together.keys()
    for key, value in apart.items():
        torch.testing.assert_close(together[key], value)
    name = "model.layers.1.self_attn."
    for found in (apart, together):  # in one pass for all, too
        assert found[f"{name}q_proj"] is found[f"{name}v_proj"] is not found[f"{name}o_proj"]
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("whole", [0, calibrate.WHOLE])
def test_what_is_made_of_a_statistic_is_made_once_for_all_who_share_it(whole: int, sequential: bool,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "WHOLE", whole)
    made: list[torch.Tensor] = []
    got: dict[str, int] = {}

    def once(H: torch.Tensor) -> int:
        made.append(H.clone())
        H.zero_()  # its memory may be used: nobody looks at it any more
        return len(made)

    model, _ = twin("qwen2", torch.float32)
    apart = gather(model, tokens(), "hessian")
    walk(model, tokens(), "hessian", lambda name, layer, number: got.update({name: number}), ignore=["lm_head"],
         sequential=sequential, once=once)
    assert len(made) == 4 * len(decoder_layers(model)[1]) and got.keys() == apart.keys()
    for name, number in got.items():
        torch.testing.assert_close(made[number - 1], apart[name])

    def failing(H: torch.Tensor) -> None:
        raise LlmopsError("no")

    with pytest.raises(LlmopsError, match=r"^model\.layers\.0\.self_attn\.q_proj: no$"):
        walk(model, tokens(), "hessian", lambda *_: None, ignore=["lm_head"], sequential=sequential, once=failing)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_layer_that_does_not_run_is_named_whatever_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for whole in (0, calibrate.WHOLE):
        monkeypatch.setattr(calibrate, "WHOLE", whole)
        model, _ = twin("llama", torch.float32)
        model.model.layers[1].unused = nn.Linear(8, 8)
        with pytest.raises(StepError, match=r"layers\.1\.unused: no calibration token reached"):
            walk(model, tokens(), "hessian", lambda *_: None, ignore=["lm_head"], sequential=True)


def test_a_block_computes_in_float32_and_is_given_back_as_it_was_stored() -> None:
    model, _ = twin("mistral")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wide: dict[str, torch.dtype] = {}
    statistics: dict[str, torch.Tensor | None] = {}

    def update(full: str, layer: nn.Linear, x: torch.Tensor | None) -> None:
        wide[full], statistics[full] = layer.weight.dtype, x

    walk(model, tokens(), "x_norm", update, compute=torch.float32, batch_size=4)
    assert set(wide.values()) == {torch.float32} and "lm_head" in wide  # lent like a block
    after = model.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    exact, _ = twin("mistral")
    seen = inputs_of(exact.float(), tokens())
    for key, value in statistics.items():
        torch.testing.assert_close(value, seen[key].norm(dim=0), rtol=2e-2, atol=2e-2)


def test_blocks_get_what_the_unchanged_model_would_make_and_their_own_inputs() -> None:
    model, _ = twin("gemma2", torch.float32)
    outputs: list[torch.Tensor] = []
    _, blocks = decoder_layers(model)
    handles = [block.register_forward_hook(lambda _, args, out: outputs.append(out)) for block in blocks]
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    errors: list[float] = []

    def update(block: Block) -> None:
        torch.testing.assert_close(torch.cat(list(block.targets)), outputs[block.index], rtol=1e-4, atol=1e-4)
        for names in (list(block.layers), list(block.layers)[:1]):
            same = block.run(0, lambda name, x: x @ block.layers[name].weight.t(), names)
            torch.testing.assert_close(same, block.run(0))
            assert not torch.allclose(block.run(0, lambda name, x: x @ -block.layers[name].weight.t(), names), same)
        for name, layer in block.layers.items():
            block.put(name, rtn(layer.weight, bits=2, group_size=32).dequantize())
        errors.append(float((block.run(0) - block.targets[0]).norm() / block.targets[0].norm()))

    walk_blocks(model, tokens(), update, ignore=["lm_head"], targets=True, batch_size=4)
    assert len(errors) == 4 and errors[-1] > errors[0] > 0  # what earlier blocks lost is among the inputs
    untied, _ = twin("mistral")
    with pytest.raises(LlmopsError, match="lm_head stands outside the decoder blocks"):
        walk_blocks(untied, tokens(), update)
    with pytest.raises(LlmopsError, match="no calibration tokens"):
        walk_blocks(untied, tokens(0, 8), update)


def test_a_block_is_prepared_before_it_is_measured_in_the_dtype_it_computes_in() -> None:
    ids = tokens()
    plain = gather(twin("llama")[0], ids, "x_norm", compute=torch.float32)
    order: list[str] = []

    @torch.no_grad()
    def prepare(block: Block) -> None:
        assert all(layer.weight.dtype == torch.float32 for layer in block.layers.values())
        order.append(block.name)
        block.module.input_layernorm.weight *= 2
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.module.self_attn, name).weight /= 2

    got = gather(twin("llama")[0], ids, "x_norm", compute=torch.float32, prepare=prepare)
    for key, value in got.items():
        factor = 2 if key.endswith(("q_proj", "k_proj", "v_proj")) else 1
        torch.testing.assert_close(value, plain[key] * factor, rtol=2e-2, atol=1e-3)
    walk_blocks(twin("llama")[0], ids, lambda block: order.append("updated"), ignore=["lm_head"], prepare=prepare,
                compute=torch.float32)
    names = [f"model.layers.{index}" for index in range(4)]
    assert order == [*names, *(step for name in names for step in (name, "updated"))]


def test_a_walk_without_data_prepares_blocks_that_cannot_be_run() -> None:
    def run(block: Block) -> None:
        block.run()

    with pytest.raises(LlmopsError, match=r"model\.layers\.0: this walk runs no data; expected calibration tokens"):
        gather(twin("llama")[0], None, "none", prepare=run)
    broken, _ = twin("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(StepError, match=r"layers\.1\.mlp\.up_proj: the weight holds NaN"):
        gather(broken, None, "none", prepare=lambda block: None)


def test_a_quantized_model_is_refused_as_that() -> None:
    from llmops.methods.quantize import rtn
    from llmops.models.quantized import pack

    model, _ = twin("llama", torch.float32)
    weights = {name: rtn(layer.weight, bits=4, group_size=32) for name, layer in model.named_modules()
               if isinstance(layer, nn.Linear) and name != "lm_head"}
    with pytest.raises(LlmopsError, match="LlamaForCausalLM: they are quantized already"):
        walk(pack(model, weights), None, "none", lambda *_: None)
