"""What `train` hands to the gradient (2), batch by batch: the equations put together."""

import copy

import pytest
import torch
from torch.distributions import kl_divergence

import offpolicy_pg
import pg_baseline
import reinforce

SETTINGS = {"total_timesteps": 300, "num_envs": 4, "eval_episodes": 2, "wandb_mode": "disabled"}


@pytest.fixture
def record(monkeypatch):
    """Runs `train` and returns, for each call of policy_loss, the networks before it, the batch
    and the three arguments, as a list of dicts."""

    def run(module, **settings):
        calls, networks, batches = [], {}, []
        originals = {name: getattr(module, name) for name in ("policy_loss", "rollout", "Policy")}

        def rollout(envs, policy, **kwargs):
            batches.append(originals["rollout"](envs, policy, **kwargs))
            return batches[-1]

        def policy_loss(log_probs, psi, mask):
            before = {name: copy.deepcopy(network) for name, network in networks.items()}
            inputs = {"log_probs": log_probs.detach(), "psi": psi.detach(), "mask": mask}
            calls.append({"batch": batches[-1], **before, **inputs})
            return originals["policy_loss"](log_probs, psi, mask)

        def spy(name):
            make = getattr(module, name)

            def made(*args):
                networks[name] = make(*args)
                return networks[name]

            monkeypatch.setattr(module, name, made)

        monkeypatch.setattr(module, "policy_loss", policy_loss)
        monkeypatch.setattr(module, "rollout", rollout)
        for name in {"Policy", "ValueNetwork"} & set(vars(module)):
            spy(name)
        module.train(module.Args(**SETTINGS, **settings))
        assert len(calls) > 2
        return calls

    return run


def check_common(call):
    batch, policy = call["batch"], call["Policy"]
    torch.testing.assert_close(call["log_probs"], policy(batch.obs).log_prob(batch.actions))
    assert torch.equal(call["mask"], batch.mask)


@pytest.mark.parametrize("estimator", ["total_return", "reward_to_go"])
def test_reinforce(record, estimator):
    for call in record(reinforce, estimator=estimator, gamma=0.9):
        check_common(call)
        expected = getattr(reinforce, estimator)(call["batch"].rewards, 0.9)
        assert torch.equal(call["psi"], expected)


@pytest.mark.parametrize("baseline", ["none", "average", "value", "optimal"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pg_baseline(record, baseline, normalize):
    calls = record(pg_baseline, baseline=baseline, normalize_advantages=normalize, gamma=0.9)
    for call in calls:
        check_common(call)
        batch, mask, live = call["batch"], call["mask"], call["mask"].bool()
        returns = pg_baseline.reward_to_go(batch.rewards, 0.9)
        if baseline == "none":
            b = 0
        elif baseline == "average":
            b = pg_baseline.average_baseline(returns, mask)
        elif baseline == "value":
            b = call["ValueNetwork"](batch.obs).detach()
        else:
            rows = [
                pg_baseline.trajectory_gradients(call["Policy"], batch.obs, batch.actions, psi)
                for psi in (mask, mask * returns)
            ]
            b = pg_baseline.optimal_baseline(*rows)
        expected = returns - b
        if normalize:
            expected = expected / expected[live].std()
        torch.testing.assert_close(call["psi"][live], expected[live])


def test_the_value_network_is_fitted_on_the_returns(record):
    calls = record(pg_baseline)
    first, last = calls[0], calls[-1]

    def error(network):
        returns = pg_baseline.reward_to_go(first["batch"].rewards, 1.0)
        return (first["mask"] * (network(first["batch"].obs) - returns)).square().sum()

    assert error(last["ValueNetwork"]) < 0.9 * error(first["ValueNetwork"])


@pytest.mark.parametrize("baseline", ["none", "value"])
@pytest.mark.parametrize("estimator", ["trajectory", "causal", "per_decision", "per_step"])
def test_offpolicy_pg(record, estimator, baseline):
    settings = {"estimator": estimator, "baseline": baseline, "gamma": 0.9, "num_updates": 4}
    calls = record(offpolicy_pg, target_kl=0.01, **settings)
    assert len({id(call["batch"]) for call in calls}) < len(calls)
    for call in calls:
        check_common(call)
        batch, live = call["batch"], call["mask"].bool()
        log_ratio = call["log_probs"] - batch.log_probs
        arguments = log_ratio, batch.rewards, batch.mask, 0.9, estimator
        expected = offpolicy_pg.importance_weighted_psi(*arguments)
        if baseline == "value":
            weights = offpolicy_pg.importance_weights(log_ratio, batch.mask, estimator).exp()
            expected = expected - weights * call["ValueNetwork"](batch.obs).detach()
        torch.testing.assert_close(call["psi"][live], expected[live])
        first = next(other for other in calls if other["batch"] is batch)
        new, old = call["Policy"](batch.obs), first["Policy"](batch.obs)
        assert kl_divergence(new, old)[live].mean() <= 0.01
