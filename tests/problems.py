"""Small problems whose answers are known: for the tests, and for the figures of the docs."""

import itertools

import torch
from scipy.linalg import solve_discrete_are
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from pg_baseline import Trajectories, optimal_baseline, trajectory_gradients

# two episodes, one of three steps and one of two
REWARDS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def close(ours, expected, atol=1e-9, rtol=1e-7):
    """Numbers or tensors of any kind, compared in float64."""
    ours = torch.as_tensor(ours, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol)


def flat_grad(value, policy):
    """∇ of `value` with respect to all parameters of the policy, in one row."""
    return torch.cat([x.flatten() for x in torch.autograd.grad(value, list(policy.parameters()))])


class Tabular(nn.Module):
    """Softmax policy with a logit for each state and action; states are one-hot."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, obs):
        return Categorical(logits=obs @ self.logits, validate_args=False)


class Table(nn.Module):
    """Q of the state i is row i; the observation is (i,)."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.as_tensor(rows))

    def forward(self, obs):
        return self.rows[obs[..., 0].long()]


class Coin(nn.Module):
    """One state, P(a = 1) = θ, and θ itself is the parameter."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, obs):
        p = self.theta.expand_as(obs[..., 0])
        return Categorical(probs=torch.stack([1 - p, p], dim=-1), validate_args=False)


class LinearGaussian(nn.Module):
    """u ~ N(-K x, s² I)."""

    def __init__(self, K, std):
        super().__init__()
        self.K = nn.Parameter(torch.as_tensor(K, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor([std], dtype=torch.float64))

    def forward(self, obs):
        mean = -obs @ self.K.mT
        return Independent(Normal(mean, self.std.expand_as(mean)), 1)


class MDP:
    """All episodes of a tabular MDP of T steps; an episode also ends in the state -1.

    start (S,), transition (S, A, S): what is missing to 1 is the probability of the end;
    reward (T, S, A).
    """

    def __init__(self, start, transition, reward):
        numbers = (torch.as_tensor(x, dtype=torch.float64) for x in (start, transition, reward))
        self.start, self.transition, self.reward = numbers
        self.horizon, self.num_states, self.num_actions = self.reward.shape
        self.end = 1 - self.transition.sum(dim=-1)

    def episodes(self) -> tuple[Trajectories, Tensor]:
        """Each of them, a row, and the part of its probability that is not the policy's, (N,)."""
        rows = []

        def extend(steps, s, p):
            if p == 0:
                return
            if s == -1 or len(steps) == self.horizon:
                rows.append((steps, p))
                return
            for a in range(self.num_actions):
                step = (s, a, self.reward[len(steps), s, a].item())
                if len(steps) + 1 == self.horizon:  # what comes after does not matter
                    extend([*steps, step], -1, p)
                    continue
                extend([*steps, step], -1, p * self.end[s, a].item())
                for next_s in range(self.num_states):
                    extend([*steps, step], next_s, p * self.transition[s, a, next_s].item())

        for s in range(self.num_states):
            extend([], s, self.start[s].item())
        shape = len(rows), self.horizon
        states, actions = torch.zeros(2, *shape, dtype=torch.int64)
        rewards, mask = torch.zeros(2, *shape, dtype=torch.float64)
        for i, (steps, _) in enumerate(rows):
            for t, (s, a, r) in enumerate(steps):
                states[i, t], actions[i, t], rewards[i, t], mask[i, t] = s, a, r, 1
        obs = nn.functional.one_hot(states, self.num_states).double()
        dynamics = torch.tensor([p for _, p in rows], dtype=torch.float64)
        return Trajectories(obs, actions, rewards, mask), dynamics

    def values(self, policy) -> tuple[Tensor, Tensor]:
        """Q^π_t(s, a), (T, S, A), and V^π_t(s), (T, S), backward from the last step."""
        probs = policy(torch.eye(self.num_states, dtype=torch.float64)).probs.detach()
        Q, V, next_v = [], [], torch.zeros(self.num_states, dtype=torch.float64)
        for reward in reversed(self.reward):
            Q.append(reward + self.transition @ next_v)
            next_v = (probs * Q[-1]).sum(dim=-1)
            V.append(next_v)
        return torch.stack(Q[::-1]), torch.stack(V[::-1])


def small_mdp() -> MDP:
    """Two states, two actions, three steps; action 1 in state 1 may end the episode."""
    transition = [[[0.9, 0.1], [0.3, 0.7]], [[0.6, 0.4], [0.2, 0.5]]]
    reward = [[[1.0, 0.0], [-1.0, 2.0]], [[0.5, 3.0], [0.0, -2.0]], [[2.0, -1.0], [4.0, 1.0]]]
    return MDP([0.7, 0.3], transition, reward)


def small_policy() -> Tabular:
    """One that is far from uniform, and from the best."""
    return Tabular([[0.5, -0.5], [-0.3, 0.6]])


def probabilities(policy, episodes: Trajectories, dynamics: Tensor) -> Tensor:
    """p_φ(τ) of each episode, (N,)."""
    obs, actions, _, mask = episodes
    return dynamics * (mask * policy(obs).log_prob(actions)).sum(dim=1).exp()


def exact_gradient(mdp: MDP, policy) -> Tensor:
    """∇ Σ_τ p_φ(τ) R(τ), without a score."""
    episodes, dynamics = mdp.episodes()
    J = probabilities(policy, episodes, dynamics) @ episodes.rewards.sum(dim=1)
    return flat_grad(J, policy)


def moments(policy, episodes: Trajectories, p: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Of the estimate by one episode of probability p: mean, (P,), and total variance."""
    obs, actions, _, mask = episodes
    gradients = trajectory_gradients(policy, obs, actions, mask * psi)
    mean = p @ gradients
    return mean, p @ (gradients - mean).square().sum(dim=1)


def step_values(table: Tensor, episodes: Trajectories) -> Tensor:
    """table (T, S) or (T, S, A) at the states and actions of the episodes, (N, T)."""
    states, t = episodes.obs.argmax(dim=-1), torch.arange(episodes.obs.shape[1])
    return table[t, states] if table.dim() == 2 else table[t, states, episodes.actions]


def best_constant(policy, episodes: Trajectories, p: Tensor, returns: Tensor) -> Tensor:
    """(7) of pg_baseline.py for infinitely many episodes, each as often as it occurs."""
    rows = [
        trajectory_gradients(policy, *episodes[:2], episodes.mask * psi)
        for psi in (torch.ones_like(returns), returns)
    ]
    left_out = torch.zeros_like(rows[0][:1])  # and does not count
    rows = [torch.cat([left_out, p.sqrt()[:, None] * x]) for x in rows]
    return optimal_baseline(*rows)[0]


def all_actions(T: int, reward=lambda actions: 0.0 * actions) -> Trajectories:
    """One state, two actions: each of the 2^T sequences, a row."""
    actions = torch.tensor(list(itertools.product([0, 1], repeat=T)))
    mask = torch.ones(actions.shape, dtype=torch.float64)
    return Trajectories(mask.unsqueeze(-1), actions, reward(actions.double()), mask)


def corridor_return(p):
    """J of going right with probability p in Corridor-v0 of envs.py.

    The short corridor with switched actions (Sutton and Barto, example 13.1).
    """
    return 2 * (p - 2) / (p * (1 - p))


def bimodal(a: Tensor) -> Tensor:
    """Two peaks, of height 1 at -½ and 1.5 at ½ (Lim et al., 2018), for a in [-1, 1]."""
    low, high = (2 * a + 1) / 0.2, (2 * a - 1) / 0.2
    return (-0.5 * low**2).exp() + 1.5 * (-0.5 * high**2).exp()


class LQR:
    """x' = A x + B u, r = -(xᵀ Q x + uᵀ R u), discount γ; V* = -xᵀ P x, at u = -K x."""

    def __init__(self, A, B, Q, R, gamma):
        matrices = (torch.tensor(x, dtype=torch.float64) for x in (A, B, Q, R))
        self.A, self.B, self.Q, self.R = matrices
        root = gamma**0.5
        solved = solve_discrete_are(root * self.A, root * self.B, self.Q, self.R)
        self.gamma, self.P = gamma, torch.from_numpy(solved)
        self.H = self.R + gamma * self.B.mT @ self.P @ self.B  # NAF's P is 2 H
        self.K = torch.linalg.solve(self.H, gamma * self.B.mT @ self.P @ self.A)

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and x', of (..., n) and (..., m)."""
        cost = (x @ self.Q * x).sum(dim=-1) + (u @ self.R * u).sum(dim=-1)
        return -cost, x @ self.A.mT + u @ self.B.mT

    def q(self, x: Tensor, u: Tensor, P: Tensor | None = None) -> Tensor:
        """Q*(x, u), or r + γ V(x') with V = -xᵀ P x."""
        reward, x = self.step(x, u)
        return reward - self.gamma * (x @ (self.P if P is None else P) * x).sum(dim=-1)


def scalar_lqr(gamma=0.9) -> LQR:
    return LQR([[1.0]], [[1.0]], [[1.0]], [[1.0]], gamma)


def planar_lqr() -> LQR:
    """Two states and two actions, all coupled."""
    B, R = [[0.6, 0.2], [-0.1, 0.5]], [[0.5, 0.2], [0.2, 0.3]]
    return LQR([[0.9, 0.3], [-0.2, 1.0]], B, [[1.0, 0.3], [0.3, 0.6]], R, 0.9)


def states(lqr: LQR) -> Tensor:
    """Fifty of them, the same in every call."""
    torch.manual_seed(0)
    return torch.randn(50, len(lqr.A), dtype=torch.float64)


def lqr_batch(module, lqr: LQR):
    """Transitions by actions that have nothing to do with the best ones."""
    x = states(lqr)
    u = torch.randn(len(x), lqr.B.shape[1], dtype=torch.float64)
    rewards, next_x = lqr.step(x, u)
    return module.Batch(x, u, rewards, next_x, torch.zeros_like(rewards))


def policy_cost(lqr: LQR, K: Tensor, P: Tensor) -> Tensor:
    """One more step of u = -K x before the cost xᵀ P x."""
    closed = lqr.A - lqr.B @ K
    return lqr.Q + K.mT @ lqr.R @ K + lqr.gamma * closed.mT @ P @ closed


def continuous_batch(module):
    """Four transitions of rewards 0 to 3; the second and the last end their episodes."""
    obs, next_obs = torch.randn(2, 4, 3)
    terminations = torch.tensor([0.0, 1.0, 0.0, 1.0])
    return module.Batch(obs, torch.rand(4, 2), torch.arange(4.0), next_obs, terminations)


def buffer_of(kind, capacity):
    """A replay buffer of the class `kind` for `transitions`."""
    return kind(capacity, (1,), (), torch.int64, "cpu")


def transitions(*values):
    """For each value v a transition in which s, a, r and `terminated` are v, and s' is v + 1."""
    x = torch.tensor(values)
    return x[:, None].float(), x, x.float(), x[:, None].float() + 1, x.float()
