# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "tyro>=1.0.17", "wandb>=0.31", "tqdm>=4.60",
#     "numpy>=1.26"]
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
    α alpha    β beta    n the transitions in the buffer

The slides leave out (1 - terminated). An episode cut by a time limit has a future all the same, so
it is not terminated. (5) takes Adam's step on the mean of ½ (Q - y)², each weighted by w_i in (9).
η falls linearly to 0: else the final policy depends on the noise of the last updates. (6) becomes
rarer as η falls: small steps take longer to reach y.

    python dqn.py --env-id CartPole-v1
    diff dqn.py cem_q.py        # next: continuous actions, where max_a' is a search
"""

import json
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
from gymnasium.spaces import Discrete, flatdim
from gymnasium.wrappers import vector as wrappers
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id; package.module:MyEnv-v0 imports your own env
    env_kwargs: str = "{}"  # JSON for the env, such as '{"max_episode_steps": 200}'
    vectorization_mode: Literal["sync", "async"] | None = None  # async: a process for each env
    seed: int = 1  # fixes the whole run, bit for bit on a CPU
    total_timesteps: int = 100_000  # env steps; the last round is completed
    num_envs: int = 64  # N, the envs stepped at once
    # where the networks and the data are; cuda if there is one
    device: Literal["cpu", "cuda", "mps"] = "cuda" if torch.cuda.is_available() else "cpu"
    num_threads: int = 1  # CPU threads; one is fastest for networks of this size
    eval_episodes: int = 100  # greedy episodes at the end, from the same starts in every run
    capture_video: bool = False  # film one more greedy episode at the end
    resume: str = ""  # checkpoint.pt to go on from; its flags, but for --device, are the defaults
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline sends nothing
    wandb_project: str = "rl-by-equation"  # project on W&B
    learning_rate: float = 4e-3  # η, the step size
    anneal_lr: bool = True  # let η fall to 0 by the end
    gamma: float = 0.995  # discount
    buffer_size: int = 100_000  # transitions that the buffer keeps
    batch_size: int = 128  # transitions in an update
    num_steps: int = 1  # steps of each env in a round, before its updates
    num_updates: int = 8  # gradient steps in a round
    learning_starts: int = 1_000  # env steps before the first update
    tau: float = 1.0  # part of φ that φ⁻ takes over; 1 is a copy
    target_network_frequency: int = 192  # env steps from one φ⁻ to the next; more as η falls
    start_e: float = 1.0  # ε at first
    end_e: float = 0.1  # ε at last
    exploration_fraction: float = 0.16  # part of total_timesteps in which ε falls
    double_q: bool = False  # (7): φ picks the next action, φ⁻ values it
    dueling: bool = False  # (8): Q from V and A
    prioritized_replay: bool = False  # (9): surprising transitions more often; not on mps
    alpha: float = 0.6  # α, exponent of the priorities; 0 is uniform
    beta: float = 0.4  # β, exponent of the weights w_i at first; it rises to 1
    tabular: bool = False  # Q is a table of zeros, not (8); (5) is a plain step; for one-hot states

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
        cumulative = self.priorities.double().cumsum(dim=0)  # float32 would lose small ones
        shares = torch.rand(batch_size, dtype=cumulative.dtype, device=cumulative.device)
        rows = torch.searchsorted(cumulative, shares * cumulative[-1], right=True)
        weights = self.priorities[rows] ** -beta
        batch = Batch(*(getattr(self, name)[rows] for name in Batch._fields))
        return batch, rows, weights / weights.max()

    def update_priorities(self, rows: Tensor, td_errors: Tensor, alpha: float) -> None:
        priorities = (td_errors.abs() + 1e-6) ** alpha
        self.priorities[rows] = priorities.nan_to_num(1.0)  # train reports the nan


def epsilon_at(step: float, start_e: float, end_e: float, duration: float) -> float:
    """(2) start_e at step 0, end_e from step `duration` on; both may be shares of the run."""
    left = max(0.0, 1 - step / duration) if duration > 0 else 0.0
    return end_e + left * (start_e - end_e)


@torch.no_grad()
def select_actions(q_network: nn.Module, obs: Tensor, epsilon: float) -> Tensor:
    """(1) One action an env, (N,), and one coin an env."""
    q_values = q_network(obs)
    explore = torch.rand(len(obs), device=obs.device) < epsilon
    random_actions = torch.randint(q_values.shape[-1], explore.shape, device=obs.device)
    return torch.where(explore, random_actions, q_values.argmax(dim=-1))


@torch.no_grad()
def td_target(batch: Batch, q_network, target_network, gamma: float, double_q: bool) -> Tensor:
    """(4) y, or (7) if double_q, (B,)."""
    next_q = target_network(batch.next_obs)
    chooser = q_network(batch.next_obs) if double_q else next_q
    best = chooser.argmax(dim=-1, keepdim=True)
    best_q = next_q.gather(-1, best).squeeze(-1)
    future = best_q.masked_fill(batch.terminations > 0, 0)  # not 0 · Q: a last s' may be nan
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
    obs_dim, num_actions = flatdim(envs.single_observation_space), flatdim(envs.single_action_space)
    if args.tabular:
        q_network = nn.Linear(obs_dim, num_actions, bias=False).to(args.device)
        nn.init.zeros_(q_network.weight)
        optimizer = torch.optim.SGD(q_network.parameters())
    else:
        q_network = QNetwork(obs_dim, num_actions, args.dueling).to(args.device)
        # eps: where the gradient is mere noise, Adam would still take a full step
        optimizer = torch.optim.Adam(q_network.parameters(), eps=1e-3, fused=True, capturable=True)
    target_network = deepcopy(q_network)
    size = 8 * args.buffer_size * (obs_dim + 2)  # bytes, of s and s' in float32 and the rest
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise gym.error.Error(f"the memory does not hold {size / 1e9:.0f} GB; lower --buffer-size")
    kind = PrioritizedReplayBuffer if args.prioritized_replay else ReplayBuffer
    buffer = kind(args.buffer_size, (obs_dim,), (), torch.int64, args.device)
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

    def update(learning_rate: float, weights: Tensor | float, *transitions: Tensor) -> tuple:
        """One step on a batch: its loss, Q_φ(s_i, a_i), and the errors Q_φ(s_i, a_i) - y_i."""
        batch = Batch(*transitions)  # Graph takes them one by one
        y = td_target(batch, q_network, target_network, args.gamma, args.double_q)  # (4), (7)
        q_values = q_network(batch.obs).gather(-1, batch.actions[:, None]).squeeze(-1)
        loss = 0.5 * (weights * (q_values - y).square()).mean()
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # (5)
        return loss.detach(), q_values.detach(), (q_values - y).detach()

    if args.device == "cuda" and not args.tabular:  # a plain step needs η on the CPU
        update = Graph(update)

    next_obs, _ = envs.reset(seed=int(torch.randint(2**31 - args.num_envs, ())))
    live = np.ones(args.num_envs, dtype=bool)
    age = 0.0  # of φ⁻: env steps since the last copy, each times η / learning_rate
    while global_step < args.total_timesteps:
        # 1. act, and keep (s, a, r, s')
        start = time.perf_counter()
        before = global_step
        for _ in range(args.num_steps):
            passed = global_step / args.total_timesteps
            epsilon = epsilon_at(passed, args.start_e, args.end_e, args.exploration_fraction)  # (2)
            obs = torch.tensor(next_obs, dtype=torch.float32, device=args.device)
            actions = select_actions(q_network, obs, epsilon)  # (1)
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
            if args.prioritized_replay:
                beta = args.beta + (1 - args.beta) * passed
                batch, rows, weights = buffer.sample(args.batch_size, beta)  # (9)
            else:
                batch, weights = buffer.sample(args.batch_size), 1.0  # (3)
            loss, q_values, td_errors = update(learning_rate, weights, *batch)  # (4), (5)
            if args.prioritized_replay:
                buffer.update_priorities(rows, td_errors, args.alpha)  # (9)
        age += steps * (1 - passed) if args.anneal_lr else steps
        if age >= args.target_network_frequency:
            update_target(target_network, q_network, args.tau)  # (6)
            age %= args.target_network_frequency

        progress.update(steps)
        seconds = time.perf_counter() - start
        if global_step % 500 < steps or global_step >= args.total_timesteps:
            metrics = {"charts/epsilon": epsilon, "charts/SPS": steps / seconds}
            if envs.return_queue:  # the last episodes to end
                metrics["charts/episodic_return"] = np.mean(envs.return_queue)
                metrics["charts/episodic_length"] = np.mean(envs.length_queue)
                progress.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}")
            if num_updates > 0:
                metrics["losses/td_loss"] = loss.item()
                metrics["losses/q_values"] = q_values.mean().item()
            run.log(metrics, step=global_step)
        if time.monotonic() > next_save or global_step >= args.total_timesteps:
            if not all(x.isfinite().all() for x in q_network.parameters()):
                raise FloatingPointError(f"Q is not finite at step {global_step}; see {run_dir}")
            state = {"args": vars(args), "global_step": global_step, "rng": torch.get_rng_state()}
            state |= {key: part.state_dict() for key, part in parts.items()}
            next_save = save_checkpoint(run_dir, state)

    envs.close()
    progress.set_postfix_str("evaluation")
    greedy = partial(select_actions, q_network, epsilon=0.0)
    envs = make_envs(args.env_id, args.eval_episodes, **env_kwargs)
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


def make_envs(env_id: str, num_envs: int, /, **kwargs) -> gym.vector.VectorEnv:
    """Vector env of flat observations, whose actions are counted from 0."""
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
    hint = "ddpg_continuous.py takes a bounded Box; others need gymnasium.wrappers.TransformAction"
    raise gym.error.Error(f"--env-id {env_id}: {space} is not Discrete; {hint}")


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
