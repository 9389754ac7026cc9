"""Every command of settings.toml over many seeds, on this machine or on a cluster.

pip install -r benchmark/requirements.txt
python -m benchmark.run --task small --seeds 10
python -m benchmark.run --task middle --script dqn --address auto    # on a Ray cluster

A cell is one command with one seed, run as a user would run it. Its result is kept in --out as
soon as it ends, and what is there is not run again: after a stop, the same command goes on. A cell
that fails, or whose machine goes away, starts again from its last checkpoint. On a cluster, every
machine needs this folder at the same path, and --out on a disk that all of them share.
"""

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from ctypes import CDLL
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import ray
import tyro
from tqdm import tqdm

from benchmark.logs import curve, final

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["env_id", "command", "seed"]


@dataclass
class Args:
    task: str = "small"  # a size (small, middle, mujoco, ablation) or the name of one task
    script: str = ""  # only the commands of this script, such as dqn, or one whole command
    seeds: int = 10  # runs of each command
    settings: Path = ROOT / "benchmark/settings.toml"  # tasks, their commands and first seeds
    out: Path = Path("results")  # what is measured, and the runs themselves
    address: str = ""  # of a Ray cluster, "auto" for the one of this machine; "" starts one here
    cpus: float = 1  # for a cell
    gpus: float = 0  # for a cell: 0.25 lets four share one
    retries: int = 3  # of a cell


class Cell(NamedTuple):
    env_id: str
    command: str
    seed: int

    @property
    def name(self) -> str:
        """For its folder."""
        words = f"{self.env_id} {self.command} {self.seed}"
        return "".join(x if x.isalnum() or x in "-." else "_" for x in words)


def cells(tasks: dict[str, dict], task: str, script: str, seeds: int) -> list[Cell]:
    """All commands with the first seed, then all with the second, and so on."""
    chosen = {name: x for name, x in tasks.items() if task in (name, x["size"])}
    if not chosen:
        sizes = dict.fromkeys(x["size"] for x in tasks.values())
        raise SystemExit(f"--task {task}: choose one of {', '.join([*sizes, *tasks])}")
    found = [
        Cell(x["env_id"], command, x["first_seed"] + i)
        for i in range(seeds)
        for x in chosen.values()
        for command in x["commands"]
        if script in ("", command.split(".py")[0], command)
    ]
    if not found:
        raise SystemExit(f"--script {script}: --task {task} has no command of it")
    return list(dict.fromkeys(found))  # two tasks may share a command


def die_with_parent() -> None:
    """Where a worker of Ray is killed, its script stops as well, and W&B writes its last rows."""
    CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def execute(cell: Cell, folder: Path, device: str, commit: str) -> tuple[pd.DataFrame, dict]:
    """Runs the cell in its folder, from its last checkpoint if there is one: its curve and end.

    RuntimeError: with the last line that the script printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script, *flags = shlex.split(cell.command)
    words = [sys.executable, ROOT / script, "--env-id", cell.env_id, "--seed", str(cell.seed)]
    words += [*flags, "--device", device]
    if saved := sorted(folder.glob("runs/*/checkpoint.pt"), key=lambda x: x.stat().st_mtime):
        words += ["--resume", saved[-1]]
    with open(folder / "stderr.txt", "w") as errors:
        options = {"stdout": subprocess.DEVNULL, "stderr": errors, "cwd": folder}
        if sys.platform == "linux":
            options["preexec_fn"] = die_with_parent
        code = subprocess.run(words, **options).returncode
    if code != 0:
        last = (folder / "stderr.txt").read_text().strip().split("\n")[-1]
        raise RuntimeError(f"{last}; see {folder}/stderr.txt")
    (saved,) = folder.glob("runs/*/checkpoint.pt")
    rows = curve(saved.parent)
    versions = f"{commit}, torch {version('torch')}, gymnasium {version('gymnasium')}"
    label = {**cell._asdict(), "version": versions}
    return rows.assign(**label), {**label, **final(saved.parent, rows)}


def keep(out: Path, rows: pd.DataFrame, end: dict) -> None:
    """Adds a cell to the two tables. Each is written beside and renamed, runs.csv last."""
    curves, runs = load(out)
    curves = pd.concat([curves, rows], ignore_index=True)
    runs = pd.concat([runs, pd.DataFrame([end])], ignore_index=True)
    curves.to_parquet(out / "curves.new", compression="zstd")
    (out / "curves.new").replace(out / "curves.parquet")
    runs.sort_values(KEYS).to_csv(out / "runs.new", index=False, float_format="%.6g")
    (out / "runs.new").replace(out / "runs.csv")


def load(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row for each point that was logged, and one for each run; of finished runs alone."""
    if not (out / "runs.csv").exists():
        return pd.DataFrame(columns=KEYS), pd.DataFrame(columns=KEYS)
    runs = pd.read_csv(out / "runs.csv")
    curves = pd.read_parquet(out / "curves.parquet")
    return curves.merge(runs[KEYS]), runs  # a kill between the two files leaves a curve too many


def main(args: Args) -> None:
    tasks = tomllib.loads(args.settings.read_text())
    wanted = cells(tasks, args.task, args.script, args.seeds)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    _, runs = load(out)
    done = set(runs[KEYS].itertuples(index=False, name=None))
    left = [cell for cell in wanted if cell not in done]
    git = ["git", "-C", ROOT]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    commit = head.stdout.strip() + ("-dirty" if changed else "")
    failed = 0
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else the seconds depend on what else runs
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # where workers find this package
    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    ray.init(args.address or "local", runtime_env=environment, **quiet)
    resources = {"num_cpus": args.cpus, "num_gpus": args.gpus}
    found = ray.cluster_resources()
    if args.cpus > found.get("CPU", 0) or args.gpus > found.get("GPU", 0):
        raise SystemExit(f"--cpus {args.cpus} --gpus {args.gpus}: there are {found}")
    task = ray.remote(max_retries=args.retries, retry_exceptions=True, **resources)(execute)
    device = "cuda" if args.gpus else "cpu"
    running = {task.remote(x, out / "cells" / x.name, device, commit): x for x in left}
    with tqdm(total=len(wanted), initial=len(wanted) - len(left), unit=" runs") as progress:
        while running:
            (ready,), _ = ray.wait(list(running))
            cell = running.pop(ready)
            try:
                rows, end = ray.get(ready)
            except ray.exceptions.RayError as error:
                failed += 1
                reason = str(error).strip().split("\n")[-1]
                progress.write(f"{cell.env_id}: {cell.command} --seed {cell.seed}: {reason}")
            else:
                keep(out, rows, end)
                script = cell.command.split()[0]
                progress.set_postfix_str(f"{script}, {cell.env_id}: {end['greedy_return']:.1f}")
            progress.update()
    ray.shutdown()
    print(f"in {out}: runs.csv and curves.parquet")
    if failed:
        raise SystemExit(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
