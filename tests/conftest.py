import copy
import importlib
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from unittest.mock import patch

import envs  # noqa: F401, registers them
import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from problems import planar_lqr, scalar_lqr, small_mdp

import pg_baseline

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["reinforce", "pg_baseline", "offpolicy_pg"]
VALUE_BASED = ["dqn", "cem_q", "naf", "ddpg_continuous"]
with patch("torch.cuda.is_available", return_value=False):  # cpu is then the default device
    MODULES = [importlib.import_module(name) for name in SCRIPTS]
    VALUE_MODULES = [importlib.import_module(name) for name in VALUE_BASED]

# the flags about the machine or the log, which leave what is learned as it is
INERT = {"device", "num_threads", "eval_episodes", "wandb_mode", "wandb_project", "capture_video"}
INERT |= {"vectorization_mode"}

# settings of a short run: of a policy-gradient script, and of a value-based one
TINY = {"total_timesteps": 300, "num_envs": 4, "eval_episodes": 2, "wandb_mode": "disabled"}
VALUE_TINY = {"total_timesteps": 400, "num_envs": 4, "eval_episodes": 3, "learning_starts": 100}
VALUE_TINY |= {"wandb_mode": "disabled", "batch_size": 16}

STARTED = []  # processes of the test that runs

torch.set_num_threads(1)


def choices(kind):
    """Those of a Literal, of which there may also be none; or nothing."""
    parts = [kind, *get_args(kind)]
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def options(module, tiny):
    """(flag, value) for each choice of each flag; for a number, one that is not its default."""
    texts = {"env_kwargs": '{"max_episode_steps": 5}', "wandb_project": "elsewhere"}
    hints = get_type_hints(module.Args)
    for field in fields(module.Args):
        if field.name in ("resume", "capture_video"):  # see test_runs.py
            continue
        assert field.default is not MISSING, f"{field.name} needs a default"
        kind, default = hints[field.name], field.default
        if choices(kind):
            values = set(choices(kind)) - {"online", "cuda", "mps"}
        elif kind is bool:
            values = {not default}
        elif kind is int:
            values = {2 * tiny[field.name] if field.name in tiny else 1 if default > 1 else 2}
        elif kind is float:
            values = {default / 2}
        elif field.name == "env_id":
            values = {"Acrobot-v1" if default == "CartPole-v1" else "MountainCarContinuous-v0"}
        else:
            values = {texts[field.name]}
        yield from ((field.name, value) for value in sorted(values))


def start(script, *flags, cwd, **settings):
    """The script as a user starts it, from `cwd`."""
    command = [sys.executable, ROOT / f"{script}.py", *map(str, flags)]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""}
    settings |= {"env": os.environ | environment, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen(command, cwd=cwd, **pipes, **settings))
    return STARTED[-1]


def run(script, *flags, cwd, timeout=120, **settings):
    """The script from its start to its end."""
    process = start(script, *flags, cwd=cwd, **settings)
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


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
    """What `train` logs, as a list of dicts, with the step of each row as "global_step"."""
    rows = []

    class Run:
        def log(self, row, step):
            rows.append({**row, "global_step": step})

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "init", lambda **settings: Run())
    return rows


@pytest.fixture(params=MODULES, ids=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(params=VALUE_MODULES, ids=VALUE_BASED)
def value_script(request):
    return request.param


@pytest.fixture(params=MODULES + VALUE_MODULES, ids=SCRIPTS + VALUE_BASED)
def module(request):
    return request.param


@pytest.fixture
def mdp():
    return small_mdp()


def varied(policy):
    """`policy` with random numbers in its last layer, which is 0 at first."""
    policy.network[-1].reset_parameters()
    return policy


@pytest.fixture
def policy():
    """One for the states and actions of `mdp`."""
    torch.manual_seed(0)
    return varied(pg_baseline.Policy(2, 2, discrete=True)).double()


@pytest.fixture(params=[scalar_lqr, planar_lqr], ids=["one action", "two actions"])
def lqr(request):
    return request.param()


class Call(NamedTuple):
    args: tuple
    result: Any


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) is the list of all later calls of owner.name."""

    def install(owner, name):
        calls, original = [], getattr(owner, name)

        def record(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(Call(args, result))
            return result

        monkeypatch.setattr(owner, name, record)
        return calls

    return install


@pytest.fixture
def learning_rates(monkeypatch):
    """The learning rates of all later steps of Adam."""
    rates, step = [], torch.optim.Adam.step

    def record(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    return rates


@pytest.fixture
def record(monkeypatch, spy):
    """record(module, **settings) trains, and is what each call of policy_loss was given.

    A call is a dict: the three arguments, the batch that they come from, and copies of the networks
    as they were then.
    """

    def run(module, **settings):
        names = [name for name in ("Policy", "ValueNetwork") if hasattr(module, name)]
        made = {name: spy(module, name) for name in names}
        rollouts, calls, policy_loss = spy(module, "rollout"), [], module.policy_loss

        def record_call(log_probs, psi, mask):
            call = {"log_probs": log_probs.detach(), "psi": psi.detach(), "mask": mask}
            call["batch"] = rollouts[-1].result
            for name, networks in made.items():
                call[name] = copy.deepcopy(networks[-1].result)
            calls.append(call)
            return policy_loss(log_probs, psi, mask)

        monkeypatch.setattr(module, "policy_loss", record_call)
        module.train(module.Args(**{**TINY, **settings}))
        assert len(calls) > 2
        return calls

    return run


def check_log_probs_and_mask(call):
    """The log-probs of a recorded call are those of its policy; the mask is that of its batch."""
    batch, policy = call["batch"], call["Policy"]
    torch.testing.assert_close(call["log_probs"], policy(batch.obs).log_prob(batch.actions))
    assert torch.equal(call["mask"], batch.mask)


@pytest.fixture
def filled_buffer(monkeypatch):
    """filled_buffer(module, env_id, **settings) is the replay buffer after a short run."""

    def run(module, env_id, **settings):
        made, init = [], module.ReplayBuffer.__init__

        def record(self, *args):
            init(self, *args)
            made.append(self)

        monkeypatch.setattr(module.ReplayBuffer, "__init__", record)
        module.train(module.Args(env_id=env_id, **{**VALUE_TINY, **settings}))
        return made[0]

    return run


def same_picture(path, drawn):
    """Whether two PNGs differ in less than a thousandth of their pixels, as fonts may."""
    old, new = (np.asarray(Image.open(x).convert("L"), dtype=int) for x in (path, drawn))
    return old.shape == new.shape and (abs(old - new) > 64).mean() < 0.001
