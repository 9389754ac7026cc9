"""Tests of reinforce.py: its two estimators of the gradient."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_log_probs_and_mask
from problems import (
    REWARDS,
    Coin,
    LinearGaussian,
    Tabular,
    all_actions,
    close,
    corridor_return,
    exact_gradient,
    flat_grad,
    moments,
    policy_cost,
    probabilities,
    scalar_lqr,
    states,
)

import pg_baseline
import reinforce

ESTIMATORS = {"total_return": reinforce.total_return, "reward_to_go": reinforce.reward_to_go}


# Equations by hand


def test_equation_3_total_return():
    expected = torch.tensor([[6.0, 6.0, 6.0], [9.0, 9.0, 9.0]])
    assert torch.equal(reinforce.total_return(REWARDS, 1.0), expected)
    expected = torch.tensor([[2.75, 2.75, 2.75], [6.5, 6.5, 6.5]])
    assert torch.equal(reinforce.total_return(REWARDS, 0.5), expected)


# Exact oracles


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


def test_unweighted_old_data_is_biased(mdp, policy):
    """On-policy: the gradient at φ' needs episodes of φ', or weights."""
    episodes, dynamics = mdp.episodes()
    old = probabilities(Tabular([[1.0, 0.0], [0.0, 1.0]]), episodes, dynamics).detach()
    mean, _ = moments(policy, episodes, old, reinforce.reward_to_go(episodes.rewards, 1.0))
    exact = exact_gradient(mdp, policy)
    assert (mean - exact).norm() > 0.1 * exact.norm()


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


@pytest.mark.parametrize(("T", "full", "to_go"), [(5, 62.5, 27.5), (10, 500, 192.5)])
def test_a_constant_reward_is_nothing_but_variance(T, full, to_go):
    """½ T³ and T (T + 1) (2 T + 1) / 12; 0 with V_t as the baseline."""
    policy, episodes = Tabular([[0.0, 0.0]]), all_actions(T, lambda actions: actions * 0 + 1)
    p = torch.full((2**T,), 0.5**T).double()
    G = reinforce.reward_to_go(episodes.rewards, 1.0)
    close(moments(policy, episodes, p, reinforce.total_return(episodes.rewards, 1.0))[1], full)
    close(moments(policy, episodes, p, G)[1], to_go)
    close(moments(policy, episodes, p, G - G.mean(dim=0))[1], 0.0)


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


def test_a_sparse_reward_leaves_most_samples_without_a_signal():
    """A reward only for action 1, ten times in a row: one episode in 1024 has a gradient."""
    policy = Coin(0.5)
    episodes = all_actions(10, lambda a: a.prod(dim=1, keepdim=True) * torch.eye(10)[-1])
    G = reinforce.total_return(episodes.rewards, 1.0)
    rows = pg_baseline.trajectory_gradients(policy, *episodes[:2], G)
    assert int((rows != 0).sum()) == 1
    close(rows.mean(dim=0), [10 * 0.5**9])


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


# What `train` does


@pytest.mark.parametrize("estimator", ["total_return", "reward_to_go"])
def test_reinforce(record, estimator):
    for call in record(reinforce, estimator=estimator, gamma=0.9):
        check_log_probs_and_mask(call)
        expected = getattr(reinforce, estimator)(call["batch"].rewards, 0.9)
        assert torch.equal(call["psi"], expected)


def test_reinforce_finds_the_stochastic_policy_of_the_corridor():
    """p* = 2 - √2 = 0.586, J* = -11.66."""
    settings = {"env_id": "envs:Corridor-v0", "num_envs": 32, "total_timesteps": 100_000}
    settings |= {"learning_rate": 0.02, "decay_steps": 20_000, "wandb_mode": "disabled"}
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
