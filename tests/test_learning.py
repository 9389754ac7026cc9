"""Each script solves its default environment with its default settings, seed for seed."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_solves_cartpole(script, seed):
    returns = script.train(script.Args(seed=seed, wandb_mode="disabled"))
    assert returns.mean() >= 475


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_value_based_scripts_solve_theirs(value_script, seed):
    args = value_script.Args(seed=seed, wandb_mode="disabled")
    solved = {"CartPole-v1": 475, "Pendulum-v1": -165}
    assert value_script.train(args).mean() >= solved[args.env_id]
