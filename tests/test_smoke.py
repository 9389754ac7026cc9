"""Every script, every option of every flag: an update happened and the checkpoint loads."""

import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INERT, MODULES, ROOT, TINY, VALUE_MODULES, VALUE_TINY, options

import cem_q
import ddpg_continuous
import dqn
import offpolicy_pg
import reinforce
from benchmark.logs import records

SETTINGS = dict.fromkeys(MODULES, TINY)
VALUE_SETTINGS = {**VALUE_TINY, "total_timesteps": 200, "learning_starts": 60}
SETTINGS |= dict.fromkeys(VALUE_MODULES, VALUE_SETTINGS)
SETTINGS[dqn] = {**VALUE_SETTINGS, "target_network_frequency": 20}  # or no copy comes
CASES = [(m, name, value) for m, tiny in SETTINGS.items() for name, value in options(m, tiny)]
# what a flag needs to matter
NEEDS = {"alpha": {"prioritized_replay": True}, "beta": {"prioritized_replay": True}}
NEEDS |= {"bins": {"maximizer": "grid"}}
# in a checkpoint: the copy of a network, and its optimizer if that is not "optimizer"
TARGET = {"actor": "target_actor", "q_network": "target_network"}
ADAM = {"actor": "actor_optimizer", "value_network": "value_optimizer"}
DEFAULTS = {}  # the checkpoint of each script and the settings that a flag needs


def trained(module, **settings):
    """The checkpoint of a short run, after checking that every part of it learned."""
    args = module.Args(**{**SETTINGS[module], **settings})
    returns = module.train(args)
    assert returns.shape == (args.eval_episodes,) and returns.isfinite().all()
    (path,) = Path("runs").glob("*/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["args"] == vars(args)
    assert checkpoint["global_step"] >= args.total_timesteps
    networks = {"policy", "value_network", "q_network", "actor"} & checkpoint.keys()
    for name in networks:
        assert all(value.isfinite().all() for value in checkpoint[name].values())
        if not settings.get("tabular"):  # whose SGD keeps no state
            state = checkpoint[ADAM.get(name, "optimizer")]["state"]
            learned = [x for x in checkpoint[name] if not x.endswith(("count", "mean", "var"))]
            assert len(state) == len(learned)
            assert len({int(each["step"]) for each in state.values()}) == 1  # all in each update
            moved = [bool(each["exp_avg"].ne(0).any()) for each in state.values()]  # by a gradient
            first = name == "policy" and int(state[0]["step"]) == 1  # its last layer is 0 then
            assert any(moved) if first else all(moved)
    if module in VALUE_MODULES:
        assert int(checkpoint["buffer"]["count"]) == checkpoint["global_step"]
        for name in networks:
            assert checkpoint[name].keys() == checkpoint[TARGET[name]].keys()
    return checkpoint


def learned(module, checkpoint):
    """The network that acts."""
    return checkpoint["q_network" if module in VALUE_MODULES else "policy"]


def default(module, tmp_path_factory, **needs):
    """What the script learns when no flag is set but those that another one needs."""
    key = (module, *needs.items())
    if key not in DEFAULTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("default"))
            DEFAULTS[key] = learned(module, trained(module, **needs))
    return DEFAULTS[key]


@pytest.mark.parametrize(
    ("module", "name", "value"), CASES, ids=[f"{m.__name__}-{n}-{v}" for m, n, v in CASES]
)
def test_every_option(module, name, value, tmp_path_factory, monkeypatch):
    """No flag is dead: those that are not about the machine or the log change what is learned."""
    threads = []  # only noted: two threads on a busy machine wait for each other
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    value = 2 if name == "bins" else value  # 1 is refused
    needs = NEEDS.get(name, {})
    small = {"num_samples": {"num_elites": 1}}.get(name, {})
    other = learned(module, trained(module, **{**needs, **small, name: value}))
    assert threads == [value if name == "num_threads" else 1]
    used = getattr(module.Args(), name), SETTINGS[module].get(name)
    if name not in INERT and value not in used:
        before = default(module, tmp_path_factory, **needs)
        assert before.keys() != other.keys() or any(
            before[key].shape != other[key].shape or not torch.equal(before[key], other[key])
            for key in before
        )


def test_observations_of_several_parts(module):
    """A Dict of a vector and a number from 0 to 2: 5 inputs."""
    env_id = "envs:DictObs-v0" if module in [*MODULES, dqn] else "envs:DictObsBox-v0"
    network = learned(module, trained(module, env_id=env_id))
    first = next(value for value in network.values() if value.dim() == 2)
    assert first.shape[1] == (7 if module in (cem_q, ddpg_continuous) else 5)  # and two actions


@pytest.mark.parametrize("estimator", ["trajectory", "causal", "per_decision", "per_step"])
def test_offpolicy_without_a_baseline(estimator):
    trained(offpolicy_pg, estimator=estimator, baseline="none")


def test_all_extensions_together():
    trained(dqn, double_q=True, dueling=True, prioritized_replay=True)


def test_continuous_actions(script):
    checkpoint = trained(script, env_id="Pendulum-v1")
    assert "log_std" in checkpoint["policy"]


def test_one_env(module):
    trained(module, num_envs=1)


FIRST = [reinforce, dqn]
OTHERS = [module for module in MODULES + VALUE_MODULES if module not in FIRST]
SLOW = [pytest.param(module, marks=pytest.mark.slow) for module in OTHERS]


@pytest.mark.parametrize("module", FIRST + SLOW)
def test_copied_elsewhere_a_script_runs_alone(module, tmp_path):
    """As a user starts it, and without what is beside it here."""
    name = f"{module.__name__}.py"
    shutil.copy(ROOT / name, tmp_path)
    flags = ["--total-timesteps", "300", "--num-envs", "4", "--eval-episodes", "2"]
    flags += ["--learning-starts", "100"] if module in VALUE_MODULES else []
    command = [sys.executable, "-I", name, *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "greedy return" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"{module.Args().env_id}__{module.__name__}__1__")
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] >= 300
    assert list(run_dir.glob("*.tmp")) == []


def test_help_shows_the_equations_and_every_flag(module, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(module.__file__, run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    text = capsys.readouterr().out
    assert "(1)" in text and "(5)" in text
    assert all(f"--{name.replace('_', '-')}" in text for name in vars(module.Args()))


def test_train_closes_the_envs_before_it_makes_those_of_the_evaluation(module, monkeypatch):
    done, make_envs = [], module.make_envs

    def record(*args, **kwargs):
        vector_env = make_envs(*args, **kwargs)
        done.append((*args, kwargs["max_episode_steps"]))
        vector_env.close = lambda: done.append("closed")
        return vector_env

    monkeypatch.setattr(module, "make_envs", record)
    args = module.Args(**SETTINGS[module], env_kwargs='{"max_episode_steps": 9}')
    module.train(args)
    training, evaluation = [(args.env_id, n, 9) for n in (args.num_envs, args.eval_episodes)]
    assert done == [training, "closed", evaluation, "closed"]


def test_metrics_reach_wandb(script, tmp_path):
    trained(script, wandb_mode="offline")
    (directory,) = tmp_path.glob("runs/*/wandb/offline-run-*")
    logged = keys(records(directory))
    charts = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    own = {
        "reinforce": set(),
        "pg_baseline": {f"variance/{b}" for b in ("none", "average", "value", "optimal")},
        "offpolicy_pg": {"weights/effective_fraction", "weights/largest", "losses/kl"},
    }[script.__name__]
    expected = charts | own | {"losses/policy_loss", "eval/episodic_return", "_step"}
    assert expected <= logged, expected - logged


def keys(record):
    """All strings in a JSON record that could be a metric's name."""
    if isinstance(record, dict):
        return set(record).union(*map(keys, record.values()))
    if isinstance(record, list):
        return set().union(*map(keys, record))
    return {record} if isinstance(record, str) else set()
