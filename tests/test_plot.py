"""benchmark/plot.py, and whether the pages of results are those of the committed measurements."""

import re
import tomllib

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, same_picture

from benchmark.plot import (
    Args,
    aggregate,
    chosen,
    figure,
    file_name,
    fill,
    glance,
    interval,
    main,
    measured,
    save,
    sections,
    table,
)
from benchmark.run import load

TASKS = tomllib.loads((ROOT / "benchmark/settings.toml").read_text())
PAGE = ROOT / "docs/results.md"
CURVES, RUNS = load(ROOT / "benchmark/results")
TASK = {"env_id": "A-v0", "first_seed": 5, "solved": 2, "commands": ["dqn.py", "naf.py --tau 1"]}
TASK |= {"random": 1, "published": 9, "source": "somebody"}


def few(*returns, first=5):
    label = {"env_id": "A-v0", "command": "dqn.py", "training_return": 1.25}
    rows = [
        {**label, "seed": first + i, "greedy_return": x, "steps": 1500 + i, "seconds": 60.0 * i}
        for i, x in enumerate(returns)
    ]
    return pd.DataFrame(rows)


def test_an_interval_is_that_of_the_bootstrap():
    values = np.random.default_rng(3).normal(5, 2, (400, 1))
    mean, low, high = interval(np.hstack([values, values + 10]))
    error = 1.96 * values.std() / 20  # of the mean of 400
    assert mean[0] == pytest.approx(values.mean())
    assert high[0] - mean[0] == pytest.approx(error, rel=0.1)
    assert mean[0] - low[0] == pytest.approx(error, rel=0.1)
    assert low[1] == pytest.approx(low[0] + 10)
    assert interval(np.array([[7.0]])) == (7, 7, 7)


def test_a_table_by_hand():
    lines = table(few(1.0, 2.0, 3.0), TASK).split("\n")
    greedy = r"2\.0 \[1\.\d, [23]\.\d\] \| 1\.0; 2 of 3 solved"
    assert re.fullmatch(rf"\| `dqn.py` \| 5 to 7 \| {greedy} \| 1.2 \| 2k \| 60 \|", lines[2])
    assert lines[3].startswith("| `naf.py --tau 1` | none yet |")
    assert lines[-3:] == ["Solved: a greedy return of 2 or more.", "", "Published: 9 (somebody)."]


def test_a_table_has_the_seeds_of_its_task_alone_and_says_which_are_missing():
    other = few(50.0, first=1)
    assert table(pd.concat([few(1.0, 2.0), other]), TASK) == table(few(1.0, 2.0), TASK)
    assert "| 5 to 7, 1 missing | 2.0 [" in table(few(1.0, 2.0, 3.0).drop(1), TASK)
    assert "| 5 | 4.0 | 4.0; 1 of 1 solved |" in table(few(4.0), TASK)


def test_a_curve_is_the_mean_of_the_seeds():
    rows = {"env_id": "A-v0", "command": "dqn.py"}
    points = [(5, 0, 0.0), (5, 10, 10.0), (6, 0, 2.0), (6, 20, 22.0)]
    curves = pd.DataFrame(
        [{**rows, "seed": a, "step": b, "training_return": c} for a, b, c in points]
    )
    (line,) = figure(curves, "name", TASK).axes[0].get_lines()
    x, y = line.get_data()
    assert x[0] == 0 and x[-1] == 10  # as far as all seeds go
    assert np.allclose(y, x + 1)


def test_an_aggregate_by_hand():
    """Of 8 scores from 0 to 1.75 the middle half has the mean 0.875; b is no task of naf.py.

    Of the scores of a task with more runs, only as many count as the other task has. A task of
    which a script has four runs does not count.
    """
    first = few(*np.arange(1.0, 17.0, 2.0))
    tasks = {"a": TASK, "b": TASK | {"env_id": "B-v0", "commands": ["dqn.py"]}}
    runs = pd.concat([first, first.assign(command="naf.py --tau 1"), first.assign(env_id="B-v0")])
    lines = aggregate(runs, tasks, ["dqn.py", "naf.py"]).split("\n")
    assert lines[0] == "| on A-v0 | middle half, 8 seeds each [95 %] | all |"
    match = re.fullmatch(r"\| `naf.py` \| 0\.875 \[(0\.\d+), (1\.\d+)\] \| 0\.875 \|", lines[3])
    assert float(match[1]) < 0.7 and float(match[2]) > 1.1 and lines[2][10:] == lines[3][10:]
    two = runs.assign(greedy_return=runs["greedy_return"] + 8 * (runs["env_id"] == "B-v0"))
    more = few(*[801.0] * 8, first=13)
    lines = aggregate(pd.concat([two, more]), tasks, ["dqn.py"]).split("\n")
    assert lines[0] == "| on A-v0, B-v0 | middle half, 8 seeds each [95 %] | all |"
    assert "| 1.375 [" in lines[2] and lines[2].endswith("| 26.156 |")  # (50.4375 + 1.875) / 2
    five = pd.concat([first, first.head(5).assign(env_id="B-v0")])
    assert "A-v0, B-v0 | middle half, 5 seeds" in aggregate(five, tasks, ["dqn.py"])
    assert "on A-v0 | middle half, 8 seeds" in aggregate(five.iloc[:-1], tasks, ["dqn.py"])


def test_a_glance_by_hand():
    """First commands alone, of the seeds that count; two tasks of one env share a line."""
    more = {"commands": ["dqn.py", "dqn.py --double-q", "naf.py"], "published": 12}
    tasks = {"a": TASK, "b": TASK | more, "c": TASK | {"env_id": "x:C/D-v1", "published": -3}}
    tasks["ablation"] = {"env_id": "E-v0", "first_seed": 5, "commands": ["dqn.py"]}
    runs = pd.concat([few(50.0, first=4), few(1.0, 2.0), few(8.0).assign(env_id="x:C/D-v1")])
    runs = pd.concat([runs, few(70.0).assign(command="dqn.py --double-q")])
    lines = glance(runs, tasks).split("\n")
    assert lines[0].startswith("| | random | `dqn.py` | `ddpg_continuous.py` |")
    assert lines[0].count("|") == lines[1].count("|") == 11
    assert lines[2] == "| [A-v0](#a-v0) | 1.0 | 1.5 |  |  |  |  |  |  | 12.0 |"
    assert lines[3] == "| [C/D-v1](#cd-v1) | 1.0 | 8.0 |  |  |  |  |  |  | -3.0 |"
    assert len(lines) == 4


def test_a_page_is_filled_between_its_marks():
    page = "a\n<!-- results: one -->\n\nold\n\n<!-- end -->\nb"
    new = fill(page, {"one": "new"})
    assert new == page.replace("old", "new") and fill(new, {"one": "new"}) == new
    for texts in ({"one": "", "two": ""}, {}):
        with pytest.raises(ValueError, match="marks in one only"):
            fill(page, texts)


def test_the_tables_of_the_page_are_those_of_the_results():
    page = PAGE.read_text()
    assert fill(page, sections(RUNS, TASKS)) == page, "stale: run python -m benchmark.plot"


def test_each_task_with_results_has_its_figure_on_the_page():
    text = PAGE.read_text()
    for name, task in TASKS.items():
        path = f"figures/results/{file_name(name)}.png"
        assert (PAGE.parent / path).exists() == measured(RUNS, task) == (f"({path})" in text), name


@pytest.mark.parametrize("name", [x for x in TASKS if measured(RUNS, TASKS[x])])
def test_the_figures_of_the_page_are_those_of_the_results(name, tmp_path):
    path, drawn = PAGE.parent / f"figures/results/{file_name(name)}.png", tmp_path / "drawn.png"
    save(figure(CURVES, name, TASKS[name]), drawn)
    assert same_picture(path, drawn), "stale: run python -m benchmark.plot"
    later = TASKS[name] | {"first_seed": TASKS[name]["first_seed"] + 1}
    save(figure(CURVES, name, later), drawn)
    assert not same_picture(path, drawn)


def test_all_results_belong_to_a_command_of_the_settings():
    known = {(x["env_id"], command) for x in TASKS.values() for command in x["commands"]}
    assert set(RUNS[["env_id", "command"]].itertuples(index=False, name=None)) <= known
    assert CURVES.groupby(["env_id", "command", "seed"]).ngroups == len(RUNS)


def test_the_readme_has_the_results_of_the_defaults():
    for script, count, worst in re.findall(
        r"\| \[`(\w+\.py)`\].*\| (\d+) \((-?[\d.]+)\) \|", (ROOT / "README.md").read_text()
    ):
        (own,) = [
            chosen(RUNS, x, script)
            for x in TASKS.values()
            if script in x["commands"] and x["size"] == "small"
        ]
        solved = 475 if own["env_id"].iloc[0] == "CartPole-v1" else -165
        assert len(own) == 20 and (own["greedy_return"] >= solved).sum() == int(count), script
        assert own["greedy_return"].min() == pytest.approx(float(worst), abs=0.06), script


def test_your_own_results_are_printed(tmp_path, capsys):
    settings = tmp_path / "settings.toml"
    settings.write_text('[t]\nenv_id = "A-v0"\nfirst_seed = 5\ncommands = ["dqn.py"]\n')
    rows = few(1.0, 2.0)
    rows.to_csv(tmp_path / "runs.csv", index=False)
    rows.assign(step=[0, 0]).to_parquet(tmp_path / "curves.parquet")
    main(Args(results=tmp_path, settings=settings, page=""))
    assert "| `dqn.py` | 5 to 6 |" in capsys.readouterr().out
    assert (tmp_path / "figures/t.png").exists()
