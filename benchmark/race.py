"""Seconds until a task is learned: our scripts and the libraries people use, in turn.

python -m venv peers && peers/bin/pip install -r benchmark/peers/requirements.txt
python -m benchmark.race --python peers/bin/python

A run ends at its third greedy evaluation in a row that passes. Every evaluation is kept in --out,
and what is there is not run again; so a second call only prints the tables.
"""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import tyro

from benchmark.contestant import OURS, PASS

SYSTEMS = {
    "CartPole-v1": ["offpolicy_pg.py", "pg_baseline.py", "reinforce.py", "SB3 PPO", "SBX PPO"]
    + ["dqn.py", "SB3 DQN", "SBX DQN"],
    "Pendulum-v1": ["ddpg_continuous.py", "naf.py", "SB3 DDPG", "SBX DDPG"],
}
PEERS = {"offpolicy_pg.py": "PPO", "pg_baseline.py": "PPO", "reinforce.py": "PPO", "dqn.py": "DQN"}
PEERS |= {"ddpg_continuous.py": "DDPG", "naf.py": "DDPG"}
FIELDS = ["env_id", "system", "seed", "step", "return", "whole", "training"]


@dataclass
class Args:
    python: str = "peers/bin/python"  # that of the environment with the peers
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    out: Path = Path("benchmark/race.csv")
    timeout: float = 600  # seconds that a run may take


def run(python: str, env_id: str, system: str, seed: int, timeout: float) -> list[dict]:
    """The evaluations of one run; too long a run ends as one that does not learn."""
    command = [sys.executable if system in OURS else python, "-m", "benchmark.contestant"]
    command += [system, env_id, str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BORN": str(time.time())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not rows:
        raise SystemExit(f"no evaluation by: {' '.join(command)}")
    return [{"env_id": env_id, "system": system, "seed": seed, **row} for row in rows]


def passes(rows: list[dict], threshold: float) -> tuple[dict | None, dict | None]:
    """The first evaluation that passes, and the third in a row."""
    passed = [float(row["return"]) >= threshold for row in rows]
    first = passed.index(True) if any(passed) else None
    third = next((i for i in range(2, len(rows)) if all(passed[i - 2 : i + 1])), None)
    return tuple(None if i is None else rows[i] for i in (first, third))


def column(rows: list[dict | None], key: str) -> np.ndarray:
    """Of the rows that `passes` found, one a seed."""
    return np.array([np.inf if row is None else float(row[key]) for row in rows])


def spread(values: np.ndarray, digits: int = 1, never: str = "never") -> str:
    """The median of the seeds, the lowest and the highest; what never happens is inf."""
    numbers = (np.median(values), values.min(), values.max())
    texts = [never if np.isinf(x) else f"{x:,.{digits}f}" for x in numbers]
    return "{} ({} to {})".format(*texts)


def main(args: Args) -> None:
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    rows = list(csv.DictReader(lines))
    done = {(row["env_id"], row["system"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        for env_id, systems in SYSTEMS.items():
            for system in systems:
                if (env_id, system, seed) not in done:
                    rows += run(args.python, env_id, system, seed, args.timeout)
                    with args.out.open("w", newline="") as file:
                        writer = csv.DictWriter(file, FIELDS)
                        writer.writeheader()
                        writer.writerows(rows)
    for env_id, systems in SYSTEMS.items():
        found = {}
        for system in systems:
            own = [row for row in rows if row["env_id"] == env_id and row["system"] == system]
            own.sort(key=lambda row: int(row["seed"]))
            runs = [list(group) for _, group in groupby(own, key=lambda row: int(row["seed"]))]
            first, third = zip(*(passes(x, PASS[env_id]) for x in runs))
            found[system] = {
                "whole": column(first, "whole"),
                "training": column(first, "training"),
                "env steps": column(first, "step"),
                "three in a row, whole": column(third, "whole"),
            }
        print(f"\n| {env_id} | {' | '.join(found[systems[0]])} |\n|---|---|---|---|---|")
        for system, columns in found.items():
            cells = [spread(x, 0 if name == "env steps" else 1) for name, x in columns.items()]
            print(f"| {system} | {' | '.join(cells)} |")
        both = ("whole", "three in a row, whole")
        print(f"\n| {env_id}, how many times as fast | {' | '.join(both)} |\n|---|---|---|")
        for ours in (x for x in systems if x in OURS):
            for peer in (f"SB3 {PEERS[ours]}", f"SBX {PEERS[ours]}"):
                ratios = [found[peer][x] / found[ours][x] for x in both]
                cells = [spread(x, never="∞") for x in ratios]
                print(f"| {ours} against {peer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
