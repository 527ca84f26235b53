from __future__ import annotations

import json
import math

import pytest

from polyphony.rewards.registry import find_reward, tell
from polyphony.trainer.metrics import METRICS, OF_THE_RUN, defined, key


def test_a_key_is_family_domain_metric():
    assert key("domain", "reward", "math") == "domain/math/reward"
    assert key("transfer", "drawdown_max") == "transfer/drawdown_max"


@pytest.mark.parametrize(("family", "metric"), [("domain", "rewrad"), ("domains", "reward")])
def test_a_name_that_is_not_listed_cannot_be_logged(family, metric):
    with pytest.raises(KeyError):
        key(family, metric, "math")


def test_what_has_no_finite_value_is_absent_from_logs():
    assert defined({"a": 0.0, "b": None, "c": math.nan, "d": math.inf, "e": -1}) == {"a": 0.0, "e": -1}


def telling(prompts, completions, log_metric, **columns):
    """Grades as the lab does, and says of each completion what our graders say of programs."""
    tell(log_metric, exhausted=[False] * len(prompts), suspected_tricks=[False] * len(prompts))
    tell(log_metric, refused_calls=[False] * len(prompts))
    log_metric("judge_tokens", 80.0)
    log_metric("own", 1.0)
    return find_reward("exact")(prompts, completions, **columns)


@pytest.mark.slow
def test_a_short_run_emits_every_metric_and_no_other_of_our_families(tmp_path, engine):
    from polyphony.launch.recipe import load_recipe
    from polyphony.launch.train import train
    from tests.conftest import RECIPES

    # stages, so that backward and forward transfer are defined; an evaluation every step gives drawdown two halves
    overrides = ["curriculum.scheduler=sequential", "eval.every=1", "tracking.wandb=null"]
    overrides += ["entropy.control=adaptive", "eval.greedy=true"]
    overrides += ["pool.retry_share=0.1", "domains.arithmetic.reward=tests.test_dashboard:telling"]
    overrides += ["pool.refill.max_rounds=1", "grpo.min_p=0.001"]  # replaced groups whose entropy stays unmeasured
    train(load_recipe(RECIPES / "debug.yaml", overrides), tmp_path / "run", engine=engine)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [name.split("/") for line in lines for name in line]
    emitted = {(family, rest[-1]) for family, *rest in parts if family in METRICS}
    own = {("domain", "own"), ("heldout", "own")}
    known = {(family, metric) for family, metrics in METRICS.items() for metric in metrics}
    # tests/test_distil.py, tests/test_environments.py, tests/test_recovery_run.py
    elsewhere = ("distil", "environment", "recovery")
    of_ahead = {("rollout", name) for name in ("behind", "wait_s", "dropped")}  # tests/test_rollouts_ahead.py
    assert emitted - own == {(family, metric) for family, metric in known if family not in elsewhere} - of_ahead
    assert own <= emitted
    of_the_run = {f"{family}/{rest[0]}" for family, *rest in parts if family in METRICS and len(rest) == 1}
    assert of_the_run == OF_THE_RUN - set(map("/".join, of_ahead)) | {"transfer/bwt"}
    domains = {rest[0] for family, *rest in parts if family in METRICS and len(rest) == 2}
    assert domains == {"arithmetic", "stories", "safety"}
    between = {(family == "skill", tuple(rest[1:-1])) for family, *rest in parts if family in METRICS}
    assert {(False, ()), (False, ("logged",)), (True, ("plus",)), (True, ("story",))} <= between
    assert {way for is_skill, way in between if not is_skill} == {(), ("logged",)}
