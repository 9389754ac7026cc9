"""Tests of make_envs: what the networks see of an env, and what an env sees of the actions."""

import importlib
import multiprocessing

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODULES, VALUE_MODULES
from envs import (
    FLATTENED,
    NO_VECTORS,
    REFUSED,
    TOO_WIDE,
    UNEVEN,
    Counted,
    box,
    counting,
    env_actions,
    spec,
)
from gymnasium.spaces import Box, Discrete, flatten
from gymnasium.vector import AutoresetMode

import dqn
import naf
import reinforce

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
def test_no_action_leaves_the_box_whatever_the_network_says(module):
    """A network that has seen a nan says nan; the check of its weights will stop the run."""
    actions = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])
    whole = env_actions(module, actions, Box(-2, 7, (1,), np.int64))
    assert whole.flatten().tolist() == [2, 7, -2]
    assert env_actions(module, actions, Box(-1.0, 1.0, (1,))).flatten().tolist() == [0, 1, -1]


@pytest.mark.parametrize("module", CONTINUOUS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_rounding_leaves_the_box(module, dtype):
    """In float32, (0.1 - -1) + -1 is more than 0.1."""
    space = Box(-1.0, 0.1, (1,), dtype)
    seen = env_actions(module, torch.tensor([[1.0], [9.0], [-9.0]]), space).numpy()
    assert all(space.contains(action) for action in seen)


# lows, highs, type, and where the actions -1, 0 and 1 go
BOXES = [
    (-100, 100, "int8", [-100, 0, 100]),
    (-128, 127, "int8", [-128, 0, 127]),
    (0, 255, "uint8", [0, 128, 255]),
    (-5, 8, "int64", [-5, 2, 8]),
    (-(2**31), 2**31 - 1, "int32", [-(2**31), 0, 2**31 - 1]),
    (-6e4, 6e4, "float16", [-6e4, 0, 6e4]),
    (-3e38, 3e38, "float32", [-3e38, 0, 3e38]),
    (-1e308, 1e308, "float64", [-1e308, 0, 1e308]),
    (1e308, 1.7e308, "float64", [1e308, 1.35e308, 1.7e308]),
    (0.1, 0.3, "float32", [0.1, 0.2, 0.3]),
]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("module", [reinforce, naf])
@pytest.mark.parametrize(("low", "high", "dtype", "expected"), BOXES)
def test_every_bounded_box_gets_actions_of_its_own(module, low, high, dtype, expected):
    """In its type, an integer one to the nearest number; what is far outside to the bounds."""
    space = Box(low, high, (1,), dtype)
    scaled = module.make_envs(spec(box(2), space), 1).func
    seen = [scaled(np.array([[a]], np.float32))[0] for a in (-1, 0, 1, -1e30, 1e30, -9, 9)]
    assert all(space.contains(action) and action.dtype == dtype for action in seen)
    ends = [expected[0], expected[2]] * 2
    np.testing.assert_allclose(np.concatenate(seen), expected + ends, rtol=1e-3)


@pytest.mark.parametrize("module", [reinforce, dqn])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_discrete_actions_are_of_the_type_of_their_space(module, dtype):
    space = Discrete(3, dtype=np.dtype(dtype).type, start=-1)
    seen = module.make_envs(spec(box(2), space), 3).func(np.arange(3))
    assert seen.tolist() == [-1, 0, 1] and all(space.contains(action) for action in seen)


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
    assert "gymnasium.wrappers.TransformAction" in message and "\n" not in message
    assert hasattr(gym.wrappers, "TransformAction")


@pytest.mark.parametrize("module", VALUE_MODULES)
def test_a_value_based_script_refuses_the_actions_of_the_others(module):
    """And names one that takes them."""
    env_id = "CountingBox-v0" if module is dqn else "Counting-v0"
    with pytest.raises(gym.error.Error, match=f"--env-id {env_id}: .* is not") as error:
        module.make_envs(env_id, 2)
    other = "ddpg_continuous.py" if module is dqn else "dqn.py"
    assert other in str(error.value)
    importlib.import_module(other[:-3]).make_envs(env_id, 2)


# Resets


@pytest.mark.filterwarnings("ignore:.*AutoresetMode metadata")
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED, None])
def test_a_vector_env_must_reset_in_the_step_after_the_last(module, mode):
    with pytest.raises(gym.error.Error, match=f"--env-id envs:Chain-v0: .*{mode}") as error:
        module.make_envs("envs:Chain-v0", 2, mode=mode)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_nor_may_env_kwargs_say_otherwise(module, mode):
    with pytest.raises(gym.error.Error, match=AutoresetMode(mode).name):
        module.make_envs(counting(module), 2, vector_kwargs={"autoreset_mode": mode})


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


@pytest.mark.parametrize("kind", NO_VECTORS)
def test_observations_of_no_fixed_length_are_refused(module, kind):
    with pytest.raises(gym.error.Error, match="--env-id .* flattened") as error:
        module.make_envs(spec(NO_VECTORS[kind], ACTIONS[module]), 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("width", TOO_WIDE)
def test_observations_of_too_many_numbers_are_refused(module, width):
    with pytest.raises(gym.error.Error, match=rf"\b{width} inputs.*10,000") as error:
        module.make_envs(spec(TOO_WIDE[width], ACTIONS[module]), 2)
    assert "\n" not in str(error.value)
    module.make_envs(spec(box(10_000), ACTIONS[module]), 2)


# How many are open

TINY = {"total_timesteps": 40, "num_envs": 1, "eval_episodes": 1, "wandb_mode": "disabled"}


def settings(module, **changes):
    """Those of a run of one env at a time."""
    own = {"learning_starts": 20, "batch_size": 4} if module in VALUE_MODULES else {}
    return module.Args(**TINY | own | {"env_id": counting(module, "Counted")} | changes)


@pytest.fixture
def count():
    """The class that counts, from 0."""
    Counted.open = Counted.most = 0
    return Counted


def test_one_env_at_a_time_will_do(module, count):
    module.train(settings(module))
    assert (count.open, count.most) == (0, 1)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # in which the processes report
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_no_env_is_open_after_a_run_that_broke(module, count, mode):
    """Nor a process of one, once the exception is gone."""
    own = {"num_envs": 3, "vectorization_mode": mode, "env_kwargs": '{"breaks": true}'}
    try:
        module.train(settings(module, **own))
        pytest.fail("it did not break")
    except ZeroDivisionError:
        pass
    assert count.open == 0
    assert count.most == (3 if mode == "sync" else 1)  # that which tells the spaces
    assert multiprocessing.active_children() == []


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
    assert ends(module, env_id, 2, truncates=True)[1]
    endless = f"Endless{'' if module is dqn else 'Box'}-v0"
    assert ends(module, endless, 2) == (30, True)
    assert ends(module, endless, 2, max_episode_steps=7) == (7, True)
