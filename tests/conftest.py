import importlib
import json
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
INERT |= {"wandb_mode", "wandb_project", "capture_video"}

STARTED = []  # processes of the test that runs

torch.set_num_threads(1)


def options(module, tiny):
    """(flag, value) for each choice of each flag; for a number, one that is not its default."""
    hints = get_type_hints(module.Args)
    for field in fields(module.Args):
        if field.name == "resume":  # see test_runs.py
            continue
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


def start(script, *flags, cwd, **settings):
    """The script as a user starts it, from `cwd`."""
    command = [sys.executable, ROOT / f"{script}.py", *map(str, flags)]
    settings |= {"env": {**os.environ, "PYTHONPATH": str(ROOT / "tests")}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen(command, cwd=cwd, **pipes, **settings))
    return STARTED[-1]


def run(script, *flags, cwd, timeout=120, **settings):
    """The script from its start to its end."""
    process = start(script, *flags, cwd=cwd, **settings)
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def records(directory):
    """What a log of W&B holds, as dicts."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", directory]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in lines.splitlines()]


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="of each script, by test_runs.py")


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    """Runs write to ./runs: every test has its own; none outlives it."""
    monkeypatch.chdir(tmp_path)
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture
def logged(monkeypatch):
    """What `train` logs, as a list of dicts."""
    rows = []
    for name in ("setup", "init", "define_metric", "finish"):
        monkeypatch.setattr(wandb, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(wandb, "log", rows.append)
    return rows


@pytest.fixture(params=MODULES, ids=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(params=VALUE_MODULES, ids=VALUE_BASED)
def value_script(request):
    return request.param
