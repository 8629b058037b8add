"""The command line: what it takes, what it says to a wrong call, how it exits, and what it leaves unimported."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmops import __version__, cli, parser
from llmops.errors import LlmopsError
from llmops.parser import Program

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
LEAVES = sorted(cli.COMMANDS)

# What every command takes: arguments, then options. A changed line here is a changed interface.
TAKES = {
    "tune": "RECIPE --set --runs --json -q --quiet --wide --exclusive --green --deadline --forecast --zone --lasts",
    "plan": "RECIPE --set --runs --data --json",
    "validate": "RECIPE --set --json",
    "schema": "--markdown --compatibility",
    "compare": "[RUN] [VARIANT...] --against --runs --json --wide",
    "report": "[RUN] --runs",
    "doctor": "[RECIPE] --set --runs --json",
    "why": "RECIPE VARIANT --set --runs --json",
    "recipes list": "--json",
    "recipes copy": "NAME [TO] --force",
    "data show": "RECIPE [DATA] -n --samples --set --json",
    "export": "VARIANT --to --type --out --run --runs --force --json",
    "explain": "RUN VARIANT --against --items --runs --json -q --quiet",
    "gate": "RUN [VARIANT...] --goal --junit --runs --json",
    "promote": "RUN VARIANT --as --why --margin --saving --batch --force --runs --json",
    "champions": "[NAME] --history --runs --json",
    "audit": "--expect --runs --json",
    "bench models": "MODEL --against --batch --context --new --repeats --window --sensor --watts --device --threads "
                    "--kernel --seed --out --runs --json -q --quiet",
    "bench show": "DIR --json",
    "ui": "--port --host --anywhere --runs -q --quiet",
    "bench kernels": "--scheme --shape --tokens --device --kernel --json",
    "completion": "SHELL",
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Every test in an empty folder, on a terminal of 80 columns, with nothing set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # so that no test leaves it behind
    monkeypatch.delenv("LLMOPS_RUNS", raising=False)


def call(capsys, *words):
    """(exit code, standard output, standard error) of `llmops WORDS`, in this process."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    return code, told.out, told.err


def python(script, *words, **environment):
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, **environment})


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEAVES)
def test_help_of_a_command_is_its_interface_and_its_docstring(name, capsys):
    code, out, _ = call(capsys, *name.split(), "--help")
    usage, about, *_ = out.split("\n\n")
    shown = usage.removeprefix(f"usage: llmops {name} [OPTIONS]").split()
    options = [word for line in out.splitlines() if line.startswith("  -")
               for word in re.findall(r"(?:^|\s)(--?[a-z]+)", line.split("   ")[0])]
    assert code == 0
    assert sorted([*shown, *options]) == sorted([*TAKES[name].split(), "-h", "--help"])
    assert " ".join(about.split()) == " ".join(cli.COMMANDS[name][0].__doc__.split())
    assert call(capsys, *name.split(), "-h") == (0, out, "")


def test_help_of_all_lists_every_command_and_the_readme_has_each(capsys):
    code, out, _ = call(capsys, "--help")
    listed = re.findall(r"^  ([a-z]+)  +\S", out.partition("COMMAND\n")[2], re.MULTILINE)
    assert code == 0 and listed == list(dict.fromkeys(name.split()[0] for name in cli.COMMANDS))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in LEAVES if f"`llmops {name}" not in readme] == ["recipes copy"]  # on the line of `list`


@pytest.mark.parametrize("group", ["recipes", "data"])
def test_help_of_a_group(group, capsys):
    code, out, _ = call(capsys, group, "--help")
    listed = re.findall(r"^  ([a-z]+)  +\S", out.partition("COMMAND\n")[2], re.MULTILINE)
    assert code == 0 and cli.GROUPS[group] in out
    assert listed == [name.split()[1] for name in cli.COMMANDS if name.startswith(f"{group} ")]


@pytest.mark.parametrize("words", [[], ["recipes"], ["data"]], ids=["nothing", "recipes", "data"])
def test_without_a_command_the_help_goes_to_standard_error(words, capsys):
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "") and err == call(capsys, *words, "--help")[1]


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"llmops {__version__}\n", "")


def test_percent_signs_in_help_are_themselves():
    def half(given=""):
        """Keep 50% of it."""

    program = Program("p", "All, or 50%.", "1", {"half": (half, (("given",), {})), "g half": (half,)}, {"g": "Of 7%."})
    shown = program.tree().format_help()
    assert "Keep 50% of it." in shown and "All, or 50%." in shown and "Of 7%." in shown


# --- wrong calls ------------------------------------------------------------------------------------------------------

WRONG = {
    "command": (["tun", "x"], 'unknown command of llmops "tun"', 'did you mean "tune"?'),
    "far command": (["bogus"], 'unknown command of llmops "bogus"', "tune, plan, validate, schema"),
    "command of a group": (["recipes", "lst"], 'unknown command of llmops recipes "lst"', 'did you mean "list"?'),
    "option of llmops": (["--verison"], 'unknown option "--verison"', 'did you mean "--version"?'),
    "option of a group": (["recipes", "--hepl"], 'unknown option "--hepl"', 'did you mean "--help"?'),
    "version of a group": (["recipes", "--version"], 'unknown option "--version"', "expected one of -h, --help"),
    "option": (["tune", "x", "--quite"], 'unknown option of llmops tune "--quite"', 'did you mean "--quiet"?'),
    "option with a value": (["plan", "--run=x", "y"], 'unknown option of llmops plan "--run"', 'mean "--runs"?'),
    "option that hides a lack": (["tune", "--jsn"], 'unknown option of llmops tune "--jsn"', 'did you mean "--json"?'),
    "short option": (["tune", "x", "-x"], 'unknown option of llmops tune "-x"', "-q, --quiet"),
    "no abbreviation": (["tune", "x", "--qui"], 'unknown option of llmops tune "--qui"', 'did you mean "--quiet"?'),
    "no recipe": (["tune"], "required: RECIPE", "`llmops tune --help`"),
    "no variant": (["why", "x"], "required: VARIANT", "`llmops why --help`"),
    "no value": (["plan", "x", "--set"], "--set: expected one argument", "`llmops plan --help`"),
    "a word too many": (["plan", "x", "y"], 'one word too many: "y"', "`llmops plan --help`"),
    "no rows": (["data", "show", "x", "-n", "0"], 'given "0"', "expected a whole number of at least 1"),
    "no number": (["data", "show", "x", "--samples", "few"], 'given "few"', "a whole number of at least 1"),
    "shell": (["completion", "bsh"], 'unknown shell "bsh"', 'did you mean "bash"?'),
    "recipe": (["plan", "quikstart"], 'no recipe file "quikstart"', 'did you mean "quickstart"?'),
    "variant": (["why", "quickstart", "tuned-w5"], 'unknown variant "tuned-w5"', 'did you mean "tuned-w'),
}


@pytest.mark.parametrize("words, given, cure", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_says_what_was_given_and_what_to_do(words, given, cure, capsys):
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert given in err and cure in err


def test_every_problem_of_a_recipe_is_a_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(QUICKSTART.read_text().replace("goals:", "gaols:").replace("rank:", "rnak:"))
    code, _, err = call(capsys, "validate", "bad.yaml")
    lines = err.splitlines()
    assert code == 2 and len(lines) >= 2 and all(line.startswith("error: bad.yaml:") for line in lines)
    assert all(any(f'did you mean "{key}"?' in line for line in lines) for key in ("goals", "rank"))


# --- right calls ------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch):
    """What reaches a function: `given("compare", words...)` is its arguments by name."""
    def of(name, *words):
        found = {}
        commands = {**cli.COMMANDS, name: (lambda **arguments: found.update(arguments), *cli.COMMANDS[name][1:])}
        assert cli.PROGRAM._replace(commands=commands).run([*name.split(), *words]) == 0
        return found

    return of


def test_every_argument_reaches_its_parameter(given):
    few = {"tune": ["r"], "plan": ["r"], "validate": ["r"], "why": ["r", "v"], "recipes copy": ["n"],
           "data show": ["r"], "export": ["v", "--to", "f"], "completion": ["s"],
           "bench models": ["m"], "bench show": ["d"], "explain": ["r", "v"], "gate": ["r"], "promote": ["r", "v"]}
    for name in LEAVES:
        function = cli.COMMANDS[name][0]
        assert set(given(name, *few.get(name, []))) == set(inspect.signature(function).parameters)


def test_options_may_stand_anywhere_and_set_repeats(given):
    expected = {"recipe": "r.yaml", "sets": ["a=1", "b.c=-2"], "runs": "here", "data": False, "as_json": True}
    for words in ("r.yaml --set a=1 --set b.c=-2 --runs here --json",
                  "--set a=1 --json r.yaml --set=b.c=-2 --runs=here",
                  "--json --set a=1 --set b.c=-2 --runs here -- r.yaml"):
        assert given("plan", *words.split()) == expected
    assert given("plan", "r.yaml") == {"recipe": "r.yaml", "sets": [], "runs": None, "data": False, "as_json": False}
    assert given("plan", "r.yaml", "--set", "x=1")["sets"] == ["x=1"]  # nothing was left over from before


@pytest.mark.parametrize("words", ["run a b --json", "--json run a b", "run --json a b", "run a --json b"])
def test_a_list_of_variants_with_an_option_between(given, words):
    found = given("compare", *words.split())
    assert (found["run"], found["variants"], found["as_json"]) == ("run", ["a", "b"], True)
    assert given("compare", "--wide") == {"run": None, "variants": [], "against": None, "runs": None,
                                          "as_json": False, "wide": True}


def test_the_number_of_rows(given):
    assert given("data show", "r", "-n", "5", "train") == {"recipe": "r", "source": "train", "samples": 5, "sets": [],
                                                           "as_json": False}
    assert given("data show", "r", "-n7")["samples"] == 7 and given("data show", "r")["samples"] == 3


def test_validate_and_plan_of_a_packaged_recipe(capsys):
    code, out, _ = call(capsys, "validate", "quickstart")
    assert code == 0 and out.startswith("quickstart: valid; ") and "tuned-w4" in out
    body = json.loads(call(capsys, "validate", QUICKSTART, "--json", "--set", "name=other")[1])
    assert body["valid"] and body["name"] == "other" and "tuned" in body["variants"]
    code, out, _ = call(capsys, "plan", "quickstart")
    assert code == 0 and out.startswith("quickstart: ") and "to build" in out
    assert not list(Path().iterdir())  # a plan writes nothing


def test_runs_come_from_the_environment_unless_they_are_given(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path / "elsewhere"))
    assert json.loads(call(capsys, "plan", "quickstart", "--json")[1])["store"] == str(tmp_path / "elsewhere" / "store")
    told = call(capsys, "plan", "quickstart", "--json", "--runs", "here")[1]
    assert json.loads(told)["store"] == str(tmp_path / "here" / "store")


def test_why_tells_of_a_variant_never_built(capsys):
    code, out, _ = call(capsys, "why", "quickstart", "tuned", "--json")
    assert code == 0 and json.loads(out)["lines"]


def test_recipes_are_listed_and_copied(capsys):
    names = [entry["name"] for entry in json.loads(call(capsys, "recipes", "list", "--json")[1])]
    assert "quickstart" in names and all(name in call(capsys, "recipes", "list")[1] for name in names)
    assert call(capsys, "recipes", "copy", "quickstart", "mine.yaml") == (0, "mine.yaml\n", "")
    assert Path("mine.yaml").read_text() == QUICKSTART.read_text()
    code, _, err = call(capsys, "recipes", "copy", "quickstart", "mine.yaml")
    assert code == 2 and "--force" in err
    assert call(capsys, "recipes", "copy", "quickstart", "mine.yaml", "--force")[0] == 0


def test_schema_is_the_one_in_the_repository(capsys):
    assert json.loads(call(capsys, "schema")[1]) == json.loads((ROOT / "recipes/recipe.schema.json").read_text())
    assert call(capsys, "schema", "--markdown")[1] == (ROOT / "docs/options.md").read_text()


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending, code, told", [
    (lambda: 3, 3, ""), (lambda: 1, 1, ""), (lambda: None, 0, ""),
    (lambda: exec("raise KeyboardInterrupt"), 130, "what was finished is kept"),
    (lambda: exec("raise BrokenPipeError"), 1, "")], ids=["failed", "no winner", "done", "interrupted", "closed pipe"])
def test_exit_codes(ending, code, told, capfd, monkeypatch):
    monkeypatch.setattr(cli, "PROGRAM", cli.PROGRAM._replace(commands={"end": (ending,)}))
    assert cli.main(["end"]) == code
    assert told in capfd.readouterr().err


def test_an_error_carries_its_exit_code(capsys, monkeypatch):
    def fail():
        error = LlmopsError("first\nsecond")
        error.exit_code = 3
        raise error

    monkeypatch.setattr(cli, "PROGRAM", cli.PROGRAM._replace(commands={"end": (fail,)}))
    assert call(capsys, "end") == (3, "", "error: first\nerror: second\n")


def test_a_reader_that_leaves_is_no_traceback():
    script = f"{sys.executable} -m llmops schema --markdown | head -c 10 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "1") and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_python_m_llmops_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llmops", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"llmops {__version__}\n")
    assert subprocess.run([sys.executable, "-m", "llmops", "tun"], capture_output=True).returncode == 2


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_prints_where_it_goes_and_what_the_shell_runs(shell, capsys):
    code, out, _ = call(capsys, "completion", shell)
    first, _, rest = out.partition("\n")
    assert code == 0 and first.startswith("# ") and cli.SHELLS[shell] in first and f"llmops completion {shell}" in first
    assert "llmops" in rest and "_ARGCOMPLETE" in rest
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=out, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize("line, expected", [
    ("llmops ", {"tune", "plan", "recipes", "completion", "--help", "--version"}), ("llmops pl", {"plan"}),
    ("llmops tune --w", {"--wide"}), ("llmops recipes ", {"list", "copy"}), ("llmops plan q", {"quickstart"}),
    ("llmops plan m", {"mine.yaml"}), ("llmops recipes copy g", {"gsm8k"}), ("llmops completion ", {"bash", "fish"})])
def test_a_shell_is_offered(line, expected, tmp_path):
    Path("mine.yaml").touch()
    Path("mine.txt").touch()
    answer = tmp_path / "answer"
    done = python("import sys; from llmops.cli import main; sys.argv = ['llmops']; main()", _ARGCOMPLETE="1",
                  _ARGCOMPLETE_STDOUT_FILENAME=str(answer), _ARGCOMPLETE_IFS="\n", COMP_LINE=line,
                  COMP_POINT=str(len(line)), ARGCOMPLETE_USE_TEMPFILES="1")
    offered = {word.strip() for word in answer.read_text().split("\n")}
    assert expected <= offered and "mine.txt" not in offered, done.stderr
    assert line.endswith(" ") or all(word.startswith(line.split()[-1]) for word in offered)


# --- what stays unimported --------------------------------------------------------------------------------------------

IMPORTS = "import sys; from llmops.cli import main; code = main(sys.argv[1:]); print(code, *sorted(sys.modules))"
HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "rich", "typer", "click", "argcomplete"}


@pytest.mark.parametrize("name", ["validate", "plan"])
def test_nothing_heavy_is_imported_by(name):
    code, *modules = python(IMPORTS, name, "quickstart", "--json").stdout.split("\n")[-2].split()
    assert code == "0" and "pydantic" in modules
    assert not set(modules) & {*HEAVY, "importlib.metadata", "email", "sqlite3", "logging", "llmops.data.world"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes", "list"], ["tune", "--hlep"]])
def test_not_even_pydantic_is_imported_by(words):
    done = python("import atexit, sys; atexit.register(lambda: print(*sys.modules)); from llmops.cli import main; "
                  "main(sys.argv[1:])", *words)
    assert not set(done.stdout.split("\n")[-2].split()) & {*HEAVY, "pydantic", "yaml", "importlib.metadata"}


def test_only_the_parser_that_is_asked_for_is_made(given, monkeypatch):
    made = []

    class Noted(parser._Parser):
        def __init__(self, prog, **options):
            made.append(prog)
            super().__init__(prog, **options)

    monkeypatch.setattr(parser, "_Parser", Noted)
    given("report")
    assert made == ["llmops report"]
