"""Every signal rings in a run that it was planted in, and once; a run that is well is silent."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from polyphony.curricula.records import Evaluation
from polyphony.launch.report.signals import with_signals
from polyphony.trainer.run.signals import DRAWS, EVALUATIONS, SIGNALS, Signals

NAMES = ("math", "talk")
HEALTHY = {"grad_norm": 1.2, "rollout/useful_token_frac": 0.8} | {
    f"domain/{name}/{metric}": value
    for name in NAMES
    for metric, value in {"alike": 0.1, "clipped_ratio": 0.0, "dead_correct": 0.1, "dead_wrong": 0.1}.items()
}
DEAD = {"rollout/useful_token_frac": 0.0, "domain/math/dead_wrong": 1.0, "domain/talk/dead_wrong": 1.0}


def signals(**settings) -> Signals:
    return Signals(**{"trained": NAMES, "prompts_per_draw": 8} | settings)


def feed(watching: Signals, *lines: dict[str, float], start: int = 1, every: int = 1) -> list[tuple[int, str, str]]:
    found = []
    for n, line in enumerate(lines):
        found += watching.see(start + n * every, HEALTHY | line)
    return [(alarm.step, alarm.kind, alarm.domain) for alarm in found]


def evaluation(step: int, seed: int = 0, *, of: int = 60, **passing: float) -> Evaluation:
    rng = random.Random(seed)
    scores = {name: tuple(float(rng.random() < passing.get(name, 0.5)) for _ in range(of)) for name in (*NAMES, "safe")}
    return Evaluation(trained=NAMES, step=step, seed=1, scores=scores, entropy=dict.fromkeys(scores, 0.5))


def evaluate(watching: Signals, rows: list[Evaluation], kl: tuple[float, ...] = ()) -> list[tuple[int, str, str]]:
    found = []
    for n in range(len(rows)):
        measured = {name: {"a": (100 * kl[n], 100)} for name in NAMES} if kl else {}
        found += watching.after_evaluation(rows[: n + 1], measured)
    return [(alarm.step, alarm.kind, alarm.domain) for alarm in found]


@pytest.mark.parametrize(
    ("settings", "line", "step", "kind", "domain"),
    [
        ({}, DEAD, DRAWS, "all_dead", ""),
        ({"prompts_per_draw": 1}, {}, 1, "one_prompt", ""),
        ({}, {"domain/math/alike": 1.0}, DRAWS, "alike", "math"),
        ({}, {"domain/talk/clipped_ratio": 0.6}, DRAWS, "truncation", "talk"),
        ({"max_grad_norm": 0.1}, {}, DRAWS, "gradient_clipped", ""),
    ],
)
def test_a_planted_signal_rings_once_within_so_many_draws(settings, line, step, kind, domain):
    assert feed(signals(**settings), *[line] * 5 * DRAWS) == [(step, kind, domain)]


@pytest.mark.parametrize(
    ("line", "kind"),
    [({"domain/math/clipped_ratio": 0.35}, "truncation"), ({"grad_norm": 9.0}, "gradient_clipped")],
)
def test_what_has_grown_since_a_runs_own_first_draws_rings(line, kind):
    ((step, rung, _),) = feed(signals(), *[{}] * DRAWS, *[line] * DRAWS)
    assert DRAWS < step <= 2 * DRAWS and rung == kind


@pytest.mark.parametrize("line", [{"grad_norm": 9.0}, {"domain/math/clipped_ratio": 0.35}, {"domain/math/alike": 0.9}])
def test_what_was_so_from_the_first_draw_on_is_no_news(line):
    assert feed(signals(), *[line] * 4 * DRAWS) == []


def test_a_run_that_is_well_is_silent():
    rng = random.Random(1)
    lines = [
        {"grad_norm": rng.lognormvariate(0, 0.7), "rollout/useful_token_frac": float(rng.random() < 0.9)}
        | {f"domain/{name}/{metric}": rng.random() * 0.4 for name in NAMES for metric in ("alike", "clipped_ratio")}
        for _ in range(400)
    ]
    assert feed(signals(), *lines) == []


def test_one_draw_with_a_gradient_begins_the_count_anew():
    watching = signals()
    assert feed(watching, *[DEAD] * (DRAWS - 1), {}, *[DEAD] * (DRAWS - 1)) == []


def test_a_signal_that_was_away_for_long_is_told_again():
    rung = feed(signals(), *[DEAD] * DRAWS, {}, *[DEAD] * DRAWS, *[{}] * 2 * DRAWS, *[DEAD] * DRAWS)
    assert [step for step, *_ in rung] == [DRAWS, 5 * DRAWS + 1]


def test_a_line_of_several_draws_counts_as_so_many():
    assert feed(signals(), *[DEAD] * 5, start=4, every=4) == [(8, "all_dead", "")]
    assert feed(signals(steps_per_draw=2), *[DEAD] * 5, start=4, every=4) == [(16, "all_dead", "")]


def test_a_line_without_a_draw_says_nothing():
    assert signals(prompts_per_draw=1).see(9, {"train_runtime": 3.0, "heldout/math/score": 0.5}) == []


def test_a_domain_below_its_own_start_rings_whether_it_is_trained_or_watched():
    rows = [evaluation(0, safe=0.9), evaluation(5, safe=0.2), evaluation(10, safe=0.2)]
    assert evaluate(signals(), rows) == [(5, "below_start", "safe")]


def test_no_domain_that_stands_still_is_said_to_fall_more_often_than_one_run_in_twenty():
    rung = sum(bool(evaluate(signals(), [evaluation(n, 20 * run + n) for n in range(12)])) for run in range(60))
    assert rung <= 6  # 3 expected at most; 7 has probability .03 at a true rate of .05


def test_the_best_checkpoint_rings_once_it_is_old_and_the_worst_domain_surely_lower():
    first, best, lower = evaluation(0, math=0.2), evaluation(5, math=0.8), evaluation(10, math=0.2)
    later = [replace(lower, step=10 + n) for n in range(EVALUATIONS)]
    rung = evaluate(signals(), [first, best, *later[:EVALUATIONS]])
    assert rung[-1:] == [(10 + EVALUATIONS - 1, "best_long_ago", "")]
    assert evaluate(signals(), [first, best, *later[: EVALUATIONS - 1]]) == []
    assert evaluate(signals(), [first, *[best] * 5]) == []


def test_a_step_too_large_rings_by_the_distance_it_went():
    rows = [evaluation(step) for step in (0, 10, 20, 30)]
    assert evaluate(signals(), rows, (0.0, 0.9, 2.5, 9.0)) == [(20, "kl_step", "")]  # 0.09, 0.16 and 0.65 a step
    assert evaluate(signals(), rows, (0.0, 0.9, 1.8, 2.7)) == []


def test_an_entropy_that_is_no_longer_measured_rings():
    rows = [evaluation(0), evaluation(5), evaluation(10)]
    rows[1].entropy.pop("talk")  # type: ignore[attr-defined]
    assert evaluate(signals(), rows) == [(5, "entropy_unmeasured", "talk")]


def test_restored_signals_go_on_as_if_nothing_had_happened():
    lines = [*[{}] * 5, *[DEAD | {"domain/math/alike": 1.0}] * 30]
    rows = [evaluation(0, safe=0.9), evaluation(5, safe=0.2), evaluation(10, safe=0.2)]
    whole = signals()
    expected = feed(whole, *lines), evaluate(whole, rows, (0.0, 0.1, 0.2))
    for cut in (3, 9, 20):
        first, second = signals(), signals()
        before = feed(first, *lines[:cut]), evaluate(first, rows[:2], (0.0, 0.1))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [(a.step, a.kind, a.domain) for a in second.after_evaluation(rows, {n: {"a": (20, 100)} for n in NAMES})]
        assert (before[0] + feed(second, *lines[cut:], start=cut + 1), before[1] + rest) == expected
        assert json.dumps(second.state_dict(), sort_keys=True) == json.dumps(whole.state_dict(), sort_keys=True)


def test_the_report_shows_what_nobody_told_a_run_of_an_older_version():
    lines = [{"step": step, **DEAD, "domain/math/n": 8.0} for step in range(1, 20)]
    recorded = [{"step": 3, "domain": "math", "kind": "collapse", "message": "fell"}]
    shown = with_signals(recorded, metrics=lines, recipe={}, transfer=None)
    assert [(line["step"], line["kind"]) for line in shown] == [(3, "collapse"), (DRAWS, "all_dead")]
    assert [line["remedy"] for line in shown] == [SIGNALS[kind].remedy for kind in ("collapse", "all_dead")]
    told = [line | {"domain/math/alike": 0.0} for line in lines]
    assert len(with_signals(recorded, metrics=told, recipe={}, transfer=None)) == 1


def test_every_signal_has_its_number_and_a_remedy():
    assert all(signal.number and signal.remedy for signal in SIGNALS.values())
