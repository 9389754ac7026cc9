"""Tests of naf.py: a Q whose max is known. What its `train` does is in test_value_based.py."""

import math

import numpy as np
import pytest
import torch
from problems import bimodal, close, continuous_batch, lqr_batch, scalar_lqr
from torch import nn

import naf

# Equations by hand


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


def test_naf_target_scales_rewards_alone():
    network, batch = naf.NAFNetwork(3, 2), continuous_batch(naf)
    value = network(batch.next_obs)[2].detach()
    expected = torch.tensor([0 + 0.9 * value[0], 0.1, 0.2 + 0.9 * value[2], 0.3])
    torch.testing.assert_close(naf.td_target(batch, network, 0.9, 0.1), expected)


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
    torch.testing.assert_close(diagonal.min().item(), math.exp(-2))
    torch.testing.assert_close(diagonal.max().item(), math.exp(2))


# Exact oracles


@pytest.mark.parametrize(
    ("gamma", "P", "K", "P_naf"),
    [(1, 1.618034, 0.618034, 5.236068), (0.99, 1.615251, 0.615251, 5.198197),
     (0.9, 1.588403, 0.588403, 4.859126), (0.5, 1.414214, 0.414214, 3.414214)],
)  # fmt: skip
def test_the_scalar_lqr_has_the_golden_ratio(gamma, P, K, P_naf):
    """P and K of the Riccati equation, and NAF's P. Without a discount, P is the golden ratio."""
    lqr = scalar_lqr(gamma)
    close([lqr.P.item(), lqr.K.item(), 2 * lqr.H.item()], [P, K, P_naf], atol=1e-6)


class Quadratic(nn.Module):
    """μ = -K x, L and V = -xᵀ S x as parameters, in NAF's place."""

    def __init__(self, K, L, S):
        super().__init__()
        self.K, self.L, self.S = (nn.Parameter(x.clone()) for x in (K, L, S))

    def forward(self, x):
        value = -(x @ self.S * x).sum(dim=-1)
        return -x @ self.K.mT, self.L.tril().expand(len(x), -1, -1), value


def test_naf_is_exact_for_the_lqr(lqr):
    """With Riccati's K, L Lᵀ = 2 H and V = -xᵀ P x, (2) is Q*: its TD error is 0."""
    network = Quadratic(lqr.K, torch.linalg.cholesky(2 * lqr.H), lqr.P)
    batch = lqr_batch(naf, lqr)
    q = naf.naf_q(*network(batch.obs), batch.actions)
    close(q, lqr.q(batch.obs, batch.actions))
    close(naf.td_target(batch, network, lqr.gamma, 1.0), q)


def test_naf_learns_the_lqr_from_random_actions(lqr):
    torch.manual_seed(1)
    n, m = len(lqr.A), lqr.B.shape[1]
    eye = torch.eye(m, dtype=torch.float64)
    network = Quadratic(torch.zeros(m, n).double(), eye, torch.eye(n, dtype=torch.float64))
    batch, adam = lqr_batch(naf, lqr), torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(1500):
        error = naf.naf_q(*network(batch.obs), batch.actions)
        error = error - naf.td_target(batch, network, lqr.gamma, 1.0)
        adam.zero_grad()
        error.square().mean().backward()
        adam.step()
    close(network.K.detach(), lqr.K, atol=1e-2)


def test_equation_2_of_naf_cannot_have_two_peaks():
    """The quadratic nearest to that Q has its top at 0.36 in [-2, 2], of value 0.0095, not 1.5."""
    a = torch.linspace(-1, 1, 4001).double()
    curvature, slope, constant = np.polyfit(a.numpy(), bimodal(a).numpy(), 2)
    assert curvature < 0
    mu = torch.tensor([-slope / (2 * curvature)]).double()
    L = torch.tensor([[(-2 * curvature) ** 0.5]]).double()
    value = torch.tensor(constant - slope**2 / (4 * curvature)).double()
    fitted = naf.naf_q(mu, L, value, a[:, None])
    close(fitted, np.polyval([curvature, slope, constant], a.numpy()))
    assert fitted.argmax() == (a - mu).abs().argmin()
    close(2 * mu, [0.36], atol=0.01)
    close(bimodal(mu), [0.0095], atol=2e-3)
