"""Every update of a short run of the value-based scripts, redone from the batches that it drew."""

from copy import deepcopy
from pathlib import Path

import envs  # noqa: F401
import pytest
import torch
from conftest import VALUE_MODULES

import cem_q
import ddpg_continuous
import dqn
import naf

TARGET = {"actor": "target_actor", "q_network": "target_network"}


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


CASES = [(dqn, {}), (dqn, {"double_q": True}), (dqn, {"dueling": True}), (naf, {})]
CASES += [(cem_q, {"maximizer": "grid", "bins": 5}), (ddpg_continuous, {})]


@pytest.mark.parametrize(("module", "own"), CASES)
def test_updates_by_hand(module, own, monkeypatch):
    made, batches, sample = [], [], module.ReplayBuffer.sample
    monkeypatch.setattr(module, "deepcopy", lambda x: made.append(deepcopy(x)) or deepcopy(x))
    monkeypatch.setattr(
        module.ReplayBuffer, "sample", lambda *x: batches.append(sample(*x)) or batches[-1]
    )
    settings = {"total_timesteps": 60, "learning_starts": 8, "num_envs": 4, "batch_size": 16}
    settings |= {"num_updates": 1, "tau": 0.3, "learning_rate": 1e-2, "anneal_lr": False}
    settings |= {"eval_episodes": 2, "wandb_mode": "disabled"} | own
    if module is dqn:
        settings["target_network_frequency"] = 1
    env_id = "Counting-v0" if module is dqn else "CountingBox-v0"
    args = module.Args(env_id=env_id, **settings)
    module.train(args)

    names = ["actor", "q_network"][-len(made) :]
    online, target = dict(zip(names, made)), dict(zip(names, deepcopy(made)))
    adams = {name: torch.optim.Adam(x.parameters(), 1e-2) for name, x in online.items()}
    scale, q_network = getattr(args, "reward_scale", 1.0), online["q_network"]
    for batch in batches:
        with torch.no_grad():
            max_q = target_q(module, batch, online, target, args)
            y = scale * batch.rewards + args.gamma * (1 - batch.terminations) * max_q
        losses = {"q_network": 0.5 * (predicted_q(module, batch, q_network) - y).square()}
        if "actor" in names:
            losses["actor"] = -q_network(batch.obs, online["actor"](batch.obs))
        for name in names:
            parameters = list(online[name].parameters())
            for p, g in zip(parameters, torch.autograd.grad(losses[name].mean(), parameters)):
                p.grad = g
        for name in names:
            adams[name].step()
            for old, new in zip(target[name].parameters(), online[name].parameters()):
                old.data = 0.3 * new.data + 0.7 * old.data
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    for name in names:
        for key, network in (name, online[name]), (TARGET[name], target[name]):
            for entry, value in network.state_dict().items():
                torch.testing.assert_close(saved[key][entry], value, rtol=1e-3, atol=1e-5)
    assert len(batches) > 5


@pytest.mark.parametrize("module", VALUE_MODULES)
def test_no_update_follows_a_step_that_only_resets(module, monkeypatch):
    """One env: its episodes of 1 to 6 steps cost a reset each, and no update then."""
    updates, target = [], module.td_target
    monkeypatch.setattr(module, "td_target", lambda *x: updates.append(1) or target(*x))
    env_id = "Counting-v0" if module is dqn else "CountingBox-v0"
    settings = {"num_envs": 1, "total_timesteps": 60, "learning_starts": 10, "batch_size": 4}
    settings |= {"num_updates": 1, "eval_episodes": 1, "wandb_mode": "disabled"}
    module.train(module.Args(env_id=env_id, **settings))
    assert len(updates) == 51
