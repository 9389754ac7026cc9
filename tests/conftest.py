import importlib
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import wandb

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["reinforce", "pg_baseline", "offpolicy_pg"]
VALUE_BASED = ["dqn", "cem_q", "naf", "ddpg_continuous"]
MODULES = [importlib.import_module(name) for name in SCRIPTS]
VALUE_MODULES = [importlib.import_module(name) for name in VALUE_BASED]

# the flags about the machine or the log, which leave what is learned as it is
INERT = {"device", "num_threads", "eval_episodes", "checkpoint_frequency"}
INERT |= {"wandb_mode", "wandb_project"}

torch.set_num_threads(1)


def options(module, tiny):
    """(flag, value) for each choice of each flag; for a number, one that is not its default."""
    hints = get_type_hints(module.Args)
    for field in fields(module.Args):
        assert field.default is not MISSING, f"{field.name} needs a default"
        kind, default = hints[field.name], field.default
        if get_origin(kind) is Literal:
            values = set(get_args(kind)) - {"online", "cuda", "mps"}
        elif kind is bool:
            values = {not default}
        elif kind is int:
            values = {2 * tiny[field.name] if field.name in tiny else 1 if default > 1 else 2}
        elif kind is float:
            values = {default / 2}
        elif field.name == "env_id":
            values = {"Acrobot-v1" if default == "CartPole-v1" else "MountainCarContinuous-v0"}
        else:
            values = {"wandb_project": {"elsewhere"}}[field.name]
        yield from ((field.name, value) for value in sorted(values))


def run(script, *flags, cwd, timeout=120):
    """The script as a user starts it, from `cwd`."""
    command = [sys.executable, ROOT / f"{script}.py", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True
    )


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    """Runs write to ./runs: every test has its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def logged(monkeypatch):
    """What `train` logs, as a list of dicts."""
    rows = []
    for name in ("init", "define_metric", "finish"):
        monkeypatch.setattr(wandb, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(wandb, "log", rows.append)
    return rows


@pytest.fixture(params=MODULES, ids=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(params=VALUE_MODULES, ids=VALUE_BASED)
def value_script(request):
    return request.param
