"""The value-based scripts: each numbered equation by hand, the buffer, and runs from end to end."""

import math
from pathlib import Path

import envs  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import INERT, ROOT, VALUE_MODULES, options, run
from problems import Table
from torch import nn

import cem_q
import ddpg_continuous
import dqn
import naf

TINY = {"total_timesteps": 400, "num_envs": 4, "eval_episodes": 3, "learning_starts": 100}
TINY |= {"wandb_mode": "disabled", "batch_size": 16}
CONTINUOUS = [cem_q, naf, ddpg_continuous]


def test_equation_1_has_a_coin_for_each_env():
    torch.manual_seed(0)
    table, obs = Table([[0.0, 3.0, 1.0]]), torch.zeros(3000, 1)
    assert dqn.select_actions(table, obs, 0.0).eq(1).all()
    counts = dqn.select_actions(table, obs, 1.0).bincount(minlength=3) / 3000
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    best = dqn.select_actions(table, obs, 0.3).eq(1).float().mean().item()
    assert best == pytest.approx(0.8, abs=0.04)


def test_acting_keeps_no_graph():
    enabled = []
    network = lambda obs: enabled.append(torch.is_grad_enabled()) or torch.zeros(3, 2)  # noqa: E731
    dqn.select_actions(network, torch.zeros(3, 1), 0.5)
    assert enabled == [False]


def test_equation_1_never_explores_at_epsilon_0(monkeypatch):
    """select_actions draws from [0, 1): a 0 is less than any ε but this one."""
    monkeypatch.setattr(torch, "rand", torch.zeros)
    table, obs = Table([[0.0, 3.0, 1.0]]), torch.zeros(3000, 1)
    assert dqn.select_actions(table, obs, 0.0).eq(1).all()
    assert not dqn.select_actions(table, obs, 0.1).eq(1).all()


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


def test_no_gradient_flows_into_equation_4(value_script, spy):
    targets = spy(value_script, "td_target")
    value_script.train(value_script.Args(**TINY))
    assert len(targets) > 10 and not any(y.requires_grad for _, y in targets)


def test_equation_6_update_target(value_script):
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.clone()
    value_script.update_target(target, online, 0.25)
    torch.testing.assert_close(target.weight, 0.25 * online.weight + 0.75 * before)
    value_script.update_target(target, online, 1.0)
    assert torch.equal(target.bias, online.bias)


def test_equation_8_the_mean_of_the_dueling_advantages_is_0():
    torch.manual_seed(0)
    network, obs = dqn.QNetwork(3, 4, dueling=True), torch.randn(5, 3)
    value = network.value(network.hidden(obs)).squeeze(-1)
    torch.testing.assert_close(network(obs).mean(dim=-1), value)
    advantages = network.advantage(network.hidden(obs))
    differences = network(obs)[:, 0] - network(obs)[:, 1]
    torch.testing.assert_close(differences, advantages[:, 0] - advantages[:, 1])


def test_networks_take_any_leading_dimensions():
    torch.manual_seed(0)
    obs, actions = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    networks = {dqn.QNetwork(3, 2): (obs,), dqn.QNetwork(3, 2, dueling=True): (obs,)}
    networks |= {ddpg_continuous.Actor(3, 2): (obs,), cem_q.QNetwork(3, 2): (obs, actions)}
    networks |= {ddpg_continuous.QNetwork(3, 2): (obs, actions)}
    for network, inputs in networks.items():
        for i in range(4):
            torch.testing.assert_close(network(*inputs)[i], network(*(x[i] for x in inputs)))
    assert dqn.QNetwork(3, 2).value is None


def buffer_of(kind, capacity):
    return kind(capacity, (1,), (), torch.int64, "cpu")


def rows(*values):
    x = torch.tensor(values)
    return x[:, None].float(), x, x.float(), x[:, None].float() + 1, x.float()


KINDS = {m.__name__: m.ReplayBuffer for m in VALUE_MODULES}
KINDS["prioritized-dqn"] = dqn.PrioritizedReplayBuffer


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def test_equation_3_the_ring_of_a_replay_buffer_wraps(kind):
    """A ReplayBuffer of five rows."""
    buffer = buffer_of(kind, 5)
    assert buffer.add(*rows(0, 1, 2)).tolist() == [0, 1, 2]
    assert buffer.add(*rows(3, 4, 5)).tolist() == [3, 4, 0]
    assert buffer.rewards.tolist() == [5, 1, 2, 3, 4]
    assert buffer.next_obs[:, 0].tolist() == [6, 2, 3, 4, 5]
    buffer.add(*rows(*range(10, 22)))  # more than the capacity: the last five stay
    assert sorted(buffer.actions.tolist()) == [17, 18, 19, 20, 21]
    assert buffer.actions[int(buffer.count) % 5] == 17
    assert buffer.add(*rows(30, 31, 32)).tolist() == [3, 4, 0]  # not for the first time


def test_equation_3_the_replay_buffer_keeps_the_types(kind):
    """A ReplayBuffer of actions in int16, given numpy's float64."""
    buffer = kind(3, (2,), (2,), torch.int16, "cpu")
    buffer.add(np.ones((1, 2)), torch.ones(1, 2), np.ones(1), np.ones((1, 2)), np.ones(1, bool))
    assert buffer.actions.dtype == torch.int16 and buffer.actions.shape == (3, 2)
    for name in ("obs", "rewards", "next_obs", "terminations"):
        assert getattr(buffer, name).dtype == torch.float32
    assert buffer.obs.shape == buffer.next_obs.shape == (3, 2) and buffer.rewards.shape == (3,)
    assert buffer.terminations.tolist() == [1, 0, 0]


def test_equation_3_samples_what_the_replay_buffer_holds_and_all_of_it(value_script):
    torch.manual_seed(0)
    buffer = buffer_of(value_script.ReplayBuffer, 100)
    buffer.add(*rows(7, 8, 9))
    batch = buffer.sample(3000)
    counts = batch.actions.bincount(minlength=10)
    assert counts[:7].sum() == 0 and (counts[7:] > 900).all()
    torch.testing.assert_close(batch.next_obs[:, 0], batch.rewards + 1)
    again = buffer_of(value_script.ReplayBuffer, 100)
    again.load_state_dict(buffer.state_dict())
    assert again.rewards.equal(buffer.rewards) and again.count == 3
    buffer.add(*rows(*range(150)))
    counts = buffer.sample(30_000).actions.bincount(minlength=150)
    assert counts[:50].sum() == 0 and counts[50:].min() > 220 and counts.max() < 380


def test_equation_3_is_uniform_to_one_part_in_a_million(value_script, monkeypatch):
    """ReplayBuffer.sample takes a number modulo the count: it must be far larger."""
    highs, randint = [], torch.randint
    spy = lambda high, *x, **y: highs.append(high) or randint(high, *x, **y)  # noqa: E731
    monkeypatch.setattr(torch, "randint", spy)
    buffer = buffer_of(value_script.ReplayBuffer, 10)
    buffer.add(*rows(1, 2))
    buffer.sample(5)
    assert highs[0] >= 2**40


def test_equation_9_priorities_and_weights():
    torch.manual_seed(0)
    buffer = buffer_of(dqn.PrioritizedReplayBuffer, 8)
    buffer.add(*rows(0, 1, 2))
    assert buffer.priorities.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    buffer.update_priorities(torch.arange(3), torch.tensor([-1.0, 4.0, 16.0]), alpha=0.5)
    torch.testing.assert_close(buffer.priorities[:3], torch.tensor([1.0, 2.0, 4.0]))
    buffer.add(*rows(3))
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
    buffer.add(*rows(0, 1))
    buffer.update_priorities(torch.arange(2), torch.tensor([0.0, 0.25]), alpha=0.5)
    torch.testing.assert_close(buffer.priorities[:2], torch.tensor([1e-3, 0.5]))
    buffer.add(*rows(2))
    assert buffer.priorities[2] == buffer.priorities[1]
    buffer.update_priorities(torch.arange(1), torch.tensor([torch.nan]), alpha=0.5)
    assert buffer.priorities[0] == 1  # multinomial draws on, until train reports it


@pytest.mark.parametrize("module", CONTINUOUS)
def test_equation_1_adds_noise_to_the_best_action_and_stays_in_the_box(module):
    torch.manual_seed(0)
    obs = torch.randn(2000, 3)
    if module is naf:
        network = naf.NAFNetwork(3, 2)
        best, select = network(obs)[0], lambda sigma: naf.select_actions(network, obs, sigma)
    elif module is cem_q:
        network, search = cem_q.QNetwork(3, 2), lambda q, size: cem_q.argmax_grid(q, size, 2, 5)
        best = cem_q.argmax_action(network, obs, search)
        select = lambda sigma: cem_q.select_actions(network, obs, search, sigma)  # noqa: E731
    else:
        actor, unit = ddpg_continuous.Actor(3, 2), torch.randn(2000, 2)
        best = actor(obs)
        select = lambda sigma: ddpg_continuous.select_actions(actor, obs, sigma * unit)  # noqa: E731
    torch.testing.assert_close(select(0.0), best)
    noise = (select(0.01) - best)[best.abs() < 0.9]
    assert len(noise) == 0 or noise.std().item() == pytest.approx(0.01, rel=0.1)
    assert select(5.0).abs().max() == 1 and select(5.0).shape == (2000, 2)


def test_equation_1_draws_its_noise_from_torch():
    """With one seed, select_actions and ou_noise add the same numbers."""
    obs, zeros = torch.randn(6, 3), torch.zeros(6, 2)
    network, grid = cem_q.QNetwork(3, 2), lambda q, B: cem_q.argmax_grid(q, B, 2, 5)
    best = cem_q.argmax_action(network, obs, grid)
    noisy = {0: (cem_q.select_actions, (network, obs, grid, 0.1), best)}
    network = naf.NAFNetwork(3, 2)
    noisy[1] = (naf.select_actions, (network, obs, 0.1), network(obs)[0])
    noisy[2] = (ddpg_continuous.ou_noise, (zeros + 0.4, 0.25, 0.1), zeros + 0.3)
    for function, arguments, mean in noisy.values():
        torch.manual_seed(0)
        ours = function(*arguments)
        torch.manual_seed(0)
        torch.testing.assert_close(ours, (mean + 0.1 * torch.randn(6, 2)).clamp(-1, 1))


def test_equation_2_argmax_action_pairs_each_observation_with_its_own_action():
    """Q = -(a - s)²: the best action is the state."""
    obs = torch.linspace(-0.8, 0.8, 5)[:, None]
    q_network = lambda obs, actions: -(obs - actions).square().sum(dim=-1)  # noqa: E731
    search = lambda q_function, size: cem_q.argmax_grid(q_function, size, 1, 11)  # noqa: E731
    torch.testing.assert_close(cem_q.argmax_action(q_network, obs, search), obs, atol=0.11, rtol=0)


def test_equation_4_of_cem_q():
    network, batch = cem_q.QNetwork(3, 2), continuous_batch()
    next_actions = torch.rand(4, 2)
    q = network(batch.next_obs, next_actions).detach()
    expected = torch.tensor([0 + 0.9 * q[0], 1.0, 2 + 0.9 * q[2], 3.0])
    torch.testing.assert_close(cem_q.td_target(batch, next_actions, network, 0.9), expected)


def test_cem_q_searches_and_values_with_the_target_network(spy):
    searches, targets = spy(cem_q, "argmax_action"), spy(cem_q, "td_target")
    cem_q.train(cem_q.Args(**TINY))
    by_obs = {id(args[1]): (args[0], found) for args, found in searches}
    online = {id(args[0]) for args, _ in searches} - {id(targets[0][0][2])}
    assert len(online) == 1
    for (batch, next_actions, target_network, _), _ in targets:
        network, found = by_obs[id(batch.next_obs)]
        assert network is target_network and found is next_actions


def test_naf_max_is_the_value_and_its_gradient_is_0_at_mu():
    torch.manual_seed(0)
    network, obs = naf.NAFNetwork(3, 2), torch.randn(6, 3)
    with torch.no_grad():
        network.entries.weight.mul_(10)
    mu, L, value = network(obs)
    assert torch.equal(naf.naf_q(mu, L, value, mu), value)
    P = L @ L.mT
    assert (torch.linalg.eigvalsh(P) > 0).all() and P[:, 0, 1].abs().min() > 1e-3
    assert L[:, 0, 1].eq(0).all() and mu.abs().max() < 1
    actions = mu.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(naf.naf_q(mu, L, value, actions).sum(), actions)
    assert gradient.abs().max() < 1e-5
    others = 2 * torch.rand(6, 2) - 1
    d = others - mu
    by_hand = value - 0.5 * (
        P[:, 0, 0] * d[:, 0] ** 2 + 2 * P[:, 0, 1] * d[:, 0] * d[:, 1] + P[:, 1, 1] * d[:, 1] ** 2
    )
    torch.testing.assert_close(naf.naf_q(mu, L, value, others), by_hand)


def continuous_batch():
    return naf.Batch(torch.randn(4, 3), torch.rand(4, 2), torch.arange(4.0), torch.randn(4, 3),
                     torch.tensor([0.0, 1.0, 0.0, 1.0]))  # fmt: skip


def test_naf_keeps_mu_in_the_box_and_the_diagonal_positive_whatever_the_weights():
    torch.manual_seed(0)
    network = naf.NAFNetwork(3, 2)
    with torch.no_grad():
        network.entries.weight.mul_(100)
        network.mu.weight.mul_(100)
    mu, L, _ = network(torch.randn(500, 3))
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    assert mu.abs().max() <= 1 and mu.abs().max() > 0.99
    state = torch.randn(3)  # one state alone
    for one, row in zip(network(state), network(state[None])):
        torch.testing.assert_close(one, row[0])
    torch.testing.assert_close(diagonal.min().item(), math.exp(-5))
    torch.testing.assert_close(diagonal.max().item(), math.exp(2))


def test_naf_target_scales_rewards_alone():
    network, batch = naf.NAFNetwork(3, 2), continuous_batch()
    value = network(batch.next_obs)[2].detach()
    expected = torch.tensor([0 + 0.9 * value[0], 0.1, 0.2 + 0.9 * value[2], 0.3])
    torch.testing.assert_close(naf.td_target(batch, network, 0.9, 0.1), expected)


def test_ddpg_target_and_actor_gradient_by_hand():
    actor, critic, batch = ddpg_continuous.Actor(3, 2), ddpg_continuous.QNetwork(3, 2), None
    batch = continuous_batch()
    q = critic(batch.next_obs, actor(batch.next_obs)).detach()
    expected = torch.tensor([0 + 0.9 * q[0], 1.0, 2 + 0.9 * q[2], 3.0])
    torch.testing.assert_close(ddpg_continuous.td_target(batch, actor, critic, 0.9), expected)
    loss = ddpg_continuous.actor_loss(actor, critic, batch.obs)
    ours = torch.autograd.grad(loss, list(actor.parameters()))
    actions = actor(batch.obs)
    leaf = actions.detach().requires_grad_()
    (dq_da,) = torch.autograd.grad(critic(batch.obs, leaf).sum(), leaf)
    by_chain_rule = torch.autograd.grad(actions, list(actor.parameters()), -dq_da / 4)
    for one, two in zip(ours, by_chain_rule):
        torch.testing.assert_close(one, two)


def test_ddpg_noise():
    actor, obs = ddpg_continuous.Actor(3, 2), torch.randn(50, 3)
    noisy = ddpg_continuous.select_actions(actor, obs, torch.tensor([0.4, -0.3]).expand(50, -1))
    torch.testing.assert_close(noisy, (actor(obs) + torch.tensor([0.4, -0.3])).clamp(-1, 1))
    torch.manual_seed(0)
    noise, ou = torch.full((20_000, 2), 10.0), ddpg_continuous.ou_noise
    nearer = ou(noise, 0.25, 0.5)
    assert nearer.mean().item() == pytest.approx(7.5, abs=0.02)
    assert nearer.std().item() == pytest.approx(0.5, abs=0.02)
    white = ou(noise, 1.0, 0.5)
    assert white.mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.corrcoef(white.T)[0, 1].abs() < 0.03


SEARCHES = {
    "grid": (cem_q.argmax_grid, {"bins": 41}, 0.026),
    "gradient": (cem_q.argmax_gradient, {"num_samples": 16, "iterations": 20}, 0.05),
    "cem": (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 4}, 0.08),
    "cmaes": (cem_q.argmax_cmaes, {"num_samples": 16, "iterations": 10}, 0.08),
}


@pytest.mark.parametrize("action_dim", [1, 2])
@pytest.mark.parametrize("name", SEARCHES)
def test_maximizers_find_a_quadratics_top_or_the_nearest_corner(name, action_dim):
    torch.manual_seed(0)
    search, settings, tolerance = SEARCHES[name]
    tops = 1.6 * torch.rand(20, action_dim) - 0.8
    scale = torch.tensor([1.0, 3.0])[:action_dim]

    def q_function(actions):
        assert actions.shape[0] == 20 and actions.abs().max() <= 1
        return -(scale * (actions - tops[:, None]) ** 2).sum(dim=-1)

    found = search(q_function, 20, action_dim, **settings)
    assert found.shape == (20, action_dim)
    assert ((found - tops) ** 2).mean().sqrt() < tolerance
    tops = torch.full((20, action_dim), 1.7)
    torch.testing.assert_close(search(q_function, 20, action_dim, **settings).mean().item(), 1.0,
                               atol=0.02, rtol=0)  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_maximizers_prefer_the_higher_of_two_peaks(name):
    torch.manual_seed(0)
    search, settings, _ = SEARCHES[name]

    def q_function(actions):
        a = 2 * actions.squeeze(-1)
        low, high = (a + 1) / 0.2, (a - 1) / 0.2
        return (-0.5 * low**2).exp() + 1.5 * (-0.5 * high**2).exp()

    found = search(q_function, 200, 1, **settings)
    assert (found - 0.5).abs().lt(0.1).float().mean() > 0.7


def test_equation_7_is_the_best_of_all_points():
    torch.manual_seed(0)
    network, obs = cem_q.QNetwork(3, 2), torch.randn(6, 3)

    def q_function(actions):
        return network(obs[:, None].expand(-1, actions.shape[1], -1), actions)

    found = cem_q.argmax_grid(q_function, 6, 2, bins=4)
    axis = [-1, -1 / 3, 1 / 3, 1]
    points = torch.tensor([[x, y] for x in axis for y in axis])
    for o, action in zip(obs, found):
        values = network(o.expand(16, -1), points)
        torch.testing.assert_close(action, points[values.argmax()])


def test_equation_8_takes_steps_of_one_length_along_the_gradient():
    """From any start two steps of 0.5 and 0.25, however steep the slope."""
    slopes = torch.tensor([[3.0, 4.0], [-0.03, 0.04], [0.0, -500.0]])
    starts = []

    def q_function(actions):
        starts.append(actions.detach().clone())
        return (actions * slopes[:, None]).sum(dim=-1)

    torch.manual_seed(0)
    cem_q.argmax_gradient(q_function, 3, 2, num_samples=4, iterations=2)
    directions = torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, -1.0]])[:, None]
    torch.testing.assert_close(starts[1], (starts[0] + 0.5 * directions).clamp(-1, 1))
    torch.testing.assert_close(starts[2], (starts[1] + 0.25 * directions).clamp(-1, 1))


def test_equation_9_learns_mean_and_deviation_from_the_elites():
    drawn = []

    def q_function(actions):
        drawn.append(actions)
        return -(actions - torch.tensor([0.5, 0.0])).square() @ torch.tensor([1.0, 100.0])

    torch.manual_seed(0)
    cem_q.argmax_cem(q_function, 3, 2, num_samples=5000, num_elites=50, iterations=2, min_std=0.01)
    for first, second in zip(*drawn):
        elites = first[q_function(first[None])[0].topk(50).indices]
        torch.testing.assert_close(second.mean(dim=0), elites.mean(dim=0), atol=0.02, rtol=0)
        torch.testing.assert_close(second.std(dim=0), elites.std(dim=0), atol=0.02, rtol=0)
    floor = []
    search = lambda min_std: cem_q.argmax_cem(  # noqa: E731
        lambda a: floor.append(a) or -a.square().sum(-1), 1, 1, 5000, 2, 3, min_std
    )
    search(0.3)
    assert floor[-1].std().item() == pytest.approx(0.3, rel=0.05)


def test_equation_9_has_the_deviation_of_the_elites_without_a_correction():
    """Of two elites of argmax_cem it is half of their distance."""
    drawn = []
    torch.manual_seed(0)
    f = lambda a: drawn.append(a) or -a.square().sum(-1)  # noqa: E731
    cem_q.argmax_cem(f, 1, 1, num_samples=5000, num_elites=2, iterations=2, min_std=0)
    elites = drawn[0][0][drawn[0][0, :, 0].abs().argsort()[:2]]
    half = (elites[0] - elites[1]).abs().item() / 2
    assert drawn[1].std().item() == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize(
    ("search", "sizes"),
    [(cem_q.argmax_grid, [21]), (cem_q.argmax_gradient, [8] * 6), (cem_q.argmax_cem, [32] * 2),
     (cem_q.argmax_cmaes, [16] * 10)],
)  # fmt: skip
def test_what_a_search_asks_for_by_default(search, sizes):
    """Points in each call of q_function; the last call of gradient compares its ends."""
    asked = []
    search(lambda a: asked.append(a.shape[1]) or a.sum(dim=-1), 2, 1)
    assert asked == sizes


def test_the_deviation_of_a_search_does_not_collapse():
    for search, settings in (cem_q.argmax_cem, {"num_elites": 4}), (cem_q.argmax_cmaes, {}):
        torch.manual_seed(0)
        drawn = []
        f = lambda a, drawn=drawn: drawn.append(a) or -a.square().sum(-1)  # noqa: E731
        search(f, 500, 1, **settings, num_samples=32, iterations=40)
        assert drawn[-1].std(dim=1).mean().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_no_graph(name):
    """But for that of gradient; and argmax_action keeps none around any search."""
    enabled, (search, settings, _) = [], SEARCHES[name]

    def q_function(actions):
        enabled.append(torch.is_grad_enabled())
        return actions.sum(dim=-1)

    search(q_function, 2, 1, **settings)
    assert set(enabled) == {name == "gradient"}
    enabled.clear()
    q_network = lambda obs, actions: q_function(actions)  # noqa: E731
    cem_q.argmax_action(q_network, torch.zeros(2, 3), lambda q, B: q(torch.zeros(B, 4, 1)))
    assert enabled == [False]


@pytest.mark.parametrize("name", SEARCHES)
def test_no_gradient_flows_through_a_search(name):
    network, (search, settings, _) = cem_q.QNetwork(3, 2), SEARCHES[name]
    q_function = lambda a: network(torch.zeros(*a.shape[:2], 3), a)  # noqa: E731
    assert not search(q_function, 5, 2, **settings).requires_grad
    assert all(p.grad is None for p in network.parameters())


def hansen(f, d, num_samples, iterations, sigma=0.5):
    """Hansen (2016), appendix A, one vector at a time, without h_σ and negative weights."""
    mu = num_samples // 2
    w = [math.log((num_samples + 1) / 2) - math.log(i + 1) for i in range(mu)]
    w = [x / sum(w) for x in w]
    mu_eff = 1 / sum(x * x for x in w)
    c_sigma, c_c = (mu_eff + 2) / (d + mu_eff + 5), (4 + mu_eff / d) / (d + 4 + 2 * mu_eff / d)
    c_1 = 2 / ((d + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (mu_eff - 2 + 1 / mu_eff) / ((d + 2) ** 2 + mu_eff))
    d_sigma = 1 + 2 * max(0, math.sqrt((mu_eff - 1) / (d + 1)) - 1) + c_sigma
    chi = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
    m, p_sigma, p_c, C = torch.zeros(d), torch.zeros(d), torch.zeros(d), torch.eye(d)
    for _ in range(iterations):
        variances, axes = torch.linalg.eigh(C)
        z = torch.randn(1, num_samples, d)[0]
        x = [(m + sigma * axes @ (variances.sqrt() * zk)).clamp(-1, 1) for zk in z]
        x.sort(key=lambda a: -f(a).item())
        y = [(a - m) / sigma for a in x[:mu]]
        y_w = sum(a * b for a, b in zip(w, y))
        m = m + sigma * y_w
        white = axes @ torch.diag(1 / variances.sqrt()) @ axes.T @ y_w
        p_sigma = (1 - c_sigma) * p_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * white
        p_c = (1 - c_c) * p_c + math.sqrt(c_c * (2 - c_c) * mu_eff) * y_w
        rank_mu = sum(a * torch.outer(b, b) for a, b in zip(w, y))
        C = (1 - c_1 - c_mu) * C + c_1 * torch.outer(p_c, p_c) + c_mu * rank_mu
        sigma = sigma * math.exp(c_sigma / d_sigma * (p_sigma.norm().item() / chi - 1))
    return m


@pytest.mark.parametrize(("num_samples", "d"), [(12, 3), (9, 3), (60, 3), (60, 1)])
def test_equation_10_is_hansens_on_a_rotated_ellipsoid(num_samples, d):
    """argmax_cmaes: with 60 samples d_σ grows, and c_μ in one dimension is at its limit."""
    torch.manual_seed(9)
    Q, _ = torch.linalg.qr(torch.randn(d, d))
    H = Q @ torch.diag(torch.tensor([1.0, 10.0, 100.0])[:d]) @ Q.T
    top = torch.tensor([0.3, -0.2, 0.1])[:d]

    def f(a):
        return -((a - top) @ H * (a - top)).sum(dim=-1)

    torch.manual_seed(1)
    (ours,) = cem_q.argmax_cmaes(f, 1, d, num_samples, iterations=6, min_std=1e-6)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, hansen(f, d, num_samples, 6), atol=1e-5, rtol=0)


def test_evaluate_counts_the_first_episode_of_each_env(value_script):
    """Σ_t 100 t + action, whatever comes after the end."""
    lengths = []

    def policy(obs):
        lengths.append(obs[:, 0])
        return torch.zeros(len(obs), dtype=torch.int64) if value_script is dqn else obs * 0

    env_id, action = ("Counting-v0", 1) if value_script is dqn else ("CountingBox-v0", 6)
    returns = value_script.evaluate(policy, value_script.make_envs(env_id, 9), torch.device("cpu"))
    expected = lengths[0] * (50 * (lengths[0] - 1) + action)
    torch.testing.assert_close(returns, expected.double())
    assert len(lengths[0].unique()) > 2


def test_train_acts_and_is_scored_with_the_online_network(value_script, spy, monkeypatch):
    acts, scored = spy(value_script, "select_actions"), []
    evaluate = value_script.evaluate
    monkeypatch.setattr(
        value_script, "evaluate", lambda policy, *x: scored.append(policy) or evaluate(policy, *x)
    )
    args = {**TINY, "tau": 1.0} | ({"target_network_frequency": 300} if value_script is dqn else {})
    value_script.train(value_script.Args(**args))
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    saved = saved["actor" if value_script is ddpg_continuous else "q_network"]
    for key, value in acts[50][0][0].state_dict().items():
        assert torch.equal(value, saved[key])
    state, network = torch.randn(5, 4 if value_script is dqn else 3), acts[50][0][0]
    with torch.no_grad():
        torch.manual_seed(1)
        ours = scored[0](state)
        torch.manual_seed(1)
        expected = {
            dqn: lambda: network(state).argmax(dim=-1),
            naf: lambda: network(state)[0],
            ddpg_continuous: lambda: network(state),
            cem_q: lambda: cem_q.argmax_cem(
                lambda a: network(state[:, None].expand(-1, a.shape[1], -1), a), 5, 1
            ),
        }[value_script]()
    torch.testing.assert_close(ours, expected)


def test_train_of_ddpg_starts_each_episode_with_new_noise(spy):
    steps = spy(ddpg_continuous, "ou_noise")
    args = {**TINY, "env_id": "CountingBox-v0", "ou_theta": 0.2, "exploration_noise": 0.3}
    ddpg_continuous.train(ddpg_continuous.Args(**args))
    assert all(args[1:] == (0.2, 0.3) for args, _ in steps)
    kept = reset = 0
    for (_, before), ((noise, *_), _) in zip(steps, steps[1:]):
        rows = (noise == before).all(dim=1)
        assert noise[~rows].eq(0).all()
        kept, reset = kept + int(rows.sum()), reset + int((~rows).sum())
    assert kept > reset > 50


def test_metrics_that_are_logged(value_script, logged):
    returns = value_script.train(value_script.Args(**{**TINY, "total_timesteps": 2100}))
    own = {dqn: {"charts/epsilon"}, cem_q: {"time/maximizing"}}.get(value_script, set())
    own |= {"losses/actor_loss"} if value_script is ddpg_continuous else set()
    common = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "global_step"}
    for row in logged[:-1]:
        assert row.keys() == common | own | {"losses/td_loss", "losses/q_values"}
    steps = [row["global_step"] for row in logged[:-1]]
    assert [step // 500 for step in steps] == [1, 2, 3, 4, 4] and steps[-1] >= 2100
    expected = {"eval/episodic_return": pytest.approx(returns.mean().item())}
    assert logged[-1] == expected | {"global_step": steps[-1]}


def test_the_logged_return_is_that_of_whole_episodes(value_script, logged, monkeypatch):
    """In an episode of length n the rewards add up to 50 n (n - 1), and the actions."""
    env_id = "Counting-v0" if value_script is dqn else "CountingBox-v0"
    buffer, _ = spy_on_the_buffer(value_script, monkeypatch, env_id)
    ended = buffer.terminations[: int(buffer.count)] > 0
    lengths = buffer.obs[: len(ended), 0][ended][-20:]
    row = logged[-2]
    assert row["charts/episodic_length"] == pytest.approx(lengths.mean().item())
    actions = row["charts/episodic_return"] - (50 * lengths * (lengths - 1)).mean().item()
    low, high = (1, 2) if value_script is dqn else (-1, 13)
    assert low <= actions / lengths.mean().item() <= high


def spy_on_the_buffer(module, monkeypatch, env_id, **settings):
    """All that a run has kept, and the run's settings."""
    made = []
    original = module.ReplayBuffer.__init__

    def init(self, *args):
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(module.ReplayBuffer, "__init__", init)
    args = module.Args(env_id=env_id, **{**TINY, **settings})
    module.train(args)
    return made[0], args


@pytest.mark.parametrize("truncates", [False, True])
def test_the_buffer_holds_every_transition_and_no_reset(value_script, truncates, monkeypatch):
    kind = "Truncating" if truncates else "Counting"
    env_id = f"{kind}-v0" if value_script is dqn else f"{kind}Box-v0"
    buffer, _ = spy_on_the_buffer(value_script, monkeypatch, env_id)
    stored = int(buffer.count)
    assert 400 <= stored < 404
    length, t = buffer.obs[:stored].T
    assert torch.equal(buffer.next_obs[:stored, 0], length)
    assert torch.equal(buffer.next_obs[:stored, 1], t + 1)  # never the first of the next episode
    assert torch.equal(buffer.terminations[:stored], (t + 1 == length).float() * (not truncates))
    assert len(length.unique()) > 2
    actions = buffer.actions[:stored]
    if value_script is dqn:
        expected = actions + 1.0
    else:
        space = gym.spaces.Box(np.array([-1.0, 0.0], "f4"), np.array([3.0, 10.0], "f4"))
        expected = torch.from_numpy(value_script.env_actions(actions, space)).sum(dim=-1)
        assert actions.abs().max() <= 1
    torch.testing.assert_close(buffer.rewards[:stored], 100 * t + expected)


CASES = [(m, name, value) for m in VALUE_MODULES for name, value in options(m, TINY)]
# what a flag needs to matter
NEEDS = {"alpha": {"prioritized_replay": True}, "beta": {"prioritized_replay": True}}
NEEDS |= {"bins": {"maximizer": "grid"}, "reward_scale": {"env_id": "Pendulum-v1"}}
TRAINED = {}


def trained(module, **settings):
    """The checkpoint of a short run, after checking that it learned."""
    key = (module, *sorted(settings.items()))
    if key not in TRAINED:
        args = module.Args(**{**TINY, **settings})
        returns = module.train(args)
        assert returns.shape == (args.eval_episodes,) and returns.isfinite().all()
        (path,) = Path("runs").glob("*/checkpoint.pt")
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["args"] == vars(args)
        assert checkpoint["global_step"] >= args.total_timesteps
        assert int(checkpoint["buffer"]["count"]) == checkpoint["global_step"]
        networks = [name for name in ("q_network", "actor") if name in checkpoint]
        for name in networks:
            assert all(value.isfinite().all() for value in checkpoint[name].values())
            assert checkpoint[name].keys() == checkpoint[f"target_{TARGETS[name]}"].keys()
        if not settings.get("tabular"):
            steps = [state["step"] for state in checkpoint["optimizer"]["state"].values()]
            assert min(steps) == max(steps) >= 10
        TRAINED[key] = checkpoint
    return TRAINED[key]


TARGETS = {"q_network": "network", "actor": "actor"}


@pytest.mark.parametrize(
    ("module", "name", "value"), CASES, ids=[f"{m.__name__}-{n}-{v}" for m, n, v in CASES]
)
def test_every_option(module, name, value, tmp_path, monkeypatch):
    """No flag is dead: those that are not about the machine or the log change what is learned."""
    needs = NEEDS.get(name, {})
    value = 2 if name == "bins" else value  # 1 is refused
    default = trained(module, **needs)["q_network"]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    small = {"buffer_size": {"batch_size": 1}, "num_samples": {"num_elites": 1}}.get(name, {})
    other = trained(module, **{**needs, **small, name: value})["q_network"]
    if name not in INERT and value not in (getattr(module.Args(), name), TINY.get(name)):
        assert default.keys() != other.keys() or any(
            default[key].shape != other[key].shape or not torch.equal(default[key], other[key])
            for key in default
        )


def test_all_extensions_together():
    trained(dqn, double_q=True, dueling=True, prioritized_replay=True)


def test_as_a_user_starts_it(value_script, tmp_path):
    flags = ["--total-timesteps", 300, "--learning-starts", 100, "--eval-episodes", 2]
    result = run(value_script.__name__, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "greedy return" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "checkpoint.pt").exists() and not list(run_dir.glob("*.tmp"))


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name): the arguments and the result of every later call of owner.name."""

    def install(owner, name):
        calls, original = [], getattr(owner, name)

        def record(*args, **kwargs):
            calls.append((args, original(*args, **kwargs)))
            return calls[-1][1]

        monkeypatch.setattr(owner, name, record)
        return calls

    return install


@pytest.mark.parametrize("num_steps", [1, 3])
def test_train_acts_num_steps_and_then_updates(value_script, spy, num_steps, monkeypatch):
    acts, targets = spy(value_script, "select_actions"), spy(value_script, "td_target")
    monkeypatch.setattr(value_script, "evaluate", lambda *args: torch.zeros(3))
    value_script.train(value_script.Args(**TINY, num_steps=num_steps, num_updates=5))
    rounds = math.ceil(len(acts) / num_steps)
    warm_up = math.ceil(100 / (4 * num_steps)) - 1  # CartPole's episodes may end, and cost a reset
    assert len(acts) % num_steps == 0
    assert rounds - warm_up - 4 <= len(targets) / 5 <= rounds - warm_up


def test_train_decreases_the_step_size(value_script, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def record(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    value_script.train(value_script.Args(**TINY, learning_rate=0.01))
    assert 0.0075 <= rates[0] <= 0.01 and 0 < rates[-1] < 0.0005
    assert rates == sorted(rates, reverse=True)
    rates.clear()
    value_script.train(value_script.Args(**TINY, learning_rate=0.01, anneal_lr=False))
    assert set(rates) == {0.01}


def test_train_of_dqn_lets_epsilon_fall(spy):
    acts = spy(dqn, "select_actions")
    dqn.train(dqn.Args(**TINY, start_e=0.9, end_e=0.1, exploration_fraction=0.5))
    epsilons = [args[2] if len(args) > 2 else 0.0 for args, _ in acts]
    greedy = epsilons.index(0.0)  # from there on, the evaluation
    assert epsilons[0] == 0.9 and epsilons[greedy - 1] == 0.1
    falling = epsilons[: epsilons.index(0.1)]
    assert falling == sorted(falling, reverse=True)
    assert 0.4 <= len(falling) / greedy <= 0.6


def test_train_of_dqn_copies_the_target_network_now_and_then(spy):
    copies, targets = spy(dqn, "update_target"), spy(dqn, "td_target")
    dqn.train(dqn.Args(**TINY, target_network_frequency=60, num_updates=1))
    assert 400 // 60 - 100 // 60 - 1 <= len(copies) <= 400 // 60 - 100 // 60 + 1
    assert len(targets) > 5 * len(copies)


@pytest.mark.parametrize("module", CONTINUOUS)
def test_train_moves_the_target_networks_in_every_update(module, spy):
    copies, targets = spy(module, "update_target"), spy(module, "td_target")
    module.train(module.Args(**TINY, tau=0.3))
    networks = 2 if module is ddpg_continuous else 1
    assert len(copies) == networks * len(targets) and all(args[2] == 0.3 for args, _ in copies)


@pytest.mark.parametrize("module", CONTINUOUS)
def test_train_warms_up_with_uniform_actions(module, monkeypatch):
    buffer, _ = spy_on_the_buffer(module, monkeypatch, "Pendulum-v1", total_timesteps=3000,
                                  learning_starts=2900, exploration_noise=0.0)  # fmt: skip
    actions = buffer.actions[:2900]
    torch.testing.assert_close(actions.mean().item(), 0.0, atol=0.06, rtol=0)
    torch.testing.assert_close(actions.std().item(), 3**-0.5, atol=0.03, rtol=0)


def test_train_weighs_the_td_errors_of_prioritised_replay(spy, monkeypatch):
    samples = spy(dqn.PrioritizedReplayBuffer, "sample")
    updates = spy(dqn.PrioritizedReplayBuffer, "update_priorities")
    targets, losses, backward = spy(dqn, "td_target"), [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: losses.append(self.item()) or backward(self)
    )
    dqn.train(dqn.Args(**TINY, prioritized_replay=True, alpha=0.7, beta=0.3))
    betas = [args[2] for args, _ in samples]
    assert 0.3 < betas[0] < 0.6 and betas == sorted(betas) and 0.97 < betas[-1] <= 1
    for (_, (batch, rows, weights)), (update, _), (_, y), loss in zip(
        samples, updates, targets, losses
    ):
        _, updated, errors, alpha = update
        assert updated is rows and alpha == 0.7 and len(errors) == len(y) == len(batch.rewards)
        assert loss == pytest.approx(0.5 * (weights * errors**2).mean().item(), rel=1e-4)
        assert not errors.requires_grad


def test_train_of_ddpg_steps_the_actor_alone_on_the_actors_loss(monkeypatch):
    """Between the critic's step and the next zero_grad, the critic's gradient is the critic's."""
    made, loss = [], ddpg_continuous.actor_loss

    def record(actor, q_network, obs):
        made.append((q_network, [p.grad.clone() for p in q_network.parameters()]))
        return loss(actor, q_network, obs)

    monkeypatch.setattr(ddpg_continuous, "actor_loss", record)
    ddpg_continuous.train(ddpg_continuous.Args(**TINY))
    network, last = made[-1]
    assert all(torch.equal(p.grad, before) for p, before in zip(network.parameters(), last))


@pytest.mark.slow
def test_tabular_q_learning_finds_the_values_of_frozen_lake():
    """Q*(0) = .99^6, .99^5, .99^5, .99^6, by the README's command."""
    command = next(c for c in (ROOT / "README.md").read_text().splitlines() if "--tabular" in c)
    args = tyro.cli(dqn.Args, args=command.split("dqn.py")[1].split())
    args.wandb_mode, args.total_timesteps = "disabled", 20_000
    assert dqn.train(args).mean() == 1
    (path,) = Path("runs").glob("*/checkpoint.pt")
    table = torch.load(path, weights_only=True)["q_network"]["weight"].T
    expected = torch.tensor([0.99**6, 0.99**5, 0.99**5, 0.99**6])
    torch.testing.assert_close(table[0], expected, atol=1e-3, rtol=0)
