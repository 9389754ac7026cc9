# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "tyro>=1.0.17", "wandb>=0.31", "tqdm>=4", "numpy"]
# ///
"""Off-policy policy gradient by importance sampling. Lecture: Off-policy PG.

    J(φ') = E[ Π_t ρ_t R(τ) ],  τ ~ p_φ(τ),  ρ_t = π_φ'(a_t|s_t) / π_φ(a_t|s_t)  (1)  rollout
    ∇J(φ') ≈ 1/N Σ_i Σ_t ∇ log π_φ'(a_it|s_it) Ψ_it                  (2)  policy_loss
    Ψ_t = Π_u ρ_u R(τ)                   "trajectory"                 (3)  importance_weighted_psi
    G_t = Σ_{t'≥t} r_t'                  the reward-to-go             (4)  reward_to_go
    Ψ_t = Π_u ρ_u G_t                    "causal"                     (5)  importance_weighted_psi
    Ψ_t = Σ_{t'≥t} (Π_{u≤t'} ρ_u) r_t'   "per_decision"               (6)  importance_weighted_psi
    Ψ_t = ρ_t G_t                        "per_step", the last slide's (7)  importance_weighted_psi
    Ψ_t ← Ψ_t - w_t V(s_t),  w_t: Π_u ρ_u, Π_{u≤t} ρ_u in (6), ρ_t in (7)  (8)  log_weights
    E_{s~π_φ}[ KL(π_φ'(·|s) ‖ π_φ(·|s)) ] ≤ δ,  or no further step    (9)  train
    ESS = (Σ w)² / Σ w²,  over all steps                             (10)  effective_sample_size

    N num_envs    φ' policy.parameters()    Ψ psi    α learning_rate    δ target_kl

The slide's causality is (5); Precup et al. (2000) also drop the ratios after t', (6). The variance
of all three is exponential in T. (7) is biased: no ratio of the states, the old policy's future.

    python offpolicy_pg.py --env-id CartPole-v1 --estimator per_step
"""

import io
import signal
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
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
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from tqdm import tqdm

signals: list[int] = []  # of the shell: the run ends after its round; a second one, at once


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id; package.module:MyEnv-v0 imports your own env
    seed: int = 1  # fixes the whole run, bit for bit on a CPU
    total_timesteps: int = 60_000  # env steps; the batch under way is finished
    num_envs: int = 8  # N: envs stepped at once, one episode of each in a batch
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda if there is one
    num_threads: int = 1  # of the CPU; one is fastest for networks of this size
    eval_episodes: int = 100  # greedy, at the end, from the same start states in every run
    capture_video: bool = False  # of a greedy episode, at the end
    checkpoint_frequency: int = 100_000  # env steps from one checkpoint to the next
    resume: str = ""  # checkpoint.pt of a run to go on with; what is not given stays as it was
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline sends nothing
    wandb_project: str = "rl-by-equation"
    estimator: Literal["trajectory", "causal", "per_decision", "per_step"] = "per_step"  # Ψ
    num_updates: int = 20  # gradient steps on one batch, at most
    target_kl: float = 0.02  # δ
    baseline: Literal["none", "value"] = "value"  # subtract w V(s), (8)
    value_learning_rate: float = 1e-2  # of the fit of V
    learning_rate: float = 5e-3  # α
    gamma: float = 1.0  # discount; the slides have none

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
        make_envs(self.env_id, 1, film=self.capture_video).close()


class Policy(nn.Module):
    """π_φ(a|s): Categorical, or a Gaussian whose standard deviation does not depend on s."""

    def __init__(self, obs_dim: int, action_dim: int, discrete: bool):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(obs_dim, 32), nn.Tanh(), nn.Linear(32, action_dim))
        self.log_std = None if discrete else nn.Parameter(torch.full((action_dim,), -0.5))

    def forward(self, obs: Tensor) -> Distribution:
        output = self.network(obs)
        if self.log_std is None:
            return Categorical(logits=output, validate_args=False)
        normal = Normal(output, self.log_std.exp().expand_as(output), validate_args=False)
        return Independent(normal, 1, validate_args=False)


class ValueNetwork(nn.Sequential):
    def __init__(self, obs_dim: int):
        """V(s): (..., obs_dim) to (...)."""
        hidden = [nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        super().__init__(*hidden, nn.Linear(64, 1), nn.Flatten(-2))


class Trajectories(NamedTuple):
    """N whole episodes, one a row, padded to the longest, T, with what came after their end."""

    obs: Tensor  # (N, T, obs_dim)
    actions: Tensor  # (N, T) discrete, or (N, T, action_dim) normalised to [-1, 1], unclipped
    rewards: Tensor  # (N, T), but 0 on padding
    mask: Tensor  # (N, T), 1 on steps, 0 on padding
    log_probs: Tensor  # (N, T), log π_φ(a|s) from the moment of acting


@torch.no_grad()
def rollout(envs: VectorEnv, policy: Policy, seed: int = 0, greedy: bool = False) -> Trajectories:
    """(1) One whole episode of each env, whatever its length; seed 0 draws one from torch."""
    device, space = next(policy.parameters()).device, envs.single_action_space
    next_obs, _ = envs.reset(seed=seed or int(torch.randint(2**31 - envs.num_envs, ())))
    live, steps = np.ones(envs.num_envs, dtype=bool), []
    while live.any():
        obs = torch.tensor(next_obs, dtype=torch.float32, device=device)
        distribution = policy(obs)
        actions = distribution.mode if greedy else distribution.sample()
        next_obs, rewards, terminations, truncations, _ = envs.step(env_actions(actions, space))
        rewards, mask = torch.from_numpy(np.where(live, (rewards, live), 0)).float()
        steps.append((obs, actions, rewards, mask, distribution.log_prob(actions)))
        live = live & ~(terminations | truncations)
    return Trajectories(*(torch.stack(x, dim=1).to(device) for x in zip(*steps)))


def env_actions(actions: Tensor, space: gym.Space) -> np.ndarray:
    """What the envs see: discrete actions, or normalised ones scaled to the bounds and clipped."""
    actions = actions.cpu().numpy()
    if isinstance(space, Discrete):
        return space.start + actions
    return (space.low + (space.high - space.low) * (actions + 1) / 2).clip(space.low, space.high)


def reward_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(4) G_it = Σ_{t'≥t} γ^(t'-t) r_it', by G_it = r_it + γ G_i,t+1, (N, T)."""
    returns = [torch.zeros_like(rewards[:, 0])]
    for reward in reversed(rewards.unbind(dim=1)):
        returns.append(reward + gamma * returns[-1])
    return torch.stack(returns[:0:-1], dim=1)


def policy_loss(log_probs: Tensor, psi: Tensor, mask: Tensor) -> Tensor:
    """(2) -1/N Σ_i Σ_t log π_φ(a_it|s_it) Ψ_it, from (N, T) each: its gradient estimates -∇J(φ)."""
    return -(mask * log_probs * psi).sum(dim=1).mean()


def log_weights(log_ratio: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """(8) log w_t = Σ_u log ρ_u, (N, T): over the episode, up to t in (6), of t alone in (7)."""
    log_ratio = mask * log_ratio
    whole = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    partial = {"per_decision": log_ratio.cumsum(dim=1), "per_step": log_ratio}
    return {"trajectory": whole, "causal": whole, **partial}[estimator]


def importance_weighted_psi(
    log_ratio: Tensor, rewards: Tensor, mask: Tensor, gamma: float, estimator: str
) -> Tensor:
    """(3) and (5) to (7), (N, T), detached: (2) has the gradient, ∇ρ = ρ ∇ log π_φ'."""
    weights = log_weights(log_ratio, mask, estimator).exp().detach()
    if estimator == "per_decision":
        return reward_to_go(weights * rewards, gamma)  # (6)
    returns = reward_to_go(rewards, gamma)
    return weights * (returns[:, :1] if estimator == "trajectory" else returns)  # (3), (5), (7)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(10) From log w, (n,): n for equal weights, 1 if one of them is nearly everything."""
    return (2 * log_w.logsumexp(dim=0) - (2 * log_w).logsumexp(dim=0)).exp()


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
    box = isinstance(actions, Box) and len(actions.shape) == 1 and actions.is_bounded()
    if not (box or isinstance(actions, Discrete)):
        raise ValueError(f"--env-id {env_id}: {actions} is neither Discrete nor a bounded 1-D Box")
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


def evaluate(policy: Policy, envs: VectorEnv) -> Tensor:
    """Return of a greedy episode in each of envs, which are closed, (N,); the seed is fixed."""
    returns = rollout(envs, policy, seed=1, greedy=True).rewards.sum(dim=1).cpu()
    envs.close()
    return returns


def train(args: Args) -> Tensor:
    """Returns of the greedy evaluation, (eval_episodes,)."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    device = torch.device(args.device.replace("auto", "cuda" if cuda.is_available() else "cpu"))
    envs = make_envs(args.env_id, args.num_envs)
    obs_dim, action_dim = flatdim(envs.single_observation_space), flatdim(envs.single_action_space)
    policy = Policy(obs_dim, action_dim, isinstance(envs.single_action_space, Discrete)).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, (0.9, 0.99), fused=True)
    value_network = ValueNetwork(obs_dim).to(device)
    fit = torch.optim.Adam(value_network.parameters(), args.value_learning_rate, fused=True)
    modules = {"policy": policy, "optimizer": optimizer, "value_network": value_network, "fit": fit}
    run_dir, global_step = start_run(args, modules)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps")

    while global_step < args.total_timesteps and not signals:
        # 1. sample {τ_i} from π_φ
        obs, actions, rewards, mask, behavior_log_probs = rollout(envs, policy)  # (1)
        live, steps = mask.bool(), int(mask.sum())
        behavior, values = policy(obs), value_network(obs).detach()
        for updates in range(args.num_updates + 1):
            # 2. estimate ∇J(φ'), unless π_φ' has gone too far from π_φ
            distribution = policy(obs)
            log_probs = distribution.log_prob(actions)
            log_ratio = (log_probs - behavior_log_probs).detach()
            log_w = log_weights(log_ratio, mask, args.estimator)
            kl = kl_divergence(distribution, behavior)[live].mean()
            if kl > args.target_kl or updates == args.num_updates:
                break  # (9)
            psi = importance_weighted_psi(log_ratio, rewards, mask, args.gamma, args.estimator)
            psi = psi - log_w.exp() * values if args.baseline == "value" else psi  # (8)
            loss = policy_loss(log_probs, psi, mask)  # (2)

            # 3. φ' ← φ' + α ∇J(φ'), and go to 2 with the same batch, or to 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        # 4. fit V for the next batch
        obs, returns = obs[live], reward_to_go(rewards, args.gamma)[live]
        for rows in torch.randperm(len(obs), device=device).split(128):
            value_loss = (value_network(obs[rows]) - returns[rows]).square().mean()
            fit.zero_grad()
            value_loss.backward()
            fit.step()

        global_step += steps
        metrics = {
            "charts/episodic_return": rewards.sum(dim=1).mean().item(),
            "charts/episodic_length": steps / args.num_envs,
            "charts/SPS": progress.format_dict["rate"] or 0.0,
            "losses/policy_loss": loss.item(),
            "losses/value_loss": value_loss.item(),
            "losses/kl": kl.item(),
            "weights/effective_fraction": effective_sample_size(log_w[live]).item() / steps,
            "weights/largest": log_w[live].max().exp().item(),
        }
        if not all(x.isfinite().all() for net in (policy, value_network) for x in net.parameters()):
            raise FloatingPointError(f"π or V is not finite at step {global_step}; see {run_dir}")
        wandb.log(metrics | {"global_step": global_step})
        progress.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}")
        progress.update(steps)
        if global_step % args.checkpoint_frequency < steps or global_step >= args.total_timesteps:
            save_checkpoint(run_dir, args, global_step, modules)

    progress.close()
    if signals:
        save_checkpoint(run_dir, args, global_step, modules)
        print(f"stopped; to go on: python {Path(__file__).name} --resume {run_dir}/checkpoint.pt")
        raise SystemExit(128 + signals[0])
    returns = evaluate(policy, make_envs(args.env_id, args.eval_episodes))
    wandb.log({"eval/episodic_return": returns.mean().item(), "global_step": global_step})
    if args.capture_video:
        envs = RecordVideo(make_envs(args.env_id, 1, film=True), f"{run_dir}/videos")
        evaluate(policy, envs)
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
