"""Tests of make_envs: what the networks see of an env, and what an env sees of the actions."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, VALUE_MODULES
from envs import FLATTENED, REFUSED, UNEVEN, box, counting, env_actions, spec
from gymnasium.spaces import Box, Discrete, flatten

import dqn

DISCRETE = [*MODULES, dqn]
CONTINUOUS = [module for module in MODULES + VALUE_MODULES if module is not dqn]
ACTIONS = {module: Discrete(2) if module is dqn else UNEVEN for module in MODULES + VALUE_MODULES}


# Actions


@pytest.mark.parametrize("module", CONTINUOUS)
def test_actions_are_scaled_to_a_lopsided_box_and_clipped(module):
    actions = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [0.5, -0.5], [-7.0, 7.0], [7.0, -7.0]])
    expected = torch.tensor([[-1.0, 10.0], [1.0, 5.0], [2.0, 2.5], [-1.0, 10.0], [3.0, 0.0]])
    seen = env_actions(module, actions, UNEVEN)
    assert torch.equal(seen, expected) and seen.dtype == torch.float32


@pytest.mark.parametrize("module", CONTINUOUS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_rounding_leaves_the_box(module, dtype):
    """In float32, (0.1 - -1) + -1 is more than 0.1."""
    space = Box(-1.0, 0.1, (1,), dtype)
    seen = env_actions(module, torch.tensor([[1.0], [9.0], [-9.0]]), space).numpy()
    assert all(space.contains(action) for action in seen)


@pytest.mark.parametrize("module", DISCRETE)
def test_discrete_actions_are_counted_from_where_the_space_starts(module):
    for start in (3, -1):
        seen = env_actions(module, torch.tensor([0, 1, 2]), Discrete(3, start=start))
        assert seen.tolist() == [start, start + 1, start + 2]


@pytest.mark.parametrize("module", CONTINUOUS)
def test_a_step_takes_normalised_actions(module):
    """The first reward of the counting env is the sum of the action that it sees."""
    envs = module.make_envs("CountingBox-v0", 2)
    envs.reset(seed=1)
    _, rewards, *_ = envs.step(np.array([[1.0, -1.0], [0.0, 0.0]], np.float32))
    assert rewards.tolist() == [3 + 0, 1 + 5]


@pytest.mark.parametrize("module", DISCRETE)
def test_a_step_takes_actions_counted_from_0(module):
    envs = module.make_envs("Counting-v0", 2)
    envs.reset(seed=1)
    _, rewards, *_ = envs.step(np.array([0, 1]))
    assert rewards.tolist() == [1, 2]


@pytest.mark.parametrize("env_id", REFUSED)
def test_other_actions_are_refused_by_name(module, env_id):
    with pytest.raises(gym.error.Error) as error:
        module.make_envs(f"envs:{env_id}", 2)
    message = str(error.value)
    assert f"--env-id envs:{env_id}" in message and str(REFUSED[env_id]) in message


@pytest.mark.parametrize("module", VALUE_MODULES)
def test_a_value_based_script_refuses_the_actions_of_the_others(module):
    env_id = "CountingBox-v0" if module is dqn else "Counting-v0"
    with pytest.raises(gym.error.Error, match=f"--env-id {env_id}: .* is not"):
        module.make_envs(env_id, 2)


# Observations


@pytest.mark.parametrize("kind", FLATTENED)
def test_observations_are_flattened(module, kind):
    space, length = FLATTENED[kind]
    envs = module.make_envs(spec(space, ACTIONS[module]), 3)
    assert envs.single_observation_space.shape == (length,)
    obs, _ = envs.reset(seed=1)
    actions = np.zeros(3, int) if module is dqn else np.zeros((3, 2), "f4")
    for _ in range(2):
        assert obs.shape == (3, length)
        for env, row in zip(envs.unwrapped.envs, obs):
            np.testing.assert_array_equal(row, flatten(space, env.unwrapped.last))
        obs, *_ = envs.step(actions)


def test_vectors_are_left_as_they_are(module):
    """No wrapper but that of the actions, which costs time in every step."""
    envs = module.make_envs(spec(box(2), ACTIONS[module]), 3)
    assert envs.env is envs.unwrapped and envs.single_observation_space == box(2)
    if module in DISCRETE:  # Gymnasium has a fast one
        envs = module.make_envs("CartPole-v1", 3)
        assert envs.env is envs.unwrapped and type(envs.env).__name__ == "CartPoleVectorEnv"


# Settings


def ends(module, *arguments, **settings):
    """The first step in which an env of two ends, and whether it is by truncation."""
    envs = module.make_envs(*arguments, **settings)
    assert envs.num_envs == 2
    envs.reset(seed=1)
    actions = np.zeros(envs.action_space.shape, int if module is dqn else "f4")
    for t in range(1, 99):
        _, _, terminations, truncations, _ = envs.step(actions)
        if (terminations | truncations).any():
            return t, bool(truncations.any())


def test_env_kwargs_reach_the_env(module):
    env_id = counting(module)
    assert not ends(module, env_id, 2)[1]
    assert ends(module, env_id, 2, '{"truncates": true}')[1]
    assert ends(module, env_id, 2, truncates=True)[1]
    endless = f"Endless{'' if module is dqn else 'Box'}-v0"
    assert ends(module, endless, 2) == (30, True)
    assert ends(module, endless, 2, '{"max_episode_steps": 7}') == (7, True)
