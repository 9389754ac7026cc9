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
        module.train(module.Args(**{**SETTINGS, **settings}))
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
            expected = expected / expected[live].std(correction=0)
        torch.testing.assert_close(call["psi"][live], expected[live])


@pytest.mark.parametrize("module", [pg_baseline, offpolicy_pg])
def test_the_value_network_is_fitted_on_the_returns_and_only_after_its_use(record, module):
    calls = record(module, value_learning_rate=0.02, seed=4, total_timesteps=1500)
    torch.manual_seed(4)
    module.Policy(4, 2, True)
    fresh, first, last = module.ValueNetwork(4), calls[0]["ValueNetwork"], calls[-1]["ValueNetwork"]
    assert all(torch.equal(x, y) for x, y in zip(fresh.parameters(), first.parameters()))
    batch = [call["batch"] for call in calls if call["batch"] is not calls[-1]["batch"]][-1]
    returns = module.reward_to_go(batch.rewards, 1.0)[batch.mask.bool()]
    error = (last(batch.obs)[batch.mask.bool()] - returns).square().mean()
    assert error < 0.5 * returns.square().mean()


def test_equal_episodes_leave_nothing_to_normalize(record):
    """Acrobot's first episodes all end at the time limit: Ψ is 0 everywhere, and so is its std."""
    settings = {"baseline": "average", "normalize_advantages": True, "env_id": "Acrobot-v1"}
    for call in record(pg_baseline, total_timesteps=5000, **settings):
        assert call["psi"].isfinite().all()


@pytest.mark.parametrize("module", [reinforce, pg_baseline])
def test_the_step_size_decreases_with_the_env_steps(module, monkeypatch, logged):
    rates, step = [], torch.optim.Adam.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    module.train(module.Args(**SETTINGS, learning_rate=0.5, decay_steps=100))
    rates = [rate for rate in rates if rate != 0.01]  # that is V's
    steps = [0] + [row["global_step"] for row in logged[:-2]]
    assert rates == [0.5 / (1 + n / 100) for n in steps]


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
            weights = offpolicy_pg.log_weights(log_ratio, batch.mask, estimator).exp()
            expected = expected - weights * call["ValueNetwork"](batch.obs).detach()
        torch.testing.assert_close(call["psi"][live], expected[live])
        first = next(other for other in calls if other["batch"] is batch)
        new, old = call["Policy"](batch.obs), first["Policy"](batch.obs)
        assert kl_divergence(new, old)[live].mean() <= 0.01


def test_the_logged_variance_is_that_of_one_episodes_gradient(record, logged):
    for call, row in zip(record(pg_baseline, baseline="value"), logged):
        batch, mask = call["batch"], call["mask"]
        returns = pg_baseline.reward_to_go(batch.rewards, 1.0)
        baselines = {
            "none": torch.zeros_like(returns),
            "average": pg_baseline.average_baseline(returns, mask),
            "value": call["ValueNetwork"](batch.obs).detach(),
        }
        for name, baseline in baselines.items():
            gradients = []
            for i in range(len(mask)):
                log_probs = call["Policy"](batch.obs[i]).log_prob(batch.actions[i])
                objective = (mask[i] * log_probs * (returns - baseline)[i]).sum()
                parts = torch.autograd.grad(objective, list(call["Policy"].parameters()))
                gradients.append(torch.cat([part.flatten() for part in parts]))
            expected = torch.stack(gradients).var(dim=0, correction=0).sum().item()
            assert row[f"variance/{name}"] == pytest.approx(expected, rel=1e-3)


def test_the_logged_return_and_length_are_means_over_episodes(script, logged, monkeypatch):
    batches, rollout = [], script.rollout
    monkeypatch.setattr(
        script, "rollout", lambda *x, **y: batches.append(rollout(*x, **y)) or batches[-1]
    )
    returns = script.train(script.Args(**SETTINGS))
    steps = 0
    for batch, row in zip(batches[:-1], logged):  # the last rollout is the evaluation
        steps += int(batch.mask.sum())
        assert row["charts/episodic_return"] == pytest.approx(batch.rewards.sum().item() / 4)
        assert row["charts/episodic_length"] == pytest.approx(batch.mask.sum().item() / 4)
        assert row["global_step"] == steps
    assert logged[-1]["eval/episodic_return"] == pytest.approx(returns.mean().item())


@pytest.mark.parametrize("num_updates", [1, 9])
def test_the_logged_weights_and_kl_are_those_after_the_last_step(record, logged, num_updates):
    settings = {"estimator": "per_decision", "learning_rate": 0.03, "num_updates": num_updates}
    calls = record(offpolicy_pg, **settings)
    firsts = list({id(call["batch"]): call for call in reversed(calls)}.values())[::-1]
    for call, after, row in zip(firsts, firsts[1:], logged):
        batch, live = call["batch"], call["mask"].bool()
        old, new = call["Policy"](batch.obs), after["Policy"](batch.obs)
        expected = kl_divergence(new, old)[live].mean().item()
        assert row["losses/kl"] == pytest.approx(expected, rel=1e-4)
        log_ratio = batch.mask * (new.log_prob(batch.actions) - batch.log_probs)
        weights = log_ratio.cumsum(dim=1).exp()[live]
        expected = weights.sum() ** 2 / (weights**2).sum() / len(weights)
        assert row["weights/effective_fraction"] == pytest.approx(expected.item(), rel=1e-4)
        assert row["weights/largest"] == pytest.approx(weights.max().item(), rel=1e-4)
