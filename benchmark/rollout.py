"""Speed of `rollout` beside a loop of nothing but `envs.step` and the policy's forward pass.

python -m benchmark.rollout --num-envs 64
"""

import time
from dataclasses import dataclass

import torch
import tyro

from reinforce import Policy, make_envs, rollout


@dataclass
class Args:
    num_envs: int = 64
    repeats: int = 15


def bare(envs, policy, steps):
    """`steps` vector steps that keep nothing; actions are all drawn before the clock starts."""
    actions = torch.randint(2, (steps, envs.num_envs)).numpy()
    obs, _ = envs.reset(seed=1)
    start = time.perf_counter()
    with torch.no_grad():
        for action in actions:
            policy(torch.tensor(obs, dtype=torch.float32))
            obs, *_ = envs.step(action)
    return time.perf_counter() - start


def main(args):
    """Alternates the two, so that a busy machine slows both, and prints medians."""
    torch.set_num_threads(1)
    envs, policy = make_envs("CartPole-v1", args.num_envs), Policy(4, 2, True)
    with torch.no_grad():  # a linear controller that balances, so that all episodes last
        for parameter in policy.parameters():
            parameter.zero_()
        policy.network[0].weight[0] = torch.tensor([0.05, 0.1, 1.0, 0.5])
        policy.network[-1].weight[1, 0], policy.network[-1].weight[0, 0] = 100.0, -100.0
    ours, floor = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        mask = rollout(envs, policy).mask
        ours.append((time.perf_counter() - start) / mask.shape[1])
        floor.append(bare(envs, policy, mask.shape[1]) / mask.shape[1])
    ours, floor = (sorted(times)[len(times) // 2] for times in (ours, floor))
    live = int(mask.sum()) / mask.numel()
    print(f"{args.num_envs * live / ours:,.0f} env steps/s ({live:.0%} of the rows live)")
    print(f"{ours * 1e6:.0f} µs a vector step, {ours / floor:.2f} times step and forward alone")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
