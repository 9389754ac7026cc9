"""The scripts' functions on problems whose answers are known: by enumeration, formula or solver."""

import itertools
import math
from pathlib import Path

import cma
import envs  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch
from problems import (
    MDP,
    Coin,
    LinearGaussian,
    Table,
    Tabular,
    all_actions,
    best_constant,
    bimodal,
    moments,
    planar_lqr,
    probabilities,
    scalar_lqr,
    small_mdp,
    small_policy,
    step_values,
)
from scipy.optimize import approx_fprime
from torch import nn
from torch.distributions import Categorical

import cem_q
import ddpg_continuous
import dqn
import naf
import offpolicy_pg
import pg_baseline
import reinforce

ESTIMATORS = {"total_return": reinforce.total_return, "reward_to_go": reinforce.reward_to_go}


def close(ours, expected, atol=1e-9, rtol=1e-7):
    ours = torch.as_tensor(ours, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol)


# The policy gradient of a small MDP, by enumeration of all its episodes


@pytest.fixture
def mdp():
    return small_mdp()


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return pg_baseline.Policy(2, 2, discrete=True).double()


def flat_grad(value, policy):
    return torch.cat([x.flatten() for x in torch.autograd.grad(value, list(policy.parameters()))])


def exact_gradient(mdp, policy):
    """∇ Σ_τ p_φ(τ) R(τ), without a score."""
    episodes, dynamics = mdp.episodes()
    return flat_grad(
        probabilities(policy, episodes, dynamics) @ episodes.rewards.sum(dim=1), policy
    )


def test_the_enumeration_is_whole_and_agrees_with_the_values(mdp, policy):
    episodes, dynamics = mdp.episodes()
    p = probabilities(policy, episodes, dynamics)
    close(p.sum(), 1.0)
    assert len(episodes.mask.sum(dim=1).unique()) == 3  # episodes of 1, 2 and 3 steps
    _, V = mdp.values(policy)
    close(p @ episodes.rewards.sum(dim=1), mdp.start @ V[0])


def test_the_exact_gradient_is_that_of_finite_differences(mdp, policy):
    """The oracle of what follows, checked against J alone, by backward induction."""
    theta = nn.utils.parameters_to_vector(policy.parameters()).detach()

    def J(x):
        nn.utils.vector_to_parameters(torch.from_numpy(x), policy.parameters())
        return (mdp.start @ mdp.values(policy)[1][0]).item()

    differences = approx_fprime(theta.numpy(), J, 1e-6)
    nn.utils.vector_to_parameters(theta, policy.parameters())
    close(exact_gradient(mdp, policy), differences, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equation_2_is_unbiased(mdp, policy, estimator):
    """The loss of all episodes, each as often as it occurs, has the exact gradient."""
    episodes, dynamics = mdp.episodes()
    obs, actions, rewards, mask = episodes
    p = probabilities(policy, episodes, dynamics).detach()
    psi = ESTIMATORS[estimator](rewards, 1.0)
    often = (p * len(p))[:, None] * psi  # policy_loss takes the mean over episodes
    loss = reinforce.policy_loss(policy(obs).log_prob(actions), often, mask)
    close(-flat_grad(loss, policy), exact_gradient(mdp, policy))


def test_the_gradient_includes_the_distribution_of_the_states(mdp, policy):
    """Each action credited with its own reward alone: no longer the gradient of J."""
    episodes, dynamics = mdp.episodes()
    p = probabilities(policy, episodes, dynamics).detach()
    mean, _ = moments(policy, episodes, p, reinforce.reward_to_go(episodes.rewards, 0.0))
    exact = exact_gradient(mdp, policy)
    assert (mean - exact).norm() > 0.1 * exact.norm()


def average_psi(episodes, p):
    """G - b with b of (5), in the mean over the other one of two episodes."""
    G = pg_baseline.reward_to_go(episodes.rewards, 1.0)
    rows = [
        sum(
            q * pg_baseline.average_baseline(G[[i, j]], episodes.mask[[i, j]])[0]
            for j, q in enumerate(p)
        )
        for i in range(len(G))
    ]
    return G - torch.stack(rows)


def psis(mdp, policy, episodes, p):
    """Every Ψ of the lecture, by name."""
    G, (Q, V) = reinforce.reward_to_go(episodes.rewards, 1.0), mdp.values(policy)
    return {
        "total_return": reinforce.total_return(episodes.rewards, 1.0),
        "reward_to_go": G,
        "any b(s)": G - episodes.obs @ torch.tensor([7.0, -3.0], dtype=torch.float64),
        "average": G - p @ (episodes.mask * G),  # (5) of infinitely many episodes
        "optimal": G - best_constant(policy, episodes, p, G),
        "value": G - step_values(V, episodes),
        "Q": step_values(Q, episodes),
        "advantage": step_values(Q, episodes) - step_values(V, episodes),
    }


def test_every_baseline_leaves_the_mean_as_it_is(mdp, policy):
    episodes, dynamics = mdp.episodes()
    p, exact = probabilities(policy, episodes, dynamics).detach(), exact_gradient(mdp, policy)
    for psi in psis(mdp, policy, episodes, p).values():
        close(moments(policy, episodes, p, psi)[0], exact)
    close(moments(policy, episodes, p, average_psi(episodes, p))[0], exact)


VARIANCES = {"any b(s)": 99.532, "total_return": 39.662, "reward_to_go": 25.229, "Q": 20.366}
VARIANCES |= {"average": 16.854, "optimal": 14.982, "value": 13.375, "advantage": 7.9352}


def test_the_variance_of_every_estimator_and_baseline(mdp):
    """Total variance of the estimate by one episode over |∇J|²: the figure of pg_baseline.md."""
    policy, (episodes, dynamics) = small_policy(), mdp.episodes()
    p, exact = probabilities(policy, episodes, dynamics).detach(), exact_gradient(mdp, policy)
    by_name = psis(mdp, policy, episodes, p)
    found = {
        name: (moments(policy, episodes, p, psi)[1] / exact.square().sum()).item()
        for name, psi in by_name.items()
    }
    assert found == pytest.approx(VARIANCES, rel=1e-3)
    G, best = by_name["reward_to_go"], best_constant(policy, episodes, p, by_name["reward_to_go"])
    for constant in (best - 0.1, best + 0.1):
        assert (
            moments(policy, episodes, p, G - constant)[1] > found["optimal"] * exact.square().sum()
        )


def test_the_variance_of_a_batch_falls_with_its_size():
    """1 / N, over all batches of N episodes of two steps."""
    policy, episodes = Tabular([[0.3, -0.2]]), all_actions(2, lambda a: 3 * a - 1)
    p = probabilities(policy, episodes, torch.ones(4))
    variances = {}
    for N in (1, 2, 3):
        batches, weights = list(itertools.product(range(4), repeat=N)), []
        gradients = []
        for rows in map(list, batches):
            log_probs = policy(episodes.obs[rows]).log_prob(episodes.actions[rows])
            G = reinforce.reward_to_go(episodes.rewards[rows], 1.0)
            loss = reinforce.policy_loss(log_probs, G, episodes.mask[rows])
            gradients.append(-flat_grad(loss, policy))
            weights.append(p[rows].prod())
        gradients, weights = torch.stack(gradients), torch.stack(weights)
        spread = (gradients - weights @ gradients).square().sum(dim=1)
        variances[N] = (weights @ spread).item()
    assert variances[2] == pytest.approx(variances[1] / 2)
    assert variances[3] == pytest.approx(variances[1] / 3)


# Closed forms


@pytest.mark.parametrize(
    ("theta", "J", "gradient", "full", "to_go"),
    [(0.5, 1, 4, 192, 88), (0.8, 4, 25, 7781.25, 3156.25), (0.9, 9, 100, 127111.11, 50111.11)],
)
def test_stay_or_end(theta, J, gradient, full, to_go):
    """Stay with probability θ, for a reward of 1, or end: J = θ / (1 - θ)."""
    T = 600
    mask = torch.ones(T, T, dtype=torch.float64).tril()
    rewards = mask.tril(-1)  # row k: k times stay, then the end
    obs = mask.unsqueeze(-1)
    episodes = reinforce.Trajectories(obs, rewards.long(), rewards, mask)
    policy = Coin(theta)
    p = probabilities(policy, episodes, torch.ones(T)).detach()
    close(p @ rewards.sum(dim=1), J, rtol=1e-6)
    for estimator, variance in {"total_return": full, "reward_to_go": to_go}.items():
        psi = ESTIMATORS[estimator](rewards, 1.0)
        mean, total = moments(policy, episodes, p, psi)
        close(mean, [gradient], rtol=1e-6)
        close(total, variance, rtol=1e-6)


@pytest.mark.parametrize(
    ("p", "r", "gradient", "best", "value", "variances"),
    [
        (0.9, (1, 0), 0.09, 0.1, 0.9, (0.0009 * 9, 0.0576, 0)),
        (0.5, (1, 0), 0.25, 0.5, 0.5, (0.0625, 0, 0)),
        (0.7, (3, 1), 0.42, 1.6, 2.4, (0.5376, 0.1344, 0)),
    ],
)
def test_two_arms(p, r, gradient, best, value, variances):
    """Var(b) = p (1 - p) (b - b*)², b* = (1 - p) r_1 + p r_2; V is not the best baseline."""
    if p == 0.9:
        variances = (p * (1 - p) * best**2, *variances[1:])
    policy = Tabular([[math.log(p / (1 - p)), 0.0]])
    episodes = all_actions(1, lambda actions: r[0] + (r[1] - r[0]) * actions)
    weights = probabilities(policy, episodes, torch.ones(2)).detach()
    scores = pg_baseline.trajectory_gradients(policy, *episodes[:2], episodes.mask)[:, :1]
    for b, variance in zip((0, value, best), variances):
        rows = scores * (episodes.rewards - b)
        mean = weights @ rows
        close(mean, [gradient])
        close(weights @ (rows - mean).square(), [variance])
    root = weights.sqrt()[:, None]
    pairs = (torch.cat([0 * x[:1], root * x]) for x in (scores, scores * episodes.rewards))
    close(pg_baseline.optimal_baseline(*pairs)[0], [best])


@pytest.mark.parametrize(
    ("d", "std", "variances"),
    [(1, 1, (30, 18, 14)), (1, 0.5, (21.75, 10.5, 9.5)), (0, 1, (15, 10, 6))],
)
def test_gaussian_bandit(d, std, variances):
    """a ~ N(μ, s²), R = -(a - c)², d = μ - c: gradient -2 d; b = 0, V, b* = -(d² + 3 s²)."""
    policy, c = pg_baseline.Policy(1, 1, discrete=False).double(), 0.7
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.zero_()
        policy.network[2].bias.fill_(c + d)
        policy.log_std.fill_(math.log(std))
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    actions = (c + d + std * nodes).view(-1, 1, 1)
    obs, R = torch.zeros(len(nodes), 1, 1).double(), -(actions[..., 0] - c).square()
    for b, variance in zip((0, -(d**2 + std**2), -(d**2 + 3 * std**2)), variances):
        rows = pg_baseline.trajectory_gradients(policy, obs, actions, R - b)
        mean = weights @ rows
        close(mean[-1], -2 * d)
        close(mean[0], -2 * std**2)  # of log s
        close(weights @ (rows[:, -1] - mean[-1]).square(), variance)


def test_reward_to_go_may_have_the_larger_variance():
    """Rewards -1, then 1: the return is 0, and so is its estimate; 0.5 for the reward-to-go."""
    policy = Tabular([[0.0, 0.0]])
    episodes = all_actions(2, lambda actions: torch.tensor([[-1.0, 1.0]]).double().expand(4, 2))
    p = torch.full((4,), 0.25).double()
    found = {
        name: moments(policy, episodes, p, estimator(episodes.rewards, 1.0))
        for name, estimator in ESTIMATORS.items()
    }
    close(found["total_return"][1], 0.0)
    close(found["reward_to_go"][1], 0.5)
    close(found["reward_to_go"][0], [0.0, 0.0])


@pytest.mark.parametrize(("T", "full", "to_go"), [(5, 62.5, 27.5), (10, 500, 192.5)])
def test_a_constant_reward_is_nothing_but_variance(T, full, to_go):
    """½ T³ and T (T + 1) (2 T + 1) / 12; 0 with V_t as the baseline."""
    policy, episodes = Tabular([[0.0, 0.0]]), all_actions(T, lambda actions: actions * 0 + 1)
    p = torch.full((2**T,), 0.5**T).double()
    G = reinforce.reward_to_go(episodes.rewards, 1.0)
    close(moments(policy, episodes, p, reinforce.total_return(episodes.rewards, 1.0))[1], full)
    close(moments(policy, episodes, p, G)[1], to_go)
    close(moments(policy, episodes, p, G - G.mean(dim=0))[1], 0.0)


@pytest.mark.parametrize("N", [2, 3, 4])
def test_equation_5_leaves_the_episode_out_as_the_batch_mean_is_biased(N):
    """Two arms, gradient 0.42: the mean of all N would give (1 - 1/N) of it."""
    policy, episodes = Tabular([[math.log(0.7 / 0.3), 0.0]]), all_actions(1, lambda a: 3 - 2 * a)
    p = torch.tensor([0.7, 0.3]).double()
    means = {"others": 0.0, "all": 0.0}
    for batch in map(list, itertools.product([0, 1], repeat=N)):
        G, mask = episodes.rewards[batch], episodes.mask[batch]
        log_probs = policy(episodes.obs[batch]).log_prob(episodes.actions[batch])
        baselines = {"others": pg_baseline.average_baseline(G, mask), "all": G.mean(dim=0)}
        for name, b in baselines.items():
            loss = pg_baseline.policy_loss(log_probs, G - b, mask)
            (gradient,) = torch.autograd.grad(-loss, policy.logits, retain_graph=True)
            means[name] += p[batch].prod().item() * gradient[0, 0].item()
    assert means["others"] == pytest.approx(0.42)
    assert means["all"] == pytest.approx((1 - 1 / N) * 0.42)


@pytest.mark.parametrize("action", [0, 1])
@pytest.mark.parametrize("psi", [2.0, -2.0])
def test_good_actions_become_more_likely_and_bad_ones_less(psi, action):
    """One step along (2), for Ψ = R - b."""
    policy = Tabular([[0.4, -0.3]])
    obs, actions, _, mask = all_actions(1)
    before = policy(obs).log_prob(actions).detach()
    chosen = [action]
    log_probs = policy(obs[chosen]).log_prob(actions[chosen])
    loss = reinforce.policy_loss(log_probs, torch.full((1, 1), psi).double(), mask[chosen])
    loss.backward()
    policy.logits.data -= 0.1 * policy.logits.grad
    change = (policy(obs).log_prob(actions) - before)[action].item()
    assert change * psi > 0


def test_a_sparse_reward_leaves_most_samples_without_a_signal():
    """A reward only for action 1, ten times in a row: one episode in 1024 has a gradient."""
    policy = Coin(0.5)
    episodes = all_actions(10, lambda a: a.prod(dim=1, keepdim=True) * torch.eye(10)[-1])
    G = reinforce.total_return(episodes.rewards, 1.0)
    rows = pg_baseline.trajectory_gradients(policy, *episodes[:2], G)
    assert int((rows != 0).sum()) == 1
    close(rows.mean(dim=0), [10 * 0.5**9])


def test_unweighted_old_data_is_biased(mdp, policy):
    """On-policy: the gradient at φ' needs episodes of φ', or weights."""
    episodes, dynamics = mdp.episodes()
    old = probabilities(Tabular([[1.0, 0.0], [0.0, 1.0]]), episodes, dynamics).detach()
    mean, _ = moments(policy, episodes, old, reinforce.reward_to_go(episodes.rewards, 1.0))
    exact = exact_gradient(mdp, policy)
    assert (mean - exact).norm() > 0.1 * exact.norm()


# The short corridor with switched actions (Sutton and Barto, example 13.1): all states look alike


def corridor_return(p):
    """J of going right with probability p."""
    return 2 * (p - 2) / (p * (1 - p))


def test_reinforce_finds_the_stochastic_policy_of_the_corridor():
    """p* = 2 - √2 = 0.586, J* = -11.66."""
    settings = {"env_id": "envs:Corridor-v0", "num_envs": 32, "total_timesteps": 100_000}
    settings |= {"learning_rate": 0.01, "decay_steps": 20_000, "wandb_mode": "disabled"}
    reinforce.train(reinforce.Args(**settings, eval_episodes=1))
    (path,) = Path("runs").glob("*/checkpoint.pt")
    policy = reinforce.Policy(1, 2, discrete=True)
    policy.load_state_dict(torch.load(path, weights_only=True)["policy"])
    right = policy(torch.ones(1)).probs[1].item()
    assert right == pytest.approx(2 - math.sqrt(2), abs=0.06)
    assert corridor_return(right) > -11.8
    torch.manual_seed(0)
    sampled = reinforce.rollout(reinforce.make_envs("envs:Corridor-v0", 1000), policy).rewards
    assert sampled.sum(dim=1).mean().item() == pytest.approx(-11.66, abs=0.9)


@pytest.mark.parametrize(("q_values", "expected"), [([1.0, 0.0], -82.105), ([0.0, 1.0], -44.211)])
def test_no_greedy_policy_can_cross_the_corridor(q_values, expected):
    """ε-greedy at ε = 0.1, left or right, against -11.66; greedy itself never arrives."""
    torch.manual_seed(0)
    network = nn.Linear(1, 2, bias=False)
    network.weight.data = torch.tensor(q_values)[:, None]
    right = dqn.select_actions(network, torch.ones(400_000, 1), 0.1).float().mean().item()
    assert corridor_return(right) == pytest.approx(expected, rel=0.04)
    for action in (0, 1):
        vector_env = dqn.make_envs("envs:Corridor-v0", 1)
        policy = lambda obs, action=action: torch.full((1,), action)  # noqa: E731
        assert dqn.evaluate(policy, vector_env, torch.device("cpu")) == -100  # the time limit


# Deep Q-learning


@pytest.mark.parametrize(("n", "bias"), [(2, 0.5642), (3, 0.8463), (4, 1.0294), (10, 1.5388)])
def test_equation_7_takes_away_the_bias_of_the_max(n, bias):
    """n actions of value 0 whose estimates err by N(0, 1): E[max] is the bias of (4)."""
    torch.manual_seed(0)
    B = 200_000
    first, second = Table(torch.randn(B, n)), Table(torch.randn(B, n))
    obs, zeros = torch.arange(B)[:, None].float(), torch.zeros(B)
    batch = dqn.Batch(obs, zeros.long(), zeros, obs, zeros)
    single = dqn.td_target(batch, first, second, 1.0, double_q=False)
    double = dqn.td_target(batch, first, second, 1.0, double_q=True)
    assert single.mean().item() == pytest.approx(bias, abs=0.008)
    assert double.mean().item() == pytest.approx(0.0, abs=0.01)


def test_equation_9_weights_undo_the_priorities():
    """Σ_i P_i w_i x_i = mean of x at β = 1; a bias between the two at β = 0.4."""
    buffer = dqn.PrioritizedReplayBuffer(4, (1,), (), torch.int64, "cpu")
    x = torch.tensor([1.0, -2.0, 3.0, 5.0])
    buffer.add(x[:, None], x.long(), x, x[:, None], x)
    buffer.update_priorities(torch.arange(4), torch.tensor([2.0, 4.0, 8.0, 16.0]), alpha=1.0)
    P = buffer.priorities / buffer.priorities.sum()
    for beta, expected in {1.0: 1.75, 0.4: 2.5193, 0.0: 45 / 15 + 4 / 15}.items():
        torch.manual_seed(0)
        batch, rows, weights = buffer.sample(200, beta)
        w = torch.zeros(4)
        w[rows] = weights  # the weight of each row that was drawn
        largest = (4 * P.min()) ** -beta  # train takes w / max w
        close((P * w * largest * x).sum(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("slippery", "expected"),
    [
        (True, [0.542026, 0.527762, 0.527762, 0.522342]),
        (False, [0.99**6, 0.99**5, 0.99**5, 0.99**6]),
    ],
)
def test_equation_4_is_the_bellman_operator_of_frozen_lake(slippery, expected):
    """Iterated on all transitions at once, it converges to Q*."""
    model = gym.make("FrozenLake-v1", is_slippery=slippery).unwrapped.P
    rows = [(s, a, *x) for s in model for a in model[s] for x in model[s][a]]
    s, a, p, next_s, r, ends = (torch.tensor(x).float() for x in zip(*rows))
    batch = dqn.Batch(s[:, None], a.long(), r, next_s[:, None], ends)
    table = Table(torch.zeros(16, 4))
    for _ in range(700):
        y = dqn.td_target(batch, table, table, 0.99, double_q=False)
        table.rows.data = torch.zeros(64).index_add(0, (4 * s + a).long(), p * y).view(16, 4)
    close(table.rows[0].detach(), expected, atol=1e-5)


@pytest.mark.parametrize(("gamma", "expected"), [(0.8, 0.4420), (5 / 6, 1.0), (0.9, 4.661)])
def test_fitted_q_iteration_may_diverge(gamma, expected):
    """Tsitsiklis and Van Roy (1996): features 1 and 2, no reward: w ← 6/5 γ w, 20 times from 1."""
    features = torch.tensor([[1.0], [2.0]]).double()
    network = nn.Linear(1, 1, bias=False).double()
    network.weight.data.fill_(1.0)
    zeros = torch.zeros(2).double()
    batch = dqn.Batch(features, zeros.long(), zeros, features[[1, 1]], zeros)
    for _ in range(20):  # each fit against a fixed target network
        y = dqn.td_target(batch, network, network, gamma, double_q=False)
        network.weight.data = torch.linalg.lstsq(features, y[:, None]).solution
    close(network.weight.item(), expected, rtol=1e-3)


TABLE = {"tabular": True, "num_envs": 1, "buffer_size": 1, "batch_size": 1, "num_updates": 1}
TABLE |= {"learning_starts": 1, "target_network_frequency": 1, "eval_episodes": 1}
TABLE |= {"learning_rate": 0.5, "anneal_lr": False, "wandb_mode": "disabled"}


def table_of(**settings):
    """What classic Q-learning has learned, (S, A), and its greedy return."""
    before = set(Path("runs").glob("*"))
    returns = dqn.train(dqn.Args(**TABLE | settings))
    (run_dir,) = set(Path("runs").glob("*")) - before
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return saved["q_network"]["weight"].T, returns.item()


def test_an_episode_that_the_time_limit_cuts_has_a_future():
    """One state, r = 1, γ = 0.9, five steps: Q is 10, not 4.0951."""
    table, _ = table_of(env_id="envs:Loop-v0", gamma=0.9, total_timesteps=600)
    close(table, torch.full((1, 2), 10.0), atol=1e-3)


def test_q_learning_is_off_policy_and_needs_coverage():
    """It learns Q* from a policy that acts at random, and nothing from one that never explores."""
    lake = {"env_id": "benchmark.envs:OneHotFrozenLake-v1", "total_timesteps": 12_000}
    table, greedy_return = table_of(**lake, start_e=1.0, end_e=1.0)
    close(table[0], [0.99**6, 0.99**5, 0.99**5, 0.99**6], atol=1e-3)
    assert greedy_return == 1
    table, greedy_return = table_of(**lake | {"total_timesteps": 1000}, start_e=0.0, end_e=0.0)
    assert greedy_return == 0 and table.eq(0).all()


# The linear-quadratic regulator


@pytest.fixture(params=[scalar_lqr, planar_lqr], ids=["one action", "two actions"])
def lqr(request):
    return request.param()


def states(lqr, count=50):
    torch.manual_seed(0)
    return torch.randn(count, len(lqr.A), dtype=torch.float64)


def lqr_batch(module, lqr, count=50):
    """Transitions by actions that have nothing to do with the best ones."""
    x = states(lqr, count)
    u = torch.randn(count, lqr.B.shape[1], dtype=torch.float64)
    rewards, next_x = lqr.step(x, u)
    return module.Batch(x, u, rewards, next_x, torch.zeros_like(rewards))


@pytest.mark.parametrize(
    ("gamma", "P", "K", "P_naf"),
    [(1, 1.618034, 0.618034, 5.236068), (0.99, 1.615251, 0.615251, 5.198197),
     (0.9, 1.588403, 0.588403, 4.859126), (0.5, 1.414214, 0.414214, 3.414214)],
)  # fmt: skip
def test_the_scalar_lqr_has_the_golden_ratio(gamma, P, K, P_naf):
    lqr = scalar_lqr(gamma)
    close([lqr.P.item(), lqr.K.item(), 2 * lqr.H.item()], [P, K, P_naf], atol=1e-6)


class Quadratic(nn.Module):
    """μ = -K x, L and V = -xᵀ S x as parameters, in NAF's place."""

    def __init__(self, K, L, S):
        super().__init__()
        self.K, self.L, self.S = (nn.Parameter(x.clone()) for x in (K, L, S))

    def forward(self, x):
        value = -(x @ self.S * x).sum(dim=-1)
        return -x @ self.K.mT, self.L.tril().expand(len(x), -1, -1), value


def test_naf_is_exact_for_the_lqr(lqr):
    """With Riccati's K, L Lᵀ = 2 H and V = -xᵀ P x, (2) is Q*: its TD error is 0."""
    network = Quadratic(lqr.K, torch.linalg.cholesky(2 * lqr.H), lqr.P)
    batch = lqr_batch(naf, lqr)
    q = naf.naf_q(*network(batch.obs), batch.actions)
    close(q, lqr.q(batch.obs, batch.actions))
    close(naf.td_target(batch, network, lqr.gamma, 1.0), q)


def test_naf_learns_the_lqr_from_random_actions(lqr):
    torch.manual_seed(1)
    n, m = len(lqr.A), lqr.B.shape[1]
    eye = torch.eye(m, dtype=torch.float64)
    network = Quadratic(torch.zeros(m, n).double(), eye, torch.eye(n, dtype=torch.float64))
    batch, adam = lqr_batch(naf, lqr), torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(1500):
        error = naf.naf_q(*network(batch.obs), batch.actions)
        error = error - naf.td_target(batch, network, lqr.gamma, 1.0)
        adam.zero_grad()
        error.square().mean().backward()
        adam.step()
    close(network.K.detach(), lqr.K, atol=1e-2)


SEARCHES = {
    "grid": (cem_q.argmax_grid, {"bins": 101}, 0.011),
    "gradient": (cem_q.argmax_gradient, {"num_samples": 64, "iterations": 60}, 0.05),
    "cem": (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 8}, 0.03),
    "cmaes": (cem_q.argmax_cmaes, {"num_samples": 16, "iterations": 30}, 0.03),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_finds_the_action_of_the_lqr(lqr, name):
    """And with it (4) is Q*, up to the square of what the search misses by."""
    torch.manual_seed(0)
    search, settings, tolerance = SEARCHES[name]
    m = lqr.B.shape[1]
    q_network = lambda x, u: lqr.q(x.double(), u.double())  # noqa: E731
    batch = lqr_batch(cem_q, lqr)
    batch = batch._replace(next_obs=0.4 * batch.next_obs / batch.next_obs.norm(dim=1, keepdim=True))
    best = -batch.next_obs @ lqr.K.mT
    assert best.abs().max() < 1  # in the box
    find = lambda q, B: search(q, B, m, **settings)  # noqa: E731
    actions = cem_q.argmax_action(q_network, batch.next_obs, find)
    assert (actions - best).square().mean().sqrt() < tolerance
    y = cem_q.td_target(batch, actions, q_network, lqr.gamma)
    value = -(batch.next_obs @ lqr.P * batch.next_obs).sum(dim=-1)
    close(y, batch.rewards + lqr.gamma * value, atol=0.02)


@pytest.mark.parametrize(
    ("k", "J", "gradient"), [(0.3, -1.949911, 3.321802), (0.8, -1.701245, -1.024431)]
)
def test_ddpg_is_the_deterministic_policy_gradient(k, J, gradient):
    """Of u = -k x: dJ/dk is the critic's slope at the discounted second moment of the states."""
    lqr, actor = scalar_lqr(), LinearActor([[k]])
    P = torch.tensor([[(1 + k * k) / (1 - 0.9 * (1 - k) ** 2)]]).double()
    batch = lqr_batch(ddpg_continuous, lqr)
    critic = lambda x, u: lqr.q(x, u, P)  # noqa: E731
    y = ddpg_continuous.td_target(batch, actor, critic, 0.9)
    close(y, critic(batch.obs, batch.actions))  # Q of the policy: TD error 0
    close(-P.item(), J, rtol=1e-6)
    x = torch.tensor([[(1 / (1 - 0.9 * (1 - k) ** 2)) ** 0.5]]).double()
    (ours,) = torch.autograd.grad(-ddpg_continuous.actor_loss(actor, critic, x), actor.K)
    close(ours, [[gradient]], rtol=1e-6)


class LinearActor(nn.Module):
    def __init__(self, K):
        super().__init__()
        self.K = nn.Parameter(torch.as_tensor(K, dtype=torch.float64))

    def forward(self, x):
        return -x @ self.K.mT


def policy_cost(lqr, K, P):
    """One more step of u = -K x before the cost xᵀ P x."""
    closed = lqr.A - lqr.B @ K
    return lqr.Q + K.mT @ lqr.R @ K + lqr.gamma * closed.mT @ P @ closed


def test_ddpg_learns_the_lqr_by_policy_iteration(lqr):
    """A step of evaluation, as (4), and one of (7) towards the top of Q: K is Riccati's."""
    actor = LinearActor(torch.zeros_like(lqr.K))
    x, P = states(lqr), torch.eye(len(lqr.A), dtype=torch.float64)
    adam = torch.optim.Adam(actor.parameters(), 0.02)
    for _ in range(600):
        P = policy_cost(lqr, actor.K.detach(), P)
        loss = ddpg_continuous.actor_loss(actor, lambda x, u, P=P: lqr.q(x, u, P), x)
        adam.zero_grad()
        loss.backward()
        adam.step()
    close(actor.K.detach(), lqr.K, atol=1e-2)


@pytest.mark.parametrize(
    ("k", "J", "dk"), [(0.3, -8.837209, 10.795856), (0.8, -8.029046, -3.329402)]
)
def test_the_policy_gradient_of_a_linear_gaussian_policy(k, J, dk):
    """u ~ N(-k x, s²) with s = ½, by quadrature, with the exact Q^π for Ψ."""
    lqr, std, policy = scalar_lqr(), 0.5, LinearGaussian([[k]], 0.5)
    shrink = 1 - 0.9 * (1 - k) ** 2
    P = torch.tensor([[(1 + k * k) / shrink]]).double()
    close(-(P.item() + std**2 * (1 + 0.9 * P.item()) / 0.1), J, rtol=1e-6)
    second_moment = (1 + 0.9 * std**2 / 0.1) / shrink  # Σ_t γ^t E x_t², for E x_1² = 1
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(12))
    weights = weights / weights.sum()
    x = torch.full((len(nodes), 1, 1), second_moment**0.5).double()
    u = -k * x + std * nodes.view(-1, 1, 1)
    rows = pg_baseline.trajectory_gradients(policy, x, u, lqr.q(x, u, P))
    close(weights @ rows[:, 0], dk, rtol=1e-6)
    ds = weights @ rows[:, 1] / 0.1  # no state in it: Σ_t γ^t = 10
    close(ds, -2 * std * (1 + 0.9 * P.item()) / 0.1, rtol=1e-6)
    if k == 0.3:
        close(ds, -27.549195, rtol=1e-6)


def test_a_linear_gaussian_policy_climbs_to_the_lqr(lqr):
    """Steps along (2) with the exact Q^π for Ψ, in the mean over the noise by quadrature."""
    m, std = lqr.B.shape[1], 0.4
    policy, x = LinearGaussian(torch.zeros_like(lqr.K), std), states(lqr)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(4))
    noise = torch.cartesian_prod(*[nodes] * m).view(-1, m)
    weights = torch.cartesian_prod(*[weights / weights.sum()] * m).view(-1, m).prod(dim=1)
    weights = len(weights) * weights.repeat(len(x), 1)
    x = x.unsqueeze(1).expand(-1, len(noise), -1)
    P, adam = lqr.P, torch.optim.Adam([policy.K], 0.02)
    for _ in range(400):
        P = policy_cost(lqr, policy.K.detach(), P)
        u = -x @ policy.K.detach().mT + std * noise
        psi = weights * lqr.q(x, u, P)
        loss = reinforce.policy_loss(policy(x).log_prob(u), psi, torch.ones_like(psi))
        adam.zero_grad()
        loss.backward()
        adam.step()
    close(policy.K.detach(), lqr.K, atol=1e-2)


def test_reinforce_learns_the_scalar_lqr():
    """From sampled returns alone; each reward-to-go that counts sees 30 steps at least."""
    torch.manual_seed(0)
    lqr, N, T = scalar_lqr(), 1024, 40
    policy, mask = LinearGaussian([[0.0]], 1.0), (torch.arange(T) < 10).double().expand(N, T)
    adam, last = torch.optim.Adam([policy.K]), []
    for i in range(250):
        x, steps = torch.randn(N, 1).double(), []
        for _ in range(T):
            u = policy(x).sample()
            reward, next_x = lqr.step(x, u)
            steps.append((x, u, reward))
            x = next_x
        obs, actions, rewards = (torch.stack(values, dim=1) for values in zip(*steps))
        G = reinforce.reward_to_go(rewards, lqr.gamma)
        loss = reinforce.policy_loss(policy(obs).log_prob(actions), G - G.mean(dim=0), mask)
        adam.param_groups[0]["lr"] = 0.05 / (1 + i / 30)
        adam.zero_grad()
        loss.backward()
        adam.step()
        last = [*last[-49:], policy.K.item()]
    assert sum(last) / 50 == pytest.approx(lqr.K.item(), abs=0.04)


# The searches


TOP = 0.37  # of the quadratic, in each dimension


@pytest.mark.parametrize(
    ("d", "iterations", "bound"),
    [(1, 1, 0.034), (1, 2, 0.0045), (1, 3, 0.0020), (2, 1, 0.104), (2, 2, 0.031), (2, 3, 0.013),
     (6, 1, 0.196), (6, 2, 0.126), (6, 3, 0.078), (6, 4, 0.051)],
)  # fmt: skip
def test_equation_9_is_as_accurate_as_known(d, iterations, bound):
    """RMSE a dimension, of the mean of 6 elites of 64, from N(0, 1)."""
    torch.manual_seed(0)
    q = lambda a: -(a - TOP).square().sum(dim=-1)  # noqa: E731
    found = cem_q.argmax_cem(q, 2000, d, 64, 6, iterations, min_std=1e-6)
    assert (found - TOP).square().mean().sqrt().item() == pytest.approx(bound, rel=0.15)


@pytest.mark.parametrize(
    ("search", "settings", "rate"),
    [
        (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 2}, 0.79),
        (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 3}, 0.94),
        (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 4}, 0.96),
        (cem_q.argmax_gradient, {"num_samples": 1, "iterations": 50}, 0.50),
        (cem_q.argmax_gradient, {"num_samples": 8, "iterations": 50}, 0.99),
        (cem_q.argmax_grid, {"bins": 21}, 1.0),
    ],
)
def test_how_often_each_search_finds_the_higher_of_two_peaks(search, settings, rate):
    """For cem from N(0, 1) in the box; gradient steps of one length leave the flat parts, too."""
    torch.manual_seed(0)
    found = search(lambda a: bimodal(a.squeeze(-1)), 4000, 1, **settings)
    success = (found - 0.5).abs().lt(0.1).double().mean().item()
    assert success == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize(("bins", "value"), [(11, 0.91), (21, 1.5)])
def test_equation_7_loses_what_lies_between_its_points(bins, value):
    """11 points a dimension are 0.4 apart in [-2, 2], and miss the peak by half of that."""
    found = cem_q.argmax_grid(lambda a: bimodal(a.squeeze(-1)), 1, 1, bins)
    close(bimodal(found), [[value]], atol=1e-3)


def test_equation_2_of_naf_cannot_have_two_peaks():
    """The quadratic nearest to that Q has its top at 0.36 in [-2, 2], of value 0.0095, not 1.5."""
    a = torch.linspace(-1, 1, 4001).double()
    curvature, slope, constant = np.polyfit(a.numpy(), bimodal(a).numpy(), 2)
    assert curvature < 0
    mu = torch.tensor([-slope / (2 * curvature)]).double()
    L = torch.tensor([[(-2 * curvature) ** 0.5]]).double()
    value = torch.tensor(constant - slope**2 / (4 * curvature)).double()
    fitted = naf.naf_q(mu, L, value, a[:, None])
    close(fitted, np.polyval([curvature, slope, constant], a.numpy()))
    assert fitted.argmax() == (a - mu).abs().argmin()
    close(2 * mu, [0.36], atol=0.01)
    close(bimodal(mu), [0.0095], atol=2e-3)


def ellipsoid(rotation, condition=1e4, d=4):
    """-Σ_i condition^(i/(d-1)) x_i², x = rotationᵀ (a - top), its top inside the box."""
    scale = condition ** torch.linspace(0, 1, d).double()
    top = torch.tensor([0.2, -0.1, 0.15, 0.05]).double()[:d]
    return lambda a: -((a.double() - top) @ rotation).square() @ scale


def rotation_of(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def test_equation_10_is_as_good_as_a_library_on_an_ill_conditioned_ellipsoid():
    """The median of log10 of what is missing, after 100 iterations of 12: within one of cma's."""
    f = ellipsoid(rotation_of(4))
    torch.manual_seed(0)
    ours = cem_q.argmax_cmaes(f, 100, 4, num_samples=12, iterations=100, min_std=1e-12)
    missing = []
    for seed in range(1, 21):
        options = {"popsize": 12, "seed": seed, "verbose": -9, "CMA_active": False}
        es = cma.CMAEvolutionStrategy(4 * [0.0], 0.5, options | {"tolfun": 0, "tolfunhist": 0})
        for _ in range(100):
            points = es.ask()
            es.tell(points, [-f(torch.tensor(np.array(x))).item() for x in points])
        missing.append(-f(torch.tensor(es.mean)).item())
    theirs, ours = np.log10(np.median(missing)), (-f(ours)).median().log10().item()
    assert ours < -3 and abs(ours - theirs) < 1


def test_equation_10_does_not_mind_a_rotation_and_equation_9_does():
    missing = {}
    for name, rotation in {"axes": torch.eye(4).double(), "rotated": rotation_of(4)}.items():
        f = ellipsoid(rotation, 1e3)
        torch.manual_seed(0)
        es = cem_q.argmax_cmaes(f, 200, 4, num_samples=12, iterations=60, min_std=1e-12)
        torch.manual_seed(0)
        cem = cem_q.argmax_cem(f, 200, 4, 64, 6, iterations=12, min_std=1e-12)
        missing[name] = [(-f(found)).median().log10().item() for found in (es, cem)]
    (es, cem), (es_rotated, cem_rotated) = missing["axes"], missing["rotated"]
    assert abs(es - es_rotated) < 0.7 and cem_rotated > cem + 1.5


@pytest.mark.parametrize("search", [cem_q.argmax_grid, cem_q.argmax_cem, cem_q.argmax_cmaes])
def test_a_search_by_rank_sees_only_the_order(search):
    """The same samples for f and for an increasing function of it."""
    f, found = ellipsoid(rotation_of(2), 100, d=2), []
    for transform in (lambda q: q, lambda q: q**3, lambda q: (q / 100).exp()):
        torch.manual_seed(3)
        found.append(search(lambda a, g=transform: g(f(a)), 20, 2))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_covariance_of_equation_10_becomes_that_of_the_level_sets():
    """C ∝ H⁻¹: the longest axis of the samples is the flattest of the ellipsoid."""
    rotation, drawn = rotation_of(2), []
    f = ellipsoid(rotation, 100, d=2)
    torch.manual_seed(0)
    cem_q.argmax_cmaes(lambda a: drawn.append(a) or f(a), 300, 2, 12, 30, min_std=1e-12)
    centred = drawn[-1] - drawn[-1].mean(dim=1, keepdim=True)
    variances, axes = torch.linalg.eigh((centred.mT @ centred).double())
    alignment = (axes[:, :, -1] @ rotation[:, 0]).abs()
    assert alignment.median() > 0.99
    assert (variances[:, -1] / variances[:, 0]).log10().median().item() == pytest.approx(2, abs=0.5)


# Importance sampling


def off_policy(mdp, policy):
    """Episodes of the uniform policy, their probability, and the log-ratios to `policy`."""
    episodes, dynamics = mdp.episodes()
    uniform = Tabular(torch.zeros(2, 2))
    p = probabilities(uniform, episodes, dynamics).detach()
    obs, actions = episodes[:2]
    log_ratio = policy(obs).log_prob(actions) - uniform(obs).log_prob(actions)
    return episodes, p, log_ratio.detach()


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("estimator", ["trajectory", "causal", "per_decision", "per_step"])
def test_importance_sampling_is_unbiased_but_for_the_per_step_form(
    mdp, policy, estimator, baseline
):
    episodes, p, log_ratio = off_policy(mdp, policy)
    arguments = log_ratio, episodes.rewards, episodes.mask, 1.0, estimator
    psi = offpolicy_pg.importance_weighted_psi(*arguments)
    if baseline:
        b = episodes.obs @ torch.tensor([2.0, -1.0], dtype=torch.float64)
        psi = psi - offpolicy_pg.log_weights(log_ratio, episodes.mask, estimator).exp() * b
    mean, _ = moments(policy, episodes, p, psi)
    exact = exact_gradient(mdp, policy)
    if estimator == "per_step":
        assert (mean - exact).norm() > 1e-3 * exact.norm()
    else:
        close(mean, exact)


OFF_POLICY = {"trajectory": (0, 53.670), "causal": (0, 31.294), "per_decision": (0, 26.746)}
OFF_POLICY |= {"per_step": (0.27615, 21.390)}


def test_the_bias_and_variance_of_importance_sampling(mdp):
    """|bias| / |∇J|, and total variance / |∇J|², on data of the uniform policy."""
    policy, found = small_policy(), {}
    episodes, p, log_ratio = off_policy(mdp, policy)
    exact = exact_gradient(mdp, policy)
    for estimator in ("trajectory", "causal", "per_decision", "per_step"):
        arguments = log_ratio, episodes.rewards, episodes.mask, 1.0, estimator
        psi = offpolicy_pg.importance_weighted_psi(*arguments)
        mean, total = moments(policy, episodes, p, psi)
        bias = (mean - exact).norm() / exact.norm()
        found[estimator] = (bias.item(), (total / exact.square().sum()).item())
    for estimator, numbers in found.items():
        assert numbers == pytest.approx(OFF_POLICY[estimator], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("estimator", ["trajectory", "per_decision", "per_step"])
def test_a_weight_is_1_in_the_mean(mdp, policy, estimator):
    """E[w_t] = 1 at every step that is reached."""
    episodes, p, log_ratio = off_policy(mdp, policy)
    weights = offpolicy_pg.log_weights(log_ratio, episodes.mask, estimator).exp()
    reached = p @ episodes.mask
    close(p @ weights[:, 0], 1.0)
    if estimator != "trajectory":
        alive = p @ (weights * episodes.mask)
        expected = probabilities(policy, *mdp.episodes()).detach() @ episodes.mask
        close(alive, expected if estimator == "per_decision" else reached)


def test_a_weighted_return_is_that_of_the_new_policy(mdp, policy):
    """J(φ') = E[Π_t ρ_t R(τ)] over episodes of the old policy."""
    episodes, p, log_ratio = off_policy(mdp, policy)
    weights = offpolicy_pg.log_weights(log_ratio, episodes.mask, "trajectory").exp()[:, 0]
    returns = reinforce.total_return(episodes.rewards, 1.0)[:, 0]
    close(p @ (weights * returns), mdp.start @ mdp.values(policy)[1][0])
    assert abs(p @ returns - p @ (weights * returns)) > 0.1


def test_the_dynamics_cancel(policy):
    """p_φ'(τ) / p_φ(τ) is the product of the policies' ratios, whatever the env."""
    torch.manual_seed(1)
    transition = torch.rand(2, 2, 2).softmax(dim=-1) * 0.9
    mdp = MDP([0.2, 0.8], transition, torch.zeros(3, 2, 2))
    episodes, dynamics = mdp.episodes()
    _, p, log_ratio = off_policy(mdp, policy)
    weights = offpolicy_pg.log_weights(log_ratio, episodes.mask, "trajectory").exp()[:, 0]
    close(probabilities(policy, episodes, dynamics).detach() / p, weights)


def test_the_per_step_bias_grows_as_the_policy_moves_away(mdp):
    behavior, biases = Tabular(torch.zeros(2, 2)), []
    episodes, dynamics = mdp.episodes()
    p = probabilities(behavior, episodes, dynamics).detach()
    obs, actions = episodes[:2]
    for distance in (0.0, 0.5, 1.0, 2.0):
        target = Tabular(distance * torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))
        log_ratio = (target(obs).log_prob(actions) - behavior(obs).log_prob(actions)).detach()
        arguments = log_ratio, episodes.rewards, episodes.mask, 1.0, "per_step"
        mean, _ = moments(target, episodes, p, offpolicy_pg.importance_weighted_psi(*arguments))
        exact = exact_gradient(mdp, target)
        biases.append(((mean - exact).norm() / exact.norm()).item())
    assert biases[0] == pytest.approx(0, abs=1e-12)
    assert biases == sorted(biases) and biases[-1] > 0.05


@pytest.mark.parametrize(("H", "mean", "variance"), [(3, 1.08, 8.1648), (10, 0.100777, 10.3896)])
def test_the_variance_of_a_product_of_ratios(H, mean, variance):
    """Reward only for action 1, H times: θ = 0.6, from data of θ = 0.5."""
    target = Coin(0.6)
    episodes = all_actions(H, lambda a: a.prod(dim=1, keepdim=True) * torch.eye(H)[-1])
    p = torch.full((2**H,), 0.5**H).double()
    log_ratio = (target(episodes.obs).log_prob(episodes.actions) - math.log(0.5)).detach()
    arguments = log_ratio, episodes.rewards, episodes.mask, 1.0, "trajectory"
    found = moments(target, episodes, p, offpolicy_pg.importance_weighted_psi(*arguments))
    close(found[0], [mean], rtol=1e-5)
    close(found[1], variance, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 5, 10, 14])
def test_equation_10_falls_exponentially_with_the_horizon(T):
    """π = (0.6, 0.4) on data of (0.5, 0.5): E[ρ²] = 1.04, and ESS / N = 1.04^-T."""
    target, episodes = Coin(0.4), all_actions(T)
    log_ratio = (target(episodes.obs).log_prob(episodes.actions) - math.log(0.5)).detach()
    log_w = offpolicy_pg.log_weights(log_ratio, episodes.mask, "trajectory")[:, 0]
    close(offpolicy_pg.effective_sample_size(log_w), 2**T / 1.04**T)


@pytest.mark.parametrize(("T", "fraction"), [(1, 0.914), (10, 0.407)])
def test_equation_10_of_a_shifted_gaussian(T, fraction):
    """Mean shifted by 0.3 deviations: ESS / N = exp(-T δ²)."""
    torch.manual_seed(0)
    policy, noise = offpolicy_pg.Policy(1, 1, discrete=False), torch.randn(200_000, T, 1)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.zero_()
        std = policy.log_std.exp()
        obs, actions = torch.zeros(200_000, T, 1), std * noise
        old = policy(obs).log_prob(actions)
        policy.network[2].bias.fill_(0.3 * std.item())
        log_ratio = policy(obs).log_prob(actions) - old
    log_w = offpolicy_pg.log_weights(log_ratio, torch.ones(200_000, T), "trajectory")[:, 0]
    size = offpolicy_pg.effective_sample_size(log_w).item() / 200_000
    assert size == pytest.approx(fraction, abs=0.02)


def test_kl_is_not_symmetric():
    new, old = (Categorical(probs=torch.tensor(p)) for p in ((0.6, 0.4), (0.5, 0.5)))
    assert offpolicy_pg.kl_divergence(new, old).item() == pytest.approx(0.020136, abs=1e-6)
    assert offpolicy_pg.kl_divergence(old, new).item() == pytest.approx(0.020411, abs=1e-6)
