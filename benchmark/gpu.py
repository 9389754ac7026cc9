"""Steps/s of the default settings on a CPU and on a GPU, and of DDPG with large networks.

python -m benchmark.gpu
"""

from dataclasses import dataclass
from typing import Literal

import tyro

import cem_q
import ddpg_continuous
import dqn
import naf
import offpolicy_pg
import pg_baseline
import reinforce
from benchmark.speed import Actor, Critic, steps_per_second

# env steps: enough for a few seconds
POLICY_GRADIENT = {reinforce: 100_000, pg_baseline: 100_000, offpolicy_pg: 100_000}
VALUE_BASED = {dqn: 30_000, ddpg_continuous: 6_000, naf: 6_000, cem_q: 6_000}


@dataclass
class Args:
    repeats: int = 2
    device: Literal["cpu", "cuda"] = "cuda"  # cpu shows what would be run
    steps: int = 0  # env steps of each run, if other than the above


def measure(name: str, module, **settings) -> None:
    speed = steps_per_second(module, wandb_mode="disabled", **settings)
    print(f"{module.__name__}.py, {name}: {speed:,.0f} steps/s")


def main(args: Args) -> None:
    graphs = {module: module.Graph for module in VALUE_BASED}
    for _ in range(args.repeats):
        for module, steps in (POLICY_GRADIENT | VALUE_BASED).items():
            settings = {"total_timesteps": args.steps or steps}
            measure("CPU", module, device="cpu", **settings)
            if module in graphs:
                measure("GPU", module, device=args.device, **settings)
                module.Graph = lambda function: function
            measure("GPU, a launch for each kernel", module, device=args.device, **settings)
            if module in graphs:
                module.Graph = graphs[module]

    # an update of both networks, 256 units twice, on 256 transitions in every env step
    ddpg_continuous.Actor, ddpg_continuous.QNetwork = Actor, Critic
    large = {"env_id": "HalfCheetah-v5", "batch_size": 256, "buffer_size": 1_000_000}

    def measure_large(name: str, steps: int, num_envs: int, **settings) -> None:
        settings |= {"num_envs": num_envs, "num_updates": num_envs, "learning_starts": num_envs}
        measure(name, ddpg_continuous, total_timesteps=args.steps or steps, **large, **settings)

    for threads in (1, 8):
        measure_large(f"large, CPU, {threads} threads", 1_000, 8, device="cpu", num_threads=threads)
    measure_large("large, GPU", 20_000, 8, device=args.device)
    measure_large("large, GPU, one env", 6_000, 1, device=args.device)
    ddpg_continuous.Graph = lambda function: function
    measure_large("large, GPU, a launch for each kernel", 3_000, 8, device=args.device)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
