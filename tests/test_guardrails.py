from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from polyphony.curricula.intervals import Interval
from polyphony.curricula.monitors.guardrails import Guardrail, Verdict, check, exceeded
from polyphony.curricula.records import Evaluation
from polyphony.trainer.run.callbacks import Run
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.run.outset import Cadence, Outset
from polyphony.trainer.settings import TrainerSettings
from polyphony.trainer.slots import DrawPlan


def row(step, trained=(), **scores):
    return Evaluation(trained=trained, step=step, seed=0, scores={name: tuple(items) for name, items in scores.items()})


def ones(n, of=100):
    return [1.0] * n + [0.0] * (of - n)


SAFETY = Guardrail(domain="safety", max_drop=0.05, action="stop")


def test_a_clear_loss_of_a_watched_domain_breaks_its_guardrail():
    run = [row(0, safety=ones(90), math=ones(10)), row(10, ("math",), safety=ones(50), math=ones(40))]
    (verdict,) = check([SAFETY], run, watch_only=["safety"])
    assert verdict.guardrail is SAFETY
    assert verdict.change.mid == pytest.approx(-0.4)
    assert "safety lost 0.400 since the baseline" in str(verdict)


def test_a_loss_within_the_limit_does_not():
    run = [row(0, safety=ones(90), math=ones(10)), row(10, ("math",), safety=ones(87), math=ones(40))]
    assert check([SAFETY], run, watch_only=["safety"]) == []


def test_a_loss_beyond_the_limit_that_could_be_noise_does_not():
    run = [
        row(0, safety=ones(9, of=10), math=ones(1, of=10)),
        row(10, ("math",), safety=ones(7, of=10), math=ones(1, of=10)),
    ]
    assert check([SAFETY], run, watch_only=["safety"]) == []


def test_a_trained_domain_is_held_to_the_end_of_its_own_stage():
    run = [
        row(0, math=ones(10), code=ones(10)),
        row(10, ("math",), math=ones(90), code=ones(10)),
        row(20, ("code",), math=ones(30), code=ones(90)),
    ]
    (verdict,) = check([Guardrail(domain="math", max_drop=0.1, action="rollback")], run)
    assert verdict.change.mid == pytest.approx(-0.6)
    assert verdict.since == "since the end of its own stage"


def test_under_mixtures_a_domain_is_held_to_its_best_evaluation():
    both = ("math", "code")
    run = [
        row(0, math=ones(10), code=ones(10)),
        row(10, both, math=ones(90), code=ones(50)),
        row(20, both, math=ones(30), code=ones(60)),
    ]
    (verdict,) = check([Guardrail(domain="math", max_drop=0.1)], run)
    assert verdict.since == "since its best evaluation"
    assert verdict.change.mid == pytest.approx(-0.6)


def test_no_domain_that_stands_still_breaks_a_guardrail_more_often_than_the_error_allows():
    broken = 0
    for seed in range(200):
        rng = random.Random(seed)
        run = [
            row(s, () if s == 0 else ("math",), safety=[float(rng.random() < 0.5) for _ in range(60)])
            for s in range(20)
        ]
        guard = Guardrail(domain="safety", max_drop=0.0, action="stop")
        broken += any(check([guard], run[: n + 1], watch_only=["safety"]) for n in range(1, len(run)))
    assert broken <= 0.05 * 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_drop": 2}, "Guardrail 'safety': max_drop: Input should be less than or equal to 1, got 2"),
        ({"action": "shout"}, "'safety': action: Input should be 'warn', 'stop', 'rollback' or 'recover', got 'shout'"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Guardrail(**{"domain": "safety", "max_drop": 0.1} | change)


def test_a_checkpoint_that_lost_more_than_may_be_lost_is_none_to_go_back_to_sure_or_not():
    start, math_ = row(0, safety=ones(90), math=ones(10)), ones(40)
    for kept, named in ((86, []), (84, ["safety"]), (50, ["safety"])):
        rows = [start, row(10, ("math",), safety=ones(kept), math=math_)]
        assert exceeded([SAFETY], rows, watch_only=["safety"]) == named
    assert check([SAFETY], [start, row(10, ("math",), safety=ones(84), math=math_)], watch_only=["safety"]) == []
    assert exceeded([SAFETY], [start], watch_only=["safety"]) == []


def test_a_rollback_without_a_checkpoint_stops_the_run_and_says_why(tmp_path, caplog):
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True),
        data=SimpleNamespace(domains=(), names=("safety",), skills={}),
        curriculum=None,
        entropy=SimpleNamespace(monitor=SimpleNamespace(factors=(0.5, 1.5))),
        args=SimpleNamespace(seed=1, max_grad_norm=1.0),
        plan=DrawPlan(prompts_per_draw=8, draws=9, steps=9, micro_batches_per_draw=1, micro_batches_per_step=1),
    )
    folder, control = RunFolder(tmp_path), SimpleNamespace(should_training_stop=False)
    cadence, settings = Cadence(evaluate_every=1, save_every=1, keep=1), TrainerSettings.of(max_grader_failures=0.5)
    run = Run(trainer, Outset(folder=folder, cadence=cadence, settings=settings, said=None), model="policy")
    guardrail = Guardrail(domain="safety", max_drop=0.1, action="rollback")
    lost = Verdict(
        guardrail=guardrail, step=3, change=Interval(-0.6, -0.5, -0.4), since="since the baseline", items=(4, 4)
    )
    run._act(lost, control)
    assert control.should_training_stop
    (alarm,) = folder.read("alarms")
    assert alarm["kind"] == "guardrail"
    assert alarm["message"] == f"{lost}: stopped the run: no checkpoint to go back to"
    assert alarm["message"] in caplog.text
