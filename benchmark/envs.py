"""Gymnasium's environments with the observations that a command of the README asks for.

python dqn.py --env-id benchmark.envs:OneHotFrozenLake-v1 --tabular
"""

import gymnasium as gym
from gymnasium.wrappers import FlattenObservation


def one_hot_frozen_lake():
    return FlattenObservation(gym.make("FrozenLake-v1", is_slippery=False))


gym.register("OneHotFrozenLake-v1", one_hot_frozen_lake)
