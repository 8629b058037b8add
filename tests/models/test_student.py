"""Fresh students, vocabularies that agree, and the attention that a student is held against."""

import pytest
import torch
from tests.twins import tokenizer, twin
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmops.errors import ModelError
from llmops.models.attention_maps import attended
from llmops.models.packed_rows import pack, use_packed_attention
from llmops.models.save import save_dense
from llmops.models.student import agreed_vocabulary, fresh_student


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_fresh_student_is_its_teachers_kin_and_reloads_by_plain_transformers(name, tmp_path):
    teacher, words = twin(name)
    changes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
    student = fresh_student(teacher, changes, seed=3)
    assert type(student) is type(teacher) and student.config.vocab_size == teacher.config.vocab_size
    assert {key: getattr(student.config, key) for key in changes} == changes
    again, other = fresh_student(teacher, changes, seed=3), fresh_student(teacher, changes, seed=4)
    weights = [dict(model.named_parameters())["model.embed_tokens.weight"] for model in (student, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        before = student(input_ids=ids).logits
        save_dense(student, words, tmp_path, torch.float32)
        after = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    assert torch.equal(before, after)


def test_more_layers_go_on_in_their_pattern():
    teacher, _ = twin("gemma3")
    student = fresh_student(teacher, {"num_hidden_layers": 6}, seed=0)
    assert student.config.layer_types == ["sliding_attention", "full_attention"] * 3


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_hiden_layers": 2}, 'did you mean "num_hidden_layers"'), ({"vocab_size": 100}, "expected the teacher's"),
    ({"num_hidden_layers": 0}, "at least 1"), ({"num_attention_heads": 3}, "expected a multiple"),
    ({"hidden_size": "wide"}, "no LlamaForCausalLM can be made so"), ({"hidden_act": "sillu"}, "sillu"),
    ({"hidden_size": 66}, "not a multiple of the number of attention heads"), ({"hidden_size": -4}, "fit together"),
    ({"model_type": "qwen2"}, "own architecture")])
def test_configs_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ModelError, match=said):
        fresh_student(twin("llama")[0], changes, seed=0)


def test_vocabularies_agree_when_every_id_is_the_same_token():
    ours, theirs = tokenizer(), tokenizer()
    known = max(ours.get_vocab().values()) + 1
    assert agreed_vocabulary(ours, theirs, "other") == known
    theirs.add_tokens(["<|more|>"])  # a row that pads ours
    assert agreed_vocabulary(ours, theirs, "other") == known
    with pytest.raises(ModelError, match=r'is "<\|more\|>" to the teacher and is no token to it, and 1 of'):
        agreed_vocabulary(theirs, ours, "other")


def test_another_tokenizer_is_refused_with_the_first_token_that_differs():
    import json

    body = json.loads(tokenizer().backend_tokenizer.to_str())
    vocabulary = body["model"]["vocab"]
    names = {place: token for token, place in vocabulary.items()}
    vocabulary[names[10]], vocabulary[names[11]] = 11, 10
    from tokenizers import Tokenizer

    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(body)))
    with pytest.raises(ModelError, match=f'token 10 is "{names[10]}" to the teacher and is "{names[11]}" to it, and 2'):
        agreed_vocabulary(tokenizer(), swapped, "other")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_the_attention_seen_is_what_transformers_tells(name):
    model, _ = twin(name, dtype=torch.float32)
    rows = [{"input_ids": list(range(5, 45)), "labels": list(range(5, 45))},
            {"input_ids": list(range(9, 20)), "labels": list(range(9, 20))}]
    batch = pack(rows)
    with torch.no_grad():
        with use_packed_attention(model), attended(model) as seen:
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        with use_packed_attention(model):
            plain = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        assert torch.equal(logits, plain)
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        told = [model(input_ids=torch.tensor([row["input_ids"]]), output_attentions=True).attentions for row in rows]
        model.set_attn_implementation(before)
    for layer in range(model.config.num_hidden_layers):
        for row, found in enumerate(seen.maps(layer, batch)):
            torch.testing.assert_close(found.exp(), told[row][layer][0], atol=1e-5, rtol=1e-4)
