"""benchmark/run.py: which cells there are, what it keeps of them, and what a dead machine costs."""

import importlib
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import tyro
from conftest import ROOT
from ray.cluster_utils import Cluster
from test_runs import wait_for

import benchmark.logs
from benchmark.logs import curve
from benchmark.run import KEYS, Cell, cells, execute, keep, load

TASKS = tomllib.loads((ROOT / "benchmark/settings.toml").read_text())
COMMANDS = [(x["env_id"], command) for x in TASKS.values() for command in x["commands"]]
TWO = {
    "a": {"size": "small", "env_id": "A-v0", "first_seed": 5, "commands": ["dqn.py", "naf.py"]},
    "b": {"size": "large", "env_id": "B-v0", "first_seed": 7, "commands": ["dqn.py --dueling"]},
}


@pytest.mark.parametrize(("env_id", "command"), COMMANDS)
def test_each_command_of_the_settings_is_one_of_the_script(env_id, command):
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=["--env-id", env_id, *flags])
    names = [x.removeprefix("--").removeprefix("no-").replace("-", "_") for x in flags if "--" in x]
    unlike = [x for x in names if getattr(args, x) != getattr(module.Args, x)]
    assert unlike == names, "a command shows only what differs from the defaults"


def test_the_names_of_cells_are_folders_of_their_own():
    found = {cell for name in TASKS for cell in cells(TASKS, name, "", 2)}
    assert len({x.name for x in found}) == len(found) > 60
    assert not any(set("/\\: '\"") & set(x.name) for x in found)


def test_cells_take_all_commands_of_one_seed_first():
    assert cells(TWO, "small", "", 2) == [
        ("A-v0", "dqn.py", 5),
        ("A-v0", "naf.py", 5),
        ("A-v0", "dqn.py", 6),
        ("A-v0", "naf.py", 6),
    ]
    assert cells(TWO, "b", "dqn", 1) == [("B-v0", "dqn.py --dueling", 7)]
    assert cells(TWO, "b", "dqn.py --dueling", 1) == cells(TWO, "b", "dqn", 1)


@pytest.mark.parametrize(
    ("task", "script", "line"),
    [("tiny", "", "--task tiny: choose one of small, large, a, b"), ("b", "naf", "--script naf")],
)
def test_a_task_or_script_that_is_not_there_is_one_line(task, script, line):
    with pytest.raises(SystemExit, match=line):
        cells(TWO, task, script, 1)


def test_a_cell_is_run_kept_and_read_back(tmp_path):
    flags = "--total-timesteps 700 --num-envs 4 --eval-episodes 3"
    commands = [f"dqn.py --learning-starts 100 {flags}", f"reinforce.py {flags}"]
    for command in reversed(commands):
        cell = Cell("CartPole-v1", command, 3)
        rows, end = execute(cell, tmp_path / cell.name, "cpu", "1a2b3c")
        keep(tmp_path, rows, end)
        assert rows["step"].is_monotonic_increasing and end["steps"] >= 700
        assert rows["greedy_return"].notna().sum() == 1
    curves, runs = load(tmp_path)
    assert list(runs["command"]) == commands and set(runs["seed"]) == {3}
    assert set(curves["command"]) == set(commands)
    policy_gradient = curves[curves["command"] == commands[1]]
    # 100 episodes are 25 batches of 4, more than there are
    expected = policy_gradient["training_return"].mean()
    assert runs.iloc[1]["training_return"] == pytest.approx(expected, rel=1e-5)
    assert runs["version"].str.startswith("1a2b3c, torch 2").all()


def test_the_log_of_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path, monkeypatch):
    """The first log has three rows after the checkpoint; its seconds count up to there."""
    logs = {
        "offline-run-2": [(10, 1), (20, 2), (30, 3), (40, 4)],
        "offline-run-1": [(20, 5), (30, 6)],
    }

    def records(directory):
        rows = [{"_step": step, "_runtime": seconds} for step, seconds in logs[directory.name]]
        rows[-1] |= {"eval/episodic_return": 7.0, "charts/episodic_return": 6.0}
        return [{"type": "run"}, *({"type": "history", "history": {"item": x}} for x in rows)]

    monkeypatch.setattr(benchmark.logs, "records", records)
    for i, name in enumerate(logs):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        os.utime(tmp_path / "wandb" / name, (i, i))
    rows = curve(tmp_path)
    assert rows["step"].tolist() == [10, 20, 30]
    assert rows["seconds"].tolist() == [1, 6, 7]
    assert rows["greedy_return"].dropna().tolist() == [7] == rows["greedy_return"].tolist()[-1:]


def test_a_command_that_fails_is_its_last_line(tmp_path):
    cell = Cell("CartPol-v1", "dqn.py", 1)
    with pytest.raises(RuntimeError, match="CartPol.*doesn't exist.*; see .*stderr.txt"):
        execute(cell, tmp_path, "cpu", "")


def test_a_curve_without_its_run_is_left_out_and_written_again(tmp_path):
    label = {"env_id": "A-v0", "command": "dqn.py"}
    for seed in (1, 2):
        rows = pd.DataFrame([{"step": 1.0, "training_return": 5.0, **label, "seed": seed}])
        keep(tmp_path, rows, {**label, "seed": seed, "greedy_return": 1.0})
    _, runs = load(tmp_path)
    runs[runs["seed"] == 1].to_csv(tmp_path / "runs.csv", index=False)  # killed before the second
    curves, runs = load(tmp_path)
    assert list(curves["seed"]) == list(runs["seed"]) == [1]
    keep(tmp_path, rows, {**label, "seed": 2, "greedy_return": 1.0})
    curves, runs = load(tmp_path)
    assert list(curves["seed"]) == list(runs["seed"]) == [1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_a_script_stops_with_its_worker(tmp_path):
    """Else it would go on beside its own retry."""
    cell = Cell("CartPole-v1", "dqn.py --total-timesteps 4000000", 1)
    code = f"from benchmark.run import *; execute({cell}, Path({str(tmp_path)!r}), 'cpu', '')"
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), worker)
    script = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().strip()
    assert Path(f"/proc/{script}/exe").exists()
    worker.kill()
    worker.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{script}/exe").exists():  # a process that is dead but not reaped has none
        assert time.monotonic() < end, (tmp_path / "stderr.txt").read_text()[-2000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_machine_that_dies_costs_no_run_and_none_is_run_twice(tmp_path, monkeypatch):
    """Two nodes of Ray, of one CPU each; one is killed in the middle of its run."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    command = "dqn.py --total-timesteps 40000 --eval-episodes 5"
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f"""[t]\nsize = "s"\nenv_id = "CartPole-v1"\nfirst_seed = 1\ncommands = ["{command}"]\n"""
    )
    words = ["--task", "t", "--seeds", "3", "--settings", settings, "--out", tmp_path / "out"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        words += ["--address", cluster.address]
        start = [sys.executable, "-m", "benchmark.run", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(start, cwd=ROOT, **pipes)
        wait_for(lambda: len(list(tmp_path.glob("out/cells/*/runs/*/checkpoint.pt"))) == 2, process)
        cluster.remove_node(node, allow_graceful=False)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        again = subprocess.run(start, cwd=ROOT, timeout=60, **pipes)
        assert again.returncode == 0 and "3/3" in again.stderr
    finally:
        cluster.shutdown()
    curves, runs = load(tmp_path / "out")
    assert list(runs["seed"]) == [1, 2, 3] and not runs[KEYS].duplicated().any()
    logs = [list(x.glob("runs/*/wandb/offline-run-*")) for x in tmp_path.glob("out/cells/*")]
    assert sorted(map(len, logs)) == [1, 1, 2]
    (resumed,) = [x[0].parents[1] for x in logs if len(x) == 2]
    steps = curve(resumed)["step"]  # of both logs, but for the second that W&B had not yet written
    assert steps.is_monotonic_increasing and steps.iloc[0] < 1000 and steps.iloc[-1] >= 40_000
    assert curves.groupby("seed")["greedy_return"].count().tolist() == [1, 1, 1]
