"""The tables and figures of docs/results.md, from runs.csv and curves.parquet.

python -m benchmark.plot                               # into the page, from benchmark/results
python -m benchmark.plot --results results --page ""   # your own: prints the tables
"""

import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.ticker import EngFormatter
from PIL import Image
from scipy.stats import bootstrap, trim_mean

from benchmark.run import ROOT, load

COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 1))]
FAMILIES = [["reinforce.py", "pg_baseline.py", "offpolicy_pg.py"]]
FAMILIES += [["ddpg_continuous.py", "naf.py", "cem_q.py"]]
SCRIPTS = ["dqn.py", *FAMILIES[1], *FAMILIES[0]]
HEAD = """| command | seeds | greedy return [95 %] | worst | training return | env steps | seconds |
|---|---|---|---|---|---|---|
"""


@dataclass
class Args:
    results: Path = ROOT / "benchmark/results"  # --out of benchmark.run
    settings: Path = ROOT / "benchmark/settings.toml"
    page: str = str(ROOT / "docs/results.md")  # "" prints the tables instead


def interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs and its 95 % bootstrap interval, for each point; scores are (runs, points)."""
    mean = scores.mean(axis=0)
    if len(scores) == 1:
        return mean, mean, mean
    found = bootstrap((scores,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
    return mean, *found.confidence_interval


def number(value: float) -> str:
    """To a tenth, or to a thousandth where returns are small."""
    digits = 1 if abs(value) >= 1 or value == 0 else 3
    text = f"{value:.{digits}f}"
    return text.removesuffix(".0") if abs(value) >= 100 else text


def chosen(rows: pd.DataFrame, task: dict, command: str) -> pd.DataFrame:
    """Those of a command of the task, from its first seed on."""
    own = (rows["env_id"] == task["env_id"]) & (rows["command"] == command)
    return rows[own & (rows["seed"] >= task["first_seed"])]


def table(runs: pd.DataFrame, task: dict) -> str:
    """Markdown, one line a command; rows that are missing say so."""
    lines, threshold = [], task.get("solved")
    for command in task["commands"]:
        own = chosen(runs, task, command)
        name = f"`{command}`"
        if own.empty:
            lines.append(f"| {name} | none yet | | | | | |")
            continue
        greedy = own["greedy_return"].to_numpy()
        mean, low, high = (number(x.item()) for x in interval(greedy[:, None]))
        first, last = own["seed"].min(), own["seed"].max()
        seeds = f"{first} to {last}" if last > first else str(first)
        if missing := last - first + 1 - len(own):
            seeds += f", {missing} missing"
        worst = number(greedy.min())
        if threshold is not None:
            worst += f"; {(greedy >= threshold).sum()} of {len(own)} solved"
        steps = f"{round(own['steps'].median() / 1000):,}k"
        seconds = f"{own['seconds'].median():,.0f}"
        cells = [name, seeds, f"{mean} [{low}, {high}]" if last > first else mean, worst]
        cells += [number(own["training_return"].mean()), steps, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    text = HEAD + "\n".join(lines)
    if threshold is not None:
        text += f"\n\nSolved: a greedy return of {threshold} or more."
    if "published" in task:
        text += f"\n\nPublished: {task['published']} ({task['source']})."
    return text


def glance(runs: pd.DataFrame, tasks: dict[str, dict]) -> str:
    """A line an env: mean greedy return of the first command of each script, and the published."""
    rows = {}
    for task in tasks.values():
        if "published" in task:
            name = task["env_id"].split(":")[-1]
            row = rows.setdefault(name, {"random": task["random"], "published": -np.inf})
            row["published"] = max(row["published"], task["published"])
            for command in task["commands"]:
                own = chosen(runs, task, command)
                if len(own):
                    row.setdefault(f"`{command.split()[0]}`", own["greedy_return"].mean())
    head = ["random", *(f"`{script}`" for script in SCRIPTS), "published"]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, row in rows.items():
        link = f"[{name}](#{name.lower().replace('/', '')})"
        cells = [number(row[x]) if x in row else "" for x in head]
        lines.append(f"| {link} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aggregate(runs: pd.DataFrame, tasks: dict[str, dict], scripts: list[str]) -> str:
    """Interquartile mean, and mean, of the tasks of which each script has five seeds or more.

    A score is that of a first command: 0 for random actions, 1 for the published figure. Each task
    counts alike: the interquartile mean is over the first n runs of each, where n is what the
    shortest has. The interval is a bootstrap's of the seeds of each task (Agarwal et al., 2021).
    """
    found = {script: {} for script in scripts}
    for name, task in tasks.items():
        if "published" in task:
            for script in scripts:
                commands = [x for x in task["commands"] if x.split()[0] == script]
                if commands and len(own := chosen(runs, task, commands[0])) >= 5:
                    score = (own["greedy_return"] - task["random"]).to_numpy()
                    found[script][name] = score / (task["published"] - task["random"])
    shared = [name for name in tasks if all(name in x for x in found.values())]
    count = min(len(x[name]) for x in found.values() for name in shared)
    lines = []
    for script, scores in found.items():
        samples = [scores[name][:count] for name in shared]
        options = {"n_resamples": 2000, "method": "percentile", "rng": 0}
        low, high = bootstrap(samples, iqm, **options).confidence_interval
        mean = np.mean([scores[name].mean() for name in shared])
        lines.append(f"| `{script}` | {iqm(*samples):.3f} [{low:.3f}, {high:.3f}] | {mean:.3f} |")
    where = ", ".join(tasks[name]["env_id"] for name in shared)
    head = f"| on {where} | middle half, {count} seeds each [95 %] | all |\n|---|---|---|\n"
    return head + "\n".join(lines)


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: of the middle half of all scores."""
    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def section(runs: pd.DataFrame, name: str, task: dict) -> str:
    """The table, and the figure if there is one."""
    text = table(runs, task)
    if not measured(runs, task):
        return text
    return f"{text}\n\n![{name}: training return](figures/results/{file_name(name)}.png)"


def measured(runs: pd.DataFrame, task: dict) -> bool:
    return any(len(chosen(runs, task, command)) for command in task["commands"])


def file_name(task: str) -> str:
    return re.sub(r"\W+", "-", task).strip("-").lower()


def sections(runs: pd.DataFrame, tasks: dict[str, dict]) -> dict[str, str]:
    """What stands between the marks of the page."""
    hours = runs["seconds"].sum() / 3600
    texts = {"all": f"{len(runs)} runs, which took {hours:.1f} hours of one CPU core."}
    texts["glance"] = glance(runs, tasks)
    texts["aggregate"] = "\n\n".join(aggregate(runs, tasks, x) for x in FAMILIES)
    return texts | {name: section(runs, name, task) for name, task in tasks.items()}


def fill(page: str, texts: dict[str, str]) -> str:
    """Puts each text between its two marks.

    ValueError: if the page lacks the marks of a text, or has marks without one.
    """
    marks = re.findall("<!-- results: (.+?) -->", page)
    if sorted(marks) != sorted(texts):
        raise ValueError(f"marks in one only: {sorted(set(marks) ^ set(texts))}")
    for name, text in texts.items():
        start = f"<!-- results: {name} -->\n"
        before, rest = page.split(start)
        _, after = rest.split("<!-- end -->", maxsplit=1)
        page = f"{before}{start}\n{text}\n\n<!-- end -->{after}"
    return page


def figure(curves: pd.DataFrame, name: str, task: dict) -> plt.Figure:
    """Training return against env steps, mean over seeds, with its 95 % bootstrap interval."""
    picture, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for command, color, style in zip(task["commands"], COLORS, STYLES):
        own = chosen(curves, task, command).dropna(subset="training_return")
        seeds = [run.sort_values("step") for _, run in own.groupby("seed")]
        if not seeds:
            continue
        first = max(run["step"].iloc[0] for run in seeds)
        last = min(run["step"].iloc[-1] for run in seeds)
        steps = np.linspace(first, last, 60)
        scores = np.array([np.interp(steps, x["step"], x["training_return"]) for x in seeds])
        mean, low, high = interval(scores)
        label = textwrap.fill(command, 90, break_on_hyphens=False)
        axes.plot(steps, mean, color=color, linestyle=style, label=label)
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="env steps", ylabel="training return", title=name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    columns = 2 if max(map(len, task["commands"])) < 50 else 1
    picture.legend(loc="outside lower center", ncols=columns, fontsize="small")
    return picture


def save(picture: plt.Figure, path: Path) -> None:
    """As a PNG of 128 colours, a third of the size."""
    picture.set_dpi(130)
    picture.canvas.draw()
    pixels = Image.fromarray(np.asarray(picture.canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(128).save(path, optimize=True)
    plt.close(picture)


def main(args: Args) -> None:
    curves, runs = load(args.results)
    tasks = tomllib.loads(args.settings.read_text())
    if args.page:
        page, folder = Path(args.page), Path(args.page).parent / "figures/results"
        page.write_text(fill(page.read_text(), sections(runs, tasks)))
    else:
        folder = args.results / "figures"
        for name, task in tasks.items():
            print(f"**{name}**\n\n{table(runs, task)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        if measured(runs, task):
            save(figure(curves, name, task), folder / f"{file_name(name)}.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
