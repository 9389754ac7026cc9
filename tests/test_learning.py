"""Each script solves its default environment with its default settings."""

import pytest


@pytest.mark.slow
def test_solves_cartpole(script):
    returns = script.train(script.Args(wandb_mode="disabled"))
    assert returns.mean() >= 475


@pytest.mark.slow
def test_value_based_scripts_solve_theirs(value_script):
    args = value_script.Args(wandb_mode="disabled")
    solved = {"CartPole-v1": 475, "Pendulum-v1": -165}
    assert value_script.train(args).mean() >= solved[args.env_id]
