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
ALGORITHM = {"QNetwork", "select_actions", "td_target", "make_envs"}  # of the value-based scripts
# the story first, what a reader may skip last
ORDER = ["Args", "Policy", "Trajectories", "rollout", "reward_to_go", "policy_loss", "train"]
VALUE_ORDER = ["Args", "Batch", "ReplayBuffer", "select_actions", "td_target", "update_target"]
VALUE_ORDER += ["train", "evaluate", "Graph"]
SKIP = ["make_envs", "save_checkpoint", "defaults"]
# as long as they are: a line more must be wanted
LINES = {"reinforce": 343, "pg_baseline": 415, "offpolicy_pg": 432, "dqn": 461, "cem_q": 527}
LINES |= {"naf": 422, "ddpg_continuous": 428}


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
    return SOURCES[name].split('if __name__ == "__main__":')[1]


def common_fields(name):
    """The lines of Args up to the algorithm's own, but for the defaults."""
    lines = blocks(name)["Args"].splitlines()
    last = next(i for i, line in enumerate(lines) if "wandb_project" in line)
    return [re.sub(r"= \S+", "=", line) for line in lines[: last + 1]]


def check(name):
    """The checks of the settings that all scripts make, by the lines of __post_init__."""
    lines = blocks(name)["Args"].split("def __post_init__")[1].splitlines()
    last = next(i for i, line in enumerate(lines) if "is not available" in line)
    return lines[: last + 1]


@pytest.mark.parametrize(("one", "two"), list(combinations(SCRIPTS, 2)))
def test_policy_gradient_blocks_are_verbatim(one, two):
    """But for the numbers of equations."""
    ours, theirs = blocks(one), blocks(two)
    shared = ours.keys() & theirs.keys() - OWN
    assert len(shared) >= 6
    for name in shared:
        one_text, two_text = (re.sub(r"\(\d+\)", "", text[name]) for text in (ours, theirs))
        assert one_text == two_text, f"{name} differs between {one}.py and {two}.py"


@pytest.mark.parametrize(("one", "two"), list(combinations(VALUE_BASED, 2)))
def test_value_based_blocks_are_verbatim(one, two):
    ours, theirs = blocks(one), blocks(two)
    shared = ours.keys() & theirs.keys() - OWN - ALGORITHM
    assert len(shared) >= 6
    for name in shared:
        one_text, two_text = (re.sub(r"\(\d+\)", "", text[name]) for text in (ours, theirs))
        assert one_text == two_text, f"{name} differs between {one}.py and {two}.py"
    if "dqn" not in (one, two):  # continuous actions
        assert ours["make_envs"] == theirs["make_envs"]


def test_both_families_scale_actions_alike():
    assert blocks("reinforce")["scale"] == blocks("naf")["scale"]


@pytest.mark.parametrize("name", ALL)
def test_what_all_seven_share_is_verbatim(name):
    ours, theirs = blocks(name), blocks("reinforce")
    for block in ("save_checkpoint", "defaults"):
        assert ours[block] == theirs[block]
    assert main_block(name) == main_block("reinforce")
    assert check(name) == check("reinforce")
    texts = ["\n".join(common_fields(x)) for x in (name, "reinforce")]
    ours, theirs = (re.findall(r"^    (\w+):", text, re.MULTILINE) for text in texts)
    assert ours == theirs and len(ours) > 10
    family = "reinforce" if name in SCRIPTS else "dqn"
    assert common_fields(name) == common_fields(family)


@pytest.mark.parametrize("name", ALL)
def test_order(name):
    """Settings, networks, data and algorithm, then train, then what a reader may skip."""
    order = (VALUE_ORDER if name in VALUE_BASED else ORDER) + ["scale"] * (name != "dqn") + SKIP
    found = list(blocks(name))
    assert [block for block in found if block in order] == order
    assert found[found.index("train") + 1 :] == order[order.index("train") + 1 :]


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
