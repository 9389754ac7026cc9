"""Env steps a second of one environment after another (sync) and of a process for each (async).

python -m benchmark.vectorization --env-id Humanoid-v5
"""

import time
from dataclasses import dataclass

import numpy as np
import tyro

from ddpg_continuous import make_envs


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # one with Box actions
    num_envs: int = 8
    steps: int = 200  # of each env in a measurement
    repeats: int = 6  # measurements, the two modes in turn


def main(args: Args) -> None:
    modes = ("sync", "async")
    envs = {mode: make_envs(args.env_id, args.num_envs, vectorization_mode=mode) for mode in modes}
    actions = np.zeros((args.num_envs, *envs["sync"].single_action_space.shape), np.float32)
    for mode in modes:
        envs[mode].reset(seed=1)
    for _ in range(args.repeats):
        for mode in modes:
            start = time.perf_counter()
            for _ in range(args.steps):
                envs[mode].step(actions)
            speed = args.steps * args.num_envs / (time.perf_counter() - start)
            print(f"{mode} {speed:.0f}", end="  ")
        print()
    for mode in modes:
        envs[mode].close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
