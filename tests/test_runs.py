"""Seeds, bad input, and runs that go wrong."""

import pytest
import torch
import tyro
from conftest import SCRIPTS, run
from envs import REFUSED


def parameters(script, tmp_path, monkeypatch, name, **settings):
    """Final policy of a short run in a directory of its own."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    settings = {"total_timesteps": 400, "num_envs": 4, "eval_episodes": 5, **settings}
    returns = script.train(script.Args(wandb_mode="disabled", **settings))
    (path,) = (tmp_path / name).glob("runs/*/checkpoint.pt")
    return torch.load(path, weights_only=True)["policy"], returns


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_run_bit_for_bit(script, tmp_path, monkeypatch, env_id):
    torch.manual_seed(77)
    one, returns = parameters(script, tmp_path, monkeypatch, "one", env_id=env_id, seed=5)
    torch.manual_seed(78)
    two, again = parameters(script, tmp_path, monkeypatch, "two", env_id=env_id, seed=5)
    other, _ = parameters(script, tmp_path, monkeypatch, "other", env_id=env_id, seed=6)
    assert torch.equal(returns, again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name != "log_std")


def test_all_runs_are_evaluated_from_the_same_states(script, monkeypatch):
    starts = []
    rollout = script.rollout

    def spy(*args, **kwargs):
        starts.append(rollout(*args, **kwargs).obs[:, 0])
        return rollout(*args, **kwargs)

    monkeypatch.setattr(script, "rollout", spy)
    for _ in range(2):
        script.evaluate(script.Policy(4, 2, True), "CartPole-v1", 3)
    assert torch.equal(*starts) and len(starts[0].unique(dim=0)) == 3


BAD = {
    "unknown env": (["--env-id", "NoSuchEnv-v0"], "NoSuchEnv"),
    "unknown version": (["--env-id", "CartPole-v99"], "v99"),
    "malformed id": (["--env-id", "what is this"], "what is this"),
    "no such module": (["--env-id", "nosuchmodule:Env-v0"], "nosuchmodule"),
    "two colons": (["--env-id", "a:b:c"], "unpack"),
    "no gamma": (["--gamma", "1.5"], "--gamma"),
    "negative rate": (["--learning-rate", "-0.1"], "--learning-rate"),
    "nan": (["--learning-rate", "nan"], "--learning-rate"),
    "infinite": (["--learning-rate", "inf"], "--learning-rate"),
    "no envs": (["--num-envs", "0"], "--num-envs"),
    "negative envs": (["--num-envs", "-3"], "--num-envs"),
    "no steps": (["--total-timesteps", "0"], "--total-timesteps"),
    "no threads": (["--num-threads", "0"], "--num-threads"),
    "no episodes": (["--eval-episodes", "0"], "--eval-episodes"),
    "no checkpoints": (["--checkpoint-frequency", "0"], "--checkpoint-frequency"),
    "not a number": (["--num-envs", "many"], "--num-envs"),
    "not a whole number": (["--num-envs", "1.5"], "--num-envs"),
    "not a device": (["--device", "tpu"], "--device"),
    "not a mode": (["--wandb-mode", "on"], "--wandb-mode"),
    "unknown flag": (["--learning-rat", "1"], "--learning-rat"),
    "stray word": (["CartPole-v1"], "CartPole-v1"),
} | {
    env_id: (["--env-id", f"envs:{env_id}"], text)
    for env_id, text in zip(REFUSED, ["1-D", "1-D", "1-D", "Discrete", "Discrete", "Discrete"])
}
if not torch.cuda.is_available():
    BAD["no cuda"] = (["--device", "cuda"], "--device cuda")


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_message_and_exit_code_2(script, tmp_path, capsys, kind):
    flags, text = BAD[kind]
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.Args, args=flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert text in out + err and "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_settings_from_python_are_checked_by_the_type_of_their_field(script):
    assert script.Args(gamma=1).gamma == 1 and script.Args(learning_rate=0).learning_rate == 0
    with pytest.raises(ValueError, match="--gamma"):
        script.Args(gamma=2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_input_from_a_shell(name, tmp_path):
    result = run(name, "--env-id", "envs:DictObs-v0", cwd=tmp_path)
    assert result.returncode == 2
    assert "FlattenObservation" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_env_of_the_users_own(name, tmp_path):
    flags = ["--env-id", "envs:CountingBox-v0", "--total-timesteps", 50, "--num-envs", 2]
    result = run(name, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"envs-CountingBox-v0__{name}__1__")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    script, tmp_path, monkeypatch
):
    calls, policy_loss = [], script.policy_loss

    def breaks_later(*args):
        calls.append(1)
        return policy_loss(*args) * (float("nan") if len(calls) > 60 else 1.0)

    monkeypatch.setattr(script, "policy_loss", breaks_later)
    args = script.Args(num_envs=2, total_timesteps=100_000, checkpoint_frequency=1)
    args.wandb_mode = "disabled"
    with pytest.raises(FloatingPointError, match="step"):
        script.train(args)
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    policy = torch.load(path, weights_only=True)["policy"]
    assert all(parameter.isfinite().all() for parameter in policy.values())


def test_a_save_that_dies_half_way_leaves_the_old_checkpoint(script, tmp_path, monkeypatch):
    args, modules = script.Args(), {"policy": script.Policy(4, 2, True)}
    script.save_checkpoint(tmp_path, args, 7, modules)

    def dies(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        script.save_checkpoint(tmp_path, args, 8, modules)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["global_step"] == 7
