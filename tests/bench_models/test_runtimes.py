"""The graph runtimes against the model they came from: the same greedy tokens, with a cache and without."""

import copy
import json
import types

import numpy as np
import pytest
import torch
from tests.twins import twin
from transformers import DynamicCache

from llmops.bench_models.runtimes import Wanted
from llmops.bench_models.runtimes.graph_loop import GraphRunning, beside, file_in
from llmops.bench_models.runtimes.llama import _file, _Running
from llmops.bench_models.runtimes.onnx import _Graph as OnnxGraph
from llmops.bench_models.runtimes.vino import _Graph as VinoGraph
from llmops.errors import ModelError

PROMPT = torch.tensor([[5, 9, 33, 7], [8, 8, 21, 40]])
NEW = 6


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(twin("llama")[0]).float().eval()


@pytest.fixture(scope="module")
def expected(model):
    """(batch, NEW) greedy tokens by reading the whole text at every step."""
    ids = PROMPT
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, PROMPT.shape[1]:].numpy()


def tokens_of(graph, cached):
    """What is decoded, by noting every answer of the graph on its way."""
    said = []

    def forward(ids, past):
        logits = graph.forward(ids, past)
        said.append(logits.argmax(-1))
        return logits

    timing = GraphRunning(forward, graph.reset, cached).request(PROMPT, NEW)
    assert len(timing.steps_s) == NEW - 1 and timing.decode_s == pytest.approx(sum(timing.steps_s))
    return np.stack(said, axis=1)


def port(name, shape=(), kind="tensor(float)"):
    return types.SimpleNamespace(name=name, shape=list(shape), type=kind, get_names=lambda: {name})


class Session:
    """What ONNX Runtime shows of a graph as optimum exports it, over a torch model."""

    def __init__(self, model, cached):
        config = model.config
        self.model, self.layers, self.cached, self.lengths = model, config.num_hidden_layers, cached, []
        self.shape = ("batch", config.num_key_value_heads, "past", config.head_dim)

    def _names(self, of):
        return [f"{of}.{layer}.{what}" for layer in range(self.layers) for what in ("key", "value")]

    def get_inputs(self):
        more = ["attention_mask", "position_ids"] if self.cached else []
        past = [port(name, self.shape) for name in self._names("past_key_values")] if self.cached else []
        return [port("input_ids"), *map(port, more), *past]

    def get_outputs(self):
        return [port("logits"), *(map(port, self._names("present") if self.cached else []))]

    def run(self, _, feed):
        assert set(feed) == {one.name for one in self.get_inputs()}
        self.lengths.append(feed["input_ids"].shape[1])
        given = {"input_ids": torch.from_numpy(feed["input_ids"])}
        if self.cached:
            cache = DynamicCache()
            for layer in range(self.layers):
                pair = [torch.from_numpy(feed[f"past_key_values.{layer}.{what}"]) for what in ("key", "value")]
                if pair[0].shape[2]:
                    cache.update(*pair, layer)
            given |= {"past_key_values": cache, "use_cache": True} | {
                name: torch.from_numpy(feed[name].copy()) for name in ("attention_mask", "position_ids")}
        with torch.no_grad():
            out = self.model(**given)
        kept = [each.numpy() for layer in out.past_key_values.layers for each in (layer.keys, layer.values)] \
            if self.cached else []
        return [out.logits.numpy(), *kept]


@pytest.mark.parametrize("cached", [True, False])
def test_onnx_decodes_what_the_model_does(model, expected, cached):
    session = Session(model, cached)
    graph = OnnxGraph(session)
    assert graph.cached is cached
    assert (tokens_of(graph, cached) == expected).all()
    assert session.lengths == ([4, 1, 1, 1, 1, 1] if cached else [4, 5, 6, 7, 8, 9])
    assert (tokens_of(graph, cached) == expected).all()  # nothing is left over from the request before


def test_a_graph_that_takes_something_else_is_refused(model):
    session = Session(model, False)
    session.get_inputs = lambda: [port("input_ids"), port("pixel_values")]
    with pytest.raises(ModelError, match="pixel_values; expected input_ids"):
        OnnxGraph(session)


class Compiled:
    """What OpenVINO shows of a model, stateful or not, over a torch model."""

    def __init__(self, model, stateful):
        self.model, self.cache, self.stateful = model, None, stateful
        names = ["input_ids", "attention_mask", "position_ids", "beam_idx"] if stateful else ["input_ids"]
        self.inputs = [port(name) for name in names]

    def create_infer_request(self):
        return self

    def reset_state(self):
        self.cache = None

    def infer(self, feed):
        ids = feed["input_ids"] if self.stateful else feed[0]
        more = {"past_key_values": self.cache, "use_cache": True} if self.stateful else {"use_cache": False}
        if self.stateful:
            assert feed["beam_idx"].tolist() == [0, 1] and feed["attention_mask"].shape[1] == (
                ids.shape[1] + (0 if self.cache is None else self.cache.get_seq_length()))
        with torch.no_grad():
            out = self.model(input_ids=torch.from_numpy(ids), **more)
        self.cache = out.past_key_values if self.stateful else None
        return [out.logits.numpy()]


@pytest.mark.parametrize("stateful", [True, False])
def test_openvino_decodes_what_the_model_does(model, expected, stateful):
    graph = VinoGraph(Compiled(model, stateful))
    assert graph.cached is stateful
    assert (tokens_of(graph, stateful) == expected).all() and (tokens_of(graph, stateful) == expected).all()


def test_llama_cpp_is_driven_token_by_token(model, expected):
    """The loop over an object with the interface of `llama_cpp.Llama`; the package itself is not needed."""
    said = []

    class Llama:
        ids: list[int] = []

        def reset(self):
            self.ids = []

        def eval(self, tokens):
            self.ids = [*self.ids, *tokens]

        def sample(self, temp, repeat_penalty):
            assert temp == 0.0 and repeat_penalty == 1.0
            with torch.no_grad():
                said.append(int(model(input_ids=torch.tensor([self.ids])).logits[0, -1].argmax()))
            return said[-1]

    running = _Running(Llama())
    for _ in range(2):
        del said[:]
        assert len(running.request(PROMPT[:1], NEW).steps_s) == NEW - 1
        assert said == expected[0].tolist()


def test_files_are_found_and_named_where_they_are_not(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"12345")
    assert file_in(str(tmp_path), "model.onnx", "onnxruntime") == tmp_path / "onnx" / "model.onnx"
    with pytest.raises(ModelError, match="runtime openvino needs openvino_model.xml there"):
        file_in(str(tmp_path), "openvino_model.xml", "openvino")
    with pytest.raises(ModelError, match="needs one GGUF file; there is none"):
        _file(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "model": {"vocab": {"a": 0, "b": 1, "c": 3}}, "added_tokens": [{"id": 4, "content": "<end>"}]}))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    assert beside(tmp_path / "onnx" / "model.onnx") == (["a", "b", "", "c", "<end>"], {4}, 77, 5)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["x", -1.0], ["y", -2.0]]}}))
    assert beside(tmp_path / "onnx" / "model.onnx")[0] == ["x", "y"]


@pytest.mark.parametrize("module", ["onnx", "vino"])
def test_graphs_are_driven_on_the_cpu(module):
    pytest.importorskip({"onnx": "onnxruntime", "vino": "openvino"}[module])
    from importlib import import_module

    with pytest.raises(ModelError, match="on the CPU here"):
        import_module(f"llmops.bench_models.runtimes.{module}").open(Wanted("x", "cuda", 1, 8))
