# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "tyro>=1.0.17", "wandb>=0.31", "tqdm>=4.60",
#     "numpy>=1.26"]
# ///
"""REINFORCE with a baseline (Williams, 1992). Lecture: Reducing variance.

    J(φ) = E[ Σ_t r_t ],  τ = (s_1, a_1, s_2, a_2, ...) ~ p_φ(τ)           (1)  rollout
    ∇J(φ) ≈ 1/N Σ_i Σ_t ∇ log π_φ(a_it|s_it) Ψ_it                         (2)  policy_loss
    Ψ_it = G_it - b_it                                                     (3)  train
    G_it = Σ_{t'≥t} r_it'                causality: the reward-to-go       (4)  reward_to_go
    b_it = mean of G_jt over the episodes j ≠ i                            (5)  average_baseline
    b_it = V(s_it), a network fitted on G                                  (6)  ValueNetwork
    b_i = Σ_{j≠i} z_j·g_j / Σ_{j≠i} z_j·z_j,  the constant of least variance  (7)  optimal_baseline
    φ ← φ + α ∇J(φ)                      α decreases                       (8)  train

    N num_envs    φ policy.parameters()    Ψ psi    α learning_rate
    z_i = Σ_t ∇ log π_φ(a_it|s_it)    g_i = Σ_t ∇ log π_φ(a_it|s_it) G_it  trajectory_gradients

Unbiased, as no b_it depends on a_it: (5) and (7) leave episode i out, (6) is fitted after its use.
With R(τ_j) for G_jt, z·g = |z|² R, and (7) is the slide's optimum: R weighted by |z|².
(8) takes Adam's step. Both networks see (s - mean) / std.

    python pg_baseline.py --env-id CartPole-v1 --baseline value
    diff pg_baseline.py offpolicy_pg.py     # next: several steps on one batch
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
import wandb
from gymnasium.spaces import Box, Discrete, flatdim
from gymnasium.wrappers import vector as wrappers
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import functional_call, grad, vmap
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id; package.module:MyEnv-v0 imports your own env
    env_kwargs: str = "{}"  # JSON for the env, such as '{"max_episode_steps": 200}'
    vectorization_mode: Literal["sync", "async"] | None = None  # async: a process for each env
    seed: int = 1  # fixes the whole run, bit for bit on a CPU
    total_timesteps: int = 100_000  # env steps; the last batch is completed
    num_envs: int = 32  # N, the envs stepped at once; a batch holds one episode of each
    device: Literal["cpu", "cuda", "mps"] = "cpu"  # where the networks are; a GPU is slower here
    num_threads: int = 1  # CPU threads; one is fastest for networks of this size
    eval_episodes: int = 100  # greedy episodes at the end, from the same starts in every run
    capture_video: bool = False  # film one more greedy episode at the end
    resume: str = ""  # checkpoint.pt to go on from; its flags, but for --device, are the defaults
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline sends nothing
    wandb_project: str = "rl-by-equation"  # project on W&B
    baseline: Literal["none", "average", "value", "optimal"] = "value"  # b: 0, (5), (6), (7)
    normalize_advantages: bool = False  # divide Ψ by its deviation over the batch; biased
    value_learning_rate: float = 1e-2  # step size of the fit of V
    learning_rate: float = 3e-2  # α at first; it is α / (1 + n / decay_steps) after n env steps
    decay_steps: int = 100_000  # env steps after which α has halved
    gamma: float = 1.0  # discount; the slides on policy gradients have none

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


class NormalizedLinear(nn.Linear):
    """W (s - mean) / std + b. From the second batch on, W and b follow the two: no output moves."""

    def __init__(self, obs_dim: int, width: int):
        super().__init__(obs_dim, width)
        self.register_buffer("count", torch.tensor(0))  # batches: each weighs as much as any other
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("var", torch.ones(obs_dim))

    @property
    def std(self) -> Tensor:
        varied = self.var > 1e-6 + 1e-12 * self.mean.square()  # by 0.001, and by more than rounding
        return self.var.sqrt().where(varied, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward((obs - self.mean) / self.std)

    @torch.no_grad()
    def update(self, obs: Tensor) -> None:
        """Takes in a batch, (B, obs_dim)."""
        mean, std = self.mean.clone(), self.std
        self.count += 1
        share = 1 / self.count
        shift = obs.mean(dim=0) - self.mean
        self.var.lerp_(obs.var(dim=0, correction=0) + (1 - share) * shift.square(), share)
        self.mean += share * shift
        if self.count > 1:  # the first batch sets the scale
            self.bias += self.weight @ ((self.mean - mean) / std)
            self.weight *= self.std / std


class Policy(nn.Module):
    """π_φ(a|s): Categorical, or a Gaussian whose standard deviation does not depend on s."""

    def __init__(self, obs_dim: int, action_dim: int, discrete: bool):
        super().__init__()
        hidden = [NormalizedLinear(obs_dim, 32), nn.Tanh()]
        self.network = nn.Sequential(*hidden, nn.Linear(32, action_dim))
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)  # at first π ignores s; uniform if discrete
        self.log_std = None if discrete else nn.Parameter(torch.full((action_dim,), -0.5))

    def forward(self, obs: Tensor) -> Distribution:
        output = self.network(obs)
        if self.log_std is None:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1)


class ValueNetwork(nn.Sequential):
    """V(s): (..., obs_dim) to (...)."""

    def __init__(self, obs_dim: int):
        hidden = [NormalizedLinear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        super().__init__(*hidden, nn.Linear(64, 1))

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward(obs).squeeze(-1)


class Trajectories(NamedTuple):
    """N whole episodes, one a row, padded to the longest, T."""

    obs: Tensor  # (N, T, obs_dim), but 0 on padding
    actions: Tensor  # (N, T) discrete, or (N, T, action_dim) normalised to [-1, 1], unclipped
    rewards: Tensor  # (N, T), but 0 on padding
    mask: Tensor  # (N, T), 1 on steps, 0 on padding


@torch.no_grad()
def rollout(envs: gym.vector.VectorEnv, policy: Policy, greedy: bool = False) -> Trajectories:
    """(1) One whole episode of each env; greedy ones start alike in every run."""
    seed = 1 if greedy else int(torch.randint(2**31 - envs.num_envs, ()))
    device = next(policy.parameters()).device
    next_obs, _ = envs.reset(seed=seed)
    live = np.ones(envs.num_envs, dtype=bool)
    steps = []
    for _ in range(50_000):
        obs = np.where(live[:, None], next_obs, 0)
        obs = torch.tensor(obs, dtype=torch.float32, device=device)
        actions = policy(obs).mode if greedy else policy(obs).sample()
        next_obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
        rewards = torch.from_numpy(np.where(live, rewards, 0)).float()
        steps.append((obs, actions, rewards, torch.from_numpy(live).float()))
        live = live & ~np.logical_or(terminations, truncations)
        if not live.any():
            return Trajectories(*(torch.stack(x, dim=1).to(device) for x in zip(*steps)))
    raise gym.error.Error("""no end in 50,000 steps: --env-kwargs '{"max_episode_steps": 1000}'""")


def reward_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(4) G_it = Σ_{t'≥t} γ^(t'-t) r_it', by G_it = r_it + γ G_i,t+1, (N, T)."""
    returns = torch.zeros_like(gamma * rewards)  # floats, also of whole numbers
    G = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        G = rewards[:, t] + gamma * G
        returns[:, t] = G
    return returns


def policy_loss(log_probs: Tensor, psi: Tensor, mask: Tensor) -> Tensor:
    """(2) -1/N Σ_i Σ_t log π(a_it|s_it) Ψ_it, from (N, T) each: its gradient estimates -∇J."""
    return -(mask * log_probs * psi).sum(dim=1).mean()


def average_baseline(returns: Tensor, mask: Tensor) -> Tensor:
    """(5) Mean of G_jt over the other episodes, whose G is 0 after their end, (N, T)."""
    others = 1 - torch.eye(len(mask), dtype=torch.float64)
    sums = others @ (mask * returns).cpu().double()  # exact if all are equal, and Ψ is 0
    return (sums / max(len(mask) - 1, 1)).to(returns)


def optimal_baseline(scores: Tensor, gradients: Tensor) -> Tensor:
    """(7) From z and g, (N, P) each, to one constant an episode, (N, 1)."""
    others = 1 - torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    products, norms = (scores * gradients).sum(dim=1), (scores * scores).sum(dim=1)
    return (others @ products / (others @ norms)).nan_to_num(nan=0, posinf=0, neginf=0).unsqueeze(1)


def trajectory_gradients(policy: Policy, obs: Tensor, actions: Tensor, psi: Tensor) -> Tensor:
    """Σ_t ∇ log π_φ(a_it|s_it) Ψ_it of each episode, (N, P), for Ψ = 0 on padding."""

    def objective(parameters: dict, obs: Tensor, actions: Tensor, psi: Tensor) -> Tensor:
        return (functional_call(policy, parameters, obs).log_prob(actions) * psi).sum()

    parameters = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    gradients = vmap(grad(objective), (None, 0, 0, 0))(parameters, obs, actions, psi)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def gradient_variances(policy, obs: Tensor, actions: Tensor, psis: dict[str, Tensor]) -> dict:
    """Total variance of the gradient of one episode, by name, for each Ψ of psis, 0 on padding."""
    gradients = {key: trajectory_gradients(policy, obs, actions, psi) for key, psi in psis.items()}
    return {key: x.var(dim=0, correction=0).sum() for key, x in gradients.items()}


def train(args: Args) -> Tensor:
    """Returns of the greedy evaluation, (eval_episodes,)."""
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    env_kwargs = {"vectorization_mode": args.vectorization_mode} | json.loads(args.env_kwargs)
    envs = make_envs(args.env_id, args.num_envs, **env_kwargs)
    obs_dim = flatdim(envs.single_observation_space)
    space = envs.single_action_space
    policy = Policy(obs_dim, flatdim(space), isinstance(space, Discrete)).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99), fused=True)
    value_network = ValueNetwork(obs_dim).to(args.device)
    value_optimizer = torch.optim.Adam(value_network.parameters(), fused=True)
    parts = {"policy": policy, "optimizer": optimizer}  # what a checkpoint holds
    parts |= {"value_network": value_network, "value_optimizer": value_optimizer}
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

    while global_step < args.total_timesteps:
        # 1. sample {τ_i} from π_φ
        start = time.perf_counter()
        obs, actions, rewards, mask = rollout(envs, policy)  # (1)

        # 2. estimate ∇J(φ)
        live = mask.bool()
        returns = reward_to_go(rewards, args.gamma)  # (4)
        scores = trajectory_gradients(policy, obs, actions, mask)
        gradients = trajectory_gradients(policy, obs, actions, mask * returns)
        baselines = {
            "none": torch.zeros_like(returns),
            "average": average_baseline(returns, mask),  # (5)
            "value": value_network(obs).detach(),  # (6)
            "optimal": optimal_baseline(scores, gradients),  # (7)
        }
        psis = {name: mask * (returns - baseline) for name, baseline in baselines.items()}  # (3)
        variances = gradient_variances(policy, obs, actions, psis)
        psi = psis[args.baseline]
        if args.normalize_advantages:
            deviation = psi[live].std(correction=0)
            rounding = 1e-6 * returns.abs().max()
            psi = torch.where(deviation > rounding, psi / deviation, 0.0)
        loss = policy_loss(policy(obs).log_prob(actions), psi, mask)  # (2)

        # 3. φ ← φ + α ∇J(φ)
        optimizer.param_groups[0]["lr"] = args.learning_rate / (1 + global_step / args.decay_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # (8)

        # 4. take in the states, fit V for the next batch, and go to 1
        obs, returns = obs[live], returns[live]
        policy.network[0].update(obs)
        value_network[0].update(obs)
        value_optimizer.param_groups[0]["lr"] = args.value_learning_rate
        for rows in torch.randperm(len(obs), device=args.device).split(128):
            value_loss = (value_network(obs[rows]) - returns[rows]).square().mean()
            value_optimizer.zero_grad()
            value_loss.backward()
            value_optimizer.step()

        steps = int(mask.sum())
        global_step += steps
        metrics = {
            "charts/episodic_return": rewards.sum(dim=1).mean().item(),
            "charts/episodic_length": steps / args.num_envs,
            "charts/SPS": steps / (time.perf_counter() - start),
            "losses/policy_loss": loss.item(),
            "losses/value_loss": value_loss.item(),
            **{f"variance/{key}": variance.item() for key, variance in variances.items()},
        }
        run.log(metrics, step=global_step)
        progress.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}")
        progress.update(steps)
        if not all(x.isfinite().all() for net in (policy, value_network) for x in net.parameters()):
            raise FloatingPointError(f"π or V is not finite at step {global_step}; see {run_dir}")
        if time.monotonic() > next_save or global_step >= args.total_timesteps:
            state = {"args": vars(args), "global_step": global_step, "rng": torch.get_rng_state()}
            state |= {key: part.state_dict() for key, part in parts.items()}
            next_save = save_checkpoint(run_dir, state)

    envs.close()
    progress.set_postfix_str("evaluation")
    envs = make_envs(args.env_id, args.eval_episodes, **env_kwargs)
    returns = rollout(envs, policy, greedy=True).rewards.sum(dim=1).cpu()
    envs.close()
    progress.close()
    run.log({"eval/episodic_return": returns.mean().item()}, step=global_step)
    print(f"greedy return {returns.mean():.1f} ± {returns.std(correction=0):.1f}")
    if args.capture_video:
        film = make_envs(args.env_id, 1, **env_kwargs | {"render_mode": "rgb_array"})
        film = wrappers.RecordVideo(film, f"{run_dir}/videos")
        rollout(film, policy, greedy=True)
        film.close()
        video = wandb.Video(f"{run_dir}/videos/rl-video-episode-0.mp4")
        run.log({"eval/video": video}, step=global_step)
    run.finish()
    print(f"saved in {run_dir}")
    if args.wandb_mode != "disabled":
        print(f'curves: wandb leet "{run_dir}/wandb"')
    return returns


def scale(space: Box, actions: np.ndarray) -> np.ndarray:
    """From [-1, 1] to the box, in its dtype; nan to its centre, what lies outside to its edge."""
    share = ((np.nan_to_num(actions.astype(np.float64)) + 1) / 2).clip(0, 1)
    scaled = ((1 - share) * space.low + share * space.high).clip(space.low, space.high)
    return (scaled.round() if space.dtype.kind in "iu" else scaled).astype(space.dtype)


def make_envs(env_id: str, num_envs: int, /, **kwargs) -> gym.vector.VectorEnv:
    """Vector env of flat observations, which scales Box actions from [-1, 1] and clips them."""
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
    if isinstance(space, Discrete):
        return wrappers.TransformAction(envs, lambda x: (space.start + x).astype(space.dtype))
    if isinstance(space, Box) and len(space.shape) == 1 and space.is_bounded():
        return wrappers.TransformAction(envs, lambda actions: scale(space, actions))
    hint = "neither Discrete nor a bounded 1-D Box; it needs gymnasium.wrappers.TransformAction"
    raise gym.error.Error(f"--env-id {env_id}: {space} is {hint}")


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
