"""Tests of dqn.py and its extensions; those of its plain replay buffer are in test_buffer.py."""

import shlex
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import tyro
from conftest import ROOT, VALUE_TINY
from problems import Table, buffer_of, close, corridor_return, transitions
from torch import nn

import dqn

LAKE = [0.99**6, 0.99**5, 0.99**5, 0.99**6]  # Q* of FrozenLake's start at γ = 0.99, not slippery

# Equations by hand


def test_equation_1_has_a_coin_for_each_env():
    torch.manual_seed(0)
    table, obs = Table([[0.0, 3.0, 1.0]]), torch.zeros(3000, 1)
    assert dqn.select_actions(table, obs, 0.0).eq(1).all()
    counts = dqn.select_actions(table, obs, 1.0).bincount(minlength=3) / 3000
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    best = dqn.select_actions(table, obs, 0.3).eq(1).float().mean().item()
    assert best == pytest.approx(0.8, abs=0.04)


def test_equation_1_never_explores_at_epsilon_0(monkeypatch):
    """select_actions draws from [0, 1): a 0 is less than any ε but this one."""
    monkeypatch.setattr(torch, "rand", torch.zeros)
    table, obs = Table([[0.0, 3.0, 1.0]]), torch.zeros(3000, 1)
    assert dqn.select_actions(table, obs, 0.0).eq(1).all()
    assert not dqn.select_actions(table, obs, 0.1).eq(1).all()


def test_acting_keeps_no_graph():
    enabled = []

    def network(obs):
        enabled.append(torch.is_grad_enabled())
        return torch.zeros(3, 2)

    dqn.select_actions(network, torch.zeros(3, 1), 0.5)
    assert enabled == [False]


def test_equation_2_epsilon_falls_and_stays():
    values = [dqn.epsilon_at(step, 1.0, 0.2, 100) for step in (0, 50, 100, 101, 10**9)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2, 0.2])
    assert dqn.epsilon_at(0, 1.0, 0.2, 0) == 0.2


BATCH = dqn.Batch(
    obs=torch.zeros(3, 1),
    actions=torch.tensor([0, 1, 0]),
    rewards=torch.tensor([1.0, 2.0, 4.0]),
    next_obs=torch.tensor([[0.0], [1.0], [1.0]]),
    terminations=torch.tensor([0.0, 0.0, 1.0]),  # the second may be cut by a time limit: it goes on
)


def test_equations_4_and_7_td_target_picks_with_one_network_and_values_with_the_other():
    online, target = Table([[5.0, 1.0], [0.0, 2.0]]), Table([[10.0, 20.0], [30.0, 8.0]])
    plain = dqn.td_target(BATCH, online, target, 0.5, double_q=False)
    assert torch.equal(plain, torch.tensor([1 + 10.0, 2 + 15.0, 4.0]))
    double = dqn.td_target(BATCH, online, target, 0.5, double_q=True)
    assert torch.equal(double, torch.tensor([1 + 5.0, 2 + 4.0, 4.0]))
    batches = dqn.Batch(*(torch.stack([x, x]) for x in BATCH))  # of any leading dimensions
    for double_q, expected in {False: plain, True: double}.items():
        y = dqn.td_target(batches, online, target, 0.5, double_q)
        assert torch.equal(y, torch.stack([expected, expected]))


def test_equation_8_the_mean_of_the_dueling_advantages_is_0():
    torch.manual_seed(0)
    network, obs = dqn.QNetwork(3, 4, dueling=True), torch.randn(5, 3)
    value = network.value(network.hidden(obs)).squeeze(-1)
    torch.testing.assert_close(network(obs).mean(dim=-1), value)
    advantages = network.advantage(network.hidden(obs))
    differences = network(obs)[:, 0] - network(obs)[:, 1]
    torch.testing.assert_close(differences, advantages[:, 0] - advantages[:, 1])


def test_equation_9_priorities_and_weights():
    torch.manual_seed(0)
    buffer = buffer_of(dqn.PrioritizedReplayBuffer, 8)
    buffer.add(*transitions(0, 1, 2))
    assert buffer.priorities.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    buffer.update_priorities(torch.arange(3), torch.tensor([-1.0, 4.0, 16.0]), alpha=0.5)
    torch.testing.assert_close(buffer.priorities[:3], torch.tensor([1.0, 2.0, 4.0]))
    buffer.add(*transitions(3))
    assert buffer.priorities[3] == buffer.priorities[:3].max()
    batch, drawn, weights = buffer.sample(22_000, beta=1.0)
    assert torch.equal(batch.actions, drawn)
    frequencies = drawn.bincount(minlength=4) / 22_000
    torch.testing.assert_close(frequencies, torch.tensor([1, 2, 4, 4]) / 11, atol=0.02, rtol=0)
    expected = torch.tensor([1.0, 1 / 2, 1 / 4, 1 / 4])[drawn]  # (n P)^-1 over its largest
    torch.testing.assert_close(weights, expected, atol=1e-4, rtol=0)
    x = torch.tensor([1.0, -2.0, 3.0, 5.0])  # with β = 1 the weighted mean is that of uniform draws
    mean = (weights * x[drawn]).mean() / weights.mean()
    torch.testing.assert_close(mean.item(), 1.75, atol=0.1, rtol=0)


def test_equation_9_of_small_errors():
    """A PrioritizedReplayBuffer draws a transition without an error, too, if rarely."""
    buffer = buffer_of(dqn.PrioritizedReplayBuffer, 4)
    buffer.add(*transitions(0, 1))
    buffer.update_priorities(torch.arange(2), torch.tensor([0.0, 0.25]), alpha=0.5)
    torch.testing.assert_close(buffer.priorities[:2], torch.tensor([1e-3, 0.5]))
    buffer.add(*transitions(2))
    assert buffer.priorities[2] == buffer.priorities[1]
    buffer.update_priorities(torch.arange(1), torch.tensor([torch.nan]), alpha=0.5)
    assert buffer.priorities[0] == 1  # multinomial draws on, until train reports it


# Exact oracles


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
        assert dqn.evaluate(policy, vector_env, "cpu") == -100  # the time limit


@pytest.mark.parametrize(
    ("slippery", "expected"),
    [(True, [0.542026, 0.527762, 0.527762, 0.522342]), (False, LAKE)],
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
    buffer = buffer_of(dqn.PrioritizedReplayBuffer, 4)
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


@pytest.mark.parametrize("order", ["large first", "small first", "in turn"])
@pytest.mark.parametrize(("rows", "small"), [(50_000, 1e-3), (50_000, 1.06e-3), (200_000, 1e-3)])
def test_equation_9_draws_small_priorities_as_often_as_it_should(rows, small, order):
    """A PrioritizedReplayBuffer of priorities 1 and `small`, half of the rows each."""
    buffer = dqn.PrioritizedReplayBuffer(rows, (0,), (), torch.int8, "cpu")
    is_small = torch.arange(rows) >= rows // 2 if order == "large first" else torch.arange(rows) < 0
    is_small[: rows // 2] |= order == "small first"
    is_small[::2] |= order == "in turn"
    buffer.priorities.copy_(torch.where(is_small, small, 1.0))
    buffer.rewards.copy_(is_small)
    buffer.count += rows
    torch.manual_seed(0)
    batch, _, weights = buffer.sample(1_000_000, beta=1.0)
    share = small / (1 + small)
    assert batch.rewards.mean().item() == pytest.approx(share, rel=0.13)  # four deviations
    mean = (weights * batch.rewards).mean() / weights.mean()
    assert mean.item() == pytest.approx(0.5, abs=0.04)  # that of uniform draws


def test_equation_9_of_more_rows_than_floats_can_count():
    """A PrioritizedReplayBuffer of 2^24 rows and some, of which only the last has a priority."""
    rows = 2**24 + 3
    buffer = dqn.PrioritizedReplayBuffer(rows, (0,), (), torch.int8, "cpu")
    buffer.priorities[-1] = 1.0
    buffer.count += rows
    _, drawn, _ = buffer.sample(5, beta=1.0)
    assert drawn.tolist() == [rows - 1] * 5


# What `train` does


def test_train_of_dqn_lets_epsilon_fall(spy):
    acts = spy(dqn, "select_actions")
    dqn.train(dqn.Args(**VALUE_TINY, start_e=0.9, end_e=0.1, exploration_fraction=0.5))
    epsilons = [args[2] if len(args) > 2 else 0.0 for args, _ in acts]
    greedy = epsilons.index(0.0)  # from there on, the evaluation
    assert epsilons[0] == 0.9 and epsilons[greedy - 1] == 0.1
    falling = epsilons[: epsilons.index(0.1)]
    assert falling == sorted(falling, reverse=True)
    assert 0.4 <= len(falling) / greedy <= 0.6


@pytest.mark.parametrize(("anneal_lr", "number"), [(False, 8), (True, 4)])
def test_train_copies_the_target_network_less_often_as_the_step_size_falls(spy, anneal_lr, number):
    """400 env steps, or Σ 4 (1 - k / 100) = 202 of the first step size; 50 make a copy."""
    copies, targets = spy(dqn, "update_target"), spy(dqn, "td_target")
    settings = {"target_network_frequency": 50, "num_updates": 1, "anneal_lr": anneal_lr}
    dqn.train(dqn.Args(**VALUE_TINY, **settings))
    assert len(copies) == number and len(targets) > 5 * number


def test_train_weighs_the_td_errors_of_prioritised_replay(spy):
    samples = spy(dqn.PrioritizedReplayBuffer, "sample")
    updates = spy(dqn.PrioritizedReplayBuffer, "update_priorities")
    targets, losses = spy(dqn, "td_target"), spy(torch.Tensor, "backward")
    dqn.train(dqn.Args(**VALUE_TINY, prioritized_replay=True, alpha=0.7, beta=0.3))
    betas = [args[2] for args, _ in samples]
    assert 0.3 < betas[0] < 0.6 and betas == sorted(betas) and 0.97 < betas[-1] <= 1
    for sample, update, target, backward in zip(samples, updates, targets, losses):
        batch, rows, weights = sample.result
        _, updated, errors, alpha = update.args
        assert updated is rows and alpha == 0.7
        assert len(errors) == len(target.result) == len(batch.rewards)
        (loss,) = backward.args
        assert loss.item() == pytest.approx(0.5 * (weights * errors**2).mean().item(), rel=1e-4)
        assert not errors.requires_grad


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


def test_a_vector_env_of_the_users_own_has_the_values_by_hand():
    """0 → 1 → 2 ↺, a step in 2 is worth 1, three steps an episode, γ = 0.9."""
    settings = {"gamma": 0.9, "total_timesteps": 900, "end_e": 1.0, "learning_rate": 1.0}
    table, greedy_return = table_of(env_id="envs:Chain-v0", **settings)
    close(table, torch.tensor([[8.1], [9.0], [10.0]]).expand(3, 2), atol=1e-3)
    assert greedy_return == 1


def test_q_learning_is_off_policy_and_needs_coverage():
    """It learns Q* from a policy that acts at random, and nothing from one that never explores."""
    lake = {"env_id": "FrozenLake-v1", "env_kwargs": '{"is_slippery": false}'}
    lake |= {"gamma": 0.99, "total_timesteps": 4000, "learning_rate": 1.0}  # 1: deterministic
    table, greedy_return = table_of(**lake, start_e=1.0, end_e=1.0)
    close(table[0], LAKE, atol=1e-3)
    assert greedy_return == 1
    table, greedy_return = table_of(**lake | {"total_timesteps": 300}, start_e=0.0, end_e=0.0)
    assert greedy_return == 0 and table.eq(0).all()


@pytest.mark.slow
def test_tabular_q_learning_finds_the_values_of_frozen_lake():
    """By the command in docs/dqn.md."""
    lines = (ROOT / "docs" / "dqn.md").read_text().splitlines()
    (command,) = [line for line in lines if line.startswith("python") and "--tabular" in line]
    args = tyro.cli(dqn.Args, args=shlex.split(command)[2:])
    args.wandb_mode, args.total_timesteps = "disabled", 20_000
    assert dqn.train(args).mean() == 1
    (path,) = Path("runs").glob("*/checkpoint.pt")
    table = torch.load(path, weights_only=True)["q_network"]["weight"].T
    close(table[0], [args.gamma**steps for steps in (6, 5, 5, 6)], atol=1e-3)
