"""Tests of what reinforce.py, pg_baseline.py and offpolicy_pg.py share."""

from itertools import groupby

import gymnasium as gym
import pytest
import torch
from conftest import TINY, varied
from envs import Endless
from problems import MASK, REWARDS, close, exact_gradient, probabilities
from scipy.optimize import approx_fprime
from torch import nn
from torch.distributions import Normal

import offpolicy_pg
import pg_baseline
import reinforce

# Equations by hand


@pytest.mark.parametrize("env_id", ["Counting-v0", "Truncating-v0", "CountingBox-v0"])
def test_equation_1_rollout_is_one_whole_episode_of_each_env(script, env_id):
    torch.manual_seed(0)
    vector_env = script.make_envs(env_id, 8)
    discrete = isinstance(vector_env.single_action_space, gym.spaces.Discrete)
    policy = varied(script.Policy(2, 2, discrete))
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
    assert obs[~live].eq(0).all()
    seen = torch.from_numpy(vector_env.func(actions.numpy()))
    expected = 100 * t + (seen if discrete else seen.sum(dim=-1))
    torch.testing.assert_close(rewards, mask * expected)


def test_rollout_draws_new_episodes_from_torch_alone(script):
    policy, vector_env = varied(script.Policy(2, 2, True)), script.make_envs("Counting-v0", 32)
    torch.manual_seed(3)
    first, second = script.rollout(vector_env, policy), script.rollout(vector_env, policy)
    torch.manual_seed(3)
    again = script.rollout(script.make_envs("Counting-v0", 32), policy)
    assert not torch.equal(first.obs[:, 0], second.obs[:, 0])
    assert all(torch.equal(x, y) for x, y in zip(first, again))


def test_rollout_draws_env_seeds_from_31_bits(script):
    """The seed of the last of N envs is seed + N - 1, and must not need more bits."""
    vector_env, policy = script.make_envs("OneStep-v0", 5), script.Policy(1, 3, True)
    reset, seeds = vector_env.reset, []

    def record(seed):
        seeds.append(seed)
        return reset(seed=seed)

    vector_env.reset = record
    for _ in range(40):
        script.rollout(vector_env, policy)
    assert 2**30 < max(seeds) <= 2**31 - 5 and min(seeds) >= 0 and len(set(seeds)) == 40


def test_rollout_samples_from_the_policy(script):
    torch.manual_seed(0)
    vector_env = script.make_envs("Counting-v0", 200)
    trajectories = script.rollout(vector_env, script.Policy(2, 2, True))
    assert 0.2 < trajectories.actions[:, 0].float().mean() < 0.8


def test_greedy_rollouts_start_from_seed_1(script):
    """So that the evaluations of all versions of a script can be compared."""
    policy, vector_env = varied(script.Policy(2, 2, False)), script.make_envs("CountingBox-v0", 16)
    first = script.rollout(vector_env, policy, greedy=True).obs[:, 0]
    expected, _ = vector_env.reset(seed=1)
    assert torch.equal(first, torch.tensor(expected, dtype=torch.float32))


def test_greedy_rollout_takes_the_mode_and_draws_nothing(script):
    """So that all runs are evaluated on the same episodes."""
    policy, vector_env = varied(script.Policy(2, 2, False)), script.make_envs("CountingBox-v0", 16)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = script.rollout(vector_env, policy, greedy=True)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    two = script.rollout(script.make_envs("CountingBox-v0", 16), policy, greedy=True)
    assert torch.equal(one.obs, two.obs) and torch.equal(one.rewards, two.rewards)
    torch.testing.assert_close(one.actions, policy(one.obs).mode)
    assert len(one.obs[:, 0, 0].unique()) > 2  # the envs of a batch start differently
    assert not torch.equal(one.obs[:, 0], script.rollout(vector_env, policy).obs[:, 0])


def test_rollout_copies_observations_an_env_reuses(script):
    vector_env = script.make_envs("Counting-v0", 4, dtype="float32")  # not to be converted
    vector_env.unwrapped.copy = False
    torch.manual_seed(0)
    obs = script.rollout(vector_env, script.Policy(2, 2, True)).obs
    longest = obs[:, 0, 0].argmax()
    assert obs[longest, 0, 1] == 0 and obs[longest, 1, 1] == 1


class Still:
    """A policy that always takes one action, and at once."""

    mode = torch.zeros(1, dtype=torch.int64)

    def parameters(self):
        return iter([self.mode])

    def __call__(self, obs):
        return self

    def sample(self):
        return self.mode

    def log_prob(self, actions):
        return actions


@pytest.mark.parametrize("module", [reinforce, offpolicy_pg])
def test_an_episode_without_end_is_an_error_that_says_what_to_do(module):
    """And one of 20,000 steps is none."""
    policy = Still()
    assert module.rollout(Endless(20_000), policy).rewards.sum() == 20_000
    with pytest.raises(gym.error.Error, match="--env-kwargs .*max_episode_steps"):
        module.rollout(Endless(), policy)


def test_equation_2_policy_loss_sums_over_time_and_averages_over_episodes(script):
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    psi = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    loss = script.policy_loss(log_probs, psi, MASK)
    assert loss.item() == (10 + 40 + 90 + 160 + 250) / 2
    loss.backward()
    assert torch.equal(log_probs.grad, -MASK * psi / 2)


def test_equation_2_with_unit_weights_is_behaviour_cloning(script):
    policy = varied(script.Policy(3, 4, discrete=True))
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
    policy = varied(script.Policy(3, 2, discrete=False))
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
    policy = varied(script.Policy(3, 4, discrete=True))
    obs = torch.randn(6, 3)
    logits = policy.network(obs)
    assert torch.equal(policy(obs).mode, logits.argmax(dim=-1))
    actions = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = logits.log_softmax(dim=-1)[torch.arange(6), actions]
    torch.testing.assert_close(policy(obs).log_prob(actions), expected)


def test_a_new_policy_ignores_the_state_and_is_uniform(script):
    obs = 10 * torch.randn(6, 3)
    assert torch.equal(script.Policy(3, 4, discrete=True)(obs).probs, torch.full((6, 4), 0.25))
    assert script.Policy(3, 2, discrete=False)(obs).mean.eq(0).all()


@pytest.mark.parametrize("discrete", [True, False])
def test_a_policy_of_nan_is_left_to_train_to_report(script, discrete):
    distribution = script.Policy(2, 2, discrete)(torch.full((1, 2), torch.nan))
    actions = torch.zeros(1, dtype=torch.int64) if discrete else torch.zeros(1, 2)
    assert distribution.log_prob(actions).isnan().all()


def normalized(layer, obs):
    """W (s - mean) / std + b, of states that vary."""
    return (obs - layer.mean) / layer.var.sqrt() @ layer.weight.T + layer.bias


def test_the_first_layer_knows_the_mean_and_variance_of_batches_of_equal_weight(script):
    torch.manual_seed(0)
    layer, seen = script.NormalizedLinear(3, 5).double(), []
    obs = 100 + 5 * torch.randn(4, 7, 3).double()
    close(layer(obs), obs @ layer.weight.T + layer.bias)  # until it has seen something
    for size in (1, 40, 3):
        seen.append(torch.randn(size, 3).double() * torch.tensor([1, 1e-2, 50]) + size)
        layer.update(seen[-1])
        mean = torch.stack([x.mean(dim=0) for x in seen]).mean(dim=0)
        square = torch.stack([x.square().mean(dim=0) for x in seen]).mean(dim=0)
        close(layer.mean, mean)
        close(layer.var, square - mean.square(), atol=1e-6)
    close(layer(obs), normalized(layer, obs))
    assert layer.count == 3


def test_the_first_layer_changes_its_numbers_but_not_its_function(script):
    """After the first batch, which sets the scale: there W and b stay."""
    torch.manual_seed(0)
    layer, obs = script.NormalizedLinear(3, 5).double(), torch.randn(7, 3).double()
    before = [x.clone() for x in layer.parameters()]
    layer.update(5 + 2 * torch.randn(9, 3).double())
    assert all(map(torch.equal, layer.parameters(), before))
    function = layer(obs)
    for _ in range(3):
        layer.update(torch.randn(9, 3).double() * torch.tensor([1, 30, 0]) - 2)
    close(layer(obs), function)
    assert not torch.allclose(layer.weight, before[0])


@pytest.mark.parametrize(("deviation", "scale"), [(1e-4, 1), (5e-4, 1), (2e-3, 2e-3), (3, 3)])
def test_what_varies_by_less_than_a_thousandth_is_not_scaled(script, deviation, scale):
    layer = script.NormalizedLinear(1, 3)
    layer.update(deviation * torch.tensor([[-1.0], [1.0]]))
    assert layer.std.item() == pytest.approx(scale)


@pytest.mark.parametrize("x", [123.456, 10000.3])
def test_an_observation_that_does_not_vary_yet_is_0_and_as_it_is_when_it_does(script, x):
    """A scale of 0 would make what is rare, such as one state of many, count a thousandfold."""
    layer = script.NormalizedLinear(1, 3)
    for _ in range(100):
        layer.update(torch.full((1000, 1), x))  # at 10000.3, float32 finds a variance of 9e-6
    close((torch.tensor([x]) - layer.mean) / layer.std, [0], atol=0.05)
    weight = layer.weight[:, 0].clone()
    layer.update(torch.tensor([[x], [x + 1]]))
    slope = layer(torch.tensor([x + 1])) - layer(torch.tensor([x]))
    assert layer.std < 0.1
    close(slope, weight, atol=2e-3)


def test_equation_4_reward_to_go(script):
    undiscounted = torch.tensor([[6.0, 5.0, 3.0], [9.0, 5.0, 0.0]])
    assert torch.equal(script.reward_to_go(REWARDS, 1.0), undiscounted)
    discounted = torch.tensor([[2.75, 3.5, 3.0], [6.5, 5.0, 0.0]])
    assert torch.equal(script.reward_to_go(REWARDS, 0.5), discounted)
    assert torch.equal(script.reward_to_go(REWARDS, 0.0), REWARDS)
    assert torch.equal(script.reward_to_go(REWARDS[:, :1], 0.9), REWARDS[:, :1])
    assert torch.equal(script.reward_to_go(REWARDS.int(), 0.5), discounted)


# Exact oracles


def test_the_enumeration_is_whole_and_agrees_with_the_values(mdp, policy):
    episodes, dynamics = mdp.episodes()
    p = probabilities(policy, episodes, dynamics)
    close(p.sum(), 1.0)
    assert len(episodes.mask.sum(dim=1).unique()) == 3  # episodes of 1, 2 and 3 steps
    _, V = mdp.values(policy)
    close(p @ episodes.rewards.sum(dim=1), mdp.start @ V[0])


def test_the_exact_gradient_is_that_of_finite_differences(mdp, policy):
    """The oracle of the other tests, checked against J alone, by backward induction."""
    theta = nn.utils.parameters_to_vector(policy.parameters()).detach()

    def J(x):
        nn.utils.vector_to_parameters(torch.from_numpy(x), policy.parameters())
        return (mdp.start @ mdp.values(policy)[1][0]).item()

    differences = approx_fprime(theta.numpy(), J, 1e-6)
    nn.utils.vector_to_parameters(theta, policy.parameters())
    close(exact_gradient(mdp, policy), differences, atol=1e-5)


# What `train` does


@pytest.mark.parametrize("module", [pg_baseline, offpolicy_pg])
def test_equal_returns_leave_the_policy_as_it_is(record, module):
    """Exactly: Adam would make a step of full size of what rounding left."""
    settings = {"env_id": "Acrobot-v1", "env_kwargs": '{"max_episode_steps": 30}', "gamma": 0.99}
    settings |= {"baseline": "average", "num_envs": 7, "total_timesteps": 6000}
    calls = record(module, **settings)
    assert all(call["psi"].eq(0).all() for call in calls)
    probs = calls[-1]["Policy"](torch.randn(50, 6)).probs
    assert torch.equal(probs, torch.full((50, 3), 1 / 3))


@pytest.mark.parametrize("module", [pg_baseline, offpolicy_pg])
def test_the_value_network_is_fitted_on_the_returns_and_only_after_its_use(record, module):
    calls = record(module, value_learning_rate=0.02, seed=4, total_timesteps=3000, gamma=0.9)
    torch.manual_seed(4)
    module.Policy(4, 2, True)
    fresh, first, last = module.ValueNetwork(4), calls[0]["ValueNetwork"], calls[-1]["ValueNetwork"]
    assert all(torch.equal(x, y) for x, y in zip(fresh.parameters(), first.parameters()))
    batch = [call["batch"] for call in calls if call["batch"] is not calls[-1]["batch"]][-1]
    returns = module.reward_to_go(batch.rewards, 0.9)[batch.mask.bool()]
    error = (last(batch.obs)[batch.mask.bool()] - returns).square().mean()
    assert error < 0.5 * returns.square().mean()


@pytest.mark.parametrize("module", [pg_baseline, offpolicy_pg])
def test_the_value_network_is_fitted_on_each_step_once_and_never_on_padding(
    module, spy, monkeypatch
):
    rollouts, fitted, forward = spy(module, "rollout"), [], module.ValueNetwork.forward

    def record(network, obs):
        if obs.dim() == 2:  # rows of steps; whole episodes are only evaluated
            fitted.append(obs)
        return forward(network, obs)

    monkeypatch.setattr(module.ValueNetwork, "forward", record)
    module.train(module.Args(**TINY))
    steps = torch.cat([call.result.obs[call.result.mask.bool()] for call in rollouts[:-1]])
    fitted = torch.cat(fitted)
    assert len(fitted) == len(steps)
    assert torch.equal(fitted.unique(dim=0), steps.unique(dim=0))


def test_the_networks_take_in_each_batch_once_after_its_update_and_no_padding(script, spy, record):
    updates = spy(script.NormalizedLinear, "update")
    calls = record(script, env_id="Counting-v0")
    batches = [next(group) for _, group in groupby(calls, key=lambda call: id(call["batch"]))]
    networks = 1 if script is reinforce else 2
    assert len(updates) == networks * len(batches)
    for i, call in enumerate(batches):
        assert call["Policy"].network[0].count == i
        for layer, obs in (x.args for x in updates[networks * i : networks * (i + 1)]):
            assert torch.equal(obs, call["batch"].obs[call["mask"].bool()])
            assert layer.count == len(batches)
        assert len({id(x.args[0]) for x in updates}) == networks


def test_the_step_size_decreases_with_the_env_steps(script, learning_rates, logged):
    own = {"target_kl": 1.0} if script is offpolicy_pg else {}  # several steps on a batch
    script.train(script.Args(**TINY, **own, learning_rate=0.05, decay_steps=100))
    rates = [rate for rate in learning_rates if rate != 0.01]  # that is V's
    steps = [0] + [row["global_step"] for row in logged[:-2]]
    assert [rate for rate, _ in groupby(rates)] == [0.05 / (1 + n / 100) for n in steps]
    assert (len(rates) > len(steps)) == (script is offpolicy_pg)


@pytest.mark.parametrize("module", [pg_baseline, offpolicy_pg])
def test_a_baseline_that_does_not_exist_is_not_taken_for_none(module):
    with pytest.raises(KeyError, match="vlaue"):
        module.train(module.Args(**TINY, baseline="vlaue"))


def test_the_logged_return_and_length_are_means_over_episodes(script, logged, spy):
    rollouts = spy(script, "rollout")
    returns = script.train(script.Args(**TINY))
    steps = 0
    for call, row in zip(rollouts[:-1], logged):  # the last rollout is the evaluation
        batch = call.result
        steps += int(batch.mask.sum())
        assert row["charts/episodic_return"] == pytest.approx(batch.rewards.sum().item() / 4)
        assert row["charts/episodic_length"] == pytest.approx(batch.mask.sum().item() / 4)
        assert row["global_step"] == steps
    assert logged[-1]["eval/episodic_return"] == pytest.approx(returns.mean().item())
    assert logged[-1]["global_step"] == steps
