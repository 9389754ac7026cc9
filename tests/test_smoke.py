"""Every script, every option of every flag: an update happened and the checkpoint loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INERT, MODULES, ROOT, SCRIPTS, VALUE_BASED, options, records, run

TINY = {"total_timesteps": 300, "num_envs": 4, "eval_episodes": 3}


CASES = [(m, name, value) for m in MODULES for name, value in options(m, TINY)]


def trained(module, **settings):
    """The checkpoint of a short run, after checking that every parameter moved."""
    args = module.Args(**{"wandb_mode": "disabled", **TINY, **settings})
    returns = module.train(args)
    assert returns.shape == (args.eval_episodes,) and returns.isfinite().all()
    (path,) = Path("runs").glob("*/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["args"] == vars(args)
    assert checkpoint["global_step"] >= args.total_timesteps
    torch.manual_seed(args.seed)
    envs = module.make_envs(args.env_id, 1)
    discrete = "Discrete" in str(envs.single_action_space)
    dims = [module.flatdim(x) for x in (envs.single_observation_space, envs.single_action_space)]
    before = module.Policy(*dims, discrete).state_dict()
    assert before.keys() == checkpoint["policy"].keys()
    for name, parameter in before.items():
        assert not torch.equal(parameter, checkpoint["policy"][name]), name
    return checkpoint


@pytest.fixture(scope="session")
def default_policies(tmp_path_factory):
    """The policy that each script learns when no flag is set."""
    policies = {}
    for module in MODULES:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("default"))
            policies[module] = trained(module)["policy"]
    return policies


@pytest.mark.parametrize(
    ("module", "name", "value"), CASES, ids=[f"{m.__name__}-{n}-{v}" for m, n, v in CASES]
)
def test_every_option(module, name, value, default_policies):
    """No flag is dead: those that are not about the machine or the log change what is learned."""
    policy = trained(module, **{name: value})["policy"]
    if name not in INERT and value not in (getattr(module.Args(), name), TINY.get(name)):
        default = default_policies[module]
        assert any(not torch.equal(policy[key], default[key]) for key in default)


@pytest.mark.parametrize("estimator", ["trajectory", "causal", "per_decision", "per_step"])
def test_offpolicy_without_a_baseline(estimator):
    trained(MODULES[2], estimator=estimator, baseline="none")


def test_continuous_actions(script):
    checkpoint = trained(script, env_id="Pendulum-v1")
    assert "log_std" in checkpoint["policy"]


def test_one_env(script):
    trained(script, num_envs=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_a_user_starts_it(name, tmp_path):
    result = run(name, "--total-timesteps", 300, "--num-envs", 4, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "greedy return" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"CartPole-v1__{name}__1__")
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] >= 300
    assert [x.name for x in run_dir.glob("*.tmp")] == []


def test_metrics_reach_wandb(script, tmp_path):
    trained(script, wandb_mode="offline")
    (directory,) = tmp_path.glob("runs/*/wandb/offline-run-*")
    logged = {key for record in records(directory) for key in keys(record)}
    charts = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    own = {
        "reinforce": set(),
        "pg_baseline": {f"variance/{b}" for b in ("none", "average", "value", "optimal")},
        "offpolicy_pg": {"weights/effective_fraction", "weights/largest", "losses/kl"},
    }[script.__name__]
    expected = charts | own | {"losses/policy_loss", "eval/episodic_return", "global_step"}
    assert expected <= logged, expected - logged


def keys(record):
    """All strings in a JSON record that could be a metric's name."""
    if isinstance(record, dict):
        return set(record).union(*map(keys, record.values()))
    if isinstance(record, list):
        return set().union(*map(keys, record))
    return {record} if isinstance(record, str) else set()


@pytest.mark.parametrize("name", SCRIPTS + VALUE_BASED)
def test_copied_elsewhere_a_script_runs_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    command = [sys.executable, "-I", f"{name}.py", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "--total-timesteps" in result.stdout
