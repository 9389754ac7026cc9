"""Every tensor is where --device says: whole runs on a second device, and on a GPU if there is.

The second device is the CPU under the name of "meta", so that it needs no GPU: its tensors hold
data, and an operation that mixes them with those of the CPU is an error, as it would be on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import VALUE_MODULES
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
    adam = torch.optim.Adam  # fused knows no such device
    monkeypatch.setattr(
        torch.optim, "Adam", lambda *args, fused, **kw: adam(*args, foreach=False, **kw)
    )
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
    assert {x.device.type for x in tensors if x.dim() > 0} == {device}  # Adam counts on the CPU
    assert len(tensors) > 5
