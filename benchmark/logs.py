"""What a run has logged and saved, as a table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

RETURN, GREEDY = "charts/episodic_return", "eval/episodic_return"


def records(directory: Path) -> list[dict]:
    """What a log of W&B holds, as dicts."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", directory]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in lines.splitlines()]


def curve(run_dir: Path) -> pd.DataFrame:
    """One row for each point that is logged, with the step, the returns and the seconds so far.

    A run that was resumed has several logs. Each goes on where its checkpoint was: the rows after
    that step are those of the later log. After a kill, a second of rows may be missing there.
    """
    rows = []
    for log in sorted(run_dir.glob("wandb/offline-run-*"), key=lambda x: x.stat().st_mtime):
        items = [x["history"]["item"] for x in records(log) if x["type"] == "history"]
        if items:
            rows = [row for row in rows if row["step"] < items[0]["_step"]]
            before = rows[-1]["seconds"] if rows else 0.0
            for item in items:
                row = {"step": item["_step"], "seconds": before + item["_runtime"]}
                row |= {"training_return": item.get(RETURN), "greedy_return": item.get(GREEDY)}
                rows.append(row)
    return pd.DataFrame(rows)


def final(run_dir: Path, rows: pd.DataFrame) -> dict:
    """The returns at the end, in training and of the greedy policy.

    The first is the mean of the last 20 episodes, as a value-based run logs it, or that of the last
    batches that make up 100 episodes.
    """
    args = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["args"]
    returns = rows["training_return"].dropna()
    count = 1
    if "buffer_size" not in args:  # each logged value is that of a batch
        count = math.ceil(100 / args["num_envs"])
    last = rows.iloc[-1]
    return {
        "steps": int(last["step"]),
        "training_return": returns.tail(count).mean(),
        "greedy_return": last["greedy_return"],
        "seconds": last["seconds"],
    }
