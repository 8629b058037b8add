"""The command line: parse, call, print, exit. Logic lives below.

Exit codes: 0 done, 1 no variant meets the goals, 2 the recipe or the call is wrong, 3 a step failed (the others went
on), 130 interrupted (what was finished is kept).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmops import __version__
from llmops.errors import LlmopsError, unknown

__all__ = ["app", "main"]


class _Guarded(TyperGroup):
    """Errors of ours are printed without a traceback; an interrupt keeps the state and says so."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlmopsError as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="llmops", cls=_Guarded, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One recipe fine-tunes, prunes, quantizes and distills an LLM, reloads every variant from disk, and writes "
         "down what each costs and is worth.")
recipes_app = typer.Typer(no_args_is_help=True, help="List and copy the recipes that come with llmops.")
data_app = typer.Typer(no_args_is_help=True, help="Look at data as the model will see it.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a packaged one.")]
SetOption = Annotated[list[str] | None, typer.Option(
    "--set", metavar="PATH=VALUE", help="Override a value, as variants.tuned.finetune.rank=8; may be repeated.")]
RunsOption = Annotated[str | None, typer.Option("--runs", metavar="DIR", envvar="LLMOPS_RUNS",
                                                help="Where runs lie (default: runs).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
WideOption = Annotated[bool, typer.Option("--wide", help="Every column.")]
RunArgument = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Name of a run (default: the latest).")]


def _version(asked: bool) -> None:
    if asked:
        print(f"llmops {__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version and exit.")] = False) -> None:
    pass


@app.command()
def tune(recipe: RecipeArgument, sets: SetOption = None, runs: RunsOption = None, as_json: JsonOption = False,
         quiet: QuietOption = False, wide: WideOption = False) -> None:
    """Build, reload and score every variant of RECIPE, and print the table. A second run does no work."""
    from llmops.progress import Watcher
    from llmops.runner import run

    result = run(_recipe_path(recipe), sets=sets or (), runs=runs, watcher=Watcher(quiet))
    if as_json:
        _print_json(result.rows)
    else:
        _print_rows(result.rows, wide=wide)
        print(f"report: {_short(result.folder / 'report.html')}\nlog:    {_short(result.folder / 'log.txt')}")
    raise typer.Exit(result.exit_code)


@app.command()
def plan(recipe: RecipeArgument, sets: SetOption = None, runs: RunsOption = None, as_json: JsonOption = False) -> None:
    """Print what `tune` would do: the tree, what is done already, and what the rest needs. Loads no model."""
    from llmops.recipe.show import render
    from llmops.runner import plan as make

    planned = make(_recipe_path(recipe), sets=sets or (), runs=runs)
    if as_json:
        _print_json(planned.as_json())
    else:
        print(render(planned, colour=sys.stdout.isatty()))


@app.command()
def validate(recipe: RecipeArgument, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Check RECIPE: every problem with its line, what was expected, and the nearest match. Loads no model."""
    from llmops.recipe import load_recipe

    parsed = load_recipe(_recipe_path(recipe), sets or ())
    if as_json:
        _print_json({"valid": True, "name": parsed.name, "variants": list(parsed.variants)})
    else:
        print(f"{recipe}: valid; {len(parsed.variants)} variants: {', '.join(parsed.variants)}")


@app.command()
def schema(markdown: Annotated[bool, typer.Option("--markdown", help="The reference of all options instead.")] = False,
           ) -> None:
    """Print the JSON Schema of recipes, for editors and other tools."""
    if markdown:
        from llmops.recipe.reference import markdown as reference

        print(reference(), end="")
    else:
        from llmops.recipe import json_schema

        _print_json(json_schema())


@app.command()
def compare(run: RunArgument = None, variants: Annotated[list[str] | None, typer.Argument(
            metavar="[VARIANT]...", help="The variants to hold side by side (default: all).")] = None,
            against: Annotated[str | None, typer.Option("--against", help="The variant the others are held against "
                                                                          "(default: their parents)")] = None,
            runs: RunsOption = None, as_json: JsonOption = False,
            wide: WideOption = False) -> None:
    """Print the table of a finished RUN, or chosen VARIANTs side by side with paired differences and intervals."""
    from llmops.compare import compare_run

    rows, shown = compare_run(runs, run, variants or (), against, as_json=as_json)
    if shown is not None:
        _print_json(shown) if as_json else _console().print(shown)
    else:
        _print_json(rows) if as_json else _print_rows(rows, wide=wide)


@app.command()
def report(run: RunArgument = None, runs: RunsOption = None) -> None:
    """Write the page of a finished RUN again, and the cards of its variants, from the ledger alone."""
    from llmops.compare import rows_of
    from llmops.runner import publish
    from llmops.store import Store

    store, rows = Store(runs), rows_of(runs, run)
    result = publish(rows[0]["identity"]["run"], store, store.ledger(), [row["identity"]["variant"] for row in rows])
    print(_short(result.folder / "report.html"))


@app.command()
def why(recipe: RecipeArgument, variant: Annotated[str, typer.Argument(help="A variant of the recipe.")],
        sets: SetOption = None, runs: RunsOption = None, as_json: JsonOption = False) -> None:
    """Tell why VARIANT would be built again: which part of its key changed since the last build."""
    from llmops.recipe.keys import why as explain
    from llmops.runner import plan as make
    from llmops.store import Store

    planned, store = make(_recipe_path(recipe), sets=sets or (), runs=runs), Store(runs)
    names = [stage.variant for stage in planned.stages]
    if variant not in names:
        raise LlmopsError(unknown("variant", variant, names))
    rows = store.ledger().history(planned.recipe.name, variant) if (store.runs / "ledger.db").exists() else []
    answer = explain(variant, planned, rows)
    _print_json(answer) if as_json else print("\n".join(answer["lines"]))


@recipes_app.command("list")
def recipes_list(as_json: JsonOption = False) -> None:
    """The packaged recipes, with what each shows."""
    from llmops.recipes_folder import packaged

    found = [{"name": name, "title": title, "path": str(path)} for name, (title, path) in packaged().items()]
    if as_json:
        _print_json(found)
    else:
        for entry in found:
            print(f"{entry['name']:22} {entry['title']}")


@recipes_app.command("copy")
def recipes_copy(name: Annotated[str, typer.Argument(help="Name of a packaged recipe.")],
                 to: Annotated[str | None, typer.Argument(help="File to write (default: NAME.yaml here).")] = None,
                 force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False) -> None:
    """Copy a packaged recipe, to change it."""
    from llmops.recipes_folder import copy

    print(copy(name, Path(to) if to else None, force=force))


@data_app.command("show")
def data_show(recipe: RecipeArgument,
              name: Annotated[str | None, typer.Argument(metavar="[DATA]", help="Name under `data:` (default: the "
                                                         "first that a step trains on).")] = None,
              samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many rows.")] = 3,
              sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Print rows of DATA as the model sees them, the tokens that carry the loss in colour, and what was left out."""
    from llmops.data_view import data_view

    shown = data_view(_recipe_path(recipe), name, samples, sets or (), as_json=as_json)
    _print_json(shown) if as_json else _console().print(shown)


def main() -> None:
    """Entry point of the `llmops` command."""
    app()


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
    main()
