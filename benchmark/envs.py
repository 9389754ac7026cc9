"""Environments that have to be registered by a call: --env-id benchmark.envs:MinAtar/Breakout-v1."""

import minatar.gym

minatar.gym.register_envs()
