"""Each numbered equation of the policy-gradient scripts on numbers worked out by hand."""

import envs  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import offpolicy_pg
import pg_baseline
import reinforce

REWARDS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
LOG_RATIO = torch.tensor([[2.0, 0.5, 3.0], [4.0, 0.25, 7.0]]).log()  # the 7 is on padding


def test_equation_4_reward_to_go(script):
    undiscounted = torch.tensor([[6.0, 5.0, 3.0], [9.0, 5.0, 0.0]])
    assert torch.equal(script.reward_to_go(REWARDS, 1.0), undiscounted)
    discounted = torch.tensor([[2.75, 3.5, 3.0], [6.5, 5.0, 0.0]])
    assert torch.equal(script.reward_to_go(REWARDS, 0.5), discounted)
    assert torch.equal(script.reward_to_go(REWARDS, 0.0), REWARDS)
    assert torch.equal(script.reward_to_go(REWARDS[:, :1], 0.9), REWARDS[:, :1])


def test_equation_3_total_return():
    expected = torch.tensor([[6.0, 6.0, 6.0], [9.0, 9.0, 9.0]])
    assert torch.equal(reinforce.total_return(REWARDS, 1.0), expected)
    expected = torch.tensor([[2.75, 2.75, 2.75], [6.5, 6.5, 6.5]])
    assert torch.equal(reinforce.total_return(REWARDS, 0.5), expected)


def test_equation_2_policy_loss_sums_over_time_and_averages_over_episodes(script):
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    psi = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    loss = script.policy_loss(log_probs, psi, MASK)
    assert loss.item() == (10 + 40 + 90 + 160 + 250) / 2
    loss.backward()
    assert torch.equal(log_probs.grad, -MASK * psi / 2)


def test_equation_2_with_unit_weights_is_behaviour_cloning(script):
    policy = script.Policy(3, 4, discrete=True)
    obs, actions = torch.randn(5, 7, 3), torch.randint(4, (5, 7))
    ones = torch.ones(5, 7)
    imitation = torch.nn.functional.cross_entropy(
        policy.network(obs).flatten(0, 1), actions.flatten(), reduction="sum"
    )
    loss = script.policy_loss(policy(obs).log_prob(actions), ones, ones)
    expected = torch.autograd.grad(imitation / 5, list(policy.parameters()))
    for ours, theirs in zip(torch.autograd.grad(loss, list(policy.parameters())), expected):
        torch.testing.assert_close(ours, theirs)


def test_gaussian_policy_has_one_log_prob_an_action_and_does_not_clip(script):
    policy = script.Policy(3, 2, discrete=False)
    assert policy.log_std.tolist() == [-0.5, -0.5]
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([0.3, -1.2]))
    obs, actions = torch.randn(4, 5, 3), 10 * torch.randn(4, 5, 2)
    distribution = policy(obs)
    mean, std = policy.network(obs), torch.tensor([0.3, -1.2]).exp()
    expected = Normal(mean, std).log_prob(actions)
    log_probs = distribution.log_prob(actions)
    assert log_probs.shape == (4, 5)
    torch.testing.assert_close(log_probs, expected[..., 0] + expected[..., 1])
    assert torch.equal(distribution.mode, mean)


def test_categorical_policy(script):
    policy = script.Policy(3, 4, discrete=True)
    obs = torch.randn(6, 3)
    logits = policy.network(obs)
    assert torch.equal(policy(obs).mode, logits.argmax(dim=-1))
    actions = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = logits.log_softmax(dim=-1)[torch.arange(6), actions]
    torch.testing.assert_close(policy(obs).log_prob(actions), expected)


@pytest.mark.parametrize("env_id", ["Counting-v0", "Truncating-v0", "CountingBox-v0"])
def test_equation_1_rollout_is_one_whole_episode_of_each_env(script, env_id):
    torch.manual_seed(0)
    vector_env = script.make_envs(env_id, 8)
    action_space = vector_env.single_action_space
    discrete = isinstance(action_space, gym.spaces.Discrete)
    policy = script.Policy(2, 2, discrete)
    trajectories = script.rollout(vector_env, policy)
    obs, actions, rewards, mask = trajectories[:4]
    lengths = obs[:, 0, 0]
    assert len(lengths.unique()) > 1
    assert obs.shape == (8, int(lengths.max()), 2) and obs.dtype == torch.float32
    assert torch.equal(mask.sum(dim=1), lengths)
    t = torch.arange(obs.shape[1])
    assert torch.equal(mask, (t < lengths[:, None]).float())
    live = mask.bool()
    assert torch.equal(obs[..., 1][live], t.expand(8, -1)[live].float())
    seen = torch.as_tensor(script.env_actions(actions, action_space), dtype=torch.float32)
    expected = 100 * t + (seen if discrete else seen.sum(dim=-1))
    torch.testing.assert_close(rewards, mask * expected)


def test_rollout_draws_new_episodes_from_torch_alone(script):
    policy, vector_env = script.Policy(2, 2, True), script.make_envs("Counting-v0", 32)
    torch.manual_seed(3)
    first, second = script.rollout(vector_env, policy), script.rollout(vector_env, policy)
    torch.manual_seed(3)
    again = script.rollout(script.make_envs("Counting-v0", 32), policy)
    assert not torch.equal(first.obs[:, 0], second.obs[:, 0])
    assert all(torch.equal(x, y) for x, y in zip(first, again))


def test_rollout_draws_env_seeds_from_31_bits(script):
    """So that seed + i is one, too, for the last of N envs."""
    vector_env, seeds = script.make_envs("OneStep-v0", 5), []
    reset, policy = vector_env.reset, script.Policy(1, 3, True)
    vector_env.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
    for _ in range(40):
        script.rollout(vector_env, policy)
    assert 2**30 < max(seeds) <= 2**31 - 5 and min(seeds) >= 0 and len(set(seeds)) == 40


@pytest.mark.parametrize("discrete", [True, False])
def test_a_policy_of_nan_is_left_to_train_to_report(script, discrete):
    distribution = script.Policy(2, 2, discrete)(torch.full((1, 2), torch.nan))
    actions = torch.zeros(1, dtype=torch.int64) if discrete else torch.zeros(1, 2)
    assert distribution.log_prob(actions).isnan().all()


def test_rollout_samples_from_the_policy(script):
    torch.manual_seed(0)
    vector_env = script.make_envs("Counting-v0", 200)
    trajectories = script.rollout(vector_env, script.Policy(2, 2, True))
    assert 0.2 < trajectories.actions[:, 0].float().mean() < 0.8


def test_greedy_rollout_takes_the_mode_and_a_seed_fixes_it(script):
    policy, vector_env = script.Policy(2, 2, False), script.make_envs("CountingBox-v0", 16)
    one = script.rollout(vector_env, policy, seed=5, greedy=True)
    two = script.rollout(vector_env, policy, seed=5, greedy=True)
    assert torch.equal(one.rewards, two.rewards)
    torch.testing.assert_close(one.actions, policy(one.obs).mode)
    assert not torch.equal(one.obs[:, 0], script.rollout(vector_env, policy, seed=6).obs[:, 0])


def test_rollout_copies_observations_an_env_reuses(script):
    vector_env = script.make_envs("Counting-v0", 4)
    vector_env.copy = False
    obs = script.rollout(vector_env, script.Policy(2, 2, True)).obs
    assert obs[0, 0, 1] == 0 and obs[0, 1, 1] == 1


def test_env_actions_clip_and_scale_to_a_lopsided_box(script):
    space = gym.spaces.Box(np.array([-1.0, 0.0], "f4"), np.array([3.0, 10.0], "f4"))
    actions = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [0.5, -0.5], [-7.0, 7.0]])
    expected = np.array([[-1.0, 10.0], [1.0, 5.0], [2.0, 2.5], [-1.0, 10.0]], "f4")
    np.testing.assert_array_equal(script.env_actions(actions, space), expected)
    assert script.env_actions(actions, space).dtype == np.float32
    space = gym.spaces.Box(-1.0, 0.1, (1,), np.float32)  # (0.1 - -1) + -1 is more than 0.1
    assert all(space.contains(a) for a in script.env_actions(torch.tensor([[1.0], [9.0]]), space))


def test_env_actions_of_a_discrete_space_that_starts_at_3(script):
    actions = script.env_actions(torch.tensor([0, 1, 2]), gym.spaces.Discrete(3, start=3))
    np.testing.assert_array_equal(actions, [3, 4, 5])


# pg_baseline.py


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
    policy = pg_baseline.Policy(3, 2, discrete)
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


# offpolicy_pg.py: the ratios are (2, 1/2, 3) and (4, 1/4); rewards (1, 2, 3) and (4, 5)


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


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("trajectory", [[3.0, 3.0, 3.0], [1.0, 1.0]]),
        ("causal", [[3.0, 3.0, 3.0], [1.0, 1.0]]),
        ("per_decision", [[2.0, 1.0, 3.0], [4.0, 1.0]]),
        ("per_step", [[2.0, 0.5, 3.0], [4.0, 0.25]]),
    ],
)
def test_equation_8_log_weights(estimator, expected):
    weights = offpolicy_pg.log_weights(LOG_RATIO, MASK, estimator).exp()
    torch.testing.assert_close(weights[0], torch.tensor(expected[0]))
    torch.testing.assert_close(weights[1, :2], torch.tensor(expected[1]))


def test_every_estimator_is_its_on_policy_counterpart_at_ratio_1():
    zeros = torch.zeros(2, 3)
    for gamma in (1.0, 0.9):
        psi = {
            estimator: offpolicy_pg.importance_weighted_psi(zeros, REWARDS, MASK, gamma, estimator)
            for estimator in ("trajectory", "causal", "per_decision", "per_step")
        }
        assert torch.equal(psi["trajectory"], reinforce.total_return(REWARDS, gamma))
        for estimator in ("causal", "per_decision", "per_step"):
            assert torch.equal(psi[estimator], reinforce.reward_to_go(REWARDS, gamma))


def test_the_weights_are_constants_whose_gradient_is_in_the_score():
    """∇ ρ = ρ ∇ log π: the gradient of (2) with per_step is that of the surrogate Σ ρ G."""
    torch.manual_seed(0)
    policy = offpolicy_pg.Policy(3, 2, discrete=True)
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


def test_equation_10_effective_sample_size():
    size = offpolicy_pg.effective_sample_size
    torch.testing.assert_close(size(torch.full((7,), 3.0)), torch.tensor(7.0))
    torch.testing.assert_close(size(torch.tensor([1.0, 2.0, 3.0]).log()), torch.tensor(36 / 14))
    torch.testing.assert_close(size(torch.tensor([500.0, 0.0, 0.0])), torch.tensor(1.0))


def test_behavior_log_probs_are_those_of_acting():
    torch.manual_seed(0)
    policy = offpolicy_pg.Policy(2, 2, discrete=True)
    batch = offpolicy_pg.rollout(offpolicy_pg.make_envs("Counting-v0", 8), policy)
    expected = policy(batch.obs).log_prob(batch.actions)
    live = batch.mask.bool()
    torch.testing.assert_close(batch.log_probs[live], expected[live])
    assert not batch.log_probs.requires_grad


@pytest.mark.parametrize(("target_kl", "steps"), [(1.0, 3), (1e-12, 1)])
def test_equation_9_kl_ends_the_steps_on_a_batch(monkeypatch, target_kl, steps):
    losses, batches = [], []
    policy_loss, rollout = offpolicy_pg.policy_loss, offpolicy_pg.rollout
    monkeypatch.setattr(offpolicy_pg, "policy_loss", lambda *x: losses.append(1) or policy_loss(*x))
    monkeypatch.setattr(
        offpolicy_pg, "rollout", lambda *x, **y: batches.append(1) or rollout(*x, **y)
    )
    settings = {"num_updates": 3, "target_kl": target_kl, "learning_rate": 1e-4}
    offpolicy_pg.train(
        offpolicy_pg.Args("CartPole-v1", 1, 400, 4, wandb_mode="disabled", **settings)
    )
    assert len(losses) == steps * (len(batches) - 1)  # the last rollout is the evaluation
