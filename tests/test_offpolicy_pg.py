"""Tests of offpolicy_pg.py: its importance weights, and the steps that it takes with them."""

import math
from copy import deepcopy

import pytest
import torch
from conftest import TINY, check_log_probs_and_mask, varied
from problems import (
    MASK,
    MDP,
    REWARDS,
    Coin,
    Tabular,
    all_actions,
    close,
    exact_gradient,
    moments,
    probabilities,
    small_policy,
)
from torch.distributions import Categorical, kl_divergence

import offpolicy_pg
import reinforce

ESTIMATORS = ["trajectory", "causal", "per_decision", "per_step"]
LOG_RATIO = torch.tensor([[2.0, 0.5, 3.0], [4.0, 0.25, 7.0]]).log()  # the 7 is on padding


# Equations by hand: the ratios are (2, 1/2, 3) and (4, 1/4), the rewards (1, 2, 3) and (4, 5)


@pytest.mark.parametrize(
    ("estimator", "gamma", "expected"),
    [
        ("trajectory", 1.0, [[18.0, 18.0, 18.0], [9.0, 9.0]]),
        ("causal", 1.0, [[18.0, 15.0, 9.0], [9.0, 5.0]]),
        ("per_decision", 1.0, [[13.0, 11.0, 9.0], [21.0, 5.0]]),
        ("per_step", 1.0, [[12.0, 2.5, 9.0], [36.0, 1.25]]),
        ("trajectory", 0.5, [[8.25, 8.25, 8.25], [6.5, 6.5]]),
        ("causal", 0.5, [[8.25, 10.5, 9.0], [6.5, 5.0]]),
        ("per_decision", 0.5, [[5.25, 6.5, 9.0], [18.5, 5.0]]),
        ("per_step", 0.5, [[5.5, 1.75, 9.0], [26.0, 1.25]]),
    ],
)
def test_equations_3_and_5_to_7(estimator, gamma, expected):
    psi = offpolicy_pg.importance_weighted_psi(LOG_RATIO, REWARDS, MASK, gamma, estimator)
    assert psi.shape == (2, 3)
    torch.testing.assert_close(psi[0], torch.tensor(expected[0]))
    torch.testing.assert_close(psi[1, :2], torch.tensor(expected[1]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("log_ratio", [[60.0, 40.0], [100.0, 0.0], [-30.0, 200.0], [math.inf, 0.0]])
def test_no_reward_counts_for_nothing_however_large_its_weight(log_ratio, estimator):
    """exp(100) is more than a float can hold; times 0 it is 0 in importance_weighted_psi, too."""
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2)
    log_ratio = torch.tensor([log_ratio])
    psi = offpolicy_pg.importance_weighted_psi(log_ratio, zeros, mask, 1.0, estimator)
    assert torch.equal(psi, zeros)


def test_every_estimator_is_its_on_policy_counterpart_at_ratio_1():
    zeros = torch.zeros(2, 3)
    for gamma in (1.0, 0.9):
        psi = {
            estimator: offpolicy_pg.importance_weighted_psi(zeros, REWARDS, MASK, gamma, estimator)
            for estimator in ESTIMATORS
        }
        assert torch.equal(psi["trajectory"], reinforce.total_return(REWARDS, gamma))
        for estimator in ("causal", "per_decision", "per_step"):
            assert torch.equal(psi[estimator], reinforce.reward_to_go(REWARDS, gamma))


def test_the_weights_are_constants_whose_gradient_is_in_the_score():
    """∇ ρ = ρ ∇ log π: the gradient of (2) with per_step is that of the surrogate Σ ρ G."""
    torch.manual_seed(0)
    policy = varied(offpolicy_pg.Policy(3, 2, discrete=True))
    obs, actions, behavior = torch.randn(2, 3, 3), torch.randint(2, (2, 3)), torch.rand(2, 3).log()
    log_probs = policy(obs).log_prob(actions)
    log_ratio = log_probs - behavior
    psi = offpolicy_pg.importance_weighted_psi(log_ratio, REWARDS, MASK, 1.0, "per_step")
    assert not psi.requires_grad
    loss = offpolicy_pg.policy_loss(log_probs, psi, MASK)
    returns = offpolicy_pg.reward_to_go(REWARDS, 1.0)
    surrogate = -(MASK * log_ratio.exp() * returns).sum(dim=1).mean()
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(surrogate, parameters, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("trajectory", [[3.0, 3.0, 3.0], [1.0, 1.0]]),
        ("causal", [[3.0, 3.0, 3.0], [1.0, 1.0]]),
        ("per_decision", [[2.0, 1.0, 3.0], [4.0, 1.0]]),
        ("per_step", [[2.0, 0.5, 3.0], [4.0, 0.25]]),
    ],
)
def test_equation_8_the_baseline_has_the_weight_of_its_step(estimator, expected):
    """In importance_weighted_psi, where Ψ is minus the weighted baseline if there is no reward."""
    weights = offpolicy_pg.log_weights(LOG_RATIO, MASK, estimator).exp()
    torch.testing.assert_close(weights[0], torch.tensor(expected[0]))
    torch.testing.assert_close(weights[1, :2], torch.tensor(expected[1]))
    b = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    settings = {"mask": MASK, "gamma": 0.5, "estimator": estimator, "baseline": b}
    psi = offpolicy_pg.importance_weighted_psi(LOG_RATIO, 0 * REWARDS, **settings)
    torch.testing.assert_close(psi, -weights * b)


def test_kl_is_not_symmetric():
    new, old = (Categorical(probs=torch.tensor(p)) for p in ((0.6, 0.4), (0.5, 0.5)))
    assert offpolicy_pg.kl_divergence(new, old).item() == pytest.approx(0.020136, abs=1e-6)
    assert offpolicy_pg.kl_divergence(old, new).item() == pytest.approx(0.020411, abs=1e-6)


def test_equation_10_effective_sample_size():
    size = offpolicy_pg.effective_sample_size
    torch.testing.assert_close(size(torch.full((7,), 3.0)), torch.tensor(7.0))
    torch.testing.assert_close(size(torch.tensor([1.0, 2.0, 3.0]).log()), torch.tensor(36 / 14))
    torch.testing.assert_close(size(torch.tensor([500.0, 0.0, 0.0])), torch.tensor(1.0))


# Exact oracles


def weighted_psi(episodes, log_ratio, estimator):
    """Ψ of whole episodes, undiscounted."""
    return offpolicy_pg.importance_weighted_psi(
        log_ratio, episodes.rewards, episodes.mask, 1.0, estimator
    )


def off_policy(mdp, policy):
    """Episodes of the uniform policy, their probability, and the log-ratios to `policy`."""
    episodes, dynamics = mdp.episodes()
    uniform = Tabular(torch.zeros(2, 2))
    p = probabilities(uniform, episodes, dynamics).detach()
    obs, actions = episodes[:2]
    log_ratio = policy(obs).log_prob(actions) - uniform(obs).log_prob(actions)
    return episodes, p, log_ratio.detach()


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_importance_sampling_is_unbiased_but_for_the_per_step_form(
    mdp, policy, estimator, baseline
):
    episodes, p, log_ratio = off_policy(mdp, policy)
    psi = weighted_psi(episodes, log_ratio, estimator)
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
    for estimator in ESTIMATORS:
        psi = weighted_psi(episodes, log_ratio, estimator)
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
        mean, _ = moments(target, episodes, p, weighted_psi(episodes, log_ratio, "per_step"))
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
    found = moments(target, episodes, p, weighted_psi(episodes, log_ratio, "trajectory"))
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
    policy, noise = offpolicy_pg.Policy(1, 1, discrete=False), torch.randn(50_000, T, 1)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.zero_()
        std = policy.log_std.exp()
        obs, actions = torch.zeros(50_000, T, 1), std * noise
        old = policy(obs).log_prob(actions)
        policy.network[-1].bias.fill_(0.3 * std.item())
        log_ratio = policy(obs).log_prob(actions) - old
    log_w = offpolicy_pg.log_weights(log_ratio, torch.ones(50_000, T), "trajectory")[:, 0]
    size = offpolicy_pg.effective_sample_size(log_w).item() / 50_000
    assert size == pytest.approx(fraction, abs=0.02)


# What `train` does


@pytest.mark.parametrize("baseline", ["none", "average", "value"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_offpolicy_pg(record, estimator, baseline):
    settings = {"estimator": estimator, "baseline": baseline, "gamma": 0.9, "num_updates": 4}
    calls = record(offpolicy_pg, target_kl=0.01, **settings)
    assert len({id(call["batch"]) for call in calls}) < len(calls)
    for call in calls:
        check_log_probs_and_mask(call)
        batch, live = call["batch"], call["mask"].bool()
        first = next(other for other in calls if other["batch"] is batch)
        log_ratio = call["log_probs"] - first["log_probs"]
        arguments = log_ratio, batch.rewards, batch.mask, 0.9, estimator
        expected = offpolicy_pg.importance_weighted_psi(*arguments)
        if baseline == "average":
            returns = offpolicy_pg.reward_to_go(batch.rewards, 0.9)
            b = offpolicy_pg.average_baseline(returns, batch.mask)
        else:
            b = call["ValueNetwork"](batch.obs).detach() if baseline == "value" else 0
        weights = offpolicy_pg.log_weights(log_ratio, batch.mask, estimator).exp()
        expected = expected - weights * b
        torch.testing.assert_close(call["psi"][live], expected[live])
        new, old = call["Policy"](batch.obs), first["Policy"](batch.obs)
        assert kl_divergence(new, old)[live].mean() <= 0.01


def test_the_first_step_on_a_batch_is_on_policy(record, monkeypatch):
    """Its log-probs are those of the policy that acted, and its weights are 1."""
    acted, rollout = [], offpolicy_pg.rollout

    def keep(envs, policy, **settings):
        acted.append(deepcopy(policy))
        return rollout(envs, policy, **settings)

    monkeypatch.setattr(offpolicy_pg, "rollout", keep)
    calls = record(offpolicy_pg, gamma=0.9, baseline="none", learning_rate=0.03)
    batches = {id(call["batch"]): call for call in reversed(calls)}  # the first call on each
    firsts = list(batches.values())[::-1]
    assert len(firsts) == len(acted) - 1 > 3  # the last rollout is the evaluation
    for call, policy in zip(firsts, acted):
        batch, live = call["batch"], call["mask"].bool()
        expected = policy(batch.obs).log_prob(batch.actions)
        torch.testing.assert_close(call["log_probs"][live], expected[live])
        expected = offpolicy_pg.reward_to_go(batch.rewards, 0.9)
        torch.testing.assert_close(call["psi"][live], expected[live])


@pytest.mark.parametrize(("target_kl", "steps"), [(1.0, 3), (1e-12, 1)])
def test_equation_9_kl_ends_the_steps_on_a_batch(spy, target_kl, steps):
    losses, rollouts = spy(offpolicy_pg, "policy_loss"), spy(offpolicy_pg, "rollout")
    settings = {"num_updates": 3, "target_kl": target_kl, "learning_rate": 1e-4}
    offpolicy_pg.train(offpolicy_pg.Args(**TINY, **settings))
    assert len(losses) == steps * (len(rollouts) - 1)  # the last rollout is the evaluation


@pytest.mark.parametrize("num_updates", [1, 9])
def test_the_logged_weights_and_kl_are_those_after_the_last_step(record, logged, num_updates):
    settings = {"estimator": "per_decision", "learning_rate": 0.03, "num_updates": num_updates}
    calls = record(offpolicy_pg, **settings)
    firsts = calls[:1]  # the first call on each batch
    for before, call in zip(calls, calls[1:]):
        if call["batch"] is not before["batch"]:
            firsts.append(call)
    for call, after, row in zip(firsts[1:], firsts[2:], logged[1:]):
        batch, live = call["batch"], call["mask"].bool()
        old, new = call["Policy"](batch.obs), after["Policy"](batch.obs)
        expected = kl_divergence(new, old)[live].mean().item()
        assert row["losses/kl"] == pytest.approx(expected, rel=1e-4)
        log_ratio = batch.mask * (new.log_prob(batch.actions) - old.log_prob(batch.actions))
        weights = log_ratio.cumsum(dim=1).exp()[live]
        expected = weights.sum() ** 2 / (weights**2).sum() / len(weights)
        assert row["weights/effective_fraction"] == pytest.approx(expected.item(), rel=1e-4)
        assert row["weights/largest"] == pytest.approx(weights.max().item(), rel=1e-4)
