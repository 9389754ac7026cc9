"""One system learns one task: a line of JSON at every 1,000 env steps, until three pass in a row.

    python -m benchmark.contestant dqn.py CartPole-v1 1

race.py starts it, with the Python that has the system. It imports only what the system needs.
"""

import importlib
import json
import os
import sys
import time

import gymnasium as gym

BORN = float(os.environ.get("BORN", time.time()))  # when the process was started
PASS = {"CartPole-v1": 475, "Pendulum-v1": -180}  # greedy mean that counts as learned
INTERVAL = 1_000  # env steps between two evaluations, at least

# each script's network, and the greedy action that it gives
POLICY = "Policy", lambda policy, obs: policy(obs).mode
OURS = {
    "reinforce.py": POLICY,
    "pg_baseline.py": POLICY,
    "offpolicy_pg.py": POLICY,
    "dqn.py": ("QNetwork", lambda q_network, obs: q_network(obs).argmax(dim=-1)),
    "ddpg_continuous.py": ("Actor", lambda actor, obs: actor(obs)),
    "naf.py": ("NAFNetwork", lambda q_network, obs: q_network(obs)[0]),
}


def zoo(algorithm):
    """Tuned settings of RL Baselines3 Zoo, with its number of envs and of steps."""
    if algorithm == "PPO":
        settings = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98}
        settings |= {"n_epochs": 20, "ent_coef": 0.0, "learning_rate": lambda left: left * 1e-3}
        settings |= {"clip_range": lambda left: left * 0.2}
        return settings, 8, 100_000
    if algorithm == "DQN":
        settings = {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000}
        settings |= {"learning_starts": 1_000, "gamma": 0.99, "target_update_interval": 10}
        settings |= {"train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.16}
        settings |= {"exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]}}
        return settings, 1, 50_000
    # DDPG: with our network and warm-up; the zoo's are 400 x 300, and 10,000 steps
    settings = {"learning_rate": 1e-3, "buffer_size": 200_000, "learning_starts": 1_000}
    settings |= {"gamma": 0.98, "policy_kwargs": {"net_arch": [128, 128]}}
    return settings, 1, 20_000


class Stopwatch:
    """Stands while it evaluates."""

    def __init__(self, envs: gym.vector.VectorEnv, threshold: float):
        self.envs, self.threshold = envs, threshold
        self.next_step, self.passes, self.stood = INTERVAL, 0, 0.0

    def start(self):
        self.started = time.time()

    def check(self, step, act):
        """Evaluates if it is time, and ends the process at the third pass in a row."""
        if step < self.next_step:
            return
        now = time.time()
        mean = round(evaluate(self.envs, act), 2)
        row = {"step": step, "return": mean, "whole": round(now - BORN - self.stood, 3)}
        row |= {"training": round(now - self.started - self.stood, 3)}
        print(json.dumps(row), flush=True)
        self.passes = self.passes + 1 if mean >= self.threshold else 0
        if self.passes == 3:
            os._exit(0)
        self.next_step = step - step % INTERVAL + INTERVAL
        self.stood += time.time() - now


def evaluate(envs, act):
    """Mean return of one episode in each env, from the same starts for every system."""
    obs, _ = envs.reset(seed=1)
    returns, live = 0, True
    while True:
        obs, rewards, terminations, truncations, _ = envs.step(act(obs))
        returns += rewards * live
        live = live & ~(terminations | truncations)
        if not live.any():
            return float(returns.mean())


def ours(script, env_id, seed):
    """The script as it is; its progress bar looks at the stopwatch."""
    import torch
    from tqdm import tqdm

    module = importlib.import_module(script.removesuffix(".py"))
    name, greedy = OURS[script]
    kind, networks = getattr(module, name), []

    class Network(kind):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            networks.append(self)

    class Progress(tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            self.watch = Stopwatch(module.make_envs(env_id, 20), PASS[env_id])
            self.watch.start()

        def update(self, steps):
            super().update(steps)
            self.watch.check(self.n, act)

    @torch.no_grad()
    def act(obs):
        return greedy(networks[0], torch.tensor(obs, dtype=torch.float32)).numpy()

    setattr(module, name, Network)
    module.tqdm = Progress
    module.train(module.Args(env_id=env_id, seed=seed, device="cpu"))


def baselines(library, algorithm, env_id, seed):
    """Stable-Baselines3, or SBX, which has its interface."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(1)
    settings, num_envs, total_timesteps = zoo(algorithm)
    if algorithm == "DDPG":
        settings["action_noise"] = NormalActionNoise([0.0], [0.1])
    kind = getattr(importlib.import_module(library), algorithm)
    envs = make_vec_env(env_id, num_envs, seed=seed)
    model = kind("MlpPolicy", envs, seed=seed, **settings)
    watch = Stopwatch(gym.make_vec(env_id, 20), PASS[env_id])

    class Check(BaseCallback):
        def _on_step(self):
            watch.check(self.num_timesteps, act)
            return True

    def act(obs):
        return model.predict(obs, deterministic=True)[0]

    watch.start()
    model.learn(total_timesteps, callback=Check())


if __name__ == "__main__":
    system, env_id, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if hasattr(os, "sched_setaffinity"):  # one thread at a time, whatever the library starts
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if system in OURS:
        ours(system, env_id, seed)
    else:
        library, algorithm = system.split()
        library = {"SB3": "stable_baselines3", "SBX": "sbx"}[library]
        baselines(library, algorithm, env_id, seed)
