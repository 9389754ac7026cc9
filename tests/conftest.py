import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["reinforce", "pg_baseline", "offpolicy_pg"]
VALUE_BASED = ["dqn", "cem_q", "naf", "ddpg_continuous"]
MODULES = [importlib.import_module(name) for name in SCRIPTS]
VALUE_MODULES = [importlib.import_module(name) for name in VALUE_BASED]

torch.set_num_threads(1)


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


@pytest.fixture(params=MODULES, ids=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(params=VALUE_MODULES, ids=VALUE_BASED)
def value_script(request):
    return request.param
