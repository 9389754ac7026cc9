"""Tests of ddpg_continuous.py: its noise, its critic and its actor."""

from copy import deepcopy

import pytest
import torch
from conftest import VALUE_TINY
from problems import close, continuous_batch, lqr_batch, policy_cost, scalar_lqr, states
from torch import nn

import ddpg_continuous

# Equations by hand


def test_ddpg_noise():
    actor, obs = ddpg_continuous.Actor(3, 2), torch.randn(50, 3)
    noisy = ddpg_continuous.select_actions(actor, obs, torch.tensor([0.4, -0.3]).expand(50, -1))
    torch.testing.assert_close(noisy, (actor(obs) + torch.tensor([0.4, -0.3])).clamp(-1, 1))


def test_ddpg_target_and_actor_gradient_by_hand():
    actor, critic = ddpg_continuous.Actor(3, 2), ddpg_continuous.QNetwork(3, 2)
    batch = continuous_batch(ddpg_continuous)
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


# Exact oracles


class LinearActor(nn.Module):
    """u = -K x."""

    def __init__(self, K):
        super().__init__()
        self.K = nn.Parameter(torch.as_tensor(K, dtype=torch.float64))

    def forward(self, x):
        return -x @ self.K.mT


@pytest.mark.parametrize(
    ("k", "J", "gradient"), [(0.3, -1.949911, 3.321802), (0.8, -1.701245, -1.024431)]
)
def test_ddpg_is_the_deterministic_policy_gradient(k, J, gradient):
    """Of u = -k x: dJ/dk is the critic's slope at the discounted second moment of the states."""
    lqr, actor = scalar_lqr(), LinearActor([[k]])
    P = torch.tensor([[(1 + k * k) / (1 - 0.9 * (1 - k) ** 2)]]).double()
    batch = lqr_batch(ddpg_continuous, lqr)
    critic = lambda x, u: lqr.q(x, u, P)  # noqa: E731
    y = ddpg_continuous.td_target(batch, actor, critic, 0.9)
    close(y, critic(batch.obs, batch.actions))  # Q of the policy: TD error 0
    close(-P.item(), J, rtol=1e-6)
    x = torch.tensor([[(1 / (1 - 0.9 * (1 - k) ** 2)) ** 0.5]]).double()
    (ours,) = torch.autograd.grad(-ddpg_continuous.actor_loss(actor, critic, x), actor.K)
    close(ours, [[gradient]], rtol=1e-6)


def test_ddpg_learns_the_lqr_by_policy_iteration(lqr):
    """A step of evaluation, as (4), and one of (7) towards the top of Q: K is Riccati's."""
    actor = LinearActor(torch.zeros_like(lqr.K))
    x, P = states(lqr), torch.eye(len(lqr.A), dtype=torch.float64)
    adam = torch.optim.Adam(actor.parameters(), 0.02)
    for _ in range(600):
        P = policy_cost(lqr, actor.K.detach(), P)
        loss = ddpg_continuous.actor_loss(actor, lambda x, u, P=P: lqr.q(x, u, P), x)
        adam.zero_grad()
        loss.backward()
        adam.step()
    close(actor.K.detach(), lqr.K, atol=1e-2)


# What `train` does


def test_train_of_ddpg_steps_the_critic_alone_and_then_the_actor_alone(spy, monkeypatch):
    made = {name: spy(ddpg_continuous, name) for name in ("QNetwork", "Actor")}
    moved, step = [], torch.optim.Adam.step

    def parameters():
        return {name: deepcopy(calls[0].result.state_dict()) for name, calls in made.items()}

    def record(self):
        before = parameters()
        step(self)
        after = parameters()
        for name in made:
            if any(not torch.equal(before[name][key], after[name][key]) for key in before[name]):
                moved.append(name)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    ddpg_continuous.train(ddpg_continuous.Args(**VALUE_TINY))
    assert len(moved) > 20 and moved == ["QNetwork", "Actor"] * (len(moved) // 2)
