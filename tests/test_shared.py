"""The scripts stand alone, are built alike, and share their common blocks verbatim."""

import ast
import re
import sys
import tomllib
from itertools import combinations

import pytest
from conftest import ROOT, SCRIPTS
from packaging.requirements import Requirement

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
# what an algorithm changes; everything else of one name is one text
OWN = {"Args", "train"}
OFFPOLICY = {"Trajectories", "rollout"}  # keep the log-probs of acting
ORDER = ["Args", "Policy", "Trajectories", "rollout", "env_actions", "reward_to_go", "policy_loss"]
ORDER += ["make_envs", "save_checkpoint", "evaluate", "train"]


def blocks(name):
    """Source of each top-level function and class, decorators and all, in order."""
    tree, text = ast.parse(SOURCES[name]), SOURCES[name].splitlines()
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text[first - 1 : node.end_lineno])
    return found


def common_fields(name):
    """The lines of Args up to the algorithm's own, but for the defaults."""
    lines = blocks(name)["Args"].splitlines()
    last = next(i for i, line in enumerate(lines) if "wandb_project" in line)
    return [re.sub(r"= \S+", "=", line) for line in lines[: last + 1]]


@pytest.mark.parametrize(("one", "two"), list(combinations(SCRIPTS, 2)))
def test_shared_blocks_are_verbatim(one, two):
    ours, theirs = blocks(one), blocks(two)
    differ = OWN | (OFFPOLICY if "offpolicy_pg" in (one, two) else set())
    shared = ours.keys() & theirs.keys() - differ
    assert len(shared) >= 7
    for name in shared:
        assert ours[name] == theirs[name], f"{name} differs between {one}.py and {two}.py"
    check = "    def __post_init__"
    assert ours["Args"].split(check)[1] == theirs["Args"].split(check)[1]
    assert common_fields(one) == common_fields(two)


@pytest.mark.parametrize("name", SCRIPTS)
def test_order(name):
    found = list(blocks(name))
    assert [block for block in found if block in ORDER] == ORDER


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_local_is_imported(name):
    allowed = {"torch", "gymnasium", "tyro", "wandb", "tqdm", "numpy"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in allowed


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_metadata_matches_requirements(name):
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", SOURCES[name])[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    assert block in SOURCES["reinforce"]
    ranges = {r.name: r for r in map(Requirement, metadata["dependencies"])}
    lines = (ROOT / "requirements.txt").read_text().split()
    pins = {r.name: r for r in map(Requirement, lines)}
    assert ranges.keys() == pins.keys()
    for package, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and specifier.version in ranges[package].specifier


@pytest.mark.parametrize("name", SCRIPTS)
def test_size(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= 280 and max(map(len, lines)) <= 100
    assert len(ast.get_docstring(ast.parse(SOURCES[name])).splitlines()) <= 25
