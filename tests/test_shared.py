"""The scripts stand alone, are built alike, and share their common blocks verbatim."""

import ast
import re
import sys
import tomllib
from itertools import combinations

import pytest
from conftest import ROOT, SCRIPTS, VALUE_BASED
from packaging.requirements import Requirement

ALL = SCRIPTS + VALUE_BASED
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in ALL}
# what an algorithm changes; everything else of one name is one text
OWN = {"Args", "train"}
OFFPOLICY = {"Trajectories", "rollout"}  # keep the log-probs of acting
ORDER = ["Args", "Policy", "Trajectories", "rollout", "env_actions", "reward_to_go", "policy_loss"]
ORDER += ["make_envs", "save_checkpoint", "load_checkpoint", "start_run", "evaluate", "train"]
VALUE_ORDER = ["Args", "Batch", "ReplayBuffer", "env_actions", "select_actions", "td_target"]
VALUE_ORDER += ["update_target", *ORDER[-6:]]
# what all four share; QNetwork, select_actions and td_target are their difference
VALUE_SHARED = {"Batch", "ReplayBuffer", "update_target", "evaluate"}
# what all seven share
RUNS = ("save_checkpoint", "load_checkpoint", "start_run", "saved_args")
# as long as they are: a line more must be wanted
LINES = {"reinforce": 291, "pg_baseline": 345, "offpolicy_pg": 345, "dqn": 410, "cem_q": 466}
LINES |= {"naf": 361, "ddpg_continuous": 374}


def blocks(name):
    """Source of each top-level function and class, decorators and all, in order."""
    tree, text = ast.parse(SOURCES[name]), SOURCES[name].splitlines()
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text[first - 1 : node.end_lineno])
    return found


def main_block(name):
    """What a shell runs, after the last function."""
    return SOURCES[name].split("def saved_args")[1]


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


@pytest.mark.parametrize("name", VALUE_BASED[1:])
def test_value_based_blocks_are_verbatim(name):
    ours, parent = blocks(name), blocks("dqn")
    for block in VALUE_SHARED:
        assert ours[block] == parent[block], f"{block} differs between {name}.py and dqn.py"
    for block in ("env_actions", "make_envs"):
        assert ours[block] == blocks("naf")[block]
    assert common_fields(name) == common_fields("dqn")
    names = [[line.split(":")[0] for line in common_fields(x)] for x in (name, "reinforce")]
    assert names[0] == names[1]
    for block in RUNS:
        assert ours[block] == blocks("reinforce")[block]


def test_all_check_settings_and_envs_alike():
    for name in ALL:
        assert main_block(name) == main_block("reinforce")
        check, envs = blocks(name)["Args"].split("def __post_init__")[1], blocks(name)["make_envs"]
        assert (
            check.splitlines()[:13]
            == blocks("dqn")["Args"].split("def __post_init__")[1].splitlines()[:13]
        )
        assert envs.splitlines()[:9] == blocks("dqn")["make_envs"].splitlines()[:9]


@pytest.mark.parametrize("name", ALL)
def test_order(name):
    order = VALUE_ORDER if name in VALUE_BASED else ORDER
    assert [block for block in blocks(name) if block in order] == order


@pytest.mark.parametrize("name", ALL)
def test_nothing_local_is_imported(name):
    allowed = {"torch", "gymnasium", "tyro", "wandb", "tqdm", "numpy"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in allowed


@pytest.mark.parametrize("name", ALL)
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


@pytest.mark.parametrize("name", ALL)
def test_size(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= LINES.get(name, 280) and max(map(len, lines)) <= 100
    assert len(ast.get_docstring(ast.parse(SOURCES[name])).splitlines()) <= 25
