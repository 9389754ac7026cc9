"""The value-based scripts: each numbered equation by hand, the buffer, and runs from end to end."""

import math
from pathlib import Path

import envs  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import run
from torch import nn

import cem_q
import ddpg_continuous
import dqn
import naf

TINY = {"total_timesteps": 400, "num_envs": 4, "eval_episodes": 3, "learning_starts": 100}
TINY |= {"wandb_mode": "disabled", "batch_size": 16}
CONTINUOUS = [cem_q, naf, ddpg_continuous]


class Table(nn.Module):
    """Q of state i is row i; the observation is (i,)."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, obs):
        return self.rows[obs[..., 0].long()]


def test_equation_1_has_a_coin_for_each_env():
    torch.manual_seed(0)
    table, obs = Table([[0.0, 3.0, 1.0]]), torch.zeros(3000, 1)
    assert dqn.select_actions(table, obs, 0.0).eq(1).all()
    counts = dqn.select_actions(table, obs, 1.0).bincount(minlength=3) / 3000
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    best = dqn.select_actions(table, obs, 0.3).eq(1).float().mean().item()
    assert best == pytest.approx(0.8, abs=0.04)


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
    assert not plain.requires_grad


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


def buffer_of(kind, capacity):
    return kind(capacity, (1,), (), torch.int64, "cpu")


def rows(*values):
    x = torch.tensor(values)
    return x[:, None].float(), x, x.float(), x[:, None].float() + 1, x.float()


@pytest.mark.parametrize("kind", [dqn.ReplayBuffer, dqn.PrioritizedReplayBuffer])
def test_equation_3_the_ring_wraps(kind):
    buffer = buffer_of(kind, 5)
    assert buffer.add(*rows(0, 1, 2)).tolist() == [0, 1, 2]
    assert buffer.add(*rows(3, 4, 5)).tolist() == [3, 4, 0]
    assert buffer.rewards.tolist() == [5, 1, 2, 3, 4]
    assert buffer.next_obs[:, 0].tolist() == [6, 2, 3, 4, 5]
    buffer.add(*rows(*range(10, 22)))  # more than the capacity: the last five stay
    assert sorted(buffer.actions.tolist()) == [17, 18, 19, 20, 21]
    assert buffer.actions[int(buffer.count) % 5] == 17


def test_equation_3_samples_only_what_is_stored_and_all_of_it():
    torch.manual_seed(0)
    buffer = buffer_of(dqn.ReplayBuffer, 100)
    buffer.add(*rows(7, 8, 9))
    batch = buffer.sample(3000)
    counts = batch.actions.bincount(minlength=10)
    assert counts[:7].sum() == 0 and (counts[7:] > 900).all()
    torch.testing.assert_close(batch.next_obs[:, 0], batch.rewards + 1)
    again = buffer_of(dqn.ReplayBuffer, 100)
    again.load_state_dict(buffer.state_dict())
    assert again.rewards.equal(buffer.rewards) and again.count == 3


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


def test_equation_1_of_naf_and_cem_q_stay_in_the_box():
    actions = naf.select_actions(naf.NAFNetwork(3, 2), torch.randn(50, 3), 5.0)
    assert actions.shape == (50, 2) and actions.abs().max() == 1


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
    (gradient,) = torch.autograd.grad(naf.naf_q(mu, L, value, mu).sum(), network.mu.weight)
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
    "gradient": (cem_q.argmax_gradient, {"num_starts": 16, "iterations": 20}, 0.05),
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


@pytest.mark.parametrize("name", ["grid", "cem", "cmaes"])
def test_maximizers_prefer_the_higher_of_two_peaks(name):
    torch.manual_seed(0)
    search, settings, _ = SEARCHES[name]

    def q_function(actions):
        a = 2 * actions.squeeze(-1)
        low, high = (a + 1) / 0.2, (a - 1) / 0.2
        return (-0.5 * low**2).exp() + 1.5 * (-0.5 * high**2).exp()

    found = search(q_function, 200, 1, **settings)
    assert (found - 0.5).abs().lt(0.1).float().mean() > 0.7


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


OPTIONS = [
    (dqn, {"double_q": True}), (dqn, {"dueling": True}), (dqn, {"prioritized_replay": True}),
    (dqn, {"double_q": True, "dueling": True, "prioritized_replay": True}),
    (dqn, {"tabular": True, "learning_rate": 1e-3}), (dqn, {"anneal_lr": False}), (dqn, {}),
    (dqn, {"buffer_size": 1, "batch_size": 1, "num_envs": 1, "num_updates": 1}),
    (cem_q, {"maximizer": "grid"}), (cem_q, {"maximizer": "gradient"}), (cem_q, {}),
    (cem_q, {"maximizer": "cmaes"}), (naf, {}), (naf, {"anneal_lr": False}),
    (ddpg_continuous, {}), (ddpg_continuous, {"ou_theta": 0.15}),
    (ddpg_continuous, {"num_envs": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "settings"), OPTIONS)
def test_every_option_learns_and_its_checkpoint_loads(module, settings):
    args = module.Args(**{**TINY, **settings})
    returns = module.train(args)
    assert returns.shape == (3,) and returns.isfinite().all()
    (path,) = Path("runs").glob("*/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["args"] == vars(args) and checkpoint["global_step"] >= 400
    assert int(checkpoint["buffer"]["count"]) >= 400
    for name in ("q_network", "actor"):
        assert all(value.isfinite().all() for value in checkpoint.get(name, {}).values())
    if settings.get("tabular"):
        assert checkpoint["q_network"]["weight"].abs().max() > 0  # it was 0 at first
    else:
        assert checkpoint["optimizer"]["state"][0]["step"] > 50
    assert checkpoint["q_network"].keys() == checkpoint["target_network"].keys()


def final(module, monkeypatch, tmp_path, name, **settings):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    returns = module.train(module.Args(**{**TINY, **settings}))
    (path,) = Path("runs").glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)["q_network"], returns


def test_same_seed_same_run_bit_for_bit(value_script, monkeypatch, tmp_path):
    torch.manual_seed(7)
    one, returns = final(value_script, monkeypatch, tmp_path, "one", seed=5)
    torch.manual_seed(8)
    two, again = final(value_script, monkeypatch, tmp_path, "two", seed=5)
    other, _ = final(value_script, monkeypatch, tmp_path, "other", seed=6)
    assert torch.equal(returns, again)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_bad_input_is_one_message_and_exit_code_2(value_script, capsys, tmp_path):
    wrong = "Pendulum-v1" if value_script is dqn else "CartPole-v1"
    bad = {
        ("--env-id", wrong): wrong,
        ("--env-id", "envs:InfiniteBox-v0"): "InfiniteBox",
        ("--env-id", "envs:ImageObs-v0"): "1-D",
        ("--env-id", "NoSuchEnv-v0"): "NoSuchEnv",
        ("--batch-size", "999", "--buffer-size", "99"): "--buffer-size",
        ("--learning-starts", "9", "--total-timesteps", "9"): "--learning-starts",
        ("--tau", "1.5"): "--tau",
        ("--num-envs", "0"): "--num-envs",
    }
    if value_script is cem_q:
        bad["--maximizer", "grid", "--bins", "10001"] = "10000"
        bad["--num-elites", "99"] = "--num-samples"
    for flags, text in bad.items():
        with pytest.raises(SystemExit) as stop:
            tyro.cli(value_script.Args, args=list(flags))
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and text in out + err and "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_as_a_user_starts_it(value_script, tmp_path):
    flags = ["--total-timesteps", 300, "--learning-starts", 100, "--eval-episodes", 2]
    result = run(value_script.__name__, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "greedy return" in result.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "checkpoint.pt").exists() and not list(run_dir.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run(value_script, monkeypatch):
    target = value_script.td_target
    monkeypatch.setattr(value_script, "td_target", lambda *args: target(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="step"):
        value_script.train(value_script.Args(**TINY))


def test_one_table_and_plain_steps_are_classic_q_learning():
    """α = ½ on one-hot states: Q(s, a) moves half way to its target."""
    args = dqn.Args(**{**TINY, "tabular": True, "learning_rate": 0.5})
    assert args.tabular
    table = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(table.weight)
    optimizer = torch.optim.SGD(table.parameters(), 0.5)
    q = table(torch.eye(3)[1:2])[:, 0]
    (0.5 * (q - 8.0).square()).mean().backward()
    optimizer.step()
    expected = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(table.weight.detach(), expected)
