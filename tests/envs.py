"""Tiny environments whose observations and rewards tell what happened to them."""

import random
from copy import deepcopy

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiDiscrete, Sequence, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv


class Counting(gym.Env):
    """Episodes of 1 to 6 steps; the observation is (length, t), the reward 100 t + action."""

    def __init__(self, action_space=None, truncates=False, dtype="float64"):
        self.observation_space = Box(-np.inf, np.inf, (2,), dtype)
        self.action_space = Discrete(2, start=1) if action_space is None else action_space
        self.truncates = truncates

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = int(self.np_random.integers(1, 7)), 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.length, self.t], dtype=self.observation_space.dtype)

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        reward = 100 * self.t + float(np.sum(action))
        self.t += 1
        done = self.t == self.length
        return self.observe(), reward, done and not self.truncates, done and self.truncates, {}


class Edge(gym.Env):
    """One observed number, in float64, and integer rewards; ends at the first step or never."""

    observation_space = Box(-1, 1, (1,), np.float64)

    def __init__(self, action_space, ends, reward=1):
        self.action_space, self.ends, self.reward = action_space, ends, reward

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        return self.np_random.uniform(-1, 1, 1), self.reward, self.ends, False, {}


class Slow(Edge):
    """Takes a quarter of a second for a step, by a clock of its own."""

    seconds = 0.0

    def step(self, action):
        Slow.seconds += 0.25
        return super().step(action)


class Fall(Counting):
    """Ends when its observation is no longer finite, as robots do that fall."""

    def observe(self):
        return super().observe() if self.t < self.length else np.full(2, np.nan)


class Dice(Edge):
    """Adds to its rewards numbers of the generators of Python and NumPy that all share."""

    def step(self, action):
        obs, reward, *others = super().step(action)
        return obs, reward + random.random() + np.random.random(), *others


class Counted(Counting):
    """Knows how many of its kind are open, and how many ever were at once."""

    open = most = 0

    def __init__(self, *args, breaks=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.breaks, self.closed = breaks, False  # breaks: in its first step
        Counted.open += 1
        Counted.most = max(Counted.most, Counted.open)

    def step(self, action):
        return 1 / 0 if self.breaks else super().step(action)

    def close(self):
        Counted.open -= not self.closed
        self.closed = True

    def __del__(self):
        self.close()


class Buggy(Edge):
    """Its step has a bug."""

    def step(self, action):
        return 1 / 0


class Mute(gym.Env):
    """Cannot be made, and does not say why."""

    def __init__(self):
        raise gym.error.Error()


class Loop(gym.Env):
    """One state, which no action leaves; the reward is 1."""

    observation_space, action_space = Box(0, 1, (1,), np.float32), Discrete(2)

    def reset(self, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1, False, False, {}


class Corridor(gym.Env):
    """Three states that look alike; in the middle one the actions are switched; -1 a step."""

    observation_space, action_space = Box(0, 1, (1,), np.float32), Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        direction = 2 * action - 1
        self.state = max(0, self.state + (-direction if self.state == 1 else direction))
        return np.ones(1, np.float32), -1, self.state == 3, False, {}


class Chain(gym.Env):
    """0, 1, 2, 2, ...: a step in 2 is worth 1, and no action matters."""

    observation_space, action_space = Discrete(3), Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        reward, self.state = float(self.state == 2), min(self.state + 1, 2)
        return self.state, reward, False, False, {}


def vector_chain(num_envs, mode=AutoresetMode.NEXT_STEP, **kwargs):
    """A vector env of the user's own, which resets its envs in this mode; None tells nothing."""
    make = lambda: gym.wrappers.TimeLimit(Chain(), 3)  # noqa: E731
    vector_env = SyncVectorEnv([make] * num_envs, autoreset_mode=mode or AutoresetMode.NEXT_STEP)
    if mode is None:
        del vector_env.metadata["autoreset_mode"]
    return vector_env


class IntegerFlags(SyncVectorEnv):
    """A vector env of the user's own whose flags of an end are integers."""

    def __init__(self, num_envs, **kwargs):
        super().__init__([lambda: Counting(**kwargs)] * num_envs)

    def step(self, actions):
        *others, terminations, truncations, infos = super().step(actions)
        return *others, terminations.astype(int), truncations.astype(int), infos


class Endless(VectorEnv):
    """A vector env of one quick env, whose episodes have `length` steps, or no end."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    observation_space, action_space = Box(0, 1, (1, 1), np.float32), MultiDiscrete([2])
    single_observation_space, single_action_space = Box(0, 1, (1,), np.float32), Discrete(2)
    num_envs, obs = 1, np.zeros((1, 1), np.float32)
    one, no, yes = np.ones(1), np.zeros(1, bool), np.ones(1, bool)

    def __init__(self, length=np.inf):
        self.length, self.t = length, 0

    def reset(self, seed=None, options=None):
        return self.obs, {}

    def step(self, actions):
        self.t += 1
        assert self.t < 200_000, "it would go on for ever"
        return self.obs, self.one, self.yes if self.t == self.length else self.no, self.no, {}


class Spaces(gym.Env):
    """Of any spaces; `last` is the observation that it gave last."""

    def __init__(self, observation_space, action_space):
        self.observation_space = deepcopy(observation_space)  # which has a seed of its own
        self.action_space = action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.last = self.observation_space.sample()
        return self.last, {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.last = self.observation_space.sample()
        return self.last, 1.0, False, False, {}


def spec(observation_space, action_space):
    """What make_envs takes in place of the id of such an env."""
    kwargs = {"observation_space": observation_space, "action_space": action_space}
    return EnvSpec("Spaces-v0", entry_point=Spaces, kwargs=kwargs)


def env_actions(module, actions, action_space):
    """What the envs of a script see, if its policy takes these actions."""
    envs = module.make_envs(spec(box(2), action_space), 1)
    return torch.from_numpy(envs.func(actions.numpy()))


UNEVEN = Box(np.array([-1.0, 0.0], "f4"), np.array([3.0, 10.0], "f4"))


def box(*shape, high=1.0):
    return Box(-high, high, shape, np.float32)


gym.register("Counting-v0", Counting)
gym.register("Truncating-v0", Counting, kwargs={"truncates": True})
gym.register("CountingBox-v0", Counting, kwargs={"action_space": UNEVEN})
gym.register("TruncatingBox-v0", Counting, kwargs={"action_space": UNEVEN, "truncates": True})
for kind, actions in {"": Discrete(3, start=-1), "Box": UNEVEN}.items():
    gym.register(f"OneStep{kind}-v0", Edge, kwargs={"action_space": actions, "ends": True})
    endless = {"action_space": actions, "ends": False}
    gym.register(f"Endless{kind}-v0", Edge, max_episode_steps=30, kwargs=endless)
for kind, actions in {"": Discrete(2, start=1), "Box": UNEVEN}.items():
    own = {"kwargs": {"action_space": actions}}
    gym.register(f"Counted{kind}-v0", Counted, **own)
    gym.register(f"Fall{kind}-v0", Fall, disable_env_checker=True, **own)  # it warns of nan
    gym.register(f"IntegerFlags{kind}-v0", vector_entry_point=IntegerFlags, **own)
    own = {"action_space": actions, "ends": False}
    gym.register(f"Dice{kind}-v0", Dice, max_episode_steps=5, kwargs=own)
    gym.register(f"Slow{kind}-v0", Slow, max_episode_steps=50, kwargs=own)
gym.register("Mute-v0", Mute)
gym.register("Chain-v0", vector_entry_point=vector_chain)
gym.register("Loop-v0", Loop, max_episode_steps=5)
gym.register("Corridor-v0", Corridor, max_episode_steps=100)
gym.register("Forever-v0", Edge, kwargs={"action_space": Discrete(2), "ends": False})
broken = {"action_space": Discrete(2), "ends": True, "reward": float("nan")}
gym.register("NanReward-v0", Edge, kwargs=broken)
gym.register("Buggy-v0", Buggy, kwargs={"action_space": Discrete(2), "ends": True})
# action spaces that every script must refuse
REFUSED = {
    "InfiniteBox-v0": box(1, high=np.inf),
    "HalfInfiniteBox-v0": Box(np.array([-1, -np.inf], "f4"), np.ones(2, "f4")),
    "MatrixBox-v0": box(2, 2),
    "ScalarBox-v0": box(),
    "MultiDiscrete-v0": MultiDiscrete([2, 2]),
}
for env_id, actions in REFUSED.items():
    kwargs = {"observation_space": box(2), "action_space": actions}
    gym.register(env_id, Spaces, kwargs=kwargs)
# observation spaces that are not vectors, and the vectors' length
FLATTENED = {
    "Discrete": (Discrete(4), 4),
    "Dict": (Dict(a=box(2), b=Discrete(3)), 5),
    "MultiDiscrete": (MultiDiscrete([2, 3]), 5),
    "Tuple": (Tuple([box(2), box(2, 2)]), 6),
    "Image": (Box(0, 255, (4, 3, 3), np.uint8), 36),
}
for kind, actions in {"": Discrete(2), "Box": UNEVEN}.items():
    kwargs = {"observation_space": FLATTENED["Dict"][0], "action_space": actions}
    gym.register(f"DictObs{kind}-v0", Spaces, max_episode_steps=5, kwargs=kwargs)


# and those that no network of a script takes
NO_VECTORS = {
    "Sequence": Sequence(box(2)),
    "Graph": Graph(box(2), None),
    "Tuple of Sequence": Tuple([box(2), Sequence(Discrete(2))]),
}
TOO_WIDE = {
    10_001: box(10_001),
    30_000: Box(0, 255, (100, 100, 3), np.uint8),
    20_000: Discrete(20_000),
    10_002: Dict(a=box(10_000), b=Discrete(2)),
}


def counting(module, kind="Counting"):
    """The id of the env of a kind, such as Truncating, whose actions a value-based script takes."""
    return f"{kind}-v0" if module.__name__ == "dqn" else f"{kind}Box-v0"
