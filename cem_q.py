# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "tyro>=1.0.17", "wandb>=0.31", "tqdm>=4.60",
#     "numpy>=1.26"]
# ///
"""Q-learning with continuous actions, the max by search. Lecture: Options 1 and 2.

    a = argmax_a' Q_φ(s, a') + n,  n ← (1 - κ) n + σ 𝒩(0, I)            (1)  select_actions
    argmax_a' Q(s, a') over the box [-1, 1]^d, by --maximizer           (2)  argmax_action
    (s, a, r, s') ~ uniformly, from the last buffer_size transitions    (3)  ReplayBuffer
    y = r + γ (1 - terminated) Q_φ⁻(s', argmax_a' Q_φ⁻(s', a'))         (4)  td_target
    φ ← φ - η Σ_i (Q_φ(s_i, a_i) - y_i) ∇Q_φ(s_i, a_i),  y_i fixed      (5)  train
    φ⁻ ← τ φ + (1 - τ) φ⁻                                               (6)  update_target
    grid: the best of bins^d points                                     (7)  argmax_grid
    gradient: a ← clip(a + α ∇_a Q / |∇_a Q|), from many starts         (8)  argmax_gradient
    cem: a ~ 𝒩(m, diag v), then m and v are those of the elites         (9)  argmax_cem
    cmaes: a ~ 𝒩(m, σ² C); σ and C learn from m's steps and the elites  (10) argmax_cmaes

    N num_envs    φ q_network    φ⁻ target_network    η learning_rate    γ gamma    τ tau
    κ ou_kappa    σ exploration_noise; in (8) and (10), α and σ are step sizes of the search

(9) is the search of QT-Opt (Kalashnikov et al., 2018), (10) that of Hansen (2016) without negative
weights and h_σ. The slide's "local minimum" is a local maximum. For its "slow", see the metric
time/maximizing. With κ = 1, n is Gaussian; with less, Ornstein-Uhlenbeck noise, which lasts longer.
(5) takes Adam's step on the mean of ½ (Q - y)²; η falls linearly to 0.

    python cem_q.py --env-id Pendulum-v1
    diff cem_q.py naf.py        # next: a Q whose max is known
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
import wandb
from gymnasium.spaces import Box, flatdim
from gymnasium.wrappers import vector as wrappers
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Pendulum-v1"  # Gymnasium id; package.module:MyEnv-v0 imports your own env
    env_kwargs: str = "{}"  # JSON for the env, such as '{"max_episode_steps": 200}'
    vectorization_mode: Literal["sync", "async"] | None = None  # async: a process for each env
    seed: int = 1  # fixes the whole run, bit for bit on a CPU
    total_timesteps: int = 20_000  # env steps; the last round is completed
    num_envs: int = 8  # N, the envs stepped at once
    # where the networks and the data are; cuda if there is one
    device: Literal["cpu", "cuda", "mps"] = "cuda" if torch.cuda.is_available() else "cpu"
    num_threads: int = 1  # CPU threads; one is fastest for networks of this size
    eval_episodes: int = 100  # greedy episodes at the end, from the same starts in every run
    capture_video: bool = False  # film one more greedy episode at the end
    resume: str = ""  # checkpoint.pt to go on from; its flags, but for --device, are the defaults
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline sends nothing
    wandb_project: str = "rl-by-equation"  # project on W&B
    learning_rate: float = 3e-3  # η, the step size
    anneal_lr: bool = True  # let η fall to 0 by the end
    gamma: float = 0.98  # discount
    buffer_size: int = 50_000  # transitions that the buffer keeps
    batch_size: int = 128  # transitions in an update
    num_steps: int = 1  # steps of each env in a round, before its updates
    num_updates: int = 2  # gradient steps in a round
    learning_starts: int = 1_000  # env steps of random actions, before the first update
    tau: float = 0.02  # part of φ that φ⁻ takes over in each update; 1 is a copy
    exploration_noise: float = 0.2  # σ of what a step adds to the noise, for actions in [-1, 1]
    ou_kappa: float = 1.0  # κ; 1 is Gaussian noise, less is Ornstein-Uhlenbeck noise
    maximizer: Literal["grid", "gradient", "cem", "cmaes"] = "cem"  # the search in (2)
    bins: int = 21  # points of the grid in each dimension of the action
    num_samples: int = 32  # samples in an iteration of cem and cmaes; starts of gradient
    num_elites: int = 4  # best samples, to which cem fits its next Gaussian
    iterations: int = 2  # iterations of gradient, cem and cmaes

    def __post_init__(self) -> None:
        for field in fields(self):  # by type: counts, but for the seed, and floats in [0, 1]
            value = getattr(self, field.name)
            if value is not None and type(value) not in (bool, int, float, str):
                raise ValueError(f"--{field.name} must be of a builtin type, not {type(value)}")
            if field.type is int and field.name != "seed" and value < 1:
                raise ValueError(f"--{field.name} must be at least 1")
            if field.type is float and not 0 <= value <= 1:
                raise ValueError(f"--{field.name} must be in [0, 1]")
        if not isinstance(json.loads(self.env_kwargs), dict):
            raise ValueError("--env-kwargs must be a JSON object")
        if not getattr(torch, self.device).is_available():
            raise ValueError(f"--device {self.device} is not available here")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")
        if self.maximizer == "cem" and self.num_samples < self.num_elites:
            raise ValueError("--num-samples must be at least --num-elites")
        if self.maximizer == "cmaes" and self.num_samples < 2:
            raise ValueError("--num-samples must be at least 2 for --maximizer cmaes")


class QNetwork(nn.Sequential):
    """Q_φ(s, a): (..., obs_dim) and (..., action_dim) to (...)."""

    def __init__(self, obs_dim: int, action_dim: int):
        hidden = [nn.Linear(obs_dim + action_dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(64, 1))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return super().forward(torch.cat([obs, actions], dim=-1)).squeeze(-1)


class Batch(NamedTuple):
    obs: Tensor  # (B, obs_dim)
    actions: Tensor  # (B,) discrete, or (B, action_dim) normalised to [-1, 1]
    rewards: Tensor  # (B,)
    next_obs: Tensor  # (B, obs_dim), of the same episode, also at its end
    terminations: Tensor  # (B,), 1 if next_obs has no future; not at a time limit


class ReplayBuffer(nn.Module):
    """(3) The last `capacity` transitions, in a ring; a module, so that checkpoints hold it."""

    def __init__(self, capacity: int, obs_shape, action_shape, action_dtype, device):
        super().__init__()
        for name, shape in zip(Batch._fields, (obs_shape, action_shape, (), obs_shape, ())):
            dtype = action_dtype if name == "actions" else torch.float32
            self.register_buffer(name, torch.zeros(capacity, *shape, dtype=dtype, device=device))
        self.register_buffer("count", torch.tensor(0))  # on the CPU: no wait to read it

    def add(self, *transitions: Tensor | np.ndarray) -> Tensor:
        """The fields of a Batch of any length, the oldest first; returns the rows they are in."""
        length = len(transitions[0])
        capacity = len(self.rewards)
        rows = (int(self.count) + torch.arange(length, device=self.rewards.device)) % capacity
        for name, values in zip(Batch._fields, transitions):
            stored = getattr(self, name)
            stored[rows[-capacity:]] = torch.as_tensor(values[-capacity:]).to(stored)
        self.count += length
        return rows[-capacity:]

    def sample(self, batch_size: int) -> Batch:
        filled = min(int(self.count), len(self.rewards))
        rows = torch.randint(filled, (batch_size,), device=self.rewards.device)
        return Batch(*(getattr(self, name)[rows] for name in Batch._fields))


# Each search takes q_function, from actions (B, K, d) to Q (B, K), and returns actions (B, d). The
# deviations of cem and cmaes are at least min_std: at 0, if elites coincide, a search would stop.


def best(q_function, actions: Tensor, count: int = 1) -> Tensor:
    """Of actions (B, K, d) the `count` of the highest Q, the best first, (B, count, d)."""
    rows = q_function(actions).topk(count, dim=1).indices
    return actions.take_along_dim(rows.unsqueeze(-1), dim=1)


@torch.no_grad()
def argmax_grid(q_function, batch_size, d, bins, device=None) -> Tensor:
    """(7) Option 1, discretisation: the best of bins^d points."""
    axis = torch.linspace(-1, 1, bins, device=device)
    grid = torch.cartesian_prod(*[axis] * d).view(-1, d)
    return best(q_function, grid.expand(batch_size, -1, -1)).squeeze(1)


@torch.enable_grad()
def argmax_gradient(q_function, batch_size, d, num_samples, iterations, device=None) -> Tensor:
    """(8) Option 2, gradient ascent: the best end of num_samples ascents; α falls linearly."""
    actions = 2 * torch.rand(batch_size, num_samples, d, device=device) - 1
    for i in range(iterations):
        (gradient,) = torch.autograd.grad(q_function(actions.requires_grad_()).sum(), actions)
        step = 0.5 * (1 - i / iterations) * nn.functional.normalize(gradient, dim=-1)
        actions = (actions.detach() + step).clamp(-1, 1)
    return best(q_function, actions).squeeze(1)


@torch.no_grad()
def argmax_cem(
    q_function, batch_size, d, num_samples, num_elites, iterations, min_std=0.05, device=None
) -> Tensor:
    """(9) Option 2, cross-entropy method: the mean of the last elites."""
    mean = torch.zeros(batch_size, 1, d, device=device)
    std = torch.ones_like(mean)
    for _ in range(iterations):
        noise = torch.randn(batch_size, num_samples, d, device=device)
        elites = best(q_function, (mean + std * noise).clamp(-1, 1), num_elites)
        mean = elites.mean(dim=1, keepdim=True)
        std = elites.std(dim=1, keepdim=True, correction=0).clamp(min=min_std)
    return mean.squeeze(1)


@torch.no_grad()
def argmax_cmaes(
    q_function, batch_size, d, num_samples, iterations, min_std=0.05, device=None
) -> Tensor:
    """(10) Option 2, CMA-ES: the last mean. Samples outside the box count as its nearest point."""
    num_elites = num_samples // 2
    w = math.log((num_samples + 1) / 2) - torch.arange(1, num_elites + 1).log()
    w = w / w.sum()
    mu_eff = 1 / w.square().sum().item()
    c_sigma, c_c = (mu_eff + 2) / (d + mu_eff + 5), (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)
    d_sigma = 1 + c_sigma + 2 * max(0, ((mu_eff - 1) / (d + 1)) ** 0.5 - 1)
    c_1 = 2 / ((d + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((d + 2) ** 2 + mu_eff))
    chi = d**0.5 * (1 - 1 / (4 * d) + 1 / (21 * d**2))  # E |N(0, I)|
    mean, p_sigma, p_c = torch.zeros(3, batch_size, 1, d, device=device)
    sigma = torch.full_like(mean[..., :1], 0.5)
    C = torch.eye(d, device=device)
    w = w.to(device)
    for _ in range(iterations):
        variances, axes = torch.linalg.eigh(C)
        stds = (sigma * variances.clamp(min=0).sqrt().unsqueeze(-2)).clamp(min=min_std)
        noise = torch.randn(batch_size, num_samples, d, device=device)
        samples = (mean + noise * stds @ axes.mT).clamp(-1, 1)
        steps = best(q_function, samples, num_elites) - mean  # σ y_i of the elites
        step = w[None] @ steps
        mean = mean + step
        white = (step @ axes / stds) @ axes.mT  # C^-½ y_w, but for min_std
        p_sigma = (1 - c_sigma) * p_sigma + (c_sigma * (2 - c_sigma) * mu_eff) ** 0.5 * white
        p_c = (1 - c_c) * p_c + (c_c * (2 - c_c) * mu_eff) ** 0.5 * step / sigma
        C_mu = (w * steps.mT) @ steps / sigma**2
        C = (1 - c_1 - c_mu) * C + c_1 * p_c.mT @ p_c + c_mu * C_mu
        sigma = sigma * (c_sigma / d_sigma * (p_sigma.norm(dim=-1, keepdim=True) / chi - 1)).exp()
        sigma = sigma.clamp(min=min_std)
    return mean.squeeze(1)


@torch.no_grad()
def argmax_action(q_network: nn.Module, obs: Tensor, maximizer: Callable) -> Tensor:
    """(2) For each of obs (B, obs_dim) the action of the highest Q that was found, (B, d)."""

    def q_function(actions: Tensor) -> Tensor:  # (B, K, d) to (B, K)
        return q_network(obs.unsqueeze(1).expand(-1, actions.shape[1], -1), actions)

    return maximizer(q_function, len(obs))


def ou_noise(noise: Tensor, kappa: float, sigma: float) -> Tensor:
    """(1) The next noise after `noise`, (N, action_dim)."""
    return (1 - kappa) * noise + sigma * torch.randn_like(noise)


def select_actions(q_network: nn.Module, obs: Tensor, maximizer: Callable, noise: Tensor) -> Tensor:
    """(1) (N, d), in the box."""
    return (argmax_action(q_network, obs, maximizer) + noise).clamp(-1, 1)


@torch.no_grad()
def td_target(batch: Batch, next_actions: Tensor, target_network, gamma: float) -> Tensor:
    """(4) y, (B,), given argmax_a' Q_φ⁻(s', a'), (B, d)."""
    next_q = target_network(batch.next_obs, next_actions)
    future = next_q.masked_fill(batch.terminations > 0, 0)  # not 0 · Q: a last s' may be nan
    return batch.rewards + gamma * future


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """(6) φ⁻ ← τ φ + (1 - τ) φ⁻."""
    for target, parameter in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(parameter, tau)


def train(args: Args) -> Tensor:
    """Returns of the greedy evaluation, (eval_episodes,)."""
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    env_kwargs = {"vectorization_mode": args.vectorization_mode} | json.loads(args.env_kwargs)
    envs = make_envs(args.env_id, args.num_envs, **env_kwargs)
    envs = wrappers.RecordEpisodeStatistics(envs, buffer_length=20, stats_key="training")
    obs_dim, action_dim = flatdim(envs.single_observation_space), flatdim(envs.single_action_space)
    q_network = QNetwork(obs_dim, action_dim).to(args.device)
    optimizer = torch.optim.Adam(q_network.parameters(), fused=True, capturable=True)
    target_network = deepcopy(q_network)
    size = 4 * args.buffer_size * (2 * obs_dim + action_dim + 2)  # bytes, all in float32
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise gym.error.Error(f"the memory does not hold {size / 1e9:.0f} GB; lower --buffer-size")
    buffer = ReplayBuffer(args.buffer_size, (obs_dim,), (action_dim,), torch.float32, args.device)
    common = {"num_samples": args.num_samples, "iterations": args.iterations}
    maximizer, settings = {
        "grid": (argmax_grid, {"bins": args.bins}),  # (7)
        "gradient": (argmax_gradient, common),  # (8)
        "cem": (argmax_cem, common | {"num_elites": args.num_elites}),  # (9)
        "cmaes": (argmax_cmaes, common),  # (10)
    }[args.maximizer]
    maximizer = partial(maximizer, d=action_dim, device=args.device, **settings)
    points = args.bins**action_dim
    if args.maximizer == "grid" and not 1 < points <= 10_000:
        raise gym.error.Error(f"--bins {args.bins} makes {points} points; not in [2, 10000]")
    parts = {"q_network": q_network, "target_network": target_network}  # what a checkpoint holds
    parts |= {"optimizer": optimizer, "buffer": buffer}
    global_step = 0
    if args.resume:
        state = torch.load(args.resume, map_location="cpu", weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        torch.manual_seed(args.seed + state["global_step"])  # for a GPU: its state is not saved
        torch.set_rng_state(state["rng"])
        global_step = state["global_step"]
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time_ns()}"
    name = name.replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or f"runs/{name}/checkpoint.pt").resolve().parent
    run_dir.mkdir(parents=True, exist_ok=True)
    log = {"mode": args.wandb_mode, "project": args.wandb_project, "run_name": run_dir.name}
    log |= {"silent": args.wandb_mode != "online"}
    run = wandb.init(dir=run_dir, config=vars(args), settings=log, reinit="create_new")
    print(f'to go on after a stop: python "{__file__}" --resume "{run_dir}/checkpoint.pt"')
    print(f"{obs_dim} inputs, from {type(envs.unwrapped.single_observation_space).__name__}")
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps")
    next_save = time.monotonic() + 2

    search = partial(argmax_action, target_network, maximizer=maximizer)  # timed by itself

    def update(learning_rate: float, next_actions: Tensor, *transitions: Tensor) -> tuple:
        """One step on a batch: its loss, and Q_φ(s_i, a_i)."""
        batch = Batch(*transitions)  # Graph takes them one by one
        y = td_target(batch, next_actions, target_network, args.gamma)  # (4)
        q_values = q_network(batch.obs, batch.actions)
        loss = 0.5 * (q_values - y).square().mean()
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # (5)
        update_target(target_network, q_network, args.tau)  # (6)
        return loss.detach(), q_values.detach()

    if args.device == "cuda":
        update = Graph(update)
        if args.maximizer != "cmaes":  # its eigh cannot be recorded
            search = Graph(search)

    next_obs, _ = envs.reset(seed=int(torch.randint(2**31 - args.num_envs, ())))
    live = np.ones(args.num_envs, dtype=bool)
    noise = torch.zeros(args.num_envs, action_dim, device=args.device)
    maximizing = 0.0
    while global_step < args.total_timesteps:
        # 1. act, and keep (s, a, r, s')
        start = time.perf_counter()
        before = global_step
        for _ in range(args.num_steps):
            passed = global_step / args.total_timesteps
            obs = torch.tensor(next_obs, dtype=torch.float32, device=args.device)
            noise = ou_noise(noise, args.ou_kappa, args.exploration_noise)  # (1)
            noise = noise * noise.new_tensor(live)[:, None]  # each episode's starts at 0
            actions = select_actions(q_network, obs, maximizer, noise)  # (1)
            if global_step < args.learning_starts:
                actions.uniform_(-1, 1)
            next_obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
            transitions = obs, actions, rewards, next_obs, terminations
            buffer.add(*(x[live] for x in transitions))  # an env not live was only reset
            global_step += int(live.sum())
            live = ~np.logical_or(terminations, truncations)
        steps = global_step - before

        # 2. update on transitions of the buffer
        learning_rate = args.learning_rate * (1 - passed) if args.anneal_lr else args.learning_rate
        num_updates = 0 if steps == 0 or global_step < args.learning_starts else args.num_updates
        for _ in range(num_updates):
            batch = buffer.sample(args.batch_size)  # (3)
            search_start = time.perf_counter()
            next_actions = search(batch.next_obs)  # (2)
            maximizing += time.perf_counter() - search_start
            loss, q_values = update(learning_rate, next_actions, *batch)  # (4) to (6)

        progress.update(steps)
        seconds = time.perf_counter() - start
        if global_step % 500 < steps or global_step >= args.total_timesteps:
            metrics = {"charts/SPS": steps / seconds}
            if envs.return_queue:  # the last episodes to end
                metrics["charts/episodic_return"] = np.mean(envs.return_queue)
                metrics["charts/episodic_length"] = np.mean(envs.length_queue)
                progress.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}")
            if num_updates > 0:
                metrics["losses/td_loss"] = loss.item()
                metrics["losses/q_values"] = q_values.mean().item()
                metrics["time/maximizing"] = maximizing
            run.log(metrics, step=global_step)
        if time.monotonic() > next_save or global_step >= args.total_timesteps:
            if not all(x.isfinite().all() for x in q_network.parameters()):
                raise FloatingPointError(f"Q is not finite at step {global_step}; see {run_dir}")
            state = {"args": vars(args), "global_step": global_step, "rng": torch.get_rng_state()}
            state |= {key: part.state_dict() for key, part in parts.items()}
            next_save = save_checkpoint(run_dir, state)

    envs.close()
    progress.set_postfix_str("evaluation")
    greedy = partial(select_actions, q_network, maximizer=maximizer, noise=torch.tensor(0.0))
    envs = make_envs(args.env_id, args.eval_episodes, **env_kwargs)
    torch.manual_seed(args.seed)  # so that a resumed run searches alike
    returns = evaluate(greedy, envs, args.device)
    progress.close()
    run.log({"eval/episodic_return": returns.mean().item()}, step=global_step)
    print(f"greedy return {returns.mean():.1f} ± {returns.std(correction=0):.1f}")
    if args.capture_video:
        film = make_envs(args.env_id, 1, **env_kwargs | {"render_mode": "rgb_array"})
        film = wrappers.RecordVideo(film, f"{run_dir}/videos")
        evaluate(greedy, film, args.device)
        video = wandb.Video(f"{run_dir}/videos/rl-video-episode-0.mp4")
        run.log({"eval/video": video}, step=global_step)
    run.finish()
    print(f"saved in {run_dir}")
    if args.wandb_mode != "disabled":
        print(f'curves: wandb leet "{run_dir}/wandb"')
    return returns


@torch.no_grad()
def evaluate(policy: Callable, envs: gym.vector.VectorEnv, device: str) -> Tensor:
    """Return of one episode in each of envs, (N,), which start alike in every run; closes them."""
    returns = torch.zeros(envs.num_envs, dtype=torch.float64)
    next_obs, _ = envs.reset(seed=1)
    live = np.ones(envs.num_envs, dtype=bool)
    for _ in range(50_000):
        actions = policy(torch.tensor(next_obs, dtype=torch.float32, device=device))
        next_obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
        returns += torch.from_numpy(np.where(live, rewards, 0))
        live = live & ~np.logical_or(terminations, truncations)
        if not live.any():
            envs.close()
            return returns
    raise gym.error.Error("""no end in 50,000 steps: --env-kwargs '{"max_episode_steps": 1000}'""")


class Graph:
    """A function that a GPU records as a CUDA graph at its fourth call, then replays as one launch.

    A small network's kernels take less time than their launches. A replay runs no Python: what is
    to change must be an input of one shape. Outputs must be detached, and last until the next call.
    """

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *inputs: Tensor | float) -> Tensor | tuple:
        self.calls += 1
        if self.calls < 4:  # while optimizers and libraries create their state
            return self.function(*inputs)
        if self.calls == 4:
            self.inputs = [torch.as_tensor(x, device="cuda").clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        for recorded, given in zip(self.inputs, inputs):
            recorded[...] = given
        self.graph.replay()
        return self.outputs


def scale(space: Box, actions: np.ndarray) -> np.ndarray:
    """From [-1, 1] to the box, in its dtype; nan to its centre, what lies outside to its edge."""
    share = ((np.nan_to_num(actions.astype(np.float64)) + 1) / 2).clip(0, 1)
    scaled = ((1 - share) * space.low + share * space.high).clip(space.low, space.high)
    return (scaled.round() if space.dtype.kind in "iu" else scaled).astype(space.dtype)


def make_envs(env_id: str, num_envs: int, /, **kwargs) -> gym.vector.VectorEnv:
    """Vector env of flat observations, which scales actions from [-1, 1] and clips them."""
    envs = gym.make_vec(env_id, num_envs=num_envs, **kwargs)
    mode = envs.metadata.get("autoreset_mode")
    if mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise gym.error.Error(f"--env-id {env_id}: {mode}; try --vectorization-mode sync")
    space = envs.single_observation_space
    try:
        width = flatdim(space)
    except (NotImplementedError, ValueError):
        raise gym.error.Error(f"--env-id {env_id}: {space} cannot be flattened") from None
    if width > 10_000:
        raise gym.error.Error(f"--env-id {env_id}: {width} inputs; at most 10,000 are taken")
    if space.shape != (width,):
        envs = wrappers.FlattenObservation(envs)
    space = envs.single_action_space
    if isinstance(space, Box) and len(space.shape) == 1 and space.is_bounded():
        return wrappers.TransformAction(envs, lambda actions: scale(space, actions))
    hint = "dqn.py takes Discrete; others need gymnasium.wrappers.TransformAction"
    raise gym.error.Error(f"--env-id {env_id}: {space} is not a bounded 1-D Box; {hint}")


def save_checkpoint(run_dir: Path, state: dict) -> float:
    """Writes a new file and renames it: a kill leaves the old or the new. Time of the next one."""
    start = time.monotonic()
    new = run_dir / f"checkpoint.{os.urandom(8).hex()}.tmp"  # two processes may write at once
    try:
        torch.save(state, new)
        new.replace(run_dir / "checkpoint.pt")
    except RuntimeError:  # what torch raises when the disk is full
        raise OSError(f"cannot write {new}") from None
    finally:
        new.unlink(missing_ok=True)
    return start + max(2, 50 * (time.monotonic() - start))  # at most 2 % of the time


def defaults(resume: str = "") -> Args:
    """Settings of the run to resume, if any, but for its device, which may not be here."""
    if not resume:
        return Args()
    try:
        saved = torch.load(resume, map_location="cpu", weights_only=True)["args"]
        return Args(**saved | {"device": Args.device, "resume": resume})
    except Exception as why:
        raise OSError(f"--resume {resume}: not a checkpoint of this script: {why!r:.90}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as by Ctrl-C
    sys.path.append(os.getcwd())  # so that --env-id finds a module here
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # where φ cannot be printed
    try:
        default, _ = tyro.cli(defaults, return_unknown_args=True, add_help=False)
        args = tyro.cli(Args, description=__doc__, default=default)
        os.environ["WANDB_MODE"] = args.wandb_mode  # else offline looks up a host
        os.environ["WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"] = "1"  # a kill loses one second
        train(args)
    except (gym.error.Error, ImportError, FloatingPointError, OSError, KeyboardInterrupt) as error:
        sys.tracebacklimit = 0  # its message says it all
        sys.modules["tabulate"] = None  # if PyTorch imports it at exit, Python forgets a Ctrl-C
        error.__context__ = None  # it holds the progress bar, which would end below the message
        raise error.with_traceback(None) from None
