"""Steps/s of dqn.py and ddpg_continuous.py at the network, batch and updates a step of CleanRL's.

python -m benchmark.speed

Beside CleanRL's own scripts, unchanged, in turn:

git clone https://github.com/vwxyzjn/cleanrl
python -m venv peer && peer/bin/pip install -r benchmark/peers/cleanrl.txt
python -m benchmark.speed --cleanrl cleanrl --python peer/bin/python
"""

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn
from tqdm import tqdm

import ddpg_continuous
import dqn


@dataclass
class Args:
    repeats: int = 3
    cleanrl: str = ""  # path of a clone
    python: str = "peer/bin/python"  # that of the environment with CleanRL's requirements


class QNetwork(nn.Sequential):
    """That of CleanRL's dqn.py."""

    def __init__(self, obs_dim, num_actions, dueling):
        hidden = [nn.Linear(obs_dim, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(84, num_actions))


def mlp(in_dim, out_dim):
    hidden = [nn.Linear(in_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(256, out_dim))


class Actor(nn.Sequential):
    """That of CleanRL's ddpg_continuous_action.py, as is Critic."""

    def __init__(self, obs_dim, action_dim):
        super().__init__(mlp(obs_dim, action_dim), nn.Tanh())


class Critic(ddpg_continuous.QNetwork):
    def __init__(self, obs_dim, action_dim):
        nn.Sequential.__init__(self, mlp(obs_dim + action_dim, 1))


class Stopwatch(tqdm):
    """The bar of `train`, which also keeps the time of the first step and that of the last."""

    def __init__(self, **settings):
        Stopwatch.times = [time.perf_counter()]
        super().__init__(**settings)

    def set_postfix_str(self, text):
        super().set_postfix_str(text)
        if text == "evaluation":
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            Stopwatch.times.append(time.perf_counter())
            Stopwatch.steps = self.n


def steps_per_second(module, **settings):
    """From the first step to the last, the log included and, as in CleanRL, the start-up not."""
    module.tqdm = Stopwatch
    module.train(module.Args(**settings, eval_episodes=1))
    first, last = Stopwatch.times
    return Stopwatch.steps / (last - first)


def cleanrl(args, script, *flags):
    """What the script says at its end; it counts from its first step."""
    command = [Path(args.python).absolute(), f"cleanrl/{script}", "--no-cuda", *flags]
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "check": True}
    output = subprocess.run(command, cwd=args.cleanrl, env=environment, **pipes).stdout
    return int(re.findall(r"SPS: (\d+)", output)[-1])


def main(args):
    dqn.QNetwork, ddpg_continuous.Actor, ddpg_continuous.QNetwork = QNetwork, Actor, Critic
    for _ in range(args.repeats):  # one update every 10 env steps; one every step
        settings = {"buffer_size": 10_000, "learning_starts": 10_000, "batch_size": 128}
        settings |= {"total_timesteps": 60_000, "num_envs": 60, "num_updates": 6, "device": "cpu"}
        print(f"dqn.py: {steps_per_second(dqn, **settings):,.0f} steps/s")
        if args.cleanrl:
            speed = cleanrl(args, "dqn.py", "--total-timesteps", "60000")
            print(f"CleanRL's dqn.py: {speed:,} steps/s")
        settings = {"learning_starts": 100, "batch_size": 256, "total_timesteps": 4_000}
        settings |= {"num_envs": 8, "num_updates": 8, "device": "cpu"}
        print(f"ddpg_continuous.py: {steps_per_second(ddpg_continuous, **settings):,.0f} steps/s")
        if args.cleanrl:
            flags = ["--env-id", "Pendulum-v1", "--learning-starts", "100"]
            flags += ["--total-timesteps", "4000", "--policy-frequency", "1"]
            speed = cleanrl(args, "ddpg_continuous_action.py", *flags)
            print(f"CleanRL's ddpg_continuous_action.py: {speed:,} steps/s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
