"""Every tensor is where --device says: whole runs on a second device, and on a GPU if there is.

The second device is the CPU under the name of "meta", so that it needs no GPU: its tensors hold
data, and an operation that mixes them with those of the CPU is an error, as it would be on a GPU.
And what an update learns when a GPU replays it, for which the CPU has a graph of its own.
"""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, VALUE_MODULES, VALUE_TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cem_q
import ddpg_continuous
import dqn
import naf
import offpolicy_pg
import pg_baseline
import reinforce

META = torch.device("meta")


class Elsewhere(torch.Tensor):
    """A tensor that says it is on META, and keeps its data on the CPU."""

    @staticmethod
    def __new__(cls, data):
        kind = {"dtype": data.dtype, "strides": data.stride(), "device": META}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, **kind)

    def __init__(self, data):
        self.on_cpu = data

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class MetaMode(TorchDispatchMode):
    """Makes META a device to create tensors on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """The operation on the data; its result is where its inputs are, or where it is asked for."""
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, Elsewhere) for x in inputs)
    here = [x for x in inputs if not isinstance(x, Elsewhere) and x.dim() > 0]  # a number may be
    allowed = "copy" in func.__name__ or all(x.dtype == torch.bool for x in here)  # a mask may be
    if there and here and not allowed:
        raise RuntimeError(f"{func} of tensors on two devices")
    device = kwargs.pop("device", None)
    if device is not None:
        there = torch.device(device) == META
        kwargs["device"] = "cpu"
    unwrap = lambda x: x.on_cpu if isinstance(x, Elsewhere) else x  # noqa: E731
    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if func.__name__.split(".")[0].endswith("_"):  # in place
        return args[0]
    wrap = lambda x: Elsewhere(x) if there and type(x) is torch.Tensor else x  # noqa: E731
    return tree_map(wrap, result)


@pytest.fixture(params=["meta", *["cuda"] * torch.cuda.is_available()])
def device(request, monkeypatch):
    if request.param == "cuda":
        yield request.param
        return
    adam = torch.optim.Adam

    def plain(*args, fused, capturable=False, **settings):  # fused knows no such device
        return adam(*args, foreach=False, **settings)

    monkeypatch.setattr(torch.optim, "Adam", plain)
    here = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(torch, "meta", here, raising=False)
    with MetaMode():
        yield request.param


def test_two_devices_do_not_mix(device):
    there = torch.ones(3, device=device)
    assert (there + 1).device == there.device and (there + 1).cpu().sum() == 6
    with pytest.raises(RuntimeError, match="device"):
        there + torch.ones(3)


RUNS = [(reinforce, {"estimator": x}) for x in ("total_return", "reward_to_go")]
RUNS += [(pg_baseline, {}), (pg_baseline, {"env_id": "Pendulum-v1"}), (naf, {})]
RUNS += [(offpolicy_pg, {"estimator": x}) for x in ("trajectory", "per_decision", "per_step")]
RUNS += [(dqn, {}), (dqn, {"double_q": True, "dueling": True, "prioritized_replay": True})]
RUNS += [(cem_q, {"maximizer": x}) for x in ("grid", "gradient", "cem", "cmaes")]
RUNS += [(ddpg_continuous, {}), (dqn, {"tabular": True})]


@pytest.mark.parametrize(("module", "own"), RUNS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_whole_run_is_on_its_device(module, own, device, monkeypatch):
    """Rollouts, buffer, updates, targets and evaluation: a tensor left behind is an error."""
    kept = []
    monkeypatch.setattr(module, "save_checkpoint", lambda run_dir, state: kept.append(state) or 0.0)
    settings = {"total_timesteps": 60, "num_envs": 4, "eval_episodes": 2} | own
    settings["env_kwargs"] = '{"max_episode_steps": 20}'
    if module in VALUE_MODULES:
        settings |= {"learning_starts": 20, "batch_size": 8, "target_network_frequency": 1}
        settings = {k: v for k, v in settings.items() if hasattr(module.Args, k)}
    returns = module.train(module.Args(**settings, device=device, wandb_mode="disabled"))
    assert returns.isfinite().all()
    parts = {key: part for key, part in kept[-1].items() if key not in ("args", "rng")}
    if module in VALUE_MODULES:
        assert parts["buffer"].pop("count").device.type == "cpu"  # nothing waits for it
    tensors = [x for x in tree_leaves(parts) if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors if x.dim() > 0} == {device}  # a number may be on the CPU
    assert len(tensors) > 5


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU: it keeps the operations, and repeats them on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} would wait for the GPU")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:  # a GPU records without computing; here that was the first
            return
        for func, args, kwargs, result in self.operations:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.detach().copy_(value)


class OnCpu(str):
    """A device that says that it is "cuda" and is the CPU."""

    def __eq__(self, other):
        return other == "cuda"

    __hash__ = str.__hash__


@pytest.fixture
def recording(monkeypatch):
    """A CPU that records as a GPU does; gives the graphs."""
    graphs = []

    @contextmanager
    def record(graph):
        graphs.append(graph)
        with graph:
            yield

    def as_tensor(data, device=None):
        return torch.tensor(data, dtype=torch.float64) if type(data) is float else convert(data)

    convert = torch.as_tensor
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)  # float64 as Adam has it on a CPU
    return graphs


def test_replays_make_the_steps_of_an_eager_update(value_script, recording):
    """From other inputs each time, with a state that is created at first, as Adam's is."""
    runs = []
    for wrap in (value_script.Graph, lambda update: update):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(network.parameters(), fused=True, capturable=True)

        def update(learning_rate, obs, network=network, optimizer=optimizer):
            loss = (network(obs) - 1).square().mean()
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach(), network.weight.detach()

        update, batches, outputs = wrap(update), torch.rand(8, 5, 3), []
        given = batches.clone()
        for i, obs in enumerate(given):
            outputs.append([x.clone() for x in update(0.1 / (i + 1), obs)])
        assert given.equal(batches)
        runs.append(outputs)
    torch.testing.assert_close(*runs)


LEARNED = [(dqn, {}), (dqn, {"double_q": True, "dueling": True}), (dqn, {"tabular": True})]
LEARNED += [(dqn, {"prioritized_replay": True}), (naf, {}), (ddpg_continuous, {})]
LEARNED += [(cem_q, {"maximizer": x}) for x in ("grid", "gradient", "cem", "cmaes")]


def learned(module, own, device, monkeypatch):
    """Everything that a checkpoint holds after a short run."""
    kept = []
    monkeypatch.setattr(module, "save_checkpoint", lambda run_dir, state: kept.append(state) or 0.0)
    args = module.Args(**VALUE_TINY | own)
    args.device = device
    module.train(args)
    parts = {key: part for key, part in kept[-1].items() if key not in ("args", "rng")}
    for key in {"optimizer", "actor_optimizer"} & parts.keys():
        parts[key] = parts[key]["state"]  # without the step size, which is a number or a tensor
    return tree_leaves(parts)


@pytest.mark.parametrize(("module", "own"), LEARNED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_run_learns_alike_when_its_updates_are_replayed(module, own, recording, monkeypatch):
    replayed = learned(module, own, OnCpu("cpu"), monkeypatch)
    plain, searched = own.get("tabular", False), own.get("maximizer", "cmaes") != "cmaes"
    assert [x.replays > 30 for x in recording] == [True] * (1 + searched - plain)
    torch.testing.assert_close(replayed, learned(module, own, "cpu", monkeypatch), rtol=0, atol=0)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize(("module", "own"), LEARNED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_gpu_learns_alike_when_it_replays_the_updates(module, own, monkeypatch):
    """Bit for bit on an H200, but for the two searches that draw, which nobody has compared."""
    replayed = learned(module, own, "cuda", monkeypatch)
    monkeypatch.setattr(module, "Graph", lambda function: function)
    eager = learned(module, own, "cuda", monkeypatch)
    if own.get("maximizer") not in ("gradient", "cem"):
        torch.testing.assert_close(replayed, eager)


@needs_gpu
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids="-".join)
def test_a_run_goes_on_on_another_device(module, devices):
    tiny = (VALUE_TINY if module in VALUE_MODULES else TINY) | {"total_timesteps": 400}
    module.train(module.Args(**tiny, device=devices[0]))
    (path,) = Path("runs").glob("*/checkpoint.pt")
    settings = tiny | {"total_timesteps": 800, "resume": str(path)}
    assert module.train(module.Args(**settings, device=devices[1])).isfinite().all()
    assert torch.load(path)["global_step"] >= 800
