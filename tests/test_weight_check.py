"""The check that an engine follows the policy's weights, on a policy of one weight vector and engines of a few lines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.weight_check import WeightCheck, changed_weights, check_weights, tolerance_of


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
        Engine.sync(self)

    @property
    def logits(self):
        return next(self.policy.parameters())

    def sync(self):
        self.weight = self.logits.detach().clone()

    def sample(self):
        return [Completion(ids=[0, 1], logps=torch.log_softmax(self.weight, 0).tolist())]

    def score(self, completions):
        return [torch.log_softmax(self.logits, 0).tolist() for _ in completions]


class StaleEngine(Engine):
    def sync(self):
        pass


class OneSyncBehind(Engine):
    def sync(self):
        self.weight, self.next = getattr(self, "next", self.weight), self.logits.detach().clone()


class SilentEngine(Engine):
    def sample(self):
        return [Completion(ids=[0, 1], logps=None)]


def check(engine, tolerance=1e-3) -> WeightCheck:
    return check_weights(
        model=engine.policy, sync=engine.sync, sample=engine.sample, score=engine.score, tolerance=tolerance
    )


MOVED = ((3.048587 - 1.313262) + (0.313262 - 0.048587)) / 2
"""log_softmax [1, 2] is [-1.313262, -0.313262]; [-1, 2] it is [-3.048587, -0.048587], and this the mean over both tokens."""


def test_an_engine_that_follows_passes_and_moved_as_far_as_the_changed_weight_says():
    seen = check(Engine(Policy()))
    assert seen.is_passed
    assert (seen.before, seen.changed, seen.after) == (0, 0, 0)
    assert seen.moved == pytest.approx(MOVED, abs=1e-5)
    assert seen.tolerance == 1e-3


def test_an_engine_that_keeps_its_weights_fails():
    seen = check(StaleEngine(Policy()))
    assert not seen.is_passed
    assert seen.changed == pytest.approx(MOVED, abs=1e-5)
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


class UniformPolicy(torch.nn.Module):
    """Ten thousand tokens that differ by a hundredth of a nat, as those of a model that has learned nothing."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(10_000, generator=torch.Generator().manual_seed(1)) / 100)


class SamplingEngine(Engine):
    """Samples 200 tokens from the weights it serves."""

    def sample(self):
        logps = torch.log_softmax(self.weight, 0)
        ids = torch.multinomial(logps.exp(), 200, replacement=True, generator=torch.Generator().manual_seed(0))
        return [Completion(ids=ids.tolist(), logps=logps[ids].tolist())]

    def score(self, completions):
        return [torch.log_softmax(self.logits, 0)[torch.tensor(c.ids)].tolist() for c in completions]


class Bfloat16Engine(SamplingEngine):
    """Computes in half precision."""

    def sample(self):
        self.weight = self.weight.bfloat16().float()
        return super().sample()


def test_a_policy_that_is_sure_of_its_tokens_is_moved_far_enough_for_bf16():
    engine = SamplingEngine(SurePolicy())
    seen = check(engine, tolerance=0.2)
    assert seen.is_passed
    # a token other than the first is 12 + log(1 + 10,000 e^-12) nats less likely than sure: 12.06; changed, ln(9,999)
    assert seen.moved == pytest.approx(12.06 - 9.21, abs=0.05)
    assert not check(StaleEngine(SurePolicy()), tolerance=0.2).is_passed


def test_a_policy_near_uniform_in_half_precision_is_no_alarm_and_a_stale_engine_is():
    seen = check(Bfloat16Engine(UniformPolicy()), tolerance=0.2)
    assert seen.is_passed
    assert seen.moved < 0.01
    assert not check(StaleEngine(UniformPolicy()), tolerance=0.2).is_passed


def test_weights_of_every_layer_are_changed_and_put_back_to_the_bit():
    layers = torch.nn.Sequential(torch.nn.Embedding(3, 26), torch.nn.Linear(26, 26), torch.nn.LayerNorm(26)).bfloat16()
    layers[2].register_parameter("none", torch.nn.Parameter(torch.empty(0)))
    layers[1].register_parameter("whole", torch.nn.Parameter(torch.arange(20), requires_grad=False))
    kept = {name: p.detach().clone() for name, p in layers.named_parameters()}
    with changed_weights(layers):
        moved = {name: int((p != kept[name]).sum()) for name, p in layers.named_parameters()}
    # one in thirteen of 78, 676, 26, 26 and 26 (a bias of zeros as well); none of an empty or a whole-numbered one
    assert moved == {"0.weight": 6, "1.weight": 52, "1.bias": 2, "1.whole": 0, "2.weight": 2, "2.bias": 2, "2.none": 0}
    assert all(torch.equal(p, kept[name]) for name, p in layers.named_parameters())


def test_two_weights_that_are_alike_become_different():
    twins = torch.nn.ModuleList([torch.nn.Linear(26, 26, bias=False) for _ in range(2)])
    twins[1].load_state_dict(twins[0].state_dict())
    with changed_weights(twins):
        assert not torch.equal(twins[0].weight, twins[1].weight)


def test_a_part_of_the_weights_that_stays_old_fails_the_check():
    class TwoLayers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            self.second = torch.nn.Parameter(torch.tensor([0.5, -0.5]))

    policy = TwoLayers()
    head = policy.second.detach().clone()
    served = {}

    def sync():
        served["logits"] = policy.first.detach() + head

    seen = check_weights(
        model=policy,
        sync=sync,
        sample=lambda: [Completion(ids=[0, 1], logps=torch.log_softmax(served["logits"], 0).tolist())],
        score=lambda completions: [torch.log_softmax(policy.first + policy.second, 0).tolist() for _ in completions],
        tolerance=0.2,
    )
    assert (seen.before, seen.after) == (0, 0)
    assert not seen.is_passed


PASSED = WeightCheck(before=0.0, changed=2e-3, after=1e-3, moved=2.0, tolerance=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"before": 1.1e-3},
        {"changed": 2.1e-3},
        {"after": 1.1e-3},
        {"moved": 1.9},
        {"before": 0.0, "changed": 0.0, "after": 0.0, "moved": 0.0},
        {"before": math.nan},
        {"changed": math.nan},
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
