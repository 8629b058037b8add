"""Recipes that are wrong, one mistake each. `§` stands where the message has to point; it is taken out before reading.

Each message has to name file, line and column, what was given, and what was expected or how it is mended.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.recipe import makers

from llmops.errors import RecipeError
from llmops.recipe import load_recipe, parse_recipe


def variants(*lines: str) -> str:
    """A `variants` section that begins with the sound variant `tuned`."""
    first = "variants:\n  tuned: {finetune: {method: lora, data: train}}"
    return "\n".join([first, *(f"  {line}" for line in lines)])


def tuned(options: str) -> str:
    return f"variants:\n  tuned: {{finetune: {{method: lora, data: train, {options}}}}}"


def data(*lines: str) -> str:
    return "\n".join([makers.HEAD["data"], *(f"  {line}" for line in lines)])


def taught(options: str, before: str = "", place: str = "") -> str:
    """A student of `tuned`; place: marks its `distill`."""
    return variants("half: {from: tuned, prune: {method: depth, layers: 3}}",
                    f"s: {{{before}{place}distill: {{method: logits, teacher: tuned, data: train, {options}}}}}")


Q = "q: {from: tuned, quantize: {method: rtn, scheme: w8a16}}"
HEALED = "h: {from: q, finetune: {method: full, data: train}}"

CASES = [
    # ------------------------------------------------------------------------------------------------- YAML itself
    ("tab", {"data": "data:\n§\ttrain: {source: train.jsonl}"}, ["tab", "spaces"]),
    ("unclosed bracket", {"variants": "variants:\n  tuned: {finetune: {method: lora, data: train}\n§more: 1"},
     ["not YAML", "bracket"]),
    ("bad indent", {"variants": "variants:\n    a: {prune: {method: magnitude}}\n  §b: {prune: {method: magnitude}}"},
     ["not YAML", "indentation"]),
    ("colon in text", {"name": "name: a§: b"}, ["not YAML", "quote text"]),
    ("duplicate key", {"variants": tuned("rank: 8, §rank: 16")}, ['"rank" twice', "remove one"]),
    ("duplicate variant", {"variants": variants("§tuned: {prune: {method: magnitude}}")}, ['"tuned" twice', "3"]),
    ("anchor", {"variants": "variants:\n  a: §&step {prune: {method: magnitude}}"}, ["anchor", "&step", "matrix"]),
    ("tag", {"name": "name: §!!python/object:os.system x"}, ["tag", "quotes"]),
    ("merge key", {"variants": variants("a: {§<<: {from: tuned}, prune: {method: magnitude}}")}, ["merge key", "from"]),
    ("two documents", {"variants": "variants:\n  a: {prune: {method: magnitude}}\n§---\nb: 1"}, ["one document"]),
    ("not a mapping", {key: "" for key in makers.HEAD} | {"name": "§- version"}, ["a list of 1", "expected a mapping"]),
    ("control character", {"name": "name: a§\x07b"}, ["control character", "remove"]),
    ("key is a list", {"variants": "variants:\n  §? [a, b]\n  : {prune: {method: magnitude}}"}, ["as a key", "text"]),
    # --------------------------------------------------------------------------------------------------------- top
    ("no version", {"version": "", "name": "§name: trial"}, ['"version"', "version: 1"]),
    ("version 2", {"version": "version: §2"}, ["given 2", "expected 1"]),
    ("version as text", {"version": "version: §'1'"}, ['given "1"', "expected 1"]),
    ("no name", {"name": "", "version": "§version: 1"}, ['"name"', "name: my-run"]),
    ("name with a slash", {"name": "name: §runs/one"}, ['"runs/one"', '"runs-one"', "folder"]),
    ("name is a number", {"name": "name: §4"}, ["given 4", "quotes"]),
    ("name is reserved", {"name": "name: §con"}, ['"con"', "reserves"]),
    ("negative seed", {"name": "name: trial\nseed: §-1"}, ["-1", "from 0 to"]),
    ("seed as text", {"name": "name: trial\nseed: §one"}, ['"one"', "whole number"]),
    ("unknown section", {"name": "name: trial\n§goal: {}"}, ['"goal"', 'did you mean "goals"']),
    ("no model", {"model": "", "version": "§version: 1"}, ['"model"', "builtin:tiny"]),
    ("model is a number", {"model": "model: §3"}, ["given 3", "hub id"]),
    ("unknown builtin", {"model": "model: §builtin:tinny"}, ['did you mean "builtin:tiny"']),
    ("model folder missing", {"model": "model: §./smal"}, ['"./smal"', "not there", 'did you mean "small"']),
    ("model folder empty", {"model": "model: §bare"}, ["without config.json", "bare"]),
    ("model revision empty", {"model": "model: §org/name@"}, ["after the @", "branch, tag or commit"]),
    ("model key", {"model": "model: {id: small, §revison: main}"}, ['did you mean "revision"']),
    ("revision of a folder", {"model": "model: {id: §small, revision: main}"}, ['"main" of a folder', "remove"]),
    ("trust as text", {"model": "model: {id: small, trust_remote_code: §'yes'}"}, ["true or false", "write true"]),
    ("trust as number", {"model": "model: {id: small, trust_remote_code: §1}"}, ["given 1", "true or false"]),
    ("runtime dtype", {"model": "model: small\nruntime: {dtype: §bf16}"}, ['"bf16"', 'did you mean "bfloat16"']),
    ("runtime device", {"model": "model: small\nruntime: {device: §gpu}"}, ['"gpu"', "cuda:N"]),
    ("runtime threads", {"model": "model: small\nruntime: {threads: §0}"}, ["given 0", "at least 1"]),
    # ----------------------------------------------------------------------------------------------------- secrets
    ("token key", {"model": "model: small\n§hf_token: abc"}, ["names a secret", "environment variable"]),
    ("password inside", {"model": "model: {id: small, §password: swordfish}"}, ["names a secret"]),
    ("secret value", {"model": "model: org/name@§hf_abcdefghijklmnopqrstuv"}, ["looks like a secret", "HF_TOKEN"]),
    ("secret comment", {"model": "model: small  # §ghp_abcdefghij1234567890"}, ["looks like a secret"]),
    ("aws key", {"name": "name: §AKIAIOSFODNN7EXAMPLE"}, ["looks like a secret"]),
    ("openai key", {"name": "name: §sk-abc123def456ghi789"}, ["looks like a secret"]),
    # -------------------------------------------------------------------------------------------------------- data
    ("data missing", {"data": data("more: {source: §trian.jsonl}")},
     ['"trian.jsonl"', "not there", 'did you mean "train.jsonl"']),
    ("data folder missing", {"data": data("more: {source: §data/train.jsonl}")}, ["not there either", "data"]),
    ("data file kind", {"data": data("more: {source: §table.xlsx}")}, ["not read", ".jsonl", "convert"]),
    ("data file empty", {"data": data("more: {source: §empty.jsonl}")}, ["empty file", "at least one row"]),
    ("data builtin", {"data": data("more: {source: §builtin:fact}")}, ['did you mean "builtin:facts"']),
    ("data neither", {"data": data("§more: {samples: 3}")}, ['"source"', '"from"', "one of them is needed"]),
    ("data both", {"data": data("§more: {source: test.jsonl, from: train}")}, ['"source"', '"from"', "not both"]),
    ("data from nowhere", {"data": data("more: {from: §trian}")}, ['"trian"', 'did you mean "train"']),
    ("data circle", {"data": data("a: {from: §b}", "b: {from: a}")}, ["a -> b -> a", "source"]),
    ("data samples", {"data": data("more: {from: train, samples: §0}")}, ["given 0", "at least 1"]),
    ("data split", {"data": data("more: {source: train.jsonl, split: §'train[10'}")}, ["train[10", "train[:90%]"]),
    ("data split empty", {"data": data("more: {source: train.jsonl, split: §'[5:2]'}")}, ["empty range", "below"]),
    ("data split name", {"data": data("more: {source: builtin:facts, split: §tset}")}, ['did you mean "test"']),
    ("data split of a file", {"data": data("more: {source: train.jsonl, split: §test}")}, ["single file", "[:90%]"]),
    ("data column", {"data": data("more: {source: train.jsonl, columns: §{promt: q}}")}, ['did you mean "prompt"']),
    ("data limits", {"data": data("more: {source: train.jsonl, limits: {§dropt: 0.1}}")}, ['did you mean "dropped"']),
    ("data limit", {"data": data("more: {source: train.jsonl, limits: {dropped: §2}}")}, ["given 2", "at most 1"]),
    ("data shuffle", {"data": data("more: {source: train.jsonl, shuffle: §on}")}, ['"on"', "write true"]),
    ("data is a list", {"data": "data: §[train.jsonl]"}, ["a list of 1", "name: source"]),
    ("data name", {"data": data("§my data: {source: train.jsonl}")}, ['"my data"', '"my-data"']),
    # ---------------------------------------------------------------------------------------------------- evaluate
    ("evaluate a mapping", {"evaluate": "evaluate: §{exact_match: {data: test}}"}, ["a mapping", "dash"]),
    ("evaluate two keys", {"evaluate": "evaluate:\n  - §exact_match: {data: test}\n    perplexity: {data: test}"},
     ["2 keys", "new entry with a dash"]),
    ("evaluate metric", {"evaluate": "evaluate:\n  - §perplexty: {data: test}"}, ['did you mean "perplexity"']),
    ("evaluate data", {"evaluate": "evaluate:\n  - exact_match: {data: §tset}"}, ['"tset"', 'did you mean "test"']),
    ("evaluate twice", {"evaluate": "evaluate:\n  - exact_match: {data: test}\n  - §exact_match: {data: test}"},
     ['"exact_match:test" twice', "second name"]),
    ("evaluate no data", {"evaluate": "evaluate:\n  - §exact_match: {}"}, ['missing key "data"', "text"]),
    ("extract broken", {"evaluate": "evaluate:\n  - exact_match: {data: test, extract: §'(a'}"},
     ["not a regular expression", "group"]),
    ("extract no group", {"evaluate": "evaluate:\n  - exact_match: {data: test, extract: §'#+ .*'}"},
     ["group"]),
    ("harness tasks", {"evaluate": "evaluate:\n  - harness: {tasks: §[]}"}, ["empty list", "not empty"]),
    ("harness task", {"evaluate": "evaluate:\n  - harness: {tasks: §arc_easy}"}, ["list of text", "write [arc_easy]"]),
    ("harness include", {"evaluate": "evaluate:\n  - harness: {tasks: [a], include: §tasks}"}, ["no folder", "YAML"]),
    ("stride", {"evaluate": "evaluate:\n  - perplexity: {data: test, context: 64, stride: §128}"}, ["128", "64"]),
    ("choices of facts", {"data": data("facts: builtin:facts"),
                          "evaluate": "evaluate:\n  - multiple_choice: {data: §facts}"}, ["builtin:choices"]),
    # ----------------------------------------------------------------------------------------------------- measure
    ("zone", {"model": "model: small\nmeasure: {zone: §France}"}, ['"France"', "capital letters, as FRA"]),
    ("batch sizes", {"model": "model: small\nmeasure: {batch_sizes: §[1, 0]}"}, ["at least 1", "[1, 0]"]),
    ("batch size text", {"model": "model: small\nmeasure: {batch_sizes: [§x]}"}, ['"x"', "whole number"]),
    ("repeats", {"model": "model: small\nmeasure: {repeats: §1}"}, ["given 1", "at least 2"]),
    ("sensor", {"model": "model: small\nmeasure: {sensor: §rappl}"}, ['did you mean "rapl"']),
    ("declared", {"model": "model: small\n§measure: {sensor: declared}"}, ["needs watts", "watts: 65"]),
    ("watts", {"model": "model: small\n§measure: {watts: 65, sensor: rapl}"}, ["watts", "sensor: declared"]),
    ("context", {"model": "model: small\nmeasure: {prompt_tokens: 500, new_tokens: §100}"}, ["512", "context"]),
    # ---------------------------------------------------------------------------------------------------- variants
    ("no variants", {"variants": "", "version": "§version: 1"}, ['"variants"', "finetune"]),
    ("variants empty", {"variants": "§variants:"}, ["given nothing", "tuned:"]),
    ("variant empty", {"variants": variants("§a: {}")}, ["empty mapping", "one step"]),
    ("variant called base", {"variants": "variants:\n  §base: {prune: {method: magnitude}}"}, ["the model itself"]),
    ("variant called on", {"variants": variants("§on: {prune: {method: magnitude}}")}, ['"on"', '"variant-on"']),
    ("variant called true", {"variants": variants("§true: {prune: {method: magnitude}}")}, ["truth value", "letter"]),
    ("variant with a colon", {"variants": variants('§"a:b": {prune: {method: magnitude}}')}, ['"a:b"', '"a-b"']),
    ("no step", {"variants": variants("§a: {from: tuned}")}, ["no step", "exactly one"]),
    ("two steps", {"variants": variants("a: {prune: {method: magnitude}, §quantize: {method: rtn, scheme: w8a16}}")},
     ["prune and quantize", "from: a"]),
    ("variant key", {"variants": variants("a: {§form: tuned, prune: {method: magnitude}}")}, ['did you mean "from"']),
    ("dangling from", {"variants": variants("a: {from: §tuend, prune: {method: magnitude}}")},
     ['"tuend"', "base, tuned, a", 'did you mean "tuned"']),
    ("from a list", {"variants": variants("a: {from: §[tuned], prune: {method: magnitude}}")},
     ["a list of 1", "name of a variant"]),
    ("score as text", {"variants": variants("a: {score: §never, prune: {method: magnitude}}")}, ["true or false"]),
    ("cycle", {"variants": variants("a: {from: §b, prune: {method: magnitude}}", "b: {from: a, prune: {method: wanda, "
                                    "data: calib}}")}, ["a -> b -> a", "base"]),
    ("from itself", {"variants": variants("a: {from: §a, prune: {method: magnitude}}")}, ["a -> a"]),
    ("method missing", {"variants": variants("a: {§prune: {sparsity: 0.5}}")}, ['missing key "method"', "wanda"]),
    ("method unknown", {"variants": variants("a: {prune: {method: §wandda}}")},
     ["magnitude, wanda, sparsegpt, depth", 'did you mean "wanda"']),
    ("method of another step", {"variants": variants("a: {prune: {method: §rtn}}")}, ["rtn is a method of quantize"]),
    ("step is text", {"variants": variants("a: {prune: §wanda}")}, ['"wanda"', "a mapping with method"]),
    ("option unknown", {"variants": tuned("§rnak: 8")}, ['"rnak"', 'did you mean "rank"']),
    ("option missing", {"variants": variants("a: {§prune: {method: wanda}}")}, ['missing key "data"', "calibration"]),
    ("learning rate word", {"variants": tuned("learning_rate: §fast")}, ['"fast"', "a number"]),
    ("learning rate quoted", {"variants": tuned("learning_rate: §'1e-4'")}, ['"1e-4"', "remove the quotes"]),
    ("learning rate of nothing", {"variants": tuned("learning_rate: §0")}, ["given 0", "above 0", '"auto"']),
    ("learning rate misspelt", {"variants": tuned("learning_rate: §atuo")}, ['did you mean "auto"']),
    ("patience zero", {"variants": tuned("stop: {patience: §0}")}, ["given 0", "at least 1"]),
    ("stop misspelt", {"variants": tuned("stop: {§patiense: 3}")}, ['did you mean "patience"']),
    ("stop data unknown", {"variants": tuned("stop: {data: §tset}")}, ['did you mean "test"']),
    ("stop data trained on", {"variants": tuned("stop: {data: §train}")}, ["training rows themselves", "holdout"]),
    ("optimizer unknown", {"variants": tuned("optimizer: §adam")}, ["adamw_8bit"]),
    ("learning rate nan", {"variants": tuned("learning_rate: §.nan")}, ["nan", "finite"]),
    ("epochs inf", {"variants": tuned("epochs: §.inf")}, ["inf", "finite"]),
    ("rank zero", {"variants": tuned("rank: §0")}, ["given 0", "at least 1"]),
    ("rank with a point", {"variants": tuned("rank: §8.5")}, ["8.5", "whole number"]),
    ("rank true", {"variants": tuned("rank: §true")}, ["given true", "whole number"]),
    ("merge yes", {"variants": tuned("merge: §yes")}, ['"yes"', "write true"]),
    ("targets empty", {"variants": tuned("targets: §[]")}, ["empty list", "all-linear"]),
    ("targets misspelt", {"variants": tuned("targets: [q_proj, §v_porj]")}, ['did you mean "v_proj"']),
    ("schedule", {"variants": tuned("schedule: §cosin")}, ['did you mean "cosine"']),
    ("training data", {"variants": "variants:\n  a: {finetune: {method: lora, data: §trian}}"}, ['mean "train"']),
    ("mixed data", {"variants": "variants:\n  a: {finetune: {method: lora, data: [train, §trian]}}"}, ['mean "train"']),
    ("mixed data twice", {"variants": "variants:\n  a: {finetune: {method: lora, data: [train, §train]}}"},
     ["twice", "samples"]),
    ("mixed data empty", {"variants": "variants:\n  a: {finetune: {method: lora, data: §[]}}"}, ["empty list"]),
    ("stop data among the mixed", {"variants": "variants:\n  a: {finetune: {method: lora, data: [train, test], "
                                               "stop: {data: §test}}}"}, ["training rows themselves"]),
    ("sparsity 1", {"variants": variants("a: {prune: {method: magnitude, sparsity: §1.0}}")}, ["1.0", "below 1"]),
    ("pattern", {"variants": variants("a: {prune: {method: magnitude, pattern: §2:5}}")}, ['"2:5"', "2:4"]),
    ("pattern and sparsity", {"variants": variants("a: {prune: {method: magnitude, sparsity: §0.6, pattern: 2:4}}")},
     ["0.6", "0.5", "2:4"]),
    ("sparsity of one", {"variants": variants("a: {prune: {method: sparsegpt, sparsity: §1.0, data: calib}}")},
     ["given 1.0", "below 1"]),
    ("sparsity of none", {"variants": variants("a: {prune: {method: wanda, sparsity: §0, data: calib}}")},
     ["given 0", "above 0"]),
    ("pattern and scope", {"variants": variants("a: {prune: {method: magnitude, pattern: 2:4, scope: §global}}")},
     ["given global with pattern 2:4", "scope: layer"]),
    ("pattern and ratios", {"variants": variants(
        "a: {prune: {method: wanda, pattern: 4:8, ratios: §owl, data: calib}}")},
     ["given owl with pattern 4:8", "ratios: uniform"]),
    ("reach without ratios", {"variants": variants("a: {prune: {method: wanda, §reach: 0.1, data: calib}}")},
     ["given reach with ratios: uniform", "owl or sensitivity"]),
    ("no size", {"variants": variants("a: {§prune: {method: depth}}")}, ["given no target", "parameters: 0.7"]),
    ("two sizes", {"variants": variants("a: {prune: {method: depth, layers: 3, §latency: 0.7}}")},
     ["given layers, latency", "expected one"]),
    ("share of all", {"variants": variants("a: {prune: {method: width, data: calib, parameters: §1.0x}}")},
     ["1.0x", "below 1"]),
    ("share that no shape has", {"variants": variants("a: {prune: {method: width, data: calib, parameters: §0.01}}")},
     ["given 0.01; the smallest shape that is searched", "about 0.", "larger share"]),
    ("share that no layer has", {"variants": variants("a: {prune: {method: depth, parameters: §0.05}}")},
     ["given 0.05; one layer and what is around it has about 0.", "larger share"]),
    ("every weight of a row", {"variants": variants("a: {prune: {method: wanda, data: calib, sparsity: §0.999}}")},
     ["given 0.999, which of the 128 inputs of a row is all of them", "at most 0.992"]),
    *((f"hardly a weight a row of {inputs} by {given.split(',')[0]}",
       {"variants": variants(f"a: {{prune: {{method: {given}}}}}")},
       [f"which leaves {left} weights to each row of {inputs} inputs", f"at the very most {most}"])
      for given, left, inputs, most in (
          ("magnitude, sparsity: §0.997", 0.38, 128, 0.9929),
          ("sparsegpt, data: calib, sparsity: §0.997", 0.38, 128, 0.9929),
          ("magnitude, scope: global, sparsity: §0.998", 0.77, 384, 0.9976))),
    ("share as text", {"variants": variants("a: {prune: {method: width, data: calib, parameters: §half}}")}, ["half"]),
    ("contiguous and even", {"variants": variants("a: {prune: {method: depth, layers: 3, §contiguous: true}}")},
     ["given contiguous with choose: even", "block_influence or perplexity"]),
    ("wider than it is", {"variants": variants("a: {prune: {method: width, data: calib, hidden: §512}}")},
     ["given 512", "1 to 128"]),
    ("fewer heads than groups", {"variants": variants("a: {prune: {method: width, data: calib, heads: §1}}")},
     ["given 1 heads in 2 KV groups", "at least one head a group"]),
    ("heads and groups", {"variants": variants("a: {prune: {method: width, data: calib, heads: §3}}")},
     ["given 3 heads in 2 KV groups", "multiple of 2"]),
    ("too many heads a group", {"variants": variants("a: {prune: {method: width, data: calib, kv_heads: §1}}")},
     ["given 4 heads in 1 KV groups, 4 each", "at most 2 each"]),
    ("hidden that heads do not divide",
     {"variants": variants("a: {prune: {method: width, data: calib, hidden: §110}}")},
     ["given 110 hidden features with 4 heads", "108 or 112"]),
    ("multiples of too much", {"variants": variants(
        "a: {prune: {method: width, data: calib, parameters: §0.7, multiple: 1000}}")}, ["in multiples of 1000"]),
    ("a workload that is not measured", {"variants": variants("a: {prune: {method: depth, layers: 3, §repeats: 9}}")},
     ["given repeats with a target that is not measured", "no repeats"]),
    ("a workload beyond the context", {"variants": variants(
        "a: {prune: {method: depth, latency: 0.5, prompt_tokens: §500}}")}, ["532 together", "at most the 512"]),
    ("axes of a shape", {"variants": variants(
        "a: {prune: {method: width, data: calib, hidden: 64, §axes: [hidden]}}")},
     ["given axes", "nothing to search"]),
    ("groups after a narrow parent", {"variants": variants(
        "a: {prune: {method: width, data: calib, hidden: 96}}",
        "b: {from: a, quantize: {method: rtn, scheme: w4a16, group_size: §128}}")},
     ["given 128", "96 inputs"]),
    ("more layers than a short parent has", {"variants": variants(
        "a: {prune: {method: depth, layers: 2}}",
        "b: {from: a, prune: {method: depth, layers: §3, choose: perplexity, data: calib}}")}, ["from 1 to 1"]),
    ("layers of a parent of one", {"variants": variants(
        "a: {prune: {method: depth, layers: 1}}",
        "b: {from: a, prune: {method: §depth, layers: 1}}")}, ["a parent of one layer"]),
    ("sparsegpt on integers", {"variants": variants(
        Q, "a: {from: §q, prune: {method: sparsegpt, data: calib}}")}, ["a quantized variant", "quantize the result"]),
    ("depth too many", {"variants": variants("a: {prune: {method: depth, layers: §7}}")}, ["given 7", "from 1 to 5"]),
    ("depth zero", {"variants": variants("a: {prune: {method: depth, layers: §0}}")}, ["given 0", "from 1 to 5"]),
    ("depth of all", {"variants": variants("a: {prune: {method: depth, layers: §6}}")}, ["6 of the 6 layers", "fewer"]),
    ("depth of all, by name", {"variants": variants("a: {prune: {method: depth, layers: §[0, 1, 2, 3, 4, 5]}}")},
     ["all of the 6 layers", "leaves none out"]),
    ("width of all", {"variants": variants("a: {prune: {method: width, data: calib, §hidden: 128, kv_heads: 2}}")},
     ["hidden 128, kv_heads 2", "nothing would be cut"]),
    ("less than a weight of a row", {"variants": variants("a: {prune: {method: wanda, data: calib, sparsity: §1e-5}}")},
     ["of the 384 inputs", "at least 0.0026"]),
    ("depth twice as many", {"variants": variants("a: {prune: {method: depth, layers: 3}}",
                                                  "b: {from: a, prune: {method: depth, layers: §4}}")}, ["1 to 2"]),
    ("depth out of range", {"variants": variants("a: {prune: {method: depth, layers: [0, §6]}}")}, ["from 0 to 5"]),
    ("depth duplicate", {"variants": variants("a: {prune: {method: depth, layers: [0, 2, §2]}}")}, ["2 twice"]),
    ("depth order", {"variants": variants("a: {prune: {method: depth, layers: [3, §1]}}")}, ["1 after 3", "[1, 3]"]),
    ("depth text", {"variants": variants("a: {prune: {method: depth, layers: §half}}")}, ['"half"', "whole numbers"]),
    ("influence without data",
     {"variants": variants("a: {§prune: {method: depth, layers: 3, choose: block_influence}}")},
     ["without data", "data: calib"]),
    ("data without influence", {"variants": variants("a: {prune: {method: depth, layers: 3, §data: calib}}")},
     ["reads none", "block_influence"]),
    ("scheme", {"variants": variants("a: {quantize: {method: rtn, scheme: §w4a61}}")}, ['did you mean "w4a16"']),
    ("group size", {"variants": variants("a: {quantize: {method: rtn, scheme: w4a16, group_size: §96}}")},
     ["96", "takes 128 inputs", "128"]),
    ("group size 0", {"variants": variants("a: {quantize: {method: rtn, scheme: w4a16, group_size: §0}}")}, ["-1"]),
    ("ignore misspelt", {"variants": variants("a: {quantize: {method: rtn, scheme: w4a16, ignore: [§down_prj]}}")},
     ['did you mean "down_proj"']),
    ("four bits after quantized", {"variants": variants(Q, "a: {from: §q, finetune: {method: qlora, data: train}}")},
     ["quantized variant", "merge: false", 'method: qlora from "tuned"']),
    ("pairs after quantized", {"variants": variants(
        Q, "a: {from: q, finetune: {method: dpo, data: train, dropout: §0.1}}")},
     ["0.1", "weights are integers", "merge: false"]),
    ("pruned after healed", {"variants": variants(Q, HEALED, "a: {from: §h, prune: {method: sparsegpt, data: calib}}")},
     ['given "h", a quantized variant', 'prune from "tuned" and quantize the result']),
    ("quantized after healed", {"variants": variants(
        Q, HEALED, "a: {from: §h, quantize: {method: rtn, scheme: w4a16}}")},
     ["quantized already", 'start from "tuned", as "q" does']),
    ("trained in floats", {"variants": variants("q: {from: tuned, quantize: {method: rtn, scheme: fp8}}",
                           "a: {from: §q, finetune: {method: full, data: train}}")},
     ['"q", in fp8, whose rounding cannot be trained', 'train "tuned" and quantize the result']),
    ("dora after quantized", {"variants": variants(
        Q, "a: {from: q, finetune: {method: lora, data: train, merge: false, dora: §true}}")},
     ['after "q"', "merge: true, or rslora"]),
    ("dropout after quantized", {"variants": variants(
        Q, "a: {from: q, finetune: {method: lora, data: train, dropout: §0.1}}")},
     ['after "q"', "expected 0, or merge"]),
    ("pissa apart after quantized", {"variants": variants(
        Q, "a: {from: q, finetune: {method: lora, data: train, merge: false, init: §pissa}}")},
     ['after "q"', "init: default, or merge: true"]),
    ("adapter apart on quantized zeros", {"variants": variants(
        "p: {prune: {method: magnitude}}", "q: {from: p, quantize: {method: rtn, scheme: w8a16}}",
        "a: {from: q, finetune: {method: lora, data: train, merge: §false}}")}, ['after "p"', "merge: true"]),
    ("loftq without qlora", {"variants": tuned("init: §loftq")}, ["not rounded", "method: qlora"]),
    ("init unknown", {"variants": tuned("init: §pisa")}, ['did you mean "pissa"']),
    ("loftq turns alone", {"variants": variants("a: {finetune: {method: qlora, data: train, §loftq_iterations: 3}}")},
     ["init: default", "init: loftq"]),
    ("quant unknown", {"variants": variants("a: {finetune: {method: qlora, data: train, quant: §nf5}}")},
     ['did you mean "nf4"']),
    ("qlora merge", {"variants": variants("a: {finetune: {method: qlora, data: train, merge: §true}}")},
     ["given true", "dequantized, original, apart"]),
    ("lora plus", {"variants": tuned("lora_plus_ratio: §-1")}, ["-1", "at least 0"]),
    ("pissa rank", {"variants": tuned("init: pissa, rank: §65")}, ["given 65", "at most 64"]),
    ("qlora on zeros", {"variants": variants("p: {prune: {method: magnitude}}",
                        "a: {from: p, finetune: {method: §qlora, data: train}}")},
     ['after "p"', "method: lora, and quantize the result"]),
    ("dora on zeros", {"variants": variants("p: {prune: {method: wanda, data: calib}}",
                       "h: {from: p, finetune: {method: full, data: train}}",
                       "a: {from: h, finetune: {method: lora, data: train, dora: §true}}")}, ['after "p"', "rslora"]),
    ("adapter apart on zeros", {"variants": variants("p: {prune: {method: magnitude}}",
                                "a: {from: p, finetune: {method: lora, data: train, merge: §false}}")},
     ['after "p"', "merge: true"]),
    ("pair adapter apart on zeros", {"variants": variants("p: {prune: {method: magnitude}}",
                                     "a: {from: p, finetune: {method: dpo, data: train, merge: §false}}")},
     ['after "p"', "merge: true"]),
    ("pissa on zeros", {"variants": variants("p: {prune: {method: magnitude}}",
                        "a: {from: p, finetune: {method: lora, data: train, init: §pissa}}")},
     ['after "p"', "init: default"]),
    ("quantized twice", {"variants": variants("q: {from: tuned, quantize: {method: rtn, scheme: w8a16}}",
                         "a: {from: §q, quantize: {method: rtn, scheme: w4a16}}")},
     ["quantized already", 'start from "tuned"']),
    ("quantized base", {"model": "model: packed", "variants": "variants:\n  §tuned: {prune: {method: magnitude}}"},
     ["quantization_config", "the model it was made of"]),
    ("quantized base trained", {"model": "model: packed",
                                "variants": "variants:\n  §tuned: {finetune: {method: lora, data: train}}"},
     ["quantization_config", "the model it was made of"]),
    ("teacher is the student", {"variants": variants("a: {distill: {method: logits, teacher: §a, data: train}}")},
     ["the student itself", "another variant"]),
    ("teacher is the parent",
     {"variants": variants("a: {from: tuned, distill: {method: logits, teacher: §tuned, data: train}}")},
     ["the very weights", "hard_weight"]),
    ("teacher unknown", {"variants": variants("a: {distill: {method: logits, teacher: §tund, data: train}}")},
     ['did you mean "tuned"']),
    ("teacher circle", {"variants": variants("a: {distill: {method: logits, teacher: §b, data: train}}",
                                             "b: {from: a, prune: {method: magnitude}}")}, ["a -> b -> a"]),
    # ---------------------------------------------------------------------------------------------- distillation
    ("student with a parent", {"variants": taught("student: {config: {hidden_size: 64}}", "from: §half, ")},
     ["takes none of those", "no `from`"]),
    ("student of both kinds", {"variants": taught("student: §{config: {hidden_size: 64}, model: small}")},
     ["both of config and model", "expected one"]),
    ("student of neither kind", {"variants": taught("student: §{}")}, ["neither of config and model"]),
    ("student key", {"variants": taught("student: {config: {§num_hiden_layers: 2}}")},
     ['did you mean "num_hidden_layers"']),
    ("student vocabulary", {"variants": taught("student: {config: {vocab_size: §500}}")}, ["expected 1000"]),
    ("student layers", {"variants": taught("student: {config: {num_hidden_layers: §0}}")}, ["at least 1"]),
    ("student heads", {"variants": taught("student: {§config: {num_attention_heads: 3}}")},
     ["3 attention heads for 2", "a multiple"]),
    ("student size", {"variants": taught("student: {config: {hidden_size: §wide}}")}, ['"wide"', "whole number"]),
    ("student hidden size", {"variants": taught("student: {§config: {hidden_size: 66}}")},
     ["66 with 4 attention heads", "multiple of 4"]),
    ("student odd heads", {"variants": taught("student: {§config: {head_dim: 63}}")}, ["even head_dim"]),
    ("student architecture", {"variants": taught("student: {config: {§model_type: qwen2}}")},
     ["own architecture", "name a `model`"]),
    ("student model", {"variants": taught("student: {model: §./smal}")}, ["not there", 'did you mean "small"']),
    ("student folder", {"variants": taught("student: {model: §bare}")}, ["without config.json"]),
    ("student builtin", {"variants": taught("student: {model: §builtin:tinny}")}, ['did you mean "builtin:tiny"']),
    ("student revision", {"variants": taught("student: §{config: {hidden_size: 64}, revision: main}")},
     ["revision without a model"]),
    ("loss unknown", {"variants": taught("loss: §foward_kl", "from: half, ")}, ['did you mean "forward_kl"']),
    ("beta without its loss", {"variants": taught("beta: 0.2", "from: half, ", "§")}, ["loss: jensen_shannon"]),
    ("beta at its end", {"variants": taught("loss: jensen_shannon, beta: §1.0", "from: half, ")}, ["below 1"]),
    ("skew without its loss", {"variants": taught("skew: 0.2", "from: half, ", "§")}, ["skewed_reverse_kl"]),
    ("top k of too few", {"variants": taught("top_k: §2000", "from: half, ")}, ["vocabulary of 1,000"]),
    ("offline k of too few", {"variants": taught("offline: {k: §2000}", "from: half, ")}, ["vocabulary of 1,000"]),
    ("offline without signals", {"variants": taught("offline: {cache: §nowhere}", "from: half, ")},
     ["no finished signals", "no `cache`"]),
    ("offline and on-policy", {"variants": taught("offline: {}, on_policy: {}", "from: half, ", "§")},
     ["nobody can know beforehand", "one of the two"]),
    ("offline with states", {"variants": taught("offline: {}, hidden_weight: 1.0", "from: half, ", "§")},
     ["not its states", "no hidden_weight"]),
    ("offline with top k", {"variants": taught("offline: {}, top_k: 8", "from: half, ", "§")}, ["{k: 8} alone"]),
    ("fraction of none", {"variants": taught("on_policy: {fraction: §0.0}", "from: half, ")}, ["above 0"]),
    ("written by nobody", {"data": data("w: {synthesize: {teacher: §tund, prompts: train}}")},
     ['did you mean "tuned"']),
    ("written of nothing", {"data": data("w: {synthesize: {teacher: tuned, prompts: §trian}}")},
     ['did you mean "train"']),
    ("written in a circle", {"data": data("w: {synthesize: {teacher: tuned, prompts: §w}}")}, ["w -> w"]),
    ("written by its own student", {"data": data("w: {synthesize: {teacher: a, prompts: train}}"),
                                    "variants": variants("a: {finetune: {method: lora, data: §w}}")}, ["a -> a"]),
    ("scored against a teacher", {"data": data("w: {synthesize: {teacher: tuned, prompts: train}}"),
                                  "evaluate": "evaluate:\n  - exact_match: {data: §w}"}, ["which tuned writes"]),
    ("many answers and one greedy", {"data": data("w: {synthesize: §{teacher: tuned, prompts: train, answers: 3}}")},
     ["all the same", "temperature"]),
    ("shorter than the shortest",
     {"data": data("w: {synthesize: §{teacher: tuned, prompts: train, min_tokens: 9, max_new_tokens: 8}}")},
     ["min_tokens 9 above max_new_tokens 8"]),
    ("written and a file", {"data": data("§w: {source: train.jsonl, synthesize: {teacher: tuned, prompts: train}}")},
     ["not both"]),
    # ------------------------------------------------------------------------------------------------------ matrix
    ("matrix is a list", {"variants": variants("a: {prune: {method: magnitude}, §matrix: [1]}")}, ["option: list"]),
    ("matrix value", {"variants": variants("a: {prune: {method: magnitude}, matrix: {sparsity: §0.5}}")}, ["[0.5]"]),
    ("matrix option", {"variants": variants("a: {prune: {method: magnitude}, matrix: {§sparsty: [0.5]}}")},
     ['did you mean "sparsity"']),
    ("matrix entry", {"variants": variants("a: {prune: {method: magnitude}, matrix: {sparsity: [0.5, §1.5]}}")},
     ["1.5", "below 1"]),
    ("matrix twice", {"variants": variants("a: {prune: {method: magnitude, sparsity: 0.3}, matrix: {§sparsity: [1]}}")},
     ["outside the matrix"]),
    ("matrix same", {"variants": variants("a: {prune: {method: magnitude}, matrix: {sparsity: §[0.5, 0.5]}}")},
     ["same value twice"]),
    ("matrix name", {"variants": variants("a: {quantize: {method: rtn}, matrix: {scheme: [w8a16, w4a16]}}",
                                          "b: {from: §a, prune: {method: magnitude}}")}, ["a-w8a16, a-w4a16"]),
    ("matrix collision", {"variants": variants("a-0.5: {prune: {method: magnitude}}",
                          "a: {prune: {method: magnitude}, §matrix: {sparsity: [0.5]}}")}, ['"a-0.5"', "rename"]),
    # ------------------------------------------------------------------------------------------------------- goals
    ("goal unknown", {"name": "name: trial\ngoals: {§exact_mach: {min: 0.5}}"},
     ["exact_match:test", 'did you mean "exact_match"']),
    ("goal on no score", {"name": "name: trial\ngoals: {§perplexity: {max: 9}}"}, ["nothing scores", "exact_match:"]),
    ("goal against", {"name": "name: trial\ngoals: {exact_match: {max_drop: 0.1, against: §tund}}"}, ['mean "tuned"']),
    ("goal empty", {"name": "name: trial\ngoals: {§exact_match: {}}"}, ["without a bound", "max_drop"]),
    ("goal key", {"name": "name: trial\ngoals: {exact_match: {§max_dorp: 0.1}}"}, ['did you mean "max_drop"']),
    ("goal negative", {"name": "name: trial\ngoals: {exact_match: {max_drop: §-0.1}}"}, ["-0.1", "at least 0"]),
    ("goal against nothing", {"name": "name: trial\ngoals: {exact_match: {min: 0.1, §against: tuned}}"}, ["max_ratio"]),
    ("goal min above max", {"name": "name: trial\ngoals: {exact_match: {min: §2, max: 1}}"}, ["above max"]),
    ("goal shared name", {"name": "name: trial\ngoals: {§exact_match: {min: 0.5}}",
                          "evaluate": "evaluate:\n  - exact_match: {data: test}\n  - exact_match: {data: train}"},
     ["exact_match:test, exact_match:train"]),
    ("goal not scored", {"name": "name: trial\ngoals: {exact_match: {max_drop: 0.1, against: §tuned}}",
                         "variants": "variants:\n  tuned: {score: false, prune: {method: magnitude}}"}, ["score: f"]),
    ("goal noninferior of nothing", {"name": "name: trial\ngoals: {exact_match: {noninferior: §0}}"},
     ["above 0"]),
    ("goal noninferior of all", {"name": "name: trial\ngoals: {exact_match: {noninferior: §2}}"}, ["share below 1"]),
    ("goal noninferior of a cost", {"name": "name: trial\ngoals: {disk_bytes: {noninferior: §0.1}}"},
     ["of a score", "max_ratio"]),
    ("goal gap without groups", {"name": "name: trial\ngoals: {exact_match: {max_gap: §0.1}}"},
     ["no groups", "slices"]),
    ("slice unknown", {"evaluate": "evaluate:\n  - exact_match: {data: test, slices: §[promt]}"},
     ['"test" does not have', "prompt, completion", 'did you mean "prompt"']),
    ("slice of builtin", {"evaluate": "evaluate:\n  - exact_match: {data: facts, slices: §[atribute]}",
                          "data": data("facts: {source: builtin:facts}")}, ['did you mean "attribute"']),
    ("slice twice", {"evaluate": "evaluate:\n  - exact_match: {data: test, slices: §[prompt, prompt]}"},
     ["each column"]),
    ("slice of a perplexity", {"evaluate": "evaluate:\n  - perplexity: {data: test, slices: §[promt]}"},
     ["does not have", "prompt, completion"]),
    ("card key", {"name": "name: trial\ncard: {§intended: chat}"}, ['did you mean "intended_use"']),
    ("card of nothing", {"name": "name: trial\ncard: {intended_use: §''}"}, ["not empty"]),
    ("card licence", {"name": "name: trial\ncard: {license: §MIT or so}"}, ["license"]),
    ("card limits", {"name": "name: trial\ncard: {limitations: §none}"}, ["list"]),
    ("cluster unknown", {"evaluate": "evaluate:\n  - exact_match: {data: test, cluster: §document}"},
     ["does not have", "prompt, completion"]),
    ("prefer unknown", {"name": "name: trial\ngoals: {prefer: §joule_per_token}"}, ['did you mean "joules_per_token"']),
]


@pytest.mark.parametrize(("sections", "phrases"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_recipe_is_refused_at_its_place(sections: dict[str, str], phrases: list[str], tmp_path: Path) -> None:
    marked = makers.text(**sections)
    before, _, _ = marked.partition("§")
    place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
    file = makers.folder(tmp_path) / "recipe.yaml"
    file.write_text(marked.replace("§", ""))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert len(caught.value.problems) == 1, message
    assert message.startswith(f"{file}:{place}: "), message
    for phrase in phrases:
        assert phrase in message, message
    cures = ("expected", "cure: ", "did you mean", "need", "not both", "at least", "only")
    assert any(word in message for word in cures), message


def test_there_are_enough_cases_and_no_name_twice() -> None:
    names = [case[0] for case in CASES]
    assert len(names) == len(set(names)) >= 60


def test_every_problem_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    makers.folder(tmp_path)
    wrong = makers.text(version="version: 3", name="name: a b", data="data:\n  train: {source: trian.jsonl}",
                        variants="variants:\n  a: {from: b, prune: {method: magnitude, sparsty: 1}}\n  c: {}")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(wrong, file="r.yaml", base_dir=tmp_path)
    lines = [int(problem.split(":")[1]) for problem in caught.value.problems]
    assert lines == sorted(lines)
    assert lines == [1, 2, 5, 7, 9, 9, 10], caught.value.problems


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnop", "sk-proj-abcdefghij0123456789", "ghp_abcdefghij0123456789",
                                    "AKIAIOSFODNN7EXAMPLE", "swordfish-1234"])
def test_a_secret_is_never_repeated(secret: str, tmp_path: Path) -> None:
    makers.folder(tmp_path)
    for wrong in (makers.text(model=f"model: small\napi_key: {secret}"),
                  makers.text(model=f"model: {{id: small, token: {secret}}}")):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(wrong, file="r.yaml", base_dir=tmp_path)
        assert secret not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(makers.text(), file="r.yaml", base_dir=tmp_path, sets=[f"runtime.api_key={secret}"])
    assert secret not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"version": 1, "name": "x", "model": {"id": "small", "secret": secret}}, base_dir=tmp_path)
    assert secret not in str(caught.value)


@pytest.mark.parametrize("layers", ["0.5", "true"])
def test_no_list_is_advised_of_what_no_list_holds(layers: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"given {layers}; expected a whole number or a list") as caught:
        parse_recipe(makers.text(variants=variants(f"a: {{prune: {{method: depth, layers: {layers}}}}}")),
                     base_dir=makers.folder(tmp_path))
    assert "write [" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"version: 1\nname: \xff\n")
    with pytest.raises(RecipeError, match=r'recipe.yml: given a recipe that is not there.*did you mean "recipe.yaml"'):
        load_recipe(tmp_path / "recipe.yml")
    with pytest.raises(RecipeError, match=r"recipe.yaml:2:7: given a byte that is not UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="given nothing at the top"):
        parse_recipe("# only a comment\n")


def test_a_recipe_nested_too_deeply_is_refused() -> None:
    with pytest.raises(RecipeError, match="deep"):
        parse_recipe("a: " + "[" * 200 + "]" * 200)
