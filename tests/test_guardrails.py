import random

import pytest

from curricula.guardrails import Guardrail, allowance, check_guardrails, read_guardrails
from curricula.records import Evaluation


def row(step, share, n=200):
    scores = {"safety": tuple(float(k < share * n) for k in range(n))}
    return Evaluation(trained=("math",), step=step, seed=0, scores=scores)


STOP = {"safety": Guardrail(max_drop=0.02, action="stop")}


def test_a_clear_loss_of_a_watch_only_domain_breaks_its_guardrail():
    (verdict,) = check_guardrails(STOP, [row(0, 0.9), row(10, 0.7)], watch_only=("safety",))
    assert verdict.is_broken and verdict.action == "stop" and verdict.step == 10
    assert verdict.change.mid == pytest.approx(-0.2)
    assert "safety lost more than 0.020 against its baseline at step 10" in verdict.text


def test_a_loss_within_max_drop_does_not():
    tolerant = {"safety": Guardrail(max_drop=0.3)}
    (verdict,) = check_guardrails(tolerant, [row(0, 0.9), row(10, 0.7)], watch_only=("safety",))
    assert not verdict.is_broken


def test_a_loss_that_noise_could_explain_does_not():
    (verdict,) = check_guardrails(STOP, [row(0, 0.9, n=20), row(10, 0.8, n=20)], watch_only=("safety",))
    assert verdict.change.mid == pytest.approx(-0.1) and not verdict.is_broken


def test_a_trained_domain_is_compared_with_its_best_so_far():
    rows = [row(0, 0.5), row(10, 0.9), row(20, 0.7)]
    assert check_guardrails(STOP, rows)[0].is_broken
    assert not check_guardrails(STOP, rows, watch_only=("safety",))[0].is_broken


def test_there_is_nothing_to_judge_before_the_second_evaluation():
    assert check_guardrails(STOP, []) == [] and check_guardrails(STOP, [row(0, 0.9)]) == []


def test_what_all_looks_may_spend_sums_to_five_percent():
    # sum of t^(-3/2) up to 10,000 leaves 2 / sqrt(10,000) = .02 of 2.612 to come
    assert sum(allowance(t) for t in range(1, 10_001)) == pytest.approx(0.05 * (1 - 0.02 / 2.612), abs=1e-5)


@pytest.mark.parametrize("watch_only", [(), ("safety",)])
def test_noise_alone_breaks_a_limit_of_zero_in_few_runs_however_many_looks(watch_only):
    rng, broken, runs = random.Random(0), 0, 150
    for _ in range(runs):
        rows = []
        for step in range(40):
            scores = {"safety": tuple(float(rng.random() < 0.6) for _ in range(60))}
            rows.append(Evaluation(trained=(), step=step, seed=0, scores=scores))
        rule = {"safety": Guardrail(max_drop=0.0)}
        looks = (check_guardrails(rule, rows[: t + 1], watch_only=watch_only)[0] for t in range(1, 40))
        broken += any(verdict.is_broken for verdict in looks)
    assert broken / runs <= 0.08  # 5 % and two standard errors


def test_the_recipe_is_read_and_its_errors_name_the_domain():
    settings = {"safety": {"max_drop": 0.02, "action": "rollback"}, "math": {"max_drop": 0.1}}
    assert read_guardrails(settings, ["math", "safety"]) == {
        "safety": Guardrail(max_drop=0.02, action="rollback"),
        "math": Guardrail(max_drop=0.1, action="warn"),
    }
    for wrong, message in [
        ({"saftey": {"max_drop": 0.1}}, "unknown domain 'saftey'"),
        ({"safety": {"max_dorp": 0.1}}, "guardrails.safety: expected max_drop"),
        ({"safety": {"max_drop": 2}}, r"guardrails.safety: .*max_drop must lie in \[0, 1\), got 2"),
        ({"safety": {"max_drop": 0.1, "action": "halt"}}, "guardrails.safety: .*action is warn, stop or rollback"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_guardrails(wrong, ["safety"])
