"""Tests of cem_q.py: its four searches for the max, and what it does with them."""

import math
from pathlib import Path

import cma
import numpy as np
import pytest
import torch
from conftest import VALUE_TINY
from problems import bimodal, close, continuous_batch, lqr_batch

import cem_q

# each search, its settings, and how far from the top it may end
SEARCHES = {
    "grid": (cem_q.argmax_grid, {"bins": 41}, 0.026),
    "gradient": (cem_q.argmax_gradient, {"num_samples": 16, "iterations": 20}, 0.05),
    "cem": (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 4}, 0.08),
    "cmaes": (cem_q.argmax_cmaes, {"num_samples": 16, "iterations": 10}, 0.08),
}


def recorded(q_function):
    """q_function, and the list of all actions that it is asked about."""
    asked = []

    def record(actions):
        asked.append(actions)
        return q_function(actions)

    return record, asked


def peak(actions):
    """Q with its top at 0."""
    return -actions.square().sum(dim=-1)


# Equations by hand


def test_equation_2_argmax_action_pairs_each_observation_with_its_own_action():
    """Q = -(a - s)²: the best action is the state."""
    obs = torch.linspace(-0.8, 0.8, 5)[:, None]
    q_network = lambda obs, actions: -(obs - actions).square().sum(dim=-1)  # noqa: E731
    search = lambda q_function, size: cem_q.argmax_grid(q_function, size, 1, 11)  # noqa: E731
    torch.testing.assert_close(cem_q.argmax_action(q_network, obs, search), obs, atol=0.11, rtol=0)


def test_equation_4_of_cem_q():
    network, batch = cem_q.QNetwork(3, 2), continuous_batch(cem_q)
    next_actions = torch.rand(4, 2)
    q = network(batch.next_obs, next_actions).detach()
    expected = torch.tensor([0 + 0.9 * q[0], 1.0, 2 + 0.9 * q[2], 3.0])
    torch.testing.assert_close(cem_q.td_target(batch, next_actions, network, 0.9), expected)


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
    def q_function(actions):
        return -(actions - torch.tensor([0.5, 0.0])).square() @ torch.tensor([1.0, 100.0])

    torch.manual_seed(0)
    f, drawn = recorded(q_function)
    cem_q.argmax_cem(f, 3, 2, num_samples=5000, num_elites=50, iterations=2, min_std=0.01)
    for first, second in zip(*drawn):
        elites = first[q_function(first[None])[0].topk(50).indices]
        torch.testing.assert_close(second.mean(dim=0), elites.mean(dim=0), atol=0.02, rtol=0)
        torch.testing.assert_close(second.std(dim=0), elites.std(dim=0), atol=0.02, rtol=0)
    f, drawn = recorded(peak)
    cem_q.argmax_cem(f, 1, 1, num_samples=5000, num_elites=2, iterations=3, min_std=0.3)
    assert drawn[-1].std().item() == pytest.approx(0.3, rel=0.05)


def test_equation_9_has_the_deviation_of_the_elites_without_a_correction():
    """Of two elites of argmax_cem it is half of their distance."""
    f, drawn = recorded(peak)
    torch.manual_seed(0)
    cem_q.argmax_cem(f, 1, 1, num_samples=5000, num_elites=2, iterations=2, min_std=0)
    elites = drawn[0][0][drawn[0][0, :, 0].abs().argsort()[:2]]
    half = (elites[0] - elites[1]).abs().item() / 2
    assert drawn[1].std().item() == pytest.approx(half, rel=0.05)


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


# Any search


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
    corners = search(q_function, 20, action_dim, **settings)
    assert corners.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", SEARCHES)
def test_maximizers_prefer_the_higher_of_two_peaks(name):
    torch.manual_seed(0)
    search, settings, _ = SEARCHES[name]
    found = search(lambda a: bimodal(a.squeeze(-1)), 200, 1, **settings)
    assert (found - 0.5).abs().lt(0.1).float().mean() > 0.7


@pytest.mark.parametrize(
    ("search", "settings", "sizes"),
    [(cem_q.argmax_grid, [21], [21]), (cem_q.argmax_gradient, [8, 5], [8] * 6),
     (cem_q.argmax_cem, [32, 4, 2], [32] * 2), (cem_q.argmax_cmaes, [16, 10], [16] * 10)],
)  # fmt: skip
def test_what_a_search_asks_for(search, settings, sizes):
    """Points in each call of q_function; the last call of gradient compares its ends."""
    f, asked = recorded(peak)
    search(f, 2, 1, *settings)
    assert [actions.shape[1] for actions in asked] == sizes


def test_the_deviation_of_a_search_does_not_collapse():
    for search, settings in (cem_q.argmax_cem, {"num_elites": 4}), (cem_q.argmax_cmaes, {}):
        f, drawn = recorded(peak)
        torch.manual_seed(0)
        search(f, 500, 1, **settings, num_samples=32, iterations=40)
        assert drawn[-1].std(dim=1).mean().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(("num_samples", "iterations"), [(16, 200), (16, 1000), (64, 200)])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_many_iterations_of_cmaes_stay_at_the_top(d, num_samples, iterations):
    """In a corner, where the deviations would shrink for ever, and inside the box."""
    torch.manual_seed(0)
    corner = cem_q.argmax_cmaes(lambda a: a.sum(dim=-1), 5, d, num_samples, iterations)
    assert corner.min() >= 0.95 and corner.max() <= 1
    inside = cem_q.argmax_cmaes(lambda a: peak(a - 0.37), 5, d, num_samples, iterations)
    assert (inside - 0.37).abs().max() < 0.15


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_no_graph(name):
    """Only `gradient` needs one; and argmax_action keeps none around any search."""
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


# Exact oracles


# the same, more thorough
LONG_SEARCHES = {
    "grid": (cem_q.argmax_grid, {"bins": 101}, 0.011),
    "gradient": (cem_q.argmax_gradient, {"num_samples": 64, "iterations": 60}, 0.05),
    "cem": (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 8}, 0.03),
    "cmaes": (cem_q.argmax_cmaes, {"num_samples": 16, "iterations": 30}, 0.03),
}


@pytest.mark.parametrize("name", LONG_SEARCHES)
def test_every_search_finds_the_action_of_the_lqr(lqr, name):
    """And with it (4) is Q*, up to the square of what the search misses by."""
    torch.manual_seed(0)
    search, settings, tolerance = LONG_SEARCHES[name]
    m = lqr.B.shape[1]
    q_network = lambda x, u: lqr.q(x.double(), u.double())  # noqa: E731
    batch = lqr_batch(cem_q, lqr)
    batch = batch._replace(next_obs=0.4 * batch.next_obs / batch.next_obs.norm(dim=1, keepdim=True))
    best = -batch.next_obs @ lqr.K.mT
    assert best.abs().max() < 1  # in the box
    find = lambda q, B: search(q, B, m, **settings)  # noqa: E731
    actions = cem_q.argmax_action(q_network, batch.next_obs, find)
    assert (actions - best).square().mean().sqrt() < tolerance
    y = cem_q.td_target(batch, actions, q_network, lqr.gamma)
    value = -(batch.next_obs @ lqr.P * batch.next_obs).sum(dim=-1)
    close(y, batch.rewards + lqr.gamma * value, atol=0.02)


@pytest.mark.parametrize(
    ("search", "settings", "rate"),
    [
        (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 2}, 0.79),
        (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 3}, 0.94),
        (cem_q.argmax_cem, {"num_samples": 64, "num_elites": 6, "iterations": 4}, 0.96),
        (cem_q.argmax_gradient, {"num_samples": 1, "iterations": 50}, 0.50),
        (cem_q.argmax_gradient, {"num_samples": 8, "iterations": 50}, 0.99),
        (cem_q.argmax_grid, {"bins": 21}, 1.0),
    ],
)
def test_how_often_each_search_finds_the_higher_of_two_peaks(search, settings, rate):
    """For cem from N(0, 1) in the box; gradient steps of one length leave the flat parts, too."""
    torch.manual_seed(0)
    found = search(lambda a: bimodal(a.squeeze(-1)), 4000, 1, **settings)
    success = (found - 0.5).abs().lt(0.1).double().mean().item()
    assert success == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize(("bins", "value"), [(11, 0.91), (21, 1.5)])
def test_equation_7_loses_what_lies_between_its_points(bins, value):
    """11 points a dimension are 0.4 apart in [-2, 2], and miss the peak by half of that."""
    found = cem_q.argmax_grid(lambda a: bimodal(a.squeeze(-1)), 1, 1, bins)
    close(bimodal(found), [[value]], atol=1e-3)


@pytest.mark.parametrize(
    ("d", "iterations", "bound"),
    [(1, 1, 0.034), (1, 2, 0.0045), (1, 3, 0.0020), (2, 1, 0.104), (2, 2, 0.031), (2, 3, 0.013),
     (6, 1, 0.196), (6, 2, 0.126), (6, 3, 0.078), (6, 4, 0.051)],
)  # fmt: skip
def test_equation_9_is_as_accurate_as_known(d, iterations, bound):
    """RMSE a dimension, of the mean of 6 elites of 64, from N(0, 1)."""
    torch.manual_seed(0)
    top = 0.37  # in each dimension
    found = cem_q.argmax_cem(lambda a: peak(a - top), 2000, d, 64, 6, iterations, min_std=1e-6)
    assert (found - top).square().mean().sqrt().item() == pytest.approx(bound, rel=0.15)


def ellipsoid(rotation, condition=1e4, d=4):
    """-Σ_i condition^(i/(d-1)) x_i², x = rotationᵀ (a - top), its top inside the box."""
    scale = condition ** torch.linspace(0, 1, d).double()
    top = torch.tensor([0.2, -0.1, 0.15, 0.05]).double()[:d]
    return lambda a: -((a.double() - top) @ rotation).square() @ scale


def rotation_of(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def test_equation_10_is_as_good_as_a_library_on_an_ill_conditioned_ellipsoid():
    """The median of log10 of what is missing, after 100 iterations of 12: within one of cma's."""
    f = ellipsoid(rotation_of(4))
    torch.manual_seed(0)
    ours = cem_q.argmax_cmaes(f, 100, 4, num_samples=12, iterations=100, min_std=1e-12)
    missing = []
    for seed in range(1, 21):
        options = {"popsize": 12, "seed": seed, "verbose": -9, "CMA_active": False}
        es = cma.CMAEvolutionStrategy(4 * [0.0], 0.5, options | {"tolfun": 0, "tolfunhist": 0})
        for _ in range(100):
            points = es.ask()
            es.tell(points, [-f(torch.tensor(np.array(x))).item() for x in points])
        missing.append(-f(torch.tensor(es.mean)).item())
    theirs, ours = np.log10(np.median(missing)), (-f(ours)).median().log10().item()
    assert ours < -3 and abs(ours - theirs) < 1


def test_equation_10_does_not_mind_a_rotation_and_equation_9_does():
    missing = {}
    for name, rotation in {"axes": torch.eye(4).double(), "rotated": rotation_of(4)}.items():
        f = ellipsoid(rotation, 1e3)
        torch.manual_seed(0)
        es = cem_q.argmax_cmaes(f, 200, 4, num_samples=12, iterations=60, min_std=1e-12)
        torch.manual_seed(0)
        cem = cem_q.argmax_cem(f, 200, 4, 64, 6, iterations=12, min_std=1e-12)
        missing[name] = [(-f(found)).median().log10().item() for found in (es, cem)]
    (es, cem), (es_rotated, cem_rotated) = missing["axes"], missing["rotated"]
    assert abs(es - es_rotated) < 0.7 and cem_rotated > cem + 1.5


def test_the_covariance_of_equation_10_becomes_that_of_the_level_sets():
    """C ∝ H⁻¹: the longest axis of the samples is the flattest of the ellipsoid."""
    rotation = rotation_of(2)
    f, drawn = recorded(ellipsoid(rotation, 100, d=2))
    torch.manual_seed(0)
    cem_q.argmax_cmaes(f, 300, 2, 12, 30, min_std=1e-12)
    centred = drawn[-1] - drawn[-1].mean(dim=1, keepdim=True)
    variances, axes = torch.linalg.eigh((centred.mT @ centred).double())
    alignment = (axes[:, :, -1] @ rotation[:, 0]).abs()
    assert alignment.median() > 0.99
    assert (variances[:, -1] / variances[:, 0]).log10().median().item() == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize("name", ["grid", "cem", "cmaes"])
def test_a_search_by_rank_sees_only_the_order(name):
    """The same samples for f and for an increasing function of it."""
    search, settings, _ = SEARCHES[name]
    f, found = ellipsoid(rotation_of(2), 100, d=2), []
    for transform in (lambda q: q, lambda q: q**3, lambda q: (q / 100).exp()):
        torch.manual_seed(3)
        found.append(search(lambda a, g=transform: g(f(a)), 20, 2, **settings))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# What `train` does


def test_cem_q_searches_and_values_with_the_target_network(spy):
    searches, targets = spy(cem_q, "argmax_action"), spy(cem_q, "td_target")
    cem_q.train(cem_q.Args(**VALUE_TINY))
    by_obs = {id(search.args[1]): search for search in searches}
    for target in targets:
        batch, next_actions, target_network, _ = target.args
        search = by_obs[id(batch.next_obs)]
        assert search.args[0] is target_network and search.result is next_actions
    networks = {id(search.args[0]) for search in searches}
    assert len(networks) == 2  # the target network, and the one that acts


@pytest.mark.parametrize("maximizer", ["gradient", "cem", "cmaes"])
def test_a_finished_run_of_cem_q_searches_again_as_it_did(maximizer):
    """So that its greedy returns are those that it printed."""
    settings = VALUE_TINY | {"maximizer": maximizer}
    returns = cem_q.train(cem_q.Args(**settings))
    (path,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.equal(returns, cem_q.train(cem_q.Args(**settings, resume=str(path))))
