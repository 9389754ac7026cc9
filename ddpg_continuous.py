# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "tyro>=1.0.17", "wandb>=0.31", "tqdm>=4", "numpy"]
# ///
"""Deep deterministic policy gradient, DDPG (Lillicrap et al., 2016). Lecture: Option 4.

    a = μ_θ(s) + n,  μ_θ(s) ≈ argmax_a Q_φ(s, a)                        (1)  select_actions
    n ← (1 - κ) n + σ 𝒩(0, I)                                           (2)  ou_noise
    (s, a, r, s') ~ uniformly, from the last buffer_size transitions    (3)  ReplayBuffer
    y = r + γ (1 - terminated) Q_φ⁻(s', μ_θ⁻(s'))                       (4)  td_target
    φ ← φ - η Σ_i (Q_φ(s_i, a_i) - y_i) ∇Q_φ(s_i, a_i),  y_i fixed      (5)  train
    φ⁻ ← τ φ + (1 - τ) φ⁻,  θ⁻ ← τ θ + (1 - τ) θ⁻                       (6)  update_target
    θ ← θ + η Σ_i dQ_φ/da (s_i, μ_θ(s_i)) dμ_θ/dθ (s_i)                 (7)  actor_loss

    N num_envs    φ q_network    θ actor    φ⁻, θ⁻ target_*    η learning_rate    γ gamma    τ tau

The actor learns to find the max, so that (4) need not search for it. The slide's chain rule means
dθ where it says dφ: in (7) the critic is fixed, and the states are those of the buffer. Actions are
normalised to [-1, 1]. In (2), κ = 1 is Gaussian noise; less is Ornstein-Uhlenbeck noise (0.15 in
the paper), which pushes one way for 1/κ steps or so, as an env with inertia may need.

    python ddpg_continuous.py --env-id Pendulum-v1
    diff dqn.py ddpg_continuous.py
"""

import io
import signal
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
import wandb
from gymnasium.spaces import Box, flatdim
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import RecordVideo
from torch import Tensor, cuda, nn
from tqdm import tqdm

signals: list[int] = []  # of the shell: the run ends after its round; a second one, at once


@dataclass
class Args:
    env_id: str = "Pendulum-v1"  # Gymnasium id; package.module:MyEnv-v0 imports your own env
    seed: int = 1  # fixes the whole run, bit for bit on a CPU
    total_timesteps: int = 20_000  # env steps; the round under way is finished
    num_envs: int = 8  # N: envs stepped at once
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda if there is one
    num_threads: int = 1  # of the CPU; one is fastest for networks of this size
    eval_episodes: int = 100  # greedy, at the end, from the same start states in every run
    capture_video: bool = False  # of a greedy episode, at the end
    checkpoint_frequency: int = 100_000  # env steps from one checkpoint to the next
    resume: str = ""  # checkpoint.pt of a run to go on with; what is not given stays as it was
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline sends nothing
    wandb_project: str = "rl-by-equation"
    learning_rate: float = 3e-3  # η
    anneal_lr: bool = True  # η falls to 0
    gamma: float = 0.98  # discount
    buffer_size: int = 50_000  # transitions
    batch_size: int = 128  # transitions in an update
    num_steps: int = 1  # of each env in a round, by one policy
    num_updates: int = 2  # after them
    learning_starts: int = 1_000  # env steps before the first update, by random actions
    tau: float = 0.02  # in each update; 1 copies φ to φ⁻
    exploration_noise: float = 0.2  # σ
    ou_theta: float = 1.0  # κ

    def __post_init__(self) -> None:
        """ValueError for settings that cannot run; in a shell, its message and exit code 2."""
        saved = load_checkpoint(self.resume)["args"] if self.resume else {}
        free = {"total_timesteps", "device", "num_threads", "eval_episodes", "capture_video"}
        free |= {"checkpoint_frequency", "resume", "wandb_mode", "wandb_project"}
        for name, value in vars(self).items():  # an int is a count from 1, a float a rate
            flag = f"--{name.replace('_', '-')}"
            low, high = (0, 1) if type(getattr(Args, name)) is float else (name != "seed", 2**40)
            if type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"{flag} must be in [{low:d}, {high}]")
            if name not in free and value != saved.get(name, value):
                raise ValueError(f"{flag} must be {saved[name]}, as in {self.resume}")
        if self.device in ("cuda", "mps") and not getattr(torch, self.device).is_available():
            raise ValueError(f"--device {self.device} is not available here; use auto or cpu")
        if self.batch_size > self.buffer_size:
            raise ValueError("--batch-size must be at most --buffer-size")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")
        make_envs(self.env_id, 1, film=self.capture_video).close()


class Actor(nn.Sequential):
    """μ_θ(s): (..., obs_dim) to (..., action_dim), in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int):
        hidden = [nn.Linear(obs_dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(64, action_dim), nn.Tanh())


class QNetwork(nn.Sequential):
    """Q_φ(s, a): (..., obs_dim) and (..., action_dim) to (...)."""

    def __init__(self, obs_dim: int, action_dim: int):
        hidden = [nn.Linear(obs_dim + action_dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(64, 1), nn.Flatten(-2))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return super().forward(torch.cat([obs, actions], dim=-1))


class Batch(NamedTuple):
    obs: Tensor  # (B, obs_dim)
    actions: Tensor  # (B,) discrete, or (B, action_dim) normalised to [-1, 1]
    rewards: Tensor  # (B,)
    next_obs: Tensor  # (B, obs_dim), of the same episode, also at its end
    terminations: Tensor  # (B,), 1 if next_obs has no future, 0 if the time limit came


class ReplayBuffer(nn.Module):
    """(3) The last `capacity` transitions, in a ring; a module, so that checkpoints hold it."""

    def __init__(self, capacity: int, obs_shape, action_shape, action_dtype, device):
        super().__init__()
        for name, shape in zip(Batch._fields, (obs_shape, action_shape, (), obs_shape, ())):
            dtype = action_dtype if name == "actions" else torch.float32
            self.register_buffer(name, torch.zeros(capacity, *shape, dtype=dtype, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))

    def add(self, *transitions: Tensor | np.ndarray) -> Tensor:
        """The fields of a Batch of any length, the oldest first; returns the rows they are in."""
        length, capacity = len(transitions[0]), len(self.rewards)
        rows = (self.count + torch.arange(length, device=self.count.device)) % capacity
        for name, values in zip(Batch._fields, transitions):
            stored = getattr(self, name)
            stored[rows[-capacity:]] = torch.as_tensor(values[-capacity:]).to(stored)
        self.count += length
        return rows[-capacity:]

    def sample(self, batch_size: int) -> Batch:
        rows = torch.randint(2**40, (batch_size,), device=self.count.device)
        rows = rows % self.count.clamp(max=len(self.rewards))  # on the device: the host goes on
        return Batch(*(getattr(self, name)[rows] for name in Batch._fields))


def env_actions(actions: Tensor, space: Box) -> np.ndarray:
    """What the envs see: actions scaled to their bounds, and clipped to them."""
    actions = actions.cpu().numpy()
    return (space.low + (space.high - space.low) * (actions + 1) / 2).clip(space.low, space.high)


def ou_noise(noise: Tensor, theta: float, sigma: float) -> Tensor:
    """(2) The next noise after `noise`, (N, action_dim)."""
    return (1 - theta) * noise + sigma * torch.randn_like(noise)


@torch.no_grad()
def select_actions(actor: nn.Module, obs: Tensor, noise: Tensor) -> Tensor:
    """(1) (N, action_dim), in the box."""
    return (actor(obs) + noise).clamp(-1, 1)


@torch.no_grad()
def td_target(batch: Batch, target_actor, target_network, gamma: float) -> Tensor:
    """(4) y, (B,)."""
    next_q = target_network(batch.next_obs, target_actor(batch.next_obs))
    return batch.rewards + gamma * (1 - batch.terminations) * next_q


def actor_loss(actor: nn.Module, q_network: nn.Module, obs: Tensor) -> Tensor:
    """(7) -1/B Σ_i Q_φ(s_i, μ_θ(s_i)), for a gradient step of the actor alone."""
    return -q_network(obs, actor(obs)).mean()


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """(6) φ⁻ ← τ φ + (1 - τ) φ⁻."""
    for target, parameter in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(parameter, tau)


def make_envs(env_id: str, num_envs: int, film: bool = False) -> VectorEnv:
    """Vector env; ValueError if there is none of that id or its spaces are not supported."""
    settings = {"render_mode": "rgb_array"} if film else {}
    try:
        envs = gym.make_vec(env_id, num_envs=num_envs, **settings)
        if film:  # what that lacks is found before the run, not after
            envs.reset(), envs.render(), __import__("moviepy")
    except Exception as error:
        raise ValueError(f"--env-id {env_id}{' --capture-video' * film}: {error}") from error
    obs, actions = envs.single_observation_space, envs.single_action_space
    if not (isinstance(obs, Box) and len(obs.shape) == 1):
        raise ValueError(f"--env-id {env_id}: {obs} is not a 1-D Box; use FlattenObservation")
    if not (isinstance(actions, Box) and len(actions.shape) == 1 and actions.is_bounded()):
        raise ValueError(f"--env-id {env_id}: {actions} is not a bounded 1-D Box; see dqn.py")
    return envs


def save_checkpoint(run_dir: Path, args: Args, global_step: int, modules: dict) -> None:
    """Written aside and renamed: a kill at any moment leaves the old checkpoint or the new one."""
    state = {name: module.state_dict() for name, module in modules.items()}
    state |= {"args": vars(args), "global_step": global_step, "rng": torch.get_rng_state()}
    data = io.BytesIO()
    torch.save(state, data)
    (run_dir / "checkpoint.tmp").write_bytes(data.getbuffer())
    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")


def load_checkpoint(path: str) -> dict:
    """What save_checkpoint saved; ValueError if it was not that of this script."""
    with suppress(Exception):  # which would tell of pickle
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["args"].keys() == Args.__dataclass_fields__.keys():
            return state
    raise ValueError(f"--resume {path}: not a checkpoint of {Path(__file__).name}")


def start_run(args: Args, modules: dict) -> tuple[Path, int]:
    """A run's directory and the steps it has done: 0, or those of --resume, restored to modules."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{datetime.now():%y%m%d-%H%M%S-%f}"
    run_dir, global_step = Path("runs", name.replace("/", "-").replace(":", "-")), 0
    if args.resume:
        run_dir, state = Path(args.resume).parent, load_checkpoint(args.resume)
        global_step = state["global_step"]
        torch.manual_seed(args.seed + global_step)  # of a GPU, whose state is not saved
        torch.set_rng_state(state["rng"])
        for key, module in modules.items():
            module.load_state_dict(state[key])
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    log = {"mode": args.wandb_mode, "project": args.wandb_project, "run_name": run_dir.name}
    log |= {"silent": args.wandb_mode != "online", "x_transaction_log_flush_interval": 1}
    wandb.setup(wandb.Settings(**log))  # with init alone, offline would look up a host
    wandb.init(dir=run_dir.resolve(), config=vars(args), settings=wandb.Settings(**log))
    wandb.define_metric("*", step_metric="global_step")
    return run_dir, global_step


@torch.no_grad()
def evaluate(policy: Callable, envs: VectorEnv, device: torch.device) -> Tensor:
    """Return of an episode of policy(obs) in each of envs, which are closed, (N,); fixed seed."""
    returns = torch.zeros(envs.num_envs, dtype=torch.float64)
    next_obs, _ = envs.reset(seed=1)
    live = np.ones(envs.num_envs, dtype=bool)
    while live.any():
        actions = policy(torch.tensor(next_obs, dtype=torch.float32, device=device))
        actions = env_actions(actions, envs.single_action_space)
        next_obs, rewards, terminations, truncations, _ = envs.step(actions)
        returns += torch.from_numpy(np.where(live, rewards, 0))
        live = live & ~(terminations | truncations)
    envs.close()
    return returns


def train(args: Args) -> Tensor:
    """Returns of the greedy evaluation, (eval_episodes,)."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    device = torch.device(args.device.replace("auto", "cuda" if cuda.is_available() else "cpu"))
    envs = make_envs(args.env_id, args.num_envs)
    obs_dim, space = flatdim(envs.single_observation_space), envs.single_action_space
    actor = Actor(obs_dim, flatdim(space)).to(device)
    q_network = QNetwork(obs_dim, flatdim(space)).to(device)
    target_actor, target_network = deepcopy(actor), deepcopy(q_network)
    parameters = [*q_network.parameters(), *actor.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    buffer = ReplayBuffer(args.buffer_size, (obs_dim,), space.shape, torch.float32, device)
    modules = {"q_network": q_network, "target_network": target_network}
    modules |= {"actor": actor, "target_actor": target_actor}
    modules |= {"optimizer": optimizer, "buffer": buffer}
    run_dir, global_step = start_run(args, modules)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps")

    next_obs, _ = envs.reset(seed=int(torch.randint(2**31 - args.num_envs, ())))
    live, episodes = np.ones(args.num_envs, dtype=bool), deque(maxlen=20)
    totals = np.zeros((2, args.num_envs))  # return and length of the episodes under way
    noise = torch.zeros(args.num_envs, flatdim(space), device=device)
    while global_step < args.total_timesteps and not signals:
        # 1. act, and keep (s, a, r, s')
        before = global_step
        for _ in range(args.num_steps):
            elapsed = global_step / args.total_timesteps
            obs = torch.tensor(next_obs, dtype=torch.float32, device=device)
            noise = noise * noise.new_tensor(live)[:, None]  # none of the last episode's
            noise = ou_noise(noise, args.ou_theta, args.exploration_noise)  # (2)
            actions = select_actions(actor, obs, noise)  # (1)
            if global_step < args.learning_starts:
                actions.uniform_(-1, 1)
            next_obs, rewards, terminations, truncations, _ = envs.step(env_actions(actions, space))
            transitions = obs, actions, rewards, next_obs, terminations
            buffer.add(*(x[live] for x in transitions))  # an env not live was only reset
            global_step += int(live.sum())
            totals += rewards * live, live
            live = ~(terminations | truncations)
            episodes.extend(totals[:, ~live].T)
            totals *= live
        steps = global_step - before
        progress.update(steps)
        if global_step < args.learning_starts or steps == 0:
            continue

        # 2. update on transitions of the buffer
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * elapsed)
        for _ in range(args.num_updates):
            batch = buffer.sample(args.batch_size)  # (3)
            y = td_target(batch, target_actor, target_network, args.gamma)  # (4)
            q_values = q_network(batch.obs, batch.actions)
            loss = 0.5 * (q_values - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            policy_loss = actor_loss(actor, q_network, batch.obs)
            policy_loss.backward(inputs=list(actor.parameters()))  # dQ/dφ is not wanted here
            optimizer.step()  # (5), (7)
            update_target(target_network, q_network, args.tau)  # (6)
            update_target(target_actor, actor, args.tau)  # (6)

        last = global_step >= args.total_timesteps
        log, save = (global_step % n < steps or last for n in (500, args.checkpoint_frequency))
        if (log or save or signals) and not all(x.isfinite().all() for x in parameters):
            raise FloatingPointError(f"Q or μ is not finite at step {global_step}; see {run_dir}")
        if log:
            episodic_return, episodic_length = np.mean(episodes or [(np.nan, np.nan)], axis=0)
            metrics = {
                "global_step": global_step,
                "charts/episodic_return": episodic_return,
                "charts/episodic_length": episodic_length,
                "charts/SPS": progress.format_dict["rate"] or 0.0,
                "losses/td_loss": loss.item(),
                "losses/q_values": q_values.mean().item(),
                "losses/actor_loss": policy_loss.item(),
            }
            wandb.log(metrics)
            progress.set_postfix_str(f"return {episodic_return:.1f}")
        if save:
            save_checkpoint(run_dir, args, global_step, modules)

    progress.close()
    if signals:
        save_checkpoint(run_dir, args, global_step, modules)
        print(f"stopped; to go on: python {Path(__file__).name} --resume {run_dir}/checkpoint.pt")
        raise SystemExit(128 + signals[0])
    returns = evaluate(actor, make_envs(args.env_id, args.eval_episodes), device)
    wandb.log({"eval/episodic_return": returns.mean().item(), "global_step": global_step})
    if args.capture_video:
        envs = RecordVideo(make_envs(args.env_id, 1, film=True), f"{run_dir}/videos")
        evaluate(actor, envs, device)
        video = wandb.Video(f"{run_dir}/videos/rl-video-episode-0.mp4")
        wandb.log({"eval/video": video, "global_step": global_step})
    wandb.finish()
    print(f"greedy return {returns.mean():.1f} ± {returns.std(correction=0):.1f}")
    print(f"saved in {run_dir}; curves: wandb leet {run_dir}/wandb")
    return returns


def saved_args(resume: str = "") -> Args:
    """Those of a checkpoint; if there is none, the defaults."""
    args = Args()
    with suppress(ValueError):  # Args will raise it
        vars(args).update(load_checkpoint(resume)["args"])
    return args


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: signals.append(n) or signal.signal(n, signal.SIG_DFL))
    default, _ = tyro.cli(saved_args, return_unknown_args=True, add_help=False)
    try:
        train(tyro.cli(Args, description=__doc__, default=default))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(str(error)) from None
