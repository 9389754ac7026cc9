"""Tests of what dqn.py, cem_q.py, naf.py and ddpg_continuous.py share."""

import math
from copy import deepcopy
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import VALUE_TINY
from envs import Endless, counting
from problems import continuous_batch
from torch import nn

import cem_q
import ddpg_continuous
import dqn
import naf

CONTINUOUS = [cem_q, naf, ddpg_continuous]
TARGET = {"actor": "target_actor", "q_network": "target_network"}


# Equations by hand


@pytest.mark.parametrize("module", CONTINUOUS)
def test_equation_1_adds_noise_to_the_best_action_and_stays_in_the_box(module):
    torch.manual_seed(0)
    obs = torch.randn(2000, 3)
    unit = torch.randn(2000, 2)
    if module is naf:
        network, search = naf.NAFNetwork(3, 2), []
        best = network(obs)[0]
    elif module is cem_q:
        network, search = cem_q.QNetwork(3, 2), [partial(cem_q.argmax_grid, d=2, bins=5)]
        best = cem_q.argmax_action(network, obs, *search)
    else:
        network, search = ddpg_continuous.Actor(3, 2), []
        best = network(obs)
    for sigma in (0.0, 0.01, 5.0):
        actions = module.select_actions(network, obs, *search, sigma * unit)
        torch.testing.assert_close(actions, (best + sigma * unit).clamp(-1, 1))


@pytest.mark.parametrize("module", CONTINUOUS)
def test_ou_noise_forgets_and_is_driven(module):
    torch.manual_seed(0)
    noise = torch.full((20_000, 2), 10.0)
    nearer = module.ou_noise(noise, 0.25, 0.5)
    assert nearer.mean().item() == pytest.approx(7.5, abs=0.02)
    assert nearer.std().item() == pytest.approx(0.5, abs=0.02)
    white = module.ou_noise(noise, 1.0, 0.5)
    assert white.mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.corrcoef(white.T)[0, 1].abs() < 0.03


@pytest.mark.parametrize("module", [dqn, *CONTINUOUS])
def test_the_memory_that_is_asked_for_is_that_of_the_buffer(module, monkeypatch):
    """A transition of as many bytes as GB in the message, for 10⁹ of them."""
    discrete = module is dqn
    obs_shape, action_shape = ((4,), ()) if discrete else ((3,), (1,))
    dtype = torch.int64 if discrete else torch.float32
    row = module.ReplayBuffer(1, obs_shape, action_shape, dtype, "cpu")
    size = sum(x.nbytes for name, x in row.named_buffers() if name != "count")
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1)
    with pytest.raises(gym.error.Error, match=rf"does not hold {size} GB"):
        module.train(module.Args(**VALUE_TINY, buffer_size=10**9))


def test_equation_6_update_target(value_script):
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.clone()
    value_script.update_target(target, online, 0.25)
    torch.testing.assert_close(target.weight, 0.25 * online.weight + 0.75 * before)
    value_script.update_target(target, online, 1.0)
    assert torch.equal(target.bias, online.bias)


SEARCHES = {
    "grid": lambda q, size: cem_q.argmax_grid(q, size, 2, 5),
    "gradient": lambda q, size: cem_q.argmax_gradient(q, size, 2, 8, 5),
    "cem": lambda q, size: cem_q.argmax_cem(q, size, 2, 32, 4, 2),
    "cmaes": lambda q, size: cem_q.argmax_cmaes(q, size, 2, 16, 10),
}


def target_of(kind):
    """td_target of a batch by new networks of a script, for γ = 0.9."""
    torch.manual_seed(0)
    if kind == "naf":
        network = naf.NAFNetwork(3, 2)
        return lambda batch: naf.td_target(batch, network, 0.9, 1.0)
    if kind == "ddpg_continuous":
        actor, network = ddpg_continuous.Actor(3, 2), ddpg_continuous.QNetwork(3, 2)
        return lambda batch: ddpg_continuous.td_target(batch, actor, network, 0.9)
    if kind in SEARCHES:
        network = cem_q.QNetwork(3, 2)

        def target(batch):
            torch.manual_seed(1)
            actions = cem_q.argmax_action(network, batch.next_obs, SEARCHES[kind])
            return cem_q.td_target(batch, actions, network, 0.9)

        return target
    networks = [dqn.QNetwork(3, 2, dueling=kind == "dueling") for _ in range(2)]
    return lambda batch: dqn.td_target(batch, *networks, 0.9, kind == "double_q")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "kind", ["dqn", "double_q", "dueling", "naf", "ddpg_continuous", *SEARCHES]
)
def test_equation_4_is_the_reward_where_a_last_state_is_not_finite(kind, value):
    """td_target of four transitions, of which the second and the last end their episodes."""
    torch.manual_seed(0)
    batch, td_target = continuous_batch(dqn), target_of(kind)
    expected = td_target(batch)
    assert not expected[[0, 2]].eq(batch.rewards[[0, 2]]).any()
    for entries in (slice(None), 0):  # all or one of the numbers of a state
        next_obs = batch.next_obs.clone()
        next_obs[1::2, entries] = value
        y = td_target(batch._replace(next_obs=next_obs))
        assert y[1::2].tolist() == [1, 3]
        torch.testing.assert_close(y[::2], expected[::2])


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


def test_evaluations_start_from_seed_1(value_script):
    """So that the evaluations of all versions of a script can be compared."""
    seen, vector_env = [], value_script.make_envs(counting(value_script), 16)
    expected, _ = vector_env.reset(seed=1)

    def policy(obs):
        seen.append(obs)
        return torch.zeros(16, dtype=torch.int64) if value_script is dqn else obs * 0

    value_script.evaluate(policy, vector_env, "cpu")
    assert torch.equal(seen[0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["Counting", "Truncating"])
def test_evaluate_counts_the_first_episode_of_each_env(value_script, kind):
    """Σ_t 100 t + action, whatever comes after the end."""
    lengths = []

    def policy(obs):
        lengths.append(obs[:, 0])
        assert len(lengths) <= 6  # the longest
        return torch.zeros(len(obs), dtype=torch.int64) if value_script is dqn else obs * 0

    vector_env = value_script.make_envs(counting(value_script, kind), 9)
    returns = value_script.evaluate(policy, vector_env, "cpu")
    action = 1 if value_script is dqn else 6
    expected = lengths[0] * (50 * (lengths[0] - 1) + action)
    torch.testing.assert_close(returns, expected.double())
    assert len(lengths[0].unique()) > 2 and vector_env.unwrapped.closed


def test_evaluate_starts_alike_in_every_run(value_script):
    starts = []

    def policy(obs):
        starts.append(obs)
        return torch.zeros(len(obs), dtype=torch.int64) if value_script is dqn else obs * 0

    for seed in (3, 4):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        vector_env = value_script.make_envs(f"OneStep{'' if value_script is dqn else 'Box'}-v0", 9)
        value_script.evaluate(policy, vector_env, "cpu")
        assert torch.equal(state, torch.get_rng_state())
    assert len(starts) == 2 and torch.equal(*starts) and len(starts[0].unique()) == 9


def test_an_evaluation_without_end_is_an_error_that_says_what_to_do(value_script):
    """And an episode of 20,000 steps is none."""
    policy = lambda obs: torch.zeros(1, dtype=torch.int64)  # noqa: E731
    assert value_script.evaluate(policy, Endless(20_000), "cpu").item() == 20_000
    with pytest.raises(gym.error.Error, match="--env-kwargs .*max_episode_steps"):
        value_script.evaluate(policy, Endless(), "cpu")


# What `train` does


def target_q(module, batch, online, target, args):
    """The max of (4), or double-Q's, without the scripts' functions."""
    q_network = target["q_network"]
    if module is dqn:
        best = (online if args.double_q else target)["q_network"](batch.next_obs).argmax(dim=-1)
        return q_network(batch.next_obs)[range(len(best)), best]
    if module is naf:
        return q_network(batch.next_obs)[2]
    if module is ddpg_continuous:
        return q_network(batch.next_obs, target["actor"](batch.next_obs))
    axis = torch.linspace(-1, 1, args.bins)
    grid = torch.cartesian_prod(*[axis] * batch.actions.shape[1])
    values = [q_network(batch.next_obs, action.expand_as(batch.actions)) for action in grid]
    return torch.stack(values).max(dim=0).values


def predicted_q(module, batch, q_network):
    if module is dqn:
        return q_network(batch.obs)[range(len(batch.actions)), batch.actions]
    if module is naf:
        mu, L, value = q_network(batch.obs)
        return value - 0.5 * ((batch.actions - mu)[:, None] @ L).square().sum(dim=(1, 2))
    return q_network(batch.obs, batch.actions)


def step(adam, losses):
    """One along the gradient of the mean, of the optimizer's own parameters."""
    parameters = adam.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(losses.mean(), parameters)):
        p.grad = gradient
    adam.step()


UPDATES = [(dqn, {}), (dqn, {"double_q": True}), (dqn, {"dueling": True}), (naf, {})]
UPDATES += [(cem_q, {"maximizer": "grid", "bins": 5}), (ddpg_continuous, {})]


@pytest.mark.parametrize(("module", "own"), UPDATES)
def test_updates_by_hand(module, own, spy, monkeypatch):
    """Every update of a short run, redone from the batches that it drew."""
    made, samples = [], spy(module.ReplayBuffer, "sample")

    def record(network):
        made.append(deepcopy(network))
        return deepcopy(network)

    monkeypatch.setattr(module, "deepcopy", record)
    settings = {"total_timesteps": 60, "learning_starts": 8, "num_envs": 4, "batch_size": 16}
    settings |= {"num_updates": 1, "tau": 0.3, "learning_rate": 1e-2, "anneal_lr": False}
    settings |= {"eval_episodes": 2, "wandb_mode": "disabled"} | own
    if module is dqn:
        settings["target_network_frequency"] = 1
    args = module.Args(env_id=counting(module), **settings)
    module.train(args)

    names = ["actor", "q_network"][-len(made) :]
    online, target = dict(zip(names, made)), dict(zip(names, deepcopy(made)))
    eps = 1e-3 if module is dqn else 1e-8
    adams = {name: torch.optim.Adam(x.parameters(), 1e-2, eps=eps) for name, x in online.items()}
    scale, q_network = getattr(args, "reward_scale", 1.0), online["q_network"]
    for sample in samples:
        batch = sample.result
        with torch.no_grad():
            max_q = target_q(module, batch, online, target, args)
            y = scale * batch.rewards + args.gamma * (1 - batch.terminations) * max_q
        step(adams["q_network"], 0.5 * (predicted_q(module, batch, q_network) - y).square())
        if "actor" in names:  # which climbs the new critic
            step(adams["actor"], -q_network(batch.obs, online["actor"](batch.obs)))
        for name in names:
            for old, new in zip(target[name].parameters(), online[name].parameters()):
                old.data = 0.3 * new.data + 0.7 * old.data
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    for name in names:
        for key, network in (name, online[name]), (TARGET[name], target[name]):
            for entry, value in network.state_dict().items():
                torch.testing.assert_close(saved[key][entry], value, rtol=1e-3, atol=1e-5)
    assert len(samples) > 5


def test_no_gradient_flows_into_equation_4(value_script, spy):
    targets = spy(value_script, "td_target")
    value_script.train(value_script.Args(**VALUE_TINY))
    assert len(targets) > 10 and not any(call.result.requires_grad for call in targets)


def kappa(module):
    """The setting; its names keep DDPG's checkpoints from the other two scripts."""
    return "ou_theta" if module is ddpg_continuous else "ou_kappa"


@pytest.mark.parametrize("module", CONTINUOUS)
def test_train_starts_each_episode_with_new_noise(module, spy):
    steps = spy(module, "ou_noise")
    own = {"env_id": counting(module), kappa(module): 0.2, "exploration_noise": 0.3}
    module.train(module.Args(**VALUE_TINY, **own))
    kept = reset = 0
    for before, step in zip(steps, steps[1:]):
        noise, *settings = step.args
        assert settings == [0.2, 0.3]
        same = (noise == before.result).all(dim=1)
        assert noise[~same].eq(0).all()
        kept += int(same.sum())
        reset += int((~same).sum())
    assert kept > reset > 50


@pytest.mark.parametrize("module", CONTINUOUS)
@pytest.mark.parametrize("theta", [0.03, 0.15, 1.0])
def test_the_first_noise_of_every_episode_has_the_variance_of_one_step(module, spy, theta):
    """σ²; that of the second is σ² (1 + (1 - κ)²). The observation is (length, t)."""
    acts = spy(module, "select_actions")
    own = {"env_id": counting(module), kappa(module): theta, "exploration_noise": 0.3}
    own |= {"total_timesteps": 6000, "learning_starts": 5999, "num_envs": 16}
    module.train(module.Args(**VALUE_TINY | own))
    acts = [call.args for call in acts[8:] if len(call.args) > 2]  # of training
    obs, noise = (torch.cat([act[i] for act in acts]) for i in (1, -1))
    for t, variance in {0: 1.0, 1: 1 + (1 - theta) ** 2}.items():
        found = noise[(obs[:, 1] == t) & (obs[:, 0] > t)].var().item()
        assert found == pytest.approx(0.3**2 * variance, rel=0.12), t


@pytest.mark.parametrize("num_steps", [1, 3])
def test_train_acts_num_steps_and_then_updates(value_script, spy, num_steps, monkeypatch):
    acts, targets = spy(value_script, "select_actions"), spy(value_script, "td_target")
    monkeypatch.setattr(value_script, "evaluate", lambda policy, envs, device: torch.zeros(3))
    value_script.train(value_script.Args(**VALUE_TINY, num_steps=num_steps, num_updates=5))
    rounds = math.ceil(len(acts) / num_steps)
    warm_up = math.ceil(100 / (4 * num_steps)) - 1  # CartPole's episodes may end, and cost a reset
    assert len(acts) % num_steps == 0
    assert rounds - warm_up - 4 <= len(targets) / 5 <= rounds - warm_up


def test_no_update_follows_a_step_that_only_resets(value_script, spy):
    """One env: its episodes of 1 to 6 steps cost a reset each, and no update then."""
    updates = spy(value_script, "td_target")
    settings = {"num_envs": 1, "total_timesteps": 60, "learning_starts": 10, "batch_size": 4}
    settings |= {"num_updates": 1, "eval_episodes": 1, "wandb_mode": "disabled"}
    value_script.train(value_script.Args(env_id=counting(value_script), **settings))
    assert len(updates) == 51


def test_train_acts_and_is_scored_with_the_online_network(value_script, spy):
    acts, evaluations = spy(value_script, "select_actions"), spy(value_script, "evaluate")
    rarely = {"target_network_frequency": 300} if value_script is dqn else {}
    value_script.train(value_script.Args(**VALUE_TINY, **rarely, tau=1.0))
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    saved = saved["actor" if value_script is ddpg_continuous else "q_network"]
    network = acts[50].args[0]
    for key, value in network.state_dict().items():
        assert torch.equal(value, saved[key])
    policy = evaluations[0].args[0]
    state = torch.randn(5, 4 if value_script is dqn else 3)
    with torch.no_grad():
        torch.manual_seed(1)
        ours = policy(state)
        torch.manual_seed(1)
        expected = {
            dqn: lambda: network(state).argmax(dim=-1),
            naf: lambda: network(state)[0],
            ddpg_continuous: lambda: network(state),
            cem_q: lambda: cem_q.argmax_cem(
                lambda a: network(state[:, None].expand(-1, a.shape[1], -1), a), 5, 1, 32, 4, 2
            ),
        }[value_script]()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("module", CONTINUOUS)
def test_train_moves_the_target_networks_in_every_update(module, spy):
    copies, targets = spy(module, "update_target"), spy(module, "td_target")
    module.train(module.Args(**VALUE_TINY, tau=0.3))
    networks = 2 if module is ddpg_continuous else 1
    assert len(copies) == networks * len(targets)
    assert all(call.args[2] == 0.3 for call in copies)


@pytest.mark.parametrize("module", CONTINUOUS)
def test_train_warms_up_with_uniform_actions(module, filled_buffer):
    settings = {"total_timesteps": 3000, "learning_starts": 2900, "exploration_noise": 0.0}
    actions = filled_buffer(module, "Pendulum-v1", **settings).actions[:2900]
    torch.testing.assert_close(actions.mean().item(), 0.0, atol=0.06, rtol=0)
    torch.testing.assert_close(actions.std().item(), 3**-0.5, atol=0.03, rtol=0)


def test_train_decreases_the_step_size(value_script, learning_rates):
    value_script.train(value_script.Args(**VALUE_TINY, learning_rate=0.01))
    assert 0.0075 <= learning_rates[0] <= 0.01 and 0 < learning_rates[-1] < 0.0005
    assert learning_rates == sorted(learning_rates, reverse=True)
    learning_rates.clear()
    value_script.train(value_script.Args(**VALUE_TINY, learning_rate=0.01, anneal_lr=False))
    assert set(learning_rates) == {0.01}


def test_metrics_that_are_logged(value_script, logged):
    """About every 500 steps; nothing of episodes or updates before the first of them."""
    settings = {**VALUE_TINY, "total_timesteps": 2100, "learning_starts": 600, "num_updates": 1}
    settings["env_id"] = f"Endless{'' if value_script is dqn else 'Box'}-v0"
    settings["env_kwargs"] = '{"max_episode_steps": 200}'
    returns = value_script.train(value_script.Args(**settings))
    own = {
        dqn: set(),
        cem_q: {"time/maximizing"},
        naf: set(),
        ddpg_continuous: {"losses/actor_loss"},
    }[value_script]
    steps = [row["global_step"] for row in logged[:-1]]
    for step, row in zip(steps, logged):
        expected = {"charts/SPS", "global_step"}
        if value_script is dqn:
            expected |= {"charts/epsilon"}
        if step > 800:  # four episodes of 200 steps
            expected |= {"charts/episodic_return", "charts/episodic_length"}
        if step > 600:
            expected |= {"losses/td_loss", "losses/q_values"} | own
        assert row.keys() == expected and all(map(math.isfinite, row.values()))
    if value_script is cem_q:  # seconds so far
        seconds = [row["time/maximizing"] for row in logged[1:-1]]
        assert seconds[0] > 0 and seconds == sorted(set(seconds))
    assert [step // 500 for step in steps] == [1, 2, 3, 4, 4] and steps[-1] >= 2100
    greedy_return = pytest.approx(returns.mean().item())
    assert logged[-1] == {"eval/episodic_return": greedy_return, "global_step": steps[-1]}


def test_the_logged_return_is_that_of_whole_episodes(value_script, logged, filled_buffer):
    """In an episode of length n the rewards add up to 50 n (n - 1), and the actions."""
    buffer = filled_buffer(value_script, counting(value_script))
    ended = buffer.terminations[: int(buffer.count)] > 0
    lengths = buffer.obs[: len(ended), 0][ended][-20:]
    row = logged[-2]
    assert row["charts/episodic_length"] == pytest.approx(lengths.mean().item())
    actions = row["charts/episodic_return"] - (50 * lengths * (lengths - 1)).mean().item()
    low, high = (1, 2) if value_script is dqn else (-1, 13)
    assert low <= actions / lengths.mean().item() <= high
