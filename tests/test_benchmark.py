"""What the benchmarks measure."""

import json
from importlib import import_module
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, VALUE_MODULES

import ddpg_continuous
import naf
import reinforce
from benchmark import contestant, gpu, race, rollout, speed, vectorization
from benchmark.race import SYSTEMS, passes


@pytest.mark.parametrize(
    ("returns", "first", "third"),
    [
        ([475, 474, 475, 475, 476], 0, 4),
        ([1, 500, 500, 500, 500], 1, 3),
        ([500, 500, 1, 500], 0, None),
        ([474.9], None, None),
    ],
)
def test_the_first_pass_and_the_third_in_a_row(returns, first, third):
    rows = [{"return": str(x), "whole": i} for i, x in enumerate(returns)]  # as csv has them
    found = [row and row["whole"] for row in passes(rows, 475)]
    assert found == [first, third]


def test_the_tables_of_the_race_are_of_its_last_measurements(capsys):
    race.main(race.Args(python="no run is missing", out=ROOT / "benchmark/race.csv"))
    tables = capsys.readouterr().out.strip().split("\n\n")
    page = (ROOT / "docs/results.md").read_text()
    assert len(tables) == 4 and all(table in page for table in tables)


def test_what_never_happens_is_the_slowest():
    found = [{"whole": "3.25", "step": "2000"}, None, {"whole": "1", "step": "1000"}]
    assert race.spread(race.column(found, "whole")) == "3.2 (1.0 to never)"
    assert race.spread(race.column(found[::2], "step"), 0) == "1,500 (1,000 to 2,000)"


def test_the_stopwatch_stands_during_an_evaluation(monkeypatch, capsys):
    clock = [100.0]

    def evaluate(envs, act):
        clock[0] += 50
        return act

    monkeypatch.setattr(contestant, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(contestant, "evaluate", evaluate)
    monkeypatch.setattr(contestant, "BORN", 98.0)
    ends = []
    monkeypatch.setattr(contestant.os, "_exit", ends.append)
    watch = contestant.Stopwatch(None, 475)
    watch.start()
    for step, mean in [
        (999, 1),
        (1010, 475),
        (1900, 1),
        (2000, 474),
        *((n, 500) for n in (3e3, 4e3)),
    ]:
        clock[0] += 1
        watch.check(step, mean)
    assert not ends
    clock[0] += 1
    watch.check(9_500, 480)
    assert ends == [0]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in rows] == [1010, 2000, 3000, 4000, 9500]
    assert [row["return"] for row in rows] == [475, 474, 500, 500, 480]
    assert [row["training"] for row in rows] == [2, 4, 5, 6, 7]
    assert [row["whole"] for row in rows] == [4, 6, 7, 8, 9]


@pytest.mark.parametrize("script", contestant.OURS)
def test_a_contestant_acts_as_its_script_does(script):
    module = import_module(script.removesuffix(".py"))
    name, greedy = contestant.OURS[script]
    env_id = next(env_id for env_id, systems in SYSTEMS.items() if script in systems)
    envs = module.make_envs(env_id, 3)
    obs = torch.tensor(envs.reset(seed=0)[0])
    kind = getattr(module, name)
    torch.manual_seed(0)
    if name == "Policy":
        network = kind(4, 2, True)
        expected = module.rollout(envs, network, greedy=True).actions[:, 0]
        obs = torch.tensor(envs.reset(seed=1)[0])
    else:
        network = kind(4, 2) if script == "dqn.py" else kind(3, 1)
        still = torch.tensor(0.0)  # no noise, no exploration
        expected = module.select_actions(network, obs, still)
    with torch.no_grad():
        assert torch.equal(greedy(network, obs), expected)


def test_steps_per_second_are_of_the_whole_training(monkeypatch):
    clock = count(10, 5)  # seconds at the first step, and at the last
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    settings = {"wandb_mode": "disabled", "env_kwargs": '{"max_episode_steps": 5}'}
    for module, steps in ((reinforce, 7 * 32 * 5), (naf, 1_104)):  # the last batch is completed
        monkeypatch.setattr(module, "tqdm", None)
        assert speed.steps_per_second(module, total_timesteps=1_100, **settings) == steps / 5


def test_the_comparison_of_devices_has_settings_that_hold(monkeypatch, capsys):
    def recorded(module, **settings):
        """1 steps/s where the updates are recorded, and else 0."""
        args = module.Args(**settings)
        return args.wandb_mode == "disabled" and isinstance(getattr(module, "Graph", None), type)

    monkeypatch.setattr(gpu, "steps_per_second", recorded)
    for module in VALUE_MODULES:
        monkeypatch.setattr(module, "Graph", module.Graph)
    for name in ("Actor", "QNetwork"):
        monkeypatch.setattr(ddpg_continuous, name, getattr(ddpg_continuous, name))
    gpu.main(gpu.Args(device="cpu", repeats=2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (3 * 2 + 4 * 3) + 5 and len(set(lines)) == 3 * 2 + 4 * 3 + 5
    on_gpu = [line for line in lines if "GPU" in line]
    assert all(line.endswith(": 0 steps/s") == ("a launch for each" in line) for line in on_gpu)


def test_the_benchmarks_of_speed_run(capsys):
    rollout.main(rollout.Args(num_envs=4, repeats=1))
    vectorization.main(vectorization.Args(env_id="Pendulum-v1", num_envs=2, steps=3, repeats=2))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "(100% of the rows live)" in first  # the controller balances
    assert last.startswith("sync ") and " async " in last
