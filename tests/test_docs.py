"""What the README and the docstrings say exists, and their commands parse."""

import ast
import re
import shlex

import pytest
import tyro
from conftest import MODULES, ROOT, SCRIPTS, VALUE_BASED, VALUE_MODULES

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BY_NAME = dict(zip(SCRIPTS + VALUE_BASED, MODULES + VALUE_MODULES))


def commands():
    texts = [page.read_text() for page in PAGES] + [module.__doc__ for module in BY_NAME.values()]
    for text in texts:
        for script, flags in re.findall(r"(?:python|uv run) (\w+)\.py((?: +[^\s`&|#;)]+)*)", text):
            yield script, flags.strip()


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


def test_equations_name_functions_that_exist(script):
    for line in equations(script):
        name = re.search(r"\(\d+\)\s+(\w+)", line)[1]
        assert hasattr(script, name), line


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(BY_NAME[node.module], alias.name) for alias in node.names)
