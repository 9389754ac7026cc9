"""What the README and the docstrings say exists, and their commands parse."""

import ast
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from itertools import takewhile

import pytest
import tyro
import yaml
from conftest import MODULES, ROOT, SCRIPTS, VALUE_BASED, VALUE_MODULES, run, same_picture
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import benchmark.plot
import benchmark.run
from docs import figures
from docs.beside import anchor

BY_NAME = dict(zip(SCRIPTS + VALUE_BASED, MODULES + VALUE_MODULES))
SETTINGS = [*BY_NAME.values(), benchmark.plot, benchmark.run]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "mutation.md", *DOCS]
README = (ROOT / "README.md").read_text()
FIGURES = (ROOT / "docs" / "figures.py").read_text()
TESTS = {
    node.name: ast.unparse(node)
    for path in (ROOT / "tests").glob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
}


def commands():
    texts = [page.read_text() for page in PAGES] + [module.__doc__ for module in BY_NAME.values()]
    for text in texts:
        for script, rest in re.findall(r"(?:python|uv run) (\w+)\.py\b([^`\n]*)", text):
            yield script, shlex.join(arguments(rest))


def arguments(rest):
    """The words after a command's name, up to a comment or to another command."""
    words = shlex.shlex(rest, posix=True, punctuation_chars=True)
    words.whitespace_split = True  # so that a word may have a colon in it
    return list(takewhile(lambda word: word[0] not in "&|;()", words))


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize(("name", "flags"), COMMANDS)
def test_every_command_parses(name, flags):
    flags = flags.replace("package.module:MyEnv-v0", "envs:Counting-v0").replace("$seed", "1")
    flags = flags.replace("--resume RUN/checkpoint.pt", "")  # resumed in test_runs.py
    if flags != "--help":
        tyro.cli(BY_NAME[name].Args, args=shlex.split(flags))


def test_commands_were_found():
    assert {name for name, _ in COMMANDS} == set(BY_NAME) and len(COMMANDS) > 6


@pytest.fixture(params=BY_NAME.values(), ids=BY_NAME)
def script(request):
    return request.param


def equations(script):
    """The lines of the docstring that number an equation, up to the table of symbols."""
    lines = script.__doc__.split("    N num_envs")[0].splitlines()
    return [line for line in lines if re.search(r"\(\d+\)", line)]


def test_equations_are_numbered_and_each_is_at_its_line(script):
    numbers = [int(re.findall(r"\((\d+)\)", line)[-1]) for line in equations(script)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 5
    code = (ROOT / f"{script.__name__}.py").read_text().split("def __post_init__")[1]
    found = {int(number) for number in re.findall(r"(?<!\w)\((\d+)\)", code)}
    assert found == set(numbers)


def named(script):
    """Number of each equation and the function that the docstring names for it."""
    return [re.search(r"\((\d+)\)\s+(\w+)", line).groups() for line in equations(script)]


def test_equations_name_functions_that_exist(script):
    assert all(hasattr(script, name) for _, name in named(script))


def test_the_page_has_the_equations_of_its_script(script):
    """The same numbers, in order, and after each the same function."""
    text = (ROOT / "docs" / f"{script.__name__}.md").read_text()
    assert re.findall(r"\\tag\{(\d+)\}\$\$\s+`(\w+)`", text) == named(script)
    assert text.count(r"\tag") == len(named(script))
    for title in ("## Equations", "## Metrics", "## Differences", "## Exercises"):
        assert title in text
    assert "[results](results.md#" in text


@pytest.mark.parametrize("test", [x for x in TESTS if re.search(r"_equations?_\d", x)])
def test_a_test_of_an_equation_calls_its_function(test):
    """For each number in its name, that of a script that numbers it so."""
    numbers = re.search(r"equations?_(\d+(_(and|to)_\d+)*)", test)[1]
    for number in re.findall(r"\d+", numbers):
        names = {name for script in BY_NAME.values() for n, name in named(script) if n == number}
        assert any(re.search(rf"\b{name}\b", TESTS[test]) for name in names), (number, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    """Links, figures, functions, flags, tests and imports."""
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if part else []
        assert not part or part in map(anchor, titles), link  # as on GitHub
    flags = {f"--{name.replace('_', '-')}" for s in SETTINGS for name in vars(s.Args())}
    for words in re.findall(r"`([^`\n]+)`", text):
        first = words.split()[0]
        if match := re.fullmatch(rf"({'|'.join(BY_NAME)})\.(\w+)", first):
            assert match[2] == "py" or hasattr(BY_NAME[match[1]], match[2]), words
        elif first.startswith("--") and page in DOCS:
            assert first in flags, words
        elif first.startswith("test_") and first.isidentifier():
            assert first in TESTS, words
        elif words.startswith("pytest") and " -k " in words:
            expression = shlex.split(words.split(" -k ")[1])[0]
            for part in expression.split(" or "):
                assert any(part in test for test in TESTS), words
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_lecture_is_whole():
    """52 items and 26 errata, in order; each item first has something to run, last its tests."""
    text = (ROOT / "docs" / "lecture.md").read_text()
    items = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", text, flags=re.M)
    assert [int(number) for number, _ in items] == list(range(1, 53))
    for _, where in items:
        first, *others = where.split("<br>")
        assert "](" in first or re.search(r"`(python|pytest|diff) ", first), where
        assert not any("test_" in part for part in (first, *others[:-1])), where
    errata = re.findall(r"^(\d+)\. ", (ROOT / "docs" / "errata.md").read_text(), flags=re.M)
    assert [int(number) for number in errata] == list(range(1, 27))


@pytest.mark.parametrize("name", ["reinforce", pytest.param("dqn", marks=pytest.mark.slow)])
def test_the_environment_of_the_readme_works_with_every_flag(name, tmp_path):
    (code,) = re.findall(r"```python\n(import gymnasium.*?)```", README, flags=re.DOTALL)
    (tmp_path / "my_env.py").write_text(code)
    flags = ["--env-id", "my_env:Walk-v0", "--vectorization-mode", "async", "--capture-video"]
    flags += ["--total-timesteps", 1500, "--num-envs", 4, "--eval-episodes", 2]
    process = run(name, *flags, "--wandb-mode", "disabled", cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    assert list(tmp_path.glob("runs/*/videos/*.mp4"))


@pytest.mark.parametrize("family", ["policy_gradient", "value_based"])
def test_each_cell_of_a_sweep_is_a_command_that_parses(family, tmp_path):
    """What W&B's agent makes of the file, without its server; the first cell is run."""
    sweep = yaml.safe_load((ROOT / f"benchmark/sweeps/{family}.yaml").read_text())
    choices = [x.get("values", [x.get("value")]) for x in sweep["parameters"].values()]
    assert sweep["command"] == ["python", "${program}", "${args_no_boolean_flags}"]
    name = sweep["program"].removesuffix(".py")
    found = []
    for values in itertools.product(*choices):
        cell = dict(zip(sweep["parameters"], values))
        words = {key: {"value": value} for key, value in cell.items()}
        flags = create_sweep_command_args({"args": words})["args_no_boolean_flags"]
        args = tyro.cli(BY_NAME[name].Args, args=flags)
        assert {key: getattr(args, key) for key in cell} == cell
        found.append(flags)
    small = ["--wandb-mode=offline", "--total-timesteps=2000", "--eval-episodes=2"]
    assert len(found) == 30 and run(name, *found[0], *small, cwd=tmp_path).returncode == 0


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_each_figure_is_made_and_shown():
    names = {f"{name}.png" for name in re.findall(r"^def (\w+)\(\):", FIGURES, flags=re.M)}
    assert names == {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert names <= set(re.findall(r"\w+\.png", "".join(page.read_text() for page in DOCS)))


@pytest.mark.parametrize(
    "draw",
    [
        figures.variance,
        figures.quadratic,
        figures.race,
        pytest.param(figures.bias, marks=pytest.mark.slow),
    ],
    ids=lambda draw: draw.__name__,
)
def test_a_figure_is_what_the_code_draws(draw, tmp_path):
    """Those that take seconds and measure no time."""
    figures.save(draw, tmp_path / "drawn.png")
    assert same_picture(figures.FOLDER / f"{draw.__name__}.png", tmp_path / "drawn.png")


def test_the_figures_get_what_the_runs_log():
    settings = {"total_timesteps": 400, "num_envs": 4, "env_id": "CartPole-v1"}
    first, second = figures.curves({"a label": ("reinforce", settings)}, [1, 2])["a label"]
    assert first != second and first[-1]["global_step"] >= 400
    assert all(row["charts/episodic_return"] >= 1 for row in first + second)


@pytest.mark.parametrize("tool", ["-m docs.beside", "-m docs.figures", "-m tests.mutation"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--oops", 2)])
def test_a_flag_is_not_taken_for_a_folder_or_a_name(tool, flag, code, tmp_path):
    words = [sys.executable, *tool.split(), flag]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code and "--help" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
