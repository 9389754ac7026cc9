"""Each script solves its default environment with its default settings, seed for seed."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_solves_cartpole(script, seed):
    returns = script.train(script.Args(seed=seed, wandb_mode="disabled"))
    assert returns.mean() >= 475
