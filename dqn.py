# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "tyro>=1.0.17", "wandb>=0.31", "tqdm>=4", "numpy"]
# ///
"""Deep Q-network, DQN (Mnih et al., 2015), and its extensions. Lecture: Deep Q-learning.

    a = argmax_a' Q_φ(s, a'), but any action with probability ε         (1)  select_actions
    ε falls linearly from start_e to end_e                              (2)  epsilon_at
    (s, a, r, s') ~ uniformly, from the last buffer_size transitions    (3)  ReplayBuffer
    y = r + γ (1 - terminated) max_a' Q_φ⁻(s', a')                      (4)  td_target
    φ ← φ - η Σ_i (Q_φ(s_i, a_i) - y_i) ∇Q_φ(s_i, a_i),  y_i fixed      (5)  train
    φ⁻ ← τ φ + (1 - τ) φ⁻                                               (6)  update_target
    --double-q: y = r + γ (1 - terminated) Q_φ⁻(s', argmax_a' Q_φ(s', a'))   (7)  td_target
    --dueling: Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')              (8)  QNetwork
    --prioritized-replay: P(i) ∝ |y_i - Q_i|^α, and w_i = (n P(i))^-β   (9)  PrioritizedReplayBuffer

    N num_envs    φ q_network    φ⁻ target_network    η learning_rate    γ gamma    τ tau

The slides leave out (1 - terminated). An episode cut by a time limit has a future all the same, so
it is not terminated. (5) takes Adam's step on the mean of ½ (Q - y)², each weighted by w_i in (9).
η falls linearly to 0: else the final policy depends on the noise of the last updates.

    python dqn.py --env-id CartPole-v1
    diff dqn.py cem_q.py        # next: continuous actions, where max_a' is a search
"""

import io
import signal
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
import wandb
from gymnasium.spaces import Box, Discrete, flatdim
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import RecordVideo
from torch import Tensor, cuda, nn
from tqdm import tqdm

signals: list[int] = []  # of the shell: the run ends after its round; a second one, at once


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id; package.module:MyEnv-v0 imports your own env
    seed: int = 1  # fixes the whole run, bit for bit on a CPU
    total_timesteps: int = 50_000  # env steps; the round under way is finished
    num_envs: int = 32  # N: envs stepped at once
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda if there is one
    num_threads: int = 1  # of the CPU; one is fastest for networks of this size
    eval_episodes: int = 100  # greedy, at the end, from the same start states in every run
    capture_video: bool = False  # of a greedy episode, at the end
    checkpoint_frequency: int = 100_000  # env steps from one checkpoint to the next
    resume: str = ""  # checkpoint.pt of a run to go on with; what is not given stays as it was
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline sends nothing
    wandb_project: str = "rl-by-equation"
    learning_rate: float = 4e-3  # η
    anneal_lr: bool = True  # η falls to 0
    gamma: float = 0.99  # discount
    buffer_size: int = 50_000  # transitions
    batch_size: int = 256  # transitions in an update
    num_steps: int = 1  # of each env in a round, by one policy
    num_updates: int = 8  # after them
    learning_starts: int = 1_000  # env steps before the first update
    tau: float = 1.0  # 1 copies φ to φ⁻
    target_network_frequency: int = 160  # env steps from one φ⁻ to the next
    start_e: float = 1.0  # ε at first
    end_e: float = 0.1  # ε at last
    exploration_fraction: float = 0.16  # of total_timesteps, in which ε falls
    double_q: bool = False  # (7): φ picks the action, φ⁻ values it
    dueling: bool = False  # (8)
    prioritized_replay: bool = False  # (9)
    alpha: float = 0.6  # α; 0 is uniform
    beta: float = 0.4  # β at first; 1 at last
    tabular: bool = False  # Q is a table, 0 at first, and (5) a plain step; s must be one-hot

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


class QNetwork(nn.Module):
    """Q_φ(s, a) of all actions at once: (..., obs_dim) to (..., num_actions)."""

    def __init__(self, obs_dim: int, num_actions: int, dueling: bool = False):
        super().__init__()
        hidden = [nn.Linear(obs_dim, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.hidden, self.advantage = nn.Sequential(*hidden), nn.Linear(128, num_actions)
        self.value = nn.Linear(128, 1) if dueling else None

    def forward(self, obs: Tensor) -> Tensor:
        features = self.hidden(obs)
        advantages = self.advantage(features)
        if self.value is None:
            return advantages
        return self.value(features) + advantages - advantages.mean(dim=-1, keepdim=True)  # (8)


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


class PrioritizedReplayBuffer(ReplayBuffer):
    """(9) Proportional prioritisation (Schaul et al., 2016)."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self.register_buffer("priorities", torch.zeros_like(self.rewards))  # |y - Q|^α

    def add(self, *transitions: Tensor | np.ndarray) -> Tensor:
        """New transitions get the highest priority in the buffer, so that each is soon seen."""
        highest = self.priorities.max()
        rows = super().add(*transitions)
        self.priorities[rows] = torch.where(highest > 0, highest, 1.0)
        return rows

    def sample(self, batch_size: int, beta: float) -> tuple[Batch, Tensor, Tensor]:
        """Batch, its rows, and their weights w_i / max_j w_j, (batch_size,)."""
        rows = self.priorities.multinomial(batch_size, replacement=True)
        weights = self.priorities[rows] ** -beta
        batch = Batch(*(getattr(self, name)[rows] for name in Batch._fields))
        return batch, rows, weights / weights.max()

    def update_priorities(self, rows: Tensor, td_errors: Tensor, alpha: float) -> None:
        priorities = (td_errors.abs() + 1e-6) ** alpha
        self.priorities[rows] = priorities.nan_to_num(1.0)  # train tells of a loss that is nan


def env_actions(actions: Tensor, space: Discrete) -> np.ndarray:
    """What the envs see: their actions may start elsewhere than at 0."""
    return space.start + actions.cpu().numpy()


def epsilon_at(step: float, start_e: float, end_e: float, duration: float) -> float:
    """(2) start_e at step 0, end_e from step `duration` on."""
    return end_e + (start_e - end_e) * max(0.0, 1 - step / duration) if duration else end_e


@torch.no_grad()
def select_actions(q_network: nn.Module, obs: Tensor, epsilon: float) -> Tensor:
    """(1) One action an env, (N,), and one coin an env."""
    q_values = q_network(obs)
    explore = torch.rand(len(obs), device=obs.device) < epsilon
    random = torch.randint(q_values.shape[-1], explore.shape, device=obs.device)
    return torch.where(explore, random, q_values.argmax(dim=-1))


@torch.no_grad()
def td_target(batch: Batch, q_network, target_network, gamma: float, double_q: bool) -> Tensor:
    """(4) y, or (7) if double_q, (B,)."""
    next_q = target_network(batch.next_obs)
    best = (q_network(batch.next_obs) if double_q else next_q).argmax(dim=-1, keepdim=True)
    return batch.rewards + gamma * (1 - batch.terminations) * next_q.gather(-1, best).squeeze(-1)


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
    if not isinstance(actions, Discrete):
        raise ValueError(f"--env-id {env_id}: {actions} is not Discrete; see ddpg_continuous.py")
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
    q_network = QNetwork(obs_dim, flatdim(space), args.dueling).to(device)
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, fused=True)
    if args.tabular:
        q_network = nn.Linear(obs_dim, flatdim(space), bias=False, device=device)
        nn.init.zeros_(q_network.weight)
        optimizer = torch.optim.SGD(q_network.parameters(), args.learning_rate)
    target_network = deepcopy(q_network)
    kind = PrioritizedReplayBuffer if args.prioritized_replay else ReplayBuffer
    buffer = kind(args.buffer_size, (obs_dim,), (), torch.int64, device)
    modules = {"q_network": q_network, "target_network": target_network}
    modules |= {"optimizer": optimizer, "buffer": buffer}
    run_dir, global_step = start_run(args, modules)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps")

    next_obs, _ = envs.reset(seed=int(torch.randint(2**31 - args.num_envs, ())))
    live, episodes = np.ones(args.num_envs, dtype=bool), deque(maxlen=20)
    totals = np.zeros((2, args.num_envs))  # return and length of the episodes under way
    schedule = args.start_e, args.end_e, args.exploration_fraction
    while global_step < args.total_timesteps and not signals:
        # 1. act, and keep (s, a, r, s')
        before = global_step
        for _ in range(args.num_steps):
            elapsed = global_step / args.total_timesteps
            epsilon = epsilon_at(elapsed, *schedule)  # (2)
            obs = torch.tensor(next_obs, dtype=torch.float32, device=device)
            actions = select_actions(q_network, obs, epsilon)  # (1)
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
            if args.prioritized_replay:
                beta = args.beta + (1 - args.beta) * elapsed
                batch, rows, weights = buffer.sample(args.batch_size, beta)  # (9)
            else:
                batch, weights = buffer.sample(args.batch_size), 1.0  # (3)
            y = td_target(batch, q_network, target_network, args.gamma, args.double_q)  # (4), (7)
            q_values = q_network(batch.obs).gather(-1, batch.actions[:, None]).squeeze(-1)
            loss = 0.5 * (weights * (q_values - y).square()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # (5)
            if args.prioritized_replay:
                buffer.update_priorities(rows, (q_values - y).detach(), args.alpha)  # (9)
        if global_step % args.target_network_frequency < steps:
            update_target(target_network, q_network, args.tau)  # (6)

        last = global_step >= args.total_timesteps
        log, save = (global_step % n < steps or last for n in (500, args.checkpoint_frequency))
        if (log or save or signals) and not all(x.isfinite().all() for x in q_network.parameters()):
            raise FloatingPointError(f"Q is not finite at step {global_step}; see {run_dir}")
        if log:
            episodic_return, episodic_length = np.mean(episodes or [(np.nan, np.nan)], axis=0)
            metrics = {
                "global_step": global_step,
                "charts/episodic_return": episodic_return,
                "charts/episodic_length": episodic_length,
                "charts/SPS": progress.format_dict["rate"] or 0.0,
                "charts/epsilon": epsilon,
                "losses/td_loss": loss.item(),
                "losses/q_values": q_values.mean().item(),
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
    greedy = partial(select_actions, q_network, epsilon=0.0)
    returns = evaluate(greedy, make_envs(args.env_id, args.eval_episodes), device)
    wandb.log({"eval/episodic_return": returns.mean().item(), "global_step": global_step})
    if args.capture_video:
        envs = RecordVideo(make_envs(args.env_id, 1, film=True), f"{run_dir}/videos")
        evaluate(greedy, envs, device)
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
