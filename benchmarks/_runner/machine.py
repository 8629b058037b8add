"""The record that stands beside every figure: when, on what, with which versions, how busy, by which command."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["about", "command", "cpu_model", "said", "versions_here", "versions_there"]


def about(asked: argparse.Namespace | None = None, packages: Iterable[str] = ("torch",), *, threads: int | None = None,
          named: Mapping[str, str] | None = None, words: list[str] | None = None) -> dict[str, Any]:
    """The record. asked, named, words: see `command`; packages: whose versions belong to it, those that are installed;
    threads: of torch, where it was told."""
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": platform.machine(),
                             "cpus": os.cpu_count(), "cpu_model": cpu_model(), "python": platform.python_version()}
    if threads is not None:
        found["threads"] = threads
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = os.getloadavg()[0]
    return found | {"versions": versions_here(packages), "command": command(asked, named, words)}


def said(record: Mapping[str, Any]) -> str:
    """The record in a line, for the head of what a script prints."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    load = f", load {record['load']:.1f}" if "load" in record else ""
    threads = f", {record['threads']} thread(s)" if "threads" in record else ""
    return (f"{record['date']}, {record['cpus']}-core {record['cpu_model']}{threads}{load}, Python {record['python']}"
            f"{', ' if versions else ''}{versions}")


def cpu_model() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command(asked: argparse.Namespace | None = None, named: Mapping[str, str] | None = None,
            words: list[str] | None = None) -> str:
    """The command that was given, without the places of whoever gave it: a word that is an absolute path, or the value
    of an option that is a Path, reads PATH. named: word -> what to show for it instead; words: instead of sys.argv."""
    script, *rest = words or sys.argv
    places = {str(value) for option in vars(asked).values() for value in _each(option) if isinstance(value, Path)
              } if asked is not None else set()
    named = named or {}

    def shown(word: str) -> str:
        option, equals, value = word.partition("=")
        if equals and option.startswith("-"):
            return f"{option}={shown(value)}"
        return named.get(word) or ("PATH" if word in places or word.startswith(("/", "~")) else word)

    return " ".join([f"python benchmarks/{Path(script).name}", *map(shown, rest)])


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def versions_here(packages: Iterable[str]) -> dict[str, str]:
    """package -> version, of those that are installed; nothing is imported."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


#: module -> package in, package's version by module out, where the module can be found
PROBE = ("import importlib.util as u, importlib.metadata as m, json, sys; "
         "print(json.dumps({n: m.version(p) for n, p in json.loads(sys.argv[1]).items() if u.find_spec(n)}))")


def versions_there(python: str | Path, modules: Mapping[str, str]) -> dict[str, str]:
    """module -> version in another Python, of those that it could import; modules: module -> its package."""
    done = subprocess.run([str(python), "-c", PROBE, json.dumps(dict(modules))], check=True, capture_output=True,
                          text=True)
    return dict(json.loads(done.stdout))
