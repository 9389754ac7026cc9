"""Runs that survive: seeds, resume, signals, kills, bad input, full disks; in real processes."""

import itertools
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import tyro
from conftest import MODULES, ROOT, SCRIPTS, VALUE_BASED, VALUE_MODULES, records, run, start
from envs import REFUSED

import cem_q
import dqn

ALL = SCRIPTS + VALUE_BASED
FREE = {"total_timesteps", "device", "num_threads", "eval_episodes", "capture_video"}
FREE |= {"checkpoint_frequency", "resume", "wandb_mode", "wandb_project"}


@pytest.fixture(params=MODULES + VALUE_MODULES, ids=ALL)
def module(request):
    return request.param


def settings(module, **changes):
    """Those of a run of a second."""
    small = {"total_timesteps": 400, "num_envs": 4, "eval_episodes": 3, "wandb_mode": "disabled"}
    if module in VALUE_MODULES:
        small |= {"learning_starts": 100, "batch_size": 16, "buffer_size": 1000}
    return {**small, **changes}


def flags(name, **changes):
    """The same in a shell."""
    values = settings(sys.modules[name], wandb_mode="offline", **changes)
    words = ([f"--{key.replace('_', '-')}", str(value)] for key, value in values.items())
    return list(itertools.chain(*words))


def trained(module, **changes):
    """The checkpoint of a run, its path and its returns."""
    before = set(Path("runs").glob("*"))
    args = module.Args(**settings(module, **changes))
    returns = module.train(args)
    (run_dir,) = [Path(args.resume).parent] if args.resume else set(Path("runs").glob("*")) - before
    path = run_dir / "checkpoint.pt"
    return torch.load(path, weights_only=True), path, returns


def same(one, two):
    """Equality of nested states, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def states(checkpoint):
    return {key: value for key, value in checkpoint.items() if key != "args"}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_run_bit_for_bit(module, env_id):
    if module in VALUE_MODULES and (module is dqn) != (env_id == "CartPole-v1"):
        pytest.skip("no such actions")
    torch.manual_seed(77)
    one, _, returns = trained(module, env_id=env_id, seed=5)
    torch.manual_seed(78)
    two, _, again = trained(module, env_id=env_id, seed=5)
    other, _, _ = trained(module, env_id=env_id, seed=6)
    assert torch.equal(returns, again) and same(states(one), states(two))
    network = "policy" if "policy" in one else "q_network"
    for name in one[network].keys() - {"log_std"}:
        assert not torch.equal(one[network][name], other[network][name])


def test_all_runs_are_evaluated_from_the_same_states(module, monkeypatch):
    starts, make_envs = [], module.make_envs

    def spy(env_id, num_envs, **settings):
        envs = make_envs(env_id, num_envs, **settings)
        if num_envs == 3:
            reset = envs.reset
            envs.reset = lambda **x: starts.append(torch.tensor(reset(**x)[0])) or reset(**x)
        return envs

    monkeypatch.setattr(module, "make_envs", spy)
    trained(module, seed=1)
    trained(module, seed=2)
    assert torch.equal(*starts) and len(starts[0].unique(dim=0)) == 3


# Resume


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("own", [{}, {"env_id": "Pendulum-v1", "num_envs": 2}])
def test_n_and_n_steps_are_2n_steps_bit_for_bit(name, own):
    module = sys.modules[name]
    whole, _, returns = trained(module, total_timesteps=1200, **own)
    half, path, _ = trained(module, total_timesteps=500, **own)
    torch.manual_seed(5)
    resumed, _, again = trained(module, total_timesteps=1200, resume=str(path), **own)
    assert half["global_step"] < resumed["global_step"] == whole["global_step"]
    assert same(states(resumed), states(whole)) and torch.equal(returns, again)


def test_a_finished_run_is_evaluated_again_and_left_as_it_was(module):
    _, path, returns = trained(module)
    before = path.read_bytes()
    _, _, again = trained(module, resume=str(path))
    assert path.read_bytes() == before
    torch.testing.assert_close(returns, again, rtol=0.2 if module is cem_q else 0, atol=0)
    assert len(list(Path("runs").iterdir())) == 1
    _, _, more = trained(module, resume=str(path), eval_episodes=7)
    assert len(more) == 7


@pytest.mark.parametrize("name", VALUE_BASED)
def test_value_based_runs_go_on_with_all_but_the_episodes_under_way(name, monkeypatch):
    module, starts = sys.modules[name], []
    saved, path, _ = trained(module)
    start_run = module.start_run

    def spy(args, modules):
        result = start_run(args, modules)
        now = {key: value.state_dict() for key, value in modules.items()}
        starts.append((result, torch.get_rng_state(), pickle.loads(pickle.dumps(now))))
        return result

    monkeypatch.setattr(module, "start_run", spy)
    resumed, _, _ = trained(module, total_timesteps=800, resume=str(path))
    ((run_dir, step), rng, modules) = starts[0]
    assert run_dir == path.parent and step == saved["global_step"]
    assert torch.equal(rng, saved["rng"])
    assert same(modules, {key: saved[key] for key in modules})
    assert modules.keys() == saved.keys() - {"args", "global_step", "rng"}
    assert resumed["global_step"] >= 800
    assert resumed["buffer"]["count"] == resumed["global_step"]


def parse(module, *words):
    """What the script makes of its command line."""
    words = list(map(str, words))
    default, _ = tyro.cli(module.saved_args, args=words, return_unknown_args=True, add_help=False)
    return tyro.cli(module.Args, args=words, default=default)


def refused(module, capsys, *words):
    """The message, in one line."""
    with pytest.raises(SystemExit) as stop:
        parse(module, *words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in out + err
    return re.sub(r"[│╭╮╰╯─\s]+", " ", out + err)


def test_what_is_not_given_stays_as_it_was_and_what_may_change_does(module, capsys):
    _, path, _ = trained(module, gamma=0.5, seed=3)
    args = parse(module, "--resume", path, "--total-timesteps", 900, "--eval-episodes", 100)
    assert (args.gamma, args.seed, args.num_envs) == (0.5, 3, 4)
    assert (args.total_timesteps, args.eval_episodes, args.resume) == (900, 100, str(path))
    assert parse(module, f"--resume={path}", "--wandb-mode", "offline").wandb_mode == "offline"
    assert parse(module, "--resume", path, "--gamma", 0.5).gamma == 0.5
    elsewhere, state = path.with_name("elsewhere.pt"), torch.load(path, weights_only=True)
    torch.save(state | {"args": state["args"] | {"device": "mps"}}, elsewhere)
    assert parse(module, "--resume", elsewhere, "--device", "cpu").gamma == 0.5
    for field in fields(module.Args):
        value = getattr(args, field.name)
        if isinstance(value, str):
            continue
        other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2}
        other = other[type(value)](value)
        if field.name in FREE:
            assert module.Args(**{**vars(args), field.name: other}).gamma == 0.5
            continue
        with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')} must be"):
            module.Args(**{**vars(args), field.name: other})
    assert "--gamma must be 0.5" in refused(module, capsys, "--resume", path, "--gamma", 0.9)


@pytest.fixture(scope="module")
def no_checkpoints(tmp_path_factory):
    """Files that are no checkpoint, by kind."""
    folder = tmp_path_factory.mktemp("files")
    whole = folder / "whole"
    torch.save({"args": {}, "x": torch.zeros(1000)}, whole)
    (folder / "truncated").write_bytes(whole.read_bytes()[:2000])
    (folder / "empty").touch()
    (folder / "text").write_text("hello")
    (folder / "directory").mkdir()
    torch.save([1, 2], folder / "a list")
    torch.save({"q_network": {}}, folder / "weights alone")
    torch.save(torch.nn.Linear(1, 1), folder / "a module")
    (folder / "a pickle").write_bytes(pickle.dumps({"args": 1}, protocol=2))
    with zipfile.ZipFile(folder / "a zip", "w") as file:
        file.writestr("a", "b")
    return [*folder.iterdir(), folder / "nothing"]


def test_what_is_no_checkpoint_is_refused(module, no_checkpoints, capsys, tmp_path):
    for path in no_checkpoints:
        message = refused(module, capsys, "--resume", path)
        assert "--resume" in message and f"checkpoint of {module.__name__}.py" in message, path
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_script_or_env_is_refused(module, capsys):
    _, path, _ = trained(module)
    before = path.read_bytes()
    for other in MODULES + VALUE_MODULES:
        if other is not module:
            assert f"of {other.__name__}.py" in refused(other, capsys, "--resume", path)
    other = "Acrobot-v1" if "CartPole" in module.__doc__ else "MountainCarContinuous-v0"
    message = refused(module, capsys, "--resume", path, "--env-id", other)
    assert "--env-id must be" in message and path.read_bytes() == before


# Bad input


def bad(module):
    """(flags, a word of the message) of all kinds, from the fields themselves."""
    hints = get_type_hints(module.Args)
    for field in fields(module.Args):
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        if kind is int:
            wrong = ["1.5", "many", "-1", str(2**40 + 1)] + ["0"] * (field.name != "seed")
        elif kind is float:
            wrong = ["-0.1", "1.1", "nan", "inf", "many"]
        elif kind is bool:
            wrong = ["maybe"]
        elif get_origin(kind) is Literal:
            wrong = ["nonsense", get_args(kind)[0].upper()]
        else:
            wrong = []
        yield from (([flag, value], flag if kind is not bool else "maybe") for value in wrong)
        if kind is not bool:
            yield [flag], flag
    for env_id in ["NoSuchEnv-v0", "CartPole-v99", "what is this", "nosuchmodule:Env-v0", "a:b:c"]:
        yield ["--env-id", env_id], env_id
    yield from ((["--env-id", f"envs:{env_id}"], env_id) for env_id in REFUSED)
    yield ["--learning-rat", "1"], "--learning-rat"
    yield ["CartPole-v1"], "CartPole-v1"
    env_id = "envs:OneStep-v0" if module in [*MODULES, dqn] else "envs:OneStepBox-v0"
    yield ["--env-id", env_id, "--capture-video"], "render"
    if not torch.cuda.is_available():
        yield ["--device", "cuda"], "--device cuda"
    if module in VALUE_MODULES:
        wrong = "Pendulum-v1" if module is dqn else "CartPole-v1"
        yield ["--env-id", wrong], wrong
        yield ["--batch-size", "999", "--buffer-size", "99"], "--buffer-size"
        yield ["--learning-starts", "9", "--total-timesteps", "9"], "--learning-starts"
    if module is cem_q:
        yield ["--maximizer", "grid", "--bins", "10001"], "10000"
        yield ["--maximizer", "grid", "--bins", "1"], "--bins 1"
        yield ["--num-elites", "99"], "--num-samples"
        yield ["--maximizer", "cmaes", "--num-samples", "1"], "--num-samples"


def test_bad_input_is_one_message_and_exit_code_2(module, capsys, tmp_path):
    kinds = list(bad(module))
    assert len(kinds) >= 60
    for words, text in kinds:
        assert text in refused(module, capsys, *words), words
    assert list(tmp_path.iterdir()) == []


def test_settings_from_python_are_checked_by_the_type_of_their_field(module):
    assert module.Args(gamma=1).gamma == 1 and module.Args(learning_rate=0).learning_rate == 0
    with pytest.raises(ValueError, match="--gamma"):
        module.Args(gamma=2)


@pytest.mark.parametrize("name", ["reinforce", "dqn"])
def test_bad_input_from_a_shell(name, tmp_path):
    for words in (["--env-id", "envs:DictObs-v0"], ["--resume", "nothing"]):
        result = run(name, *words, cwd=tmp_path)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert words[0] in result.stderr and list(tmp_path.iterdir()) == []


def test_a_video_of_the_greedy_policy_is_kept_and_logged(module):
    own = {"capture_video": True, "wandb_mode": "offline", "wandb_project": "elsewhere"}
    _, path, _ = trained(module, **own)
    (video,) = path.parent.glob("videos/*.mp4")
    assert video.stat().st_size > 1000
    (part,) = path.parent.glob("wandb/offline-run-*")
    assert list(part.glob("files/media/videos/eval/*.mp4"))
    (log,) = [record["run"] for record in records(part) if record["type"] == "run"]
    assert (log["project"], log["display_name"]) == ("elsewhere", path.parent.name)


def test_a_video_without_moviepy_is_refused(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "--capture-video: import of moviepy" in refused(module, capsys, "--capture-video")


# Envs at the edge


@pytest.mark.parametrize("own", [{"num_envs": 1}, {"num_envs": 3}])
@pytest.mark.parametrize("env_id", ["OneStep", "OneStepBox", "Endless", "EndlessBox"])
def test_envs_at_the_edge(module, env_id, own):
    """One number to observe, in float64; integer rewards; an end at the first step or never."""
    if module in VALUE_MODULES and (module is dqn) == env_id.endswith("Box"):
        pytest.skip("no such actions")
    own |= {"total_timesteps": 200}
    checkpoint, _, returns = trained(module, env_id=f"envs:{env_id}-v0", **own)
    assert (returns == (1 if "OneStep" in env_id else 30)).all()
    if "buffer" in checkpoint:
        count = checkpoint["buffer"]["count"]
        assert count == checkpoint["global_step"]
        ends = checkpoint["buffer"]["terminations"][:count]
        assert (ends == float("OneStep" in env_id)).all()


@pytest.mark.parametrize("name", ["reinforce", "naf"])
def test_an_env_of_the_users_own(name, tmp_path):
    result = run(name, *flags(name, env_id="envs:CountingBox-v0"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"envs-CountingBox-v0__{name}__1__")


# What goes wrong in a run


def test_parameters_that_are_not_finite_are_not_saved(module, tmp_path, monkeypatch):
    _, path, _ = trained(module)
    before = path.read_bytes()
    start_run, signals = module.start_run, []

    def spoil(args, modules):
        result, step = start_run(args, modules), modules["optimizer"].step
        network = modules.get("policy") or modules["q_network"]

        def overflow():
            step()
            next(network.parameters()).data[0] = float("nan")
            signals.append(signal.SIGTERM)

        modules["optimizer"].step = overflow
        return result

    monkeypatch.setattr(module, "start_run", spoil)
    monkeypatch.setattr(module, "signals", signals)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+"):
        trained(module, resume=str(path), total_timesteps=9999)
    assert path.read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(module, monkeypatch):
    name = "policy_loss" if module in MODULES else "td_target"
    calls, original = [], getattr(module, name)

    def breaks_later(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) > 60 else 1.0)

    monkeypatch.setattr(module, name, breaks_later)
    with pytest.raises(FloatingPointError, match="step"):
        trained(module, num_envs=2, total_timesteps=100_000, checkpoint_frequency=1)
    (path,) = Path("runs").glob("*/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    network = checkpoint["policy" if "policy" in checkpoint else "q_network"]
    assert all(parameter.isfinite().all() for parameter in network.values())


def test_a_loss_that_is_not_finite_stops_prioritized_replay(monkeypatch):
    target = dqn.td_target
    monkeypatch.setattr(dqn, "td_target", lambda *args: target(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match="step"):
        trained(dqn, prioritized_replay=True, num_updates=2)


def test_a_save_that_dies_half_way_leaves_the_old_checkpoint(module, monkeypatch):
    before, path, _ = trained(module)
    write = Path.write_bytes

    def dies(path, data):
        write(path, bytes(data)[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(module, resume=str(path), total_timesteps=800)
    assert same(torch.load(path, weights_only=True), before)
    assert (path.parent / "checkpoint.tmp").stat().st_size == 100


@pytest.mark.parametrize("name", ["reinforce", "dqn"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(name, tmp_path):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    result = run(name, *flags(name), "--wandb-mode", "disabled", cwd=tmp_path)
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    before = path.read_bytes()
    words = ["--resume", path, "--total-timesteps", 800, "--wandb-mode", "disabled"]
    result = run(name, *words, cwd=tmp_path, preexec_fn=full)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["reinforce", "dqn"])
def test_a_number_that_is_not_finite_is_one_line(name, tmp_path):
    result = run(name, *flags(name, env_id="envs:NanReward-v0"), cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "not finite at step" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["reinforce", "dqn"])
def test_a_directory_that_cannot_be_written_is_one_line(name, tmp_path):
    (tmp_path / "runs").write_text("a file")
    result = run(name, *flags(name), cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "runs" in result.stderr.splitlines()[-1]
    assert (tmp_path / "runs").read_text() == "a file"


# Signals


def checkpoint_of(cwd):
    (path,) = cwd.glob("runs/*/checkpoint.pt")
    return path


def written(cwd):
    """When the checkpoint was, in ns."""
    return max((x.stat().st_mtime_ns for x in cwd.glob("runs/*/checkpoint.pt")), default=0)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.001)


def last_step(run_dir):
    """Of the log's last part."""
    part = max(run_dir.glob("wandb/offline-run-*"), key=lambda x: x.stat().st_mtime)
    rows = [x["history"]["item"] for x in records(part) if x["type"] == "history"]
    return rows[-1]["global_step"], rows[-1]["_timestamp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [(name, signal.SIGTERM) for name in ALL] + [(name, signal.SIGINT) for name in ("naf", "dqn")],
)
def test_a_signal_saves_closes_the_log_and_says_how_to_go_on(name, number, tmp_path):
    long = flags(name, total_timesteps=10**8, checkpoint_frequency=10**9)
    process = start(name, *long, cwd=tmp_path, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob("runs/*/wandb/offline-run-*")), process)
    time.sleep(5)
    os.killpg(process.pid, number)  # as a terminal or a cluster does, W&B's process included
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    path = checkpoint_of(tmp_path)
    step = torch.load(path, weights_only=True)["global_step"]
    logged, _ = last_step(path.parent)
    assert logged == step if name in SCRIPTS else 0 <= step - logged < 500
    words = out.split("to go on: python ")[1].split()
    assert words[0] == f"{name}.py" and tmp_path / words[2] == path
    result = run(name, *words[1:], "--total-timesteps", step + 100, cwd=tmp_path)
    assert result.returncode == 0 and "greedy return" in result.stdout
    assert torch.load(path, weights_only=True)["global_step"] >= step + 100


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    """Also where the first cannot: an episode without end."""
    process = start("reinforce", "--env-id", "envs:Forever-v0", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/wandb/offline-run-*")), process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_kill_9_at_any_moment_loses_no_checkpoint(name, tmp_path, request):
    """--kills times in a row, each on the run that the last one left, resumed."""
    moments, words, step, in_writes = random.Random(name), flags(name), 0, 0
    words += ["--total-timesteps", 10**8, "--checkpoint-frequency", 1]
    words += ["--buffer-size", 300_000] * (name in VALUE_BASED)  # so that a write takes a while
    for _ in range(request.config.getoption("--kills")):
        before = written(tmp_path)
        process = start(name, *words, cwd=tmp_path)
        if moments.random() < 0.2:
            time.sleep(moments.uniform(0, 8))
        else:  # where most of the time goes: a checkpoint is written after every round
            wait_for(lambda old=before: written(tmp_path) > old, process)
            time.sleep(moments.uniform(0, 0.5))
        if name in VALUE_BASED and moments.random() < 0.5 and written(tmp_path) > before:
            wait_for(lambda: any(tmp_path.glob("runs/*/checkpoint.tmp")), process)
        process.kill()
        process.communicate()
        for half in tmp_path.glob("runs/*/checkpoint.tmp"):
            half.unlink()
            in_writes += 1
        paths = [x for x in tmp_path.glob("runs/*") if (x / "checkpoint.pt").exists()]
        assert len(paths) == (1 if step else len(paths)) <= 1
        if not paths:  # killed before the first checkpoint
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
            continue
        state = sys.modules[name].load_checkpoint(paths[0] / "checkpoint.pt")
        assert state["global_step"] >= step
        step, words = state["global_step"], ["--resume", paths[0] / "checkpoint.pt"]
    result = run(name, *words, "--total-timesteps", max(step, 101), cwd=tmp_path)
    assert result.returncode == 0 and "greedy return" in result.stdout, result.stderr
    print(f"{name}: {in_writes} kills inside the write of a checkpoint, step {step}")


@pytest.mark.slow
def test_kill_9_loses_the_rows_of_two_seconds_at_most(tmp_path):
    words = ["--total-timesteps", 10**8, "--checkpoint-frequency", 500]
    process = start("dqn", *words, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    time.sleep(5)
    process.kill()
    killed = time.time()
    process.communicate()
    (run_dir,) = (tmp_path / "runs").iterdir()
    time.sleep(1)
    _, logged = last_step(run_dir)
    assert killed - logged < 2


# The machine


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("name", ["reinforce", "dqn"])
def test_offline_means_offline(name, tmp_path):
    """No connection and no look-up of a name off the machine."""
    command = ["strace", "-f", "-e", "trace=network", "-o", tmp_path / "trace"]
    command += [sys.executable, ROOT / f"{name}.py", *flags(name)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    calls = (tmp_path / "trace").read_text().splitlines()
    off = [x for x in calls if "AF_INET" in x and "sin" in x and not re.search(r"127\.0|::1", x)]
    assert calls and [x for x in off if "connect" in x or "send" in x] == []


@pytest.mark.slow
def test_twenty_runs_at_once(tmp_path):
    """Started in the same second, they share no directory and do not disturb each other."""
    names = list(itertools.islice(itertools.cycle(ALL), 20))
    processes = [start(name, *flags(name), cwd=tmp_path) for name in names]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 20, results
    paths = list(tmp_path.glob("runs/*/checkpoint.pt"))
    assert len(paths) == 20
    for i in range(len(ALL)):
        assert len({out.splitlines()[0] for out, _ in results[i :: len(ALL)]}) == 1, results
