"""The check that an engine follows the policy's weights, on a policy of one weight vector and engines of a few lines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.weight_check import WeightCheck, check_weights, final_norm, tolerance_of


class Policy(torch.nn.Module):
    """Two tokens; their log-probabilities are log_softmax(norm.weight)."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(2)
        self.norm.weight.data = torch.tensor([1.0, 2.0])


class Engine:
    """Serves the weights of the last sync."""

    def __init__(self, policy):
        self.policy = policy
        self.weight = policy.norm.weight.detach().clone()

    def sync(self):
        self.weight = self.policy.norm.weight.detach().clone()

    def sample(self):
        return [Completion(ids=[0, 1], logps=torch.log_softmax(self.weight, 0).tolist())]

    def score(self, completions):
        return [torch.log_softmax(self.policy.norm.weight, 0).tolist() for _ in completions]


class StaleEngine(Engine):
    def sync(self):
        pass


class OneSyncBehind(Engine):
    def sync(self):
        self.weight, self.next = getattr(self, "next", self.weight), self.policy.norm.weight.detach().clone()


class SilentEngine(Engine):
    def sample(self):
        return [Completion(ids=[0, 1], logps=None)]


def check(engine) -> WeightCheck:
    return check_weights(
        model=engine.policy, sync=engine.sync, sample=engine.sample, score=engine.score, tolerance=1e-3
    )


def test_an_engine_that_follows_passes_and_moved_as_far_as_the_scaled_norm_says():
    seen = check(Engine(Policy()))
    assert seen.is_passed
    assert (seen.before, seen.scaled, seen.after) == (0, 0, 0)
    # log_softmax [1, 2] to [0.1, 0.2]: one token rises by what the other falls short of 0.9 (1 - 0.1 of their distance)
    assert seen.moved == pytest.approx(0.45, abs=1e-6)
    assert seen.tolerance == 1e-3


def test_an_engine_that_keeps_its_weights_fails():
    seen = check(StaleEngine(Policy()))
    assert not seen.is_passed
    assert seen.scaled == pytest.approx(0.45, abs=1e-6)
    assert seen.moved == 0


def test_an_engine_one_sync_behind_fails():
    assert not check(OneSyncBehind(Policy())).is_passed


def test_the_policy_is_left_exactly_as_it_was_even_where_the_engine_breaks():
    policy = Policy()
    engine = Engine(policy)
    check(engine)
    assert policy.norm.weight.tolist() == [1.0, 2.0]
    assert engine.weight.tolist() == [1.0, 2.0]
    calls = iter([None, RuntimeError("no memory")])

    def breaks():
        if error := next(calls):
            raise error

    with pytest.raises(RuntimeError, match="no memory"):
        check_weights(model=policy, sync=breaks, sample=engine.sample, score=engine.score, tolerance=1e-3)
    assert policy.norm.weight.tolist() == [1.0, 2.0]


def test_precision_and_device_say_what_counts_as_a_match():
    assert tolerance_of(torch.float32, device="cpu") == 1e-3
    assert tolerance_of(torch.float32, device="cuda") == 0.02  # TF32
    assert tolerance_of(torch.bfloat16, device="cpu") == tolerance_of(torch.bfloat16, device="cuda") == 0.2


class SurePolicy(torch.nn.Module):
    """Ten thousand tokens, one of which is twelve nats likelier than each other: an entropy of 0.8 nats."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(10_000)
        self.norm.weight.data = torch.zeros(10_000)
        self.norm.weight.data[0] = 12.0


class SamplingEngine(Engine):
    """Samples 200 tokens from the weights it serves."""

    def sample(self):
        logps = torch.log_softmax(self.weight, 0)
        ids = torch.multinomial(logps.exp(), 200, replacement=True, generator=torch.Generator().manual_seed(0))
        return [Completion(ids=ids.tolist(), logps=logps[ids].tolist())]

    def score(self, completions):
        return [torch.log_softmax(self.policy.norm.weight, 0)[torch.tensor(c.ids)].tolist() for c in completions]


def test_a_policy_that_is_sure_of_its_tokens_is_moved_far_enough_for_bf16():
    policy = SurePolicy()
    engine = SamplingEngine(policy)
    seen = check_weights(model=policy, sync=engine.sync, sample=engine.sample, score=engine.score, tolerance=0.2)
    assert seen.is_passed
    # a token other than the first is 12 + log(1 + 10,000 e^-12) nats less likely than sure: 12.06; scaled, ln(10,002)
    assert seen.moved == pytest.approx(12.06 - 9.21, abs=0.05)
    stale = check_weights(model=policy, sync=lambda: None, sample=engine.sample, score=engine.score, tolerance=0.2)
    assert not stale.is_passed


PASSED = WeightCheck(before=0.0, scaled=1e-3, after=0.0, moved=5e-3, tolerance=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"before": 2e-3},
        {"scaled": 2e-3},
        {"after": 2e-3},
        {"moved": 4e-3},
        {"before": math.nan},
        {"scaled": math.nan},
        {"after": math.nan},
        {"moved": math.nan},
    ],
)
def test_one_number_out_of_bounds_or_undefined_fails_the_check(change):
    assert PASSED.is_passed
    assert not replace(PASSED, **change).is_passed


def test_an_engine_that_tells_no_log_probabilities_cannot_be_checked():
    with pytest.raises(ValueError, match="the engine returns no log-probabilities"):
        check(SilentEngine(Policy()))


def test_the_final_norm_is_the_last_of_the_shallowest():
    block = torch.nn.ModuleDict({"q_norm": torch.nn.RMSNorm(2), "input_layernorm": torch.nn.RMSNorm(2)})
    layers = torch.nn.ModuleDict({"0": block})
    inner = torch.nn.ModuleDict({"layers": layers, "embed_norm": torch.nn.RMSNorm(2), "norm": torch.nn.RMSNorm(2)})
    model = torch.nn.ModuleDict({"model": inner, "lm_head": torch.nn.Linear(2, 2)})
    assert final_norm(model) is inner["norm"].weight


def test_a_model_without_a_norm_is_named():
    with pytest.raises(ValueError, match="Linear has no module named like a norm"):
        final_norm(torch.nn.Linear(2, 2))
