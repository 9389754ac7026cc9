"""Tests of the replay buffer of the value-based scripts, and of what a run puts into it."""

import numpy as np
import pytest
import torch
from conftest import VALUE_MODULES
from envs import UNEVEN, counting, env_actions
from problems import buffer_of, transitions

import dqn

# every class of buffer
KINDS = {module.__name__: module.ReplayBuffer for module in VALUE_MODULES}
KINDS["prioritized-dqn"] = dqn.PrioritizedReplayBuffer


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def test_equation_3_the_ring_of_a_replay_buffer_wraps(kind):
    """A ReplayBuffer of five rows."""
    buffer = buffer_of(kind, 5)
    assert buffer.add(*transitions(0, 1, 2)).tolist() == [0, 1, 2]
    assert buffer.add(*transitions(3, 4, 5)).tolist() == [3, 4, 0]
    assert buffer.rewards.tolist() == [5, 1, 2, 3, 4]
    assert buffer.next_obs[:, 0].tolist() == [6, 2, 3, 4, 5]
    buffer.add(*transitions(*range(10, 22)))  # more than the capacity: the last five stay
    assert sorted(buffer.actions.tolist()) == [17, 18, 19, 20, 21]
    assert buffer.actions[int(buffer.count) % 5] == 17
    assert buffer.add(*transitions(30, 31, 32)).tolist() == [3, 4, 0]  # not for the first time


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
    buffer.add(*transitions(7, 8, 9))
    batch = buffer.sample(3000)
    counts = batch.actions.bincount(minlength=10)
    assert counts[:7].sum() == 0 and (counts[7:] > 900).all()
    torch.testing.assert_close(batch.next_obs[:, 0], batch.rewards + 1)
    again = buffer_of(value_script.ReplayBuffer, 100)
    again.load_state_dict(buffer.state_dict())
    assert again.rewards.equal(buffer.rewards) and again.count == 3
    buffer.add(*transitions(*range(150)))
    counts = buffer.sample(30_000).actions.bincount(minlength=150)
    assert counts[:50].sum() == 0 and counts[50:].min() > 220 and counts.max() < 380


@pytest.mark.parametrize("kind", ["Counting", "Truncating", "IntegerFlags"])
def test_the_buffer_holds_every_transition_and_no_reset(
    value_script, kind, filled_buffer, monkeypatch
):
    """Of envs that write each observation where the last one was."""
    make_envs = value_script.make_envs

    def record(*args, **kwargs):
        vector_env = make_envs(*args, **kwargs)
        vector_env.unwrapped.copy = False
        return vector_env

    monkeypatch.setattr(value_script, "make_envs", record)
    env_id, truncates = counting(value_script, kind), kind == "Truncating"
    buffer = filled_buffer(value_script, env_id, env_kwargs='{"dtype": "float32"}')
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
        expected = env_actions(value_script, actions, UNEVEN).sum(dim=-1)
        assert actions.abs().max() <= 1
    torch.testing.assert_close(buffer.rewards[:stored], 100 * t + expected)
