"""The figures of the docs, from the scripts' own functions.

python -m docs.figures                 # all of them, to docs/figures; ten minutes on two cores
python -m docs.figures variance ess    # or some
"""

import csv
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from os import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
import wandb
from gymnasium.spaces import Discrete
from gymnasium.wrappers import TransformAction

import cem_q
import naf
import offpolicy_pg
import reinforce
from benchmark.contestant import PASS
from benchmark.race import SYSTEMS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from problems import (
    Coin,
    Tabular,
    all_actions,
    best_constant,
    bimodal,
    moments,
    probabilities,
    small_mdp,
    small_policy,
    step_values,
)

FOLDER = Path(__file__).resolve().parent / "figures"
# dark to light, so that they differ in grey too; the line styles help
COLORS = ["#000000", "#0072B2", "#D55E00", "#56B4E9", "#E69F00"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v"]
SIZE = (9, 3.6)
RACE = {"offpolicy_pg.py": "#0072B2", "pg_baseline.py": "#56B4E9", "reinforce.py": "#009E73"}
RACE |= {"PPO": "#0072B2", "dqn.py": "#D55E00", "DQN": "#D55E00", "naf.py": "#009E73"}
RACE |= {"ddpg_continuous.py": "#D55E00", "DDPG": "#D55E00"}


def variance():
    """Gradient variance by estimator and baseline: a small MDP, and the growth with the horizon."""
    mdp, policy = small_mdp(), small_policy()
    episodes, dynamics = mdp.episodes()
    p = probabilities(policy, episodes, dynamics).detach()
    G, (Q, V) = reinforce.reward_to_go(episodes.rewards, 1.0), mdp.values(policy)
    value = step_values(V, episodes)
    psi = {
        "$R(τ)$, eq. (3)": reinforce.total_return(episodes.rewards, 1.0),
        "$G_t$, eq. (4)": G,
        "$G_t - b$, average": G - p @ (episodes.mask * G),
        "$G_t - b$, optimal": G - best_constant(policy, episodes, p, G),
        "$G_t - V(s_t)$": G - value,
        "$Q(s_t, a_t) - V(s_t)$": step_values(Q, episodes) - value,
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE, width_ratios=[1.2, 1])
    found = {name: moments(policy, episodes, p, x) for name, x in psi.items()}
    square = next(iter(found.values()))[0].square().sum()
    bars = left.barh(list(found), [(v / square).item() for _, v in found.values()], color="#0072B2")
    left.bar_label(bars, fmt="%.1f", padding=2)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set(xlabel="variance of one episode's gradient / |∇J|²", title="Small MDP, exact")
    horizons, coin = range(1, 11), Tabular([[0.0, 0.0]])
    curves = {"$R(τ)$": [], "$G_t$": []}
    for T in horizons:
        episodes = all_actions(T, lambda actions: actions * 0 + 1)
        p = torch.full((2**T,), 0.5**T).double()
        for name, estimator in zip(curves, (reinforce.total_return, reinforce.reward_to_go)):
            curves[name].append(moments(coin, episodes, p, estimator(episodes.rewards, 1.0))[1])
    for (name, values), style, color in zip(curves.items(), STYLES, COLORS):
        right.loglog(horizons, values, style, color=color, label=name)
    right.set(xlabel="horizon T, steps", ylabel="variance", title="Reward 1 at every step: ∇J = 0")
    right.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    right.legend()
    return figure


def ess():
    """Effective sample size and largest weight against the horizon, medians of 40 batches."""
    torch.manual_seed(0)
    batches, N, T = 40, 1000, 200
    steps, mask, behavior = np.arange(1, T + 1), torch.ones(N, T), Coin(0.5)
    obs = mask.double().unsqueeze(-1)
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE)
    for theta, style, color in zip((0.55, 0.6, 0.7), STYLES, COLORS):
        fractions, largest = [], []
        for _ in range(batches):
            actions = behavior(obs).sample()
            log_ratio = Coin(theta)(obs).log_prob(actions) - behavior(obs).log_prob(actions)
            log_w = offpolicy_pg.log_weights(log_ratio.detach(), mask, "per_decision")
            fractions.append(offpolicy_pg.effective_sample_size(log_w) / N)
            largest.append(log_w.max(dim=0).values.exp())
        label = f"π(1) = {theta}"
        for axes, values in (left, fractions), (right, largest):
            median = torch.stack(values).median(dim=0).values
            axes.semilogy(steps, median, linestyle=style, color=color, label=label)
        square = (theta**2 + (1 - theta) ** 2) / 0.5  # E[ρ²]
        left.semilogy(steps, square**-steps, color="0.6", linewidth=0.8)
    left.axhline(1 / N, color="0.6", linewidth=0.8)
    left.text(0, 0.95 / N, "one episode of the 1000", va="top", color="0.4")
    left.set(xlabel="horizon, steps", ylabel="effective sample size / episodes")
    left.set(ylim=(4e-4, 2), title="Data of a fair coin, π(1) = 0.5")
    right.axhline(1, color="0.6", linewidth=0.8)
    right.text(T, 0.9, "the mean of the weights", ha="right", va="top", color="0.4")
    right.set(xlabel="horizon, steps", ylabel="largest weight of 1000 episodes", ylim=(0.03, 500))
    right.legend(loc="lower left")
    return figure


def bias():
    """The per-step form against the exact ones, as the policy moves away from that of the data."""
    mdp, behavior = small_mdp(), Tabular(torch.zeros(2, 2))
    episodes, dynamics = mdp.episodes()
    p = probabilities(behavior, episodes, dynamics).detach()
    obs, actions, rewards, mask = episodes
    names = ["trajectory", "causal", "per_decision", "per_step"]
    divergence, biases, spreads = [], {n: [] for n in names}, {n: [] for n in names}
    reached = (p[:, None] * mask)[..., None] * obs  # how often each state is
    for distance in np.linspace(0.01, 2.5, 60):
        target = Tabular(distance * torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))
        states = torch.eye(2).double()
        kl = offpolicy_pg.kl_divergence(target(states), behavior(states)).detach()
        divergence.append((reached.sum(dim=(0, 1)) @ kl / reached.sum()).item())
        log_ratio = (target(obs).log_prob(actions) - behavior(obs).log_prob(actions)).detach()
        new = probabilities(target, episodes, dynamics).detach()
        exact, _ = moments(target, episodes, new, reinforce.reward_to_go(rewards, 1.0))
        for name in names:
            arguments = log_ratio, rewards, mask, 1.0, name
            psi = offpolicy_pg.importance_weighted_psi(*arguments)
            mean, total = moments(target, episodes, p, psi)
            biases[name].append(((mean - exact).norm() / exact.norm()).item())
            spreads[name].append((total.sqrt() / exact.norm()).item())
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE)
    for name, style, color in zip(names, STYLES, COLORS):
        left.plot(divergence, biases[name], linestyle=style, color=color, label=name)
        right.plot(divergence, spreads[name], linestyle=style, color=color, label=name)
    left.axvline(0.02, color="0.6", linewidth=0.8)
    left.text(0.025, left.get_ylim()[1], " default δ", va="top", color="0.4")
    left.set(ylabel="|bias| / |∇J|", title="Bias")
    right.set(ylabel="standard deviation / |∇J|", title="Noise of one episode")
    for axes in (left, right):
        axes.set(xlabel="KL(new ‖ old), nats a step")
    left.legend()
    return figure


def maximizers():
    """Four searches on a bimodal Q: where they end, what they find, and what they cost."""
    torch.set_num_threads(1)
    peak = 0.53  # on no grid

    def height(a):
        return bimodal(a - peak + 0.5)

    def q(actions):
        return height(actions.squeeze(-1))

    gradient = partial(cem_q.argmax_gradient, iterations=20)
    cem = partial(cem_q.argmax_cem, num_samples=64, num_elites=6)
    cmaes = partial(cem_q.argmax_cmaes, num_samples=16)
    families = [
        {f"grid, bins: {n}": partial(cem_q.argmax_grid, bins=n) for n in (4, 11, 21, 101)},
        {f"gradient, starts: {n}": partial(gradient, num_samples=n) for n in (1, 4, 16)},
        {f"CEM, iterations: {n}": partial(cem, iterations=n) for n in (1, 2, 4)},
        {f"CMA-ES, iterations: {n}": partial(cmaes, iterations=n) for n in (5, 10, 20)},
    ]
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.6), sharey=True, width_ratios=[2, 1, 1])
    where, found, cost = panels
    rows = {}  # name of a search: its place on the y axis, with a gap between the families
    for gaps, (family, marker, color) in enumerate(zip(families, "soD^", COLORS)):
        for name, search in family.items():
            rows[name] = len(rows) + 0.7 * gaps
            torch.manual_seed(0)
            ends = search(q, 60, 1).squeeze(-1)
            where.plot(ends, 0 * ends + rows[name], marker, color=color, ms=4, alpha=0.5)
            fraction = height(search(q, 4000, 1).squeeze(-1)).mean().item() / 1.5
            durations = []
            for _ in range(100):
                start = time.perf_counter()
                search(q, 128, 1)
                durations.append(time.perf_counter() - start)
            elapsed = 1e3 * min(durations)
            for axes, value, digits in (found, fraction, ".2f"), (cost, elapsed, "#.2g"):
                axes.plot(value, rows[name], marker, color=color)
                edge = axes.get_yaxis_transform()  # x = 1 is the right edge of the panel
                style = {"transform": edge, "fontsize": 9, "va": "center", "ha": "right"}
                axes.text(1.2, rows[name], f"{value:{digits}}", **style)
    bottom, top = max(rows.values()) + 0.8, -2.4
    unit = (bottom - top - 1) / 1.5  # of Q, on the y axis, which runs downwards
    a = torch.linspace(-1, 1, 500)
    where.fill_between(a, bottom, bottom - unit * height(a), color="0.88", zorder=0)
    where.text(peak - 1, bottom - unit - 0.2, "Q = 1", ha="center")
    where.text(peak, bottom - 1.5 * unit - 0.2, "Q = 1.5", ha="center")
    where.set(xlabel="action a", title="Where 60 searches end", ylim=(bottom, top))
    where.set_xticks([-1, -0.5, 0, 0.5, 1])
    where.set_yticks(list(rows.values()), list(rows), fontsize=9)
    found.set(xlabel="mean Q found / max Q", title="What they find", xlim=(0, 1.05))
    cost.set(xlabel="ms for 128 searches", title="What they cost", xscale="log", xlim=(0.05, 20))
    for axes in panels:
        axes.grid(axis="y", color="0.8", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    return figure


def quadratic():
    """NAF's best paraboloid for that Q: least squares over the box."""
    a = torch.linspace(-1, 1, 1001).double()
    curvature, slope, constant = np.polyfit(a.numpy(), bimodal(a).numpy(), 2)
    mu, L = -slope / (2 * curvature), (-2 * curvature) ** 0.5
    value = constant + slope * mu / 2
    mu, L, value = (torch.tensor(x).double() for x in ([mu], [[L]], value))
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    axes.plot(a, bimodal(a), color=COLORS[0], label="Q(a)")
    fitted = naf.naf_q(mu, L, value, a[:, None])
    axes.plot(a, fitted, "--", color=COLORS[1], label="nearest quadratic")
    axes.plot(0.5, 1.5, "v", color=COLORS[0])
    axes.annotate("argmax: Q = 1.5", (0.5, 1.5), (-95, -4), textcoords="offset points")
    axes.plot(mu, bimodal(mu), "o", color=COLORS[1])
    text = f"μ = {mu.item():.2f}\nQ = {bimodal(mu).item():.3f}"
    place = {"xytext": (6, 20), "textcoords": "offset points", "ha": "right", "fontsize": 9}
    axes.annotate(text, (mu.item(), bimodal(mu).item()), **place)
    axes.set(xlabel="action a", ylabel="Q(a)")
    axes.legend(loc="upper left")
    return figure


def curve(run):
    """The rows that a run logs and that have a return, without a log on disk."""
    script, settings = run
    module, rows = import_module(script), []

    def log(metrics, step=None):
        rows.append({"global_step": step} | metrics)

    wandb.init = lambda **settings: SimpleNamespace(log=log, finish=lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        chdir(folder)
        with open("log", "w") as output, redirect_stdout(output), redirect_stderr(output):
            module.train(module.Args(**settings, eval_episodes=1))
        chdir("/")
    return [row for row in rows if "charts/episodic_return" in row]


def curves(runs, seeds):
    """For each of runs, label to (script, settings): its rows for each of the seeds."""
    jobs = [(script, own | {"seed": seed}) for script, own in runs.values() for seed in seeds]
    with get_context("spawn").Pool(2) as pool:
        results = iter(pool.map(curve, jobs, chunksize=1))
    return {label: [next(results) for _ in seeds] for label in runs}


def plot_seeds(axes, found, metric, steps, **style):
    """A thin line for each seed, and their median."""
    values = []
    for rows in found:
        x, y = zip(*[(row["global_step"], row[metric]) for row in rows if metric in row])
        axes.plot(x, y, color=style["color"], alpha=0.3, linewidth=0.7)
        values.append(np.interp(steps, x, y, right=np.nan))
    inside = ~np.isnan(values).any(axis=0)  # where no run has ended yet
    axes.plot(steps[inside], np.median(values, axis=0)[inside], linewidth=2, **style)


def thousands(axes):
    axes.set_xlabel("env steps")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def three_torques(**settings):
    """Pendulum-v1 with the torques -2, 0 and 2 as its actions, so that DQN can act in it."""
    torques = np.array([[-2], [0], [2]], dtype=np.float32)
    env = gym.make("Pendulum-v1", **settings)
    return TransformAction(env, lambda action: torques[action], Discrete(3))


gym.register("ThreeTorques-v1", three_torques)  # here, so that the worker processes have it too


def replay():
    """DQN, and without one or both of its ideas, on Pendulum-v1 with three torques.

    The step is constant, because copies become rarer as it falls. Each variant has the settings
    with the best training return over the second half of a run, in the mean of the seeds 101, 102
    and 103. Tried were --learning-rate 3e-4, 1e-3, 3e-3 and 1e-2, each with an update after every
    env step, and with one after every 4. Without replay an update sees the transitions since the
    last update, so "no replay" had a third chance, 64 updates on the last 64 transitions, at 1e-3,
    3e-3 and 1e-2; it was the best. "Neither" has no such chance, as its target would stand still
    for those 64 updates. A copy every 100 env steps was better than every 20 on the seeds 101 and
    102. All this was before Adam's eps of 1e-3, and with a falling step where there is a target
    network. With both as they are now, "no target network" was tried again at 3e-4, 1e-3 and 3e-3,
    "no replay" at 3e-3 and 1e-2, and DQN at 3e-3. The figure shows ten other seeds.
    """
    no_target = {"target_network_frequency": 1}
    variants = {
        "DQN": {"learning_rate": 3e-3},
        "no target network": {"learning_rate": 3e-4} | no_target,
        "no replay": {"learning_rate": 1e-2, "num_steps": 64, "num_updates": 64, "buffer_size": 64},
        "neither": {"learning_rate": 3e-4, "buffer_size": 1, "batch_size": 1} | no_target,
    }
    common = {"env_id": "ThreeTorques-v1", "num_envs": 1, "total_timesteps": 12_000}
    common |= {"anneal_lr": False, "gamma": 0.99}
    common |= {"num_steps": 1, "num_updates": 1, "batch_size": 64, "target_network_frequency": 100}
    runs = {variant: ("dqn", common | own) for variant, own in variants.items()}
    found = curves(runs, range(1, 11))
    titles = {
        "DQN": "DQN:\nall transitions, a copy every 100",
        "no target network": "No target network:\na copy after every update",
        "no replay": "No replay:\nonly the last 64 transitions",
        "neither": "Neither:\nonly the last transition",
    }
    rows = [
        ("charts/episodic_return", "training return", (-1800, 150)),
        ("losses/q_values", "mean Q of the batch", (-1000, 100)),
    ]
    steps = np.linspace(1000, 12_000, 100)
    figure, panels = plt.subplots(2, 4, figsize=(10, 5), sharex=True, sharey="row")
    for line, (metric, text, limits) in zip(panels, rows):
        line[0].set(ylabel=text, ylim=limits)
        for axes, variant, color in zip(line, variants, COLORS):
            plot_seeds(axes, found[variant], metric, steps, color=color)
            if variant != "DQN":
                x, y = line[0].lines[-1].get_data()  # the median of DQN, to compare with
                axes.plot(x, y, color="0.5", linestyle="--", linewidth=1.5)
                axes.annotate("DQN", (x[-1], y[-1]), (0, 4), textcoords="offset points", ha="right")
    for axes, variant in zip(panels[0], variants):
        axes.set_title(titles[variant], fontsize=10)
    for axes in panels[1]:
        axes.set_xticks([0, 4000, 8000, 12_000])
        thousands(axes)
    return figure


def samples():
    """Sample efficiency of REINFORCE, with a baseline, and off-policy, on CartPole-v1."""
    runs = {
        "reinforce.py": ("reinforce", {}),
        "pg_baseline.py": ("pg_baseline", {}),
        "offpolicy_pg.py": ("offpolicy_pg", {}),
        "offpolicy_pg.py, 1 step a batch": ("offpolicy_pg", {"num_updates": 1}),
    }
    figure, axes = plt.subplots(figsize=(9, 4))
    steps = np.geomspace(2000, 150_000, 200)
    for (label, found), style, color in zip(curves(runs, range(1, 6)).items(), STYLES, COLORS):
        plot_seeds(axes, found, "charts/episodic_return", steps, ls=style, color=color, label=label)
    axes.axhline(475, color="0.6", linewidth=0.8)
    axes.text(1500, 478, "solved: 475", va="bottom", color="0.4")
    axes.set(ylabel="training return", xscale="log", xlim=(1000, 200_000))
    thousands(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def race():
    """Greedy return against the wall clock, medians of the seeds in benchmark/race.csv."""
    with (FOLDER.parents[1] / "benchmark" / "race.csv").open() as file:
        runs = groupby(csv.DictReader(file), key=itemgetter("env_id", "system", "seed"))
        found = {key: list(rows) for key, rows in runs}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6))
    seconds = np.geomspace(3, 60, 400)
    for axes, (env_id, systems) in zip(panels, SYSTEMS.items()):
        for system in systems:
            values = []
            for (task, name, _), rows in found.items():
                if (task, name) == (env_id, system):
                    seen = np.searchsorted([float(row["whole"]) for row in rows], seconds)
                    values.append(np.array([np.nan, *(float(row["return"]) for row in rows)])[seen])
            library, algorithm = ["ours", *system.split()][-2:]
            style = {"ours": "-", "SB3": "--", "SBX": ":"}[library]
            style = {"linestyle": style, "linewidth": 1.5, "color": RACE[algorithm]}
            median = np.median(values, axis=0)
            if library == "ours":
                first = np.argmax(median >= PASS[env_id])
                style |= {"marker": MARKERS[systems.index(system) % 5], "markevery": [first]}
            axes.plot(seconds, median, label=system, **style)
        axes.axhline(PASS[env_id], color="0.6", linewidth=0.8)
        style = {"va": "center", "color": "0.4", "transform": axes.get_yaxis_transform()}
        axes.text(1, PASS[env_id], f"{PASS[env_id]}:\nlearned", **style)
        axes.set(title=env_id, xscale="log", xlabel="seconds since the process started")
        axes.set_xticks([3, 5, 10, 20, 50], ["3", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
    panels[0].set_ylabel("greedy return, median of the seeds")
    return figure


FIGURES = [variance, ess, bias, maximizers, quadratic, replay, samples, race]
LOOK = {"font.size": 10, "lines.linewidth": 2, "legend.frameon": False}
LOOK |= {"axes.spines.top": False, "axes.spines.right": False}


def save(draw, path):
    with plt.rc_context(LOOK | {"figure.constrained_layout.use": True}):
        draw().savefig(path, dpi=150)


if __name__ == "__main__":
    names = Literal[tuple(draw.__name__ for draw in FIGURES)]
    chosen = tyro.cli(tyro.conf.Positional[tuple[names, ...]], default=(), description=__doc__)
    for draw in FIGURES:
        if not chosen or draw.__name__ in chosen:
            save(draw, FOLDER / f"{draw.__name__}.png")
            print(FOLDER / f"{draw.__name__}.png")
