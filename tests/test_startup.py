"""A short command does without plugins and the collector; everything else finds the world as it always is."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from llmops.parser import _columns

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def python(script, **environment):
    left = {name: value for name, value in os.environ.items() if name != "PYDANTIC_DISABLE_PLUGINS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**left, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_collector_rests_in_the_block_alone():
    assert python("""
import gc
from llmops.startup import at_once
with at_once():
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count() > 10_000)
gc.disable()
with at_once():
    pass
print(gc.isenabled())""") == ["False", "True", "True", "False"]


def test_an_error_passes_and_the_collector_comes_back():
    assert python("""
import gc
from llmops.startup import at_once
try:
    with at_once():
        raise KeyError
except KeyError:
    print(gc.isenabled())""") == ["True"]


def test_metadata_is_the_real_one_for_whoever_wants_it():
    real, later, through_pydantic, also = python("""
import sys
from llmops.startup import at_once
with at_once():
    import llmops.recipe
    print("importlib.metadata" in sys.modules)
    import importlib.metadata
    print(importlib.metadata.version("pydantic"))
from pydantic.plugin._loader import entry_points
print(type(entry_points(group="console_scripts")).__name__)
import pydantic
print(pydantic.VERSION)""")
    assert (real, later, through_pydantic) == ("False", also, "EntryPoints")


def test_metadata_asked_for_while_its_stand_in_is_there_is_the_real_one():
    assert python("""
import sys
from llmops.startup import _Metadata
sys.modules["importlib.metadata"] = _Metadata("importlib.metadata")
from importlib.metadata import version
print(version("pydantic")[0].isdigit(), type(sys.modules["importlib.metadata"]).__name__)""") == ["True", "module"]


@pytest.mark.parametrize("setting, searched", [(None, "False"), ("__all__", "False"), ("", "True"), ("other", "True")])
def test_a_user_who_wants_plugins_has_them(setting, searched):
    """`importlib.metadata` is imported exactly when plugins are looked for."""
    script = """
import sys
from llmops.startup import at_once
with at_once():
    import llmops.recipe
    print("importlib.metadata" in sys.modules)"""
    assert python(script, **({} if setting is None else {"PYDANTIC_DISABLE_PLUGINS": setting})) == [searched]


def test_patterns_of_libraries_work_when_they_are_used():
    """PyYAML's are compiled late, and find the same: dates, numbers and characters that no YAML holds."""
    script = """
import re, sys
from contextlib import nullcontext
from llmops.startup import at_once
with at_once() if sys.argv[1] == "late" else nullcontext():
    import yaml
    text = "[2001-12-14, 0x1f, 1.5e+3, yes, ~, 12:30, plain]"
    print(type(yaml.resolver.Resolver.yaml_implicit_resolvers["y"][0][1]).__name__)
    print(yaml.load(text, Loader=yaml.SafeLoader) == yaml.load(text, Loader=getattr(yaml, "CSafeLoader")))
    print(repr(yaml.load(text, Loader=yaml.SafeLoader)).replace(" ", ""))
    print(yaml.reader.Reader.NON_PRINTABLE.search("a\\x00").start())
    print(type(re.compile("made-in-the-block")).__name__)"""
    (late, same, values, place, inside), (real, _, real_values, real_place, _) = (
        python(script.replace("sys.argv[1]", repr(how))) for how in ("late", "at once"))
    assert (late, real, inside, same) == ("_Pattern", "Pattern", "Pattern", "True")
    assert (values, place) == (real_values, real_place)


def test_typed_dicts_are_the_real_ones_for_everything_else():
    assert python("""
import typing, typing_extensions
before = typing.TypedDict, typing_extensions.TypedDict
from llmops.startup import at_once
with at_once():
    from pydantic_core import core_schema
    print(core_schema.StringSchema.__base__.__name__)
print((typing.TypedDict, typing_extensions.TypedDict) == before)""") == ["_Plain", "True"]
    assert python("""
from pydantic_core import core_schema
from llmops.startup import at_once
with at_once():
    print(core_schema.StringSchema.__base__.__name__)""") == ["dict"]


def test_a_pydantic_core_that_makes_its_typed_dicts_otherwise_is_imported_as_it_is(tmp_path):
    (tmp_path / "pydantic_core.py").write_text(
        "from typing_extensions import TypedDict\nMade = TypedDict('Made', {'size': int})\nWHO = 'another'\n")
    assert python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from llmops import startup
startup._import_core()
print("pydantic_core" in sys.modules)
import pydantic_core
print(pydantic_core.WHO)""") == ["False", "another"]


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_recipe_makes_the_options_of_its_methods_alone(command, tmp_path):
    """A method more must not make every start longer, nor anything that only some recipes need."""
    made, scores, modules = python(f"""
import contextlib, io, sys
from llmops.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main([{command!r}, {str(QUICKSTART)!r}])
from typing import get_args
from llmops.options import Options
def below(model):
    return {{model}}.union(*map(below, model.__subclasses__()))
models = below(Options)
print(",".join(sorted(get_args(model.model_fields["method"].annotation)[0] for model in models
                      if "method" in model.model_fields)))
print(",".join(sorted(model.__module__.rpartition(".")[2] for model in models
                      if model.__module__.startswith("llmops.evaluate.options."))))
print(",".join({{"shutil", "importlib.metadata", "sqlite3", "llmops.recipe.auto_checks"}} & set(sys.modules)) or "none")
""", LLMOPS_RUNS=str(tmp_path))
    assert made == "depth,full,logits,lora,magnitude,rtn,wanda"
    assert scores == "exact_match,perplexity"
    assert modules == "none"


def test_names_of_methods_import_no_model_and_every_model_is_there():
    assert python("""
import sys
from llmops.evaluate.options import EVALUATIONS
from llmops.recipe.schema import STEPS
from llmops.options import Models
names = [(kind, name) for kind, methods in STEPS.items() for name in methods]
print("gptq" in STEPS["quantize"], "gptq" in STEPS["prune"], len(names) == sum(map(len, STEPS.values())))
print([name for name in sys.modules if ".options." in name and not name.endswith(".shared")])
from typing import get_args
print(all(get_args(STEPS[kind][name].model_fields["method"].annotation) == (name,) for kind, name in names))
print(len(set(EVALUATIONS.values())) == len(EVALUATIONS))
try:
    STEPS["quantize"]["gpqt"]
except KeyError as error:
    print(error)""") == ["True", "False", "True", "[]", "True", "True", "'gpqt'"]


@pytest.mark.parametrize("room", ["methods.quantize", "methods.finetune", "methods.prune", "evaluate"])
def test_every_name_of_a_room_s_options_is_there_and_no_other(room):
    module = import_module(f"llmops.{room}.options")
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(module._HOMES) <= set(module.__all__)
    with pytest.raises(AttributeError, match="Nobody"):
        module.Nobody  # noqa: B018


@pytest.mark.parametrize("columns", ["44", "0", "-3", "wide", None])
def test_help_is_as_wide_as_shutil_finds_the_terminal(columns, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert _columns() == shutil.get_terminal_size().columns
