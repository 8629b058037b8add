"""The command line: parse, call, print, exit. Logic lives below.

A command is a function of plain arguments, whose docstring is its help, and an entry in COMMANDS: its name, the
function, what it takes. It returns the exit code, or nothing for 0. Nothing heavy is imported here: each command
imports what it calls, so that `validate` and `plan` answer at once.

Exit codes: 0 done, 1 no variant meets the goals, 2 the recipe or the call is wrong, 3 a step failed (the others went
on), 4 the budget is used up, 130 interrupted (both: what was finished is kept).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops import __version__
from llmops.arguments import JSON, QUIET, RECIPE, RUN, RUNS, SET, STARTS, WIDE
from llmops.bench_commands import COMMANDS as BENCH
from llmops.errors import LlmopsError, unknown
from llmops.formats.options import ABOUT as EXPORTS
from llmops.parser import Command, Program, at_least
from llmops.startup import at_once
from llmops.trust_commands import COMMANDS as TRUST

__all__ = ["COMMANDS", "PROGRAM", "main"]

DOCTOR_WIDTH = 28  # columns for the names of checks
SHELLS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}


def tune(recipe: str, sets: Sequence[str], runs: str | None, as_json: bool, quiet: bool, wide: bool, exclusive: bool,
         green: bool, deadline: str | None, forecast: str | None, lasts: str | None, zone: str | None) -> int:
    """Build, reload and score every variant of RECIPE, and print the table. A second run does no work."""
    from llmops.green import asked
    from llmops.progress import Watcher
    from llmops.runner import run

    wanted = asked(green, deadline, forecast, lasts, zone)
    sets = [*sets, "measure.exclusive=true"] if exclusive else sets
    result = run(_recipe_path(recipe), sets=sets, runs=runs, watcher=Watcher(quiet), green=wanted)
    if as_json:
        _print_json(result.rows)
    else:
        _print_rows(result.rows, wide=wide)
        print(f"report: {_short(result.folder / 'report.html')}\nlog:    {_short(result.folder / 'log.txt')}")
    return result.exit_code


@at_once()
def plan(recipe: str, sets: Sequence[str], runs: str | None, data: bool, as_json: bool) -> None:
    """Print what `tune` would do: the tree, what is done already, and what the rest needs. Loads no model."""
    from llmops.planner import plan as make
    from llmops.recipe.show import render

    planned = make(_recipe_path(recipe), sets=sets, runs=runs)
    if data:
        from llmops.preflight import preflight_report, report_text

        found = preflight_report(planned)
        _print_json(found) if as_json else print(report_text(found))
    elif as_json:
        _print_json(planned.as_json())
    else:
        print(render(planned, colour=sys.stdout.isatty()))


@at_once()
def validate(recipe: str, sets: Sequence[str], as_json: bool) -> None:
    """Check RECIPE: every problem with its line, what was expected, and the nearest match. Loads no model."""
    from llmops.recipe import load_recipe

    parsed = load_recipe(_recipe_path(recipe), sets)
    if as_json:
        _print_json({"valid": True, "name": parsed.name, "variants": list(parsed.variants)})
    else:
        many = len(parsed.variants)
        print(f"{recipe}: valid; {many} variant{'' if many == 1 else 's'}: {', '.join(parsed.variants)}")


@at_once()
def schema(markdown: bool, compatibility: bool) -> None:
    """Print the JSON Schema of recipes, for editors and other tools."""
    if compatibility:
        from llmops.recipe.compatibility import compatibility as table

        print(table(), end="")
    elif markdown:
        from llmops.recipe.reference import markdown as reference

        print(reference(), end="")
    else:
        from llmops.recipe import json_schema

        _print_json(json_schema())


def compare(run: str | None, variants: Sequence[str], against: str | None, runs: str | None, as_json: bool,
            wide: bool) -> None:
    """Print the table of a finished RUN, or chosen VARIANTs side by side with paired differences and intervals."""
    from llmops.compare import compare_run

    rows, shown = compare_run(runs, run, variants, against, as_json=as_json)
    _warn_of_tampering(rows)
    if shown is not None:
        _print_json(shown) if as_json else _console().print(shown)
    else:
        _print_json(rows) if as_json else _print_rows(rows, wide=wide)


def report(run: str | None, runs: str | None) -> None:
    """Write the page of a finished RUN again, and the cards of its variants, from the ledger alone."""
    from llmops.compare import rows_of
    from llmops.runner import publish
    from llmops.store import Store

    store, rows = Store(runs), rows_of(runs, run)
    result = publish(rows[0]["identity"]["run"], store, store.ledger(), [row["identity"]["variant"] for row in rows])
    _warn_of_tampering(result.rows)
    print(_short(result.folder / "report.html"))


def _warn_of_tampering(rows: Sequence[Mapping[str, Any]]) -> None:
    """On standard error, once, where the ledger is not sound; the page says it too."""
    found = [line for row in rows for line in row["verdict"]["warnings"] if "was tampered with" in line]
    for line in dict.fromkeys(found):
        print(f"WARNING: {line}", file=sys.stderr)


def doctor(recipe: str | None, sets: Sequence[str], runs: str | None, as_json: bool) -> int:
    """Look this machine over; with a RECIPE, rehearse all its stages in two steps on a two-layer twin of its model."""
    from llmops.doctor import Check, examine, exit_code, rehearse, render
    from llmops.measure.reserve import reserved

    def say(check: Check) -> None:
        if not as_json:
            print(render([check], colour=sys.stdout.isatty(), width=DOCTOR_WIDTH), flush=True)

    if recipe is None:
        checks = examine(runs, say)
    else:
        with reserved(False, f"rehearsal of {recipe}"):
            checks = rehearse(str(_recipe_path(recipe)), sets, say)
    if as_json:
        _print_json([check.as_dict() for check in checks])
    return exit_code(checks)


@at_once()
def why(recipe: str, variant: str, sets: Sequence[str], runs: str | None, as_json: bool) -> None:
    """Tell why VARIANT would be built again: which part of its key changed since the last build."""
    from llmops.planner import plan as make
    from llmops.recipe.changes import why as explain
    from llmops.store import Store

    planned, store = make(_recipe_path(recipe), sets=sets, runs=runs), Store(runs)
    names = [stage.variant for stage in planned.stages]
    if variant not in names:
        raise LlmopsError(unknown("variant", variant, names))
    rows = store.ledger().history(planned.recipe.name, variant) if (store.runs / "ledger.db").exists() else []
    answer = explain(variant, planned, rows)
    _print_json(answer) if as_json else print("\n".join(answer["lines"]))


def recipes_list(as_json: bool) -> None:
    """The packaged recipes, with what each shows."""
    from llmops.recipes_folder import packaged

    found = [{"name": name, "title": title, "path": str(path)} for name, (title, path) in packaged().items()]
    if as_json:
        _print_json(found)
    else:
        for entry in found:
            print(f"{entry['name']:22} {entry['title']}")


def recipes_copy(name: str, to: str | None, force: bool) -> None:
    """Copy a packaged recipe, to change it."""
    from llmops.recipes_folder import copy

    print(copy(name, Path(to) if to else None, force=force))


def data_show(recipe: str, source: str | None, samples: int, sets: Sequence[str], as_json: bool) -> None:
    """Print rows of DATA as the model sees them, the tokens that carry the loss in colour, and what was left out."""
    from llmops.data_view import data_view

    shown = data_view(_recipe_path(recipe), source, samples, sets, as_json=as_json)
    _print_json(shown) if as_json else _console().print(shown)


def export(variant: str, to: str, kind: str | None, out: str | None, run: str | None, runs: str | None, force: bool,
           as_json: bool) -> None:
    """Write VARIANT in another format, read it back with a foreign reader, and print how far its logits are."""
    from llmops.export import export as write
    from llmops.export import lines
    from llmops.formats.options import with_type
    from llmops.measure.reserve import reserved

    with reserved(False, f"export {variant}"):
        record = write(variant, with_type(to, kind), out=out, run=run, runs=runs, force=force)
    _print_json(record) if as_json else print("\n".join(lines(record)))


def bench_kernels(schemes: Sequence[str], shapes: Sequence[str], tokens: Sequence[int], device: str, kernel: str,
                  as_json: bool) -> None:
    """Time quantized layers beside torch: which op runs which shape here, and how much faster or slower it is."""
    from llmops.bench import bench_kernels as bench
    from llmops.bench import lines
    from llmops.measure.reserve import reserved

    with reserved(False, "bench kernels"):
        results = list(bench(schemes, [_shape(shape) for shape in shapes], tokens, device=device, kernel=kernel))
    _print_json(results) if as_json else print("\n".join(lines(results)))


def _shape(given: str) -> tuple[int, int]:
    sizes = given.split(",")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise LlmopsError(f"shape {given}; expected outputs,inputs as 4096,14336")
    return int(sizes[0]), int(sizes[1])


def completion(shell: str) -> None:
    """Print what makes SHELL (bash, zsh or fish) complete llmops; its first line says where it goes."""
    if shell not in SHELLS:
        raise LlmopsError(unknown("shell", shell, SHELLS))
    from argcomplete.shell_integration import shellcode

    load = "llmops completion fish | source" if shell == "fish" else f'eval "$(llmops completion {shell})"'
    print(f"# completion of llmops: put this line into {SHELLS[shell]}:  {load}")
    print(shellcode(["llmops"], shell=shell))


COMMANDS: dict[str, Command] = {
    "tune": (tune, RECIPE, SET, RUNS, JSON, QUIET, WIDE, *STARTS),
    "plan": (plan, RECIPE, SET, RUNS,
             (("--data",), {"action": "store_true", "help": "Prove the data instead: rows, masks, terminators, "
                                                            "template (reads all of it)."}), JSON),
    "validate": (validate, RECIPE, SET, JSON),
    "schema": (schema, (("--markdown",), {"action": "store_true", "help": "The reference of all options instead."}),
               (("--compatibility",), {"action": "store_true", "help": "The table of which step follows which."})),
    "compare": (compare, RUN,
                (("variants",), {"metavar": "VARIANT", "nargs": "*",
                                 "help": "The variants to hold side by side (default: all)."}),
                (("--against",), {"metavar": "VARIANT", "help": "The variant the others are held against (default: "
                                                                "their parents)."}),
                RUNS, JSON, WIDE),
    "report": (report, RUN, RUNS),
    "doctor": (doctor, (("recipe",), {"metavar": "RECIPE", "nargs": "?", "help": "A recipe to rehearse (default: the "
                                                                              "machine alone)."}), SET, RUNS, JSON),
    "why": (why, RECIPE, (("variant",), {"metavar": "VARIANT", "help": "A variant of the recipe."}), SET, RUNS, JSON),
    "recipes list": (recipes_list, JSON),
    "recipes copy": (recipes_copy, (("name",), {"metavar": "NAME", "help": "Name of a packaged recipe."}),
                     (("to",), {"metavar": "TO", "nargs": "?", "help": "File to write (default: NAME.yaml here)."}),
                     (("--force",), {"action": "store_true", "help": "Write over what is there."})),
    "data show": (data_show, RECIPE,
                  (("source",), {"metavar": "DATA", "nargs": "?", "help": "Name under `data:` (default: the first that "
                                                                          "a step trains on)."}),
                  (("-n", "--samples"), {"metavar": "N", "type": at_least(1), "default": 3,
                                         "help": "How many rows (default: 3)."}), SET, JSON),
    "export": (export, (("variant",), {"metavar": "VARIANT", "help": "A variant of a run, a model folder, or "
                                                                       "builtin:tiny."}),
               (("--to",), {"metavar": "FORMAT", "required": True, "help": "One of " + ", ".join(EXPORTS) + "."}),
               (("--type",), {"metavar": "TYPE", "dest": "kind", "help": "Of gguf: F16, Q8_0, Q4_0, Q4_K, Q4_K_M or "
                                                                         "Q6_K; the same as --to gguf-TYPE."}),
               (("--out",), {"metavar": "DIR", "help": "Folder to write (default: VARIANT-FORMAT here)."}),
               (("--run",), {"metavar": "RUN", "help": "The run that VARIANT is of (default: the latest)."}), RUNS,
               (("--force",), {"action": "store_true", "help": "Write over an export that is there."}), JSON),
    **TRUST,
    **BENCH,
    "bench kernels": (bench_kernels,
                      (("--scheme",), {"dest": "schemes", "metavar": "SCHEME", "action": "append", "default": [],
                                       "help": "w8a16, w4a16, w3a16, w2a16, w8a8, fp8, fp8-block or mxfp4; may be "
                                               "repeated (default: all)."}),
                      (("--shape",), {"dest": "shapes", "metavar": "OUT,IN", "action": "append", "default": [],
                                      "help": "Size of a layer, as 4096,14336; may be repeated."}),
                      (("--tokens",), {"metavar": "M", "type": at_least(1), "action": "append", "default": [],
                                       "help": "Tokens at once; may be repeated."}),
                      (("--device",), {"metavar": "DEVICE", "default": "auto", "help": "auto, cpu or cuda."}),
                      (("--kernel",), {"metavar": "KERNEL", "default": "auto",
                                       "help": "auto, torch, reference, triton or ops, as runtime.kernel."}), JSON),
    "completion": (completion, (("shell",), {"metavar": "SHELL", "help": "bash, zsh or fish."})),
}
GROUPS = {"bench": "Compare models, runtimes and layers on this machine.",
          "recipes": "List and copy the recipes that come with llmops.",
          "data": "Look at data as the model will see it."}
ABOUT = ("One recipe fine-tunes, prunes, quantizes and distills an LLM, reloads every variant from disk, and writes "
         "down what each costs and is worth.")
PROGRAM = Program("llmops", ABOUT, __version__, COMMANDS, GROUPS)


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of the `llmops` command; returns the exit code. words: default, those of the process."""
    if "_ARGCOMPLETE" in os.environ:
        PROGRAM.complete({"recipe": _recipes, "name": _recipes, "shell": lambda **_: SHELLS})
    try:
        code = PROGRAM.run(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
        return code
    except LlmopsError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmops plan recipe.yaml | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _recipes(prefix: str = "", **_: Any) -> list[str]:
    """What a shell offers for a recipe: the packaged names and the YAML files."""
    from argcomplete.completers import FilesCompleter

    from llmops.recipes_folder import packaged

    return [*packaged(), *FilesCompleter(("yaml", "yml"))(prefix)]


def _recipe_path(given: str) -> Path:
    """A file as given, or the packaged recipe of that name."""
    path = Path(given)
    if path.exists():
        return path
    from llmops.recipes_folder import packaged

    found = packaged()
    if given in found:
        return found[given][1]
    raise LlmopsError(f'no recipe file "{given}"; expected a YAML file, or a packaged recipe: '
                      + unknown("recipe", given, found).split("; ", 1)[1])


def _print_rows(rows: list[dict[str, Any]], *, wide: bool) -> None:
    from llmops.report.table import table

    console = _console(400 if wide else 140)
    console.print(table(rows, wide=wide, width=console.width))


def _console(width: int = 160) -> Any:
    """A terminal as wide as it is; anything else `width` columns wide."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def _print_json(body: Any) -> None:
    print(json.dumps(body, indent=1, ensure_ascii=False, sort_keys=False))


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
