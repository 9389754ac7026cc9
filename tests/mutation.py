"""Mutation testing: a small change of an algorithm, whichever it is, must make a test fail.

python tests/mutation.py dqn naf     # all seven scripts without arguments; minutes each

Cosmic Ray makes the changes, one at a time: arithmetic operators, comparisons, numbers, booleans,
loops and decorators, from the first network to the last function before `train`, and below it in
`evaluate`, `scale` and `make_envs`. Each is run in a process of its own, forked when PyTorch is
loaded; that saves most of the time. The script's own tests come first, as the first failure ends a
run.
"""

import ast
import importlib
import os
import re
import signal
import sys
import types
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from difflib import unified_diff
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pytest
import tyro
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db

ROOT = Path(__file__).resolve().parents[1]
POLICY_GRADIENT = ["test_policy_gradient", "test_envs", "test_device"]
VALUE_BASED = ["test_buffer", "test_value_based", "test_envs", "test_device"]
SUITES = dict.fromkeys(["reinforce", "pg_baseline", "offpolicy_pg"], POLICY_GRADIENT)
SUITES |= dict.fromkeys(["dqn", "cem_q", "naf", "ddpg_continuous"], VALUE_BASED)
SUITES = {script: [f"test_{script}", *shared] for script, shared in SUITES.items()}
OPERATORS = re.compile(  # the rest makes errors of type, which any test sees
    r"core/(ReplaceBinaryOperator_(Add|Sub|Mul|Div|Mod|Pow)_(Add|Sub|Mul|Div)"
    r"|ReplaceComparisonOperator_\w+_(Eq|NotEq|Lt|LtE|Gt|GtE)|ReplaceUnaryOperator_Delete_\w+"
    r"|AddNot|Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd)|NumberReplacer"
    r"|RemoveDecorator|ZeroIterationForLoop)$"
)


def first_line(node):
    """Of its decorators, if it has any."""
    return min(x.lineno for x in (node, *node.decorator_list))


def mutants(script):
    """The changed sources."""
    path = ROOT / f"{script}.py"
    source = path.read_text()
    blocks = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    names = list(blocks)
    algorithm = names[1 : names.index("train")]  # the first is Args
    names = (*algorithm, "evaluate", "scale", "make_envs")
    chosen = [blocks[name] for name in names if name in blocks]
    lines = {line for node in chosen for line in range(first_line(node), node.end_lineno + 1)}
    with use_db(":memory:", WorkDB.Mode.create) as db:
        init([path], db, {})
        for item in db.pending_work_items:
            (mutation,) = item.mutations
            if mutation.start_pos[0] in lines and OPERATORS.match(mutation.operator_name):
                operator = get_operator(mutation.operator_name)()
                yield script, mutate_code(source, operator, mutation.occurrence)


def survives(mutant):
    """Whether all fast tests pass; after five minutes they have not."""
    script, source = mutant
    module = types.ModuleType(script)
    module.__file__ = str(ROOT / f"{script}.py")
    sys.modules[script] = module
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(300)
    tests = [str(ROOT / "tests" / f"{suite}.py") for suite in SUITES[script]]
    options = ["-x", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--tb", "no"]
    others = " or ".join(SUITES.keys() - {script})
    options += ["-k", f"not ({others} or async)"]  # no processes of a process of the pool
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        try:
            exec(compile(source, module.__file__, "exec"), vars(module))
            return mutant, pytest.main([*options, *tests]) == 0
        except Exception:
            return mutant, False


def main(scripts: tyro.conf.Positional[tuple[Literal[tuple(SUITES)], ...]] = ()):
    for name in ("torch", "gymnasium", "wandb", "tyro", "scipy.linalg", "cma"):
        importlib.import_module(name)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    for script in scripts or SUITES:
        source, count = (ROOT / f"{script}.py").read_text(), Counter()
        with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            assert pool.apply(survives, [(script, source)])[1], "the tests fail as it is"
            for (_, changed), alive in pool.imap_unordered(survives, mutants(script)):
                count[alive] += 1
                if alive:
                    diff = unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")
                    print("\n".join(list(diff)[2:]), flush=True)
        total = count.total()
        print(f"{script}: {count[False]} of {total} killed, {count[False] / total:.1%}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
