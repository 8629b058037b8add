"""A short command does without plugins and the collector; everything else finds the world as it always is."""

import os
import subprocess
import sys

import pytest


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
