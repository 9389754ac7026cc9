"""Tests of pg_baseline.py: its baselines, and the variance that they leave."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import check_log_probs_and_mask, varied
from problems import (
    LinearGaussian,
    Tabular,
    all_actions,
    best_constant,
    close,
    exact_gradient,
    flat_grad,
    moments,
    probabilities,
    scalar_lqr,
    small_policy,
    step_values,
)

import pg_baseline
import reinforce

# Equations by hand


def test_equation_5_average_baseline_leaves_the_episode_out():
    returns = torch.tensor([[6.0, 5.0, 3.0], [9.0, 5.0, 7.0], [3.0, 1.0, 1.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = torch.tensor([[6.0, 2.5, 0.0], [4.5, 2.5, 1.5], [7.5, 5.0, 1.5]])
    assert torch.equal(pg_baseline.average_baseline(returns, mask), expected)
    two = pg_baseline.average_baseline(returns[:2], mask[:2])
    assert torch.equal(two, torch.tensor([[9.0, 5.0, 0.0], [6.0, 5.0, 3.0]]))
    alone = pg_baseline.average_baseline(returns[:1], mask[:1])
    assert torch.equal(alone, torch.zeros(1, 3))


def test_equation_6_value_network_is_one_number_a_state():
    value_network = pg_baseline.ValueNetwork(3)
    assert value_network(torch.randn(4, 3)).shape == (4,)
    assert value_network(torch.randn(4, 5, 3)).shape == (4, 5)


def test_equation_7_optimal_baseline_by_hand():
    scores = torch.tensor([[1.0], [2.0], [3.0]])
    gradients = scores * torch.tensor([[1.0], [2.0], [4.0]])
    expected = torch.tensor([[44 / 13], [37 / 10], [9 / 5]])
    torch.testing.assert_close(pg_baseline.optimal_baseline(scores, gradients), expected)


def test_equation_7_is_the_constant_of_least_variance_given_the_other_episodes():
    torch.manual_seed(0)
    scores, gradients = torch.randn(6, 4), torch.randn(6, 4)
    baseline = pg_baseline.optimal_baseline(scores, gradients)
    for i in range(6):
        others = torch.arange(6) != i
        z, g = scores[others].flatten(), gradients[others].flatten()
        best = torch.linalg.lstsq(z[:, None], g[:, None]).solution
        torch.testing.assert_close(baseline[i], best[0])
    assert torch.equal(pg_baseline.optimal_baseline(scores[:1], gradients[:1]), torch.zeros(1, 1))


@pytest.mark.parametrize("scale", [1e4, 1e-4, 1e-10, 1e-18, 1e-21])
def test_equation_7_of_scores_of_any_size(scale):
    """optimal_baseline is a mean of the others' G by their squared scores, whatever their unit."""
    scores = scale * torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 0.5], [1.0, 3.0]])
    G = torch.tensor([100.0, 110.0, 120.0, 130.0])
    baseline = pg_baseline.optimal_baseline(scores, scores * G[:, None])
    weights = torch.tensor([2.0, 4.0, 0.25, 10.0])
    expected = [(w := weights * (torch.arange(4) != i)) @ G / w.sum() for i in range(4)]
    torch.testing.assert_close(baseline.squeeze(), torch.stack(expected), rtol=1e-3, atol=0)


def test_equation_7_of_scores_whose_squares_are_0():
    """When float32 rounds z·z to 0 but not z·g, optimal_baseline is 0, and not infinite."""
    scores = torch.tensor([[1e-23], [1e-23]])
    baseline = pg_baseline.optimal_baseline(scores, 130 * scores)
    assert torch.equal(baseline, torch.zeros(2, 1))


@pytest.mark.parametrize("largest", [1e2, 1e4, 1e6])
def test_equation_7_does_not_see_an_episode_in_its_own_baseline(largest):
    """However much its scores outweigh the others' in optimal_baseline."""
    scores, G = torch.tensor([[largest], [1.0], [1.0], [1.0]]), torch.tensor([[1e2, 110, 120, 130]])
    baseline = pg_baseline.optimal_baseline(scores, scores * G.T)
    torch.testing.assert_close(baseline[0].item(), 120.0)
    assert (baseline[1:] >= 100).all() and (baseline[1:] <= 130).all()
    torch.testing.assert_close(baseline[1].item(), (largest**2 * 100 + 250) / (largest**2 + 2))


@pytest.mark.parametrize("largest", [1e4, 1e8, -1e10])
def test_equation_5_does_not_see_an_episode_in_its_own_baseline(largest):
    """However much its G outweighs the others' in average_baseline."""
    returns = torch.tensor([[largest, 5.0], [1.0, 2.0], [2.0, 4.0], [4.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    baseline = pg_baseline.average_baseline(returns, mask)
    torch.testing.assert_close(baseline[0], torch.tensor([7 / 3, 2.0]))
    torch.testing.assert_close(baseline[1, 0].item(), (largest + 6) / 3)


def test_equation_7_is_the_slides_formula_for_the_full_return():
    """Two-armed bandit with p = .7 and r = (3, 1): b* = .3 * 3 + .7 * 1 = 1.6."""
    scores = torch.tensor([[0.3]] * 700 + [[-0.7]] * 300, dtype=torch.float64)
    returns = torch.tensor([[3.0]] * 700 + [[1.0]] * 300, dtype=torch.float64)
    baseline = pg_baseline.optimal_baseline(scores, scores * returns)
    torch.testing.assert_close(baseline, torch.full_like(baseline, 1.6), atol=5e-3, rtol=0)
    slide = (scores**2 * returns).sum() / (scores**2).sum()
    torch.testing.assert_close(slide.item(), 1.6)


@pytest.mark.parametrize("discrete", [True, False])
def test_trajectory_gradients_are_the_gradients_of_single_episodes(discrete):
    torch.manual_seed(0)
    policy = varied(pg_baseline.Policy(3, 2, discrete))
    obs, psi = torch.randn(4, 6, 3), torch.randn(4, 6)
    actions = policy(obs).sample()
    mask = torch.ones(4, 6)
    mask[1, 3:] = 0
    rows = pg_baseline.trajectory_gradients(policy, obs, actions, mask * psi)
    assert rows.shape == (4, sum(p.numel() for p in policy.parameters()))
    for i, row in enumerate(rows):
        objective = (mask * psi * policy(obs).log_prob(actions))[i].sum()
        expected = torch.autograd.grad(objective, list(policy.parameters()))
        torch.testing.assert_close(row, torch.cat([x.flatten() for x in expected]))
    loss = pg_baseline.policy_loss(policy(obs).log_prob(actions), psi, mask)
    whole = torch.autograd.grad(loss, list(policy.parameters()))
    torch.testing.assert_close(-rows.mean(dim=0), torch.cat([x.flatten() for x in whole]))


@pytest.mark.parametrize("discrete", [True, False])
def test_gradient_variances_are_those_of_the_gradients_of_single_episodes(discrete):
    """Summed over the parameters, for each Ψ by its name."""
    torch.manual_seed(0)
    policy = varied(pg_baseline.Policy(3, 2, discrete))
    obs, mask = torch.randn(5, 6, 3), torch.ones(5, 6)
    actions = policy(obs).sample()
    mask[1, 3:] = 0
    psis = {"one": mask * torch.randn(5, 6), "two": mask * (3 + torch.randn(5, 6))}
    found = pg_baseline.gradient_variances(policy, obs, actions, psis)
    assert list(found) == ["one", "two"]
    for name, psi in psis.items():
        rows = []
        for i in range(5):
            objective = (psi * policy(obs).log_prob(actions))[i].sum()
            rows.append(flat_grad(objective, policy))
        rows = torch.stack(rows)
        expected = (rows - rows.mean(dim=0)).square().sum().item() / 5
        assert found[name].item() == pytest.approx(expected, rel=1e-4)


# Exact oracles


def average_psi(episodes, p):
    """G - b with the b of (5) in a batch of two, averaged over the other episode."""
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
    p = probabilities(policy, episodes, dynamics).detach()
    square = exact_gradient(mdp, policy).square().sum()

    def variance(psi):
        return (moments(policy, episodes, p, psi)[1] / square).item()

    by_name = psis(mdp, policy, episodes, p)
    found = {name: variance(psi) for name, psi in by_name.items()}
    assert found == pytest.approx(VARIANCES, rel=1e-3)
    G = by_name["reward_to_go"]
    best = best_constant(policy, episodes, p, G)
    assert variance(G - best + 0.1) > found["optimal"]
    assert variance(G - best - 0.1) > found["optimal"]


@pytest.mark.parametrize(
    ("p", "r", "gradient", "best", "value", "variances"),
    [
        (0.9, (1, 0), 0.09, 0.1, 0.9, (0.0009, 0.0576, 0)),
        (0.5, (1, 0), 0.25, 0.5, 0.5, (0.0625, 0, 0)),
        (0.7, (3, 1), 0.42, 1.6, 2.4, (0.5376, 0.1344, 0)),
    ],
)
def test_two_arms(p, r, gradient, best, value, variances):
    """Var(b) = p (1 - p) (b - b*)², b* = (1 - p) r_1 + p r_2; V is not the best baseline."""
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
        policy.network[-1].bias.fill_(c + d)
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


# What `train` does


@pytest.mark.parametrize("baseline", ["none", "average", "value", "optimal"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pg_baseline(record, baseline, normalize):
    calls = record(pg_baseline, baseline=baseline, normalize_advantages=normalize, gamma=0.9)
    for call in calls:
        check_log_probs_and_mask(call)
        batch, mask, live = call["batch"], call["mask"], call["mask"].bool()
        returns = pg_baseline.reward_to_go(batch.rewards, 0.9)
        if baseline == "none":
            b = 0
        elif baseline == "average":
            b = pg_baseline.average_baseline(returns, mask)
        elif baseline == "value":
            b = call["ValueNetwork"](batch.obs).detach()
        else:
            rows = [
                pg_baseline.trajectory_gradients(call["Policy"], batch.obs, batch.actions, psi)
                for psi in (mask, mask * returns)
            ]
            b = pg_baseline.optimal_baseline(*rows)
        expected = returns - b
        if normalize:
            expected = expected / expected[live].std(correction=0)
        torch.testing.assert_close(call["psi"][live], expected[live])


def test_equal_episodes_leave_nothing_to_normalize(record):
    """Acrobot's first episodes all end at the time limit: Ψ is 0 everywhere, and so is its std."""
    settings = {"baseline": "average", "normalize_advantages": True, "env_id": "Acrobot-v1"}
    for call in record(pg_baseline, total_timesteps=5000, **settings):
        assert call["psi"].isfinite().all()


@pytest.mark.parametrize("reward", [0.1, -1 / 3, 1e6 / 7, 1e-6, 0])
@pytest.mark.parametrize(("kind", "baseline"), [("Endless", "average"), ("OneStep", "none")])
def test_rounding_is_not_made_large(record, kind, baseline, reward):
    """All episodes are alike, of 30 steps or of one: what is left of Ψ is rounding, if anything."""
    settings = {"env_id": f"{kind}-v0", "env_kwargs": f'{{"reward": {reward}}}', "num_envs": 7}
    settings |= {"total_timesteps": 600 if kind == "Endless" else 20}
    for call in record(pg_baseline, baseline=baseline, normalize_advantages=True, **settings):
        assert call["psi"].eq(0).all()


def test_small_differences_of_large_returns_are_not_rounding(record):
    """Rewards from 20,000 to 20,002, five an episode."""
    settings = {"env_id": "Dice-v0", "env_kwargs": '{"reward": 20000}', "total_timesteps": 70}
    for call in record(pg_baseline, baseline="average", normalize_advantages=True, **settings):
        assert call["psi"].std(correction=0).item() == pytest.approx(1, rel=1e-3)


def test_the_logged_variance_is_that_of_one_episodes_gradient(record, logged):
    for call, row in zip(record(pg_baseline, baseline="value"), logged):
        batch, mask = call["batch"], call["mask"]
        returns = pg_baseline.reward_to_go(batch.rewards, 1.0)
        baselines = {
            "none": torch.zeros_like(returns),
            "average": pg_baseline.average_baseline(returns, mask),
            "value": call["ValueNetwork"](batch.obs).detach(),
        }
        for name, baseline in baselines.items():
            gradients = []
            for i in range(len(mask)):
                log_probs = call["Policy"](batch.obs[i]).log_prob(batch.actions[i])
                objective = (mask[i] * log_probs * (returns - baseline)[i]).sum()
                parts = torch.autograd.grad(objective, list(call["Policy"].parameters()))
                gradients.append(torch.cat([part.flatten() for part in parts]))
            expected = torch.stack(gradients).var(dim=0, correction=0).sum().item()
            assert row[f"variance/{name}"] == pytest.approx(expected, rel=1e-3)
