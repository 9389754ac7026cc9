"""Environments that only a call registers: --env-id benchmark.envs:MinAtar/Breakout-v1."""

import minatar.gym

minatar.gym.register_envs()
